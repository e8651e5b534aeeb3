// ONNX files as messages in the wire format of protocol buffers, in its plain encoding only.
//
// Parsers differ in what they make of odd encodings. What every writer produces is read by all of
// them in the same way, so nothing else is accepted.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "files.hpp"

namespace sam3rt::onnx {

/// The messages of onnx.proto that are read. `none` stands for values that are not messages, and for
/// messages that hold no tensor, which are stepped over by their length.
enum class Message { none, model, graph, node, attribute, tensor, entry, opset, value_info };

/// The wire type of a field. Those in the plural may come several times; numbers, floats and
/// doubles also packed into one field. The others come at most once: readers differ in what they
/// make of more.
enum class Wire { number, float32, bytes, bytes_list, numbers, floats, doubles };

constexpr bool is_list(Wire wire) { return wire > Wire::bytes; }

/// A field that a message may have.
struct Known {
    Message message;
    std::uint32_t number;
    Wire wire;
    Message inner = Message::none;
};

/// One field of a message in the file: where its tag begins, where its value lies, and what it is if
/// it is a number.
struct Field {
    const Known* known;
    unsigned kind;
    std::size_t tag;
    std::size_t start;
    std::size_t end;
    std::uint64_t value;
};

/// Reads the messages of one file.
class Reader {
public:
    /// `file` is what messages call it.
    Reader(ByteView content, std::string file) : content_(content), file_(std::move(file)) {}

    std::size_t size() const { return content_.size(); }
    std::string text(const Field& field) const;

    /// Visit the fields of the message between two positions. Throws BundleError where the bytes
    /// are no such message in the plain encoding, or hold a field that exported graphs do not have.
    void for_each_field(Message message, std::size_t start, std::size_t end,
                        const std::function<void(const Field&)>& visit) const;

    /// Visit the numbers of a list's field: one, or several where they are packed.
    void for_each_number(const Field& field, const std::function<void(std::uint64_t)>& visit) const;

    [[noreturn]] void refuse(const std::string& problem) const;
    [[noreturn]] void refuse_malformed(const std::string& problem) const;

private:
    std::uint64_t varint(std::size_t& at, std::size_t end) const;

    ByteView content_;
    std::string file_;
};

/// Writes a message, field by field.
class Writer {
public:
    Writer& number(std::uint32_t field, std::uint64_t value);
    Writer& bytes(std::uint32_t field, ByteView value);
    Writer& text(std::uint32_t field, const std::string& value);
    /// Whole fields of another message.
    Writer& fields(ByteView whole);

    const Bytes& message() const { return message_; }

private:
    void varint(std::uint64_t value);

    Bytes message_;
};

}  // namespace sam3rt::onnx
