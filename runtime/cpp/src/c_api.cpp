#include "sam3rt.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <new>
#include <system_error>

#include "errors.hpp"
#include "sam3rt/sam3rt.hpp"

struct sam3rt_error {
    sam3rt_status status;
    std::string message;
    std::string subject;
};
struct sam3rt_model {
    sam3rt::Model value;
    std::string device = value.device();
};
struct sam3rt_embedding {
    sam3rt::ImageEmbedding value;
};
struct sam3rt_predictor {
    sam3rt::Predictor value;
};
struct sam3rt_prediction {
    sam3rt::Prediction value;
    /// The caller's memory, with the masks or logits in it, or null.
    const void* masks = nullptr;
    const void* logits = nullptr;
};
struct sam3rt_cancellation {
    sam3rt::Cancellation value;
};
struct sam3rt_buffer {
    std::vector<std::uint8_t> value;
};
struct sam3rt_report {
    sam3rt::VerifyReport value;
};
struct sam3rt_health {
    sam3rt::Health value;
};
struct sam3rt_maps {
    std::vector<std::string> names;
    std::vector<sam3rt::Array<float>> values;
};

namespace {

static_assert(SAM3RT_MAX_IMAGE_SIDE == sam3rt::max_image_side);
static_assert(SAM3RT_MAX_IMAGE_PIXELS == sam3rt::max_image_pixels);
static_assert(SAM3RT_NV12_BT709 == static_cast<int>(sam3rt::PixelFormat::nv12_bt709));
static_assert(SAM3RT_PLANAR == static_cast<int>(sam3rt::PixelFormat::planar));
static_assert(SAM3RT_MASK_BITS == static_cast<int>(sam3rt::MaskForm::bits));
static_assert(SAM3RT_MASK_RLE == static_cast<int>(sam3rt::MaskForm::rle));
static_assert(SAM3RT_GREY == static_cast<int>(sam3rt::PixelFormat::grey));
static_assert(SAM3RT_BGR == static_cast<int>(sam3rt::PixelFormat::bgr));
static_assert(SAM3RT_RGBA == static_cast<int>(sam3rt::PixelFormat::rgba));
static_assert(SAM3RT_LOG_DEBUG == static_cast<int>(sam3rt::LogLevel::debug));
static_assert(SAM3RT_LOG_ERROR == static_cast<int>(sam3rt::LogLevel::error));
static_assert(SAM3RT_MAX_OBJECTS == sam3rt::max_objects);
static_assert(SAM3RT_MAX_POINTS == sam3rt::max_points);
static_assert(SAM3RT_MAX_MASK_LOGIT == sam3rt::max_mask_logit);

using sam3rt::InvalidInputError;

sam3rt_status store(sam3rt_error** error, sam3rt_status status, const char* message,
                    const char* subject = "") noexcept {
    if (error != nullptr) {
        // Without memory for the error, the status alone must do.
        *error = nullptr;
        try {
            *error = new sam3rt_error{status, message, subject};
        } catch (const std::bad_alloc&) {
            return status;
        }
    }
    return status;
}

/// Run a function and turn what it throws into a status.
template <typename Function>
sam3rt_status guarded(sam3rt_error** error, const Function& function) noexcept {
    try {
        function();
        return SAM3RT_OK;
    } catch (const sam3rt::ImageError& e) {
        return store(error, SAM3RT_IMAGE_ERROR, e.what(), e.argument().c_str());
    } catch (const sam3rt::PromptError& e) {
        return store(error, SAM3RT_PROMPT_ERROR, e.what(), e.argument().c_str());
    } catch (const InvalidInputError& e) {
        return store(error, SAM3RT_INVALID_INPUT, e.what(), e.argument().c_str());
    } catch (const sam3rt::StateError& e) {
        return store(error, SAM3RT_STATE_ERROR, e.what());
    } catch (const sam3rt::BundleError& e) {
        return store(error, SAM3RT_BUNDLE_ERROR, e.what(), e.file().c_str());
    } catch (const sam3rt::EmbeddingError& e) {
        return store(error, SAM3RT_EMBEDDING_ERROR, e.what());
    } catch (const sam3rt::BackendError& e) {
        return store(error, SAM3RT_BACKEND_ERROR, e.what());
    } catch (const sam3rt::CancelledError& e) {
        return store(error, SAM3RT_CANCELLED, e.what());
    } catch (const std::system_error& e) {
        return store(error, SAM3RT_IO_ERROR, e.what());
    } catch (const std::bad_alloc&) {
        return store(error, SAM3RT_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& e) {
        return store(error, SAM3RT_INTERNAL_ERROR, e.what());
    } catch (...) {
        return store(error, SAM3RT_INTERNAL_ERROR, "unknown exception");
    }
}

template <typename T>
T& require(T* pointer, const char* argument) {
    if (pointer == nullptr) {
        throw InvalidInputError(argument, "NULL", "a pointer");
    }
    return *pointer;
}

/// Store what a function returns as a new object of the caller's, if there is a place for it.
template <typename T, typename Function>
sam3rt_status make(T** made, const char* argument, sam3rt_error** error,
                   const Function& function) {
    return guarded(error, [&] {
        require(made, argument);
        *made = new T{function()};
    });
}

// Sizes that a structure had before fields were added, by which older callers know it.
template <typename T>
constexpr std::array<std::size_t, 0> older_sizes = {};
template <>
constexpr std::array older_sizes<sam3rt_model_options> = {
    offsetof(sam3rt_model_options, map_weights),
    offsetof(sam3rt_model_options, provider_options)};
template <>
constexpr std::array older_sizes<sam3rt_image> = {offsetof(sam3rt_image, format),
                                                  offsetof(sam3rt_image, plane_stride),
                                                  offsetof(sam3rt_image, on_device)};
template <>
constexpr std::array older_sizes<sam3rt_predict_options> = {
    offsetof(sam3rt_predict_options, best_mask_only),
    offsetof(sam3rt_predict_options, cancellation),
    offsetof(sam3rt_predict_options, output_on_device)};
template <>
constexpr std::array older_sizes<sam3rt_prompts> = {offsetof(sam3rt_prompts, point_counts)};

/// A structure with the fields its caller knows, and 0 for the others. A newer caller's fields must
/// be 0: one that this library does not know cannot be honoured.
template <typename T>
T known_fields(const T* given, const char* argument) {
    T known;
    std::memset(&known, 0, sizeof known);
    if (given == nullptr) {
        return known;
    }
    const std::size_t size = given->struct_size;
    const auto& older = older_sizes<T>;
    if (std::find(older.begin(), older.end(), size) == older.end() &&
        (size < sizeof(T) || size > 65536)) {
        throw InvalidInputError(argument, "a struct_size of " + std::to_string(size),
                                std::to_string(sizeof(T)) + ", the structure's size");
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    for (std::size_t at = sizeof(T); at < size; ++at) {
        if (bytes[at] != 0) {
            throw InvalidInputError(argument,
                                    "a field at byte " + std::to_string(at) +
                                        ", which sam3rt " SAM3RT_VERSION " does not know",
                                    "0 there, or a newer library");
        }
    }
    std::memcpy(&known, given, std::min(size, sizeof known));
    return known;
}

std::string text_or(const char* text, const char* fallback) {
    return text == nullptr ? fallback : text;
}

template <typename T, typename View>
std::optional<sam3rt::Array<T>> copy_of(const View& view, const std::string& argument) {
    if (view.axes == 0) {
        return std::nullopt;
    }
    if (view.axes < 0 || view.axes > SAM3RT_MAX_AXES) {
        throw sam3rt::PromptError(argument, std::to_string(view.axes) + " axes",
                                  "1 to " + std::to_string(SAM3RT_MAX_AXES));
    }
    const sam3rt::Shape shape(view.shape, view.shape + view.axes);
    std::size_t count = 0;
    try {
        count = sam3rt::element_count(shape);
    } catch (const InvalidInputError&) {
        throw sam3rt::PromptError(argument, "shape " + sam3rt::shape_text(shape),
                                  "sizes that memory can hold");
    }
    if (view.values == nullptr && count != 0) {
        throw sam3rt::PromptError(argument, "NULL", "values");
    }
    return sam3rt::Array<T>(shape, view.values, count);
}

template <typename View, typename T>
View view_of(const T* values, const sam3rt::Shape& shape) {
    View view;
    std::memset(&view, 0, sizeof view);
    view.values = values;
    view.axes = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    return view;
}

template <typename View, typename T>
View view_of(const sam3rt::Array<T>& array) {
    // An array that was not asked for has the shape [0]; one of no objects has more axes.
    const bool is_there = array.size() != 0 || array.shape().size() > 1;
    return view_of<View>(is_there ? array.data() : nullptr,
                         is_there ? array.shape() : sam3rt::Shape{});
}

sam3rt::ImageView image_of(const sam3rt_image* image, const char* argument) {
    require(image, argument);
    const sam3rt_image known = known_fields(image, argument);
    if (known.format < SAM3RT_RGB || known.format > SAM3RT_NV12_BT709) {
        throw sam3rt::ImageError(argument, "a format of " + std::to_string(known.format),
                                 "SAM3RT_RGB to SAM3RT_NV12_BT709");
    }
    return {known.pixels, known.height, known.width, known.row_stride,
            static_cast<sam3rt::PixelFormat>(known.format), known.plane_stride,
            known.on_device != 0, known.stream};
}

sam3rt::Prompts prompts_of(const sam3rt_prompts* prompts) {
    const sam3rt_prompts known = known_fields(prompts, "prompts");
    sam3rt::Prompts result;
    result.point_coords = copy_of<float>(known.point_coords, "point_coords");
    result.point_labels = copy_of<std::int64_t>(known.point_labels, "point_labels");
    result.point_counts = copy_of<std::int64_t>(known.point_counts, "point_counts");
    result.box = copy_of<float>(known.box, "box");
    result.mask_input = copy_of<float>(known.mask_input, "mask_input");
    result.normalize_coords = known.coords_are_normalized == 0;
    return result;
}

const sam3rt::Cancellation* cancellation_of(const sam3rt_cancellation* cancellation) {
    return cancellation == nullptr ? nullptr : &cancellation->value;
}

void store(const sam3rt::Size& size, int64_t* height, int64_t* width) {
    if (height != nullptr) {
        *height = size.height;
    }
    if (width != nullptr) {
        *width = size.width;
    }
}

/// A comparison of a report; one without texts where there is none.
const sam3rt::Measurement& measurement_of(const sam3rt_report* report, std::size_t index) {
    static const sam3rt::Measurement none;
    return index < sam3rt_report_count(report) ? report->value.measurements[index] : none;
}

const sam3rt::Health& value_of(const sam3rt_health* health) {
    static const sam3rt::Health none;
    return health == nullptr ? none : health->value;
}

sam3rt::ModelOptions model_options_of(const sam3rt_model_options* options) {
    const sam3rt_model_options known = known_fields(options, "options");
    sam3rt::ModelOptions chosen;
    chosen.device = text_or(known.device, "auto");
    chosen.threads = known.threads;
    chosen.check_files = known.skip_file_checks == 0;
    chosen.map_weights = known.map_weights != 0;
    if (known.expected_fingerprint != nullptr) {
        chosen.expected_fingerprint = known.expected_fingerprint;
    }
    chosen.engine_folder = text_or(known.engine_folder, "");
    if (known.concurrent_encodes != 0) {
        chosen.concurrent_encodes = known.concurrent_encodes;
    }
    if (known.concurrent_decodes != 0) {
        chosen.concurrent_decodes = known.concurrent_decodes;
    }
    for (std::size_t i = 0; i < known.provider_option_count; ++i) {
        const char* const argument = "provider_options";
        const sam3rt_option& option = (&require(known.provider_options, argument))[i];
        const char* const name = &require(option.name, argument);
        if (!chosen.provider_options.emplace(name, &require(option.value, argument)).second) {
            throw InvalidInputError(argument, std::string(name) + " twice", "every option once");
        }
    }
    chosen.thread_affinities = text_or(known.thread_affinities, "");
    chosen.spin_between_runs = known.spin_between_runs != 0;
    chosen.memory_arena = known.no_memory_arena == 0;
    chosen.environment_allocators = known.environment_allocators != 0;
    return chosen;
}

sam3rt::PredictOptions predict_options_of(const sam3rt_predict_options* options) {
    const sam3rt_predict_options known = known_fields(options, "options");
    if (known.foreground < 0 || known.foreground > 255) {
        throw InvalidInputError("foreground", std::to_string(known.foreground), "0 to 255");
    }
    if (known.mask_form < SAM3RT_MASK_BYTES || known.mask_form > SAM3RT_MASK_RLE) {
        throw InvalidInputError("mask_form", std::to_string(known.mask_form),
                                "SAM3RT_MASK_BYTES to SAM3RT_MASK_RLE");
    }
    const sam3rt::Cancellation* const cancellation = cancellation_of(known.cancellation);
    const auto foreground = static_cast<std::uint8_t>(known.foreground);
    return {known.single_mask == 0, known.return_logits != 0, known.best_mask_only != 0,
            foreground == 0 ? std::uint8_t{1} : foreground, cancellation,
            static_cast<sam3rt::MaskForm>(known.mask_form), known.output, known.output_size,
            known.output_on_device != 0, known.stream};
}

}  // namespace

int32_t sam3rt_abi_version(void) { return SAM3RT_ABI_VERSION; }

const char* sam3rt_version(void) {
    static const std::string text = sam3rt::version();
    return text.c_str();
}

sam3rt_status sam3rt_error_status(const sam3rt_error* error) {
    return error == nullptr ? SAM3RT_OK : error->status;
}
const char* sam3rt_error_message(const sam3rt_error* error) {
    return error == nullptr ? "" : error->message.c_str();
}
const char* sam3rt_error_subject(const sam3rt_error* error) {
    return error == nullptr ? "" : error->subject.c_str();
}
void sam3rt_error_free(sam3rt_error* error) { delete error; }

sam3rt_status sam3rt_set_ort_environment(void* environment, sam3rt_error** error) {
    return guarded(error, [&] { sam3rt::set_ort_environment(static_cast<OrtEnv*>(environment)); });
}

sam3rt_status sam3rt_set_log_callback(sam3rt_log_callback callback, void* context, int32_t level,
                                      sam3rt_error** error) {
    return guarded(error, [&] {
        if (level < SAM3RT_LOG_DEBUG || level > SAM3RT_LOG_ERROR) {
            throw InvalidInputError("level", std::to_string(level),
                                    "SAM3RT_LOG_DEBUG to SAM3RT_LOG_ERROR");
        }
        sam3rt::LogCallback function;
        if (callback != nullptr) {
            function = [callback, context](sam3rt::LogLevel found, const std::string& line) {
                callback(context, static_cast<int32_t>(found), line.c_str());
            };
        }
        sam3rt::set_log_callback(std::move(function), static_cast<sam3rt::LogLevel>(level));
    });
}

sam3rt_status sam3rt_cancellation_new(double seconds, sam3rt_cancellation** cancellation,
                                      sam3rt_error** error) {
    return make(cancellation, "cancellation", error, [&] {
        if (!(seconds >= 0 && seconds <= 1e9)) {
            throw InvalidInputError("seconds", std::to_string(seconds), "0 to 1e9");
        }
        const std::chrono::duration<double> wait(seconds);
        return seconds == 0 ? sam3rt::Cancellation()
                            : sam3rt::Cancellation(
                                  std::chrono::duration_cast<std::chrono::nanoseconds>(wait));
    });
}
void sam3rt_cancellation_cancel(const sam3rt_cancellation* cancellation) {
    if (cancellation != nullptr) {
        cancellation->value.cancel();
    }
}
int32_t sam3rt_cancellation_cancelled(const sam3rt_cancellation* cancellation) {
    return cancellation != nullptr && cancellation->value.cancelled() ? 1 : 0;
}
void sam3rt_cancellation_free(sam3rt_cancellation* cancellation) { delete cancellation; }

const uint8_t* sam3rt_buffer_data(const sam3rt_buffer* buffer) {
    return buffer == nullptr ? nullptr : buffer->value.data();
}
size_t sam3rt_buffer_size(const sam3rt_buffer* buffer) {
    return buffer == nullptr ? 0 : buffer->value.size();
}
void sam3rt_buffer_free(sam3rt_buffer* buffer) { delete buffer; }

sam3rt_status sam3rt_set_shared_threads(int32_t threads, sam3rt_error** error) {
    return guarded(error, [&] { sam3rt::set_shared_threads(threads); });
}

sam3rt_status sam3rt_model_load(const char* bundle, const sam3rt_model_options* options,
                                sam3rt_model** model, sam3rt_error** error) {
    return make(model, "model", error, [&] {
        return sam3rt::Model::load(&require(bundle, "bundle"), model_options_of(options));
    });
}

sam3rt_status sam3rt_model_load_from_memory(const sam3rt_file* files, size_t count,
                                            const sam3rt_model_options* options,
                                            sam3rt_model** model, sam3rt_error** error) {
    return make(model, "model", error, [&] {
        std::vector<sam3rt::BundleFile> given;
        for (std::size_t i = 0; i < count; ++i) {
            const sam3rt_file& file = (&require(files, "files"))[i];
            given.push_back({&require(file.name, "files"), file.content, file.size, nullptr});
        }
        return sam3rt::Model::load_from_memory(given, model_options_of(options));
    });
}
void sam3rt_model_free(sam3rt_model* model) { delete model; }

sam3rt_status sam3rt_model_prepare(const sam3rt_model* model, sam3rt_error** error) {
    return guarded(error, [&] { require(model, "model").value.prepare(); });
}

sam3rt_status sam3rt_model_warm_up(const sam3rt_model* model, sam3rt_error** error) {
    return guarded(error, [&] { require(model, "model").value.warm_up(); });
}

const char* sam3rt_model_device(const sam3rt_model* model) {
    return model == nullptr ? "" : model->device.c_str();
}
const char* sam3rt_model_name(const sam3rt_model* model) {
    return model == nullptr ? "" : model->value.manifest().name.c_str();
}
const char* sam3rt_model_fingerprint(const sam3rt_model* model) {
    return model == nullptr ? "" : model->value.manifest().fingerprint.c_str();
}
const char* sam3rt_model_type(const sam3rt_model* model) {
    return model == nullptr ? "" : model->value.manifest().model_type.c_str();
}
const char* sam3rt_model_path(const sam3rt_model* model) {
    return model == nullptr ? "" : model->value.path().c_str();
}
const char* sam3rt_model_manifest_json(const sam3rt_model* model) {
    return model == nullptr ? "" : model->value.manifest_json().c_str();
}
void sam3rt_model_image_size(const sam3rt_model* model, int64_t* height, int64_t* width) {
    store(model == nullptr ? sam3rt::Size{} : model->value.manifest().image.size, height, width);
}
void sam3rt_model_mask_size(const sam3rt_model* model, int64_t* height, int64_t* width) {
    const sam3rt::Size size =
        model == nullptr ? sam3rt::Size{} : model->value.manifest().prompts.mask_size;
    store(size, height, width);
}
int32_t sam3rt_model_joins_images(const sam3rt_model* model) {
    return model != nullptr && model->value.joins_images() ? 1 : 0;
}
int32_t sam3rt_model_encoder_loaded(const sam3rt_model* model) {
    return model != nullptr && model->value.encoder_loaded() ? 1 : 0;
}

sam3rt_status sam3rt_model_encode(const sam3rt_model* model, const sam3rt_image* image,
                                  sam3rt_embedding** embedding, sam3rt_error** error) {
    return sam3rt_model_encode_cancellable(model, image, nullptr, embedding, error);
}

sam3rt_status sam3rt_model_encode_cancellable(const sam3rt_model* model, const sam3rt_image* image,
                                              const sam3rt_cancellation* cancellation,
                                              sam3rt_embedding** embedding, sam3rt_error** error) {
    return make(embedding, "embedding", error, [&] {
        return require(model, "model")
            .value.encode(image_of(image, "image"), cancellation_of(cancellation));
    });
}

sam3rt_status sam3rt_model_decode(const sam3rt_model* model, const sam3rt_embedding* embedding,
                                  const sam3rt_prompts* prompts, int32_t single_mask,
                                  const sam3rt_cancellation* cancellation,
                                  sam3rt_prediction** prediction, sam3rt_error** error) {
    return make(prediction, "prediction", error, [&] {
        sam3rt::DecodedMasks decoded = require(model, "model").value.decode(
            require(embedding, "embedding").value, prompts_of(prompts), single_mask == 0,
            cancellation_of(cancellation));
        sam3rt::Prediction found;
        found.iou_predictions = std::move(decoded.iou_predictions);
        found.low_res_masks = std::move(decoded.low_res_masks);
        found.object_score_logits = std::move(decoded.object_score_logits);
        found.warning = std::move(decoded.warning);
        return found;
    });
}

sam3rt_status sam3rt_model_verify(const sam3rt_model* model,
                                  const sam3rt_cancellation* cancellation, sam3rt_report** report,
                                  sam3rt_error** error) {
    return make(report, "report", error, [&] {
        return require(model, "model").value.verify(cancellation_of(cancellation));
    });
}

int32_t sam3rt_report_passed(const sam3rt_report* report) {
    return report != nullptr && report->value.passed ? 1 : 0;
}
const char* sam3rt_report_explanation(const sam3rt_report* report) {
    return report == nullptr ? "" : report->value.explanation.c_str();
}
size_t sam3rt_report_count(const sam3rt_report* report) {
    return report == nullptr ? 0 : report->value.measurements.size();
}
const char* sam3rt_report_case(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).case_name.c_str();
}
const char* sam3rt_report_output(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).output.c_str();
}
const char* sam3rt_report_metric(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).metric.c_str();
}
double sam3rt_report_value(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).value;
}
double sam3rt_report_limit(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).limit;
}
int32_t sam3rt_report_at_least(const sam3rt_report* report, size_t index) {
    return measurement_of(report, index).at_least ? 1 : 0;
}
int32_t sam3rt_report_is_within(const sam3rt_report* report, size_t index) {
    return index < sam3rt_report_count(report) && measurement_of(report, index).passed() ? 1 : 0;
}
void sam3rt_report_free(sam3rt_report* report) { delete report; }

