// Runs the two graphs of a bundle as TensorRT engines, without ONNX Runtime.
//
// A call queues its work on the stream of a lane and waits for it: one lane encodes, and decoder
// lanes are made as threads need them. Images and masks are resized on the device, once that has
// been compared with what the host does.
#include "backend.hpp"

#include <algorithm>
#include <cmath>
#include <optional>

#include "cancellation.hpp"
#include "engines.hpp"
#include "errors.hpp"
#include "gpu.hpp"
#include "log.hpp"
#include "tensorrt/encoder.hpp"
#include "tensorrt/pool.hpp"
#include "tensorrt/together.hpp"
#include "turnstile.hpp"

namespace sam3rt {
namespace {

// Of values up to about 2.6; FP32 sums of matrix multiplications reach 1e-6.
constexpr float pixel_error = 1e-3F;
// The part of pixels whose logit is within rounding of the threshold.
constexpr double differing_pixels = 1e-4;

/// Load an engine from the content that was hashed. Each engine keeps its own compiled kernels: of
/// two that wrote one file, each would remove the other's.
std::shared_ptr<Engine> load(const EngineFile& engine, const Machine& machine) {
    const std::string role = std::filesystem::path(engine.file.file).stem().string();
    return load_engine(
        read_checked(engine.folder, engine.file),
        (engine.folder.filename() / engine.file.file).string(),
        engine.folder / ("kernels-sm" + machine.gpu.capability_digits() + "-" + role + ".cache"));
}

/// A set of engines on a GPU.
class TensorRtBackend : public Backend {
public:
    TensorRtBackend(const Bundle& bundle, const ModelOptions& options, const Device& device,
                    const std::shared_ptr<Cuda>& cuda, const EngineSet& engines)
        : bundle_(bundle),
          device_(device),
          precision_(engines.precision),
          cuda_(cuda),
          memory_(std::make_shared<Memory>(cuda)),
          network_(make_network(engines)),
          imaging_(bundle.manifest, *cuda),
          encoder_(make_encoder()),
          decoders_(network_, memory_, imaging_, options.concurrent_decodes) {
        allow_imaging();
        log(LogLevel::info, precision_ + " engines of " + bundle.manifest.name + " loaded by " +
                                name() + " " + tensorrt_version() + " on " +
                                cuda->machine().gpu.name);
    }

    const Device& device() const override { return device_; }
    std::string precision() const override { return precision_; }
    bool encoder_loaded() const override { return true; }

    std::vector<std::shared_ptr<const Features>> encode(
        const std::vector<ImageView>& images, const std::vector<ImageGeometry>& geometries,
        const Cancellation* cancellation) const override {
        std::vector<std::shared_ptr<const Features>> found;
        auto at_once = static_cast<std::size_t>(network_.max_images());
        while (found.size() < images.size()) {
            std::vector<EncoderInput> inputs;
            for (std::size_t i = found.size(); i < images.size() && inputs.size() < at_once; ++i) {
                inputs.push_back({images[i], geometries[i], std::nullopt});
                if (!images[i].on_device && !resizes(geometries[i])) {
                    inputs.back().pixels =
                        preprocess(bundle_.manifest.image, images[i], geometries[i]);
                }
            }
            const Turn turn(encoder_turn_, cancellation);
            check_cancelled(cancellation);
            try {
                for (Block& block : encode_part(inputs)) {
                    found.push_back(features_of(std::move(block)));
                }
            } catch (const OutOfDeviceMemoryError&) {
                if (inputs.size() == 1) {
                    throw;
                }
                at_once = inputs.size() / 2;
            }
        }
        return found;
    }

    std::optional<Refusal> refuses(const void* address) const override {
        const Cuda::Active active(*cuda_);
        const std::string place = cuda_->elsewhere(address);
        if (place.empty()) {
            return std::nullopt;
        }
        return Refusal{place, "memory of cuda:" + std::to_string(device_.number)};
    }

