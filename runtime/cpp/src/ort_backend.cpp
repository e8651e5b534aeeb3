// Runs the two graphs of a bundle in ONNX Runtime, on one device.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>

#include "backend.hpp"
#include "cancellation.hpp"
#include "engines.hpp"
#include "log.hpp"
#include "onnx_locations.hpp"
#include "onnx_split.hpp"
#include "ort_features.hpp"
#include "ort_session.hpp"
#include "signature.hpp"
#include "turnstile.hpp"

namespace sam3rt {
namespace {

/// What ONNX Runtime calls its providers.
const char* ort_name(Provider provider) {
    switch (provider) {
        case Provider::cuda:
            return "CUDAExecutionProvider";
        case Provider::tensorrt:
            return "TensorrtExecutionProvider";
        case Provider::tensorrt_rtx:
            return "NvTensorRTRTXExecutionProvider";
        case Provider::cpu:
            break;
    }
    return "CPUExecutionProvider";
}

/// A graph that has been loaded: as a whole, or in two parts, of which the first reads what an image
/// and a mask prompt decide.
struct Loaded {
    /// The whole, or the second part.
    std::shared_ptr<Ort::Session> session;
    /// Null for a whole.
    std::shared_ptr<Ort::Session> first;
    /// Names of the values between the parts.
    std::vector<std::string> cut;
};

/// The two graphs as sessions, created at first use.
class OrtBackend : public Backend {
public:
    /// Throws BackendError where the device is not usable here, or has no engines.
    OrtBackend(const Bundle& bundle, const ModelOptions& options, const Device& device);
    /// The same with these engines, or none, whether or not they are proven.
    OrtBackend(const Bundle& bundle, const ModelOptions& options, const Device& device,
               std::optional<EngineSet> engines);

    const Device& device() const override { return device_; }
    std::string precision() const override { return engines_ ? engines_->precision : "fp32"; }
    std::vector<std::shared_ptr<const Features>> encode(
        const std::vector<ImageView>& images, const std::vector<ImageGeometry>& geometries,
        const Cancellation* cancellation) const override;
    std::shared_ptr<const Features> upload(const std::vector<Array<float>>& maps) const override;
    std::vector<std::vector<Array<float>>> decode(const std::vector<DecoderCall>& calls,
                                                  const std::vector<std::string>& outputs,
                                                  const Cancellation* cancellation) const override;
    void prepare() const override;
    bool encoder_loaded() const override;

private:
    /// A graph that is loaded when it is first asked for.
    struct Graph {
        explicit Graph(const GraphSpec& graph_spec, int places)
            : spec(&graph_spec), turnstile(places) {}

        const GraphSpec* spec;
        mutable std::mutex mutex;
        mutable std::shared_ptr<const Loaded> loaded;
        /// Why it could not be made. A service would otherwise try again at every request.
        mutable std::exception_ptr failure;
        mutable std::atomic<bool> is_loaded{false};
        /// Whether its memory is what several objects took.
        mutable std::atomic<bool> holds_much{false};
        /// Bounds how many runs hold working memory at once.
        mutable Turnstile turnstile;
    };

    std::shared_ptr<const Features> encode_one(const ImageView& image,
                                               const ImageGeometry& geometry,
                                               const Cancellation* cancellation) const;
    std::vector<Array<float>> decode_one(const Features& features, const PackedPrompts& prompts,
                                         const std::vector<std::string>& outputs,
                                         const Cancellation* cancellation) const;
    std::shared_ptr<const Loaded> loaded(const Graph& graph, bool try_again = false) const;
    Loaded load(const Graph& graph) const;
    std::optional<Loaded> load_parts(const Graph& graph, ByteView content) const;
    Loaded load_wrapped(const Graph& graph) const;
    Ort::SessionOptions options_for(const Graph& graph) const;
    void check(const std::vector<LoadedTensor>& inputs, const std::vector<LoadedTensor>& outputs,
               const Ort::Session& session, const GraphSpec& spec, bool wrapped) const;
    void run(const Graph& graph, Ort::Session& session, Ort::IoBinding& binding,
             bool give_memory_back, const Cancellation* cancellation) const;
    std::shared_ptr<const FeatureTransfer> transfer() const;

