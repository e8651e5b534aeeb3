#include "model.hpp"

#include <array>

#include "accuracy.hpp"
#include "cancellation.hpp"
#include "embedding.hpp"
#include "errors.hpp"
#include "geometry.hpp"

#ifndef SAM3RT_VERSION
#error "SAM3RT_VERSION must be defined by the build"
#endif

namespace sam3rt {
namespace {

Model open(Bundle bundle, const ModelOptions& options) {
    const std::string& fingerprint = bundle.manifest.fingerprint;
    if (options.expected_fingerprint && *options.expected_fingerprint != fingerprint) {
        throw BundleError(bundle.manifest.name + " has fingerprint " + fingerprint +
                          ", expected " + *options.expected_fingerprint);
    }
    return Model(std::make_shared<const Model::Data>(std::move(bundle), options));
}

std::vector<std::string> names_of(const std::vector<TensorSpec>& specs) {
    std::vector<std::string> names;
    names.reserve(specs.size());
    for (const TensorSpec& spec : specs) {
        names.push_back(spec.name);
    }
    return names;
}

/// The elements of an array without its first axis, which must be 1; `rank` axes must remain.
Array<float> without_batch(Array<float>& array, std::size_t rank) {
    Shape shape = array.shape();
    if (shape.size() != rank + 1 || shape[0] != 1) {
        throw BackendError("the decoder returned a tensor of " + std::to_string(shape.size()) +
                           " axes, expected " + std::to_string(rank + 1));
    }
    shape.erase(shape.begin());
    return std::move(array).reshaped(std::move(shape));
}

/// A mask of NaN would be an empty one.
void require_finite(const Array<float>& values) {
    if (!is_finite(values)) {
        throw BackendError(
            "the decoder returned values that are not finite: the embedding or a mask prompt is "
            "broken, or the model's values leave the range of what it computes in");
    }
}

/// Throws ImageError where it is no image, or where the backend cannot read it.
void check_readable(const Backend& backend, const ImageView& image, const std::string& argument) {
    check_image(image, argument);
    if (image.on_device) {
        if (const std::optional<Refusal> refusal = backend.refuses(image.pixels)) {
            throw ImageError(argument, "an image in " + refusal->got, refusal->expected);
        }
    }
}

/// Throws PromptError where a prompt is malformed, EmbeddingError where another bundle made the
/// embedding.
PackedPrompts pack_for(const Manifest& about, const ImageEmbedding& embedding,
                       const Prompts& prompts) {
    PackedPrompts packed = pack(prompts, about.prompts, embedding.data().geometry);
    if (embedding.fingerprint() != about.fingerprint) {
        throw EmbeddingError("the embedding was made by the bundle " +
                             embedding.fingerprint().substr(0, 16) + "..., this model is " +
                             about.fingerprint.substr(0, 16) + "...; encode the image again");
    }
    return packed;
}

/// What the decoder says of no objects, for which it is not run.
DecodedMasks of_no_objects(const Manifest& about, bool multimask_output, std::string warning) {
    const std::int64_t count = multimask_output ? about.masks.multimask : 1;
    const Size& size = about.masks.low_res_size;
    return {Array<float>({0, count, size.height, size.width}), Array<float>({0, count}),
            std::nullopt, std::move(warning)};
}

/// The decoder's outputs for so many objects, once they can be answers at all.
DecodedMasks decoded_of(const Manifest& about, std::vector<Array<float>>& results,
                        std::int64_t objects, std::string warning) {
    DecodedMasks decoded{
        without_batch(results[0], 4), without_batch(results[1], 2), {}, std::move(warning)};
    const Shape& shape = decoded.low_res_masks.shape();
    if (decoded.iou_predictions.shape() != Shape{shape[0], shape[1]} || shape[0] != objects ||
        decoded.low_res_masks.size() == 0) {
        throw BackendError("the decoder returned masks and scores that do not fit each other");
    }
    require_finite(decoded.low_res_masks);
    require_finite(decoded.iou_predictions);
    if (has_object_score(about)) {
        require_finite(results[2]);
        const auto count = static_cast<std::int64_t>(results[2].size());
        decoded.object_score_logits = without_batch(results[2], 2).reshaped({count});
    }
    return decoded;
}

ImageEmbedding embedding_of(const Manifest& about, std::shared_ptr<const Features> features,
                            const ImageGeometry& geometry) {
    return ImageEmbedding(std::make_shared<const ImageEmbedding::Data>(ImageEmbedding::Data{
        std::move(features), geometry, about.fingerprint, names_of(about.encoder.outputs)}));
}

/// Throws EmbeddingError, calling what was stored `subject`, where it does not fit the model.
ImageEmbedding upload(const Model::Data& data, const std::string& subject,
                      const StoredEmbedding& stored) {
    const Manifest& about = data.bundle.manifest;
    if (!(stored.geometry == geometry_of(about.image, stored.geometry.original_size))) {
        throw EmbeddingError(subject + ": its image geometry contradicts this model's");
    }
    return embedding_of(about, data.backend->upload(stored.maps), stored.geometry);
}

/// Encode images, each with the name that errors call it by.
std::vector<ImageEmbedding> encode_all(const Model::Data& data,
                                       const std::vector<ImageView>& images,
                                       const std::vector<std::string>& names,
                                       const Cancellation* cancellation) {
    const Manifest& about = data.bundle.manifest;
    std::vector<ImageGeometry> geometries;
    // All are checked before the first is encoded: encoding is the expensive part.
    for (std::size_t i = 0; i < images.size(); ++i) {
        check_readable(*data.backend, images[i], names[i]);
        geometries.push_back(geometry_of(about.image, {images[i].height, images[i].width}));
    }
    check_cancelled(cancellation);
    const auto features = data.backend->encode(images, geometries, cancellation);
    std::vector<ImageEmbedding> embeddings;
    for (std::size_t i = 0; i < images.size(); ++i) {
        embeddings.push_back(embedding_of(about, features.at(i), geometries[i]));
    }
    return embeddings;
}

}  // namespace

std::string version() { return SAM3RT_VERSION; }

Model Model::load(const std::filesystem::path& bundle, const ModelOptions& options) {
    return open(open_bundle(bundle, options.check_files), options);
}

Model Model::load_from_memory(const std::vector<BundleFile>& files, const ModelOptions& options) {
    if (options.map_weights) {
        throw InvalidInputError("map_weights", "true", "false for a bundle in memory");
    }
    return open(open_bundle(files, options.check_files), options);
}

ImageEmbedding Model::encode(const ImageView& image, const Cancellation* cancellation) const {
    return std::move(encode_all(*data_, {image}, {"image"}, cancellation).front());
}

std::vector<ImageEmbedding> Model::encode_batch(const std::vector<ImageView>& images,
                                                const Cancellation* cancellation) const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < images.size(); ++i) {
        names.push_back("images[" + std::to_string(i) + "]");
    }
    return encode_all(*data_, images, names, cancellation);
}

