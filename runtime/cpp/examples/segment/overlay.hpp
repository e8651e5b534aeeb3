// A picture of masks and prompts over the image.
//
// Plainer than the Python runtime's: it draws no scores, and its lines are not smoothed.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.hpp"
#include "image_files.hpp"

/// Tint each mask, height * width of 0 and 1, draw its outline, then boxes and clicks.
Picture draw_overlay(const Picture& image, const std::vector<std::vector<std::uint8_t>>& masks,
                     const std::vector<Click>& clicks,
                     const std::vector<std::array<float, 4>>& boxes);
