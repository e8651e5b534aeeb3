#include "tensor_places.hpp"

#include <algorithm>
#include <functional>
#include <map>

namespace sam3rt {
namespace {

/// The messages that can hold a tensor (onnx.proto). What cannot is stepped over by its length.
enum class Message { model, graph, node, attribute, function, training, sparse, tensor };

/// Which message a field of a message holds.
struct Inner {
    Message outer;
    std::uint64_t field;
    Message inner;
};
constexpr Inner inner_messages[] = {
    {Message::model, 7, Message::graph},         {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},     {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},        {Message::graph, 15, Message::sparse},
    {Message::node, 5, Message::attribute},      {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},     {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},    {Message::attribute, 22, Message::sparse},
    {Message::attribute, 23, Message::sparse},   {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute}, {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},      {Message::sparse, 1, Message::tensor},
    {Message::sparse, 2, Message::tensor},
};
constexpr std::uint64_t external_data_field = 13;
constexpr std::uint64_t data_location_field = 14;
// Protocol buffers' own parsers stop here too.
constexpr int max_depth = 100;

enum class Kind { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

struct Field {
    std::uint64_t number;
    Kind kind;
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

    /// Every tensor, wherever it is nested.
    void check() const {
        struct Part {
            Message message;
            std::size_t start;
            std::size_t end;
            int depth;
        };
        std::vector<Part> parts = {{Message::model, 0, content_.size(), 0}};
        while (!parts.empty()) {
            const Part part = parts.back();
            parts.pop_back();
            if (part.depth > max_depth) {
                refuse_malformed("is nested more than " + std::to_string(max_depth) + " deep");
            }
            if (part.message == Message::tensor) {
                check_tensor(part.start, part.end);
                continue;
            }
            for_each_field(part.start, part.end, [&](const Field& field) {
                for (const Inner& known : inner_messages) {
                    if (known.outer == part.message && known.field == field.number &&
                        field.kind == Kind::bytes) {
                        parts.push_back({known.inner, field.start, field.end, part.depth + 1});
                    }
                }
            });
        }
    }

private:
    [[noreturn]] void refuse(const std::string& problem) const {
        throw BundleError(problem, file_);
    }

    [[noreturn]] void refuse_malformed(const std::string& problem) const {
        refuse("is not an ONNX file: " + problem);
    }

    std::string text(std::size_t start, std::size_t end) const {
        return {content_.begin() + static_cast<std::ptrdiff_t>(start),
                content_.begin() + static_cast<std::ptrdiff_t>(end)};
    }

    /// Protocol buffers merge a message that comes in parts, so every entry is held to the rules by
    /// itself, whether or not this part says that the data lie elsewhere.
    void check_tensor(std::size_t start, std::size_t end) const {
        std::map<std::string, std::string> place;
        bool elsewhere = false;
        for_each_field(start, end, [&](const Field& field) {
            if (field.number == data_location_field && field.kind == Kind::varint) {
                elsewhere = elsewhere || field.end - field.start != 1 || content_[field.start] != 0;
            } else if (field.number == external_data_field && field.kind == Kind::bytes) {
                const auto [key, value] = entry(field.start, field.end);
                if (!place.emplace(key, value).second) {
                    refuse("says twice what the '" + key + "' of a tensor's data is");
                }
            }
        });
        if (!place.empty() || elsewhere) {
            check_place(place);
        }
    }

    void check_place(const std::map<std::string, std::string>& place) const {
        const auto location = place.find("location");
        if (location == place.end()) {
            refuse("has a tensor whose data lie elsewhere, without saying where");
        }
        const auto known = lengths_.find(location->second);
        if (known == lengths_.end()) {
            refuse("has a tensor whose data lie in '" + location->second.substr(0, 60) +
                   "', a file that the manifest does not list for this graph");
        }
        std::uint64_t end = 0;
        for (const char* key : {"offset", "length"}) {
            const auto found = place.find(key);
            const std::string number = found == place.end() ? "0" : found->second;
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
        for_each_field(start, end, [&](const Field& field) {
            if (field.kind == Kind::bytes && (field.number == 1 || field.number == 2)) {
                (field.number == 1 ? parts.first : parts.second) = text(field.start, field.end);
            }
        });
        return parts;
    }

    void for_each_field(std::size_t start, std::size_t end,
                        const std::function<void(const Field&)>& visit) const {
        for (std::size_t at = start; at < end;) {
            const std::uint64_t tag = varint(at, end);
            Field field{tag >> 3U, static_cast<Kind>(tag & 7U), at, at};
            if (field.number == 0) {
                refuse_malformed("has a field without a number before byte " + std::to_string(at));
            }
            std::uint64_t length = 0;
            switch (field.kind) {
                case Kind::varint:
                    varint(at, end);
                    break;
                case Kind::bytes:
                    length = varint(at, end);
                    field.start = at;
                    break;
                case Kind::fixed64:
                    length = 8;
                    break;
                case Kind::fixed32:
                    length = 4;
                    break;
                default:
                    refuse_malformed("has a field of an unknown kind before byte " +
                                     std::to_string(at));
            }
            if (length > end - at) {
                refuse_malformed("ends within a field that begins at byte " + std::to_string(at));
            }
            at += static_cast<std::size_t>(length);
            field.end = at;
            visit(field);
        }
    }

    /// A number of up to 64 bits in groups of seven, lowest first; `at` moves behind it.
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

void check_tensor_places(const Bytes& content, const std::string& file,
                         const std::vector<FileEntry>& beside) {
    // ONNX Runtime takes a file for its own flat format, whatever its name, by these bytes.
    static const std::string own_format = "ORTM";
    if (content.size() >= 8 &&
        std::equal(own_format.begin(), own_format.end(), content.begin() + 4)) {
        throw BundleError("is in ONNX Runtime's own format, expected ONNX", file);
    }
    Walker(content, file, beside).check();
}

}  // namespace sam3rt
