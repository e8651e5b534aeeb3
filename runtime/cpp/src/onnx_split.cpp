#include "onnx_split.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "onnx_wire.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

using onnx::Field;
using onnx::Message;
using Names = std::set<std::string>;

// GraphProto's fields.
constexpr std::uint32_t node_field = 1;
constexpr std::uint32_t initializer_field = 5;
constexpr std::uint32_t input_field = 11;
constexpr std::uint32_t output_field = 12;
constexpr std::uint32_t value_info_field = 13;
// Of NodeProto, and where TensorProto and ValueInfoProto have their names.
constexpr std::uint32_t node_input_field = 1;
constexpr std::uint32_t node_output_field = 2;
constexpr std::uint32_t node_operator_field = 4;
constexpr std::uint32_t tensor_name_field = 8;
constexpr std::uint32_t value_name_field = 1;

/// A field of the graph, with what matters of its message.
struct Part {
    Field field;
    /// Of an initializer, an input or a value.
    std::string name;
    /// Of a node.
    std::vector<std::string> inputs;
    std::vector<std::string> outputs;
    std::string op_type;

    bool is(std::uint32_t number) const { return field.known->number == number; }
};

bool is_within(const std::vector<std::string>& names, const Names& set) {
    return std::all_of(names.begin(), names.end(),
                       [&set](const std::string& name) { return set.count(name) != 0; });
}

bool overlaps(const std::vector<std::string>& names, const Names& set) {
    return std::any_of(names.begin(), names.end(),
                       [&set](const std::string& name) { return set.count(name) != 0; });
}

/// One graph, and where its nodes may run.
class Splitter {
public:
    Splitter(ByteView content, const std::vector<std::string>& inputs)
        : content_(content), reader_(content, "graph"), given_(inputs.begin(), inputs.end()) {
        reader_.for_each_field(Message::model, 0, content.size(), [this](const Field& field) {
            if (field.known->inner == Message::graph) {
                graph_ = field;
            }
        });
        reader_.for_each_field(Message::graph, graph_.start, graph_.end, [this](const Field& field) {
            parts_.push_back(read(field));
        });
    }

    std::optional<GraphParts> split() {
        assign();
        Names read_late;
        for (const Part* node : late_) {
            read_late.insert(node->inputs.begin(), node->inputs.end());
        }
        std::vector<std::string> cut;
        for (const Part* node : first_) {
            std::copy_if(node->outputs.begin(), node->outputs.end(), std::back_inserter(cut),
                         [&](const std::string& name) {
                             return read_late.count(name) != 0 && early_.count(name) != 0;
                         });
        }
        const bool is_given_late =
            std::any_of(given_.begin(), given_.end(),
                        [&](const std::string& name) { return read_late.count(name) != 0; });
        if (cut.empty() || is_given_late) {
            return std::nullopt;
        }
        GraphParts result{part(first_, true, cut), part(late_, false, cut), cut, {}};
        for (const Part& entry : parts_) {
            if (entry.is(input_field)) {
                result.inputs.push_back(entry.name);
            }
        }
        return result;
    }

private:
    Part read(const Field& field) const {
        Part part{field, "", {}, {}, ""};
        if (part.is(node_field)) {
            reader_.for_each_field(Message::node, field.start, field.end, [&](const Field& inner) {
                switch (inner.known->number) {
                    case node_input_field:
                        if (inner.end != inner.start) {
                            part.inputs.push_back(reader_.text(inner));
                        }
                        break;
                    case node_output_field:
                        part.outputs.push_back(reader_.text(inner));
                        break;
                    case node_operator_field:
                        part.op_type = reader_.text(inner);
                        break;
                    default:
                        break;
                }
            });
        } else if (part.is(initializer_field)) {
            part.name = name_of(field, Message::tensor, tensor_name_field);
        } else if (part.is(input_field) || part.is(value_info_field)) {
            part.name = name_of(field, Message::value_info, value_name_field);
        }
        return part;
    }

