// What lanes are made of: a stream, and work that is queued on it again and again.
#pragma once

#include <functional>
#include <memory>

#include "tensorrt/memory.hpp"
#include "tensorrt/network.hpp"

namespace sam3rt {

/// A stream with an owner.
class OwnStream {
public:
    explicit OwnStream(const Cuda& cuda) : cuda_(cuda), stream_(cuda.create_stream()) {}
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;
    ~OwnStream();

    operator Stream() const { return stream_; }

private:
    const Cuda& cuda_;
    const Stream stream_;
};

/// Queues the same work again and again: as a CUDA graph, once it has run. TensorRT wants a run
/// before the recording, and a context of its own for each recording.
class Replay {
public:
    Replay(const Cuda& cuda, Stream stream, std::unique_ptr<EngineContext> context,
           std::function<void(EngineContext&)> work)
        : cuda_(cuda), stream_(stream), context_(std::move(context)), work_(std::move(work)) {}
    Replay(const Replay&) = delete;
    Replay& operator=(const Replay&) = delete;
    ~Replay();

    void queue();
    /// Make the graph, once, with the stream idle and a run behind it. Whether this was the first
    /// run.
    bool record();

private:
    const Cuda& cuda_;
    const Stream stream_;
    const std::unique_ptr<EngineContext> context_;
    const std::function<void(EngineContext&)> work_;
    Graph graph_ = nullptr;
    bool tried_ = false;
};

/// Set the addresses of all tensors of a layout in a block but the job's.
void set_addresses(EngineContext& context, const Layout& layout, const Block& block);

/// Throws BackendError where an engine's outputs are of other shapes than their layout.
void check_shapes(const EngineContext& context, const Layout& layout);

/// On any error, wait for the stream, so that nothing still uses a buffer.
template <typename Function>
auto idle_on_error(const Cuda& cuda, Stream stream, const Function& function) {
    try {
        return function();
    } catch (...) {
        try {
            cuda.synchronize(stream);
        } catch (const BackendError&) {
            // What happened first counts.
        }
        throw;
    }
}

}  // namespace sam3rt
