/* Uses the library as a C program does: every function, good arguments and bad ones.
 *
 *   c_interface BUNDLE IMAGE.rgb HEIGHT WIDTH FOLDER
 *
 * IMAGE.rgb holds HEIGHT * WIDTH * 3 bytes. Writes what it predicted to FOLDER, as plain arrays
 * that the tests compare with the Python runtime's results.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sam3rt.h"

static int failures = 0;

static void expect(int holds, const char* what) {
    if (!holds) {
        printf("failed: %s\n", what);
        ++failures;
    }
}

/* Checks a call that must succeed. */
static void succeed(sam3rt_status status, sam3rt_error** error, const char* what) {
    if (status != SAM3RT_OK) {
        printf("failed: %s: %d %s\n", what, (int)status, sam3rt_error_message(*error));
        ++failures;
    }
    sam3rt_error_free(*error);
    *error = NULL;
}

/* Checks a call that must be refused, for the right reason. */
static void refuse(sam3rt_status status, sam3rt_error** error, sam3rt_status wanted,
                   const char* subject, const char* what) {
    if (status != wanted || *error == NULL || sam3rt_error_status(*error) != wanted ||
        strlen(sam3rt_error_message(*error)) == 0 ||
        strcmp(sam3rt_error_subject(*error), subject) != 0) {
        printf("failed: %s: status %d, subject '%s', message '%s'\n", what, (int)status,
               sam3rt_error_subject(*error), sam3rt_error_message(*error));
        ++failures;
    }
    sam3rt_error_free(*error);
    *error = NULL;
}

static unsigned char* read_bytes(const char* path, size_t bytes) {
    unsigned char* content = malloc(bytes);
    FILE* file = fopen(path, "rb");
    if (content == NULL || file == NULL || fread(content, 1, bytes, file) != bytes) {
        printf("cannot read %s\n", path);
        exit(2);
    }
    fclose(file);
    return content;
}

static void write_file(const char* folder, const char* name, const void* values, size_t bytes) {
    char path[4096];
    FILE* file;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    file = fopen(path, "wb");
    expect(file != NULL && fwrite(values, 1, bytes, file) == bytes && fclose(file) == 0, path);
}

static size_t float_bytes(sam3rt_float_array array) {
    size_t count = sizeof(float);
    for (int32_t axis = 0; axis < array.axes; ++axis) {
        count *= (size_t)array.shape[axis];
    }
    return count;
}

static void write_prediction(const char* folder, const char* name,
                             const sam3rt_prediction* prediction) {
    const sam3rt_mask_array masks = sam3rt_prediction_masks(prediction);
    const sam3rt_float_array iou = sam3rt_prediction_iou(prediction);
    const sam3rt_float_array low_res = sam3rt_prediction_low_res(prediction);
    char file[64];
    expect(masks.axes == 3 && iou.axes == 1 && low_res.axes == 3, "axes of a prediction");
    expect(sam3rt_prediction_logits(prediction).axes == 0, "no logits unless asked for");
    snprintf(file, sizeof file, "%s.masks", name);
    write_file(folder, file, masks.values,
               (size_t)(masks.shape[0] * masks.shape[1] * masks.shape[2]));
    snprintf(file, sizeof file, "%s.iou", name);
    write_file(folder, file, iou.values, float_bytes(iou));
    snprintf(file, sizeof file, "%s.low_res", name);
    write_file(folder, file, low_res.values, float_bytes(low_res));
}

static sam3rt_prompts click(const float* coords, const int64_t* labels, int64_t count) {
    sam3rt_prompts prompts;
    memset(&prompts, 0, sizeof prompts);
    prompts.struct_size = sizeof prompts;
    prompts.point_coords.values = coords;
    prompts.point_coords.shape[0] = count;
    prompts.point_coords.shape[1] = 2;
    prompts.point_coords.axes = 2;
    prompts.point_labels.values = labels;
    prompts.point_labels.shape[0] = count;
    prompts.point_labels.axes = 1;
    return prompts;
}