sam3rt_status sam3rt_model_health(const sam3rt_model* model,
                                  const sam3rt_cancellation* cancellation, sam3rt_health** health,
                                  sam3rt_error** error) {
    return make(health, "health", error, [&] {
        return require(model, "model").value.health(cancellation_of(cancellation));
    });
}

int32_t sam3rt_health_is_healthy(const sam3rt_health* health) {
    return value_of(health).healthy ? 1 : 0;
}
const char* sam3rt_health_problem(const sam3rt_health* health) {
    return value_of(health).problem.c_str();
}
const char* sam3rt_health_backend(const sam3rt_health* health) {
    return value_of(health).backend.c_str();
}
const char* sam3rt_health_device(const sam3rt_health* health) {
    return value_of(health).device.c_str();
}
const char* sam3rt_health_precision(const sam3rt_health* health) {
    return value_of(health).precision.c_str();
}
const char* sam3rt_health_fingerprint(const sam3rt_health* health) {
    return value_of(health).fingerprint.c_str();
}
double sam3rt_health_encode_seconds(const sam3rt_health* health) {
    return value_of(health).encode_seconds;
}
double sam3rt_health_decode_seconds(const sam3rt_health* health) {
    return value_of(health).decode_seconds;
}
void sam3rt_health_free(sam3rt_health* health) { delete health; }

