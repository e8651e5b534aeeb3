#include <algorithm>
#include <cmath>

#include "cancellation.hpp"
#include "embedding.hpp"
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
    if (shape[0] != 1) {
        return array;
    }
    return std::move(array).reshaped(Shape(shape.begin() + 1, shape.end()));
}

/// Of each object's masks keep only that of the highest predicted IoU.
void keep_best(DecodedMasks& decoded) {
    const Shape& shape = decoded.low_res_masks.shape();
    const auto objects = static_cast<std::size_t>(shape[0]);
    const auto masks = static_cast<std::size_t>(shape[1]);
    Array<float> low_res({shape[0], 1, shape[2], shape[3]});
    Array<float> scores({shape[0], 1});
    for (std::size_t object = 0; object < objects; ++object) {
        const float* own = decoded.iou_predictions.data() + object * masks;
        const float* best = std::max_element(own, own + masks);
        scores[object] = *best;
        const std::size_t size = low_res.size() / objects;
        const auto index = object * masks + static_cast<std::size_t>(best - own);
        std::copy_n(decoded.low_res_masks.data() + index * size, size,
                    low_res.data() + object * size);
    }
    decoded.low_res_masks = std::move(low_res);
    decoded.iou_predictions = std::move(scores);
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

void Predictor::set_image_batch(const std::vector<ImageView>& images,
                                const Cancellation* cancellation) {
    if (images.empty()) {
        throw ImageError("images", "an empty list", "a list of at least one image");
    }
    // All are checked before the first is encoded: encoding is the expensive part.
    for (std::size_t i = 0; i < images.size(); ++i) {
        check_image(images[i], "images[" + std::to_string(i) + "]");
    }
    std::vector<ImageEmbedding> embeddings;
    for (const ImageView& image : images) {
        embeddings.push_back(model_.encode(image, cancellation));
    }
    embeddings_ = std::move(embeddings);
    is_batch_ = true;
}

Prediction Predictor::predict(const Prompts& prompts, const PredictOptions& options) const {
    if (embeddings_.empty()) {
        throw StateError("an image must be set with set_image before predict");
    }
    return predict_on(embeddings_.back(), prompts, options);
}

std::vector<Prediction> Predictor::predict_batch(const std::vector<Prompts>& prompts,
                                                 const PredictOptions& options) const {
    if (!is_batch_) {
        throw StateError("a batch must be set with set_image_batch before predict_batch");
    }
    if (prompts.size() != embeddings_.size()) {
        throw PromptError(
            "prompts", std::to_string(prompts.size()) + " entries",
            "one per image of the batch (" + std::to_string(embeddings_.size()) + ")");
    }
    std::vector<Prediction> predictions;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
        predictions.push_back(predict_on(embeddings_[i], prompts[i], options));
    }
    return predictions;
}

void Predictor::reset() noexcept {
    embeddings_.clear();
    is_batch_ = false;
}

Prediction Predictor::predict_on(const ImageEmbedding& embedding, const Prompts& prompts,
                                 const PredictOptions& options) const {
    if (options.foreground == 0) {
        throw InvalidInputError("foreground", "0", "1 to 255");
    }
    DecodedMasks decoded = model_.decode(embedding, prompts, options.multimask_output,
                                         options.cancellation);
    if (options.best_mask_only) {
        keep_best(decoded);
    }
    const Manifest& about = model_.manifest();
    const Shape& low_res = decoded.low_res_masks.shape();
    const std::shared_ptr<const Resampling> resampling = model_.data().resampling.find(
        embedding.data().geometry, about.image, about.masks, {low_res[2], low_res[3]});
    const Cleaning cleaning{mask_threshold_, max_hole_area_, max_sprinkle_area_};
    Prediction prediction;
    if (options.return_logits) {
        prediction.logits = without_single_object(
            finish_logits(decoded.low_res_masks, *resampling, cleaning, options.cancellation));
    } else {
        prediction.masks = without_single_object(
            finish_masks(decoded.low_res_masks, *resampling, cleaning, options.foreground,
                         options.cancellation));
    }
    if (about.masks.low_res_limit) {
        const float limit = *about.masks.low_res_limit;
        float* logits = decoded.low_res_masks.data();
        std::transform(logits, logits + decoded.low_res_masks.size(), logits,
                       [limit](float logit) { return std::clamp(logit, -limit, limit); });
    }
    prediction.low_res_masks = without_single_object(std::move(decoded.low_res_masks));
    prediction.iou_predictions = without_single_object(std::move(decoded.iou_predictions));
    prediction.object_score_logits = std::move(decoded.object_score_logits);
    prediction.warning = std::move(decoded.warning);
    return prediction;
}

}  // namespace sam3rt