    std::shared_ptr<const Features> upload(const std::vector<Array<float>>& maps) const override {
        const Layout& layout = *network_.features();
        Bytes host(layout.nbytes());
        for (std::size_t i = 0; i < maps.size(); ++i) {
            const Slot& slot = layout.slots().at(i);
            store(maps[i].data(), maps[i].size(), slot.type, host.data() + slot.offset);
        }
        const Cuda::Active active(*cuda_);
        Block block = memory_->allocate(host.size(), true);
        const OwnStream stream(*cuda_);
        cuda_->upload(block.address, host.data(), host.size(), stream);
        cuda_->synchronize(stream);
        return features_of(std::move(block));
    }

    bool joins_images() const override { return network_.joins_images(); }

    std::vector<std::vector<Array<float>>> decode(const std::vector<DecoderCall>& calls,
                                                  const std::vector<std::string>& outputs,
                                                  const Cancellation* cancellation) const override {
        std::vector<std::vector<Array<float>>> results(calls.size());
        std::vector<RunPart> images;
        for (std::size_t i = 0; i < calls.size(); ++i) {
            images.push_back(part_of(calls[i], outputs, results[i]));
        }
        const DeviceFeatures* const held = calls.size() == 1 ? &images[0].features : nullptr;
        bool joins = calls.size() > 1 && joins_images();
        for (;;) {
            try {
                decoders_.run(held, cancellation, [&](DecoderLane& lane) {
                    for (const std::vector<RunPart>& run : share_runs(images, network_, joins)) {
                        check_cancelled(cancellation);
                        lane.decode(run, outputs);
                    }
                });
                return results;
            } catch (const OutOfDeviceMemoryError&) {
                // Feature maps are copied once for each object of a joined run.
                if (!joins) {
                    throw;
                }
                joins = false;
            }
        }
    }

    /// Make every lane, and record the decoder for the usual classes of shapes on each.
    void prepare() const override {
        decoders_.each([this](DecoderLane& lane) { lane.warm_up(network_.usual_classes()); });
    }

private:
    Network make_network(const EngineSet& engines) const {
        const Cuda::Active active(*cuda_);
        return Network(bundle_.manifest, load(engines.encoder_engine, cuda_->machine()),
                       load(engines.decoder_engine, cuda_->machine()));
    }

    std::unique_ptr<EncoderLane> make_encoder() const {
        const Cuda::Active active(*cuda_);
        return std::make_unique<EncoderLane>(network_, memory_, imaging_);
    }

    /// Whether an image is resized on the device.
    bool resizes(const ImageGeometry& geometry) const {
        return resizes_ && imaging_.resizes(geometry);
    }

    /// Encode images in one run. Where memory is short, lanes that are not needed are given up.
    std::vector<Block> encode_part(std::vector<EncoderInput>& inputs) const {
        const Cuda::Active active(*cuda_);
        for (;;) {
            try {
                for (EncoderInput& input : inputs) {
                    bring_to_host(input);
                }
                return encoder_->encode(inputs);
            } catch (const OutOfDeviceMemoryError& error) {
                if (!decoders_.give_up_one(error)) {
                    throw;
                }
            }
        }
    }

    /// Bring an image in device memory to the host, if it must be resized there.
    void bring_to_host(EncoderInput& input) const {
        const ImageView& image = input.image;
        if (!image.on_device || input.pixels || resizes(input.geometry)) {
            return;
        }
        if (!imaging_.available()) {
            throw BackendError(
                "images in device memory are read by kernels, which could not be compiled: install "
                "NVRTC, or bring the image to the host");
        }
        const Array<std::uint8_t> rgb = encoder_->as_rgb(image);
        input.pixels = preprocess(bundle_.manifest.image, {rgb.data(), image.height, image.width},
                                  input.geometry);
    }

