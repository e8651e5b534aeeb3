/// sam3rt: SAM 3's interactive predictor over a bundle, without Python.
///
/// The layers are those of the Python package, with its rules and defaults; errors have the same
/// classes and name the same argument or file. A Model without state turns images into
/// ImageEmbedding values and prompts into masks. A Predictor keeps the embedding of the image set
/// last, and returns masks of the image's size. Bundles and embedding files are the same.
///
/// This interface may change whenever the second number of the version does, and the shared
/// library's soname with it; that of sam3rt.h stays.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

/// What a shared library offers; everything else in it is hidden.
#define SAM3RT_EXPORT __attribute__((visibility("default")))

/// Of ONNX Runtime.
struct OrtEnv;

namespace sam3rt {

/// The library's version, such as "0.1.0".
SAM3RT_EXPORT std::string version();

// --- limits --------------------------------------------------------------------------------------

/// Images have at most this many pixels on a side, and in total. A larger one is an ImageError.
constexpr std::int64_t max_image_side = 65536;
constexpr std::int64_t max_image_pixels = 268435456;
/// One call takes at most this many objects, and this many points for each of them. More are a
/// PromptError.
constexpr std::int64_t max_objects = 1024;
constexpr std::int64_t max_points = 1024;
/// The values of a mask prompt are at most this far from 0; others are a PromptError.
constexpr float max_mask_logit = 1e4F;

// --- errors --------------------------------------------------------------------------------------

/// Base class of everything the library throws on purpose, but for std::system_error where a file
/// cannot be written and std::bad_alloc where memory runs out. A message is one line: blanks stand for
/// the control characters of names that a file brought along.
class SAM3RT_EXPORT Error : public std::runtime_error {
public:
    explicit Error(const std::string& message);
    Error(const Error&) = default;
    ~Error() override;
};

/// An argument has the wrong shape or values. The message reads
/// "ARGUMENT: got WHAT CAME, expected WHAT WAS EXPECTED".
class SAM3RT_EXPORT InvalidInputError : public Error {
public:
    InvalidInputError(std::string argument, const std::string& got, const std::string& expected);
    InvalidInputError(const InvalidInputError&) = default;
    ~InvalidInputError() override;

    /// The name of the offending argument.
    const std::string& argument() const noexcept { return argument_; }

    /// Name the argument as the caller of a further function knows it.
    void rename(const std::string& argument);

private:
    std::string argument_;
};

/// An image is not one the predictor takes.
class SAM3RT_EXPORT ImageError : public InvalidInputError {
public:
    using InvalidInputError::InvalidInputError;
    ImageError(const ImageError&) = default;
    ~ImageError() override;
};

/// A point, box, mask or label is not one the predictor takes.
class SAM3RT_EXPORT PromptError : public InvalidInputError {
public:
    using InvalidInputError::InvalidInputError;
    PromptError(const PromptError&) = default;
    ~PromptError() override;
};

/// A method was called in a state that does not allow it, such as predict before set_image.
class SAM3RT_EXPORT StateError : public Error {
public:
    using Error::Error;
    StateError(const StateError&) = default;
    ~StateError() override;
};

/// A bundle, or an engine built from it, is missing, damaged, tampered with, mixed or too new.
class SAM3RT_EXPORT BundleError : public Error {
public:
    explicit BundleError(const std::string& message, std::string file = "");
    BundleError(const BundleError&) = default;
    ~BundleError() override;

    /// The name of the file at fault, or an empty string.
    const std::string& file() const noexcept { return file_; }

private:
    std::string file_;
};

/// An embedding file or value is damaged or belongs to another model.
class SAM3RT_EXPORT EmbeddingError : public Error {
public:
    using Error::Error;
    EmbeddingError(const EmbeddingError&) = default;
    ~EmbeddingError() override;
};

/// The device or execution provider cannot be used here, or failed.
class SAM3RT_EXPORT BackendError : public Error {
public:
    using Error::Error;
    BackendError(const BackendError&) = default;
    ~BackendError() override;
};

/// A call was cancelled, or its deadline passed, before it had a result.
class SAM3RT_EXPORT CancelledError : public Error {
public:
    using Error::Error;
    CancelledError(const CancelledError&) = default;
    ~CancelledError() override;
};

// --- log lines -----------------------------------------------------------------------------------

enum class LogLevel { debug, info, warning, error };

/// Takes one line of the log. It may be called by any thread, by several at once, and from within
/// calls of the library: it must not call the library. What it throws is dropped.
using LogCallback = std::function<void(LogLevel level, const std::string& line)>;

/// Give the library's lines from `level` on, and ONNX Runtime's, to a callback. It may be called at
/// any time; ONNX Runtime's lines follow the level that holds when a graph is loaded. Without a
/// callback, or with an empty one, ONNX Runtime's errors go to stderr and nothing else anywhere. A
/// callback that is replaced may still be running in another thread. Lines of a host's environment
/// of ONNX Runtime stay with the host.
SAM3RT_EXPORT void set_log_callback(LogCallback callback, LogLevel level = LogLevel::warning);

// --- cancellation --------------------------------------------------------------------------------

/// Ends calls that other threads no longer wait for, by request or at a time.
///
/// Calls that are given it throw CancelledError soon after: also while ONNX Runtime computes, between
/// two nodes of a graph, and while they wait for their turn. A graph that is being loaded is loaded
/// to its end first. A call that is as good as done may still return its result. Copies share one
/// state; every method may be called from many threads at once, cancel() also while calls run.
class SAM3RT_EXPORT Cancellation {
public:
    /// Only cancel() ends calls.
    Cancellation();
    /// Calls end at a time, too; time_point::max() is never.
    explicit Cancellation(std::chrono::steady_clock::time_point deadline);
    /// Calls end some time from now, too. What lies beyond the clock's range is never.
    explicit Cancellation(std::chrono::nanoseconds from_now) : Cancellation(after(from_now)) {}