/* Functions take NULL where an object should be, and free functions always. */
static void check_null(void) {
    sam3rt_error* error = NULL;
    sam3rt_model* model = NULL;
    refuse(sam3rt_model_load(NULL, NULL, &model, &error), &error, SAM3RT_INVALID_INPUT, "bundle",
           "load NULL");
    refuse(sam3rt_model_load(".", NULL, NULL, &error), &error, SAM3RT_INVALID_INPUT, "model",
           "load into NULL");
    refuse(sam3rt_model_warm_up(NULL, &error), &error, SAM3RT_INVALID_INPUT, "model",
           "warm up NULL");
    refuse(sam3rt_predictor_predict(NULL, NULL, NULL, NULL, &error), &error, SAM3RT_INVALID_INPUT,
           "prediction", "predict into NULL");
    expect(sam3rt_model_load("nowhere", NULL, &model, NULL) == SAM3RT_BUNDLE_ERROR,
           "errors may be ignored");
    expect(model == NULL, "nothing is stored where a call fails");
    sam3rt_model_free(NULL);
    sam3rt_embedding_free(NULL);
    sam3rt_predictor_free(NULL);
    sam3rt_prediction_free(NULL);
    sam3rt_error_free(NULL);
    expect(sam3rt_error_status(NULL) == SAM3RT_OK, "no error is fine");
    expect(strlen(sam3rt_error_message(NULL)) == 0, "no message");
    expect(strlen(sam3rt_model_device(NULL)) == 0, "no device");
    expect(sam3rt_prediction_masks(NULL).axes == 0, "no masks");
}

static void check_options(const char* bundle) {
    sam3rt_error* error = NULL;
    sam3rt_model* model = NULL;
    sam3rt_model_options options;
    memset(&options, 0, sizeof options);
    refuse(sam3rt_model_load(bundle, &options, &model, &error), &error, SAM3RT_INVALID_INPUT,
           "options", "a struct_size of 0");
    options.struct_size = sizeof options;
    options.device = "gpu";
    refuse(sam3rt_model_load(bundle, &options, &model, &error), &error, SAM3RT_INVALID_INPUT,
           "device", "an unknown device");
    options.device = "cpu";
    options.threads = -1;
    refuse(sam3rt_model_load(bundle, &options, &model, &error), &error, SAM3RT_INVALID_INPUT,
           "threads", "negative threads");
    options.threads = 0;
    options.expected_fingerprint = "0";
    refuse(sam3rt_model_load(bundle, &options, &model, &error), &error, SAM3RT_BUNDLE_ERROR, "",
           "another fingerprint");
    options.expected_fingerprint = NULL;
    /* An older caller knows less of the structure: what it does not know is not read. */
    options.struct_size = offsetof(sam3rt_model_options, map_weights);
    succeed(sam3rt_model_load(bundle, &options, &model, &error), &error, "an older structure");
    sam3rt_model_free(model);
    options.struct_size = offsetof(sam3rt_model_options, expected_fingerprint);
    refuse(sam3rt_model_load(bundle, &options, &model, &error), &error, SAM3RT_INVALID_INPUT,
           "options", "a structure that no version had");
    refuse(sam3rt_set_ort_environment(&options, &error), &error, SAM3RT_STATE_ERROR, "",
           "an environment after a model");
    refuse(sam3rt_set_ort_environment(NULL, &error), &error, SAM3RT_INVALID_INPUT, "environment",
           "no environment");
    refuse(sam3rt_model_load("nowhere", NULL, &model, &error), &error, SAM3RT_BUNDLE_ERROR, "",
           "a missing bundle");
    refuse(sam3rt_model_load_from_memory(NULL, 0, NULL, &model, &error), &error,
           SAM3RT_BUNDLE_ERROR, "bundle.json", "no files");
    refuse(sam3rt_model_load_from_memory(NULL, 1, NULL, &model, &error), &error,
           SAM3RT_INVALID_INPUT, "files", "files at NULL");
    refuse(sam3rt_set_shared_threads(0, &error), &error, SAM3RT_INVALID_INPUT, "threads",
           "a pool without threads");
    refuse(sam3rt_set_shared_threads(2, &error), &error, SAM3RT_STATE_ERROR, "",
           "a pool that is in use");
}

