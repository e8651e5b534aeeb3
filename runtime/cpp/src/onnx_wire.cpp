#include "onnx_wire.hpp"

#include <algorithm>
#include <iterator>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt::onnx {
namespace {

// Left out, and so refused: training, functions, device configurations, quantization annotations,
// sparse tensors, subgraphs, lists of tensors, types as attributes, segments and texts as data.
constexpr Known known_fields[] = {
    {Message::model, 1, Wire::number},                         // ir_version
    {Message::model, 2, Wire::bytes},                          // producer_name
    {Message::model, 3, Wire::bytes},                          // producer_version
    {Message::model, 4, Wire::bytes},                          // domain
    {Message::model, 5, Wire::number},                         // model_version
    {Message::model, 6, Wire::bytes},                          // doc_string
    {Message::model, 7, Wire::bytes, Message::graph},          // graph
    {Message::model, 8, Wire::bytes_list, Message::opset},     // opset_import
    {Message::model, 14, Wire::bytes_list},                    // metadata_props
    {Message::graph, 1, Wire::bytes_list, Message::node},      // node
    {Message::graph, 2, Wire::bytes},                          // name
    {Message::graph, 5, Wire::bytes_list, Message::tensor},    // initializer
    {Message::graph, 10, Wire::bytes},                         // doc_string
    {Message::graph, 11, Wire::bytes_list},                    // input
    {Message::graph, 12, Wire::bytes_list},                    // output
    {Message::graph, 13, Wire::bytes_list},                    // value_info
    {Message::graph, 16, Wire::bytes_list},                    // metadata_props
    {Message::node, 1, Wire::bytes_list},                      // input
    {Message::node, 2, Wire::bytes_list},                      // output
    {Message::node, 3, Wire::bytes},                           // name
    {Message::node, 4, Wire::bytes},                           // op_type
    {Message::node, 5, Wire::bytes_list, Message::attribute},  // attribute
    {Message::node, 6, Wire::bytes},                           // doc_string
    {Message::node, 7, Wire::bytes},                           // domain
    {Message::node, 9, Wire::bytes_list},                      // metadata_props
    {Message::attribute, 1, Wire::bytes},                      // name
    {Message::attribute, 2, Wire::float32},                    // f
    {Message::attribute, 3, Wire::number},                     // i
    {Message::attribute, 4, Wire::bytes},                      // s
    {Message::attribute, 5, Wire::bytes, Message::tensor},     // t
    {Message::attribute, 7, Wire::floats},                     // floats
    {Message::attribute, 8, Wire::numbers},                    // ints
    {Message::attribute, 9, Wire::bytes_list},                 // strings
    {Message::attribute, 13, Wire::bytes},                     // doc_string
    {Message::attribute, 20, Wire::number},                    // type
    {Message::tensor, 1, Wire::numbers},                       // dims
    {Message::tensor, 2, Wire::number},                        // data_type
    {Message::tensor, 4, Wire::floats},                        // float_data
    {Message::tensor, 5, Wire::numbers},                       // int32_data
    {Message::tensor, 7, Wire::numbers},                       // int64_data
    {Message::tensor, 8, Wire::bytes},                         // name
    {Message::tensor, 9, Wire::bytes},                         // raw_data
    {Message::tensor, 10, Wire::doubles},                      // double_data
    {Message::tensor, 11, Wire::numbers},                      // uint64_data
    {Message::tensor, 12, Wire::bytes},                        // doc_string
    {Message::tensor, 13, Wire::bytes_list, Message::entry},   // external_data
    {Message::tensor, 14, Wire::number},                       // data_location
    {Message::tensor, 16, Wire::bytes_list},                   // metadata_props
    {Message::entry, 1, Wire::bytes},                          // key
    {Message::entry, 2, Wire::bytes},                          // value
    {Message::opset, 1, Wire::bytes},                          // domain
    {Message::opset, 2, Wire::number},                         // version
    {Message::value_info, 1, Wire::bytes},                     // name
    {Message::value_info, 2, Wire::bytes},                     // type
    {Message::value_info, 3, Wire::bytes},                     // doc_string
    {Message::value_info, 4, Wire::bytes_list},                // metadata_props
};
// Wire types of protocol buffers.
constexpr unsigned varint_kind = 0;
constexpr unsigned fixed64_kind = 1;
constexpr unsigned bytes_kind = 2;
constexpr unsigned fixed32_kind = 5;

bool takes(Wire wire, unsigned kind) {
    switch (wire) {
        case Wire::number:
            return kind == varint_kind;
        case Wire::float32:
            return kind == fixed32_kind;
        case Wire::bytes:
        case Wire::bytes_list:
            return kind == bytes_kind;
        case Wire::numbers:
            return kind == varint_kind || kind == bytes_kind;
        case Wire::floats:
            return kind == fixed32_kind || kind == bytes_kind;
        case Wire::doubles:
            return kind == fixed64_kind || kind == bytes_kind;
    }
    return false;
}

}  // namespace

