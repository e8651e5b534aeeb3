// Bilinear resizing of logits without antialiasing, as PyTorch's `interpolate` does it.
//
// Resizing is linear and separable, and so are several resizes and crops after each other: each
// axis is one banded matrix, so that MobileSAM's resize, crop and resize cost as much as one
// resize.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// How one axis is resampled: output i is the sum over b of weights[i * band + b] times input
/// starts[i] + b.
struct AxisResampling {
    std::size_t inputs;
    std::size_t band;
    std::vector<std::size_t> starts;
    std::vector<float> weights;

    std::size_t outputs() const { return starts.size(); }
};

/// How maps of one size become maps of another.
struct Resampling {
    AxisResampling rows;
    AxisResampling columns;
};

/// What brings low-resolution logits to the size of the original image.
Resampling resampling_to_image(const ImageGeometry& geometry, const ImageSpec& image,
                               const MaskSpec& masks);

/// Resize a map [h, w] to `out` [H, W].
void resize_logits(const float* source, const Resampling& resampling, float* out);

/// Resize a map [h, w]; `out` [H, W] is 1 where a value is above the threshold and 0 elsewhere.
void resize_to_mask(const float* source, const Resampling& resampling, float threshold,
                    std::uint8_t* out);

}  // namespace sam3rt
