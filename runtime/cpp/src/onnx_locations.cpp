#include "onnx_locations.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <string_view>

namespace sam3rt {
namespace {

/// The messages of onnx.proto that are walked. `none` stands for values that are not messages, and
/// for messages that hold no tensor, which are stepped over by their length.
enum class Message { none, model, graph, node, attribute, tensor, entry, opset };

/// The wire type of a field. `numbers` and `floats` are repeated, alone or packed in one field.
enum class Wire { number, bytes, float32, numbers, floats, doubles };

/// A field that a message may have.
struct Known {
    Message message;
    std::uint32_t number;
    Wire wire;
    Message inner = Message::none;
};
// Left out, and so refused: training, functions, device configurations, quantization annotations,
// sparse tensors, subgraphs, lists of tensors, types as attributes, segments and texts as data.
constexpr Known known_fields[] = {
    {Message::model, 1, Wire::number},                      // ir_version
    {Message::model, 2, Wire::bytes},                       // producer_name
    {Message::model, 3, Wire::bytes},                       // producer_version
    {Message::model, 4, Wire::bytes},                       // domain
    {Message::model, 5, Wire::number},                      // model_version
    {Message::model, 6, Wire::bytes},                       // doc_string
    {Message::model, 7, Wire::bytes, Message::graph},       // graph
    {Message::model, 8, Wire::bytes, Message::opset},       // opset_import
    {Message::model, 14, Wire::bytes},                      // metadata_props
    {Message::graph, 1, Wire::bytes, Message::node},        // node
    {Message::graph, 2, Wire::bytes},                       // name
    {Message::graph, 5, Wire::bytes, Message::tensor},      // initializer
    {Message::graph, 10, Wire::bytes},                      // doc_string
    {Message::graph, 11, Wire::bytes},                      // input
    {Message::graph, 12, Wire::bytes},                      // output
    {Message::graph, 13, Wire::bytes},                      // value_info
    {Message::graph, 16, Wire::bytes},                      // metadata_props
    {Message::node, 1, Wire::bytes},                        // input
    {Message::node, 2, Wire::bytes},                        // output
    {Message::node, 3, Wire::bytes},                        // name
    {Message::node, 4, Wire::bytes},                        // op_type
    {Message::node, 5, Wire::bytes, Message::attribute},    // attribute
    {Message::node, 6, Wire::bytes},                        // doc_string
    {Message::node, 7, Wire::bytes},                        // domain
    {Message::node, 9, Wire::bytes},                        // metadata_props
    {Message::attribute, 1, Wire::bytes},                   // name
    {Message::attribute, 2, Wire::float32},                 // f
    {Message::attribute, 3, Wire::number},                  // i
    {Message::attribute, 4, Wire::bytes},                   // s
    {Message::attribute, 5, Wire::bytes, Message::tensor},  // t
    {Message::attribute, 7, Wire::floats},                  // floats
    {Message::attribute, 8, Wire::numbers},                 // ints
    {Message::attribute, 9, Wire::bytes},                   // strings
    {Message::attribute, 13, Wire::bytes},                  // doc_string
    {Message::attribute, 20, Wire::number},                 // type
    {Message::tensor, 1, Wire::numbers},                    // dims
    {Message::tensor, 2, Wire::number},                     // data_type
    {Message::tensor, 4, Wire::floats},                     // float_data
    {Message::tensor, 5, Wire::numbers},                    // int32_data
    {Message::tensor, 7, Wire::numbers},                    // int64_data
    {Message::tensor, 8, Wire::bytes},                      // name
    {Message::tensor, 9, Wire::bytes},                      // raw_data
    {Message::tensor, 10, Wire::doubles},                   // double_data
    {Message::tensor, 11, Wire::numbers},                   // uint64_data
    {Message::tensor, 12, Wire::bytes},                     // doc_string
    {Message::tensor, 13, Wire::bytes, Message::entry},     // external_data
    {Message::tensor, 14, Wire::number},                    // data_location
    {Message::tensor, 16, Wire::bytes},                     // metadata_props
    {Message::entry, 1, Wire::bytes},                       // key
    {Message::entry, 2, Wire::bytes},                       // value
    {Message::opset, 1, Wire::bytes},                       // domain
    {Message::opset, 2, Wire::number},                      // version
};
constexpr std::uint32_t op_type_field = 4;
constexpr std::uint32_t node_domain_field = 7;
constexpr std::uint32_t external_data_field = 13;
constexpr std::uint32_t data_location_field = 14;
constexpr std::uint32_t opset_domain_field = 1;

// Operators of the domain "ai.onnx" that exports of image models use; sorted. None of them runs
// a subgraph, keeps state or draws random numbers.
constexpr std::string_view operators[] = {"Abs",
                                          "Acos",
                                          "Acosh",
                                          "Add",
                                          "And",
                                          "ArgMax",
                                          "ArgMin",
                                          "Asin",
                                          "Asinh",
                                          "Atan",
                                          "Atanh",
                                          "AveragePool",
                                          "BatchNormalization",
                                          "BitShift",
                                          "BitwiseAnd",
                                          "BitwiseNot",
                                          "BitwiseOr",
                                          "BitwiseXor",
                                          "Cast",
                                          "CastLike",
                                          "Ceil",
                                          "Celu",
                                          "CenterCropPad",
                                          "Clip",
                                          "Concat",
                                          "Constant",
                                          "ConstantOfShape",
                                          "Conv",
                                          "ConvTranspose",
                                          "Cos",
                                          "Cosh",
                                          "CumSum",
                                          "DepthToSpace",
                                          "DequantizeLinear",
                                          "Div",
                                          "Einsum",
                                          "Elu",
                                          "Equal",
                                          "Erf",
                                          "Exp",
                                          "Expand",
                                          "EyeLike",
                                          "Flatten",
                                          "Floor",
                                          "Gather",
                                          "GatherElements",
                                          "GatherND",
                                          "Gelu",
                                          "Gemm",
                                          "GlobalAveragePool",
                                          "GlobalMaxPool",
                                          "Greater",
                                          "GreaterOrEqual",
                                          "GridSample",
                                          "GroupNormalization",
                                          "HardSigmoid",
                                          "HardSwish",
                                          "Identity",
                                          "InstanceNormalization",
                                          "IsInf",
                                          "IsNaN",
                                          "LayerNormalization",
                                          "LeakyRelu",
                                          "Less",
                                          "LessOrEqual",
                                          "Log",
                                          "LogSoftmax",
                                          "MatMul",
                                          "Max",
                                          "MaxPool",
                                          "Mean",
                                          "Min",
                                          "Mish",
                                          "Mod",
                                          "Mul",
                                          "Neg",
                                          "NonZero",
                                          "Not",
                                          "OneHot",
                                          "Or",
                                          "PRelu",
                                          "Pad",
                                          "Pow",
                                          "QuantizeLinear",
                                          "RMSNormalization",
                                          "Range",
                                          "Reciprocal",
                                          "ReduceL1",
                                          "ReduceL2",
                                          "ReduceLogSum",
                                          "ReduceLogSumExp",
                                          "ReduceMax",
                                          "ReduceMean",
                                          "ReduceMin",
                                          "ReduceProd",
                                          "ReduceSum",
                                          "ReduceSumSquare",
                                          "Relu",
                                          "Reshape",
                                          "Resize",
                                          "Round",
                                          "ScatterElements",
                                          "ScatterND",
                                          "Selu",
                                          "Shape",
                                          "Sigmoid",
                                          "Sign",
                                          "Sin",
                                          "Sinh",
                                          "Size",
                                          "Slice",
                                          "Softmax",
                                          "Softplus",
                                          "Softsign",
                                          "SpaceToDepth",
                                          "Split",
                                          "Sqrt",
                                          "Squeeze",
                                          "Sub",
                                          "Sum",
                                          "Swish",
                                          "Tan",
                                          "Tanh",
                                          "ThresholdedRelu",
                                          "Tile",
                                          "TopK",
                                          "Transpose",
                                          "Trilu",
                                          "Unsqueeze",
                                          "Where",
                                          "Xor"};

/// One field of a message in the file.
struct Field {
    const Known* known;
    std::size_t start;
    std::size_t end;
};

/// Walks one file.
class Walker {
public:
    Walker(const Bytes& content, const std::string& file, const std::vector<FileEntry>& beside)
        : content_(content), file_(file) {
        for (const FileEntry& entry : beside) {
            lengths_[entry.file] = entry.bytes;
        }
    }

