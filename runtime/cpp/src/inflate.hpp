// Unpacking what DEFLATE (RFC 1951) has packed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "files.hpp"

namespace sam3rt {

/// Unpack exactly `size` bytes from `count` packed ones. Empty where the packed data are damaged,
/// cut, followed by anything, or unpack to another number of bytes.
std::optional<Bytes> inflate(const std::uint8_t* packed, std::size_t count, std::size_t size);

}  // namespace sam3rt
