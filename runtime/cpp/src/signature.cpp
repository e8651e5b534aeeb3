#include "signature.hpp"

#include <algorithm>

namespace sam3rt {
namespace {

LoadedTensor as_loaded(const TensorSpec& spec) {
    return {spec.name, spec.dtype, shape_of(spec, -1)};
}

/// Whether names, types and ranks are equal, and all sizes that both sides fix.
bool agree(const LoadedTensor& a, const LoadedTensor& b) {
    return a.name == b.name && a.dtype == b.dtype && a.shape.size() == b.shape.size() &&
           std::equal(a.shape.begin(), a.shape.end(), b.shape.begin(),
                      [](std::int64_t x, std::int64_t y) { return x == y || x < 0 || y < 0; });
}

std::string text_of(const std::vector<LoadedTensor>& tensors) {
    std::string text = "[";
    for (const LoadedTensor& tensor : tensors) {
        text += (text.size() == 1 ? "" : ", ") + tensor.name + ": " + tensor.dtype + " [";
        for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
            const std::int64_t side = tensor.shape[i];
            text += (i == 0 ? "" : ", ") + (side < 0 ? "?" : std::to_string(side));
        }
        text += "]";
    }
    return text + "]";
}

std::string mismatch(std::vector<LoadedTensor> found, const std::vector<TensorSpec>& specs,
                     const std::string& kind, bool is_retyped) {
    std::vector<LoadedTensor> wanted;
    std::transform(specs.begin(), specs.end(), std::back_inserter(wanted), as_loaded);
    if (is_retyped) {
        for (std::vector<LoadedTensor>* tensors : {&found, &wanted}) {
            std::sort(tensors->begin(), tensors->end(),
                      [](const auto& a, const auto& b) { return a.name < b.name; });
            for (LoadedTensor& tensor : *tensors) {
                tensor.dtype = "any type";
            }
        }
    }
    const bool agrees = found.size() == wanted.size() &&
                        std::equal(found.begin(), found.end(), wanted.begin(), agree);
    return agrees ? ""
                  : "has " + kind + " " + text_of(found) + ", the manifest says " + text_of(wanted);
}

}  // namespace

Shape shape_of(const TensorSpec& spec, std::int64_t dynamic) {
    Shape shape;
    for (const Axis& side : spec.shape) {
        const auto* size = std::get_if<std::int64_t>(&side);
        shape.push_back(size == nullptr ? dynamic : *size);
    }
    return shape;
}

Shape shape_of_map(const TensorSpec& spec) {
    Shape shape = shape_of(spec, 1);
    shape.at(0) = 1;
    return shape;
}

std::string signature_mismatch(const GraphSpec& promised, std::vector<LoadedTensor> inputs,
                               std::vector<LoadedTensor> outputs, bool is_retyped) {
    const std::string found = mismatch(std::move(inputs), promised.inputs, "inputs", is_retyped);
    return found.empty() ? mismatch(std::move(outputs), promised.outputs, "outputs", is_retyped)
                         : found;
}

}  // namespace sam3rt