    /// All of a call's objects, with room for their results and masks.
    RunPart part_of(const DecoderCall& call, const std::vector<std::string>& outputs,
                    std::vector<Array<float>>& results) const {
        const auto* own = dynamic_cast<const DeviceFeatures*>(&call.features);
        if (own == nullptr || own->device() != device_.name() ||
            own->nbytes() != network_.features()->nbytes()) {
            throw EmbeddingError("the embedding is on " + call.features.device() +
                                 ", of another model or backend than this one, which runs on " +
                                 device_.name() +
                                 "; save the embedding and load it with this model");
        }
        const std::int64_t points = call.prompts.points.shape()[1];
        if (points > network_.max_points()) {
            throw BackendError(std::to_string(points) +
                               " points for one object, corners and padding included; this engine "
                               "takes " +
                               std::to_string(network_.max_points()) +
                               ". Build one that takes more: sam3rt build --max-points");
        }
        const std::int64_t objects = call.prompts.points.shape()[0];
        const Layout layout = network_.outputs({objects, 1, 1});
        results.reserve(outputs.size());
        for (const std::string& name : outputs) {
            results.emplace_back(layout[name].shape);
        }
        DeviceMasks* const masks = makes_masks_ ? call.masks : nullptr;
        if (call.masks != nullptr && call.masks->output != nullptr && masks == nullptr) {
            throw BackendError(
                "masks cannot be made on this GPU, and so not be left in its memory; the log says "
                "why when the model is loaded");
        }
        std::size_t mask_bytes = 0;
        if (masks != nullptr) {
            const Size& size = masks->geometry.original_size;
            const Shape shape{objects, results.at(0).shape()[2], size.height, size.width};
            mask_bytes = element_count(shape) / static_cast<std::size_t>(objects);
            if (masks->output == nullptr) {
                masks->masks.emplace(shape);
            } else {
                check_room(*masks, shape);
            }
        }
        return {*own, call.prompts, results, masks, mask_bytes, 0,
                static_cast<std::size_t>(objects)};
    }

    /// Throws InvalidInputError where the caller's memory is too small for masks [P, C, H, W].
    static void check_room(const DeviceMasks& masks, Shape shape) {
        if (masks.best_only) {
            shape[1] = 1;
        }
        const std::size_t bytes = element_count(shape);
        if (masks.output_size < bytes) {
            throw InvalidInputError("output", std::to_string(masks.output_size) + " bytes",
                                    std::to_string(bytes) + " for shape " + shape_text(shape));
        }
    }

    std::shared_ptr<const Features> features_of(Block block) const {
        return std::make_shared<DeviceFeatures>(std::move(block), memory_, network_.features(),
                                                device_.name());
    }

    /// Let the device do what surrounds the network, as far as it does what the host does. What
    /// differs, or cannot run, is left to the host, which is slower and never wrong.
    void allow_imaging() {
        if (!imaging_.available() || !network_.fits_kernels()) {
            return;
        }
        const Size& side = bundle_.manifest.image.size;
        // Larger than the encoder's input and smaller, upright and lying.
        const std::vector<Size> sizes = {{side.height + side.height / 3, side.width / 2 + 1},
                                         {side.height / 3 + 1, side.width / 2 + 2}};
        resizes_ =
            agrees("resizing images", [&](const Size& size) { return pixels_agree(size); }, sizes);
        makes_masks_ =
            agrees("making masks", [&](const Size& size) { return masks_agree(size); }, sizes);
    }

    template <typename Compare>
    static bool agrees(const std::string& what, const Compare& compare,
                       const std::vector<Size>& sizes) {
        std::string problem = "the results differ";
        try {
            if (std::all_of(sizes.begin(), sizes.end(), compare)) {
                return true;
            }
        } catch (const BackendError& error) {
            problem = error.what();
        }
        log(LogLevel::warning, what + " is left to the host: " + problem);
        return false;
    }

    bool pixels_agree(const Size& size) const {
        const ImageSpec& spec = bundle_.manifest.image;
        const ImageGeometry geometry = geometry_of(spec, size);
        if (!imaging_.resizes(geometry)) {
            return true;
        }
        Array<std::uint8_t> image({size.height, size.width, 3});
        std::uint32_t state = 1;
        for (std::size_t i = 0; i < image.size(); ++i) {
            state = state * 1664525U + 1013904223U;
            image[i] = static_cast<std::uint8_t>(state >> 24U);
        }
        const ImageView view{image.data(), size.height, size.width};
        const Cuda::Active active(*cuda_);
        const Array<float> found = encoder_->pixels({view, geometry, std::nullopt});
        const Array<float> expected = preprocess(spec, view, geometry);
        return std::equal(found.begin(), found.end(), expected.begin(),
                          [](float a, float b) { return std::abs(a - b) <= pixel_error; });
    }

