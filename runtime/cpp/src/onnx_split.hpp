// Cuts an ONNX graph in two, so that what an image alone decides is computed once for all its
// prompts. The rules are those of sam3rt.bundle.onnx_split in Python.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "files.hpp"

namespace sam3rt {

/// A graph in two parts.
struct GraphParts {
    /// `.onnx` file from some inputs to the values at the cut.
    Bytes first;
    /// From those values and the other inputs to the outputs.
    Bytes rest;
    /// Names of the values.
    std::vector<std::string> cut;
    /// Names of the whole graph's inputs, in its order.
    std::vector<std::string> inputs;
};

/// Cut a graph, an `.onnx` file that check_onnx has accepted, behind the last operators that read
/// nothing but the named inputs and constants. Values at the cut are taken for float32 where the
/// file does not say what they are.
///
/// Returns nothing where one of those inputs is also read behind the cut, or none alone, and where
/// values have odd names or descriptions: whoever loads the whole judges those.
std::optional<GraphParts> split_onnx(ByteView content, const std::vector<std::string>& inputs);

}  // namespace sam3rt
