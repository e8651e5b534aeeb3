// CUDA, as little of it as TensorRT needs around it: memory, streams, graphs and kernels of one
// GPU, by the driver's own library, so that nothing here links to CUDA.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu.hpp"
#include "sam3rt/sam3rt.hpp"

// Of cuda.h. TensorRT takes a stream by this type.
struct CUstream_st;
struct CUgraphExec_st;
struct CUfunc_st;

namespace sam3rt {

/// An address in device memory.
using DevicePointer = unsigned long long;
using Stream = CUstream_st*;
using Graph = CUgraphExec_st*;
using Kernel = CUfunc_st*;

/// There is not as much device memory as was asked for.
class OutOfDeviceMemoryError : public BackendError {
public:
    using BackendError::BackendError;
};

/// One GPU. Every method may be called from many threads at once, and needs the GPU to be the
/// thread's current one: see Active. Work is queued on streams and runs in their order; host memory
/// that a copy reads or writes must neither change nor go away before the stream is synchronized.
/// Methods throw BackendError where the driver fails; those that give something back do not throw.
class Cuda {
public:
    /// Ask query_gpu first: it says what to do where there is no driver.
    Cuda(int number, Machine machine);
    Cuda(const Cuda&) = delete;
    Cuda& operator=(const Cuda&) = delete;
    ~Cuda();

    const Machine& machine() const { return machine_; }

    /// Within its life the GPU is the calling thread's current one. While one thread records a CUDA
    /// graph in the mode that ONNX Runtime does, CUDA refuses other threads most calls, unless they
    /// say that recordings elsewhere do not concern them: the calling thread says so.
    class Active {
    public:
        explicit Active(const Cuda& cuda);
        Active(const Active&) = delete;
        Active& operator=(const Active&) = delete;
        ~Active();

    private:
        const Cuda& cuda_;
        int mode_;
    };

    /// Aligned to 256 bytes. Throws OutOfDeviceMemoryError, which says how much there is.
    DevicePointer allocate(std::size_t bytes) const;
    void free(DevicePointer address) const noexcept;
    /// Pinned host memory.
    void* allocate_host(std::size_t bytes) const;
    void free_host(void* address) const noexcept;

    /// A stream that does not wait for the default one.
    Stream create_stream() const;
    void destroy_stream(Stream stream) const noexcept;
    void synchronize(Stream stream) const;
    /// Let what is queued on a stream from now on wait for what is queued on another one so far, of
    /// the caller's; null is the default stream. The calling thread does not wait.
    /// Throws InvalidInputError about "stream" where that is not one of this GPU's primary context
    /// or is being recorded.
    void wait_for(Stream stream, void* other) const;

    /// Where an address is, if that is not the memory of this GPU, such as "host memory".
    std::string elsewhere(const void* address) const;

    void upload(DevicePointer target, const void* source, std::size_t bytes, Stream stream) const;
    void download(void* target, DevicePointer source, std::size_t bytes, Stream stream) const;
    void copy(DevicePointer target, DevicePointer source, std::size_t bytes, Stream stream) const;

    /// Record what this thread queues on a stream instead of running it.
    void begin_capture(Stream stream) const;
    /// The recorded work, which can be launched. The stream is usable again whatever happens.
    Graph end_capture(Stream stream) const;
    void launch(Graph graph, Stream stream) const;
    void destroy_graph(Graph graph) const noexcept;

    /// Compile kernels for the GPU with NVRTC and load them, in the order of their names; at later
    /// calls, those of the first. They live as long as this. Throws BackendError where NVRTC is not
    /// there or refuses the source.
    std::vector<Kernel> load_kernels(const char* source, const std::vector<std::string>& names);
    /// Queue a kernel whose one argument is a device address.
    void launch_kernel(Kernel kernel, unsigned blocks, unsigned threads, DevicePointer argument,
                       Stream stream) const;

    struct Driver;

private:
    std::vector<char> compile(const char* source) const;
    void check(int status, const char* call) const;

    const Driver& driver_;
    const int number_;
    const Machine machine_;
    int device_ = 0;
    void* context_ = nullptr;
    void* module_ = nullptr;
    std::vector<Kernel> kernels_;
    /// Whether the GPU cannot be used in this process any more.
    mutable std::atomic<bool> lost_{false};
};

}  // namespace sam3rt