sam3rt_status sam3rt_embedding_load(const sam3rt_model* model, const char* path,
                                    sam3rt_embedding** embedding, sam3rt_error** error) {
    return make(embedding, "embedding", error, [&] {
        return require(model, "model").value.load_embedding(&require(path, "path"));
    });
}

sam3rt_status sam3rt_embedding_save(const sam3rt_embedding* embedding, const char* path,
                                    sam3rt_error** error) {
    return guarded(error,
                   [&] { require(embedding, "embedding").value.save(&require(path, "path")); });
}

sam3rt_status sam3rt_embedding_to_bytes(const sam3rt_embedding* embedding, sam3rt_buffer** buffer,
                                        sam3rt_error** error) {
    return make(buffer, "buffer", error,
                [&] { return require(embedding, "embedding").value.to_bytes(); });
}

sam3rt_status sam3rt_embedding_from_bytes(const sam3rt_model* model, const void* content,
                                          size_t size, sam3rt_embedding** embedding,
                                          sam3rt_error** error) {
    return make(embedding, "embedding", error, [&] {
        return require(model, "model").value.embedding_from_bytes(content, size);
    });
}

void sam3rt_embedding_image_size(const sam3rt_embedding* embedding, int64_t* height,
                                 int64_t* width) {
    const sam3rt::Size size =
        embedding == nullptr ? sam3rt::Size{} : embedding->value.original_size();
    store(size, height, width);
}
void sam3rt_embedding_input_size(const sam3rt_embedding* embedding, int64_t* height,
                                 int64_t* width) {
    store(embedding == nullptr ? sam3rt::Size{} : embedding->value.input_size(), height, width);
}
size_t sam3rt_embedding_nbytes(const sam3rt_embedding* embedding) {
    return embedding == nullptr ? 0 : embedding->value.nbytes();
}
const char* sam3rt_embedding_fingerprint(const sam3rt_embedding* embedding) {
    return embedding == nullptr ? "" : embedding->value.fingerprint().c_str();
}
void sam3rt_embedding_free(sam3rt_embedding* embedding) { delete embedding; }

