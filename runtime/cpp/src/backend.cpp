#include "backend.hpp"

#include <algorithm>

#include "log.hpp"

namespace sam3rt {
namespace {

void require_positive(const std::string& argument, int value) {
    if (value < 1) {
        throw InvalidInputError(argument, std::to_string(value), "a positive whole number");
    }
}

/// Options of ONNX Runtime's providers, of which the library sets some itself: they decide where is
/// computed, and how precisely.
void check_provider_options(const ModelOptions& options, bool takes_any) {
    if (!takes_any && !options.provider_options.empty()) {
        throw InvalidInputError("provider_options",
                                "options with the device '" + options.device + "'",
                                "none, or a device that names a provider of ONNX Runtime for GPUs");
    }
    for (const char* reserved : {"device_id", "use_tf32"}) {
        if (options.provider_options.count(reserved) != 0) {
            throw InvalidInputError("provider_options", reserved,
                                    "other options: the library sets this one");
        }
    }
}

/// Threads of a model's own that are told where to run, and whether to rest.
void check_threads(const ModelOptions& options) {
    if (options.threads < 0) {
        throw InvalidInputError("threads", std::to_string(options.threads),
                                "a positive whole number, or 0 to leave it to ONNX Runtime");
    }
    if (options.spin_between_runs && options.threads == 0) {
        throw InvalidInputError("spin_between_runs", "true without threads",
                                "threads of the model's own");
    }
    const std::string& places = options.thread_affinities;
    const auto separators = std::count(places.begin(), places.end(), ';');
    // The calling thread is one of them, and stays where it is.
    if (!places.empty() && separators + 2 != options.threads) {
        throw InvalidInputError("thread_affinities",
                                "'" + places + "' with " + std::to_string(options.threads) +
                                    " threads",
                                "one entry for each thread but the first");
    }
}

/// Engines lie in a folder beside a bundle's files.
void require_folder(const Bundle& bundle) {
    if (bundle.memory != nullptr) {
        throw BackendError("TensorRT needs engines, and a bundle in memory has none: load it from "
                           "the folder where `sam3rt build` made them");
    }
}

std::shared_ptr<const Backend> open_named(const Bundle& bundle, const ModelOptions& options) {
    const Device device = parse_device(options.device);
    const bool is_tensorrt =
        device.provider == Provider::tensorrt || device.provider == Provider::tensorrt_rtx;
    bool is_built_in = false;
#if SAM3RT_TENSORRT
    is_built_in = device.provider == built_in_tensorrt();
#endif
    check_provider_options(options, device.on_gpu() && !is_built_in);
    if (is_tensorrt) {
        require_folder(bundle);
    }
#if SAM3RT_TENSORRT
    if (is_built_in) {
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
    check_provider_options(options, false);
    std::string passed_over;
#if SAM3RT_TENSORRT
    const Device gpu{built_in_tensorrt(), 0};
    try {
        require_folder(bundle);
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

std::optional<Refusal> Backend::refuses(const void* /*address*/) const {
    return Refusal{"device memory",
                   "host memory: this model runs in ONNX Runtime on " + device().name() +
                       ", and only TensorRT without ONNX Runtime takes device memory"};
}

Runner runner_of(const Backend& backend, const Cancellation* cancellation) {
    return [&backend, cancellation](const ImageView& image, const ImageGeometry& geometry) {
        const std::shared_ptr<const Features> features =
            backend.encode({image}, {geometry}, cancellation).front();
        return EncodedImage{
            features->maps(),
            [&backend, features, cancellation](const PackedPrompts& prompts,
                                               const std::vector<std::string>& outputs) {
                return std::move(
                    backend.decode({{*features, prompts, nullptr}}, outputs, cancellation).front());
            }};
    };
}

std::shared_ptr<const Backend> open_backend(const Bundle& bundle, const ModelOptions& options) {
    require_positive("concurrent_encodes", options.concurrent_encodes);
    require_positive("concurrent_decodes", options.concurrent_decodes);
    check_threads(options);
    return options.device == "auto" ? open_best(bundle, options) : open_named(bundle, options);
}

#if !SAM3RT_ONNXRUNTIME
void set_ort_environment(OrtEnv* /*environment*/) {
    throw StateError("this library was built without ONNX Runtime");
}

void set_shared_threads(int /*threads*/) {
    throw StateError("this library was built without ONNX Runtime");
}
#endif

}  // namespace sam3rt