DecodedMasks Model::decode(const ImageEmbedding& embedding, const Prompts& prompts,
                           bool multimask_output, const Cancellation* cancellation) const {
    return std::move(
        decode_all(*this, {{embedding, prompts, nullptr}}, multimask_output, cancellation).front());
}

std::vector<DecodedMasks> decode_all(const Model& model, const std::vector<Question>& questions,
                                     bool multimask_output, const Cancellation* cancellation) {
    const Manifest& about = model.manifest();
    std::vector<PackedPrompts> packed;
    packed.reserve(questions.size());
    std::vector<DecoderCall> calls;
    for (const Question& question : questions) {
        try {
            packed.push_back(pack_for(about, question.embedding, question.prompts));
        } catch (PromptError& error) {
            if (questions.size() > 1) {
                error.rename("prompts[" + std::to_string(packed.size()) + "]." + error.argument());
            }
            throw;
        }
        if (packed.back().points.shape()[0] != 0) {
            calls.push_back(
                {*question.embedding.data().features, packed.back(), question.masks});
        }
    }
    check_cancelled(cancellation);
    std::vector<std::vector<Array<float>>> results;
    if (!calls.empty()) {
        results = model.data().backend->decode(calls, decoder_outputs(about, multimask_output),
                                               cancellation);
    }
    std::vector<DecodedMasks> decoded;
    auto next = results.begin();
    for (PackedPrompts& own : packed) {
        const std::int64_t objects = own.points.shape()[0];
        decoded.push_back(objects == 0
                              ? of_no_objects(about, multimask_output, std::move(own.warning))
                              : decoded_of(about, *next++, objects, std::move(own.warning)));
    }
    return decoded;
}

ImageEmbedding Model::load_embedding(const std::filesystem::path& path) const {
    const Manifest& about = manifest();
    return upload(*data_, path.string(),
                  read_embedding(path, about.fingerprint, about.encoder.outputs));
}

ImageEmbedding Model::embedding_from_bytes(const void* content, std::size_t size) const {
    if (content == nullptr && size != 0) {
        throw InvalidInputError("content", "NULL", "the bytes of an embedding");
    }
    const Manifest& about = manifest();
    return upload(*data_, "content",
                  parse_embedding(static_cast<const std::uint8_t*>(content), size, "content",
                                  about.fingerprint, about.encoder.outputs));
}

void Model::prepare() const { data_->backend->prepare(); }

void Model::warm_up() const {
    prepare();
    constexpr std::int64_t side = 8;
    const std::array<std::uint8_t, 3 * side * side> black{};
    Prompts click;
    click.point_coords = Array<float>::rows({{4, 4}});
    click.point_labels = Array<std::int64_t>::list({1});
    decode(encode({black.data(), side, side}), click);
}

VerifyReport Model::verify(const Cancellation* cancellation) const {
    const ParityRecord record = load_record(data_->bundle);
    const Backend& backend = *data_->backend;
    return judge(run_record(runner_of(backend, cancellation), manifest(), record,
                            limits_for(manifest(), backend.precision())));
}

Health Model::health(const Cancellation* cancellation) const {
    const Backend& backend = *data_->backend;
    Health health = check_health(runner_of(backend, cancellation), data_->bundle,
                                 limits_for(manifest(), backend.precision()));
    health.backend = backend.name();
    health.device = device();
    health.precision = backend.precision();
    return health;
}

bool Model::joins_images() const { return data_->backend->joins_images(); }
bool Model::encoder_loaded() const { return data_->backend->encoder_loaded(); }
const Manifest& Model::manifest() const noexcept { return data_->bundle.manifest; }
const std::string& Model::manifest_json() const noexcept { return data_->bundle.text; }
const std::filesystem::path& Model::path() const noexcept { return data_->bundle.path; }
std::string Model::device() const { return data_->backend->device().name(); }

}  // namespace sam3rt
