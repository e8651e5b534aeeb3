/* sam3rt's C interface: the C++ library for any language that can call C, and the one whose ABI
 * stays as it is when the version's second number changes.
 *
 * Objects are opaque and freed by their own function, which takes NULL too. Every function that can
 * fail returns a status, and where it is not SAM3RT_OK and `error` is not NULL, stores an error
 * there that the caller frees. Errors are objects and not a variable of the thread, so that
 * languages whose tasks move between threads can use them. No C++ exception leaves the library.
 *
 * Structures that callers fill begin with their size, so that later versions can add fields: set
 * the whole structure to zero, struct_size to sizeof the structure, and then the fields that are
 * wanted. What a structure of an older caller lacks has the value 0, which always stands for the
 * default. A field of a newer caller that this library does not know must be 0, or the call fails,
 * and so it does with any struct_size that no version of the structure had. The structures
 * without a size, which are passed by value or in arrays, never change.
 *
 * A model and an embedding may be used by many threads at once, a predictor by one at a time. An
 * object is freed when no call that was given it runs any more; what was made of it may live on.
 */
#ifndef SAM3RT_H
#define SAM3RT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SAM3RT_API __attribute__((visibility("default")))
#else
#define SAM3RT_API
#endif

/* Raised when a function or field is removed or changes its meaning; not when one is added. */
#define SAM3RT_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* What kind of error happened; the classes are those of sam3rt/sam3rt.hpp. */
typedef int32_t sam3rt_status;
enum {
    SAM3RT_OK = 0,
    /* An argument has the wrong shape or values. */
    SAM3RT_INVALID_INPUT = 1,
    /* An image is not one the predictor takes. */
    SAM3RT_IMAGE_ERROR = 2,
    /* A point, box, mask or label is not one the predictor takes. */
    SAM3RT_PROMPT_ERROR = 3,
    /* A function was called in a state that does not allow it, such as predict before set_image. */
    SAM3RT_STATE_ERROR = 4,
    /* A bundle or engine is missing, damaged, tampered with, mixed or too new. */
    SAM3RT_BUNDLE_ERROR = 5,
    /* An embedding file or value is damaged or belongs to another model. */
    SAM3RT_EMBEDDING_ERROR = 6,
    /* The device cannot be used here, or failed. */
    SAM3RT_BACKEND_ERROR = 7,
    /* A file cannot be written. */
    SAM3RT_IO_ERROR = 8,
    SAM3RT_OUT_OF_MEMORY = 9,
    /* Anything else: a bug in sam3rt. */
    SAM3RT_INTERNAL_ERROR = 10,
    /* A call was cancelled, or its deadline passed, before it had a result. */
    SAM3RT_CANCELLED = 11
};

typedef struct sam3rt_error sam3rt_error;
typedef struct sam3rt_model sam3rt_model;
typedef struct sam3rt_embedding sam3rt_embedding;
typedef struct sam3rt_predictor sam3rt_predictor;
typedef struct sam3rt_prediction sam3rt_prediction;
typedef struct sam3rt_cancellation sam3rt_cancellation;
typedef struct sam3rt_buffer sam3rt_buffer;
typedef struct sam3rt_report sam3rt_report;
typedef struct sam3rt_health sam3rt_health;
typedef struct sam3rt_maps sam3rt_maps;

/* --- versions ----------------------------------------------------------------------------------
 */

/* SAM3RT_ABI_VERSION of the library that is loaded, to compare with that of the header. */
SAM3RT_API int32_t sam3rt_abi_version(void);

/* The library's version, such as "0.1.0". */
SAM3RT_API const char* sam3rt_version(void);

/* --- errors ------------------------------------------------------------------------------------
 */

SAM3RT_API sam3rt_status sam3rt_error_status(const sam3rt_error* error);

/* UTF-8; lives as long as the error. */
SAM3RT_API const char* sam3rt_error_message(const sam3rt_error* error);

/* The argument or the file at fault, or an empty text; lives as long as the error. */
SAM3RT_API const char* sam3rt_error_subject(const sam3rt_error* error);

SAM3RT_API void sam3rt_error_free(sam3rt_error* error);