sam3rt_status sam3rt_embedding_maps(const sam3rt_embedding* embedding, sam3rt_maps** maps,
                                    sam3rt_error** error) {
    return make(maps, "maps", error, [&] {
        const sam3rt::ImageEmbedding& value = require(embedding, "embedding").value;
        return sam3rt_maps{value.names(), value.maps()};
    });
}
size_t sam3rt_maps_count(const sam3rt_maps* maps) {
    return maps == nullptr ? 0 : maps->values.size();
}
const char* sam3rt_maps_name(const sam3rt_maps* maps, size_t index) {
    return index < sam3rt_maps_count(maps) ? maps->names[index].c_str() : "";
}
sam3rt_float_array sam3rt_maps_values(const sam3rt_maps* maps, size_t index) {
    static const sam3rt::Array<float> none;
    return view_of<sam3rt_float_array>(index < sam3rt_maps_count(maps) ? maps->values[index]
                                                                       : none);
}
void sam3rt_maps_free(sam3rt_maps* maps) { delete maps; }

sam3rt_status sam3rt_predictor_new(const sam3rt_model* model,
                                   const sam3rt_predictor_options* options,
                                   sam3rt_predictor** predictor, sam3rt_error** error) {
    return make(predictor, "predictor", error, [&] {
        const sam3rt_predictor_options known = known_fields(options, "options");
        sam3rt::PredictorOptions chosen;
        chosen.mask_threshold = known.mask_threshold;
        if (known.has_max_hole_area != 0) {
            chosen.max_hole_area = known.max_hole_area;
        }
        chosen.max_sprinkle_area = known.max_sprinkle_area;
        return sam3rt::Predictor(require(model, "model").value, chosen);
    });
}
void sam3rt_predictor_free(sam3rt_predictor* predictor) { delete predictor; }

