#include "backend.hpp"

#include <algorithm>
#include <chrono>

#include "cancellation.hpp"
#include "geometry.hpp"
#include "log.hpp"
#include "onnx_locations.hpp"
#include "signature.hpp"

namespace sam3rt {
namespace {

/// The decoder's working memory grows with the objects of a run; more at a time are no faster.
constexpr std::size_t objects_per_run = 8;

/// A tensor over the memory of an array, which must outlive it.
template <typename T>
Ort::Value view(const Array<T>& array, const Shape& shape) {
    // ONNX Runtime's interface has no tensors of constant memory; inputs are only read.
    return Ort::Value::CreateTensor<T>(host_memory(), const_cast<T*>(array.data()), array.size(),
                                       shape.data(), shape.size());
}

/// A tensor [1, count, ...] over `count` entries of the first axis of an array.
template <typename T>
Ort::Value view(const Array<T>& array, std::size_t first, std::size_t count) {
    Shape shape = {1};
    shape.insert(shape.end(), array.shape().begin(), array.shape().end());
    const std::size_t step = array.size() / static_cast<std::size_t>(shape[1]);
    shape[1] = static_cast<std::int64_t>(count);
    return Ort::Value::CreateTensor<T>(host_memory(), const_cast<T*>(array.data()) + first * step,
                                       count * step, shape.data(), shape.size());
}

Array<float> copy_of(const Ort::Value& value) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        throw BackendError("a graph returned a tensor of another type than float32");
    }
    return Array<float>(info.GetShape(), value.GetTensorData<float>(), info.GetElementCount());
}

/// Put a tensor [1, count, ...] at entry `first` of an array [1, objects, ...], which is made by
/// the first of them.
void store(const Ort::Value& value, std::size_t first, std::size_t count, std::size_t objects,
           Array<float>& result) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    Shape shape = info.GetShape();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.size() < 2 ||
        shape[0] != 1 || shape[1] != static_cast<std::int64_t>(count)) {
        throw BackendError("the decoder returned a tensor that is not one float32 row per object");
    }
    shape[1] = static_cast<std::int64_t>(objects);
    if (first == 0) {
        result = Array<float>(shape);
    }
    if (result.shape() != shape) {
        throw BackendError("the decoder returned tensors of changing shapes");
    }
    std::copy_n(value.GetTensorData<float>(), info.GetElementCount(),
                result.data() + first * (result.size() / objects));
}

/// Memory for a feature map, outside of what ONNX Runtime reuses between runs: maps live long, and
/// would keep that from being given back.
Ort::Value empty_map(const TensorSpec& spec) {
    Shape shape = {1};
    for (std::size_t axis = 1; axis < spec.shape.size(); ++axis) {
        shape.push_back(std::get<std::int64_t>(spec.shape[axis]));
    }
    Ort::AllocatorWithDefaultOptions allocator;
    return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(),
                                    element_types().at(spec.dtype));
}

std::vector<Bytes> read_weights(const std::filesystem::path& folder,
                                const std::vector<FileEntry>& files) {
    std::vector<Bytes> weights;
    for (const FileEntry& entry : files) {
        weights.push_back(read_checked(folder, entry));
    }
    return weights;
}

/// Give a session the content of files in place of the files. A session copies what it needs when
/// it is made.
void add_weights(Ort::SessionOptions& options, const std::vector<FileEntry>& files,
                 std::vector<Bytes>& weights) {
    std::vector<std::string> names;
    std::vector<char*> contents;
    std::vector<std::size_t> lengths;
    for (std::size_t i = 0; i < files.size(); ++i) {
        names.push_back(files[i].file);
        contents.push_back(reinterpret_cast<char*>(weights[i].data()));
        lengths.push_back(weights[i].size());
    }
    if (!names.empty()) {
        options.AddExternalInitializersFromFilesInMemory(names, contents, lengths);
    }
}

int require_positive(const std::string& argument, int value) {
    if (value < 1) {
        throw InvalidInputError(argument, std::to_string(value), "a positive whole number");
    }
    return value;
}

}  // namespace

FeatureTransfer::FeatureTransfer(const Device& device, const std::string& dtype)
    : half_(dtype == "float16") {
    if (!half_ && dtype != "float32") {
        throw BackendError("feature maps of type " + dtype + " are not known");
    }
    if (device.on_gpu()) {
        copier_.emplace(device, element_types().at(dtype));
    }
}