/* --- log lines ---------------------------------------------------------------------------------
 */

#define SAM3RT_LOG_DEBUG 0
#define SAM3RT_LOG_INFO 1
#define SAM3RT_LOG_WARNING 2
#define SAM3RT_LOG_ERROR 3

/* Takes one line of the log, UTF-8, with the context that was given. It may be called by any thread,
 * by several at once, and from within calls of the library: it must not call the library. */
typedef void (*sam3rt_log_callback)(void* context, int32_t level, const char* line);

/* Give the library's lines from `level` on, and ONNX Runtime's, to a callback. It may be called at
 * any time; ONNX Runtime's lines follow the level that holds when a graph is loaded. With NULL,
 * ONNX Runtime's errors go to stderr and nothing else anywhere. A callback that is replaced may
 * still be running in another thread. */
SAM3RT_API sam3rt_status sam3rt_set_log_callback(sam3rt_log_callback callback, void* context,
                                                 int32_t level, sam3rt_error** error);

/* --- cancellation ------------------------------------------------------------------------------
 */

/* Ends calls that are given it with SAM3RT_CANCELLED: at a time, `seconds` from now and at most 1e9,
 * with 0 only on request. They end soon after, also while ONNX Runtime computes and while they wait
 * for their turn; a graph that is being loaded is loaded to its end first, and a call that is as
 * good as done may still succeed. It must live until the calls that were given it have returned. */
SAM3RT_API sam3rt_status sam3rt_cancellation_new(double seconds, sam3rt_cancellation** cancellation,
                                                 sam3rt_error** error);
/* End the calls under way, and all later ones. Any thread may call it. */
SAM3RT_API void sam3rt_cancellation_cancel(const sam3rt_cancellation* cancellation);
/* Whether it was cancelled or its time has come: 0 or 1. */
SAM3RT_API int32_t sam3rt_cancellation_cancelled(const sam3rt_cancellation* cancellation);
SAM3RT_API void sam3rt_cancellation_free(sam3rt_cancellation* cancellation);

/* --- bytes -------------------------------------------------------------------------------------
 */

/* Bytes that the library made; they live as long as the buffer. */
SAM3RT_API const uint8_t* sam3rt_buffer_data(const sam3rt_buffer* buffer);
SAM3RT_API size_t sam3rt_buffer_size(const sam3rt_buffer* buffer);
SAM3RT_API void sam3rt_buffer_free(sam3rt_buffer* buffer);

/* --- limits ------------------------------------------------------------------------------------
 */

/* Images have at most this many pixels on a side, and in total. A larger one is an image error. */
#define SAM3RT_MAX_IMAGE_SIDE 65536
#define SAM3RT_MAX_IMAGE_PIXELS 268435456
/* One call takes at most this many objects, and this many points for each of them, and the values
 * of a mask prompt are at most this far from 0. Anything else is a prompt error. */
#define SAM3RT_MAX_OBJECTS 1024
#define SAM3RT_MAX_POINTS 1024
#define SAM3RT_MAX_MASK_LOGIT 10000.0f

/* --- values ------------------------------------------------------------------------------------
 */

#define SAM3RT_MAX_AXES 4

/* Dense arrays in row-major order, of memory that somebody else owns. An array without elements may
 * have NULL for its values; an argument whose number of axes is 0 is absent. */
typedef struct sam3rt_float_array {
    const float* values;
    int64_t shape[SAM3RT_MAX_AXES];
    int32_t axes;
} sam3rt_float_array;

typedef struct sam3rt_label_array {
    const int64_t* values;
    int64_t shape[SAM3RT_MAX_AXES];
    int32_t axes;
} sam3rt_label_array;

typedef struct sam3rt_mask_array {
    const uint8_t* values;
    int64_t shape[SAM3RT_MAX_AXES];
    int32_t axes;
} sam3rt_mask_array;

/* The bytes of an image. The first five are interleaved: the bytes of a pixel, in memory order. Alpha
 * is left out; grey is taken for all three colours. */