    /// End the calls under way that were given this object or a copy of it, and all later ones.
    void cancel() const noexcept;

    /// Whether cancel() was called or the deadline has passed.
    bool cancelled() const noexcept;

    struct State;
    State& state() const noexcept { return *state_; }

private:
    static std::chrono::steady_clock::time_point after(std::chrono::nanoseconds time) {
        using TimePoint = std::chrono::steady_clock::time_point;
        const TimePoint now = std::chrono::steady_clock::now();
        return time < TimePoint::max() - now ? now + time : TimePoint::max();
    }

    std::shared_ptr<State> state_;
};

// --- values --------------------------------------------------------------------------------------

/// Sizes along the axes of an array, slowest first.
using Shape = std::vector<std::int64_t>;

/// How many elements a shape has.
/// Throws InvalidInputError where a size is negative or the number overflows.
SAM3RT_EXPORT std::size_t element_count(const Shape& shape);

/// A dense array in row-major order that owns its elements. One that was moved from has none; it
/// may be copied, assigned and destroyed.
template <typename T>
class Array {
public:
    /// An empty array of shape [0].
    Array() : Array(Shape{0}) {}

    /// An array whose elements are not initialized.
    explicit Array(Shape shape)
        : shape_(std::move(shape)), size_(element_count(shape_)), values_(new T[size_]) {}

    /// An array with a copy of `size` elements at `values`.
    /// Throws InvalidInputError where that is not what the shape holds.
    Array(Shape shape, const T* values, std::size_t size) : Array(checked(std::move(shape), size)) {
        std::copy_n(values, size, values_.get());
    }

    /// An array with a copy of `values`, which must be as many as the shape holds.
    Array(Shape shape, const std::vector<T>& values)
        : Array(std::move(shape), values.data(), values.size()) {}

    /// [N]: one axis.
    static Array list(std::initializer_list<T> values) {
        return Array(Shape{static_cast<std::int64_t>(values.size())}, values.begin(),
                     values.size());
    }

    /// [N, M]: rows of equal length. Throws InvalidInputError where they are not.
    static Array rows(std::initializer_list<std::initializer_list<T>> rows) {
        const std::size_t width = rows.size() == 0 ? 0 : rows.begin()->size();
        std::vector<T> values;
        for (const auto& row : rows) {
            if (row.size() != width) {
                throw InvalidInputError("rows", "rows of different lengths", "equal lengths");
            }
            values.insert(values.end(), row.begin(), row.end());
        }
        return Array(
            Shape{static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(width)},
            values);
    }

    Array(const Array& other)
        : shape_(other.shape_), size_(other.size_), values_(new T[other.size_]) {
        std::copy_n(other.values_.get(), size_, values_.get());
    }
    Array(Array&& other) noexcept
        : shape_(std::move(other.shape_)), size_(other.size_), values_(std::move(other.values_)) {
        other.shape_.clear();
        other.size_ = 0;
    }
    Array& operator=(Array other) noexcept {
        std::swap(shape_, other.shape_);
        std::swap(size_, other.size_);
        std::swap(values_, other.values_);
        return *this;
    }
    ~Array() = default;

    const Shape& shape() const noexcept { return shape_; }
    std::size_t size() const noexcept { return size_; }
    T* data() noexcept { return values_.get(); }
    const T* data() const noexcept { return values_.get(); }
    T& operator[](std::size_t index) { return values_[index]; }
    const T& operator[](std::size_t index) const { return values_[index]; }
    const T* begin() const noexcept { return values_.get(); }
    const T* end() const noexcept { return values_.get() + size_; }

