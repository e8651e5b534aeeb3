// Whether a graph takes and returns what its manifest says.
#pragma once

#include <string>
#include <vector>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// An input or output as it was loaded: type and sizes; -1 stands for a dynamic axis.
struct LoadedTensor {
    std::string name;
    std::string dtype;
    Shape shape;
};

/// A tensor's sizes, with `dynamic` for axes that have names.
Shape shape_of(const TensorSpec& spec, std::int64_t dynamic);

/// Of one image's feature map, an output of the encoder: [1, C, h, w].
Shape shape_of_map(const TensorSpec& spec);

/// How names, types, ranks and fixed sizes differ from what is promised, such as "has inputs [...],
/// the manifest says [...]"; empty where they do not. What `is_retyped` was made from the graph, as
/// an engine is: types may be other ones, and tensors may come in any order.
std::string signature_mismatch(const GraphSpec& promised, std::vector<LoadedTensor> inputs,
                               std::vector<LoadedTensor> outputs, bool is_retyped = false);

}  // namespace sam3rt