#define SAM3RT_RGB 0
#define SAM3RT_BGR 1
#define SAM3RT_RGBA 2
#define SAM3RT_BGRA 3
#define SAM3RT_GREY 4
/* Three planes: red, green, blue. */
#define SAM3RT_PLANAR 5
/* Video: a plane of luma, then one of half the height with a pair of chroma values for each 2 x 2
 * pixels, blue first. Both sides are even. Limited range and the matrix of BT.601, as OpenCV takes
 * NV12; or that of BT.709, as HD video mostly has it. */
#define SAM3RT_NV12 6
#define SAM3RT_NV12_BT709 7

/* An 8-bit image, which is only read, and only during the call. */
typedef struct sam3rt_image {
    size_t struct_size;
    const uint8_t* pixels;
    int64_t height;
    int64_t width;
    /* Bytes from one row to the next, at least those of its pixels, for which 0 stands too. An
     * interleaved image that is stored bottom up has a negative stride, and `pixels` is still the
     * first pixel of the first row, which stands last in memory. All rows together span less than
     * 2^62 bytes. */
    ptrdiff_t row_stride;
    /* SAM3RT_RGB or another of them. */
    int32_t format;
    /* For images of planes: bytes from one plane to the next; 0 where one follows the other's rows.
     * All planes have the same row_stride. 0 for other images. */
    size_t plane_stride;
    /* Not 0: `pixels` is an address in the memory of the model's GPU, which takes a model that runs
     * on TensorRT without ONNX Runtime. The encoder then waits for what `stream` was given before
     * the call, and the calling thread does not. Another model, or memory elsewhere, is an image
     * error; no NVRTC is a backend error. */
    int32_t on_device;
    /* Where the image is in device memory, the stream on which it is written (cudaStream_t or
     * CUstream, of the GPU's primary context, and not being recorded); NULL for CUDA's default
     * stream. */
    void* stream;
} sam3rt_image;

/* Prompts for one image. Everything may be absent; B counts objects; with B 0 the results are
 * empty. */
typedef struct sam3rt_prompts {
    size_t struct_size;
    /* [N, 2] or [B, N, 2], (x, y) in pixels of the image. */
    sam3rt_float_array point_coords;
    /* [N] or [B, N]: 1 foreground, 0 background, 2 and 3 a box's corners, -1 "not a point", which
     * has no place and still changes the masks. */
    sam3rt_label_array point_labels;
    /* [4] or [B, 4], x0, y0, x1, y1. */
    sam3rt_float_array box;
    /* [1, h, w] or [B, 1, h, w] low-resolution logits of an earlier call. */
    sam3rt_float_array mask_input;
    /* Not 0: coordinates are already in [0, 1] of the image. */
    int32_t coords_are_normalized;
    /* [B], for objects with different numbers of points: how many each has. point_coords is then
     * [N, 2], one object's points after the other's, and point_labels [N]. */
    sam3rt_label_array point_counts;
} sam3rt_prompts;

/* A file of a bundle in memory, and an option by its name. */
typedef struct sam3rt_file {
    const char* name;
    const void* content;
    size_t size;
} sam3rt_file;

typedef struct sam3rt_option {
    const char* name;
    const char* value;
} sam3rt_option;

/* --- the model ---------------------------------------------------------------------------------
 */

/* Use the host's environment of ONNX Runtime (an OrtEnv*), with its logger and its threads, in
 * place of one of the library's own. It must live for as long as anything of the library. A state
 * error where a model was loaded before, or the library was built without ONNX Runtime.
 *
 * Without one, the first model creates it, and sets ORT_DISABLE_TELEMETRY=1 in the environment of the
 * process where that is not set: ONNX Runtime would report to its maker, and takes no other word for
 * it. Set the variable yourself where other threads may read the environment then. */
SAM3RT_API sam3rt_status sam3rt_set_ort_environment(void* environment, sam3rt_error** error);

/* How many threads the pool has that models without `threads` share, in place of as many as the
 * machine has cores. A host's environment has a pool of its own. A state error likewise. */
SAM3RT_API sam3rt_status sam3rt_set_shared_threads(int32_t threads, sam3rt_error** error);

