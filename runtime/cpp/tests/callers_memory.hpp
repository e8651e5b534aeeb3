// Device memory of a program that uses the library, with a stream on which it is written: by the
// NVIDIA driver's own library, real or not.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sam3rt::testing {

/// Calls a function of the driver, which must succeed.
template <typename... Arguments>
void cuda(const char* name, Arguments... arguments) {
    static void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
    auto* function = reinterpret_cast<int (*)(Arguments...)>(
        library == nullptr ? nullptr : ::dlsym(library, name));
    if (function == nullptr) {
        throw std::runtime_error(std::string("the driver has no ") + name);
    }
    if (const int status = function(arguments...)) {
        throw std::runtime_error(std::string(name) + " failed: " + std::to_string(status));
    }
}

/// Memory of the first GPU, and a stream that is its caller's own, or CUDA's default one.
class CallersMemory {
public:
    CallersMemory(std::size_t bytes, bool has_stream) : bytes_(bytes) {
        void* context = nullptr;
        cuda("cuInit", 0U);
        cuda("cuDevicePrimaryCtxRetain", &context, 0);
        cuda("cuCtxPushCurrent_v2", context);
        cuda("cuMemAlloc_v2", &address_, bytes);
        cuda("cuMemHostAlloc", &pinned_, bytes, 0U);
        if (has_stream) {
            cuda("cuStreamCreate", &stream_, 0U);
        }
        cuda("cuCtxPopCurrent_v2", &context);
        context_ = context;
    }
    CallersMemory(const CallersMemory&) = delete;
    CallersMemory& operator=(const CallersMemory&) = delete;
    // NOLINTNEXTLINE(bugprone-exception-escape): where CUDA fails here, the test has failed.
    ~CallersMemory() {
        enter();
        for (const Address block : blocks_) {
            cuda("cuMemFree_v2", block);
        }
        cuda("cuMemFree_v2", address_);
        cuda("cuMemFreeHost", pinned_);
        if (stream_ != nullptr) {
            cuda("cuStreamDestroy_v2", stream_);
        }
        leave();
        cuda("cuDevicePrimaryCtxRelease_v2", 0);
    }

    /// Queue that these bytes are written, after a while on a real GPU.
    void fill(const void* values, std::size_t delay) {
        std::memcpy(pinned_, values, bytes_);
        enter();
        if (delay != 0) {
            Address block = 0;
            cuda("cuMemAlloc_v2", &block, delayed_bytes);
            for (std::size_t i = 0; i < delay; ++i) {
                cuda("cuMemcpyDtoDAsync_v2", block, block + delayed_bytes / 2, delayed_bytes / 2,
                     stream_);
            }
            blocks_.push_back(block);
        }
        cuda("cuMemcpyHtoDAsync_v2", address_, static_cast<const void*>(pinned_), bytes_, stream_);
        leave();
    }

    /// The bytes, once all that was queued is done.
    std::vector<std::uint8_t> content() {
        std::vector<std::uint8_t> values(bytes_);
        enter();
        cuda("cuMemcpyDtoHAsync_v2", pinned_, address_, bytes_, stream_);
        cuda("cuStreamSynchronize", stream_);
        leave();
        std::memcpy(values.data(), pinned_, bytes_);
        return values;
    }

    /// Record what is queued from now on, which nobody launches, or stop that.
    void record(bool on) {
        enter();
        if (on) {
            cuda("cuStreamBeginCapture_v2", stream_, 2);
        } else {
            void* graph = nullptr;
            cuda("cuStreamEndCapture", stream_, &graph);
            cuda("cuGraphDestroy", graph);
        }
        leave();
    }

    std::uint8_t* address() const { return reinterpret_cast<std::uint8_t*>(address_); }
    void* stream() const { return stream_; }

private:
    using Address = unsigned long long;
    static constexpr std::size_t delayed_bytes = std::size_t{1} << 27;

    void enter() { cuda("cuCtxPushCurrent_v2", context_); }
    void leave() {
        void* left = nullptr;
        cuda("cuCtxPopCurrent_v2", &left);
    }

    std::size_t bytes_;
    void* context_ = nullptr;
    Address address_ = 0;
    void* pinned_ = nullptr;
    void* stream_ = nullptr;
    std::vector<Address> blocks_;
};

}  // namespace sam3rt::testing