    /// The whole file. Messages nest at most five deep, since subgraphs are refused.
    void check() const { check_message(Message::model, 0, content_.size()); }

private:
    [[noreturn]] void refuse(const std::string& problem) const {
        throw BundleError(problem, file_);
    }

    [[noreturn]] void refuse_malformed(const std::string& problem) const {
        refuse("is not an ONNX file: " + problem);
    }

    std::string text(const Field& field) const {
        return {content_.begin() + static_cast<std::ptrdiff_t>(field.start),
                content_.begin() + static_cast<std::ptrdiff_t>(field.end)};
    }

    void check_message(Message message, std::size_t start, std::size_t end) const {
        if (message == Message::tensor) {
            check_tensor(start, end);
            return;
        }
        for_each_field(message, start, end, [&](const Field& field) {
            if (field.known->inner != Message::none) {
                check_message(field.known->inner, field.start, field.end);
            } else if (message == Message::node && field.known->number == op_type_field) {
                check_operator(text(field));
            } else if ((message == Message::node && field.known->number == node_domain_field) ||
                       (message == Message::opset && field.known->number == opset_domain_field)) {
                check_domain(text(field));
            }
        });
    }

    void check_operator(const std::string& name) const {
        if (!std::binary_search(std::begin(operators), std::end(operators), name)) {
            refuse("has a node of the operator '" + name.substr(0, 60) +
                   "', which exported graphs do not use");
        }
    }