typedef struct sam3rt_model_options {
    size_t struct_size;
    /* "auto" (also for NULL), "cpu", "cuda", "tensorrt" or "tensorrt-rtx", the last three also with
     * ":N". */
    const char* device;
    /* Threads on the CPU, for each graph; 0 shares one pool of threads, as many as the machine has
     * cores, with all models of the process that do so. */
    int32_t threads;
    /* Not 0: do not hash every file against the manifest first. */
    int32_t skip_file_checks;
    /* Refuse any bundle but the one with this fingerprint; NULL takes any. */
    const char* expected_fingerprint;
    /* For TensorRT, the engine folder to use in place of the fastest recipe that passes the gate;
     * NULL for none. Engines that nobody has judged on this machine are compared with the bundle's
     * parity record when a model is loaded, once, which at full size takes a minute or two. */
    const char* engine_folder;
    /* How many threads may run the encoder at once, and the decoder; others wait for their turn. 0
     * stands for the defaults, 1 and 4. */
    int32_t concurrent_encodes;
    int32_t concurrent_decodes;
    /* Not 0: map weights that lie beside a graph, in place of a copy in this process's own memory.
     * They change when their file does: only for a folder that nobody else can write to. */
    int32_t map_weights;
    /* For ONNX Runtime on a GPU: `provider_option_count` options of the execution provider, by the
     * names that ONNX Runtime documents for it, such as "gpu_mem_limit" for "cuda". `device` must
     * name the provider; "device_id" and "use_tf32" are the library's. */
    const sam3rt_option* provider_options;
    size_t provider_option_count;
    /* For ONNX Runtime on the CPU, with `threads`: where each thread but the calling one may run, as
     * its option "session.intra_op_thread_affinities" has it: processors from 1 on, with a semicolon
     * between threads. NULL leaves it to the system. */
    const char* thread_affinities;
    /* Not 0: threads of the model's own, with `threads`, wait actively between runs, too. */
    int32_t spin_between_runs;
    /* Not 0: ONNX Runtime keeps no memory on the CPU for the next run, in an arena: every buffer is
     * asked of the process's malloc. */
    int32_t no_memory_arena;
    /* Not 0: ONNX Runtime takes memory of allocators that the host registered with the environment
     * it gave to sam3rt_set_ort_environment. */
    int32_t environment_allocators;
} sam3rt_model_options;

/* Opens a bundle folder, a relative one from the current folder as it is now; `options` may be
 * NULL. Graphs are loaded at first use; engines, without ONNX Runtime, now. */
SAM3RT_API sam3rt_status sam3rt_model_load(const char* bundle, const sam3rt_model_options* options,
                                           sam3rt_model** model, sam3rt_error** error);

/* Opens a bundle whose `count` files lie in memory: bundle.json and those that it lists; others are
 * left alone. They are checked as in a folder, and read where they are, without a copy: ONNX Runtime
 * makes its own of what it keeps. The content of a graph's files must stay as it is until
 * sam3rt_model_prepare has succeeded, or the model and everything made of it is freed; the rest, and
 * the array itself, are not needed after the call. Without `map_weights`, and without engines. */
SAM3RT_API sam3rt_status sam3rt_model_load_from_memory(const sam3rt_file* files, size_t count,
                                                       const sam3rt_model_options* options,
                                                       sam3rt_model** model, sam3rt_error** error);
SAM3RT_API void sam3rt_model_free(sam3rt_model* model);

/* Loads both graphs. A graph that could not be loaded is tried again here, and only here: every
 * other call fails at once with the same error. */
SAM3RT_API sam3rt_status sam3rt_model_prepare(const sam3rt_model* model, sam3rt_error** error);

/* Loads both graphs likewise and runs each once, so that the first request is not the slow one. */
SAM3RT_API sam3rt_status sam3rt_model_warm_up(const sam3rt_model* model, sam3rt_error** error);

/* Such as "cpu" or "cuda:0"; the bundle's name and fingerprint; "sam3", "efficient_sam3", "sam2" or
 * "mobile_sam"; the folder, as an absolute path, or an empty text for one in memory; and the whole
 * text of bundle.json, which says everything else. They live as long as the model. */
