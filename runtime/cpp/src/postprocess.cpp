#include "postprocess.hpp"

#include <algorithm>

#include "components.hpp"

namespace sam3rt {
namespace {

// The reference moves a filled pixel this far from the threshold (SAM2Transforms).
constexpr float fill_margin = 10.0F;

template <typename Out, typename Resize>
Array<Out> finish(const Array<float>& low_res, const Resampling& resampling,
                  const Cleaning& cleaning, const Cancellation* cancellation, Resize resize) {
    const Shape& shape = low_res.shape();
    const Size size{shape[2], shape[3]};
    Array<Out> result({shape[0], shape[1], static_cast<std::int64_t>(resampling.rows.outputs()),
                       static_cast<std::int64_t>(resampling.columns.outputs())});
    std::vector<float> scratch;
    const auto count = static_cast<std::size_t>(shape[0] * shape[1]);
    for (std::size_t i = 0; i < count; ++i) {
        check_cancelled(cancellation);
        const float* logits = low_res.data() + i * (low_res.size() / count);
        Out* out = result.data() + i * (result.size() / count);
        if (cleaning.max_hole_area <= 0 && cleaning.max_sprinkle_area <= 0) {
            resize(logits, resampling, scratch, out);
        } else {
            resize(clean(logits, size, cleaning).data(), resampling, scratch, out);
        }
    }
    return result;
}

}  // namespace

std::vector<float> clean(const float* logits, const Size& size, const Cleaning& cleaning) {
    const auto height = static_cast<std::size_t>(size.height);
    const auto width = static_cast<std::size_t>(size.width);
    const auto threshold = static_cast<float>(cleaning.threshold);
    std::vector<float> cleaned(logits, logits + height * width);
    std::vector<std::uint8_t> wanted(cleaned.size());
    const auto move_small = [&](bool foreground, double area, float value) {
        if (area <= 0) {
            return;
        }
        std::transform(logits, logits + wanted.size(), wanted.begin(), [&](float logit) {
            return static_cast<std::uint8_t>((logit > threshold) == foreground ? 1 : 0);
        });
        const std::vector<std::uint8_t> small = small_components(wanted, height, width, area);
        for (std::size_t i = 0; i < small.size(); ++i) {
            cleaned[i] = small[i] != 0 ? value : cleaned[i];
        }
    };
    move_small(false, cleaning.max_hole_area, threshold + fill_margin);
    move_small(true, cleaning.max_sprinkle_area, threshold - fill_margin);
    return cleaned;
}

Array<std::uint8_t> finish_masks(const Array<float>& low_res, const Resampling& resampling,
                                 const Cleaning& cleaning, std::uint8_t foreground,
                                 const Cancellation* cancellation) {
    const auto threshold = static_cast<float>(cleaning.threshold);
    return finish<std::uint8_t>(
        low_res, resampling, cleaning, cancellation,
        [threshold, foreground](const float* logits, const Resampling& how,
                                std::vector<float>& scratch, std::uint8_t* out) {
            resize_to_mask(logits, how, threshold, foreground, scratch, out);
        });
}

Array<float> finish_logits(const Array<float>& low_res, const Resampling& resampling,
                           const Cleaning& cleaning, const Cancellation* cancellation) {
    return finish<float>(low_res, resampling, cleaning, cancellation, resize_logits);
}

}  // namespace sam3rt
