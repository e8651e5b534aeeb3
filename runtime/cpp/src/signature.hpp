// Whether a graph takes and returns what its manifest says.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <map>
#include <string>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// ONNX Runtime's element types by the manifest's names.
const std::map<std::string, ONNXTensorElementDataType>& element_types();

/// Compare names, types, ranks and fixed sizes of a graph's inputs and outputs with what is
/// promised. Throws BundleError, naming the graph's file.
void check_signature(const Ort::Session& session, const GraphSpec& promised);

}  // namespace sam3rt
