#include "onnx_locations.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <optional>
#include <string_view>

#include "onnx_wire.hpp"

namespace sam3rt {
namespace {

using onnx::Field;
using onnx::Message;
using onnx::Wire;

constexpr std::uint32_t op_type_field = 4;
constexpr std::uint32_t node_domain_field = 7;
constexpr std::uint32_t external_data_field = 13;
constexpr std::uint32_t data_location_field = 14;
constexpr std::uint32_t opset_domain_field = 1;
constexpr std::uint32_t attribute_name_field = 1;
constexpr std::uint32_t attribute_number_field = 3;
constexpr std::uint32_t attribute_text_field = 4;
constexpr std::uint32_t attribute_type_field = 20;

constexpr std::uint32_t raw_data_field = 9;
constexpr std::uint32_t dims_field = 1;
constexpr std::uint32_t data_type_field = 2;
constexpr std::uint32_t tensor_name_field = 8;

// Operators of ONNX without subgraphs, sequences, texts and random numbers, between blanks.
constexpr std::string_view operators =
    " Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool"
    " BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv"
    " ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div DynamicQuantizeLinear"
    " Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND"
    " Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample"
    " GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN"
    " LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean"
    " MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow"
    " QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum"
    " ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
    " Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh"
    " Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh"
    " ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor ";

/// Bytes of an element, by TensorProto.DataType; 0 for types that exported graphs do not use.
std::uint64_t element_bytes(std::uint64_t type) {
    switch (type) {
        case 2:  // uint8
        case 3:  // int8
        case 9:  // bool
            return 1;
        case 4:   // uint16
        case 5:   // int16
        case 10:  // float16
        case 16:  // bfloat16
            return 2;
        case 1:   // float32
        case 6:   // int32
        case 12:  // uint32
            return 4;
        case 7:   // int64
        case 11:  // float64
        case 13:  // uint64
            return 8;
        default:
            return 0;
    }
}

/// The product, or the largest number where that is too small to hold it.
std::uint64_t saturating_product(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t limit = std::numeric_limits<std::uint64_t>::max();
    return b != 0 && a > limit / b ? limit : a * b;
}

/// Walks one file.
class Walker {
public:
    Walker(ByteView content, const std::string& file, const std::vector<FileEntry>& beside)
        : reader_(content, file) {
        for (const FileEntry& entry : beside) {
            lengths_[entry.file] = entry.bytes;
        }
    }

    /// The whole file. Messages nest at most five deep, since subgraphs are refused.
    void check() const {
        bool has_graph = false;
        reader_.for_each_field(Message::model, 0, reader_.size(), [&](const Field& field) {
            has_graph = has_graph || field.known->inner == Message::graph;
        });
        if (!has_graph) {
            reader_.refuse_malformed("holds no graph");
        }
        check_message(Message::model, 0, reader_.size());
    }

private:
    using Entries = std::map<std::string, std::string>;

    void check_message(Message message, std::size_t start, std::size_t end) const {
        bool has_operator = false;
        reader_.for_each_field(message, start, end, [&](const Field& field) {
            if (field.known->inner == Message::tensor) {
                check_tensor(field, message == Message::graph);
            } else if (field.known->inner != Message::none) {
                check_message(field.known->inner, field.start, field.end);
            } else if (message == Message::node && field.known->number == op_type_field) {
                has_operator = true;
                check_operator(reader_.text(field));
            } else if ((message == Message::node && field.known->number == node_domain_field) ||
                       (message == Message::opset && field.known->number == opset_domain_field)) {
                check_domain(reader_.text(field));
            }
        });
        if (message == Message::node && !has_operator) {
            check_operator("");
        }
    }

    void check_operator(const std::string& name) const {
        if (name.empty() || name.find(' ') != std::string::npos ||
            operators.find(" " + name + " ") == std::string_view::npos) {
            reader_.refuse("has a node of the operator '" + name.substr(0, 60) +
                           "', which exported graphs do not use");
        }
    }

