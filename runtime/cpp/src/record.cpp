#include "record.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "errors.hpp"
#include "geometry.hpp"
#include "json_reader.hpp"

namespace sam3rt {
namespace {

constexpr std::int64_t record_version = 1;
constexpr std::int64_t max_entries = 4096;
constexpr std::size_t logit_stride = 8;
constexpr std::size_t channel_stride = 4;
// The archive around the arrays adds some hundred bytes to each.
constexpr std::uint64_t max_file_bytes = max_npz_bytes + (std::uint64_t{1} << 20);

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

std::int64_t divided_up(std::int64_t number, std::int64_t by) { return (number + by - 1) / by; }

/// What is compared: a number that is not finite may lie between those on record.
Array<float> nan_unless_finite(Array<float> part, const Array<float>& whole) {
    if (!is_finite(whole)) {
        std::fill_n(part.data(), part.size(), std::numeric_limits<float>::quiet_NaN());
    }
    return part;
}

/// The largest absolute value; NaN where one is NaN.
double largest(const Array<float>& values) {
    float found = 0;
    for (const float value : values) {
        if (std::isnan(value)) {
            return nan;
        }
        found = std::max(found, std::abs(value));
    }
    return static_cast<double>(found);
}

/// The largest absolute difference; NaN where either holds one, infinity where shapes differ.
double largest_error(const Array<float>& actual, const Array<float>& expected) {
    if (actual.shape() != expected.shape()) {
        return infinity;
    }
    Array<float> differences(actual.shape());
    std::transform(actual.begin(), actual.end(), expected.begin(), differences.data(),
                   [](float a, float b) { return a - b; });
    return largest(differences);
}

/// What an error is set in relation to; NaN stays NaN.
double scale(double largest_value) { return largest_value < 1e-6 ? 1e-6 : largest_value; }

double relative_error(const Array<float>& actual, const Array<float>& expected) {
    return largest_error(actual, expected) / scale(largest(expected));
}

/// Cosine similarity of all values; NaN where either holds one or the shapes differ. Zeros agree
/// with zeros only.
double cosine(const Array<float>& actual, const Array<float>& expected) {
    if (actual.shape() != expected.shape()) {
        return nan;
    }
    double product = 0;
    double actual_square = 0;
    double expected_square = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const double a = static_cast<double>(actual[i]);
        const double b = static_cast<double>(expected[i]);
        product += a * b;
        actual_square += a * a;
        expected_square += b * b;
    }
    const double norms = std::sqrt(actual_square) * std::sqrt(expected_square);
    if (norms == 0) {
        return std::equal(actual.begin(), actual.end(), expected.begin()) ? 1 : 0;
    }
    return product / norms;
}

/// The mean and the least IoU of masks, logits above 0, with expected ones: a bit for each logit.
/// Two empty masks agree. NaN where a logit is NaN.
std::pair<double, double> mask_ious(const Array<float>& logits, const Array<std::uint8_t>& bits) {
    const Shape& shape = logits.shape();
    const std::size_t size = logits.size();
    const auto planes = static_cast<std::size_t>(shape.at(0) * shape.at(1));
    if (planes == 0) {
        return {nan, nan};
    }
    double sum = 0;
    double least = infinity;
    for (std::size_t plane = 0; plane < planes; ++plane) {
        std::size_t both = 0;
        std::size_t either = 0;
        bool is_broken = false;
        for (std::size_t i = plane * (size / planes); i < (plane + 1) * (size / planes); ++i) {
            const bool expected =
                i / 8 < bits.size() && (bits[i / 8] >> (7U - i % 8) & 1U) != 0;
            const bool actual = logits[i] > 0;
            is_broken = is_broken || std::isnan(logits[i]);
            both += actual && expected ? 1 : 0;
            either += actual || expected ? 1 : 0;
        }
        const double iou =
            is_broken ? nan
            : either == 0
                ? 1
                : static_cast<double>(both) / static_cast<double>(either);
        sum += iou;
        least = std::min(least, iou);
    }
    const double mean = sum / static_cast<double>(planes);
    // One NaN is the sum, and so it is the least.
    return {mean, std::isnan(mean) ? nan : least};
}

/// Every `stride`-th entry of each of the last axes of an array, as many as there are strides.
Array<float> subsample(const Array<float>& array, const std::vector<std::size_t>& strides) {
    const Shape& shape = array.shape();
    Shape smaller = shape;
    Shape steps(shape.size(), 1);
    for (std::size_t i = 0; i < strides.size(); ++i) {
        const std::size_t axis = shape.size() - strides.size() + i;
        steps[axis] = static_cast<std::int64_t>(strides[i]);
        smaller[axis] = divided_up(shape[axis], steps[axis]);
    }
    Array<float> result(smaller);
    Shape index(shape.size(), 0);
    for (std::size_t to = 0; to < result.size(); ++to) {
        std::int64_t from = 0;
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            from = from * shape[axis] + index[axis] * steps[axis];
        }
        result[to] = array[static_cast<std::size_t>(from)];
        for (std::size_t axis = shape.size(); axis-- != 0 && ++index[axis] == smaller[axis];) {
            index[axis] = 0;
        }
    }
    return result;
}

