#include "resize.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

namespace sam3rt {
namespace {

constexpr std::size_t channels = 3;
// Pillow's fixed point: 32 bits hold 8 of a level, 2 for overshoot, and the rest a weight.
constexpr int weight_bits = 32 - 8 - 2;

/// What each output position of one axis takes of the input positions first, first + 1, ...
template <typename Weight>
struct Taps {
    struct Window {
        std::size_t first;
        std::size_t count;
    };

    std::vector<Window> windows;
    std::size_t stride;
    /// `stride` weights per output position, of which `count` are used.
    std::vector<Weight> weights;

    const Weight* weights_of(std::size_t output) const { return &weights[output * stride]; }
};

/// A triangle as wide as two input pixels, or two output pixels where those are larger: a shrinking
/// resize averages everything it leaves out.
Taps<double> triangle(std::size_t inputs, std::size_t outputs) {
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    const double support = std::max(scale, 1.0);
    const double narrowing = 1.0 / support;
    Taps<double> taps;
    taps.stride = 2 * static_cast<std::size_t>(std::ceil(support)) + 1;
    taps.weights.resize(outputs * taps.stride);
    for (std::size_t output = 0; output < outputs; ++output) {
        const double centre = (static_cast<double>(output) + 0.5) * scale;
        const auto first = static_cast<std::size_t>(std::max(centre - support + 0.5, 0.0));
        const auto last = std::min(static_cast<std::size_t>(centre + support + 0.5), inputs);
        double* weights = &taps.weights[output * taps.stride];
        double sum = 0;
        for (std::size_t input = first; input < last; ++input) {
            const double distance = (static_cast<double>(input) - centre + 0.5) * narrowing;
            weights[input - first] = std::max(1.0 - std::abs(distance), 0.0);
            sum += weights[input - first];
        }
        if (sum != 0) {
            std::for_each(weights, weights + (last - first), [sum](double& w) { w /= sum; });
        }
        taps.windows.push_back({first, last - first});
    }
    return taps;
}

Taps<std::int32_t> in_fixed_point(const Taps<double>& taps) {
    Taps<std::int32_t> result{{}, taps.stride, std::vector<std::int32_t>(taps.weights.size())};
    for (const auto& window : taps.windows) {
        result.windows.push_back({window.first, window.count});
    }
    std::transform(taps.weights.begin(), taps.weights.end(), result.weights.begin(), [](double w) {
        return static_cast<std::int32_t>(w * (1 << weight_bits) + 0.5);
    });
    return result;
}

std::uint8_t to_level(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::clamp(sum >> weight_bits, 0, 255));
}

/// How sums are made and kept: 8-bit levels, or floats whose sums are made in double precision.
struct Rounded {
    using Pixel = std::uint8_t;
    using Weight = std::int32_t;
    static constexpr Weight start = 1 << (weight_bits - 1);
    static Pixel finish(Weight sum) { return to_level(sum); }
};
struct Unrounded {
    using Pixel = float;
    using Weight = double;
    static constexpr Weight start = 0;
    static Pixel finish(Weight sum) { return static_cast<float>(sum); }
};

/// How luma and chroma of limited range become RGB, in the fixed point of 20 bits that OpenCV uses.
struct YuvMatrix {
    std::int32_t luma;
    std::int32_t red_of_v;
    std::int32_t green_of_u;
    std::int32_t green_of_v;
    std::int32_t blue_of_u;

    void to_rgb(std::uint8_t y, std::uint8_t u, std::uint8_t v, std::uint8_t* out) const {
        const std::int32_t base = std::max(y - 16, 0) * luma + (1 << 19);
        const std::int32_t blue = u - 128;
        const std::int32_t red = v - 128;
        const auto level = [](std::int32_t sum) {
            return static_cast<std::uint8_t>(std::clamp(sum >> 20, 0, 255));
        };
        out[0] = level(base + red_of_v * red);
        out[1] = level(base + green_of_u * blue + green_of_v * red);
        out[2] = level(base + blue_of_u * blue);
    }
};
constexpr YuvMatrix bt601 = {1220542, 1673527, -409993, -852492, 2116026};
constexpr YuvMatrix bt709 = {1220945, 1879825, -223607, -558796, 2215014};

/// The rows of an image as RGB pixels. One of another format is converted row by row, when it is
/// asked for; a row stays until the next one is.
class ImageRows {
public:
    explicit ImageRows(const ImageView& image)
        : height(static_cast<std::size_t>(image.height)),
          width(static_cast<std::size_t>(image.width)),
          pixels_(image.pixels),
          step_(bytes_per_pixel(image.format)),
          stride_(image.row_stride == 0 ? static_cast<std::ptrdiff_t>(step_ * width)
                                        : image.row_stride),
          plane_stride_(image.plane_stride == 0
                            ? height * static_cast<std::size_t>(std::abs(stride_))
                            : image.plane_stride),
          format_(image.format),
          is_rgb_(image.format == PixelFormat::rgb) {
        const bool is_reversed =
            image.format == PixelFormat::bgr || image.format == PixelFormat::bgra;
        const bool is_grey = image.format == PixelFormat::grey;
        places_ = is_grey ? std::array<std::size_t, channels>{0, 0, 0}
                          : (is_reversed ? std::array<std::size_t, channels>{2, 1, 0}
                                         : std::array<std::size_t, channels>{0, 1, 2});
        converted_.resize(is_rgb_ ? 0 : width * channels);
    }

