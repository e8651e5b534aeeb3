// What runs the two graphs of a bundle: ONNX Runtime, or TensorRT itself.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "accuracy.hpp"
#include "bundle.hpp"
#include "device.hpp"
#include "geometry.hpp"
#include "postprocess.hpp"
#include "prompts.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// One image's feature maps, wherever the backend that made them keeps them.
class Features {
public:
    Features() = default;
    Features(const Features&) = delete;
    Features& operator=(const Features&) = delete;
    virtual ~Features() = default;

    /// Where they are, such as "cpu" or "cuda:0".
    virtual std::string device() const = 0;

    /// Memory they take, bytes.
    virtual std::size_t nbytes() const = 0;

    /// Copies on the host, [1, C, h, w] each. Throws BackendError where they cannot be made.
    virtual std::vector<Array<float>> maps() const = 0;
};

/// Masks that a backend may make where the decoder's logits are, on the device.
struct DeviceMasks {
    const ImageGeometry& geometry;
    const Cleaning& cleaning;
    /// Device memory of the caller's for them, which the backend must make then, or null; its size
    /// in bytes; the stream that may still be using it.
    void* output;
    std::size_t output_size;
    void* stream;
    /// Whether `output` is for each object's mask of the highest predicted IoU alone.
    bool best_only;
    /// Those of the decoder's first output, [P, C, H, W] of 0 and 1, if the backend made them and
    /// there is no `output`.
    std::optional<Array<std::uint8_t>> masks;
};

/// What is asked about one image.
struct DecoderCall {
    const Features& features;
    const PackedPrompts& prompts;
    /// Masks that may be made as well, or null.
    DeviceMasks* masks;
};

/// Why memory cannot be used: what came, and what was expected.
struct Refusal {
    std::string got;
    std::string expected;
};

/// The two graphs on one device. Every method may be called from many threads at once.
class Backend {
public:
    Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;
    virtual ~Backend() = default;

    virtual const Device& device() const = 0;
    /// What it computes in: "fp32", or the recipe of the engines.
    virtual std::string precision() const = 0;
    /// What computes: "onnxruntime", "tensorrt" or "tensorrt-rtx".
    std::string name() const;

    /// Preprocess checked images and run the encoder on them, together where the backend gains by
    /// it; the features stay on the device.
    virtual std::vector<std::shared_ptr<const Features>> encode(
        const std::vector<ImageView>& images, const std::vector<ImageGeometry>& geometries,
        const Cancellation* cancellation) const = 0;

    /// Why an address is not one in device memory that images can be read from and masks written
    /// to, if it is not.
    virtual std::optional<Refusal> refuses(const void* address) const;

    /// Bring feature maps, [1, C, h, w] each, to the device.
    virtual std::shared_ptr<const Features> upload(const std::vector<Array<float>>& maps) const = 0;

    /// Run the decoder for calls about an image each, together where the backend gains by it, and
    /// bring each call's named outputs, [1, P, ...], to the host, in the order asked for. It runs on
    /// a few objects at a time: memory does not grow with the number of objects. The backend may
    /// make a call's `masks` too. Of several calls none may have an `output` for them.
    virtual std::vector<std::vector<Array<float>>> decode(
        const std::vector<DecoderCall>& calls, const std::vector<std::string>& outputs,
        const Cancellation* cancellation) const = 0;

    /// Whether decode() runs the decoder on objects of several images at once.
    virtual bool joins_images() const { return false; }

    /// Load both graphs now, also one that could not be loaded before.
    virtual void prepare() const = 0;

    virtual bool encoder_loaded() const = 0;
};

/// What the accuracy gate runs. The backend and `cancellation`, which may be null, must outlive it.
Runner runner_of(const Backend& backend, const Cancellation* cancellation);

/// The backend for what options ask for. "auto" takes the first that works of TensorRT, ONNX
/// Runtime with CUDA, and ONNX Runtime on the CPU, as far as they are built in; the log says why
/// one was passed over. What a backend keeps of the bundle is a reference.
/// Throws InvalidInputError where an option makes no sense, BackendError where the device is not
/// usable here or has no engines, BundleError where an engine was changed.
std::shared_ptr<const Backend> open_backend(const Bundle& bundle, const ModelOptions& options);

/// ONNX Runtime on a device, for open_backend, if the library is built with it.
std::shared_ptr<const Backend> open_ort_backend(const Bundle& bundle, const ModelOptions& options,
                                                const Device& device);

/// Empty where ONNX Runtime can compute on a device, else why not.
std::string ort_failure(const Device& device);

/// TensorRT itself on a GPU, likewise.
std::shared_ptr<const Backend> open_tensorrt_backend(const Bundle& bundle,
                                                     const ModelOptions& options,
                                                     const Device& device);

/// The kind of TensorRT that the library is built with.
Provider built_in_tensorrt();

}  // namespace sam3rt
