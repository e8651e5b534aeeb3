#include "signature.hpp"

#include <algorithm>
#include <vector>

namespace sam3rt {

/// ONNX Runtime's element types by the manifest's names.
const std::map<std::string, ONNXTensorElementDataType>& element_types() {
    static const std::map<std::string, ONNXTensorElementDataType> types = {
        {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
        {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
        {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
        {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
        {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
    };
    return types;
}

namespace {

/// A tensor's name, type and sizes; -1 stands for a dynamic axis, which each side may name as it
/// likes.
struct Signature {
    std::string name;
    std::string dtype;
    Shape shape;
};

Signature signature_of(const TensorSpec& spec) {
    Signature signature{spec.name, spec.dtype, {}};
    for (const Axis& side : spec.shape) {
        const auto* size = std::get_if<std::int64_t>(&side);
        signature.shape.push_back(size == nullptr ? -1 : *size);
    }
    return signature;
}

Signature signature_of(const std::string& name, const Ort::TypeInfo& type) {
    if (type.GetONNXType() != ONNX_TYPE_TENSOR) {
        return {name, "no tensor", {}};
    }
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::string dtype = "another type";
    for (const auto& [known, element] : element_types()) {
        if (element == info.GetElementType()) {
            dtype = known;
        }
    }
    return {name, dtype, info.GetShape()};
}

/// Whether names, types and ranks are equal, and all sizes that both sides fix.
bool agree(const Signature& a, const Signature& b) {
    return a.name == b.name && a.dtype == b.dtype && a.shape.size() == b.shape.size() &&
           std::equal(a.shape.begin(), a.shape.end(), b.shape.begin(),
                      [](std::int64_t x, std::int64_t y) { return x == y || x < 0 || y < 0; });
}

std::string text_of(const std::vector<Signature>& signatures) {
    std::string text = "[";
    for (const Signature& signature : signatures) {
        text += (text.size() == 1 ? "" : ", ") + signature.name + ": " + signature.dtype + " [";
        for (std::size_t i = 0; i < signature.shape.size(); ++i) {
            const std::int64_t side = signature.shape[i];
            text += (i == 0 ? "" : ", ") + (side < 0 ? "?" : std::to_string(side));
        }
        text += "]";
    }
    return text + "]";
}

void compare(const std::vector<Signature>& found, const std::vector<TensorSpec>& specs,
             const std::string& kind, const std::string& file) {
    std::vector<Signature> wanted;
    for (const TensorSpec& spec : specs) {
        wanted.push_back(signature_of(spec));
    }
    if (found.size() != wanted.size() ||
        !std::equal(found.begin(), found.end(), wanted.begin(), agree)) {
        throw BundleError(
            "has " + kind + " " + text_of(found) + ", the manifest says " + text_of(wanted), file);
    }
}

}  // namespace

void check_signature(const Ort::Session& session, const GraphSpec& promised) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<Signature> inputs;
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
        inputs.push_back(signature_of(session.GetInputNameAllocated(i, allocator).get(),
                                      session.GetInputTypeInfo(i)));
    }
    std::vector<Signature> outputs;
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
        outputs.push_back(signature_of(session.GetOutputNameAllocated(i, allocator).get(),
                                       session.GetOutputTypeInfo(i)));
    }
    compare(inputs, promised.inputs, "inputs", promised.model.file);
    compare(outputs, promised.outputs, "outputs", promised.model.file);
}

}  // namespace sam3rt