    void check_domain(const std::string& name) const {
        if (!name.empty() && name != "ai.onnx") {
            reader_.refuse("uses operators of the domain '" + name.substr(0, 60) +
                           "', expected those of ONNX itself");
        }
    }

    void check_tensor(const Field& tensor, bool is_initializer) const {
        Entries location;
        std::uint64_t data_location = 0;
        std::uint64_t nbytes = 0;
        std::uint64_t elements = 1;
        std::optional<std::uint64_t> raw_bytes;
        bool has_values = false;
        std::string name;
        reader_.for_each_field(Message::tensor, tensor.start, tensor.end, [&](const Field& field) {
            switch (field.known->number) {
                case dims_field:
                    reader_.for_each_number(field, [&](std::uint64_t side) {
                        elements = saturating_product(elements, side);
                    });
                    break;
                case data_type_field:
                    nbytes = element_bytes(field.value);
                    break;
                case tensor_name_field:
                    name = reader_.text(field).substr(0, 60);
                    break;
                case external_data_field:
                    add_entry(field, location);
                    break;
                case data_location_field:
                    data_location = field.value;
                    break;
                case raw_data_field:
                    raw_bytes = field.end - field.start;
                    has_values = true;
                    break;
                default:
                    has_values = has_values || field.known->wire > Wire::bytes_list;
            }
        });
        if (nbytes == 0) {
            reader_.refuse("has a tensor '" + name + "' of a type that exported graphs do not use");
        }
        nbytes = saturating_product(nbytes, elements);
        if (raw_bytes && *raw_bytes != nbytes) {
            reader_.refuse("has a tensor '" + name + "' with " + std::to_string(*raw_bytes) +
                           " bytes of data, its shape has " + std::to_string(nbytes));
        }
        if (data_location > 1) {
            reader_.refuse("has a tensor whose data location is " + std::to_string(data_location));
        }
        if (data_location == 0 && location.empty()) {
            return;
        }
        if (!is_initializer) {
            reader_.refuse("has a tensor in an attribute whose data lie elsewhere");
        }
        if (data_location == 0 || has_values) {
            reader_.refuse("has a tensor '" + name +
                           "' whose data lie both in the file and elsewhere");
        }
        check_location(location, nbytes);
    }

    void check_location(const Entries& location, std::uint64_t nbytes) const {
        const auto name = location.find("location");
        if (name == location.end()) {
            reader_.refuse("has a tensor whose data lie elsewhere, without saying where");
        }
        const auto known = lengths_.find(name->second);
        if (known == lengths_.end()) {
            reader_.refuse("has a tensor whose data lie in '" + name->second.substr(0, 60) +
                           "', a file that the manifest does not list for this graph");
        }
        const std::uint64_t offset = number_of(location, "offset").value_or(0);
        if (number_of(location, "length").value_or(nbytes) != nbytes) {
            reader_.refuse("has a tensor whose data have the length " + location.at("length") +
                           ", its shape has " + std::to_string(nbytes));
        }
        if (nbytes > known->second || offset > known->second - nbytes) {
            reader_.refuse("has a tensor of " + std::to_string(nbytes) + " bytes from byte " +
                           std::to_string(offset) + " of '" + known->first + "', which has " +
                           std::to_string(known->second));
        }
    }

    /// A decimal number without leading zeros, if there is one.
    std::optional<std::uint64_t> number_of(const Entries& location, const std::string& key) const {
        const auto found = location.find(key);
        if (found == location.end()) {
            return std::nullopt;
        }
        const std::string& number = found->second;
        if (number.empty() || number.size() > 18 || (number[0] == '0' && number.size() > 1) ||
            number.find_first_not_of("0123456789") != std::string::npos) {
            reader_.refuse("has a tensor whose data have the " + key + " '" + number.substr(0, 60) +
                           "'");
        }
        return std::stoull(number);
    }

