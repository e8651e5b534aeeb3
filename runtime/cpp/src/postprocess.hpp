// From low-resolution logits to masks of the image's size.
//
// The order is the reference's: small holes and sprinkles on the unclamped low-resolution logits,
// then upsampling, then the threshold.
#pragma once

#include <algorithm>

#include "cancellation.hpp"
#include "sam3rt/sam3rt.hpp"
#include "upsampling.hpp"

namespace sam3rt {

/// What is done to logits before they are resized.
struct Cleaning {
    /// Logits above it are foreground.
    double threshold;
    /// Background components of at most this many pixels are filled; 0 for none.
    double max_hole_area;
    /// Foreground components of at most this many pixels are removed; 0 for none.
    double max_sprinkle_area;
};

/// Fill small holes and remove small islands of one mask, float32 [h, w]. Components are
/// 8-connected; islands are found on the logits as they came, not as the hole filling left them.
std::vector<float> clean(const float* logits, const Size& size, const Cleaning& cleaning);

/// Which of an object's masks has the highest predicted IoU.
inline std::size_t best_mask(const float* scores, std::size_t masks) {
    return static_cast<std::size_t>(std::max_element(scores, scores + masks) - scores);
}

/// Of masks [P, C, H, W] of the image's size, of [P, C, h, w] low-resolution logits.
Shape full_shape(const Array<float>& low_res, const Resampling& resampling);

/// What masks of the image's size are made of.
struct MaskSource {
    /// [P, C, h, w], unclamped logits.
    const Array<float>& low_res;
    const Resampling& resampling;
    const Cleaning& cleaning;
    /// CancelledError is thrown before the next mask where the call is to end; may be null.
    const Cancellation* cancellation;
    /// Those masks, [P, C, H, W] of 0 and 1, where a device has made them already, or null.
    const Array<std::uint8_t>* made;
};

/// Clean, upsample and threshold: [P, C, H, W] at `out`, 0 and `foreground`.
void finish_masks(const MaskSource& source, std::uint8_t foreground, std::uint8_t* out);

/// The same as bits, [P, C, H, ceil(W / 8)].
void finish_bits(const MaskSource& source, std::uint8_t* out);

/// The same as COCO's compressed run lengths.
std::vector<std::string> finish_rle(const MaskSource& source);

/// Clean and upsample: [P, C, H, W] logits at `out`.
void finish_logits(const MaskSource& source, float* out);

}  // namespace sam3rt