Array<float> FeatureTransfer::to_host(const Ort::Value& value) const {
    std::optional<Ort::Value> copied;
    if (copier_) {
        copied.emplace(copier_->to_host(value));
    }
    const Ort::Value& host = copied ? *copied : value;
    const auto info = host.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        return copy_of(host);
    }
    Array<float> map(info.GetShape());
    const auto* values = host.GetTensorData<Ort::Float16_t>();
    std::transform(values, values + map.size(), map.data(),
                   [](const Ort::Float16_t& number) { return number.ToFloat(); });
    return map;
}

Ort::Value FeatureTransfer::to_device(const Array<float>& map) const {
    Ort::AllocatorWithDefaultOptions allocator;
    const Shape& shape = map.shape();
    Ort::Value host{nullptr};
    if (half_) {
        host = Ort::Value::CreateTensor<Ort::Float16_t>(allocator, shape.data(), shape.size());
        std::transform(map.begin(), map.end(), host.GetTensorMutableData<Ort::Float16_t>(),
                       [](float number) { return Ort::Float16_t(number); });
    } else {
        host = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
        std::copy(map.begin(), map.end(), host.GetTensorMutableData<float>());
    }
    return copier_ ? copier_->to_device(host) : std::move(host);
}

Backend::Backend(const Bundle& bundle, const ModelOptions& options)
    : Backend(bundle, options, choose_device(options.device), std::nullopt) {
    if (device_.provider == Provider::tensorrt || device_.provider == Provider::tensorrt_rtx) {
        engines_ = choose_engines(
            bundle, name(), query_gpu(device_.number), options.engine_folder,
            [&](const EngineSet& engines) {
                const auto candidate =
                    std::make_shared<const Backend>(bundle, options, device_, engines);
                candidate->prepare();
                const Runner runner = runner_of(*candidate, bundle.manifest, nullptr);
                return [candidate, runner](const ImageView& image, const ImageGeometry& geometry) {
                    return runner(image, geometry);
                };
            });
    }
}

Backend::Backend(const Bundle& bundle, const ModelOptions& options, const Device& device,
                 std::optional<EngineSet> engines)
    : bundle_(bundle),
      threads_(options.threads),
      map_weights_(options.map_weights),
      device_(device),
      engines_(std::move(engines)),
      blank_mask_({1, 1, bundle.manifest.prompts.mask_size.height,
                   bundle.manifest.prompts.mask_size.width}),
      encoder_(bundle.manifest.encoder,
               require_positive("concurrent_encodes", options.concurrent_encodes)),
      decoder_(bundle.manifest.decoder,
               require_positive("concurrent_decodes", options.concurrent_decodes)) {
    if (threads_ < 0) {
        throw InvalidInputError("threads", std::to_string(threads_),
                                "a positive whole number, or 0 to leave it to ONNX Runtime");
    }
    std::fill_n(blank_mask_.data(), blank_mask_.size(), 0.0F);
}

std::string Backend::name() const {
    switch (device_.provider) {
        case Provider::tensorrt:
            return "tensorrt";
        case Provider::tensorrt_rtx:
            return "tensorrt-rtx";
        default:
            return "onnxruntime";
    }
}

std::shared_ptr<const Features> Backend::encode(const Array<float>& pixels,
                                                const Cancellation* cancellation) const {
    std::shared_ptr<Ort::Session> session = session_of(encoder_);
    try {
        Ort::IoBinding binding(*session);
        binding.BindInput(encoder_.spec->inputs[0].name.c_str(), view(pixels, pixels.shape()));
        for (const TensorSpec& output : encoder_.spec->outputs) {
            if (device_.on_gpu()) {
                binding.BindOutput(output.name.c_str(), memory_of(device_));
            } else {
                binding.BindOutput(output.name.c_str(), empty_map(output));
            }
        }
        run(encoder_, *session, binding, true, cancellation);
        return std::make_shared<Features>(Features{binding.GetOutputValues(), transfer(),
                                                   device_.name(),
                                                   device_.on_gpu() ? session : nullptr});
    } catch (const Ort::Exception& error) {
        throw BackendError(std::string("ONNX Runtime failed in the encoder: ") + error.what());
    }
}

std::shared_ptr<const Features> Backend::upload(const std::vector<Array<float>>& maps) const {
    try {
        Features features{{}, transfer(), device_.name(), nullptr};
        for (const Array<float>& map : maps) {
            features.values.push_back(features.transfer->to_device(map));
        }
        return std::make_shared<Features>(std::move(features));
    } catch (const Ort::Exception& error) {
        throw BackendError("feature maps cannot be brought to " + device_.name() + ": " +
                           error.what());
    }
}