/// Every fourth channel and about 24 rows and columns of a map [1, C, h, w]: [C / 4, h / s, w / s].
Array<float> subsample_features(const Array<float>& map) {
    const Shape& shape = map.shape();
    if (shape.size() != 4 || shape[0] != 1) {
        throw BackendError("the encoder returned a feature map of shape " + shape_text(shape));
    }
    const auto stride = static_cast<std::size_t>(std::max<std::int64_t>(1, shape[3] / 24));
    Array<float> result = subsample(map, {channel_stride, stride, stride});
    const Shape found = result.shape();
    return std::move(result).reshaped(Shape(found.begin() + 1, found.end()));
}

Array<float> subsample_logits(const Array<float>& logits) {
    return subsample(logits, {logit_stride, logit_stride});
}

/// Predicted log-odds as IoUs, in which limits are given. What is not finite stays so.
Array<float> as_iou(Array<float> predicted, bool is_log_odds) {
    if (is_log_odds) {
        std::transform(
            predicted.begin(), predicted.end(), predicted.data(), [](float value) {
                return std::isfinite(value) ? 1.0F / (1.0F + std::exp(-value))
                                            : std::numeric_limits<float>::quiet_NaN();
            });
    }
    return predicted;
}

}  // namespace

ParityRecord::ParityRecord(ByteView content, const std::string& file, const Manifest& manifest)
    : file_(file), arrays_(read_npz(content, file)) {
    const auto text = arrays_.find("description");
    if (text == arrays_.end() || !std::holds_alternative<std::string>(text->second)) {
        refuse("has no description");
    }
    const std::string description = std::get<std::string>(std::move(text->second));
    const JsonDocument document(reinterpret_cast<const std::uint8_t*>(description.data()),
                                description.size(), file);
    const JsonValue root = document.root();
    const std::int64_t version = root.field("version").whole_number();
    if (version != record_version) {
        refuse("has version " + std::to_string(version));
    }
    if (root.has("iou_unit") && root.field("iou_unit").is_text()) {
        log_odds_ = root.field("iou_unit").text() == "log_odds";
    }
    const std::int64_t image_count = root.field("images").whole_number();
    const std::int64_t levels = root.field("levels").whole_number();
    const std::vector<JsonValue> entries = root.field("cases").list();
    if (image_count < 1 || image_count > max_entries || entries.empty() ||
        entries.size() > max_entries) {
        refuse("proves nothing: it has " + std::to_string(image_count) + " images and " +
               std::to_string(entries.size()) + " decoder calls");
    }
    if (levels != static_cast<std::int64_t>(manifest.encoder.outputs.size())) {
        refuse("proves nothing: it has " + std::to_string(levels) +
               " feature maps, the encoder makes " +
               std::to_string(manifest.encoder.outputs.size()));
    }
    read_images(static_cast<std::size_t>(image_count), static_cast<std::size_t>(levels));
    for (const JsonValue& entry : entries) {
        const std::int64_t image = entry.field("image").whole_number();
        if (image < 0 || image >= image_count) {
            entry.field("image").refuse("one of the images");
        }
        read_case(entry.field("name").text(), static_cast<std::size_t>(image), manifest);
    }
    const auto with_mask = static_cast<std::size_t>(
        std::count_if(cases_.begin(), cases_.end(),
                      [](const RecordCase& entry) { return entry.prompts.masks.has_value(); }));
    if (with_mask == 0 || with_mask == cases_.size()) {
        refuse("proves nothing: " + std::to_string(with_mask) + " of its " +
               std::to_string(cases_.size()) + " decoder calls have a mask prompt");
    }
    arrays_.clear();
}

