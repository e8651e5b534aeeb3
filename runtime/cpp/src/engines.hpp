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

/// Choose the encoder and decoder that passed the gate together on this kind of GPU, and compare
/// their files with what was recorded of them.
///
/// Engines lie in BUNDLE/engines/FOLDER/<role>.engine, each with a sidecar <role>.engine.json and a
/// wrapper model <role>_ctx.onnx.
///
/// `backend` is "tensorrt" or "tensorrt-rtx". `engine_folder`, if not empty, is the folder that
/// must hold one of the engines: a path, or a name below BUNDLE/engines.
///
/// Throws BackendError where none fits or several do, saying what to do about it, and BundleError
/// where a file was changed.
EngineSet choose_engines(const Bundle& bundle, const std::string& backend, const Gpu& gpu,
                         const std::filesystem::path& engine_folder);

}  // namespace sam3rt
