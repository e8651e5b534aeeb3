#include "backend.hpp"

#include "log.hpp"

namespace sam3rt {
namespace {

void require_positive(const std::string& argument, int value) {
    if (value < 1) {
        throw InvalidInputError(argument, std::to_string(value), "a positive whole number");
    }
}

std::shared_ptr<const Backend> open_named(const Bundle& bundle, const ModelOptions& options) {
    const Device device = parse_device(options.device);
#if SAM3RT_TENSORRT
    if (device.provider == built_in_tensorrt()) {
        return open_tensorrt_backend(bundle, options, device);
    }
#endif
#if SAM3RT_ONNXRUNTIME
    return open_ort_backend(bundle, options, device);
#else
    throw BackendError("device '" + options.device +
                       "' was asked for, but this library was built without ONNX Runtime: it has " +
                       Device{built_in_tensorrt(), 0}.name() + " alone");
#endif
}

std::shared_ptr<const Backend> open_best(const Bundle& bundle, const ModelOptions& options) {
    std::string passed_over;
#if SAM3RT_TENSORRT
    const Device gpu{built_in_tensorrt(), 0};
    try {
        auto backend = open_tensorrt_backend(bundle, options, gpu);
        log(LogLevel::info, "device auto: " + gpu.name());
        return backend;
    } catch (const BundleError& error) {
        // An engine that was changed is no reason to serve nothing: the graphs are there.
        passed_over = std::string("TensorRT cannot be used: ") + error.what();
        log(LogLevel::warning, "device auto: " + passed_over);
    } catch (const BackendError& error) {
        passed_over = std::string("TensorRT cannot be used: ") + error.what();
    }
#endif
#if SAM3RT_ONNXRUNTIME
    Device device{Provider::cuda, 0};
    const std::string failure = ort_failure(device);
    if (!failure.empty()) {
        device = Device{};
        passed_over += (passed_over.empty() ? "" : "; ") + ("CUDA cannot be used: " + failure);
    }
    log(LogLevel::info,
        "device auto: " + device.name() + (passed_over.empty() ? "" : ", as " + passed_over));
    return open_ort_backend(bundle, options, device);
#else
    throw BackendError(passed_over);
#endif
}

}  // namespace

std::string Backend::name() const {
    const Provider provider = device().provider;
    const bool is_tensorrt = provider == Provider::tensorrt || provider == Provider::tensorrt_rtx;
    return is_tensorrt ? name_of(provider) : "onnxruntime";
}

std::vector<std::shared_ptr<const Features>> Backend::encode_all(
    const std::vector<ImageView>& images, const std::vector<ImageGeometry>& geometries,
    const Cancellation* cancellation) const {
    std::vector<std::shared_ptr<const Features>> found;
    for (std::size_t i = 0; i < images.size(); ++i) {
        found.push_back(encode(images[i], geometries[i], cancellation));
    }
    return found;
}

std::optional<Refusal> Backend::refuses(const void* /*address*/) const {
    return Refusal{"device memory",
                   "host memory: this model runs in ONNX Runtime on " + device().name() +
                       ", and only TensorRT without ONNX Runtime takes device memory"};
}

Runner runner_of(const Backend& backend, const Cancellation* cancellation) {
    return [&backend, cancellation](const ImageView& image, const ImageGeometry& geometry) {
        const std::shared_ptr<const Features> features =
            backend.encode(image, geometry, cancellation);
        return EncodedImage{
            features->maps(),
            [&backend, features, cancellation](const PackedPrompts& prompts,
                                               const std::vector<std::string>& outputs) {
                return backend.decode(*features, prompts, outputs, cancellation, nullptr);
            }};
    };
}

std::shared_ptr<const Backend> open_backend(const Bundle& bundle, const ModelOptions& options) {
    require_positive("concurrent_encodes", options.concurrent_encodes);
    require_positive("concurrent_decodes", options.concurrent_decodes);
    if (options.threads < 0) {
        throw InvalidInputError("threads", std::to_string(options.threads),
                                "a positive whole number, or 0 to leave it to ONNX Runtime");
    }
    return options.device == "auto" ? open_best(bundle, options) : open_named(bundle, options);
}

#if !SAM3RT_ONNXRUNTIME
void set_ort_environment(OrtEnv* /*environment*/) {
    throw StateError("this library was built without ONNX Runtime");
}
#endif

}  // namespace sam3rt
