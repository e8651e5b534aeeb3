#include "npz.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "inflate.hpp"

namespace sam3rt {
namespace {

constexpr std::size_t max_arrays = 4096;
// NumPy's own limit; what it writes has at most some hundred bytes.
constexpr std::size_t max_header_bytes = 10000;
constexpr std::size_t max_axes = 32;

constexpr std::uint32_t end_signature = 0x06054b50;
constexpr std::uint32_t directory_signature = 0x02014b50;
constexpr std::uint32_t member_signature = 0x04034b50;
constexpr std::size_t end_bytes = 22;
constexpr std::size_t directory_bytes = 46;
constexpr std::size_t member_bytes = 30;
constexpr std::size_t max_comment_bytes = 65535;

constexpr unsigned stored = 0;
constexpr unsigned deflated = 8;
// How it was deflated, that sizes follow the data, that the name is UTF-8. Others change the data.
constexpr unsigned harmless_flags = 0x080e;

std::uint32_t crc32(const std::uint8_t* bytes, std::size_t count) {
    static const auto table = [] {
        std::array<std::uint32_t, 256> entries{};
        for (std::uint32_t i = 0; i < entries.size(); ++i) {
            std::uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) {
                value = (value >> 1U) ^ ((value & 1U) != 0 ? 0xedb88320U : 0U);
            }
            entries[i] = value;
        }
        return entries;
    }();
    std::uint32_t crc = 0xffffffffU;
    for (std::size_t i = 0; i < count; ++i) {
        crc = table[(crc ^ bytes[i]) & 0xffU] ^ (crc >> 8U);
    }
    return ~crc;
}

/// A name that somebody else chose, fit for a message.
std::string shown(const std::string& name) {
    std::string text = name.substr(0, 60);
    std::replace_if(
        text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    return text;
}

/// One file of an archive, as the archive's directory has it.
struct Member {
    std::string name;
    unsigned method = stored;
    std::uint32_t crc = 0;
    std::size_t packed_size = 0;
    std::size_t size = 0;
    std::size_t start = 0;
};

/// A zip archive in memory. Zip64 is refused: what needs it is larger than what is read.
class Archive {
public:
    Archive(ByteView content, const std::string& file) : content_(content), file_(file) {
        const std::size_t end = find_end();
        const std::size_t count = number(end + 10, 2);
        const std::size_t directory_size = number(end + 12, 4);
        directory_ = number(end + 16, 4);
        if (number(end + 4, 4) != 0 || number(end + 8, 2) != count || directory_ > end ||
            directory_size != end - directory_) {
            refuse("is not a whole zip archive");
        }
        if (count > max_arrays) {
            refuse("holds " + std::to_string(count) + " arrays, at most " +
                   std::to_string(max_arrays) + " are read");
        }
        std::size_t at = directory_;
        std::uint64_t total = 0;
        std::uint64_t packed = 0;
        for (std::size_t i = 0; i < count; ++i) {
            members_.push_back(read_entry(at));
            total += members_.back().size;
            packed += members_.back().packed_size;
        }
        if (at != end) {
            refuse("is not a whole zip archive");
        }
        if (total > max_npz_bytes) {
            refuse("holds " + std::to_string(total) + " bytes, at most " +
                   std::to_string(max_npz_bytes) + " are read");
        }
        // Members that share their bytes would be unpacked again and again.
        if (packed > content_.size()) {
            refuse("holds members that overlap");
        }
    }

    const std::vector<Member>& members() const { return members_; }

    Bytes unpack(const Member& member) const {
        if (member.method != stored && member.method != deflated) {
            refuse(shown(member.name) + " is compressed in a way that NumPy does not use");
        }
        if (number(member.start, 4) != member_signature) {
            refuse(shown(member.name) + " is not where the directory says");
        }
        const std::size_t name_size = number(member.start + 26, 2);
        const std::size_t name_start = member.start + member_bytes;
        const std::size_t data = name_start + name_size + number(member.start + 28, 2);
        if (data > directory_ || member.packed_size > directory_ - data ||
            text(name_start, name_size) != member.name) {
            refuse(shown(member.name) + " is not where the directory says");
        }
        const std::uint8_t* const packed = content_.data() + data;
        Bytes result;
        if (member.method == deflated) {
            std::optional<Bytes> unpacked = inflate(packed, member.packed_size, member.size);
            if (!unpacked) {
                refuse(shown(member.name) + " is damaged");
            }
            result = std::move(*unpacked);
        } else if (member.packed_size == member.size) {
            result.assign(packed, packed + member.size);
        } else {
            refuse(shown(member.name) + " has two sizes");
        }
        if (crc32(result.data(), result.size()) != member.crc) {
            refuse(shown(member.name) + " is damaged");
        }
        return result;
    }

    [[noreturn]] void refuse(const std::string& message) const {
        throw BundleError(message, file_);
    }

private:
    /// A little-endian number.
    std::size_t number(std::size_t at, std::size_t size) const {
        if (at > content_.size() || size > content_.size() - at) {
            refuse("is not a whole zip archive");
        }
        std::size_t value = 0;
        for (std::size_t i = size; i-- != 0;) {
            value = value << 8U | content_[at + i];
        }
        return value;
    }

    std::string text(std::size_t at, std::size_t size) const {
        if (at > content_.size() || size > content_.size() - at) {
            refuse("is not a whole zip archive");
        }
        return {content_.begin() + at, content_.begin() + at + size};
    }

    /// Where the archive's last record begins, which ends with a comment.
    std::size_t find_end() const {
        for (std::size_t comment = 0;
             comment <= max_comment_bytes && comment + end_bytes <= content_.size(); ++comment) {
            const std::size_t at = content_.size() - end_bytes - comment;
            if (number(at, 4) == end_signature && number(at + 20, 2) == comment) {
                return at;
            }
        }
        refuse("is not a whole zip archive");
    }

    /// The entry of the directory at a place, which is moved behind it.
    Member read_entry(std::size_t& at) const {
        if (number(at, 4) != directory_signature) {
            refuse("is not a whole zip archive");
        }
        const std::size_t name_size = number(at + 28, 2);
        Member member;
        member.name = text(at + directory_bytes, name_size);
        member.method = static_cast<unsigned>(number(at + 10, 2));
        member.crc = static_cast<std::uint32_t>(number(at + 16, 4));
        member.packed_size = number(at + 20, 4);
        member.size = number(at + 24, 4);
        member.start = number(at + 42, 4);
        if ((number(at + 8, 2) & ~std::size_t{harmless_flags}) != 0) {
            refuse(shown(member.name) + " is encrypted or packed as NumPy does not do it");
        }
        at += directory_bytes + name_size + number(at + 30, 2) + number(at + 32, 2);
        return member;
    }

    ByteView content_;
    const std::string& file_;
    std::size_t directory_ = 0;
    std::vector<Member> members_;
};

/// The start of an .npy file.
struct Header {
    std::string type;
    bool is_fortran = false;
    Shape shape;
};

/// Reads the header's text as NumPy writes it: a Python literal with its keys in order.
class HeaderText {
public:
    explicit HeaderText(std::string text) : text_(std::move(text)) {}

    std::optional<Header> parse() {
        Header header;
        std::string order;
        bool is_right = skip("{'descr': '") && until('\'', header.type) &&
                        skip("', 'fortran_order': ") && until(',', order) && skip(", 'shape': (");
        is_right = is_right && (order == "True" || order == "False");
        while (is_right && !skip(")")) {
            std::int64_t side = 0;
            is_right = number(side) && (skip(", ") || skip(",") || text_[at_] == ')') &&
                       header.shape.size() < max_axes;
            header.shape.push_back(side);
        }
        is_right = is_right && (skip(", }") || skip("}")) &&
                   text_.find_first_not_of(" \n", at_) == std::string::npos;
        header.is_fortran = order == "True";
        return is_right ? std::optional<Header>(header) : std::nullopt;
    }

private:
    bool skip(const char* expected) {
        const std::size_t size = std::strlen(expected);
        if (text_.compare(at_, size, expected) != 0) {
            return false;
        }
        at_ += size;
        return true;
    }

    bool until(char end, std::string& found) {
        const std::size_t stop = text_.find(end, at_);
        if (stop == std::string::npos) {
            return false;
        }
        found = text_.substr(at_, stop - at_);
        at_ = stop;
        return true;
    }

    bool number(std::int64_t& value) {
        const std::size_t start = at_;
        while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9' && at_ < start + 18) {
            value = 10 * value + (text_[at_++] - '0');
        }
        return at_ != start;
    }

    std::string text_;
    std::size_t at_ = 0;
};

/// Elements in Fortran's order, brought into row-major order.
template <typename T>
Array<T> from_fortran(const Array<T>& columns) {
    const Shape& shape = columns.shape();
    Array<T> rows(shape);
    Shape index(shape.size(), 0);
    for (std::size_t from = 0; from < columns.size(); ++from) {
        std::size_t to = 0;
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            to = to * static_cast<std::size_t>(shape[axis]) + static_cast<std::size_t>(index[axis]);
        }
        rows[to] = columns[from];
        for (std::size_t axis = 0; axis < shape.size() && ++index[axis] == shape[axis]; ++axis) {
            index[axis] = 0;
        }
    }
    return rows;
}