std::vector<Array<float>> Backend::decode(const Features& features, const PackedPrompts& prompts,
                                          const std::vector<std::string>& outputs,
                                          const Cancellation* cancellation) const {
    if (features.device != device_.name()) {
        throw EmbeddingError("the embedding is on " + features.device + ", this model runs on " +
                             device_.name() + "; save the embedding and load it with this model");
    }
    const std::shared_ptr<Ort::Session> session = session_of(decoder_);
    const auto objects = static_cast<std::size_t>(prompts.points.shape()[0]);
    const Array<float> present({1}, {prompts.masks ? 1.0F : 0.0F});
    const Ort::MemoryInfo memory = host_memory();
    std::vector<Array<float>> results(outputs.size());
    try {
        for (std::size_t first = 0; first < objects; first += objects_per_run) {
            const std::size_t count = std::min(objects_per_run, objects - first);
            Ort::IoBinding binding(*session);
            for (std::size_t i = 0; i < features.values.size(); ++i) {
                binding.BindInput(encoder_.spec->outputs[i].name.c_str(), features.values[i]);
            }
            binding.BindInput("input_points", view(prompts.points, first, count));
            binding.BindInput("input_labels", view(prompts.labels, first, count));
            if (!prompts.masks) {
                binding.BindInput("input_masks", view(blank_mask_, blank_mask_.shape()));
            } else if (prompts.masks->shape()[0] == 1) {
                binding.BindInput("input_masks", view(*prompts.masks, 0, 1));
            } else {
                binding.BindInput("input_masks", view(*prompts.masks, first, count));
            }
            binding.BindInput("has_input_masks", view(present, present.shape()));
            for (const std::string& output : outputs) {
                binding.BindOutput(output.c_str(), memory);
            }
            // One click keeps its memory for the next; more objects take several times as much.
            run(decoder_, *session, binding, objects > 1 && first + count == objects,
                cancellation);
            const std::vector<Ort::Value> values = binding.GetOutputValues();
            for (std::size_t i = 0; i < values.size(); ++i) {
                store(values[i], first, count, objects, results[i]);
            }
        }
        return results;
    } catch (const Ort::Exception& error) {
        throw BackendError(std::string("ONNX Runtime failed in the decoder: ") + error.what());
    }
}

void Backend::prepare() const {
    session_of(encoder_, true);
    session_of(decoder_, true);
}

bool Backend::encoder_loaded() const { return encoder_.loaded; }

std::shared_ptr<Ort::Session> Backend::session_of(const Graph& graph, bool try_again) const {
    // Two threads may ask for a session at once; it must be made once.
    const std::lock_guard<std::mutex> lock(graph.mutex);
    if (graph.session == nullptr) {
        if (graph.failure != nullptr && !try_again) {
            std::rethrow_exception(graph.failure);
        }
        try {
            const auto start = std::chrono::steady_clock::now();
            graph.session = engines_ ? load_wrapped(graph) : load(graph);
            graph.loaded = true;
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            log(LogLevel::info, graph.spec->model.file + " of " + bundle_.manifest.name +
                                    " loaded on " + device_.name() + " in " +
                                    std::to_string(seconds.count()) + " s");
        } catch (const Error& error) {
            graph.failure = std::current_exception();
            log(LogLevel::error, error.what());
            throw;
        }
    }
    return graph.session;
}

Ort::SessionOptions Backend::options_for(const Graph& graph) const {
    Ort::SessionOptions options = session_options(device_, threads_);
    if (&graph == &encoder_) {
        // A memory pattern plans all of a run's buffers as one block, from the second run on and
        // beside those of the first: 10 GB in place of 6 GB for the published SAM 3.
        options.DisableMemPattern();
    }
    return options;
}

std::shared_ptr<Ort::Session> Backend::load(const Graph& graph) const {
    const GraphSpec& spec = *graph.spec;
    const Bytes content = read_checked(bundle_.path, spec.model);
    check_onnx(content, spec.model.file, spec.external_data);
    try {
        Ort::SessionOptions options = options_for(graph);
        std::shared_ptr<Ort::Session> session;
        if (map_weights_ && !spec.external_data.empty()) {
            for (const FileEntry& entry : spec.external_data) {
                check_length(bundle_.path, entry);
            }
            const std::filesystem::path path = bundle_.path / spec.model.file;
            session = std::make_shared<Ort::Session>(ort_environment(), path.c_str(), options);
        } else {
            // What is loaded is what was hashed, whatever happens to the files meanwhile.
            std::vector<Bytes> weights = read_weights(bundle_.path, spec.external_data);
            add_weights(options, spec.external_data, weights);
            session = std::make_shared<Ort::Session>(ort_environment(), content.data(),
                                                     content.size(), options);
        }
        check(*session, spec, false);
        return session;
    } catch (const Ort::Exception& error) {
        throw BackendError("ONNX Runtime cannot load " + spec.model.file + ": " + error.what());
    }
}