SAM3RT_API const char* sam3rt_model_device(const sam3rt_model* model);
SAM3RT_API const char* sam3rt_model_name(const sam3rt_model* model);
SAM3RT_API const char* sam3rt_model_fingerprint(const sam3rt_model* model);
SAM3RT_API const char* sam3rt_model_type(const sam3rt_model* model);
SAM3RT_API const char* sam3rt_model_path(const sam3rt_model* model);
SAM3RT_API const char* sam3rt_model_manifest_json(const sam3rt_model* model);

/* Height and width of the encoder's input. */
SAM3RT_API void sam3rt_model_image_size(const sam3rt_model* model, int64_t* height, int64_t* width);

/* Height and width of a mask prompt, which are those of low-resolution logits too. */
SAM3RT_API void sam3rt_model_mask_size(const sam3rt_model* model, int64_t* height, int64_t* width);

/* Whether sam3rt_predictor_predict_batch runs the decoder on objects of several images at once, which
 * takes TensorRT without ONNX Runtime, and a bundle and engines whose decoder takes several: 0 or 1. */
SAM3RT_API int32_t sam3rt_model_joins_images(const sam3rt_model* model);

/* Whether the encoder's graph has been loaded so far: 0 or 1. */
SAM3RT_API int32_t sam3rt_model_encoder_loaded(const sam3rt_model* model);

SAM3RT_API sam3rt_status sam3rt_model_encode(const sam3rt_model* model, const sam3rt_image* image,
                                             sam3rt_embedding** embedding, sam3rt_error** error);

/* The same; `cancellation` may be NULL. With sam3rt_predictor_set_embedding it takes the place of
 * sam3rt_predictor_set_image, which does the same two things. */
SAM3RT_API sam3rt_status sam3rt_model_encode_cancellable(const sam3rt_model* model,
                                                         const sam3rt_image* image,
                                                         const sam3rt_cancellation* cancellation,
                                                         sam3rt_embedding** embedding,
                                                         sam3rt_error** error);

/* Runs the decoder alone. The prediction has no masks and no logits of the image's size; its
 * low-resolution logits [P, C, h, w], unclamped, its IoUs [P, C] and object scores [P] keep their
 * leading axis also for one object. `prompts` and `cancellation` may be NULL; `single_mask` is not 0
 * for the single best guess. */
SAM3RT_API sam3rt_status sam3rt_model_decode(const sam3rt_model* model,
                                             const sam3rt_embedding* embedding,
                                             const sam3rt_prompts* prompts, int32_t single_mask,
                                             const sam3rt_cancellation* cancellation,
                                             sam3rt_prediction** prediction, sam3rt_error** error);

/* --- accuracy ----------------------------------------------------------------------------------
 */

/* Runs the bundle's parity record, encoder and decoder, and compares every output: with the
 * bundle's own limits in FP32, with the gate's in anything less. At the published SAM 3's size it
 * takes a minute or two. `cancellation` may be NULL. SAM3RT_OK says that the comparisons were made,
 * and sam3rt_report_passed how they came out. */
SAM3RT_API sam3rt_status sam3rt_model_verify(const sam3rt_model* model,
                                             const sam3rt_cancellation* cancellation,
                                             sam3rt_report** report, sam3rt_error** error);

/* Whether something was compared and all of it is within its limits: 0 or 1. */
SAM3RT_API int32_t sam3rt_report_passed(const sam3rt_report* report);
/* How the worst failures fail, or that nothing does; lives as long as the report. */
SAM3RT_API const char* sam3rt_report_explanation(const sam3rt_report* report);
/* How many comparisons were made. */
SAM3RT_API size_t sam3rt_report_count(const sam3rt_report* report);
/* Of comparison `index`: the image or case it is about, such as "image 0"; which of the outputs,
 * such as "masks"; what was measured, such as "mean IoU". Empty texts where there is none. They
 * live as long as the report. */