static void check_bad_input(const sam3rt_model* model, sam3rt_predictor* predictor,
                            const sam3rt_image* image) {
    sam3rt_error* error = NULL;
    sam3rt_embedding* embedding = NULL;
    sam3rt_prediction* prediction = NULL;
    sam3rt_predictor* other = NULL;
    sam3rt_predictor_options options;
    sam3rt_image bad = *image;
    const sam3rt_image* images[2];
    const float coords[2] = {4, 4};
    const int64_t labels[1] = {1};
    sam3rt_prompts prompts = click(coords, labels, 1);
    const sam3rt_prompts* batch[1];
    bad.pixels = NULL;
    refuse(sam3rt_model_encode(model, &bad, &embedding, &error), &error, SAM3RT_IMAGE_ERROR,
           "image", "no pixels");
    images[0] = image;
    images[1] = &bad;
    refuse(sam3rt_predictor_set_image_batch(predictor, images, 2, &error), &error,
           SAM3RT_IMAGE_ERROR, "images[1]", "a batch with a bad image");
    refuse(sam3rt_predictor_set_image_batch(predictor, NULL, 0, &error), &error, SAM3RT_IMAGE_ERROR,
           "images", "an empty batch");
    refuse(sam3rt_model_encode(model, NULL, &embedding, &error), &error, SAM3RT_INVALID_INPUT,
           "image", "no image");
    refuse(sam3rt_predictor_predict(predictor, NULL, NULL, &prediction, &error), &error,
           SAM3RT_STATE_ERROR, "", "predict before an image");
    batch[0] = &prompts;
    refuse(sam3rt_predictor_predict_batch(predictor, batch, 1, NULL, &prediction, &error), &error,
           SAM3RT_STATE_ERROR, "", "predict_batch before a batch");
    succeed(sam3rt_predictor_set_image(predictor, image, &error), &error, "set_image");
    prompts.point_labels.axes = 0;
    refuse(sam3rt_predictor_predict(predictor, &prompts, NULL, &prediction, &error), &error,
           SAM3RT_PROMPT_ERROR, "point_labels", "no labels");
    prompts.point_labels.axes = 9;
    refuse(sam3rt_predictor_predict(predictor, &prompts, NULL, &prediction, &error), &error,
           SAM3RT_PROMPT_ERROR, "point_labels", "nine axes");
    prompts.point_labels.axes = 1;
    prompts.point_labels.shape[0] = -1;
    refuse(sam3rt_predictor_predict(predictor, &prompts, NULL, &prediction, &error), &error,
           SAM3RT_PROMPT_ERROR, "point_labels", "a negative size");
    prompts.point_labels.shape[0] = INT64_MAX;
    refuse(sam3rt_predictor_predict(predictor, &prompts, NULL, &prediction, &error), &error,
           SAM3RT_PROMPT_ERROR, "point_labels", "a size beyond memory");
    prompts.point_labels.shape[0] = 1;
    prompts.point_coords.values = NULL;
    refuse(sam3rt_predictor_predict(predictor, &prompts, NULL, &prediction, &error), &error,
           SAM3RT_PROMPT_ERROR, "point_coords", "coordinates at NULL");
    expect(embedding == NULL && prediction == NULL, "nothing is stored where a call fails");
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.max_sprinkle_area = strtod("nan", NULL);
    refuse(sam3rt_predictor_new(model, &options, &other, &error), &error, SAM3RT_INVALID_INPUT,
           "max_sprinkle_area", "not a number");
    refuse(sam3rt_embedding_load(model, "nowhere", &embedding, &error), &error,
           SAM3RT_EMBEDDING_ERROR, "", "a missing embedding");
}

