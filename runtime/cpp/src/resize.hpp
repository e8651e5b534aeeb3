// Antialiased bilinear resizing of images.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Whether an image has planes in place of whole pixels, and whether it is one of two NV12 has.
bool is_planar(PixelFormat format);
bool is_nv12(PixelFormat format);

/// How luma, then V for red, U and V for green, and U for blue count in an NV12 image: whole numbers
/// with 20 fractional bits.
std::array<int, 5> nv12_matrix(PixelFormat format);

/// How many bytes a pixel takes, in the first plane where there are several.
std::size_t bytes_per_pixel(PixelFormat format);

/// Whether rows are resized before columns. It matters where intermediate values are rounded.
/// Pillow, since its version 13, begins with the rows where those lose more than twice as many as
/// the columns do, and otherwise, like every earlier version, with the columns.
bool rows_first(const Size& source, const Size& target);

/// Copy an image to height * width * 3 bytes, interleaved.
void copy_as_rgb(const ImageView& image, std::uint8_t* out);

/// Resize an image, rounding to whole levels after each axis, to the last bit as Pillow 13 does it
/// for 8-bit images. Returns height * width * 3 values, interleaved.
std::vector<std::uint8_t> resize_rounded(const ImageView& image, const Size& target);

/// Resize an image without rounding to whole levels, as Pillow 13 does it for 32-bit float
/// planes. Returns height * width * 3 values, interleaved.
std::vector<float> resize_unrounded(const ImageView& image, const Size& target);

}  // namespace sam3rt