    /// One StringStringEntryProto of a tensor's location.
    void add_entry(const Field& entry, Entries& location) const {
        std::pair<std::string, std::string> parts;
        reader_.for_each_field(Message::entry, entry.start, entry.end, [&](const Field& field) {
            (field.known->number == 1 ? parts.first : parts.second) = reader_.text(field);
        });
        if (parts.first != "location" && parts.first != "offset" && parts.first != "length" &&
            parts.first != "checksum") {
            reader_.refuse("has a tensor whose data lie at an unknown '" +
                           parts.first.substr(0, 60) + "'");
        }
        if (!location.insert(parts).second) {
            reader_.refuse("says twice what the '" + parts.first + "' of a tensor's data is");
        }
    }

    onnx::Reader reader_;
    std::map<std::string, std::uint64_t> lengths_;
};

}  // namespace

void check_onnx(ByteView content, const std::string& file, const std::vector<FileEntry>& beside) {
    constexpr std::string_view ending = ".onnx";
    if (file.size() < ending.size() ||
        file.compare(file.size() - ending.size(), ending.size(), ending) != 0) {
        throw BundleError("is not named .onnx: libraries choose a reader by the name", file);
    }
    // Libraries take files for another format, whatever their name, by these bytes.
    constexpr std::array<std::string_view, 2> other_formats = {"ORTM", "TFL3"};
    for (const std::string_view mark : other_formats) {
        if (content.size() >= 8 && std::equal(mark.begin(), mark.end(), content.begin() + 4)) {
            throw BundleError(
                "is in another format, marked " + std::string(mark) + ", expected ONNX", file);
        }
    }
    Walker(content, file, beside).check();
}

void check_wrapper(ByteView content, const std::string& file, const std::string& engine) {
    const onnx::Reader reader(content, file);
    int nodes = 0;
    // By name, with numbers as texts.
    std::map<std::string, std::string> found;
    const auto note = [&](const std::string& name, const std::string& value) {
        if (!found.emplace(name, value).second) {
            reader.refuse("says twice what " + name.substr(0, 60) + " is");
        }
    };
    const auto read_attribute = [&](const Field& attribute) {
        std::string name;
        std::string value;
        reader.for_each_field(
            Message::attribute, attribute.start, attribute.end, [&](const Field& field) {
                if (field.known->number == attribute_name_field) {
                    name = reader.text(field);
                } else if (field.known->number == attribute_number_field) {
                    value = std::to_string(field.value);
                } else if (field.known->number == attribute_text_field) {
                    value = reader.text(field);
                } else if (field.known->number != attribute_type_field) {
                    reader.refuse("has an attribute that is neither a number nor a text");
                }
            });
        note("attribute " + name, value);
    };
    const auto read_node = [&](const Field& node) {
        ++nodes;
        reader.for_each_field(Message::node, node.start, node.end, [&](const Field& field) {
            if (field.known->inner == Message::attribute) {
                read_attribute(field);
            } else if (field.known->number == op_type_field) {
                note("operator", reader.text(field));
            } else if (field.known->number == node_domain_field) {
                note("domain", reader.text(field));
            }
        });
    };
    reader.for_each_field(Message::model, 0, reader.size(), [&](const Field& model) {
        if (model.known->inner != Message::graph) {
            return;
        }
        reader.for_each_field(Message::graph, model.start, model.end, [&](const Field& field) {
            if (field.known->inner == Message::node) {
                read_node(field);
            } else if (field.known->inner == Message::tensor) {
                reader.refuse("holds weights, expected an engine's wrapper");
            }
        });
    });
    // Without embed_mode 0, the attribute ep_cache_context would be an engine and not its name.
    if (nodes != 1 || found["operator"] != "EPContext" || found["domain"] != "com.microsoft" ||
        found["attribute embed_mode"] != "0" || found["attribute ep_cache_context"] != engine) {
        reader.refuse("is not the wrapper of " + engine + ": build the engine again");
    }
}

}  // namespace sam3rt