    /// A copy of entry `index` of the first axis, which stays with size 1: [C, h, w] gives [1, h,
    /// w]. Throws InvalidInputError where there is no such entry.
    Array select(std::size_t index) const {
        if (shape_.empty() || index >= static_cast<std::size_t>(shape_[0])) {
            throw InvalidInputError("index", std::to_string(index), "an entry of the first axis");
        }
        Shape shape = shape_;
        shape[0] = 1;
        const std::size_t step = size_ / static_cast<std::size_t>(shape_[0]);
        return Array(std::move(shape), values_.get() + index * step, step);
    }

    /// The same elements under another shape, without a copy. Throws InvalidInputError where that
    /// holds another number of elements.
    Array reshaped(Shape shape) && {
        shape_ = checked(std::move(shape), size_);
        return std::move(*this);
    }

private:
    static Shape checked(Shape shape, std::size_t size) {
        if (element_count(shape) != size) {
            throw InvalidInputError("values", std::to_string(size) + " elements",
                                    std::to_string(element_count(shape)) + " for the shape");
        }
        return shape;
    }

    Shape shape_;
    std::size_t size_;
    std::unique_ptr<T[]> values_;
};

/// A size in pixels.
struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;

    bool operator==(const Size& other) const {
        return height == other.height && width == other.width;
    }
    bool operator!=(const Size& other) const { return !(*this == other); }
};

/// The bytes of an image. The first five are interleaved: the bytes of a pixel, in memory order.
/// Alpha is left out; grey is taken for all three colours.
enum class PixelFormat {
    rgb,
    bgr,
    rgba,
    bgra,
    grey,
    /// Three planes: red, green, blue.
    planar,
    /// Video: a plane of luma, then one of half the height with a pair of chroma values for each 2 x
    /// 2 pixels, blue first. Both sides are even. Levels are those of limited range, the matrix that
    /// of BT.601, as OpenCV takes NV12; colours are computed as OpenCV does, without interpolation.
    nv12,
    /// The same with the matrix of BT.709, as HD video mostly has it.
    nv12_bt709,
};

/// An 8-bit image in the caller's memory, which is only read, and only during the call. It has at
/// most max_image_side pixels on a side and max_image_pixels in total.
///
/// A model that runs on TensorRT without ONNX Runtime takes images in the memory of its GPU as well,
/// in any format. The encoder then waits for what `stream` was given before the call, and the
/// calling thread does not; what is done to the image after the call has returned is no concern of
/// the library's. Other models, and images in host memory or in another GPU's that are said to be in
/// device memory, are an ImageError; no NVRTC is a BackendError.
struct ImageView {
    /// First pixel of the first row: R, G, B, R, G, B, ... unless `format` says otherwise.
    const std::uint8_t* pixels = nullptr;
    std::int64_t height = 0;
    std::int64_t width = 0;
    /// Bytes from one row to the next, at least those of its pixels, for which 0 stands too. An
    /// interleaved image that is stored bottom up has a negative stride, and `pixels` is still the
    /// first pixel of the first row, which stands last in memory. All rows together span less than
    /// 2^62 bytes.
    std::ptrdiff_t row_stride = 0;
    PixelFormat format = PixelFormat::rgb;
    /// For images of planes: bytes from one plane to the next; 0 where one follows the other's rows.
    /// All planes have the same row_stride. 0 for other images.
    std::size_t plane_stride = 0;
    /// Whether `pixels` is an address in the memory of the model's GPU.
    bool on_device = false;
    /// Where the image is in device memory, the stream on which it is written (cudaStream_t or
    /// CUstream, of the GPU's primary context, and not being recorded); null for CUDA's default
    /// stream.
    void* stream = nullptr;
};

/// Prompts for one image. Everything may be absent; a call without any prompt is legal.
/// B counts objects, at most max_objects; each has at most max_points points. With B 0 the results
/// are empty.
struct Prompts {
    /// [N, 2] or [B, N, 2], (x, y) in pixels of the original image.
    std::optional<Array<float>> point_coords;
    /// [N] or [B, N]: 1 foreground, 0 background, 2 and 3 the top left and bottom right corner of a
    /// box, -1 "not a point". The model has an embedding for -1: such a point has no place, and
    /// still changes the masks.
    std::optional<Array<std::int64_t>> point_labels;
    /// [B], for objects with different numbers of points: how many each has. point_coords is then
    /// [N, 2], one object's points after the other's, and point_labels [N]. Each object's result is
    /// that of a call of its own.
    std::optional<Array<std::int64_t>> point_counts;
    /// [4] or [B, 4], x0, y0, x1, y1.
    std::optional<Array<float>> box;
    /// [1, h, w] or [B, 1, h, w] low-resolution logits of an earlier call, from -max_mask_logit to
    /// max_mask_logit.
    std::optional<Array<float>> mask_input;
    /// Coordinates are pixels; false takes them as already in [0, 1].
    bool normalize_coords = true;
};