    const Bundle& bundle_;
    const ModelOptions options_;
    Device device_;
    std::optional<EngineSet> engines_;
    Array<float> blank_mask_;
    Graph encoder_;
    Graph decoder_;
    mutable std::mutex transfer_mutex_;
    mutable std::shared_ptr<const FeatureTransfer> transfer_;
    mutable ImageSide image_side_;
};

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
    Shape shape;
    shape.reserve(array.shape().size() + 1);
    shape.push_back(1);
    shape.insert(shape.end(), array.shape().begin(), array.shape().end());
    const std::size_t step = array.size() / static_cast<std::size_t>(shape[1]);
    shape[1] = static_cast<std::int64_t>(count);
    return Ort::Value::CreateTensor<T>(host_memory(), const_cast<T*>(array.data()) + first * step,
                                       count * step, shape.data(), shape.size());
}

/// Put a tensor [1, count, ...] at entry `first` of an array [1, objects, ...], which is made by
/// the first of them, at a place among the results.
void store(const Ort::Value& value, std::size_t first, std::size_t count, std::size_t objects,
           std::size_t place, std::vector<Array<float>>& results) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    Shape shape = info.GetShape();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.size() < 2 ||
        shape[0] != 1 || shape[1] != static_cast<std::int64_t>(count)) {
        throw BackendError("the decoder returned a tensor that is not one float32 row per object");
    }
    shape[1] = static_cast<std::int64_t>(objects);
    if (first == 0) {
        results.emplace_back(std::move(shape));
    } else if (results[place].shape() != shape) {
        throw BackendError("the decoder returned tensors of changing shapes");
    }
    Array<float>& result = results[place];
    std::copy_n(value.GetTensorData<float>(), info.GetElementCount(),
                result.data() + first * (result.size() / objects));
}

/// Memory for a feature map, outside of what ONNX Runtime reuses between runs: maps live long, and
/// would keep that from being given back.
Ort::Value empty_map(const TensorSpec& spec) {
    const Shape shape = shape_of_map(spec);
    Ort::AllocatorWithDefaultOptions allocator;
    return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(),
                                    element_types().at(spec.dtype));
}

LoadedTensor loaded_tensor(const std::string& name, const Ort::TypeInfo& type) {
    if (type.GetONNXType() != ONNX_TYPE_TENSOR) {
        return {name, "no tensor", {}};
    }
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::string dtype = "another type";
    for (const auto& [known, element] : element_types()) {
        if (element == info.GetElementType()) {
            dtype = known;
        }
    }
    return {name, dtype, info.GetShape()};
}

std::vector<LoadedTensor> inputs_of(const Ort::Session& session) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<LoadedTensor> inputs;
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
        inputs.push_back(loaded_tensor(session.GetInputNameAllocated(i, allocator).get(),
                                       session.GetInputTypeInfo(i)));
    }
    return inputs;
}

std::vector<LoadedTensor> outputs_of(const Ort::Session& session) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<LoadedTensor> outputs;
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
        outputs.push_back(loaded_tensor(session.GetOutputNameAllocated(i, allocator).get(),
                                        session.GetOutputTypeInfo(i)));
    }
    return outputs;
}

/// What two parts of a graph have, without the values between them.
std::vector<LoadedTensor> without_cut(std::vector<LoadedTensor> first,
                                      const std::vector<LoadedTensor>& rest,
                                      const std::vector<std::string>& cut) {
    first.insert(first.end(), rest.begin(), rest.end());
    first.erase(std::remove_if(first.begin(), first.end(),
                               [&cut](const LoadedTensor& tensor) {
                                   return std::find(cut.begin(), cut.end(), tensor.name) !=
                                          cut.end();
                               }),
                first.end());
    return first;
}

std::vector<Content> read_weights(const Bundle& bundle, const std::vector<FileEntry>& files) {
    std::vector<Content> weights;
    weights.reserve(files.size());
    for (const FileEntry& entry : files) {
        weights.push_back(read_checked(bundle, entry));
    }
    return weights;
}

