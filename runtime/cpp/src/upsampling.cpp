#include "upsampling.hpp"

#include <algorithm>
#include <type_traits>

namespace sam3rt {
namespace {

/// One axis while several resizes are put together: for each output, weights in double precision
/// for the inputs from `start` on. Rows lie `band` weights apart.
struct Rows {
    struct Row {
        std::size_t start;
        std::size_t count;
    };

    Rows(std::size_t outputs, std::size_t widest) : rows(outputs), band(widest) {
        weights.resize(outputs * band);
    }

    double* weights_of(std::size_t output) { return &weights[output * band]; }
    const double* weights_of(std::size_t output) const { return &weights[output * band]; }

    std::vector<Row> rows;
    std::size_t band;
    std::vector<double> weights;
};

/// Half-pixel centres, clamped at the borders. Positions are rounded as PyTorch's are
/// (`area_pixel_compute_source_index`, compiled to one fused multiply-add): the step to float32,
/// then the position, once.
Rows bilinear(std::size_t inputs, std::size_t outputs) {
    const double step =
        static_cast<float>(static_cast<double>(inputs) / static_cast<double>(outputs));
    Rows result(outputs, 2);
    for (std::size_t output = 0; output < outputs; ++output) {
        const auto centre =
            std::max(static_cast<float>(step * (static_cast<double>(output) + 0.5) - 0.5), 0.0F);
        const std::size_t lower = std::min(static_cast<std::size_t>(centre), inputs - 1);
        const float fraction = centre - static_cast<float>(lower);
        double* weights = result.weights_of(output);
        if (lower + 1 < inputs) {
            result.rows[output] = {lower, 2};
            weights[0] = 1.0F - fraction;
            weights[1] = fraction;
        } else {
            result.rows[output] = {lower, 1};
            weights[0] = static_cast<double>(1.0F - fraction) + fraction;
        }
    }
    return result;
}

/// One resize that does `first` and then `second`, which may use only the first of its outputs.
Rows compose(const Rows& second, const Rows& first) {
    const auto merged = [&](const Rows::Row& outer) {
        const std::size_t start = first.rows[outer.start].start;
        const Rows::Row& last = first.rows[outer.start + outer.count - 1];
        return Rows::Row{start, last.start + last.count - start};
    };
    std::size_t band = 1;
    for (const Rows::Row& outer : second.rows) {
        band = std::max(band, merged(outer).count);
    }
    Rows result(second.rows.size(), band);
    for (std::size_t output = 0; output < second.rows.size(); ++output) {
        const Rows::Row& outer = second.rows[output];
        const Rows::Row row = merged(outer);
        result.rows[output] = row;
        for (std::size_t i = 0; i < outer.count; ++i) {
            const Rows::Row& inner = first.rows[outer.start + i];
            for (std::size_t j = 0; j < inner.count; ++j) {
                result.weights_of(output)[inner.start + j - row.start] +=
                    second.weights_of(output)[i] * first.weights_of(outer.start + i)[j];
            }
        }
    }
    return result;
}

AxisResampling finish(const Rows& source, std::size_t inputs) {
    AxisResampling axis{inputs, 1, {}, {}};
    for (const Rows::Row& row : source.rows) {
        axis.band = std::max(axis.band, row.count);
    }
    axis.weights.resize(source.rows.size() * axis.band);
    axis.starts.reserve(source.rows.size());
    for (std::size_t output = 0; output < source.rows.size(); ++output) {
        const Rows::Row& row = source.rows[output];
        // At the end of the axis a band starts earlier, with weights of 0 before the row's own.
        const std::size_t start = std::min(row.start, inputs - axis.band);
        axis.starts.push_back(start);
        const double* weights = source.weights_of(output);
        std::transform(weights, weights + row.count,
                       &axis.weights[output * axis.band + (row.start - start)],
                       [](double weight) { return static_cast<float>(weight); });
    }
    return axis;
}

AxisResampling direct(std::int64_t source, std::int64_t target) {
    const auto inputs = static_cast<std::size_t>(source);
    return finish(bilinear(inputs, static_cast<std::size_t>(target)), inputs);
}

/// Resize to `padded`, crop to `kept`, resize to `target`.
AxisResampling unpadded(std::int64_t source, std::int64_t padded, std::int64_t kept,
                        std::int64_t target) {
    const auto inputs = static_cast<std::size_t>(source);
    return finish(
        compose(bilinear(static_cast<std::size_t>(kept), static_cast<std::size_t>(target)),
                bilinear(inputs, static_cast<std::size_t>(padded))),
        inputs);
}

constexpr std::size_t cache_size = 8;

/// Call with a band as a constant where it is a common one, so that the compiler can unroll loops
/// over it, and with 0 where it is not.
template <typename Call>
void with_band(std::size_t band, Call call) {
    switch (band) {
        case 1:
            return call(std::integral_constant<std::size_t, 1>());
        case 2:
            return call(std::integral_constant<std::size_t, 2>());
        case 3:
            return call(std::integral_constant<std::size_t, 3>());
        case 4:
            return call(std::integral_constant<std::size_t, 4>());
        default:
            return call(std::integral_constant<std::size_t, 0>());
    }
}

/// Sum of as many values as the band has, `stride` apart, each with its weight.
template <std::size_t Band>
float mix(const float* values, std::size_t stride, const float* weights, std::size_t band) {
    float sum = 0;
    for (std::size_t b = 0; b < (Band == 0 ? band : Band); ++b) {
        sum += weights[b] * values[b * stride];
    }
    return sum;
}

/// A map [h, w] with its columns resampled: [h, W].
void resample_columns(const float* source, const Resampling& resampling, std::vector<float>& wide) {
    const AxisResampling& columns = resampling.columns;
    const std::size_t height = resampling.rows.inputs;
    wide.resize(height * columns.outputs());
    with_band(columns.band, [&](auto constant) {
        constexpr std::size_t band = decltype(constant)::value;
        for (std::size_t y = 0; y < height; ++y) {
            const float* row = source + y * columns.inputs;
            float* out = &wide[y * columns.outputs()];
            const float* weights = columns.weights.data();
            for (std::size_t x = 0; x < columns.outputs(); ++x, weights += columns.band) {
                out[x] = mix<band>(row + columns.starts[x], 1, weights, columns.band);
            }
        }
    });
}

template <typename Out, typename Finish>
void resample(const float* source, const Resampling& resampling, std::vector<float>& wide, Out* out,
              Finish finish) {
    resample_columns(source, resampling, wide);
    const AxisResampling& rows = resampling.rows;
    const std::size_t width = resampling.columns.outputs();
    with_band(rows.band, [&](auto constant) {
        constexpr std::size_t band = decltype(constant)::value;
        for (std::size_t y = 0; y < rows.outputs(); ++y) {
            const float* first = &wide[rows.starts[y] * width];
            const float* weights = &rows.weights[y * rows.band];
            Out* target = out + y * width;
            for (std::size_t x = 0; x < width; ++x) {
                target[x] = finish(mix<band>(first + x, width, weights, rows.band));
            }
        }
    });
}

}  // namespace

Resampling resampling_to_image(const ImageGeometry& geometry, const ImageSpec& image,
                               const MaskSpec& masks) {
    const Size& source = masks.low_res_size;
    const Size& target = geometry.original_size;
    if (masks.upsampling == MaskSpec::Upsampling::direct) {
        return {direct(source.height, target.height), direct(source.width, target.width)};
    }
    return {unpadded(source.height, image.size.height, geometry.input_size.height, target.height),
            unpadded(source.width, image.size.width, geometry.input_size.width, target.width)};
}

std::shared_ptr<const Resampling> ResamplingCache::find(const ImageGeometry& geometry,
                                                        const ImageSpec& image,
                                                        const MaskSpec& masks,
                                                        const Size& low_res_size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
        return entry.geometry == geometry && entry.low_res_size == low_res_size;
    });
    if (known != entries_.end()) {
        entries_.splice(entries_.begin(), entries_, known);
    } else {
        MaskSpec source = masks;
        source.low_res_size = low_res_size;
        entries_.push_front(
            {geometry, low_res_size,
             std::make_shared<const Resampling>(resampling_to_image(geometry, image, source))});
        entries_.resize(std::min(entries_.size(), cache_size));
    }
    return entries_.front().resampling;
}

void resize_logits(const float* source, const Resampling& resampling, std::vector<float>& scratch,
                   float* out) {
    resample(source, resampling, scratch, out, [](float value) { return value; });
}

void resize_to_mask(const float* source, const Resampling& resampling, float threshold,
                    std::uint8_t foreground, std::vector<float>& scratch, std::uint8_t* out) {
    resample(source, resampling, scratch, out, [threshold, foreground](float value) {
        return value > threshold ? foreground : std::uint8_t{0};
    });
}

}  // namespace sam3rt