static void check_batch(sam3rt_predictor* predictor, const sam3rt_image* image,
                        const sam3rt_prompts* prompts, const char* folder) {
    sam3rt_error* error = NULL;
    sam3rt_prediction* predictions[2] = {NULL, NULL};
    const sam3rt_image* images[2];
    const sam3rt_prompts* both[2];
    sam3rt_cancellation* cancellation = NULL;
    images[0] = image;
    images[1] = image;
    succeed(sam3rt_cancellation_new(0, &cancellation, &error), &error, "a cancellation");
    sam3rt_cancellation_cancel(cancellation);
    refuse(sam3rt_predictor_set_image_batch_cancellable(predictor, images, 2, cancellation, &error),
           &error, SAM3RT_CANCELLED, "", "a batch that is cancelled");
    sam3rt_cancellation_free(cancellation);
    both[0] = prompts;
    both[1] = NULL;
    succeed(sam3rt_predictor_set_image_batch(predictor, images, 2, &error), &error, "a batch");
    refuse(sam3rt_predictor_predict_batch(predictor, both, 1, NULL, predictions, &error), &error,
           SAM3RT_PROMPT_ERROR, "prompts", "too few prompts");
    succeed(sam3rt_predictor_predict_batch(predictor, both, 2, NULL, predictions, &error), &error,
            "predict_batch");
    write_prediction(folder, "batch0", predictions[0]);
    write_prediction(folder, "batch1", predictions[1]);
    sam3rt_prediction_free(predictions[0]);
    sam3rt_prediction_free(predictions[1]);
    sam3rt_predictor_reset(predictor);
    refuse(sam3rt_predictor_predict_batch(predictor, both, 2, NULL, predictions, &error), &error,
           SAM3RT_STATE_ERROR, "", "a batch that was forgotten");
}

/* Embeddings in place of images, one of them twice. */
static void check_embedding_batch(const sam3rt_model* model, const sam3rt_embedding* embedding,
                                  const sam3rt_prompts* prompts) {
    sam3rt_error* error = NULL;
    sam3rt_predictor* predictor = NULL;
    sam3rt_prediction* predictions[2] = {NULL, NULL};
    const sam3rt_embedding* embeddings[2];
    const sam3rt_prompts* both[2];
    embeddings[0] = embedding;
    embeddings[1] = NULL;
    both[0] = prompts;
    both[1] = prompts;
    expect(sam3rt_model_joins_images(model) == 0, "ONNX Runtime goes image by image");
    expect(sam3rt_model_joins_images(NULL) == 0, "NULL joins nothing");
    succeed(sam3rt_predictor_new(model, NULL, &predictor, &error), &error, "a predictor");
    refuse(sam3rt_predictor_set_embedding_batch(predictor, embeddings, 2, &error), &error,
           SAM3RT_INVALID_INPUT, "embeddings[1]", "no embedding");
    refuse(sam3rt_predictor_set_embedding_batch(predictor, NULL, 1, &error), &error,
           SAM3RT_INVALID_INPUT, "embeddings", "no embeddings");
    refuse(sam3rt_predictor_set_embedding_batch(NULL, embeddings, 1, &error), &error,
           SAM3RT_INVALID_INPUT, "predictor", "embeddings for NULL");
    refuse(sam3rt_predictor_set_embedding_batch(predictor, NULL, 0, &error), &error,
           SAM3RT_INVALID_INPUT, "embeddings", "an empty batch of embeddings");
    refuse(sam3rt_predictor_predict_batch(predictor, NULL, 0, NULL, predictions, &error), &error,
           SAM3RT_STATE_ERROR, "", "predict_batch of nothing");
    embeddings[1] = embedding;
    succeed(sam3rt_predictor_set_embedding_batch(predictor, embeddings, 2, &error), &error,
            "a batch of embeddings");
    succeed(sam3rt_predictor_predict_batch(predictor, both, 2, NULL, predictions, &error), &error,
            "predict_batch of embeddings");
    for (size_t index = 0; index < 2; ++index) {
        const sam3rt_mask_array masks = sam3rt_prediction_masks(predictions[index]);
        expect(masks.axes == 3 && masks.shape[0] == 3, "masks of an embedding in a batch");
    }
    sam3rt_prediction_free(predictions[0]);
    sam3rt_prediction_free(predictions[1]);
    sam3rt_predictor_free(predictor);
}