/// Give a session the content of files in place of the files. A session copies what it needs when
/// it is made.
void add_weights(Ort::SessionOptions& options, const std::vector<FileEntry>& files,
                 const std::vector<Content>& weights) {
    std::vector<std::string> names;
    std::vector<char*> contents;
    std::vector<std::size_t> lengths;
    for (std::size_t i = 0; i < files.size(); ++i) {
        names.push_back(files[i].file);
        // They are only read, although the interface does not say so.
        contents.push_back(
            const_cast<char*>(reinterpret_cast<const char*>(weights[i].bytes().data())));
        lengths.push_back(weights[i].bytes().size());
    }
    if (!names.empty()) {
        options.AddExternalInitializersFromFilesInMemory(names, contents, lengths);
    }
}

OrtBackend::OrtBackend(const Bundle& bundle, const ModelOptions& options, const Device& device)
    : OrtBackend(bundle, options, device, std::nullopt) {
    const std::string failure = ort_failure(device);
    if (!failure.empty()) {
        throw BackendError("device '" + options.device + "' was asked for, but " + failure);
    }
    if (device.provider == Provider::tensorrt || device.provider == Provider::tensorrt_rtx) {
        engines_ = choose_engines(
            bundle, name(), query_gpu(device.number), options.engine_folder,
            [&](const EngineSet& engines) {
                const auto candidate =
                    std::make_shared<const OrtBackend>(bundle, options, device, engines);
                candidate->prepare();
                const Runner runner = runner_of(*candidate, nullptr);
                return [candidate, runner](const ImageView& image, const ImageGeometry& geometry) {
                    return runner(image, geometry);
                };
            });
    }
}

OrtBackend::OrtBackend(const Bundle& bundle, const ModelOptions& options, const Device& device,
                       std::optional<EngineSet> engines)
    : bundle_(bundle),
      options_(options),
      device_(device),
      engines_(std::move(engines)),
      blank_mask_({1, 1, bundle.manifest.prompts.mask_size.height,
                   bundle.manifest.prompts.mask_size.width}),
      encoder_(bundle.manifest.encoder, options.concurrent_encodes),
      decoder_(bundle.manifest.decoder, options.concurrent_decodes) {
    std::fill_n(blank_mask_.data(), blank_mask_.size(), 0.0F);
}

std::vector<std::shared_ptr<const Features>> OrtBackend::encode(
    const std::vector<ImageView>& images, const std::vector<ImageGeometry>& geometries,
    const Cancellation* cancellation) const {
    std::vector<std::shared_ptr<const Features>> found;
    for (std::size_t i = 0; i < images.size(); ++i) {
        found.push_back(encode_one(images[i], geometries[i], cancellation));
    }
    return found;
}

std::shared_ptr<const Features> OrtBackend::encode_one(const ImageView& image,
                                                       const ImageGeometry& geometry,
                                                       const Cancellation* cancellation) const {
    const Array<float> pixels = preprocess(bundle_.manifest.image, image, geometry);
    const std::shared_ptr<Ort::Session> session = loaded(encoder_)->session;
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
        return std::make_shared<OrtFeatures>(binding.GetOutputValues(), transfer(), device_.name(),
                                             device_.on_gpu() ? session : nullptr);
    } catch (const Ort::Exception& error) {
        throw BackendError(std::string("ONNX Runtime failed in the encoder: ") + error.what());
    }
}

std::shared_ptr<const Features> OrtBackend::upload(const std::vector<Array<float>>& maps) const {
    try {
        const std::shared_ptr<const FeatureTransfer> way = transfer();
        std::vector<Ort::Value> values;
        values.reserve(maps.size());
        for (const Array<float>& map : maps) {
            values.push_back(way->to_device(map));
        }
        return std::make_shared<OrtFeatures>(std::move(values), way, device_.name(), nullptr);
    } catch (const Ort::Exception& error) {
        throw BackendError("feature maps cannot be brought to " + device_.name() + ": " +
                           error.what());
    }
}

std::vector<std::vector<Array<float>>> OrtBackend::decode(const std::vector<DecoderCall>& calls,
                                                          const std::vector<std::string>& outputs,
                                                          const Cancellation* cancellation) const {
    std::vector<std::vector<Array<float>>> found;
    for (const DecoderCall& call : calls) {
        found.push_back(decode_one(call.features, call.prompts, outputs, cancellation));
    }
    return found;
}

