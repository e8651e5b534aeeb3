// Bilinear resizing of logits without antialiasing, as PyTorch's `interpolate` does it.
//
// Resizing is linear and separable, and so are several resizes and crops after each other: each
// axis is one banded matrix, so that MobileSAM's resize, crop and resize cost as much as one
// resize.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
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

/// The resamplings of the image sizes used last, which any thread may ask for. Images of a video,
/// and many of a service, have the same size.
class ResamplingCache {
public:
    /// As resampling_to_image makes it, for maps of another size than the spec's.
    std::shared_ptr<const Resampling> find(const ImageGeometry& geometry, const ImageSpec& image,
                                           const MaskSpec& masks, const Size& low_res_size);

private:
    struct Entry {
        ImageGeometry geometry;
        Size low_res_size;
        std::shared_ptr<const Resampling> resampling;
    };

    std::mutex mutex_;
    /// The one used last stands first.
    std::list<Entry> entries_;
};

/// Resize a map [h, w] to `out` [H, W]. `scratch` is memory that several calls may share.
void resize_logits(const float* source, const Resampling& resampling, std::vector<float>& scratch,
                   float* out);

/// Resize a map [h, w]; `out` [H, W] is `foreground` where a value is above the threshold and 0
/// elsewhere.
void resize_to_mask(const float* source, const Resampling& resampling, float threshold,
                    std::uint8_t foreground, std::vector<float>& scratch, std::uint8_t* out);

}  // namespace sam3rt
