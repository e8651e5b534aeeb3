#include "postprocess.hpp"

#include <algorithm>

#include "components.hpp"
#include "rle.hpp"

namespace sam3rt {
namespace {

// The reference moves a filled pixel this far from the threshold (SAM2Transforms).
constexpr float fill_margin = 10.0F;

std::size_t plane_size(const Resampling& resampling) {
    return resampling.rows.outputs() * resampling.columns.outputs();
}

/// Clean one map after the other, and give each to a function with its number.
template <typename Function>
void for_each_map(const MaskSource& source, const Function& function) {
    const Shape& shape = source.low_res.shape();
    const Cleaning& cleaning = source.cleaning;
    const auto count = static_cast<std::size_t>(shape[0] * shape[1]);
    for (std::size_t i = 0; i < count; ++i) {
        check_cancelled(source.cancellation);
        const float* logits = source.low_res.data() + i * (source.low_res.size() / count);
        if (cleaning.max_hole_area <= 0 && cleaning.max_sprinkle_area <= 0) {
            function(i, logits);
        } else {
            function(i, clean(logits, {shape[2], shape[3]}, cleaning).data());
        }
    }
}

/// Give one mask of 0 and 1 after the other to a function with its number: those that were made, or
/// each in the same memory.
template <typename Function>
void for_each_mask(const MaskSource& source, const Function& function) {
    const std::size_t size = plane_size(source.resampling);
    if (source.made != nullptr) {
        for (std::size_t at = 0; at < source.made->size(); at += size) {
            check_cancelled(source.cancellation);
            function(at / size, source.made->data() + at);
        }
        return;
    }
    std::vector<float> scratch;
    std::vector<std::uint8_t> mask(size);
    const auto threshold = static_cast<float>(source.cleaning.threshold);
    for_each_map(source, [&](std::size_t i, const float* logits) {
        resize_to_mask(logits, source.resampling, threshold, 1, scratch, mask.data());
        function(i, mask.data());
    });
}

/// Eight pixels a byte, the first in the highest bit; what is left of the last byte is 0.
void pack_row(const std::uint8_t* row, std::size_t width, std::uint8_t* out) {
    for (std::size_t first = 0; first < width; first += 8) {
        unsigned bits = 0;
        for (std::size_t i = 0; i < 8; ++i) {
            bits = bits << 1U | (first + i < width ? row[first + i] : 0U);
        }
        *out++ = static_cast<std::uint8_t>(bits);
    }
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

Shape full_shape(const Array<float>& low_res, const Resampling& resampling) {
    return {low_res.shape()[0], low_res.shape()[1],
            static_cast<std::int64_t>(resampling.rows.outputs()),
            static_cast<std::int64_t>(resampling.columns.outputs())};
}

void finish_masks(const MaskSource& source, std::uint8_t foreground, std::uint8_t* out) {
    if (source.made != nullptr) {
        std::transform(source.made->begin(), source.made->end(), out, [foreground](std::uint8_t mask) {
            return static_cast<std::uint8_t>(mask * foreground);
        });
        return;
    }
    std::vector<float> scratch;
    const auto threshold = static_cast<float>(source.cleaning.threshold);
    for_each_map(source, [&](std::size_t i, const float* logits) {
        resize_to_mask(logits, source.resampling, threshold, foreground, scratch,
                       out + i * plane_size(source.resampling));
    });
}

void finish_bits(const MaskSource& source, std::uint8_t* out) {
    const std::size_t height = source.resampling.rows.outputs();
    const std::size_t width = source.resampling.columns.outputs();
    const std::size_t row_size = (width + 7) / 8;
    for_each_mask(source, [&](std::size_t i, const std::uint8_t* mask) {
        for (std::size_t y = 0; y < height; ++y) {
            pack_row(mask + y * width, width, out + (i * height + y) * row_size);
        }
    });
}

std::vector<std::string> finish_rle(const MaskSource& source) {
    std::vector<std::string> texts;
    for_each_mask(source, [&](std::size_t, const std::uint8_t* mask) {
        texts.push_back(compressed_runs(mask, source.resampling.rows.outputs(),
                                        source.resampling.columns.outputs()));
    });
    return texts;
}

void finish_logits(const MaskSource& source, float* out) {
    std::vector<float> scratch;
    for_each_map(source, [&](std::size_t i, const float* logits) {
        resize_logits(logits, source.resampling, scratch, out + i * plane_size(source.resampling));
    });
}

}  // namespace sam3rt
