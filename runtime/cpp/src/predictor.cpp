#include <algorithm>
#include <cmath>

#include "cancellation.hpp"
#include "embedding.hpp"
#include "errors.hpp"
#include "geometry.hpp"
#include "model.hpp"
#include "postprocess.hpp"

namespace sam3rt {
namespace {

double finite(const std::string& argument, double value) {
    if (!std::isfinite(value)) {
        throw InvalidInputError(argument, std::to_string(value), "a finite number");
    }
    return value;
}

/// One object comes without an axis for objects.
template <typename T>
Array<T> without_single_object(Array<T> array) {
    const Shape& shape = array.shape();
    if (shape[0] != 1 || shape.size() == 1) {
        return array;
    }
    return std::move(array).reshaped(Shape(shape.begin() + 1, shape.end()));
}

/// Of [P, C, h, w], the plane of each object that is given by its index: [P, 1, h, w].
template <typename T>
Array<T> planes_of(const Array<T>& all, const std::vector<std::size_t>& indices) {
    const Shape& shape = all.shape();
    Array<T> chosen({shape[0], 1, shape[2], shape[3]});
    for (std::size_t object = 0; object < indices.size(); ++object) {
        const std::size_t size = chosen.size() / indices.size();
        const std::size_t plane = object * static_cast<std::size_t>(shape[1]) + indices[object];
        std::copy_n(all.data() + plane * size, size, chosen.data() + object * size);
    }
    return chosen;
}

/// Of each object's masks keep only that of the highest predicted IoU.
void keep_best(DecodedMasks& decoded, DeviceMasks& made) {
    const Shape& shape = decoded.low_res_masks.shape();
    const auto masks = static_cast<std::size_t>(shape[1]);
    Array<float> scores({shape[0], 1});
    std::vector<std::size_t> best;
    for (std::size_t object = 0; object < scores.size(); ++object) {
        const float* own = decoded.iou_predictions.data() + object * masks;
        best.push_back(best_mask(own, masks));
        scores[object] = own[best.back()];
    }
    decoded.low_res_masks = planes_of(decoded.low_res_masks, best);
    decoded.iou_predictions = std::move(scores);
    if (made.masks) {
        made.masks = planes_of(*made.masks, best);
    }
}

/// Masks of 0 and 1 with another value for foreground.
Array<std::uint8_t> with_foreground(Array<std::uint8_t> masks, std::uint8_t foreground) {
    if (foreground != 1) {
        std::transform(masks.begin(), masks.end(), masks.data(), [foreground](std::uint8_t mask) {
            return static_cast<std::uint8_t>(mask * foreground);
        });
    }
    return masks;
}

/// Throws InvalidInputError where masks cannot be left in device memory as the options say.
void check_device_output(const PredictOptions& options, const Backend& backend) {
    if (!options.output_on_device) {
        if (options.stream != nullptr) {
            throw InvalidInputError("stream", "a stream", "none, without output_on_device");
        }
        return;
    }
    if (options.output == nullptr) {
        throw InvalidInputError("output", "no memory", "an address, with output_on_device");
    }
    if (options.return_logits || options.form != MaskForm::bytes || options.foreground != 1) {
        throw InvalidInputError("output_on_device", "another form than bytes of 0 and 1",
                                "masks of that form");
    }
    if (const std::optional<Refusal> refusal = backend.refuses(options.output)) {
        throw InvalidInputError("output", refusal->got, refusal->expected);
    }
}

/// Throws InvalidInputError where the options contradict each other.
void check_options(const PredictOptions& options, const Backend& backend) {
    if (options.foreground == 0) {
        throw InvalidInputError("foreground", "0", "1 to 255");
    }
    if (options.form != MaskForm::bytes && options.return_logits) {
        throw InvalidInputError("form", "another than bytes", "bytes, with return_logits");
    }
    check_device_output(options, backend);
    if (options.output == nullptr) {
        return;
    }
    if (options.form == MaskForm::rle) {
        throw InvalidInputError("output", "memory", "none, for run lengths");
    }
    if (options.return_logits &&
        reinterpret_cast<std::uintptr_t>(options.output) % alignof(float) != 0) {
        throw InvalidInputError("output", "memory that is not aligned for float",
                                "aligned memory, with return_logits");
    }
}

/// Where a result goes: the caller's memory, or an array that is made for it.
template <typename T>
T* memory_for(const PredictOptions& options, const Shape& shape, Array<T>& own) {
    if (options.output == nullptr) {
        own = Array<T>(shape);
        return own.data();
    }
    const std::size_t size = element_count(shape) * sizeof(T);
    if (options.output_size < size) {
        throw InvalidInputError("output", std::to_string(options.output_size) + " bytes",
                                std::to_string(size) + " for shape " + shape_text(shape));
    }
    return static_cast<T*>(options.output);
}

/// The masks of one image, for a backend that makes them on its device.
DeviceMasks masks_to_make(const ImageEmbedding& embedding, const Cleaning& cleaning,
                          const PredictOptions& options) {
    return {embedding.data().geometry,
            cleaning,
            options.output_on_device ? options.output : nullptr,
            options.output_size,
            options.stream,
            options.best_mask_only,
            std::nullopt};
}

/// What callers get of one image, whose masks may be made already.
Prediction finish(const Model& model, const ImageEmbedding& embedding, DecodedMasks& decoded,
                  DeviceMasks& made, const PredictOptions& options) {
    if (options.best_mask_only) {
        keep_best(decoded, made);
    }
    const Manifest& about = model.manifest();
    const Shape& low_res = decoded.low_res_masks.shape();
    const std::shared_ptr<const Resampling> resampling = model.data().resampling.find(
        embedding.data().geometry, about.image, about.masks, {low_res[2], low_res[3]});
    const MaskSource source{decoded.low_res_masks, *resampling, made.cleaning,
                            options.cancellation, made.masks ? &*made.masks : nullptr};
    Array<std::uint8_t> masks;
    Array<float> logits;
    std::vector<std::string> rle;
    Shape shape = full_shape(decoded.low_res_masks, *resampling);
    if (options.return_logits) {
        finish_logits(source, memory_for(options, shape, logits));
    } else if (options.output_on_device) {
        // They are there.
    } else if (options.form == MaskForm::rle) {
        rle = finish_rle(source);
    } else if (options.form == MaskForm::bits) {
        shape[3] = (shape[3] + 7) / 8;
        finish_bits(source, memory_for(options, shape, masks));
    } else if (made.masks && options.output == nullptr) {
        masks = with_foreground(std::move(*made.masks), options.foreground);
    } else {
        finish_masks(source, options.foreground, memory_for(options, shape, masks));
    }
    if (shape[0] == 1) {
        shape.erase(shape.begin());
    }
    if (about.masks.low_res_limit) {
        const float limit = *about.masks.low_res_limit;
        float* low = decoded.low_res_masks.data();
        std::transform(low, low + decoded.low_res_masks.size(), low,
                       [limit](float logit) { return std::clamp(logit, -limit, limit); });
    }
    return {without_single_object(std::move(masks)),
            without_single_object(std::move(logits)),
            std::move(rle),
            std::move(shape),
            without_single_object(std::move(decoded.iou_predictions)),
            without_single_object(std::move(decoded.low_res_masks)),
            std::move(decoded.object_score_logits),
            std::move(decoded.warning)};
}

/// Predict on `count` images, with an entry of `prompts` for each.
std::vector<Prediction> predict_all(const Model& model, const ImageEmbedding* embeddings,
                                    const Prompts* prompts, std::size_t count,
                                    const Cleaning& cleaning, const PredictOptions& options) {
    check_options(options, *model.data().backend);
    std::vector<DeviceMasks> made;
    std::vector<Question> questions;
    made.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        made.push_back(masks_to_make(embeddings[i], cleaning, options));
        questions.push_back(
            {embeddings[i], prompts[i], options.return_logits ? nullptr : &made.back()});
    }
    std::vector<DecodedMasks> decoded =
        decode_all(model, questions, options.multimask_output, options.cancellation);
    std::vector<Prediction> predictions;
    for (std::size_t i = 0; i < count; ++i) {
        predictions.push_back(finish(model, embeddings[i], decoded[i], made[i], options));
    }
    return predictions;
}

}  // namespace