std::vector<Array<float>> OrtBackend::decode_one(const Features& features,
                                                 const PackedPrompts& prompts,
                                                 const std::vector<std::string>& outputs,
                                                 const Cancellation* cancellation) const {
    const auto* own = dynamic_cast<const OrtFeatures*>(&features);
    if (own == nullptr || own->device() != device_.name()) {
        throw EmbeddingError("the embedding is on " + features.device() + ", this model runs on " +
                             device_.name() + "; save the embedding and load it with this model");
    }
    const auto objects = static_cast<std::size_t>(prompts.points.shape()[0]);
    if (device_.on_gpu() && prompts.points.shape()[1] == 0) {
        // CUDA's kernels do not reduce an axis without elements, and engines take none.
        const std::int64_t count = prompts.points.shape()[0];
        const PackedPrompts padded{
            Array<float>({count, 1, 2}, std::vector<float>(2 * objects)),
            Array<std::int64_t>({count, 1}, std::vector<std::int64_t>(objects, padding_label)),
            prompts.masks, ""};
        return decode_one(features, padded, outputs, cancellation);
    }
    const std::shared_ptr<const Loaded> decoder = loaded(decoder_);
    const bool has_many_masks = prompts.masks && prompts.masks->shape()[0] != 1;
    const Ort::MemoryInfo memory = host_memory();
    // The inputs that the image and the mask prompts decide. Bindings do not keep them.
    float present = prompts.masks ? 1.0F : 0.0F;
    const std::array<std::int64_t, 1> present_shape = {1};
    const auto bind_image = [&](Ort::IoBinding& binding, std::size_t first, std::size_t count) {
        for (std::size_t i = 0; i < own->values().size(); ++i) {
            binding.BindInput(encoder_.spec->outputs[i].name.c_str(), own->values()[i]);
        }
        if (!prompts.masks) {
            binding.BindInput("input_masks", view(blank_mask_, blank_mask_.shape()));
        } else if (has_many_masks) {
            binding.BindInput("input_masks", view(*prompts.masks, first, count));
        } else {
            binding.BindInput("input_masks", view(*prompts.masks, 0, 1));
        }
        binding.BindInput("has_input_masks",
                          Ort::Value::CreateTensor<float>(memory, &present, 1,
                                                          present_shape.data(), 1));
    };
    const auto run_first = [&](std::size_t first, std::size_t count) {
        Ort::IoBinding binding(*decoder->first);
        bind_image(binding, first, count);
        for (const std::string& name : decoder->cut) {
            binding.BindOutput(name.c_str(), memory);
        }
        run(decoder_, *decoder->first, binding, true, cancellation);
        return std::make_shared<const CutValues>(
            CutValues{decoder->first, binding.GetOutputValues()});
    };
    // Memory is kept for the next call, which would spend a third of its time on asking the system
    // for it again. Several objects take several times as much: the next click gives that back.
    const bool gives_back = objects == 1 && decoder_.holds_much.exchange(false);
    if (objects > 1) {
        decoder_.holds_much = true;
    }
    std::shared_ptr<const CutValues> between;
    std::vector<Array<float>> results;
    results.reserve(outputs.size());
    try {
        for (std::size_t first = 0; first < objects; first += objects_per_run) {
            const std::size_t count = std::min(objects_per_run, objects - first);
            Ort::IoBinding binding(*decoder->session);
            if (decoder->first == nullptr) {
                bind_image(binding, first, count);
            } else {
                if (!prompts.masks) {
                    between = image_side_.get(own->image_side(),
                                              [&] { return run_first(first, count); });
                } else if (between == nullptr || has_many_masks) {
                    between = run_first(first, count);
                }
                for (std::size_t i = 0; i < decoder->cut.size(); ++i) {
                    binding.BindInput(decoder->cut[i].c_str(), between->values[i]);
                }
            }
            binding.BindInput("input_points", view(prompts.points, first, count));
            binding.BindInput("input_labels", view(prompts.labels, first, count));
            for (const std::string& output : outputs) {
                binding.BindOutput(output.c_str(), memory);
            }
            run(decoder_, *decoder->session, binding, gives_back, cancellation);
            const std::vector<Ort::Value> values = binding.GetOutputValues();
            for (std::size_t i = 0; i < values.size(); ++i) {
                store(values[i], first, count, objects, i, results);
            }
        }
        return results;
    } catch (const Ort::Exception& error) {
        throw BackendError(std::string("ONNX Runtime failed in the decoder: ") + error.what());
    }
}