static void check_refinement(const sam3rt_predictor* predictor, const sam3rt_prompts* prompts,
                             const char* folder) {
    sam3rt_error* error = NULL;
    sam3rt_prediction* first = NULL;
    sam3rt_prediction* second = NULL;
    sam3rt_predict_options options;
    sam3rt_prompts refined = *prompts;
    succeed(sam3rt_predictor_predict(predictor, prompts, NULL, &first, &error), &error, "predict");
    write_prediction(folder, "click", first);
    refined.mask_input = sam3rt_prediction_low_res(first);
    refined.mask_input.shape[0] = 1;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.single_mask = 1;
    succeed(sam3rt_predictor_predict(predictor, &refined, &options, &second, &error), &error,
            "refine");
    write_prediction(folder, "refined", second);
    sam3rt_prediction_free(second);
    options.return_logits = 1;
    succeed(sam3rt_predictor_predict(predictor, &refined, &options, &second, &error), &error,
            "logits");
    expect(sam3rt_prediction_masks(second).axes == 0, "no masks where logits are asked for");
    write_file(folder, "logits", sam3rt_prediction_logits(second).values,
               float_bytes(sam3rt_prediction_logits(second)));
    sam3rt_prediction_free(second);
    sam3rt_prediction_free(first);
}

/* An embedding's sizes and feature maps. */
static void check_embedding(const sam3rt_model* model, const sam3rt_embedding* embedding) {
    sam3rt_error* error = NULL;
    sam3rt_maps* maps = NULL;
    size_t bytes = 0;
    int64_t height = 0;
    int64_t width = 0;
    sam3rt_embedding_input_size(embedding, &height, &width);
    expect(height >= 1 && width >= 1, "the part of the input that the image fills");
    expect(strcmp(sam3rt_embedding_fingerprint(embedding), sam3rt_model_fingerprint(model)) == 0,
           "fingerprint of an embedding");
    succeed(sam3rt_embedding_maps(embedding, &maps, &error), &error, "maps");
    expect(sam3rt_maps_count(maps) > 0, "feature maps");
    for (size_t index = 0; index < sam3rt_maps_count(maps); ++index) {
        const sam3rt_float_array values = sam3rt_maps_values(maps, index);
        expect(values.axes == 4 && values.shape[0] == 1, "axes of a feature map");
        expect(strlen(sam3rt_maps_name(maps, index)) > 0, "name of a feature map");
        bytes += float_bytes(values);
    }
    expect(bytes == sam3rt_embedding_nbytes(embedding), "memory of the feature maps");
    expect(sam3rt_maps_values(maps, 99).axes == 0, "no map beyond the last");
    expect(strlen(sam3rt_maps_name(maps, 99)) == 0, "and no name");
    sam3rt_maps_free(maps);
    refuse(sam3rt_embedding_maps(NULL, &maps, &error), &error, SAM3RT_INVALID_INPUT, "embedding",
           "maps of NULL");
    expect(sam3rt_maps_count(NULL) == 0 && sam3rt_embedding_nbytes(NULL) == 0, "nothing of NULL");
    sam3rt_maps_free(NULL);
}

