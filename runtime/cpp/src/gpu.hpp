// What the NVIDIA driver says of a GPU.
#pragma once

#include <string>

namespace sam3rt {

/// A kind of GPU: its name as the driver gives it, and its compute capability, such as "8.9".
struct Gpu {
    std::string name;
    std::string compute_capability;

    /// The compute capability as compilers take it behind "sm_", such as "89".
    std::string capability_digits() const;

    bool operator==(const Gpu& other) const {
        return name == other.name && compute_capability == other.compute_capability;
    }
};

/// A GPU and its driver.
struct Machine {
    Gpu gpu;
    /// Such as "550.54.15", or the CUDA version, as "CUDA 12.6", where the driver does not say.
    std::string driver_version;
};

/// The GPU with this number. Asks the driver's own library, which is there wherever a GPU works, so
/// that nothing here links to CUDA. Throws BackendError where there is no driver or no such GPU.
Machine query_gpu(int number);

}  // namespace sam3rt