    const std::uint8_t* row(std::size_t y) const {
        const std::uint8_t* source = pixels_ + static_cast<std::ptrdiff_t>(y) * stride_;
        if (is_rgb_) {
            return source;
        }
        std::uint8_t* out = converted_.data();
        if (format_ == PixelFormat::planar) {
            for (std::size_t x = 0; x < width; ++x, out += channels) {
                for (std::size_t channel = 0; channel < channels; ++channel) {
                    out[channel] = source[channel * plane_stride_ + x];
                }
            }
            return converted_.data();
        }
        if (is_nv12(format_)) {
            const std::uint8_t* chroma =
                pixels_ + plane_stride_ + static_cast<std::ptrdiff_t>(y / 2) * stride_;
            const YuvMatrix& matrix = format_ == PixelFormat::nv12 ? bt601 : bt709;
            for (std::size_t x = 0; x < width; ++x, out += channels) {
                matrix.to_rgb(source[x], chroma[x / 2 * 2], chroma[x / 2 * 2 + 1], out);
            }
            return converted_.data();
        }
        for (std::size_t x = 0; x < width; ++x, source += step_) {
            for (const std::size_t place : places_) {
                *out++ = source[place];
            }
        }
        return converted_.data();
    }

    const std::size_t height;
    const std::size_t width;

private:
    const std::uint8_t* pixels_;
    std::size_t step_;
    std::ptrdiff_t stride_;
    std::size_t plane_stride_;
    PixelFormat format_;
    bool is_rgb_;
    /// Where in a pixel red, green and blue stand.
    std::array<std::size_t, channels> places_{};
    mutable std::vector<std::uint8_t> converted_;
};

/// Rows of `taps.windows.size()` pixels, made of the source's rows when they are asked for.
template <typename Kind, typename Source>
class ResizedColumns {
public:
    using Pixel = typename Kind::Pixel;
    using Weight = typename Kind::Weight;

    ResizedColumns(const Source& source, const Taps<Weight>& taps)
        : height(source.height), width(taps.windows.size()), source_(source), taps_(taps) {}

    void fill(std::size_t y, Pixel* out) const {
        const auto* row = source_.row(y);
        for (std::size_t x = 0; x < width; ++x) {
            const auto [first, count] = taps_.windows[x];
            const Weight* weights = taps_.weights_of(x);
            Weight sums[channels] = {Kind::start, Kind::start, Kind::start};
            const auto* pixel = row + channels * first;
            for (std::size_t i = 0; i < count; ++i, pixel += channels) {
                for (std::size_t channel = 0; channel < channels; ++channel) {
                    sums[channel] += static_cast<Weight>(pixel[channel]) * weights[i];
                }
            }
            for (std::size_t channel = 0; channel < channels; ++channel) {
                *out++ = Kind::finish(sums[channel]);
            }
        }
    }

    const std::size_t height;
    const std::size_t width;

private:
    const Source& source_;
    const Taps<Weight>& taps_;
};

/// `taps.windows.size()` rows of the source's width, likewise.
template <typename Kind, typename Source>
class ResizedRows {
public:
    using Pixel = typename Kind::Pixel;
    using Weight = typename Kind::Weight;

    ResizedRows(const Source& source, const Taps<Weight>& taps)
        : height(taps.windows.size()),
          width(source.width),
          source_(source),
          taps_(taps),
          sums_(width * channels) {}

    void fill(std::size_t y, Pixel* out) const {
        const auto [first, count] = taps_.windows[y];
        std::fill(sums_.begin(), sums_.end(), Kind::start);
        for (std::size_t i = 0; i < count; ++i) {
            const Weight weight = taps_.weights_of(y)[i];
            const auto* row = source_.row(first + i);
            for (std::size_t x = 0; x < sums_.size(); ++x) {
                sums_[x] += static_cast<Weight>(row[x]) * weight;
            }
        }
        std::transform(sums_.begin(), sums_.end(), out, Kind::finish);
    }

