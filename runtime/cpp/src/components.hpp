// Small connected components of a binary mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sam3rt {

/// Pixels of the 8-connected components of `wanted` that have at most `max_area` pixels.
/// `wanted` is [height, width] of 0 and 1, and so is the result; an empty result stands for none.
std::vector<std::uint8_t> small_components(const std::vector<std::uint8_t>& wanted,
                                           std::size_t height, std::size_t width, double max_area);

}  // namespace sam3rt