// --- the bundle's description --------------------------------------------------------------------

/// One file of a bundle.
struct FileEntry {
    std::string file;
    std::string sha256;
    std::uint64_t bytes = 0;
};

/// One axis of a graph's tensor: a size, or the name of a dynamic axis.
using Axis = std::variant<std::int64_t, std::string>;

/// One input or output of a graph.
struct TensorSpec {
    std::string name;
    /// "float32", "float16", "int64", "int32" or "bool".
    std::string dtype;
    std::vector<Axis> shape;
};

/// One ONNX graph.
struct GraphSpec {
    FileEntry model;
    /// Files that hold its weights, empty where they are inside.
    std::vector<FileEntry> external_data;
    std::int64_t opset = 0;
    std::int64_t nodes = 0;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
};

/// How an image becomes the encoder's input.
struct ImageSpec {
    enum class Resize { stretch, longest_side };
    enum class Rounding { float32, uint8 };

    /// Of the encoder's input.
    Size size;
    /// Ignore the aspect ratio (SAM 3), or keep it and pad at the bottom and right (MobileSAM).
    Resize resize = Resize::stretch;
    /// Whether the antialiased bilinear resize rounds to whole levels.
    Rounding resize_dtype = Rounding::float32;
    /// Per RGB channel, on the 0..255 scale.
    float mean[3] = {0, 0, 0};
    float std[3] = {1, 1, 1};
    /// Value of padding, applied after normalization.
    float pad_value = 0;
};

/// How prompts become labelled points.
struct PromptSpec {
    enum class BoxPosition { before_points, after_points };
    enum class PaddingPoint { always, without_box };

    BoxPosition box_position = BoxPosition::before_points;
    /// When one point (0, 0) labelled -1 is appended: where there is any point or box, or only
    /// where there is no box. Without any point and box there is never one.
    PaddingPoint padding_point = PaddingPoint::always;
    /// Of a mask prompt.
    Size mask_size;
};

/// What the decoder returns and how it is brought to the image's size.
struct MaskSpec {
    enum class Upsampling { direct, unpad };

    /// Masks per object in a multi-mask call.
    std::int64_t multimask = 0;
    Size low_res_size;
    /// Returned low-resolution logits are clamped to plus or minus this, if it is given.
    std::optional<float> low_res_limit;
    /// Resize to the original size (SAM 3), or to the encoder's input size, crop the padding, then
    /// resize (MobileSAM).
    Upsampling upsampling = Upsampling::direct;
    /// The hole area that the model's own predictor fills unless told otherwise.
    double max_hole_area = 0;
};

/// Where the weights came from.
struct SourceSpec {
    std::string kind;
    std::string reference;
    std::string sha256;
    std::string license;
    std::optional<FileEntry> license_file;
    /// Type the checkpoint stores its weights in, such as "bfloat16"; empty where it is not known.
    std::string weights;
    /// What a user should know of how the model came about.
    std::vector<std::string> notes;
};

/// How far outputs may be from the parity record's FP32 reference.
struct ParityLimits {
    double feature_error = 0;
    double feature_cosine = 0;
    double logit_error = 0;
    double iou_error = 0;
    double mask_iou = 0;
};

/// The content of bundle.json.
struct Manifest {
    /// SHA-256 of bundle.json with these 64 digits zeroed.
    std::string fingerprint;
    /// Stands in the metadata of both graphs.
    std::string export_id;
    std::string name;
    /// "sam3", "efficient_sam3", "sam2" or "mobile_sam".
    std::string model_type;
    /// Type the weights are stored in, "float32" or "float16"; computation is FP32 either way.
    std::string weights;
    SourceSpec source;
    ImageSpec image;
    PromptSpec prompts;
    MaskSpec masks;
    GraphSpec encoder;
    GraphSpec decoder;
    FileEntry parity_record;
    ParityLimits parity_limits;
    std::map<std::string, std::string> producer;

    /// Every file the manifest vouches for.
    SAM3RT_EXPORT std::vector<FileEntry> files() const;
};

// --- the model -----------------------------------------------------------------------------------

/// Use the host's environment of ONNX Runtime, with its logger and its threads, in place of one of
/// our own. A process has one environment: whoever creates it first decides. It must live for as
/// long as anything of this library. Throws InvalidInputError where it is null, and StateError
/// where the library has one already, because a model was loaded before, or was built without ONNX
/// Runtime.
///
/// Without one, the first model creates it, and sets ORT_DISABLE_TELEMETRY=1 in the environment of
/// the process where that is not set: ONNX Runtime would report to its maker, and takes no other
/// word for it. Set the variable yourself where other threads may read the environment then.
SAM3RT_EXPORT void set_ort_environment(OrtEnv* environment);

