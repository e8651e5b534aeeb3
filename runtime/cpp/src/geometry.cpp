#include "geometry.hpp"

#include <algorithm>

#include "resize.hpp"

namespace sam3rt {
namespace {

constexpr std::size_t channels = 3;
// Positions in a larger image could not be told by pointers.
constexpr std::int64_t max_span = std::int64_t{1} << 62U;

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
        throw ImageError(argument, "no pixels", "8-bit pixels");
    }
    if (!is_image_size({image.height, image.width})) {
        throw ImageError(argument,
                         "an image of " + std::to_string(image.width) + " x " +
                             std::to_string(image.height) + " pixels",
                         "1 to " + std::to_string(max_image_side) +
                             " pixels on a side and at most " + std::to_string(max_image_pixels) +
                             " in total");
    }
    if (image.stream != nullptr && !image.on_device) {
        throw ImageError(argument, "a stream", "none, for an image in host memory");
    }
    const bool has_planes = is_planar(image.format);
    const std::int64_t row =
        static_cast<std::int64_t>(bytes_per_pixel(image.format)) * image.width;
    const std::int64_t limit = max_span / image.height;
    const std::int64_t stride = image.row_stride;
    const bool fits = (stride >= row && stride <= limit) ||
                      (!has_planes && stride <= -row && stride >= -limit);
    if (stride != 0 && !fits) {
        throw ImageError(argument, "a row_stride of " + std::to_string(stride) + " bytes",
                         std::to_string(row) + " to " + std::to_string(limit) +
                             (has_planes ? "" : ", or the negative of it"));
    }
    if (image.plane_stride > (has_planes ? static_cast<std::size_t>(max_span) / 4 : 0)) {
        throw ImageError(argument,
                         "a plane_stride of " + std::to_string(image.plane_stride) + " bytes",
                         has_planes ? "planes that memory can hold" : "0, without planes");
    }
    if (is_nv12(image.format) && (image.height % 2 != 0 || image.width % 2 != 0)) {
        throw ImageError(argument,
                         "an NV12 image of " + std::to_string(image.width) + " x " +
                             std::to_string(image.height) + " pixels",
                         "even sides");
    }
}

bool is_image_size(const Size& size) {
    // The sides are compared first, so that their product cannot overflow.
    return size.height >= 1 && size.width >= 1 && size.height <= max_image_side &&
           size.width <= max_image_side && size.height * size.width <= max_image_pixels;
}

ImageGeometry geometry_of(const ImageSpec& spec, const Size& original_size) {
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

Array<float> preprocess(const ImageSpec& spec, const ImageView& image,
                        const ImageGeometry& geometry) {
    Array<float> pixels({1, 3, spec.size.height, spec.size.width});
    if (geometry.input_size != spec.size) {
        std::fill_n(pixels.data(), pixels.size(), spec.pad_value);
    }
    if (spec.resize_dtype == ImageSpec::Rounding::uint8) {
        normalize(resize_rounded(image, geometry.input_size), geometry.input_size, spec,
                  pixels.data());
    } else {
        normalize(resize_unrounded(image, geometry.input_size), geometry.input_size, spec,
                  pixels.data());
    }
    return pixels;
}

}  // namespace sam3rt
