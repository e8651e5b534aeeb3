// ONNX Runtime as this library uses it: one environment, sessions on a device, errors as ours.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <map>
#include <string>

#include "device.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// The process's environment: the host's, or one of our own. Throws BackendError where the ONNX
/// Runtime library is older than the headers this library was built with.
const Ort::Env& ort_environment();

/// ONNX Runtime's element types by the manifest's names.
const std::map<std::string, ONNXTensorElementDataType>& element_types();

/// Options for a session on a device, with what a model's options say of threads, memory and the
/// provider. Throws Ort::Exception where the provider cannot be loaded.
Ort::SessionOptions session_options(const Device& device, const ModelOptions& model);

/// Memory of a device, or of the host.
Ort::MemoryInfo memory_of(const Device& device);
Ort::MemoryInfo host_memory();

/// Moves tensors between the host and a device, by running a graph that does nothing: older
/// versions of ONNX Runtime have no other way that needs no CUDA headers.
class Copier {
public:
    /// Throws Ort::Exception where the device does not work.
    Copier(const Device& device, ONNXTensorElementDataType type);

    Ort::Value to_host(const Ort::Value& value) const;
    Ort::Value to_device(const Ort::Value& value) const;

private:
    Ort::Value run(const Ort::Value& value, const Ort::MemoryInfo& target) const;

    Device device_;
    mutable Ort::Session session_;
};

}  // namespace sam3rt
