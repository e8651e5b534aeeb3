// Where graphs run, by the names callers use.
#pragma once

#include <string>

namespace sam3rt {

/// What runs the graphs.
enum class Provider { cpu, cuda, tensorrt, tensorrt_rtx };

/// A provider and the number of its GPU.
struct Device {
    Provider provider = Provider::cpu;
    int number = 0;

    bool on_gpu() const { return provider != Provider::cpu; }
    /// Such as "cpu", "cuda:0" or "tensorrt:0".
    std::string name() const;
};

/// What callers call a provider, such as "tensorrt-rtx".
std::string name_of(Provider provider);

/// The device that a caller named. Throws InvalidInputError where the text makes no sense.
Device parse_device(const std::string& text);

}  // namespace sam3rt
