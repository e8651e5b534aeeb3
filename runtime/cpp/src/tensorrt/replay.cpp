#include "tensorrt/replay.hpp"

#include "log.hpp"

namespace sam3rt {

OwnStream::~OwnStream() {
    try {
        const Cuda::Active active(cuda_);
        cuda_.destroy_stream(stream_);
    } catch (const Error&) {
        // The GPU is lost, or the process ends.
    }
}

Replay::~Replay() {
    if (graph_ != nullptr) {
        try {
            const Cuda::Active active(cuda_);
            cuda_.destroy_graph(graph_);
        } catch (const Error&) {
            // The GPU is lost, or the process ends.
        }
    }
}

void Replay::queue() {
    if (graph_ == nullptr) {
        work_(*context_);
    } else {
        cuda_.launch(graph_, stream_);
    }
}

bool Replay::record() {
    if (tried_) {
        return false;
    }
    tried_ = true;
    try {
        if (!context_->can_be_recorded(stream_)) {
            throw BackendError("TensorRT refuses to be recorded");
        }
        cuda_.begin_capture(stream_);
        try {
            work_(*context_);
        } catch (...) {
            try {
                cuda_.destroy_graph(cuda_.end_capture(stream_));
            } catch (const BackendError&) {
                // What happened first counts.
            }
            throw;
        }
        graph_ = cuda_.end_capture(stream_);
    } catch (const BackendError& error) {
        log(LogLevel::info, std::string("runs without a CUDA graph: ") + error.what());
    }
    return true;
}

void set_addresses(EngineContext& context, const Layout& layout, const Block& block) {
    for (const Slot& slot : layout.slots()) {
        if (slot.name != job_name) {
            context.set_address(slot.name, block.address + slot.offset);
        }
    }
}

void check_shapes(const EngineContext& context, const Layout& layout) {
    for (const Slot& slot : layout.slots()) {
        if (context.shape(slot.name) != slot.shape) {
            throw BackendError("an engine makes " + slot.name +
                               " of another shape than the "
                               "manifest says: build it again");
        }
    }
}

}  // namespace sam3rt