/// How many threads the pool has that models without ModelOptions::threads share, in place of as
/// many as the machine has cores. A host's environment has a pool of its own. Throws
/// InvalidInputError where the number is not positive, else StateError as set_ort_environment does.
SAM3RT_EXPORT void set_shared_threads(int threads);

/// An image's feature maps on the device that made them, and where the image lies in them.
///
/// A value: copies are cheap, share the maps, never change, and may be used by many threads.
class SAM3RT_EXPORT ImageEmbedding {
public:
    /// (height, width) of the image.
    Size original_size() const noexcept;
    /// The part of the encoder's input that the image fills.
    Size input_size() const noexcept;
    /// Of the bundle that made it; other bundles refuse it.
    const std::string& fingerprint() const noexcept;
    /// The maps' tensor names, finest first.
    const std::vector<std::string>& names() const noexcept;
    /// Memory the feature maps take, bytes.
    std::size_t nbytes() const noexcept;

    /// Host copies of the feature maps, [1, C, h, w] each, finest first.
    /// Throws BackendError where they cannot be brought from the device.
    std::vector<Array<float>> maps() const;

    /// Write the embedding to a file, whole or not at all; the Python runtime reads it too.
    /// Throws std::system_error where the file cannot be written, EmbeddingError where a map holds
    /// NaN or an infinity.
    void save(const std::filesystem::path& path) const;

    /// The content of the file that save() writes, for a cache or a network.
    /// Throws BackendError as maps() does, EmbeddingError where a map holds NaN or an infinity.
    std::vector<std::uint8_t> to_bytes() const;

    struct Data;
    explicit ImageEmbedding(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
    const Data& data() const noexcept { return *data_; }

private:
    std::shared_ptr<const Data> data_;
};

/// What the decoder says of P objects.
struct DecodedMasks {
    /// [P, C, h, w], unclamped logits; C is 1 in a single-mask call.
    Array<float> low_res_masks;
    /// [P, C], the predicted IoU of each mask.
    Array<float> iou_predictions;
    /// [P], positive where the model sees an object; absent for models without that head.
    std::optional<Array<float>> object_score_logits;
    /// For a log: why the masks may mean nothing, although the scores look as always. There was no
    /// prompt at all, or a point or a box's centre lies further outside the image than a tenth of
    /// its side. Empty otherwise. Python's PromptWarning.
    std::string warning;
};

/// One file of a bundle in memory, such as "bundle.json" or "encoder.onnx".
struct BundleFile {
    std::string name;
    const void* content = nullptr;
    std::size_t size = 0;
    /// Keeps the content alive, and is let go of when the content is no longer needed; may be null.
    std::shared_ptr<const void> owner;
};

/// How a model is loaded.
struct ModelOptions {
    /// What runs the graphs. ONNX Runtime: "cpu"; "cuda" or "cuda:N". TensorRT: "tensorrt" or
    /// "tensorrt-rtx", also with ":N", which use engines that `sam3rt build` made; where this
    /// library was built with TensorRT's headers, without ONNX Runtime, and else by its execution
    /// provider. "auto" takes the first that works of TensorRT without ONNX Runtime, CUDA and the
    /// CPU; the log says why one was passed over. Engines serve once they have passed the gate on
    /// this machine, for this user: those that nobody has judged here are compared with the
    /// bundle's parity record when a model is loaded, once, which at full size takes a minute or
    /// two. The verdicts lie in the user's cache folder; Python goes by the same.
    std::string device = "auto";
    /// Threads on the CPU, for each graph of the model; 0 shares one pool of threads, as many as
    /// the machine has cores, with all models of the process that do so. Neither takes processor
    /// time between runs. The model's own threads wait actively while a graph runs, which may be
    /// faster on a machine without other work; those of the pool sleep.
    int threads = 0;
    /// How many threads may run the encoder at once; others wait for their turn. One encode uses
    /// all cores unless `threads` says otherwise, so more at once take more memory, not less time.
    int concurrent_encodes = 1;
    /// The same for the decoder, which runs on at most 8 objects at a time. Without ONNX Runtime,
    /// it runs on as many objects as the engine takes, each of these threads has memory of its own
    /// on the device, and one thread at a time runs the encoder.
    int concurrent_decodes = 4;
    /// Hash every file against the manifest first. A graph and its weights are hashed in any case
    /// when they are loaded.
    bool check_files = true;
    /// Let ONNX Runtime map weights that lie beside a graph, in place of a copy in this process's
    /// own memory. That takes less memory, but the weights are read after check_files hashed them,
    /// and change when their file does: only for a folder that nobody else can write to.
    bool map_weights = false;
    /// Refuse any bundle but the one with this fingerprint, if it is given.
    std::optional<std::string> expected_fingerprint;
    /// For TensorRT: the engine folder to use, in place of the fastest recipe that passes. A path,
    /// or the name of a folder in the bundle's "engines".
    std::filesystem::path engine_folder;
    /// For ONNX Runtime on a GPU: options of the execution provider, by the names that ONNX Runtime
    /// documents for it, such as {"gpu_mem_limit", "4294967296"} for "cuda". `device` must name the
    /// provider; "device_id" and "use_tf32" are the library's.
    std::map<std::string, std::string> provider_options;
    /// For ONNX Runtime on the CPU, with `threads`: where each thread but the calling one may run,
    /// as its option "session.intra_op_thread_affinities" has it: processors from 1 on, with a
    /// semicolon between threads, such as "3;4" with 3 threads. Empty leaves it to the system.
    std::string thread_affinities;
    /// Threads of the model's own also wait actively between runs: the next one begins sooner, and
    /// they take all the processor time that they can get. Only with `threads`.
    bool spin_between_runs = false;
    /// ONNX Runtime keeps memory on the CPU for the next run in an arena, which shrinks after images,
    /// and where a click follows a call about several objects. Without one, every buffer is asked of
    /// the process's malloc, which then decides what is kept.
    bool memory_arena = true;
    /// ONNX Runtime takes memory of allocators that the host registered with the environment it gave
    /// to set_ort_environment.
    bool environment_allocators = false;
};

/// One comparison with a bundle's parity record.
struct Measurement {
    /// The image or case it is about, such as "image 0" or "click_0".
    std::string case_name;
    /// Which of the outputs, such as "features 0", "logits", "masks" or "predicted IoU".
    std::string output;
    /// What was measured, such as "cosine", "relative error" or "mean IoU".
    std::string metric;
    /// The figure; NaN where outputs hold NaN.
    double value = 0;
    /// The figure allowed.
    double limit = 0;
    /// Whether the figure must reach the limit rather than stay below it.
    bool at_least = false;