/// UTF-8 of a text of four bytes a character, which zeros may follow. Empty where it is none.
std::optional<std::string> utf8(const std::uint8_t* data, std::size_t characters) {
    std::string text;
    std::size_t length = 0;
    for (std::size_t i = 0; i < characters; ++i) {
        std::uint32_t point = 0;
        for (std::size_t byte = 4; byte-- != 0;) {
            point = point << 8U | data[4 * i + byte];
        }
        if (point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) {
            return std::nullopt;
        }
        const auto tail = [&text, point](unsigned shift) {
            text += static_cast<char>(0x80U | ((point >> shift) & 0x3fU));
        };
        if (point < 0x80) {
            text += static_cast<char>(point);
        } else if (point < 0x800) {
            text += static_cast<char>(0xc0U | (point >> 6U));
            tail(0);
        } else if (point < 0x10000) {
            text += static_cast<char>(0xe0U | (point >> 12U));
            tail(6);
            tail(0);
        } else {
            text += static_cast<char>(0xf0U | (point >> 18U));
            tail(12);
            tail(6);
            tail(0);
        }
        length = point != 0 ? text.size() : length;
    }
    text.resize(length);
    return text;
}

/// Parses one .npy file.
class NpyFile {
public:
    NpyFile(ByteView content, std::string name, const Archive& archive)
        : content_(content), name_(std::move(name)), archive_(archive) {}