Predictor::Predictor(Model model, const PredictorOptions& options)
    : model_(std::move(model)),
      mask_threshold_(finite("mask_threshold", options.mask_threshold)),
      max_hole_area_(finite("max_hole_area",
                            options.max_hole_area.value_or(model_.manifest().masks.max_hole_area))),
      max_sprinkle_area_(finite("max_sprinkle_area", options.max_sprinkle_area)) {}

void Predictor::set_image(const ImageView& image, const Cancellation* cancellation) {
    set_embedding(model_.encode(image, cancellation));
}

void Predictor::set_embedding(ImageEmbedding embedding) {
    std::vector<ImageEmbedding> embeddings;
    embeddings.push_back(std::move(embedding));
    embeddings_ = std::move(embeddings);
    is_batch_ = false;
}

void Predictor::set_embedding_batch(std::vector<ImageEmbedding> embeddings) {
    if (embeddings.empty()) {
        throw InvalidInputError("embeddings", "an empty list", "a list of at least one embedding");
    }
    embeddings_ = std::move(embeddings);
    is_batch_ = true;
}

void Predictor::set_image_batch(const std::vector<ImageView>& images,
                                const Cancellation* cancellation) {
    if (images.empty()) {
        throw ImageError("images", "an empty list", "a list of at least one image");
    }
    embeddings_ = model_.encode_batch(images, cancellation);
    is_batch_ = true;
}

Prediction Predictor::predict(const Prompts& prompts, const PredictOptions& options) const {
    if (embeddings_.empty()) {
        throw StateError("an image must be set with set_image before predict");
    }
    const Cleaning cleaning{mask_threshold_, max_hole_area_, max_sprinkle_area_};
    return std::move(
        predict_all(model_, &embeddings_.back(), &prompts, 1, cleaning, options).front());
}

std::vector<Prediction> Predictor::predict_batch(const std::vector<Prompts>& prompts,
                                                 const PredictOptions& options) const {
    if (!is_batch_) {
        throw StateError(
            "a batch must be set with set_image_batch or set_embedding_batch before "
            "predict_batch");
    }
    if (prompts.size() != embeddings_.size()) {
        throw PromptError(
            "prompts", std::to_string(prompts.size()) + " entries",
            "one per image of the batch (" + std::to_string(embeddings_.size()) + ")");
    }
    if (options.output != nullptr) {
        throw InvalidInputError("output", "memory", "none, for a batch");
    }
    const Cleaning cleaning{mask_threshold_, max_hole_area_, max_sprinkle_area_};
    return predict_all(model_, embeddings_.data(), prompts.data(), prompts.size(), cleaning,
                       options);
}

void Predictor::reset() noexcept {
    embeddings_.clear();
    is_batch_ = false;
}

}  // namespace sam3rt