template <typename T>
Array<T> ParityRecord::take(const std::string& name) {
    const auto found = arrays_.find(name);
    Array<T>* const array =
        found == arrays_.end() ? nullptr : std::get_if<Array<T>>(&found->second);
    if (array == nullptr) {
        refuse("has no " + name + ", or one of another type");
    }
    Array<T> taken = std::move(*array);
    arrays_.erase(found);
    return taken;
}

void ParityRecord::read_images(std::size_t count, std::size_t levels) {
    for (std::size_t index = 0; index < count; ++index) {
        const std::string number = std::to_string(index);
        images_.push_back(take<std::uint8_t>("image_" + number));
        const Shape& shape = images_.back().shape();
        if (shape.size() != 3 || shape[2] != 3 || !is_image_size({shape[0], shape[1]})) {
            refuse("proves nothing: image " + number + " is of shape " + shape_text(shape));
        }
        features_.emplace_back();
        for (std::size_t level = 0; level < levels; ++level) {
            const std::string name = "features_" + number + "_" + std::to_string(level);
            features_.back().push_back(take<float>(name));
            if (features_.back().back().size() == 0) {
                refuse("proves nothing: " + name + " is empty");
            }
        }
    }
}

void ParityRecord::read_case(const std::string& name, std::size_t image,
                             const Manifest& manifest) {
    const auto require = [this, &name](bool is_right, const std::string& part,
                                       const Shape& shape) {
        if (!is_right) {
            refuse("proves nothing: case " + name + " has " + part + " of shape " +
                   shape_text(shape) + ", or values that are not finite");
        }
    };
    RecordCase entry{name, image, {}};
    PackedPrompts& prompts = entry.prompts;
    prompts.points = take<float>(name + "/points");
    prompts.labels = take<std::int64_t>(name + "/labels");
    Shape with_axis = prompts.labels.shape();
    require(with_axis.size() == 2 && with_axis[0] > 0, "labels", with_axis);
    const std::int64_t objects = with_axis[0];
    with_axis.push_back(2);
    require(prompts.points.shape() == with_axis && is_finite(prompts.points), "points",
            prompts.points.shape());
    if (arrays_.count(name + "/mask_prompt") != 0) {
        prompts.masks = take<float>(name + "/mask_prompt");
        const Size& size = manifest.prompts.mask_size;
        const Shape& shape = prompts.masks->shape();
        require(shape == Shape{1, size.height, size.width} ||
                    shape == Shape{objects, size.height, size.width},
                "a mask prompt", shape);
    }

    Expected expected;
    expected.logits = take<float>(name + "/logits");
    const Shape& logits = expected.logits.shape();
    const Size& size = manifest.masks.low_res_size;
    const auto stride = static_cast<std::int64_t>(logit_stride);
    require(logits.size() == 4 && logits[0] == objects &&
                logits[1] - 1 == manifest.masks.multimask &&
                logits[2] == divided_up(size.height, stride) &&
                logits[3] == divided_up(size.width, stride) && is_finite(expected.logits),
            "logits", logits);
    expected.masks = take<std::uint8_t>(name + "/masks");
    // The logits are there, and those of a whole mask are 64 times as many.
    require(expected.masks.shape() ==
                Shape{divided_up(objects * logits[1] * size.height * size.width, 8)},
            "masks", expected.masks.shape());
    expected.scores.iou = take<float>(name + "/iou");
    require(expected.scores.iou.shape() == Shape{objects, logits[1]} &&
                is_finite(expected.scores.iou),
            "iou", expected.scores.iou.shape());
    if (has_object_score(manifest) || arrays_.count(name + "/object_score") != 0) {
        expected.scores.object_score = take<float>(name + "/object_score");
        const Array<float>& score = *expected.scores.object_score;
        require(score.shape() == Shape{objects} && is_finite(score), "object_score",
                score.shape());
        // One near zero says "perhaps": an error relative to itself would be of no meaning.
        largest_score_ = std::max(largest_score_, static_cast<float>(largest(score)));
    }
    cases_.push_back(std::move(entry));
    expected_.emplace(name, std::move(expected));
}

