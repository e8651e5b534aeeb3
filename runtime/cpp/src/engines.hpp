// TensorRT engines that `sam3rt build` made: which of them may serve here.
#pragma once

#include <filesystem>
#include <functional>
#include <string>

#include "accuracy.hpp"
#include "bundle.hpp"
#include "gpu.hpp"

namespace sam3rt {

/// An engine file as its sidecar describes it, in its folder.
struct EngineFile {
    std::filesystem::path folder;
    FileEntry file;
};

/// The two engines to use.
struct EngineSet {
    /// The models that wrap them for ONNX Runtime.
    std::filesystem::path encoder;
    std::filesystem::path decoder;
    /// Type of the feature maps between them: "float32" or "float16".
    std::string features_dtype;
    /// The recipe, or "ENCODER+DECODER" where the two differ.
    std::string precision;
    EngineFile encoder_engine;
    EngineFile decoder_engine;
};

/// Whether a bundle has engines of a backend, whatever they fit.
bool has_engines(const Bundle& bundle, const std::string& backend);

/// Makes engines ready to run, so that they can be compared with the bundle's parity record. The
/// runner keeps what it needs. Throws BackendError or BundleError where they cannot be used.
using OpenEngines = std::function<Runner(const EngineSet& engines)>;

/// Choose an encoder and a decoder that fit this machine and passed the gate on it together, the
/// fastest recipes first, and compare their files with what was recorded of them. Engines that
/// nobody has judged here are opened and judged now, and the verdict is remembered.
///
/// Engines lie in BUNDLE/engines/FOLDER/<role>.engine, each with a sidecar <role>.engine.json and a
/// wrapper model <role>_ctx.onnx. A sidecar that says "proven" is not believed: the verdicts in the
/// user's cache count, by which the Python runtime goes too.
///
/// `backend` is "tensorrt" or "tensorrt-rtx". `engine_folder`, if not empty, is the folder that
/// must hold one of the engines: a path, or a name below BUNDLE/engines.
///
/// `loaded_by` is the version of TensorRT that loads the engines without ONNX Runtime, such as
/// "10.3.0.26", or empty. Only engines of that version fit then, sets that passed before are opened
/// as well, so that the next one is tried where one cannot be, and wrappers are not needed. The set
/// that is returned is the one that was opened last. Who opens an engine hashes what it loads.
///
/// Throws BackendError where none fits or none passes, saying what to do about it; BundleError
/// where the bundle's parity record is damaged, or a file of the only engines was changed.
EngineSet choose_engines(const Bundle& bundle, const std::string& backend, const Machine& machine,
                         const std::filesystem::path& engine_folder, const OpenEngines& open,
                         const std::string& loaded_by = "");

}  // namespace sam3rt