    std::string name_of(const Field& field, Message message, std::uint32_t number) const {
        std::string name;
        reader_.for_each_field(message, field.start, field.end, [&](const Field& inner) {
            if (inner.known->number == number) {
                name = reader_.text(inner);
            }
        });
        return name;
    }

    /// Say of each node in which part it is; constants are in both.
    void assign() {
        std::map<std::string, Names> readers;
        for (const Part& part : parts_) {
            for (const std::string& name : part.inputs) {
                readers[name].insert(part.op_type);
            }
            if (part.is(initializer_field)) {
                constant_.insert(part.name);
            }
        }
        early_ = given_;
        Names known = constant_;
        known.insert(given_.begin(), given_.end());
        for (const Part& node : parts_) {
            if (!node.is(node_field)) {
                continue;
            }
            // What a matmul transposes by itself is not transposed before.
            const bool is_folded = node.op_type == "Transpose" && !node.outputs.empty() &&
                                   readers[node.outputs[0]] == Names{"MatMul"};
            if (is_within(node.inputs, constant_)) {
                constant_.insert(node.outputs.begin(), node.outputs.end());
                known.insert(node.outputs.begin(), node.outputs.end());
                first_.push_back(&node);
                late_.push_back(&node);
            } else if (is_within(node.inputs, known) && !is_folded) {
                early_.insert(node.outputs.begin(), node.outputs.end());
                known.insert(node.outputs.begin(), node.outputs.end());
                first_.push_back(&node);
            } else {
                late_.push_back(&node);
            }
        }
    }

    /// A part as a file.
    Bytes part(const std::vector<const Part*>& nodes, bool is_first,
               const std::vector<std::string>& cut) const {
        Names read;
        std::set<const Part*> kept;
        // From the end, since constants that only the other part reads are left out.
        for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
            if (!overlaps((*node)->outputs, constant_) || overlaps((*node)->outputs, read)) {
                read.insert((*node)->inputs.begin(), (*node)->inputs.end());
                kept.insert(*node);
            }
        }
        onnx::Writer body;
        for (const Part& entry : parts_) {
            bool stays = !entry.is(value_info_field);
            if (entry.is(node_field)) {
                stays = kept.count(&entry) != 0;
            } else if (entry.is(initializer_field)) {
                stays = read.count(entry.name) != 0;
            } else if (entry.is(input_field)) {
                stays = (given_.count(entry.name) != 0) == is_first;
            } else if (entry.is(output_field)) {
                stays = !is_first;
            }
            if (stays) {
                body.fields(view(entry.field.tag, entry.field.end));
            }
        }
        for (const std::string& name : cut) {
            body.bytes(is_first ? output_field : input_field, described(name));
        }
        return onnx::Writer()
            .fields(view(0, graph_.tag))
            .bytes(graph_.known->number, body.message())
            .fields(view(graph_.end, content_.size()))
            .message();
    }

    /// A value as ValueInfoProto: the file's own, or of float32 and any shape.
    Bytes described(const std::string& name) const {
        const auto found =
            std::find_if(parts_.rbegin(), parts_.rend(), [&name](const Part& part) {
                return part.is(value_info_field) && part.name == name;
            });
        if (found != parts_.rend()) {
            const ByteView own = view(found->field.start, found->field.end);
            return Bytes(own.begin(), own.end());
        }
        // TypeProto of a tensor, whose type of elements is 1.
        static const Bytes float32 = {0x0a, 2, 8, 1};
        return onnx::Writer().text(1, name).bytes(2, float32).message();
    }

    ByteView view(std::size_t start, std::size_t end) const {
        return {content_.data() + start, end - start};
    }

    ByteView content_;
    onnx::Reader reader_;
    Names given_;
    Field graph_{};
    std::vector<Part> parts_;
    Names constant_;
    Names early_;
    std::vector<const Part*> first_;
    std::vector<const Part*> late_;
};

}  // namespace

std::optional<GraphParts> split_onnx(ByteView content, const std::vector<std::string>& inputs) {
    try {
        return Splitter(content, inputs).split();
    } catch (const BundleError&) {
        return std::nullopt;
    }
}

}  // namespace sam3rt