void ParityRecord::compare_features(std::size_t image, const std::vector<Array<float>>& maps,
                                    const ParityLimits& limits,
                                    std::vector<Measurement>& found) const {
    const std::vector<Array<float>>& expected = features_.at(image);
    if (maps.size() != expected.size()) {
        refuse("holds " + std::to_string(expected.size()) + " feature maps, the model returned " +
               std::to_string(maps.size()));
    }
    const std::string name = "image " + std::to_string(image);
    for (std::size_t level = 0; level < maps.size(); ++level) {
        const Array<float> actual = nan_unless_finite(subsample_features(maps[level]), maps[level]);
        const std::string output = "features " + std::to_string(level);
        found.push_back({name, output, "cosine", cosine(actual, expected[level]),
                         limits.feature_cosine, true});
        found.push_back({name, output, "relative error", relative_error(actual, expected[level]),
                         limits.feature_error, false});
    }
}

void ParityRecord::compare_case(const RecordCase& entry, const CaseAnswer& answer,
                                const ParityLimits& limits,
                                std::vector<Measurement>& found) const {
    const Expected& expected = expected_.at(entry.name);
    const auto add = [&](const char* output, const char* metric, double value, double limit,
                         bool at_least = false) {
        found.push_back({entry.name, output, metric, value, limit, at_least});
    };
    add("logits", "relative error",
        relative_error(nan_unless_finite(subsample_logits(answer.logits), answer.logits),
                       expected.logits),
        limits.logit_error);
    const auto [mean, least] = mask_ious(answer.logits, expected.masks);
    add("masks", "mean IoU", mean, limits.mask_iou, true);
    // Five times the mean's allowance: a small mask loses a percent to a few pixels next to zero.
    add("masks", "least IoU", least, 1.0 - 5.0 * (1.0 - limits.mask_iou), true);
    add("predicted IoU", "error",
        largest_error(as_iou(answer.iou, log_odds_), as_iou(expected.scores.iou, log_odds_)),
        limits.iou_error);
    if (expected.scores.object_score) {
        const double error = answer.object_score
                                 ? largest_error(*answer.object_score,
                                                 *expected.scores.object_score)
                                 : infinity;
        add("object score", "relative error",
            error / scale(static_cast<double>(largest_score_)), limits.logit_error);
    }
}

void ParityRecord::refuse(const std::string& message) const { throw BundleError(message, file_); }

ParityRecord load_record(const Bundle& bundle) {
    const FileEntry& entry = bundle.manifest.parity_record;
    if (entry.bytes > max_file_bytes) {
        throw BundleError("has " + std::to_string(entry.bytes) + " bytes, at most " +
                              std::to_string(max_file_bytes) + " are read",
                          entry.file);
    }
    return ParityRecord(read_checked(bundle, entry).bytes(), entry.file, bundle.manifest);
}

}  // namespace sam3rt