    NpzArray parse() const {
        std::size_t at = 0;
        const Header header = read_header(at);
        const std::uint8_t* const data = content_.data() + at;
        const std::size_t size = content_.size() - at;
        if (header.type == "|u1") {
            return array<std::uint8_t>(header, data, size);
        }
        if (header.type == "<i8") {
            return array<std::int64_t>(header, data, size);
        }
        if (header.type == "<f4") {
            return array<float>(header, data, size);
        }
        // A text's length stands in its type; what counts is how much of it is there.
        if (header.type.compare(0, 2, "<U") == 0 && header.shape.empty() && size % 4 == 0 &&
            header.type.substr(2) == std::to_string(size / 4)) {
            std::optional<std::string> text = utf8(data, size / 4);
            if (text) {
                return std::move(*text);
            }
        }
        refuse("is of type " + shown(header.type) + ", or damaged");
    }

private:
    Header read_header(std::size_t& at) const {
        static constexpr std::array<std::uint8_t, 6> magic = {0x93, 'N', 'U', 'M', 'P', 'Y'};
        at = 12;
        if (content_.size() < at || !std::equal(magic.begin(), magic.end(), content_.begin())) {
            refuse("is not an array");
        }
        std::size_t size = content_[8] | std::size_t{content_[9]} << 8U;
        if (content_[6] == 1 && content_[7] == 0) {
            at = 10;
        } else if (content_[6] == 2 && content_[7] == 0) {
            size |= std::size_t{content_[10]} << 16U | std::size_t{content_[11]} << 24U;
        } else {
            refuse("is of another version of the format");
        }
        if (size > max_header_bytes || size > content_.size() - at) {
            refuse("is cut");
        }
        const auto start = content_.begin() + at;
        at += size;
        const std::optional<Header> header =
            HeaderText(std::string(start, start + size)).parse();
        if (!header) {
            refuse("does not begin as NumPy writes it");
        }
        return *header;
    }

    template <typename T>
    Array<T> array(const Header& header, const std::uint8_t* data, std::size_t size) const {
        // Held to the data before anything is allocated for the shape.
        std::size_t count = 0;
        try {
            count = element_count(header.shape);
        } catch (const InvalidInputError&) {
            refuse("has a shape that memory cannot hold");
        }
        if (count != size / sizeof(T) || size % sizeof(T) != 0) {
            refuse("has a shape of " + std::to_string(count) + " elements, but " +
                   std::to_string(size) + " bytes");
        }
        Array<T> values(header.shape);
        if (size != 0) {
            std::memcpy(values.data(), data, size);
        }
        return header.is_fortran ? from_fortran(values) : std::move(values);
    }

    [[noreturn]] void refuse(const std::string& message) const {
        archive_.refuse(shown(name_) + " " + message);
    }

    ByteView content_;
    std::string name_;
    const Archive& archive_;
};

}  // namespace

std::map<std::string, NpzArray> read_npz(ByteView content, const std::string& file) {
    const Archive archive(content, file);
    std::map<std::string, NpzArray> arrays;
    for (const Member& member : archive.members()) {
        static const std::string suffix = ".npy";
        std::string name = member.name;
        if (name.size() >= suffix.size() &&
            name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            name.resize(name.size() - suffix.size());
        }
        if (arrays.count(name) != 0) {
            archive.refuse("holds " + shown(name) + " twice");
        }
        const Bytes unpacked = archive.unpack(member);
        arrays.emplace(name, NpyFile(unpacked, name, archive).parse());
    }
    return arrays;
}

}  // namespace sam3rt