SAM3RT_API const char* sam3rt_report_case(const sam3rt_report* report, size_t index);
SAM3RT_API const char* sam3rt_report_output(const sam3rt_report* report, size_t index);
SAM3RT_API const char* sam3rt_report_metric(const sam3rt_report* report, size_t index);
/* The figure, NaN where outputs hold NaN; the figure allowed; whether it must reach that rather
 * than stay below it, and whether it does so: 0 or 1. Where there is none, 0. */
SAM3RT_API double sam3rt_report_value(const sam3rt_report* report, size_t index);
SAM3RT_API double sam3rt_report_limit(const sam3rt_report* report, size_t index);
SAM3RT_API int32_t sam3rt_report_at_least(const sam3rt_report* report, size_t index);
SAM3RT_API int32_t sam3rt_report_is_within(const sam3rt_report* report, size_t index);
SAM3RT_API void sam3rt_report_free(sam3rt_report* report);

/* Puts a known question to the model and judges the answer, as a readiness probe: one small image
 * and one prompt, about as much as one request. A model that is not well is SAM3RT_OK, too:
 * sam3rt_health_is_healthy says it. `cancellation` may be NULL. */
SAM3RT_API sam3rt_status sam3rt_model_health(const sam3rt_model* model,
                                             const sam3rt_cancellation* cancellation,
                                             sam3rt_health** health, sam3rt_error** error);

/* Whether every output was within its limits: 0 or 1. */
SAM3RT_API int32_t sam3rt_health_is_healthy(const sam3rt_health* health);
/* What was not, or an empty text; what runs the graphs ("onnxruntime", "tensorrt" or
 * "tensorrt-rtx"), where, and in which precision ("fp32", or the recipe of the engines); the
 * bundle's fingerprint. They live as long as the object. */
SAM3RT_API const char* sam3rt_health_problem(const sam3rt_health* health);
SAM3RT_API const char* sam3rt_health_backend(const sam3rt_health* health);
SAM3RT_API const char* sam3rt_health_device(const sam3rt_health* health);
SAM3RT_API const char* sam3rt_health_precision(const sam3rt_health* health);
SAM3RT_API const char* sam3rt_health_fingerprint(const sam3rt_health* health);
/* Seconds of one encoder run and of one decoder run, or 0 where it failed. */
SAM3RT_API double sam3rt_health_encode_seconds(const sam3rt_health* health);
SAM3RT_API double sam3rt_health_decode_seconds(const sam3rt_health* health);
SAM3RT_API void sam3rt_health_free(sam3rt_health* health);

/* --- embeddings --------------------------------------------------------------------------------
 */

/* Loads an embedding that this bundle made, here or in Python. The encoder is not needed for it. */
SAM3RT_API sam3rt_status sam3rt_embedding_load(const sam3rt_model* model, const char* path,
                                               sam3rt_embedding** embedding, sam3rt_error** error);

/* Writes the embedding to a file, whole or not at all. */
SAM3RT_API sam3rt_status sam3rt_embedding_save(const sam3rt_embedding* embedding, const char* path,
                                               sam3rt_error** error);

/* The content of the file that sam3rt_embedding_save writes. */
SAM3RT_API sam3rt_status sam3rt_embedding_to_bytes(const sam3rt_embedding* embedding,
                                                   sam3rt_buffer** buffer, sam3rt_error** error);

/* Loads an embedding from `size` bytes of such content, which are not needed afterwards. */
SAM3RT_API sam3rt_status sam3rt_embedding_from_bytes(const sam3rt_model* model, const void* content,
                                                     size_t size, sam3rt_embedding** embedding,
                                                     sam3rt_error** error);

/* Height and width of the image, pixels. */
SAM3RT_API void sam3rt_embedding_image_size(const sam3rt_embedding* embedding, int64_t* height,
                                            int64_t* width);
/* Height and width of the part of the encoder's input that the image fills. */
SAM3RT_API void sam3rt_embedding_input_size(const sam3rt_embedding* embedding, int64_t* height,
                                            int64_t* width);
/* Memory the feature maps take, bytes. */
SAM3RT_API size_t sam3rt_embedding_nbytes(const sam3rt_embedding* embedding);
/* Of the bundle that made it; other bundles refuse it. Lives as long as the embedding. */
SAM3RT_API const char* sam3rt_embedding_fingerprint(const sam3rt_embedding* embedding);
SAM3RT_API void sam3rt_embedding_free(sam3rt_embedding* embedding);