    bool masks_agree(const Size& size) const {
        const Manifest& about = bundle_.manifest;
        const ImageGeometry geometry = geometry_of(about.image, size);
        const Size& low = about.masks.low_res_size;
        Array<float> logits({1, 2, low.height, low.width});
        for (std::size_t i = 0; i < logits.size(); ++i) {
            const std::size_t row = i / static_cast<std::size_t>(low.width);
            const auto x = static_cast<float>(i % static_cast<std::size_t>(low.width));
            const auto y = static_cast<float>(row);
            logits[i] = std::sin(x / 2.0F) * std::cos(y / 3.0F) * 20.0F + 1.0F;
        }
        const Resampling resampling = resampling_to_image(geometry, about.image, about.masks);
        std::size_t differing = 0;
        std::size_t count = 0;
        for (const Cleaning& cleaning : {Cleaning{0, 0, 0}, Cleaning{1.5, 30, 20}}) {
            Array<std::uint8_t> expected(full_shape(logits, resampling));
            finish_masks({logits, resampling, cleaning, nullptr, nullptr}, 1, expected.data());
            Array<std::uint8_t> found;
            decoders_.run(nullptr, nullptr, [&](DecoderLane& lane) {
                found = lane.make_masks(logits, geometry, cleaning);
            });
            for (std::size_t i = 0; i < expected.size(); ++i) {
                differing += expected[i] != found[i] ? 1 : 0;
            }
            count += expected.size();
        }
        return static_cast<double>(differing) <= differing_pixels * static_cast<double>(count);
    }

    const Bundle& bundle_;
    const Device device_;
    const std::string precision_;
    const std::shared_ptr<Cuda> cuda_;
    const std::shared_ptr<Memory> memory_;
    const Network network_;
    const Imaging imaging_;
    std::unique_ptr<EncoderLane> encoder_;
    mutable Turnstile encoder_turn_{1};
    mutable DecoderLanes decoders_;
    bool resizes_ = false;
    bool makes_masks_ = false;
};

/// Engines and contexts go while the GPU is the thread's current one.
void destroy(const Cuda& cuda, const TensorRtBackend* backend) {
    std::optional<Cuda::Active> active;
    try {
        active.emplace(cuda);
    } catch (const Error&) {
        // The GPU is lost, or the process ends.
    }
    delete backend;
}

}  // namespace

Provider built_in_tensorrt() {
    return tensorrt_flavour() == name_of(Provider::tensorrt_rtx) ? Provider::tensorrt_rtx
                                                                 : Provider::tensorrt;
}

std::shared_ptr<const Backend> open_tensorrt_backend(const Bundle& bundle,
                                                     const ModelOptions& options,
                                                     const Device& device) {
    const Machine machine = query_gpu(device.number);
    if (!has_engines(bundle, tensorrt_flavour())) {
        throw BackendError(bundle.path.string() + " has no " + tensorrt_flavour() +
                           " engines; build them on this machine: sam3rt build " +
                           bundle.path.string() + " --backend " + tensorrt_flavour());
    }
    const auto cuda = std::make_shared<Cuda>(device.number, machine);
    std::string version;
    {
        const Cuda::Active active(*cuda);
        version = tensorrt_version();
    }
    std::shared_ptr<const TensorRtBackend> opened;
    choose_engines(
        bundle, tensorrt_flavour(), machine, options.engine_folder,
        [&](const EngineSet& engines) {
            // The last one goes first: there may not be memory for both.
            opened.reset();
            const Cuda::Active active(*cuda);
            opened.reset(new TensorRtBackend(bundle, options, device, cuda, engines),
                         [cuda](const TensorRtBackend* backend) { destroy(*cuda, backend); });
            return runner_of(*opened, nullptr);
        },
        version);
    return opened;
}

}  // namespace sam3rt