    void check_domain(const std::string& name) const {
        if (!name.empty() && name != "ai.onnx") {
            refuse("uses operators of the domain '" + name.substr(0, 60) +
                   "', expected those of ONNX itself");
        }
    }

    /// Protocol buffers merge a message that comes in parts. So every entry is held to the rules by
    /// itself, even where this part does not say that the data lie elsewhere.
    void check_tensor(std::size_t start, std::size_t end) const {
        std::map<std::string, std::string> location;
        bool elsewhere = false;
        for_each_field(Message::tensor, start, end, [&](const Field& field) {
            if (field.known->number == data_location_field) {
                elsewhere = elsewhere || content_[field.start] != 0;
            } else if (field.known->number == external_data_field) {
                const auto [key, value] = entry(field.start, field.end);
                if (!location.emplace(key, value).second) {
                    refuse("says twice what the '" + key + "' of a tensor's data is");
                }
            }
        });
        if (!location.empty() || elsewhere) {
            check_location(location);
        }
    }

    void check_location(const std::map<std::string, std::string>& location) const {
        const auto name = location.find("location");
        if (name == location.end()) {
            refuse("has a tensor whose data lie elsewhere, without saying where");
        }
        const auto known = lengths_.find(name->second);
        if (known == lengths_.end()) {
            refuse("has a tensor whose data lie in '" + name->second.substr(0, 60) +
                   "', a file that the manifest does not list for this graph");
        }
        std::uint64_t end = 0;
        for (const char* key : {"offset", "length"}) {
            const auto found = location.find(key);
            const std::string number = found == location.end() ? "0" : found->second;
            if (number.empty() || number.size() > 18 ||
                number.find_first_not_of("0123456789") != std::string::npos) {
                refuse(std::string("has a tensor whose data have the ") + key + " '" +
                       number.substr(0, 60) + "'");
            }
            end += std::stoull(number);
        }
        if (end > known->second) {
            refuse("has a tensor whose data end at byte " + std::to_string(end) + " of '" +
                   known->first + "', which has " + std::to_string(known->second));
        }
    }