/* Host copies of an embedding's feature maps, finest first. */
SAM3RT_API sam3rt_status sam3rt_embedding_maps(const sam3rt_embedding* embedding,
                                               sam3rt_maps** maps, sam3rt_error** error);
SAM3RT_API size_t sam3rt_maps_count(const sam3rt_maps* maps);
/* The tensor's name, and its values, [1, C, h, w], of map `index`; an empty text and no axes where
 * there is none. They live as long as the maps. */
SAM3RT_API const char* sam3rt_maps_name(const sam3rt_maps* maps, size_t index);
SAM3RT_API sam3rt_float_array sam3rt_maps_values(const sam3rt_maps* maps, size_t index);
SAM3RT_API void sam3rt_maps_free(sam3rt_maps* maps);

/* --- the predictor -----------------------------------------------------------------------------
 */

typedef struct sam3rt_predictor_options {
    size_t struct_size;
    /* Logits above it are foreground. */
    double mask_threshold;
    /* Background components of at most this many low-resolution pixels are filled, if
     * has_max_hole_area is not 0; otherwise it is as the model's own predictor does it. */
    double max_hole_area;
    int32_t has_max_hole_area;
    /* Foreground components of at most this many low-resolution pixels are removed. */
    double max_sprinkle_area;
} sam3rt_predictor_options;

/* How masks of the image's size are returned: as a byte for each pixel, [C, H, W]; as a bit, the
 * first in the highest bit of a row's first byte, [C, H, ceil(W / 8)]; as COCO's compressed run
 * lengths, as pycocotools writes them. */
#define SAM3RT_MASK_BYTES 0
#define SAM3RT_MASK_BITS 1
#define SAM3RT_MASK_RLE 2

typedef struct sam3rt_predict_options {
    size_t struct_size;
    /* Not 0: the single best guess in place of three masks. */
    int32_t single_mask;
    /* Not 0: logits of the image's size in place of masks. */
    int32_t return_logits;
    /* Not 0: of each object's masks only that of the highest predicted IoU; C is then 1. */
    int32_t best_mask_only;
    /* What stands for foreground in masks, up to 255; 0 stands for 1. */
    int32_t foreground;
    /* Ends the call early; NULL for none. */
    const sam3rt_cancellation* cancellation;
    /* SAM3RT_MASK_BYTES or another of them, which return_logits does not allow. */
    int32_t mask_form;
    /* Memory of the caller's for masks, or for logits if it is aligned for float, in place of the
     * prediction's own, of `output_size` bytes; too few are an invalid input. The prediction's arrays
     * then point there. What a call that fails leaves there is not defined. Not for run lengths, nor
     * for sam3rt_predictor_predict_batch. */
    void* output;
    size_t output_size;
    /* Not 0: `output` is memory of the model's GPU, where masks are to stay, as bytes of 0 and 1;
     * sam3rt_prediction_masks then has its address. That takes a model that runs on TensorRT without
     * ONNX Runtime: another, or memory elsewhere, is an invalid input. The masks are there when the
     * call returns, for any stream to read. */
    int32_t output_on_device;
    /* With output_on_device, a stream that may still be using that memory, as in sam3rt_image: masks
     * are not written before what it was given until the call is done. */
    void* stream;
} sam3rt_predict_options;

/* `options` may be NULL. The predictor keeps what it needs of the model. */
SAM3RT_API sam3rt_status sam3rt_predictor_new(const sam3rt_model* model,
                                              const sam3rt_predictor_options* options,
                                              sam3rt_predictor** predictor, sam3rt_error** error);
SAM3RT_API void sam3rt_predictor_free(sam3rt_predictor* predictor);

SAM3RT_API sam3rt_status sam3rt_predictor_set_image(sam3rt_predictor* predictor,
                                                    const sam3rt_image* image,
                                                    sam3rt_error** error);

/* The predictor keeps what it needs of the embedding. */
SAM3RT_API sam3rt_status sam3rt_predictor_set_embedding(sam3rt_predictor* predictor,
                                                        const sam3rt_embedding* embedding,
                                                        sam3rt_error** error);

