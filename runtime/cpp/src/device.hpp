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

/// The device a caller asked for; "auto" is CUDA where it works, and the CPU otherwise.
/// Throws InvalidInputError where the text makes no sense, and BackendError where this ONNX Runtime
/// or this machine cannot do it.
Device choose_device(const std::string& text);

}  // namespace sam3rt