/* The bytes of an embedding are those of its file, and give it again. */
static void check_bytes(const sam3rt_model* model, const sam3rt_embedding* embedding,
                        const char* path) {
    sam3rt_error* error = NULL;
    sam3rt_buffer* bytes = NULL;
    sam3rt_embedding* again = NULL;
    size_t size;
    unsigned char* saved;
    succeed(sam3rt_embedding_to_bytes(embedding, &bytes, &error), &error, "bytes");
    size = sam3rt_buffer_size(bytes);
    saved = read_bytes(path, size);
    expect(memcmp(saved, sam3rt_buffer_data(bytes), size) == 0, "bytes of the file");
    sam3rt_buffer_free(bytes);
    refuse(sam3rt_embedding_from_bytes(model, saved, size - 1, &again, &error), &error,
           SAM3RT_EMBEDDING_ERROR, "", "bytes that are cut");
    refuse(sam3rt_embedding_from_bytes(model, NULL, size, &again, &error), &error,
           SAM3RT_INVALID_INPUT, "content", "bytes at NULL");
    succeed(sam3rt_embedding_from_bytes(model, saved, size, &again, &error), &error, "from bytes");
    free(saved);
    expect(sam3rt_embedding_nbytes(again) == sam3rt_embedding_nbytes(embedding), "the same maps");
    sam3rt_embedding_free(again);
    expect(sam3rt_buffer_size(NULL) == 0 && sam3rt_buffer_data(NULL) == NULL, "no bytes of NULL");
}

/* The bundle's own record passes, and says what was compared. */
static void check_accuracy(const sam3rt_model* model) {
    sam3rt_error* error = NULL;
    sam3rt_report* report = NULL;
    sam3rt_health* health = NULL;
    sam3rt_cancellation* cancellation = NULL;
    size_t index;
    succeed(sam3rt_model_verify(model, NULL, &report, &error), &error, "verify");
    expect(sam3rt_report_passed(report) == 1, sam3rt_report_explanation(report));
    expect(sam3rt_report_count(report) > 10, "comparisons");
    for (index = 0; index < sam3rt_report_count(report); ++index) {
        const double value = sam3rt_report_value(report, index);
        const double limit = sam3rt_report_limit(report, index);
        expect(sam3rt_report_is_within(report, index) == 1, "a comparison");
        expect(sam3rt_report_at_least(report, index) ? value >= limit : value <= limit, "a figure");
        expect(strlen(sam3rt_report_case(report, index)) > 0 &&
                   strlen(sam3rt_report_output(report, index)) > 0 &&
                   strlen(sam3rt_report_metric(report, index)) > 0,
               "what was compared");
    }
    expect(strlen(sam3rt_report_case(report, index)) == 0, "no comparison beyond the last");
    expect(sam3rt_report_is_within(report, index) == 0, "and none that passes");
    sam3rt_report_free(report);

    succeed(sam3rt_model_health(model, NULL, &health, &error), &error, "health");
    expect(sam3rt_health_is_healthy(health) == 1, sam3rt_health_problem(health));
    expect(strcmp(sam3rt_health_backend(health), "onnxruntime") == 0, "backend");
    expect(strcmp(sam3rt_health_device(health), "cpu") == 0, "device of a health check");
    expect(strcmp(sam3rt_health_precision(health), "fp32") == 0, "precision");
    expect(strcmp(sam3rt_health_fingerprint(health), sam3rt_model_fingerprint(model)) == 0,
           "fingerprint of a health check");
    expect(sam3rt_health_encode_seconds(health) > 0 && sam3rt_health_decode_seconds(health) > 0,
           "times");
    sam3rt_health_free(health);

    report = NULL;
    succeed(sam3rt_cancellation_new(0, &cancellation, &error), &error, "a cancellation");
    sam3rt_cancellation_cancel(cancellation);
    refuse(sam3rt_model_verify(model, cancellation, &report, &error), &error, SAM3RT_CANCELLED, "",
           "verify that is cancelled");
    sam3rt_cancellation_free(cancellation);
    refuse(sam3rt_model_verify(model, NULL, NULL, &error), &error, SAM3RT_INVALID_INPUT, "report",
           "verify into NULL");
    refuse(sam3rt_model_health(NULL, NULL, &health, &error), &error, SAM3RT_INVALID_INPUT, "model",
           "health of NULL");
    expect(report == NULL, "nothing is stored where a call fails");
    expect(sam3rt_report_passed(NULL) == 0, "NULL does not pass");
    expect(sam3rt_health_is_healthy(NULL) == 0, "NULL is not well");
    sam3rt_report_free(NULL);
    sam3rt_health_free(NULL);
}

