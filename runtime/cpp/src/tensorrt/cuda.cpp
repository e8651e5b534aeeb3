#include "tensorrt/cuda.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>

#include "log.hpp"

namespace sam3rt {
namespace {

// Of cuda.h.
constexpr int out_of_memory = 2;
constexpr unsigned non_blocking_stream = 1;
constexpr int thread_local_capture = 1;
constexpr unsigned event_without_timing = 2;
constexpr int memory_type_of_pointer = 2;
constexpr int device_of_pointer = 9;
constexpr unsigned host_memory = 1;
constexpr int invalid_value = 1;
constexpr int invalid_handle = 400;
constexpr int capture_implicit = 906;
// CUresult after which nothing works any more in this process: what a kernel did wrong, or what
// broke in the GPU.
constexpr std::array<int, 12> sticky = {214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721};

double gib(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

/// The functions of a library that is never closed.
class Functions {
public:
    Functions(void* library, std::string name) : library_(library), name_(std::move(name)) {}

    template <typename Function>
    void find(Function*& function, const char* name) const {
        function = reinterpret_cast<Function*>(::dlsym(library_, name));
        if (function == nullptr) {
            throw BackendError(name_ + " has no " + name + ": it is too old");
        }
    }

private:
    void* library_;
    std::string name_;
};

/// NVIDIA's runtime compiler.
struct Nvrtc {
    int (*create)(void**, const char*, const char*, int, const char* const*, const char* const*);
    int (*compile)(void*, int, const char* const*);
    int (*log_size)(void*, std::size_t*);
    int (*log)(void*, char*);
    int (*size)(void*, std::size_t*);
    int (*cubin)(void*, char*);
    int (*destroy)(void**);

    explicit Nvrtc(const Functions& library) {
        library.find(create, "nvrtcCreateProgram");
        library.find(compile, "nvrtcCompileProgram");
        library.find(log_size, "nvrtcGetProgramLogSize");
        library.find(log, "nvrtcGetProgramLog");
        library.find(size, "nvrtcGetCUBINSize");
        library.find(cubin, "nvrtcGetCUBIN");
        library.find(destroy, "nvrtcDestroyProgram");
    }
};

/// The one of the driver's CUDA version, or an older one.
Nvrtc open_nvrtc(int cuda_major) {
    for (int major = cuda_major; major >= 11; --major) {
        // That of CUDA 11 is called by its second number.
        const std::string name =
            "libnvrtc.so." + (major == 11 ? std::string("11.2") : std::to_string(major));
        if (void* library = ::dlopen(name.c_str(), RTLD_NOW)) {
            return Nvrtc(Functions(library, name));
        }
    }
    throw BackendError("there is no libnvrtc.so." + std::to_string(cuda_major) + " here");
}

}  // namespace

struct Cuda::Driver {
    using Event = struct CUevent_st*;

    int (*error_name)(int, const char**);
    int (*error_text)(int, const char**);
    int (*version)(int*);
    int (*device_get)(int*, int);
    int (*retain)(void**, int);
    int (*release)(int);
    int (*push)(void*);
    int (*pop)(void**);
    int (*exchange_capture_mode)(int*);
    int (*memory_info)(std::size_t*, std::size_t*);
    int (*allocate)(DevicePointer*, std::size_t);
    int (*free)(DevicePointer);
    int (*allocate_host)(void**, std::size_t, unsigned);
    int (*free_host)(void*);
    int (*stream_create)(Stream*, unsigned);
    int (*stream_destroy)(Stream);
    int (*stream_synchronize)(Stream);
    int (*stream_wait)(Stream, Event, unsigned);
    int (*stream_records)(Stream, int*);
    int (*event_create)(Event*, unsigned);
    int (*event_record)(Event, Stream);
    int (*event_destroy)(Event);
    int (*pointer_attribute)(void*, int, DevicePointer);
    int (*upload)(DevicePointer, const void*, std::size_t, Stream);
    int (*download)(void*, DevicePointer, std::size_t, Stream);
    int (*copy)(DevicePointer, DevicePointer, std::size_t, Stream);
    int (*begin_capture)(Stream, int);
    int (*end_capture)(Stream, void**);
    int (*instantiate)(Graph*, void*, unsigned long long);
    int (*destroy_recorded)(void*);
    int (*launch_graph)(Graph, Stream);
    int (*destroy_graph)(Graph);
    int (*load_module)(void**, const void*);
    int (*unload_module)(void*);
    int (*get_function)(Kernel*, void*, const char*);
    int (*launch_kernel)(Kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                         unsigned, Stream, void**, void**);

