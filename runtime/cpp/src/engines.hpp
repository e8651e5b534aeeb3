// TensorRT engines that `sam3rt build` made: which of them may serve here.
#pragma once

#include <filesystem>
#include <string>

#include "bundle.hpp"
#include "gpu.hpp"

namespace sam3rt {

/// The two engines to use, by the models that wrap them for ONNX Runtime.
struct EngineSet {
    std::filesystem::path encoder;
    std::filesystem::path decoder;
    /// Type of the feature maps between them: "float32" or "float16".
    std::string features_dtype;
};

/// Choose an encoder and a decoder that fit this machine and passed the gate on it together, the
/// fastest recipes first, and compare their files with what was recorded of them.
///
/// Engines lie in BUNDLE/engines/FOLDER/<role>.engine, each with a sidecar <role>.engine.json and a
/// wrapper model <role>_ctx.onnx. A sidecar that says "proven" is not believed: the verdicts in the
/// user's cache count, by which the Python runtime goes too.
///
/// `backend` is "tensorrt" or "tensorrt-rtx". `engine_folder`, if not empty, is the folder that
/// must hold one of the engines: a path, or a name below BUNDLE/engines.
///
/// Throws BackendError where none fits or none is proven, saying what to do about it, and
/// BundleError where a file was changed.
EngineSet choose_engines(const Bundle& bundle, const std::string& backend, const Machine& machine,
                         const std::filesystem::path& engine_folder);

}  // namespace sam3rt