int main(int count, char** arguments) {
    sam3rt_error* error = NULL;
    sam3rt_model* model = NULL;
    sam3rt_embedding* embedding = NULL;
    sam3rt_embedding* loaded = NULL;
    sam3rt_predictor* predictor = NULL;
    sam3rt_image image;
    const float coords[4] = {20, 15, 3, 4};
    const int64_t labels[2] = {1, 0};
    const sam3rt_prompts prompts = click(coords, labels, 2);
    char path[4096];
    int64_t height = 0;
    int64_t width = 0;
    if (count != 6) {
        printf("usage: c_interface BUNDLE IMAGE.rgb HEIGHT WIDTH FOLDER\n");
        return 2;
    }
    memset(&image, 0, sizeof image);
    image.struct_size = sizeof image;
    image.height = atol(arguments[3]);
    image.width = atol(arguments[4]);
    image.pixels = read_bytes(arguments[2], (size_t)(image.height * image.width * 3));

    expect(sam3rt_abi_version() == SAM3RT_ABI_VERSION, "version of the interface");
    expect(strlen(sam3rt_version()) >= 5, "version of the library");
    check_null();
    check_options(arguments[1]);

    succeed(sam3rt_model_load(arguments[1], NULL, &model, &error), &error, "load");
    expect(strcmp(sam3rt_model_device(model), "cpu") == 0, "device");
    expect(strlen(sam3rt_model_fingerprint(model)) == 64, "fingerprint");
    expect(strlen(sam3rt_model_name(model)) > 0, "name");
    sam3rt_model_mask_size(model, &height, &width);
    expect(height == width && height >= 16, "size of mask prompts");
    expect(sam3rt_model_encoder_loaded(model) == 0, "graphs are loaded at first use");

    succeed(sam3rt_predictor_new(model, NULL, &predictor, &error), &error, "a predictor");
    check_bad_input(model, predictor, &image);
    sam3rt_predictor_reset(predictor);

    succeed(sam3rt_model_encode(model, &image, &embedding, &error), &error, "encode");
    expect(sam3rt_model_encoder_loaded(model) == 1, "the encoder was used");
    sam3rt_embedding_image_size(embedding, &height, &width);
    expect(height == image.height && width == image.width, "size of the image");
    check_embedding(model, embedding);
    succeed(sam3rt_model_prepare(model, &error), &error, "prepare");
    check_embedding_batch(model, embedding, &prompts);
    check_accuracy(model);
    snprintf(path, sizeof path, "%s/image.embedding", arguments[5]);
    succeed(sam3rt_embedding_save(embedding, path, &error), &error, "save");
    check_bytes(model, embedding, path);
    refuse(sam3rt_embedding_save(embedding, "/nowhere/image.embedding", &error), &error,
           SAM3RT_IO_ERROR, "", "save to nowhere");
    succeed(sam3rt_embedding_load(model, path, &loaded, &error), &error, "load an embedding");
    succeed(sam3rt_predictor_set_embedding(predictor, loaded, &error), &error, "set_embedding");
    sam3rt_embedding_free(loaded);
    sam3rt_embedding_free(embedding);

    /* The predictor keeps what it needs of both. */
    sam3rt_model_free(model);
    check_refinement(predictor, &prompts, arguments[5]);
    check_batch(predictor, &image, &prompts, arguments[5]);
    sam3rt_predictor_free(predictor);
    free((void*)image.pixels);
    printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
