// Files that are read within bounds, and appear whole or not at all.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace sam3rt {

using Bytes = std::vector<std::uint8_t>;

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