    const std::size_t height;
    const std::size_t width;

private:
    const Source& source_;
    const Taps<Weight>& taps_;
    mutable std::vector<Weight> sums_;
};

/// The last few rows that were made, for what reads each of them several times: the intermediate
/// image as a whole would be as large as the encoder's input is wide and the photograph is high.
template <typename Rows>
class RecentRows {
public:
    /// A row stays until `count` others were asked for.
    RecentRows(const Rows& rows, std::size_t count)
        : height(rows.height),
          width(rows.width),
          rows_(rows),
          numbers_(count, rows.height),
          values_(count * rows.width * channels) {}

    const typename Rows::Pixel* row(std::size_t y) const {
        const std::size_t place = y % numbers_.size();
        auto* values = &values_[place * width * channels];
        if (numbers_[place] != y) {
            rows_.fill(y, values);
            numbers_[place] = y;
        }
        return values;
    }

    const std::size_t height;
    const std::size_t width;

private:
    const Rows& rows_;
    /// Which row is in each place; none at first.
    mutable std::vector<std::size_t> numbers_;
    mutable std::vector<typename Rows::Pixel> values_;
};

template <typename Rows>
std::vector<typename Rows::Pixel> all_of(const Rows& rows) {
    std::vector<typename Rows::Pixel> result(rows.height * rows.width * channels);
    for (std::size_t y = 0; y < rows.height; ++y) {
        rows.fill(y, &result[y * rows.width * channels]);
    }
    return result;
}

/// Both axes; one that keeps its size is left as it is.
template <typename Kind, typename Prepare>
std::vector<typename Kind::Pixel> resize(const ImageView& image, const Size& target,
                                         Prepare prepare) {
    const ImageRows source(image);
    const auto new_height = static_cast<std::size_t>(target.height);
    const auto new_width = static_cast<std::size_t>(target.width);
    if (new_width == source.width && new_height == source.height) {
        std::vector<typename Kind::Pixel> pixels;
        const std::size_t row_size = source.width * channels;
        pixels.reserve(source.height * row_size);
        for (std::size_t y = 0; y < source.height; ++y) {
            const std::uint8_t* row = source.row(y);
            pixels.insert(pixels.end(), row, row + row_size);
        }
        return pixels;
    }
    const auto column_taps = prepare(triangle(source.width, new_width));
    const auto row_taps = prepare(triangle(source.height, new_height));
    const ResizedColumns<Kind, ImageRows> columns(source, column_taps);
    const ResizedRows<Kind, ImageRows> rows(source, row_taps);
    if (new_height == source.height) {
        return all_of(columns);
    }
    if (new_width == source.width) {
        return all_of(rows);
    }
    if (rows_first({image.height, image.width}, target)) {
        const RecentRows recent(rows, 1);
        return all_of(ResizedColumns<Kind, decltype(recent)>(recent, column_taps));
    }
    const RecentRows recent(columns, row_taps.stride);
    return all_of(ResizedRows<Kind, decltype(recent)>(recent, row_taps));
}

}  // namespace

bool rows_first(const Size& source, const Size& target) {
    return target.height < source.height &&
           source.height - target.height > 2 * (source.width - target.width);
}

void copy_as_rgb(const ImageView& image, std::uint8_t* out) {
    const ImageRows rows(image);
    for (std::size_t y = 0; y < rows.height; ++y, out += rows.width * channels) {
        std::copy_n(rows.row(y), rows.width * channels, out);
    }
}

bool is_nv12(PixelFormat format) {
    return format == PixelFormat::nv12 || format == PixelFormat::nv12_bt709;
}

std::array<int, 5> nv12_matrix(PixelFormat format) {
    const YuvMatrix& of = format == PixelFormat::nv12 ? bt601 : bt709;
    return {of.luma, of.red_of_v, of.green_of_u, of.green_of_v, of.blue_of_u};
}

bool is_planar(PixelFormat format) { return format == PixelFormat::planar || is_nv12(format); }

std::size_t bytes_per_pixel(PixelFormat format) {
    switch (format) {
        case PixelFormat::grey:
        case PixelFormat::planar:
        case PixelFormat::nv12:
        case PixelFormat::nv12_bt709:
            return 1;
        case PixelFormat::rgba:
        case PixelFormat::bgra:
            return 4;
        case PixelFormat::rgb:
        case PixelFormat::bgr:
            break;
    }
    return channels;
}

std::vector<std::uint8_t> resize_rounded(const ImageView& image, const Size& target) {
    return resize<Rounded>(image, target, in_fixed_point);
}

std::vector<float> resize_unrounded(const ImageView& image, const Size& target) {
    return resize<Unrounded>(image, target, [](Taps<double> taps) { return taps; });
}

}  // namespace sam3rt