    /// Key and value of a StringStringEntryProto.
    std::pair<std::string, std::string> entry(std::size_t start, std::size_t end) const {
        std::pair<std::string, std::string> parts;
        for_each_field(Message::entry, start, end, [&](const Field& field) {
            (field.known->number == 1 ? parts.first : parts.second) = text(field);
        });
        return parts;
    }

    void for_each_field(Message message, std::size_t start, std::size_t end,
                        const std::function<void(const Field&)>& visit) const {
        for (std::size_t at = start; at < end;) {
            const std::uint64_t tag = varint(at, end);
            const std::uint64_t number = tag >> 3U;
            const auto kind = static_cast<unsigned>(tag & 7U);
            // Readers of protocol buffers drop the higher bits and take the field for another.
            if (tag > 0xffffffffU) {
                refuse_malformed("has a field number of more than 29 bits before byte " +
                                 std::to_string(at));
            }
            const auto* known = std::find_if(
                std::begin(known_fields), std::end(known_fields),
                [&](const Known& k) { return k.message == message && k.number == number; });
            if (known == std::end(known_fields) || !takes(known->wire, kind)) {
                refuse_malformed("has field " + std::to_string(number) + " of the wire type " +
                                 std::to_string(kind) + " before byte " + std::to_string(at) +
                                 ", which exported graphs do not have");
            }
            Field field{known, at, at};
            std::uint64_t length = 0;
            if (kind == varint_kind) {
                varint(at, end);
            } else if (kind == bytes_kind) {
                length = varint(at, end);
                field.start = at;
            } else {
                length = kind == fixed64_kind ? 8 : 4;
            }
            if (length > end - at) {
                refuse_malformed("ends within a field that begins at byte " + std::to_string(at));
            }
            at += static_cast<std::size_t>(length);
            field.end = at;
            visit(field);
        }
    }

    static constexpr unsigned varint_kind = 0;
    static constexpr unsigned fixed64_kind = 1;
    static constexpr unsigned bytes_kind = 2;
    static constexpr unsigned fixed32_kind = 5;

    static bool takes(Wire wire, unsigned kind) {
        switch (wire) {
            case Wire::number:
                return kind == varint_kind;
            case Wire::bytes:
                return kind == bytes_kind;
            case Wire::float32:
                return kind == fixed32_kind;
            case Wire::numbers:
                return kind == varint_kind || kind == bytes_kind;
            case Wire::floats:
                return kind == fixed32_kind || kind == bytes_kind;
            case Wire::doubles:
                return kind == fixed64_kind || kind == bytes_kind;
        }
        return false;
    }

    /// A number of up to 64 bits in groups of seven, lowest first, in as few bytes as it takes;
    /// `at` moves behind it.
    std::uint64_t varint(std::size_t& at, std::size_t end) const {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 70; shift += 7) {
            if (at >= end) {
                refuse_malformed("ends within a number at byte " + std::to_string(at));
            }
            const std::uint8_t byte = content_[at++];
            if (shift == 63 && (byte & 0x7eU) != 0) {
                refuse_malformed("has a number of more than 64 bits before byte " +
                                 std::to_string(at));
            }
            value |= std::uint64_t{byte & 0x7fU} << shift;
            if (byte < 0x80U) {
                if (byte == 0 && shift != 0) {
                    refuse_malformed("has a number in more bytes than it takes before byte " +
                                     std::to_string(at));
                }
                return value;
            }
        }
        refuse_malformed("has a number of more than ten bytes before byte " + std::to_string(at));
    }

    const Bytes& content_;
    const std::string& file_;
    std::map<std::string, std::uint64_t> lengths_;
};

}  // namespace

void check_onnx(const Bytes& content, const std::string& file,
                const std::vector<FileEntry>& beside) {
    // ONNX Runtime takes a file for its own flat format, whatever its name, by these bytes.
    constexpr std::string_view own_format = "ORTM";
    if (content.size() >= 8 &&
        std::equal(own_format.begin(), own_format.end(), content.begin() + 4)) {
        throw BundleError("is in ONNX Runtime's own format, expected ONNX", file);
    }
    Walker(content, file, beside).check();
}

}  // namespace sam3rt
