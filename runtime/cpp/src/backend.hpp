// Runs the two graphs of a bundle in ONNX Runtime, on one device.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "accuracy.hpp"
#include "bundle.hpp"
#include "device.hpp"
#include "engines.hpp"
#include "ort_session.hpp"
#include "prompts.hpp"
#include "sam3rt/sam3rt.hpp"
#include "turnstile.hpp"

namespace sam3rt {

/// Brings float32 maps to a device and back, in the type that the graphs use for them.
class FeatureTransfer {
public:
    /// `dtype` is "float32" or "float16".
    FeatureTransfer(const Device& device, const std::string& dtype);

    Array<float> to_host(const Ort::Value& value) const;
    Ort::Value to_device(const Array<float>& map) const;

private:
    bool half_;
    /// Absent on the CPU, whose memory is the host's.
    std::optional<Copier> copier_;
};

/// One image's feature maps, wherever ONNX Runtime keeps them.
struct Features {
    std::vector<Ort::Value> values;
    std::shared_ptr<const FeatureTransfer> transfer;
    std::string device;
    /// The session whose allocator the values are from, if any.
    std::shared_ptr<Ort::Session> owner;
};

/// The two graphs as sessions, created at first use. Every method may be called from many threads.
class Backend {
public:
    /// Throws InvalidInputError where an option makes no sense, BackendError where the device is
    /// not usable here, or has no engines.
    Backend(const Bundle& bundle, const ModelOptions& options);
    /// The same with these engines, or none, whether or not they are proven.
    Backend(const Bundle& bundle, const ModelOptions& options, const Device& device,
            std::optional<EngineSet> engines);

    const Device& device() const { return device_; }
    /// What computes: "onnxruntime", "tensorrt" or "tensorrt-rtx".
    std::string name() const;
    /// What it computes in: "fp32", or the recipe of the engines.
    std::string precision() const { return engines_ ? engines_->precision : "fp32"; }

    /// Run the encoder on float32 [1, 3, H, W]; the features stay on the device.
    std::shared_ptr<const Features> encode(const Array<float>& pixels,
                                           const Cancellation* cancellation) const;

    /// Bring feature maps, [1, C, h, w] each, to the device.
    std::shared_ptr<const Features> upload(const std::vector<Array<float>>& maps) const;

    /// Run the decoder and bring the named outputs, [1, P, ...] each, to the host, in the order
    /// asked for. It runs on a few objects at a time: memory does not grow with the number of
    /// objects.
    std::vector<Array<float>> decode(const Features& features, const PackedPrompts& prompts,
                                     const std::vector<std::string>& outputs,
                                     const Cancellation* cancellation) const;

    /// Load both graphs now, also one that could not be loaded before.
    void prepare() const;

    bool encoder_loaded() const;

private:
    /// A session that is made when it is first asked for.
    struct Graph {
        explicit Graph(const GraphSpec& graph_spec, int places)
            : spec(&graph_spec), turnstile(places) {}

        const GraphSpec* spec;
        mutable std::mutex mutex;
        mutable std::shared_ptr<Ort::Session> session;
        /// Why it could not be made. A service would otherwise try again at every request.
        mutable std::exception_ptr failure;
        mutable std::atomic<bool> loaded{false};
        /// Bounds how many runs hold working memory at once.
        mutable Turnstile turnstile;
    };

    std::shared_ptr<Ort::Session> session_of(const Graph& graph, bool try_again = false) const;
    std::shared_ptr<Ort::Session> load(const Graph& graph) const;
    std::shared_ptr<Ort::Session> load_wrapped(const Graph& graph) const;
    Ort::SessionOptions options_for(const Graph& graph) const;
    void check(const Ort::Session& session, const GraphSpec& spec, bool wrapped) const;
    void run(const Graph& graph, Ort::Session& session, Ort::IoBinding& binding,
             bool give_memory_back, const Cancellation* cancellation) const;
    std::shared_ptr<const FeatureTransfer> transfer() const;

    const Bundle& bundle_;
    int threads_;
    bool map_weights_;
    Device device_;
    std::optional<EngineSet> engines_;
    Array<float> blank_mask_;
    Graph encoder_;
    Graph decoder_;
    mutable std::mutex transfer_mutex_;
    mutable std::shared_ptr<const FeatureTransfer> transfer_;
};

/// Copies of feature maps on the host, [1, C, h, w] each, finest first.
/// Throws BackendError where they cannot be brought from the device.
std::vector<Array<float>> to_host(const Features& features);

/// What the accuracy gate runs. The backend and `cancellation`, which may be null, must outlive it.
Runner runner_of(const Backend& backend, const Manifest& manifest,
                 const Cancellation* cancellation);

}  // namespace sam3rt
