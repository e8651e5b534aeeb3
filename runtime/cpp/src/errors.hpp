// What checks and error messages share.
#pragma once

#include <limits>
#include <string>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

// Elements take up to eight bytes; no array may be larger than the address space.
inline constexpr std::size_t max_elements = std::numeric_limits<std::size_t>::max() / 16;

/// A text with blanks for its control characters, which would end a line or move a terminal's cursor,
/// and U+FFFD for what is not UTF-8.
std::string one_line(std::string text);

/// A shape as Python writes it, such as "(3,)" or "(2, 5)".
std::string shape_text(const Shape& shape);

/// Whether no value is NaN or an infinity.
bool is_finite(const Array<float>& values);

}  // namespace sam3rt