std::string Reader::text(const Field& field) const {
    return {content_.begin() + field.start, content_.begin() + field.end};
}

void Reader::refuse(const std::string& problem) const { throw BundleError(problem, file_); }

void Reader::refuse_malformed(const std::string& problem) const {
    refuse("is not an ONNX file: " + problem);
}

void Reader::for_each_number(const Field& field,
                             const std::function<void(std::uint64_t)>& visit) const {
    if (field.kind == varint_kind) {
        visit(field.value);
        return;
    }
    for (std::size_t at = field.start; at < field.end;) {
        visit(varint(at, field.end));
    }
}

void Reader::for_each_field(Message message, std::size_t start, std::size_t end,
                            const std::function<void(const Field&)>& visit) const {
    std::uint64_t seen = 0;
    for (std::size_t at = start; at < end;) {
        const std::size_t tag_at = at;
        const std::uint64_t tag = varint(at, end);
        const std::uint64_t number = tag >> 3U;
        const auto kind = static_cast<unsigned>(tag & 7U);
        // Readers of protocol buffers drop the higher bits and take the field for another.
        if (tag > 0xffffffffU) {
            refuse_malformed("has a tag of more than 32 bits before byte " + std::to_string(at));
        }
        const auto* known = std::find_if(
            std::begin(known_fields), std::end(known_fields),
            [&](const Known& k) { return k.message == message && k.number == number; });
        if (known == std::end(known_fields) || !takes(known->wire, kind)) {
            refuse_malformed("has field " + std::to_string(number) + " of the wire type " +
                             std::to_string(kind) + " before byte " + std::to_string(at) +
                             ", which exported graphs do not have");
        }
        if (!is_list(known->wire) && (seen >> number & 1U) != 0) {
            refuse_malformed("has field " + std::to_string(number) + " twice before byte " +
                             std::to_string(at));
        }
        seen |= std::uint64_t{1} << number;
        Field field{known, kind, tag_at, at, at, 0};
        std::uint64_t length = 0;
        if (kind == varint_kind) {
            field.value = varint(at, end);
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

/// A number of up to 64 bits in groups of seven, lowest first, in as few bytes as it takes;
/// `at` moves behind it.
std::uint64_t Reader::varint(std::size_t& at, std::size_t end) const {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
        if (at >= end) {
            refuse_malformed("ends within a number at byte " + std::to_string(at));
        }
        const std::uint8_t byte = content_[at++];
        if (shift == 63 && (byte & 0x7eU) != 0) {
            refuse_malformed("has a number of more than 64 bits before byte " + std::to_string(at));
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

Writer& Writer::number(std::uint32_t field, std::uint64_t value) {
    varint(std::uint64_t{field} << 3U | varint_kind);
    varint(value);
    return *this;
}

Writer& Writer::bytes(std::uint32_t field, ByteView value) {
    varint(std::uint64_t{field} << 3U | bytes_kind);
    varint(value.size());
    return fields(value);
}

Writer& Writer::text(std::uint32_t field, const std::string& value) {
    return bytes(field, {reinterpret_cast<const std::uint8_t*>(value.data()), value.size()});
}

Writer& Writer::fields(ByteView whole) {
    message_.insert(message_.end(), whole.begin(), whole.end());
    return *this;
}

void Writer::varint(std::uint64_t value) {
    for (; value >= 0x80U; value >>= 7U) {
        message_.push_back(static_cast<std::uint8_t>((value & 0x7fU) | 0x80U));
    }
    message_.push_back(static_cast<std::uint8_t>(value));
}

}  // namespace sam3rt::onnx