std::shared_ptr<Ort::Session> Backend::load_wrapped(const Graph& graph) const {
    const std::filesystem::path& path = &graph == &encoder_ ? engines_->encoder : engines_->decoder;
    try {
        Ort::SessionOptions options = options_for(graph);
        // The engine is the whole graph: a node on the CPU would mean that it was not used.
        options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
        auto session = std::make_shared<Ort::Session>(ort_environment(), path.c_str(), options);
        check(*session, *graph.spec, true);
        return session;
    } catch (const Ort::Exception& error) {
        throw BackendError("ONNX Runtime cannot load the engine of " + path.string() + ": " +
                           error.what());
    }
}

void Backend::check(const Ort::Session& session, const GraphSpec& spec, bool wrapped) const {
    Ort::AllocatorWithDefaultOptions allocator;
    const std::string& file = spec.model.file;
    const auto stored =
        session.GetModelMetadata().LookupCustomMetadataMapAllocated("sam3rt.export_id", allocator);
    const std::string export_id = stored == nullptr ? "" : stored.get();
    // A wrapper need not say it: its engine's sidecar names the bundle.
    if (export_id != bundle_.manifest.export_id && !(wrapped && export_id.empty())) {
        throw BundleError("belongs to export " +
                              (export_id.empty() ? "unknown" : export_id.substr(0, 16)) +
                              "..., the bundle is " + bundle_.manifest.export_id.substr(0, 16) +
                              "...: encoder and decoder are mixed",
                          file);
    }
    GraphSpec promised = spec;
    if (wrapped) {
        // Engines may pass feature maps in half precision.
        for (std::vector<TensorSpec>* specs : {&promised.inputs, &promised.outputs}) {
            for (TensorSpec& tensor : *specs) {
                const auto& maps = bundle_.manifest.encoder.outputs;
                if (std::any_of(maps.begin(), maps.end(), [&tensor](const TensorSpec& map) {
                        return map.name == tensor.name;
                    })) {
                    tensor.dtype = engines_->features_dtype;
                }
            }
        }
    }
    check_signature(session, promised);
}

void Backend::run(const Graph& graph, Ort::Session& session, Ort::IoBinding& binding,
                  bool give_memory_back, const Cancellation* cancellation) const {
    Ort::RunOptions options;
    if (give_memory_back && !device_.on_gpu()) {
        options.AddConfigEntry("memory.enable_memory_arena_shrinkage", "cpu:0");
    }
    const Turn turn(graph.turnstile, cancellation);
    check_cancelled(cancellation);
    const OnCancel stop(cancellation, [&options] { options.SetTerminate(); });
    try {
        session.Run(options, binding);
    } catch (const Ort::Exception&) {
        check_cancelled(cancellation);
        throw;
    }
    if (device_.on_gpu()) {
        binding.SynchronizeOutputs();
    }
}

std::shared_ptr<const FeatureTransfer> Backend::transfer() const {
    const std::lock_guard<std::mutex> lock(transfer_mutex_);
    if (transfer_ == nullptr) {
        transfer_ = std::make_shared<FeatureTransfer>(
            device_, engines_ ? engines_->features_dtype : encoder_.spec->outputs.at(0).dtype);
    }
    return transfer_;
}

std::vector<Array<float>> to_host(const Features& features) {
    try {
        std::vector<Array<float>> maps;
        for (const Ort::Value& value : features.values) {
            maps.push_back(features.transfer->to_host(value));
        }
        return maps;
    } catch (const Ort::Exception& error) {
        throw BackendError("feature maps cannot be brought from " + features.device + ": " +
                           error.what());
    }
}

Runner runner_of(const Backend& backend, const Manifest& manifest,
                 const Cancellation* cancellation) {
    return [&backend, &spec = manifest.image, cancellation](const ImageView& image,
                                                            const ImageGeometry& geometry) {
        const std::shared_ptr<const Features> features =
            backend.encode(preprocess(spec, image, geometry), cancellation);
        return EncodedImage{
            to_host(*features),
            [&backend, features, cancellation](const PackedPrompts& prompts,
                                               const std::vector<std::string>& outputs) {
                return backend.decode(*features, prompts, outputs, cancellation);
            }};
    };
}

}  // namespace sam3rt