void OrtBackend::prepare() const {
    loaded(encoder_, true);
    loaded(decoder_, true);
}

bool OrtBackend::encoder_loaded() const { return encoder_.is_loaded; }

std::shared_ptr<const Loaded> OrtBackend::loaded(const Graph& graph, bool try_again) const {
    // Two threads may ask for a graph at once; it must be loaded once.
    const std::lock_guard<std::mutex> lock(graph.mutex);
    if (graph.loaded == nullptr) {
        if (graph.failure != nullptr && !try_again) {
            std::rethrow_exception(graph.failure);
        }
        try {
            const auto start = std::chrono::steady_clock::now();
            graph.loaded = std::make_shared<const Loaded>(engines_ ? load_wrapped(graph)
                                                                   : load(graph));
            graph.is_loaded = true;
            if (bundle_.memory != nullptr) {
                bundle_.memory->release(*graph.spec);
            }
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            log(LogLevel::info, graph.spec->model.file + " of " + bundle_.manifest.name +
                                    " loaded on " + device_.name() +
                                    (graph.loaded->first == nullptr ? "" : " in two parts") +
                                    " in " +
                                    std::to_string(seconds.count()) + " s");
        } catch (const Error& error) {
            graph.failure = std::current_exception();
            log(LogLevel::error, error.what());
            throw;
        }
    }
    return graph.loaded;
}

Ort::SessionOptions OrtBackend::options_for(const Graph& graph) const {
    Ort::SessionOptions options = session_options(device_, options_);
    if (&graph == &encoder_) {
        // A memory pattern plans all of a run's buffers as one block, from the second run on and
        // beside those of the first: 10 GB in place of 6 GB for the published SAM 3.
        options.DisableMemPattern();
    }
    return options;
}

Loaded OrtBackend::load(const Graph& graph) const {
    const GraphSpec& spec = *graph.spec;
    const Content content = read_checked(bundle_, spec.model);
    check_onnx(content.bytes(), spec.model.file, spec.external_data);
    if (&graph == &decoder_ && !device_.on_gpu() && spec.external_data.empty()) {
        if (std::optional<Loaded> parts = load_parts(graph, content.bytes())) {
            return std::move(*parts);
        }
    }
    try {
        Ort::SessionOptions options = options_for(graph);
        std::shared_ptr<Ort::Session> session;
        if (options_.map_weights && !spec.external_data.empty()) {
            for (const FileEntry& entry : spec.external_data) {
                check_length(bundle_.path, entry);
            }
            const std::filesystem::path path = bundle_.path / spec.model.file;
            session = std::make_shared<Ort::Session>(ort_environment(), path.c_str(), options);
        } else {
            // What is loaded is what was hashed, whatever happens to the files meanwhile.
            const std::vector<Content> weights = read_weights(bundle_, spec.external_data);
            add_weights(options, spec.external_data, weights);
            session = std::make_shared<Ort::Session>(ort_environment(), content.bytes().data(),
                                                     content.bytes().size(), options);
        }
        check(inputs_of(*session), outputs_of(*session), *session, spec, false);
        return {session, nullptr, {}};
    } catch (const Ort::Exception& error) {
        throw BackendError("ONNX Runtime cannot load " + spec.model.file + ": " + error.what());
    }
}