    /// Whether the figure is within its limit; NaN never is.
    bool passed() const noexcept { return at_least ? value >= limit : value <= limit; }
};

/// How a model's outputs compare with its bundle's parity record.
struct VerifyReport {
    /// Whether something was compared and all of it is within its limits.
    bool passed = false;
    /// How the worst failures fail, or that nothing does.
    std::string explanation;
    /// Every comparison that was made.
    std::vector<Measurement> measurements;
};

/// What a model answered to a known question.
struct Health {
    /// Whether every output was within its limits.
    bool healthy = false;
    /// What was not, or empty.
    std::string problem;
    /// What runs the graphs: "onnxruntime", "tensorrt" or "tensorrt-rtx".
    std::string backend;
    /// Where, such as "cpu" or "cuda:0".
    std::string device;
    /// What they compute in: "fp32", or the recipe of the engines.
    std::string precision;
    /// Of the bundle.
    std::string fingerprint;
    /// Time of one encoder run and of one decoder run, or 0 where it failed.
    double encode_seconds = 0;
    double decode_seconds = 0;
};

/// A bundle on a device. Holds no per-image state; copies are cheap and share what is loaded; every
/// method may be called from many threads at once.
///
/// A graph that could not be loaded is not tried again by every call: each throws the same error at
/// once, until prepare() tries again.
class SAM3RT_EXPORT Model {
public:
    /// Open a bundle folder, a relative one from the current folder as it is now. Graphs are loaded
    /// at first use, or by prepare() or warm_up(); engines, without ONNX Runtime, now.
    /// Throws InvalidInputError where an option makes no sense; BundleError where the bundle is
    /// missing, damaged, mixed, too new or not the expected one; BackendError where the device
    /// cannot be used here.
    static Model load(const std::filesystem::path& bundle, const ModelOptions& options = {});

    /// Open a bundle whose files lie in memory: bundle.json and those that it lists; others are left
    /// alone. They are checked as in a folder, and read where they are, without a copy: ONNX Runtime
    /// makes its own of what it keeps. The content of a graph's files must stay as it is until the
    /// graph has been loaded, at its first use or by prepare(), or the model and everything made of
    /// it is gone; the rest is not needed after the call. path() is then empty. Engines lie beside a
    /// bundle in a folder, so "auto" passes TensorRT over.
    /// Throws InvalidInputError where a file comes twice or has no content, or with map_weights; else
    /// as load does.
    static Model load_from_memory(const std::vector<BundleFile>& files,
                                  const ModelOptions& options = {});

    /// Run the encoder on one image.
    /// Throws ImageError where it is not an image, BackendError where the device failed,
    /// CancelledError where `cancellation` is given and says so.
    ImageEmbedding encode(const ImageView& image, const Cancellation* cancellation = nullptr) const;