sam3rt_status sam3rt_predictor_set_image(sam3rt_predictor* predictor, const sam3rt_image* image,
                                         sam3rt_error** error) {
    return guarded(
        error, [&] { require(predictor, "predictor").value.set_image(image_of(image, "image")); });
}

sam3rt_status sam3rt_predictor_set_embedding(sam3rt_predictor* predictor,
                                             const sam3rt_embedding* embedding,
                                             sam3rt_error** error) {
    return guarded(error, [&] {
        require(predictor, "predictor").value.set_embedding(require(embedding, "embedding").value);
    });
}

sam3rt_status sam3rt_predictor_set_image_batch(sam3rt_predictor* predictor,
                                               const sam3rt_image* const* images, size_t count,
                                               sam3rt_error** error) {
    return sam3rt_predictor_set_image_batch_cancellable(predictor, images, count, nullptr, error);
}

sam3rt_status sam3rt_predictor_set_image_batch_cancellable(
    sam3rt_predictor* predictor, const sam3rt_image* const* images, size_t count,
    const sam3rt_cancellation* cancellation, sam3rt_error** error) {
    return guarded(error, [&] {
        std::vector<sam3rt::ImageView> views;
        for (std::size_t i = 0; i < count; ++i) {
            const std::string argument = "images[" + std::to_string(i) + "]";
            views.push_back(image_of((&require(images, "images"))[i], argument.c_str()));
        }
        require(predictor, "predictor")
            .value.set_image_batch(views, cancellation_of(cancellation));
    });
}