    explicit Driver(const Functions& library) {
        library.find(error_name, "cuGetErrorName");
        library.find(error_text, "cuGetErrorString");
        library.find(version, "cuDriverGetVersion");
        library.find(device_get, "cuDeviceGet");
        library.find(retain, "cuDevicePrimaryCtxRetain");
        library.find(release, "cuDevicePrimaryCtxRelease_v2");
        library.find(push, "cuCtxPushCurrent_v2");
        library.find(pop, "cuCtxPopCurrent_v2");
        library.find(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
        library.find(memory_info, "cuMemGetInfo_v2");
        library.find(allocate, "cuMemAlloc_v2");
        library.find(free, "cuMemFree_v2");
        library.find(allocate_host, "cuMemHostAlloc");
        library.find(free_host, "cuMemFreeHost");
        library.find(stream_create, "cuStreamCreate");
        library.find(stream_destroy, "cuStreamDestroy_v2");
        library.find(stream_synchronize, "cuStreamSynchronize");
        library.find(stream_wait, "cuStreamWaitEvent");
        library.find(stream_records, "cuStreamIsCapturing");
        library.find(event_create, "cuEventCreate");
        library.find(event_record, "cuEventRecord");
        library.find(event_destroy, "cuEventDestroy_v2");
        library.find(pointer_attribute, "cuPointerGetAttribute");
        library.find(upload, "cuMemcpyHtoDAsync_v2");
        library.find(download, "cuMemcpyDtoHAsync_v2");
        library.find(copy, "cuMemcpyDtoDAsync_v2");
        library.find(begin_capture, "cuStreamBeginCapture_v2");
        library.find(end_capture, "cuStreamEndCapture");
        library.find(instantiate, "cuGraphInstantiateWithFlags");
        library.find(destroy_recorded, "cuGraphDestroy");
        library.find(launch_graph, "cuGraphLaunch");
        library.find(destroy_graph, "cuGraphExecDestroy");
        library.find(load_module, "cuModuleLoadData");
        library.find(unload_module, "cuModuleUnload");
        library.find(get_function, "cuModuleGetFunction");
        library.find(launch_kernel, "cuLaunchKernel");
    }

    static const Driver& get() {
        static const Driver driver = [] {
            void* library = ::dlopen("libcuda.so.1", RTLD_NOW);
            if (library == nullptr) {
                throw BackendError("tensorrt needs an NVIDIA driver, and there is none here");
            }
            return Driver(Functions(library, "the NVIDIA driver's library"));
        }();
        return driver;
    }
};

Cuda::Cuda(int number, Machine machine)
    : driver_(Driver::get()), number_(number), machine_(std::move(machine)) {
    check(driver_.device_get(&device_, number), "cuDeviceGet");
    // The context that TensorRT's own CUDA uses.
    check(driver_.retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Cuda::~Cuda() {
    if (module_ != nullptr && driver_.push(context_) == 0) {
        driver_.unload_module(module_);
        void* own = nullptr;
        driver_.pop(&own);
    }
    driver_.release(device_);
}

Cuda::Active::Active(const Cuda& cuda) : cuda_(cuda), mode_(thread_local_capture) {
    cuda.check(cuda.driver_.push(cuda.context_), "cuCtxPushCurrent");
    cuda.driver_.exchange_capture_mode(&mode_);
}

Cuda::Active::~Active() {
    cuda_.driver_.exchange_capture_mode(&mode_);
    void* own = nullptr;
    cuda_.driver_.pop(&own);
}

DevicePointer Cuda::allocate(std::size_t bytes) const {
    DevicePointer address = 0;
    const int status = driver_.allocate(&address, bytes);
    if (status == out_of_memory) {
        std::size_t free = 0;
        std::size_t total = 0;
        driver_.memory_info(&free, &total);
        throw OutOfDeviceMemoryError(
            "out of device memory: " + std::to_string(gib(bytes)) + " GiB were asked for, " +
            std::to_string(gib(free)) + " of " + std::to_string(gib(total)) +
            " GiB are free; keep fewer embeddings or models at a time, close what else uses the "
            "GPU, or build engines with fewer objects at once (--max-objects)");
    }
    check(status, "cuMemAlloc");
    return address;
}

void Cuda::free(DevicePointer address) const noexcept { driver_.free(address); }

void* Cuda::allocate_host(std::size_t bytes) const {
    void* address = nullptr;
    check(driver_.allocate_host(&address, bytes, 0), "cuMemHostAlloc");
    return address;
}

void Cuda::free_host(void* address) const noexcept { driver_.free_host(address); }

Stream Cuda::create_stream() const {
    Stream stream = nullptr;
    check(driver_.stream_create(&stream, non_blocking_stream), "cuStreamCreate");
    return stream;
}

void Cuda::destroy_stream(Stream stream) const noexcept { driver_.stream_destroy(stream); }

void Cuda::synchronize(Stream stream) const {
    check(driver_.stream_synchronize(stream), "cuStreamSynchronize");
}

void Cuda::wait_for(Stream stream, void* other) const {
    auto* const callers = static_cast<Stream>(other);
    int records = 0;
    int status = driver_.stream_records(callers, &records);
    if (status == capture_implicit || (status == 0 && records != 0)) {
        throw InvalidInputError("stream", "a stream that is being recorded",
                                "one that runs what is queued on it");
    }
    Driver::Event event = nullptr;
    if (status == 0) {
        check(driver_.event_create(&event, event_without_timing), "cuEventCreate");
        status = driver_.event_record(event, callers);
    }
    if (status == 0) {
        status = driver_.stream_wait(stream, event, 0);
    }
    if (event != nullptr) {
        // What waits for it does so all the same.
        driver_.event_destroy(event);
    }
    if (status == invalid_handle || status == invalid_value) {
        throw InvalidInputError("stream", "no stream of cuda:" + std::to_string(number_),
                                "a stream of that GPU's primary context");
    }
    check(status, "cuEventRecord");
}

std::string Cuda::elsewhere(const void* address) const {
    const auto pointer = reinterpret_cast<DevicePointer>(address);
    unsigned type = 0;
    int device = 0;
    const int status = driver_.pointer_attribute(&type, memory_type_of_pointer, pointer);
    // CUDA knows nothing of host memory that was not made or registered with it.
    if (status == invalid_value || (status == 0 && type == host_memory)) {
        return "host memory";
    }
    check(status, "cuPointerGetAttribute");
    check(driver_.pointer_attribute(&device, device_of_pointer, pointer), "cuPointerGetAttribute");
    return device == number_ ? "" : "memory of cuda:" + std::to_string(device);
}

void Cuda::upload(DevicePointer target, const void* source, std::size_t bytes,
                  Stream stream) const {
    check(driver_.upload(target, source, bytes, stream), "cuMemcpyHtoDAsync");
}

void Cuda::download(void* target, DevicePointer source, std::size_t bytes, Stream stream) const {
    check(driver_.download(target, source, bytes, stream), "cuMemcpyDtoHAsync");
}

void Cuda::copy(DevicePointer target, DevicePointer source, std::size_t bytes,
                Stream stream) const {
    check(driver_.copy(target, source, bytes, stream), "cuMemcpyDtoDAsync");
}

void Cuda::begin_capture(Stream stream) const {
    check(driver_.begin_capture(stream, thread_local_capture), "cuStreamBeginCapture");
}

Graph Cuda::end_capture(Stream stream) const {
    void* recorded = nullptr;
    check(driver_.end_capture(stream, &recorded), "cuStreamEndCapture");
    Graph graph = nullptr;
    const int status = driver_.instantiate(&graph, recorded, 0);
    driver_.destroy_recorded(recorded);
    check(status, "cuGraphInstantiate");
    return graph;
}

void Cuda::launch(Graph graph, Stream stream) const {
    check(driver_.launch_graph(graph, stream), "cuGraphLaunch");
}

void Cuda::destroy_graph(Graph graph) const noexcept { driver_.destroy_graph(graph); }

std::vector<char> Cuda::compile(const char* source) const {
    int version = 0;
    check(driver_.version(&version), "cuDriverGetVersion");
    const Nvrtc nvrtc = open_nvrtc(version / 1000);
    void* program = nullptr;
    if (nvrtc.create(&program, source, "sam3rt.cu", 0, nullptr, nullptr) != 0) {
        throw BackendError("NVRTC cannot make a program");
    }
    const std::shared_ptr<void> owner(program, [&nvrtc](void* made) { nvrtc.destroy(&made); });
    const std::string capability = machine_.gpu.capability_digits();
    const std::string architecture = "--gpu-architecture=sm_" + capability;
    // No contraction: a result is the same as on the CPU.
    const std::array<const char*, 2> options = {architecture.c_str(), "--fmad=false"};
    if (nvrtc.compile(program, static_cast<int>(options.size()), options.data()) != 0) {
        std::size_t size = 0;
        nvrtc.log_size(program, &size);
        std::string text(size, '\0');
        if (size > 0) {
            nvrtc.log(program, text.data());
        }
        throw BackendError("NVRTC refuses the kernels for sm_" + capability + ": " + text.c_str());
    }
    std::size_t size = 0;
    if (nvrtc.size(program, &size) != 0 || size == 0) {
        throw BackendError("NVRTC made nothing of the kernels");
    }
    std::vector<char> image(size);
    if (nvrtc.cubin(program, image.data()) != 0) {
        throw BackendError("NVRTC made nothing of the kernels");
    }
    return image;
}

std::vector<Kernel> Cuda::load_kernels(const char* source, const std::vector<std::string>& names) {
    if (module_ == nullptr) {
        const std::vector<char> image = compile(source);
        check(driver_.load_module(&module_, image.data()), "cuModuleLoadData");
    }
    if (kernels_.empty()) {
        std::vector<Kernel> kernels(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) {
            check(driver_.get_function(&kernels[i], module_, names[i].c_str()),
                  "cuModuleGetFunction");
        }
        kernels_ = std::move(kernels);
    }
    return kernels_;
}

void Cuda::launch_kernel(Kernel kernel, unsigned blocks, unsigned threads, DevicePointer argument,
                         Stream stream) const {
    std::array<void*, 1> arguments = {&argument};
    check(driver_.launch_kernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, arguments.data(),
                                nullptr),
          "cuLaunchKernel");
}

void Cuda::check(int status, const char* call) const {
    if (status == 0) {
        return;
    }
    const char* name = "unknown error";
    const char* text = "";
    driver_.error_name(status, &name);
    driver_.error_text(status, &text);
    std::string message = std::string(call) + " failed: " + name + ", " + text;
    if (lost_ || std::find(sticky.begin(), sticky.end(), status) != sticky.end()) {
        lost_ = true;
        message += "; cuda:" + std::to_string(number_) +
                   " cannot be used in this process any more. Start the process again; where that "
                   "does not help, look into the system's log for Xid errors";
    }
    throw BackendError(message);
}

}  // namespace sam3rt