/* `images` points to `count` pointers. */
SAM3RT_API sam3rt_status sam3rt_predictor_set_image_batch(sam3rt_predictor* predictor,
                                                          const sam3rt_image* const* images,
                                                          size_t count, sam3rt_error** error);

/* The same; `cancellation` may be NULL. */
SAM3RT_API sam3rt_status sam3rt_predictor_set_image_batch_cancellable(
    sam3rt_predictor* predictor, const sam3rt_image* const* images, size_t count,
    const sam3rt_cancellation* cancellation, sam3rt_error** error);

/* At least one embedding in place of images, likewise; one may come more than once. The predictor
 * keeps what it needs of them. */
SAM3RT_API sam3rt_status sam3rt_predictor_set_embedding_batch(
    sam3rt_predictor* predictor, const sam3rt_embedding* const* embeddings, size_t count,
    sam3rt_error** error);

/* `prompts` and `options` may be NULL. */
SAM3RT_API sam3rt_status sam3rt_predictor_predict(const sam3rt_predictor* predictor,
                                                  const sam3rt_prompts* prompts,
                                                  const sam3rt_predict_options* options,
                                                  sam3rt_prediction** prediction,
                                                  sam3rt_error** error);

/* One entry of `prompts`, which may be NULL, per image of the batch; `predictions` has room for as
 * many results, those that sam3rt_predictor_predict gives for each image. Where
 * sam3rt_model_joins_images says so, objects of several images share runs of the decoder. Either all
 * are stored or none: what is wrong with one entry or embedding fails the call. An error about one
 * of several entries names it, such as "prompts[1].box". */
SAM3RT_API sam3rt_status sam3rt_predictor_predict_batch(
    const sam3rt_predictor* predictor, const sam3rt_prompts* const* prompts, size_t count,
    const sam3rt_predict_options* options, sam3rt_prediction** predictions, sam3rt_error** error);

/* Forgets the image or batch that was set. */
SAM3RT_API void sam3rt_predictor_reset(sam3rt_predictor* predictor);

/* --- predictions --------------------------------------------------------------------------------
 */

/* The arrays of a prediction live as long as it does. With B objects, unless B is 1, each has a
 * leading axis B.
 */

/* [C, H, W], 0 and the value for foreground, or [C, H, ceil(W / 8)] bits; no axes where logits or
 * run lengths were asked for. */
SAM3RT_API sam3rt_mask_array sam3rt_prediction_masks(const sam3rt_prediction* prediction);
/* [C, H, W]; no axes where masks were asked for. */
SAM3RT_API sam3rt_float_array sam3rt_prediction_logits(const sam3rt_prediction* prediction);
/* Run lengths of mask `index`, object by object, where they were asked for; else, or where there is
 * no such mask, an empty text. They live as long as the prediction. */
SAM3RT_API const char* sam3rt_prediction_rle(const sam3rt_prediction* prediction, size_t index);
/* How many masks there are as run lengths. */
SAM3RT_API size_t sam3rt_prediction_rle_count(const sam3rt_prediction* prediction);
/* [C], the predicted IoU of each mask. */
SAM3RT_API sam3rt_float_array sam3rt_prediction_iou(const sam3rt_prediction* prediction);
/* [C, h, w], for mask_input of a later call. */
SAM3RT_API sam3rt_float_array sam3rt_prediction_low_res(const sam3rt_prediction* prediction);
/* [B], positive where the model sees an object; no axes for models without that head. */
SAM3RT_API sam3rt_float_array sam3rt_prediction_object_scores(const sam3rt_prediction* prediction);
/* For a log: why the masks may mean nothing, although the scores look as always. There was no
 * prompt at all, or a point or a box's centre lies far outside the image. An empty text otherwise.
 * Lives as long as the prediction. */
SAM3RT_API const char* sam3rt_prediction_warning(const sam3rt_prediction* prediction);
SAM3RT_API void sam3rt_prediction_free(sam3rt_prediction* prediction);

#ifdef __cplusplus
}
#endif

#endif