sam3rt_status sam3rt_predictor_set_embedding_batch(sam3rt_predictor* predictor,
                                                   const sam3rt_embedding* const* embeddings,
                                                   size_t count, sam3rt_error** error) {
    return guarded(error, [&] {
        std::vector<sam3rt::ImageEmbedding> values;
        for (std::size_t i = 0; i < count; ++i) {
            const std::string argument = "embeddings[" + std::to_string(i) + "]";
            const sam3rt_embedding* const entry = (&require(embeddings, "embeddings"))[i];
            values.push_back(require(entry, argument.c_str()).value);
        }
        require(predictor, "predictor").value.set_embedding_batch(std::move(values));
    });
}

sam3rt_status sam3rt_predictor_predict(const sam3rt_predictor* predictor,
                                       const sam3rt_prompts* prompts,
                                       const sam3rt_predict_options* options,
                                       sam3rt_prediction** prediction, sam3rt_error** error) {
    return make(prediction, "prediction", error, [&] {
        const sam3rt::Predictor& value = require(predictor, "predictor").value;
        const sam3rt::PredictOptions chosen = predict_options_of(options);
        return sam3rt_prediction{value.predict(prompts_of(prompts), chosen),
                                 chosen.return_logits ? nullptr : chosen.output,
                                 chosen.return_logits ? chosen.output : nullptr};
    });
}