    /// Run the encoder on several images, of any sizes: together, as many at a time as engines take,
    /// without ONNX Runtime; else one after the other. Throws as encode(), before anything runs
    /// where one of them is not an image.
    std::vector<ImageEmbedding> encode_batch(const std::vector<ImageView>& images,
                                             const Cancellation* cancellation = nullptr) const;

    /// Run the decoder on one image's prompts: three masks per object, or the single one.
    /// Throws PromptError where a prompt is malformed, EmbeddingError where the embedding belongs
    /// to another bundle or device, BackendError where the device failed or returned scores that
    /// are not finite, as for an embedding that holds such values; CancelledError where
    /// `cancellation` is given and says so.
    DecodedMasks decode(const ImageEmbedding& embedding, const Prompts& prompts,
                        bool multimask_output = true,
                        const Cancellation* cancellation = nullptr) const;

    /// Load an embedding that this bundle made, here or in Python. The encoder is not needed for
    /// it. Throws EmbeddingError where the file is missing, damaged, from another bundle, or holds
    /// NaN.
    ImageEmbedding load_embedding(const std::filesystem::path& path) const;

    /// The same from `size` bytes of memory, of ImageEmbedding::to_bytes, of a file or of Python's
    /// ImageEmbedding.to_bytes. They are not needed afterwards.
    ImageEmbedding embedding_from_bytes(const void* content, std::size_t size) const;

    /// Load both graphs now instead of at their first use, also one that could not be loaded
    /// before.
    void prepare() const;

    /// Load both graphs and run each once, so that the first request is not the slow one.
    void warm_up() const;

    /// Run the bundle's parity record, encoder and decoder, and compare every output: with the
    /// bundle's own limits in FP32, with the gate's in anything less, as `sam3rt verify` does. At
    /// the published SAM 3's size it takes a minute or two. Files are hashed by load, see
    /// ModelOptions::check_files, and graphs when they are loaded.
    /// Throws BundleError where the record is damaged, or a graph is; BackendError where the device
    /// failed; CancelledError where `cancellation` is given and says so.
    VerifyReport verify(const Cancellation* cancellation = nullptr) const;

    /// Put a known question to the model and judge the answer, as a readiness probe: one small
    /// image and one prompt, about as much as one request. Throws nothing for a model that is not
    /// well; CancelledError where `cancellation` is given and says so.
    Health health(const Cancellation* cancellation = nullptr) const;

    /// Whether Predictor::predict_batch runs the decoder on objects of several images at once, which
    /// takes TensorRT without ONNX Runtime, and a bundle and engines whose decoder takes several.
    bool joins_images() const;

    /// Whether the encoder's graph has been loaded so far. Does not wait for one that is loading.
    bool encoder_loaded() const;

    const Manifest& manifest() const noexcept;
    /// The text of bundle.json, UTF-8.
    const std::string& manifest_json() const noexcept;
    /// The bundle's folder, as an absolute path; empty for one in memory.
    const std::filesystem::path& path() const noexcept;
    /// Where the graphs run, such as "cpu" or "cuda:0".
    std::string device() const;