/// The decoder in two parts; nothing where it cannot be cut, or not be loaded like that.
std::optional<Loaded> OrtBackend::load_parts(const Graph& graph, ByteView content) const {
    std::vector<std::string> names = {"input_masks", "has_input_masks"};
    for (const TensorSpec& map : encoder_.spec->outputs) {
        names.push_back(map.name);
    }
    const std::optional<GraphParts> parts = split_onnx(content, names);
    if (!parts) {
        return std::nullopt;
    }
    const auto session_of = [&](const Bytes& part) {
        return std::make_shared<Ort::Session>(ort_environment(), part.data(), part.size(),
                                              options_for(graph));
    };
    Loaded result;
    try {
        result = {session_of(parts->rest), session_of(parts->first), parts->cut};
    } catch (const Ort::Exception& error) {
        log(LogLevel::info, graph.spec->model.file + " is loaded as a whole: " + error.what());
        return std::nullopt;
    }
    std::vector<LoadedTensor> inputs =
        without_cut(inputs_of(*result.first), inputs_of(*result.session), result.cut);
    const std::vector<std::string>& order = parts->inputs;
    std::sort(inputs.begin(), inputs.end(), [&order](const auto& a, const auto& b) {
        return std::find(order.begin(), order.end(), a.name) <
               std::find(order.begin(), order.end(), b.name);
    });
    check(inputs, without_cut(outputs_of(*result.first), outputs_of(*result.session), result.cut),
          *result.session, *graph.spec, false);
    return result;
}

Loaded OrtBackend::load_wrapped(const Graph& graph) const {
    const std::filesystem::path& path = &graph == &encoder_ ? engines_->encoder : engines_->decoder;
    try {
        Ort::SessionOptions options = options_for(graph);
        // The engine is the whole graph: a node on the CPU would mean that it was not used.
        options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
        auto session = std::make_shared<Ort::Session>(ort_environment(), path.c_str(), options);
        check(inputs_of(*session), outputs_of(*session), *session, *graph.spec, true);
        return {session, nullptr, {}};
    } catch (const Ort::Exception& error) {
        throw BackendError("ONNX Runtime cannot load the engine of " + path.string() + ": " +
                           error.what());
    }
}

void OrtBackend::check(const std::vector<LoadedTensor>& inputs,
                       const std::vector<LoadedTensor>& outputs, const Ort::Session& session,
                       const GraphSpec& spec, bool wrapped) const {
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
    const std::string mismatch = signature_mismatch(promised, inputs, outputs);
    if (!mismatch.empty()) {
        throw BundleError(mismatch, file);
    }
}

void OrtBackend::run(const Graph& graph, Ort::Session& session, Ort::IoBinding& binding,
                     bool give_memory_back, const Cancellation* cancellation) const {
    Ort::RunOptions options;
    const bool has_arena = options_.memory_arena && !options_.environment_allocators;
    if (give_memory_back && has_arena && !device_.on_gpu()) {
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

std::shared_ptr<const FeatureTransfer> OrtBackend::transfer() const {
    const std::lock_guard<std::mutex> lock(transfer_mutex_);
    if (transfer_ == nullptr) {
        transfer_ = std::make_shared<FeatureTransfer>(
            device_, engines_ ? engines_->features_dtype : encoder_.spec->outputs.at(0).dtype);
    }
    return transfer_;
}

}  // namespace

std::string ort_failure(const Device& device) {
    ort_environment();
    const std::vector<std::string> names = Ort::GetAvailableProviders();
    const char* const name = ort_name(device.provider);
    if (std::find(names.begin(), names.end(), name) == names.end()) {
        return std::string("this ONNX Runtime (") + OrtGetApiBase()->GetVersionString() +
               ") was built without " + name;
    }
    if (!device.on_gpu()) {
        return "";
    }
    // ONNX Runtime lists its CUDA provider even where there is no driver.
    try {
        const Copier copier(device, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        std::array<float, 1> number = {1};
        const std::array<std::int64_t, 1> shape = {1};
        copier.to_device(Ort::Value::CreateTensor<float>(
            host_memory(), number.data(), number.size(), shape.data(), shape.size()));
        return "";
    } catch (const Ort::Exception& error) {
        return std::string("it is not usable here: ") + error.what();
    }
}

std::shared_ptr<const Backend> open_ort_backend(const Bundle& bundle, const ModelOptions& options,
                                                const Device& device) {
    return std::make_shared<const OrtBackend>(bundle, options, device);
}

}  // namespace sam3rt