sam3rt_status sam3rt_predictor_predict_batch(const sam3rt_predictor* predictor,
                                             const sam3rt_prompts* const* prompts, size_t count,
                                             const sam3rt_predict_options* options,
                                             sam3rt_prediction** predictions,
                                             sam3rt_error** error) {
    return guarded(error, [&] {
        std::vector<sam3rt::Prompts> entries;
        for (std::size_t i = 0; i < count; ++i) {
            entries.push_back(prompts_of((&require(prompts, "prompts"))[i]));
        }
        const sam3rt::Predictor& value = require(predictor, "predictor").value;
        require(predictions, "predictions");
        std::vector<std::unique_ptr<sam3rt_prediction>> results;
        for (sam3rt::Prediction& result :
             value.predict_batch(entries, predict_options_of(options))) {
            results.push_back(
                std::unique_ptr<sam3rt_prediction>(new sam3rt_prediction{std::move(result)}));
        }
        for (std::size_t i = 0; i < results.size(); ++i) {
            predictions[i] = results[i].release();
        }
    });
}

void sam3rt_predictor_reset(sam3rt_predictor* predictor) {
    if (predictor != nullptr) {
        predictor->value.reset();
    }
}

sam3rt_mask_array sam3rt_prediction_masks(const sam3rt_prediction* prediction) {
    static const sam3rt::Array<std::uint8_t> none;
    if (prediction != nullptr && prediction->masks != nullptr) {
        return view_of<sam3rt_mask_array>(static_cast<const std::uint8_t*>(prediction->masks),
                                          prediction->value.shape);
    }
    return view_of<sam3rt_mask_array>(prediction == nullptr ? none : prediction->value.masks);
}
sam3rt_float_array sam3rt_prediction_logits(const sam3rt_prediction* prediction) {
    static const sam3rt::Array<float> none;
    if (prediction != nullptr && prediction->logits != nullptr) {
        return view_of<sam3rt_float_array>(static_cast<const float*>(prediction->logits),
                                           prediction->value.shape);
    }
    return view_of<sam3rt_float_array>(prediction == nullptr ? none : prediction->value.logits);
}
const char* sam3rt_prediction_rle(const sam3rt_prediction* prediction, size_t index) {
    return index < sam3rt_prediction_rle_count(prediction) ? prediction->value.rle[index].c_str()
                                                           : "";
}
size_t sam3rt_prediction_rle_count(const sam3rt_prediction* prediction) {
    return prediction == nullptr ? 0 : prediction->value.rle.size();
}
sam3rt_float_array sam3rt_prediction_iou(const sam3rt_prediction* prediction) {
    static const sam3rt::Array<float> none;
    return view_of<sam3rt_float_array>(prediction == nullptr ? none
                                                             : prediction->value.iou_predictions);
}
sam3rt_float_array sam3rt_prediction_low_res(const sam3rt_prediction* prediction) {
    static const sam3rt::Array<float> none;
    return view_of<sam3rt_float_array>(prediction == nullptr ? none
                                                             : prediction->value.low_res_masks);
}
sam3rt_float_array sam3rt_prediction_object_scores(const sam3rt_prediction* prediction) {
    static const sam3rt::Array<float> none;
    const bool known = prediction != nullptr && prediction->value.object_score_logits.has_value();
    return view_of<sam3rt_float_array>(known ? *prediction->value.object_score_logits : none);
}
const char* sam3rt_prediction_warning(const sam3rt_prediction* prediction) {
    return prediction == nullptr ? "" : prediction->value.warning.c_str();
}
void sam3rt_prediction_free(sam3rt_prediction* prediction) { delete prediction; }