    struct Data;
    explicit Model(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
    const Data& data() const noexcept { return *data_; }

private:
    std::shared_ptr<const Data> data_;
};

// --- the predictor -------------------------------------------------------------------------------

/// How a predictor cleans and thresholds masks.
struct PredictorOptions {
    /// Logits above it are foreground.
    double mask_threshold = 0.0;
    /// Background components of at most this many low-resolution pixels are filled; 0 disables.
    /// Unless given, it is that of the model's own predictor: 256 for SAM 3, 0 for MobileSAM.
    std::optional<double> max_hole_area;
    /// Foreground components of at most this many low-resolution pixels are removed; 0 disables.
    double max_sprinkle_area = 0.0;
};

/// How masks of the image's size are returned.
enum class MaskForm {
    /// A byte for each pixel, 0 and PredictOptions::foreground: [C, H, W].
    bytes,
    /// A bit for each pixel, the first in the highest bit of a row's first byte; each row begins a
    /// byte, as numpy.packbits has it along the last axis: [C, H, ceil(W / 8)].
    bits,
    /// COCO's compressed run lengths as pycocotools writes them ("counts", of "size" [H, W]).
    rle,
};

/// What one call of predict is asked for.
struct PredictOptions {
    /// Three masks of different extent, or the single best guess.
    bool multimask_output = true;
    /// Return logits of the image's size instead of thresholded masks.
    bool return_logits = false;
    /// Of each object's masks return only that of the highest predicted IoU; C is then 1.
    bool best_mask_only = false;
    /// What stands for foreground in masks, such as 255; not 0.
    std::uint8_t foreground = 1;
    /// Ends the call early; not owned. Decoding stops as in Model::decode, and so does making masks
    /// of the image's size, after the one it is at.
    const Cancellation* cancellation = nullptr;
    /// Not with return_logits, unless it is MaskForm::bytes.
    MaskForm form = MaskForm::bytes;
    /// Memory of the caller's for masks, or for logits if it is aligned for float, in place of the
    /// result's own: at least as many bytes as Prediction::shape says, and `output_size` at most.
    /// What a call that throws leaves there is not defined. Not for run lengths, nor for
    /// predict_batch.
    void* output = nullptr;
    std::size_t output_size = 0;
    /// Whether `output` is memory of the model's GPU, where masks are to stay: bytes of 0 and 1.
    /// That takes a model that runs on TensorRT without ONNX Runtime; InvalidInputError for another,
    /// or for memory elsewhere, and BackendError where masks cannot be made on the GPU. The masks
    /// are there when the call returns, for any stream to read.
    bool output_on_device = false;
    /// With output_on_device, a stream that may still be using that memory, as ImageView::stream:
    /// masks are not written before what it was given until the call is done. The calling thread
    /// does not wait for it by itself.
    void* stream = nullptr;
};

/// Masks of the image's size. With B objects, unless B is 1, every array has a leading axis B.
struct Prediction {
    /// Masks as bytes or bits, see MaskForm; of shape [0] with return_logits, with run lengths, or
    /// where they are in PredictOptions::output.
    Array<std::uint8_t> masks;
    /// [C, H, W] with return_logits; else, or where they are in PredictOptions::output, of shape [0].
    Array<float> logits;
    /// Run lengths of all masks, object by object, if they were asked for.
    std::vector<std::string> rle;
    /// Of the masks or logits, wherever they are: [C, H, ceil(W / 8)] for bits, else [C, H, W].
    Shape shape;
    /// [C], the predicted IoU of each mask.
    Array<float> iou_predictions;
    /// [C, h, w], for Prompts::mask_input of a later call.
    Array<float> low_res_masks;
    /// [B], positive where the model sees an object; absent for models without that head.
    std::optional<Array<float>> object_score_logits;
    /// Why the masks may mean nothing, or empty: see DecodedMasks::warning.
    std::string warning;
};

/// Segments objects of one image, or of a batch of images, from clicks, boxes and masks.
///
/// Keeps the embeddings of the images set last; everything else is Model. One predictor serves one
/// thread at a time; many predictors may share one model. A call that throws leaves the predictor
/// as it was.
class SAM3RT_EXPORT Predictor {
public:
    /// Throws InvalidInputError where an option is not a finite number.
    explicit Predictor(Model model, const PredictorOptions& options = {});

    /// Encode an image, so that predict can be called on it. Throws as Model::encode.
    void set_image(const ImageView& image, const Cancellation* cancellation = nullptr);

    /// Use an embedding made or loaded earlier in place of an image.
    void set_embedding(ImageEmbedding embedding);

    /// Encode several images, of any sizes, so that predict_batch can be called on them; predict
    /// then uses the last of them. Throws ImageError where there is none or one is not an image.
    void set_image_batch(const std::vector<ImageView>& images,
                         const Cancellation* cancellation = nullptr);

    /// Use embeddings made or loaded earlier in place of images, so that predict_batch can be called
    /// on them; one may come more than once. predict then uses the last of them. Throws
    /// InvalidInputError where there is none.
    void set_embedding_batch(std::vector<ImageEmbedding> embeddings);

    /// Predict masks from prompts on the image set last.
    /// Throws StateError where no image is set, InvalidInputError where the options contradict each
    /// other or `output` is too small, else as Model::decode.
    Prediction predict(const Prompts& prompts, const PredictOptions& options = {}) const;

    /// Predict masks on every image of the batch set last, with one entry of `prompts` per image:
    /// those that predict gives for each, in their order. Where Model::joins_images() says so, objects
    /// of several images share runs of the decoder; else one image comes after the other. All prompts
    /// and embeddings are checked first: what is wrong with one fails the call.
    /// Throws StateError where no batch is set, PromptError where there is not one entry per image,
    /// else as Model::decode; one of several entries is named, such as "prompts[1].box".
    std::vector<Prediction> predict_batch(const std::vector<Prompts>& prompts,
                                          const PredictOptions& options = {}) const;

    /// Forget the image or batch that was set.
    void reset() noexcept;

    const Model& model() const noexcept { return model_; }

private:
    Model model_;
    double mask_threshold_;
    double max_hole_area_;
    double max_sprinkle_area_;
    std::vector<ImageEmbedding> embeddings_;
    bool is_batch_ = false;
};

}  // namespace sam3rt
