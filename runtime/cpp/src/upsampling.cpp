#include "upsampling.hpp"

#include <algorithm>

namespace sam3rt {
namespace {

/// One axis while several resizes are put together: a row of weights per output, in double
/// precision, from `start` on.
struct Row {
    std::size_t start;
    std::vector<double> weights;
};
using Rows = std::vector<Row>;

/// Half-pixel centres, clamped at the borders. Positions are rounded as PyTorch's are
/// (`area_pixel_compute_source_index`, compiled to one fused multiply-add): the step to float32,
/// then the position, once.
Rows bilinear(std::size_t inputs, std::size_t outputs) {
    const double step =
        static_cast<float>(static_cast<double>(inputs) / static_cast<double>(outputs));
    Rows rows;
    rows.reserve(outputs);
    for (std::size_t output = 0; output < outputs; ++output) {
        const auto centre =
            std::max(static_cast<float>(step * (static_cast<double>(output) + 0.5) - 0.5), 0.0F);
        const std::size_t lower = std::min(static_cast<std::size_t>(centre), inputs - 1);
        const float fraction = centre - static_cast<float>(lower);
        if (lower + 1 < inputs) {
            rows.push_back({lower, {1.0F - fraction, fraction}});
        } else {
            rows.push_back({lower, {static_cast<double>(1.0F - fraction) + fraction}});
        }
    }
    return rows;
}

/// One resize that does `first` and then `second`, which may use only the first of its outputs.
Rows compose(const Rows& second, const Rows& first) {
    Rows rows;
    rows.reserve(second.size());
    for (const Row& outer : second) {
        const std::size_t start = first[outer.start].start;
        const Row& last = first[outer.start + outer.weights.size() - 1];
        Row row{start, std::vector<double>(last.start + last.weights.size() - start)};
        for (std::size_t i = 0; i < outer.weights.size(); ++i) {
            const Row& inner = first[outer.start + i];
            for (std::size_t j = 0; j < inner.weights.size(); ++j) {
                row.weights[inner.start + j - start] += outer.weights[i] * inner.weights[j];
            }
        }
        rows.push_back(std::move(row));
    }
    return rows;
}

AxisResampling finish(const Rows& rows, std::size_t inputs) {
    AxisResampling axis{inputs, 1, {}, {}};
    for (const Row& row : rows) {
        axis.band = std::max(axis.band, row.weights.size());
    }
    axis.weights.resize(rows.size() * axis.band);
    for (std::size_t output = 0; output < rows.size(); ++output) {
        const Row& row = rows[output];
        // At the end of the axis a band starts earlier, with weights of 0 before the row's own.
        const std::size_t start = std::min(row.start, inputs - axis.band);
        axis.starts.push_back(start);
        std::transform(row.weights.begin(), row.weights.end(),
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

/// A map [h, w] with its columns resampled: [h, W].
std::vector<float> resample_columns(const float* source, const Resampling& resampling) {
    const AxisResampling& columns = resampling.columns;
    const std::size_t height = resampling.rows.inputs;
    std::vector<float> wide(height * columns.outputs());
    for (std::size_t y = 0; y < height; ++y) {
        const float* row = source + y * columns.inputs;
        float* out = &wide[y * columns.outputs()];
        for (std::size_t x = 0; x < columns.outputs(); ++x) {
            const float* weights = &columns.weights[x * columns.band];
            const float* values = row + columns.starts[x];
            float sum = 0;
            for (std::size_t b = 0; b < columns.band; ++b) {
                sum += weights[b] * values[b];
            }
            out[x] = sum;
        }
    }
    return wide;
}

/// One output row: `count` values that mix `Band` rows of `stride` values.
template <std::size_t Band, typename Out, typename Finish>
void mix_rows(const float* rows, std::size_t stride, const float* weights, Out* out,
              Finish finish) {
    for (std::size_t x = 0; x < stride; ++x) {
        float sum = 0;
        for (std::size_t b = 0; b < Band; ++b) {
            sum += weights[b] * rows[b * stride + x];
        }
        out[x] = finish(sum);
    }
}

template <typename Out, typename Finish>
void resample(const float* source, const Resampling& resampling, Out* out, Finish finish) {
    const std::vector<float> wide = resample_columns(source, resampling);
    const AxisResampling& rows = resampling.rows;
    const std::size_t width = resampling.columns.outputs();
    std::vector<float> scratch(rows.band > 4 ? width : 0);
    for (std::size_t y = 0; y < rows.outputs(); ++y) {
        const float* first = &wide[rows.starts[y] * width];
        const float* weights = &rows.weights[y * rows.band];
        Out* target = out + y * width;
        // The common bands get loops whose inner one the compiler can unroll.
        switch (rows.band) {
            case 1:
                mix_rows<1>(first, width, weights, target, finish);
                break;
            case 2:
                mix_rows<2>(first, width, weights, target, finish);
                break;
            case 3:
                mix_rows<3>(first, width, weights, target, finish);
                break;
            case 4:
                mix_rows<4>(first, width, weights, target, finish);
                break;
            default:
                std::fill(scratch.begin(), scratch.end(), 0.0F);
                for (std::size_t b = 0; b < rows.band; ++b) {
                    for (std::size_t x = 0; x < width; ++x) {
                        scratch[x] += weights[b] * first[b * width + x];
                    }
                }
                std::transform(scratch.begin(), scratch.end(), target, finish);
        }
    }
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

void resize_logits(const float* source, const Resampling& resampling, float* out) {
    resample(source, resampling, out, [](float value) { return value; });
}

void resize_to_mask(const float* source, const Resampling& resampling, float threshold,
                    std::uint8_t* out) {
    resample(source, resampling, out, [threshold](float value) {
        return static_cast<std::uint8_t>(value > threshold ? 1 : 0);
    });
}

}  // namespace sam3rt
