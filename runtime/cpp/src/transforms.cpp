#include "transforms.hpp"

#include <algorithm>
#include <limits>

#include "resize.hpp"

namespace sam3rt {
namespace {

constexpr std::size_t channels = 3;

/// Planes of normalized values from interleaved ones.
template <typename Pixel>
void normalize(const std::vector<Pixel>& resized, const Size& size, const ImageSpec& spec,
               float* planes) {
    const auto width = static_cast<std::size_t>(size.width);
    const auto plane_width = static_cast<std::size_t>(spec.size.width);
    const std::size_t plane_size = plane_width * static_cast<std::size_t>(spec.size.height);
    for (std::size_t channel = 0; channel < channels; ++channel) {
        const float mean = spec.mean[channel];
        const float deviation = spec.std[channel];
        for (std::size_t y = 0; y < static_cast<std::size_t>(size.height); ++y) {
            const Pixel* row = &resized[y * width * channels + channel];
            float* out = planes + channel * plane_size + y * plane_width;
            for (std::size_t x = 0; x < width; ++x) {
                out[x] = (static_cast<float>(row[x * channels]) - mean) / deviation;
            }
        }
    }
}

}  // namespace

void check_image(const ImageView& image, const std::string& argument) {
    if (image.pixels == nullptr) {
        throw ImageError(argument, "no pixels", "8-bit RGB pixels");
    }
    // A side's bytes and the number of values must be countable.
    constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
    if (image.height < 1 || image.width < 1 || image.height > limit || image.width > limit) {
        throw ImageError(argument,
                         "an image of " + std::to_string(image.width) + " x " +
                             std::to_string(image.height) + " pixels",
                         "at least one pixel");
    }
    const std::size_t row = channels * static_cast<std::size_t>(image.width);
    if (image.row_stride != 0 && image.row_stride < row) {
        throw ImageError(argument, "rows of " + std::to_string(image.row_stride) + " bytes",
                         "at least " + std::to_string(row));
    }
}

ImageGeometry geometry(const ImageSpec& spec, const Size& original_size) {
    if (spec.resize == ImageSpec::Resize::stretch) {
        return {original_size, spec.size};
    }
    // ResizeLongestSide.get_preprocess_shape of SAM 1 and MobileSAM.
    const double scale = static_cast<double>(std::max(spec.size.height, spec.size.width)) /
                         static_cast<double>(std::max(original_size.height, original_size.width));
    const auto scaled = [scale](std::int64_t side) {
        const auto rounded = static_cast<std::int64_t>(static_cast<double>(side) * scale + 0.5);
        return std::max<std::int64_t>(1, rounded);
    };
    return {original_size, {scaled(original_size.height), scaled(original_size.width)}};
}

Array<float> preprocess(const ImageSpec& spec, const ImageView& image, const ImageGeometry& place) {
    Array<float> pixels({1, 3, spec.size.height, spec.size.width});
    if (place.input_size != spec.size) {
        std::fill_n(pixels.data(), pixels.size(), spec.pad_value);
    }
    if (spec.resize_dtype == ImageSpec::Rounding::uint8) {
        normalize(resize_rounded(image, place.input_size), place.input_size, spec, pixels.data());
    } else {
        normalize(resize_unrounded(image, place.input_size), place.input_size, spec, pixels.data());
    }
    return pixels;
}

}  // namespace sam3rt
