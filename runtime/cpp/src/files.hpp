// Files that are read within bounds, and appear whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace sam3rt {

using Bytes = std::vector<std::uint8_t>;

/// Bytes that somebody else owns.
class ByteView {
public:
    ByteView(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
    ByteView(const Bytes& bytes) : ByteView(bytes.data(), bytes.size()) {}

    const std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }
    const std::uint8_t* begin() const { return data_; }
    const std::uint8_t* end() const { return data_ + size_; }
    const std::uint8_t& operator[](std::size_t index) const { return data_[index]; }

private:
    const std::uint8_t* data_;
    std::size_t size_;
};

/// What becomes of a path that is a link.
enum class Links { follow, refuse };

/// The content of a plain file. Throws std::system_error where it is none, cannot be read, or has
/// more than `limit` bytes.
Bytes read_file(const std::filesystem::path& path, std::uint64_t limit,
                Links links = Links::follow);

/// The SHA-256 of a file's content, 64 hexadecimal digits. Throws std::system_error.
std::string sha256_file(const std::filesystem::path& path);

/// Writes one piece of a file. Throws std::system_error.
using Write = std::function<void(const void* data, std::size_t size)>;

/// Let `content` write a file beside `path` that then takes its place. It is flushed to disk before
/// that, so that a crash leaves the old file or the new one. Where anything throws, the temporary
/// file is removed and `path` is untouched. Throws std::system_error.
void write_atomically(const std::filesystem::path& path,
                      const std::function<void(const Write&)>& content);

}  // namespace sam3rt
