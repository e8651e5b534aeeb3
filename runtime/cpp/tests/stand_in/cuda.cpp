// Stands in for the NVIDIA driver's library, libcuda.so.1: a GPU whose memory is the host's. Work
// on a stream is done when the stream is synchronized, or another one that waits for it, and not
// before, so that nobody can read a result that the GPU would not have yet. What is recorded can be
// launched again and again. As CUDA does, an upload reads pinned memory when its turn comes, and
// other host memory at once; such an upload cannot be recorded here.
//
// Of the environment it takes STAND_IN_MEMORY (bytes of device memory), STAND_IN_CAPTURE=0 (nothing
// can be recorded), STAND_IN_LOST=N (the Nth synchronization and everything after it fail),
// STAND_IN_OWNER=N (memory is said to be another GPU's) and STAND_IN_REPORT (a file: what is left
// when the process ends, and what was done).

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

struct ConvertJob;
struct MaskJob;
struct ResizeJob;
extern "C" {
void convert_image(const ConvertJob*);
void resize_weights(const ResizeJob*);
void resize_image(const ResizeJob*);
void find_runs(const MaskJob*);
void join_runs(const MaskJob*);
void count_areas(const MaskJob*);
void clean_logits(const MaskJob*);
void make_masks(const MaskJob*);
}

namespace {

using Pointer = unsigned long long;
using Work = std::deque<std::function<void()>>;

constexpr int ok = 0;
constexpr int invalid_value = 1;
constexpr int out_of_memory = 2;
constexpr int no_context = 201;
constexpr int invalid_handle = 400;
constexpr int illegal_address = 700;
constexpr int capture_unsupported = 900;

struct Stream {
    Work queued;
    /// Whether it is the library's: one that does not wait for the default stream.
    bool is_own = false;
    bool records = false;
    Work recorded;
    /// Held by the thread that does the work, so that it is done in its order.
    std::mutex running;
};

/// A place in a stream.
struct Mark {
    Stream* stream;
    bool reached = false;
};
struct Event {
    std::shared_ptr<Mark> mark;
};

std::size_t from_environment(const char* name, std::size_t otherwise) {
    const char* const value = std::getenv(name);
    return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

struct Gpu {
    std::mutex mutex;
    std::map<Pointer, std::size_t> blocks;
    std::size_t used = 0;
    std::size_t peak = 0;
    int streams = 0;
    int events = 0;
    int graphs = 0;
    std::map<const void*, std::size_t> pinned;
    int contexts = 0;
    int modules = 0;
    std::size_t launches = 0;
    std::size_t kernels = 0;
    std::size_t synchronizations = 0;
    std::size_t waits = 0;
    /// Synchronizations of streams that are not the library's.
    std::size_t others = 0;
    std::size_t uploaded = 0;
    std::size_t downloaded = 0;
    /// Functions of the host, which the stand-in for TensorRT runs its graphs in.
    std::size_t runs = 0;
    /// What null stands for.
    Stream default_stream;

    ~Gpu() {
        if (const char* const path = std::getenv("STAND_IN_REPORT")) {
            std::ofstream(path) << "{\"used\": " << used << ", \"peak\": " << peak
                                << ", \"streams\": " << streams << ", \"events\": " << events
                                << ", \"graphs\": " << graphs
                                << ", \"pinned\": " << pinned.size() << ", \"contexts\": " << contexts
                                << ", \"modules\": " << modules << ", \"launches\": " << launches
                                << ", \"kernels\": " << kernels << ", \"waits\": " << waits
                                << ", \"others\": " << others << ", \"uploaded\": " << uploaded
                                << ", \"downloaded\": " << downloaded << ", \"runs\": " << runs
                                << "}\n";
        }
    }
};

Gpu& gpu() {
    static Gpu only;
    return only;
}

thread_local std::vector<void*> current;
thread_local int capture_mode = 0;

bool is_lost() {
    const std::size_t limit = from_environment("STAND_IN_LOST", 0);
    return limit != 0 && gpu().synchronizations >= limit;
}

/// Whether a call may be made: of this thread, on a GPU that works.
int status() { return is_lost() ? illegal_address : current.empty() ? no_context : ok; }

Stream* stream_of(Stream* stream) { return stream == nullptr ? &gpu().default_stream : stream; }

/// Small numbers stand for streams of other contexts, which no call may be made with.
bool is_stream(Stream* stream) {
    return stream == nullptr || reinterpret_cast<std::uintptr_t>(stream) >= 4096;
}

/// Do a stream's work in its order, until there is none or a mark in it is reached.
void do_work(Stream* stream, const Mark* until) {
    const std::lock_guard<std::mutex> turn(stream->running);
    for (;;) {
        std::function<void()> step;
        {
            const std::lock_guard<std::mutex> lock(gpu().mutex);
            if (stream->queued.empty() || (until != nullptr && until->reached)) {
                return;
            }
            step = std::move(stream->queued.front());
            stream->queued.pop_front();
        }
        step();
    }
}

int add(Stream* given, std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    Stream* const stream = stream_of(given);
    if (const int failure = status()) {
        return failure;
    }
    (stream->records ? stream->recorded : stream->queued).push_back(std::move(work));
    return ok;
}

int copy(void* target, const void* source, std::size_t bytes, Stream* stream) {
    return add(stream, [=] { std::memcpy(target, source, bytes); });
}

void count(std::size_t& total, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    total += bytes;
}

/// Whether all of these bytes of the host are pinned.
bool is_pinned(const void* start, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    const auto after = gpu().pinned.upper_bound(start);
    if (after == gpu().pinned.begin()) {
        return false;
    }
    const auto& [block, size] = *std::prev(after);
    return static_cast<const char*>(start) + bytes <= static_cast<const char*>(block) + size;
}

bool records(Stream* stream) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    return stream_of(stream)->records;
}

void* address(Pointer pointer) { return reinterpret_cast<void*>(pointer); }

}  // namespace

API int cuInit(unsigned) { return ok; }
API int cuDriverGetVersion(int* version) {
    *version = 12040;
    return ok;
}
API int cuDeviceGet(int* device, int number) {
    *device = number;
    return number == 0 ? ok : 101;
}
API int cuDeviceGetName(char* name, int size, int) {
    std::strncpy(name, "NVIDIA L4", static_cast<std::size_t>(size));
    return ok;
}
API int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 8 : 9;
    return ok;
}
API int cuGetErrorName(int, const char** name) {
    *name = "CUDA_ERROR";
    return ok;
}
API int cuGetErrorString(int error, const char** text) {
    *text = error == illegal_address ? "an illegal memory access was encountered" : "an error";
    return ok;
}

API int cuDevicePrimaryCtxRetain(void** context, int) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    ++gpu().contexts;
    *context = &gpu();
    return ok;
}
API int cuDevicePrimaryCtxRelease_v2(int) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    --gpu().contexts;
    return ok;
}
API int cuCtxPushCurrent_v2(void* context) {
    current.push_back(context);
    return ok;
}
API int cuCtxPopCurrent_v2(void** context) {
    *context = current.back();
    current.pop_back();
    return ok;
}
API int cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, capture_mode);
    return ok;
}

API int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    *total = from_environment("STAND_IN_MEMORY", std::size_t{1} << 34);
    *free = *total - gpu().used;
    return ok;
}
API int cuMemAlloc_v2(Pointer* pointer, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (const int failure = status()) {
        return failure;
    }
    const std::size_t total = from_environment("STAND_IN_MEMORY", std::size_t{1} << 34);
    if (bytes == 0 || gpu().used + bytes > total) {
        return bytes == 0 ? invalid_value : out_of_memory;
    }
    void* const block = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    // What has not been written is no number.
    std::memset(block, 0xff, bytes);
    *pointer = reinterpret_cast<Pointer>(block);
    gpu().blocks[*pointer] = bytes;
    gpu().used += bytes;
    gpu().peak = std::max(gpu().peak, gpu().used);
    return ok;
}
API int cuMemFree_v2(Pointer pointer) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    const auto found = gpu().blocks.find(pointer);
    if (found == gpu().blocks.end()) {
        return invalid_value;
    }
    gpu().used -= found->second;
    gpu().blocks.erase(found);
    std::free(address(pointer));
    return ok;
}
API int cuMemHostAlloc(void** memory, std::size_t bytes, unsigned) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (const int failure = status()) {
        return failure;
    }
    *memory = std::malloc(bytes);
    gpu().pinned[*memory] = bytes;
    return ok;
}
API int cuMemFreeHost(void* memory) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    gpu().pinned.erase(memory);
    std::free(memory);
    return ok;
}

API int cuStreamCreate(Stream** stream, unsigned flags) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (const int failure = status()) {
        return failure;
    }
    ++gpu().streams;
    *stream = new Stream;
    (*stream)->is_own = flags == 1;
    return flags <= 1 ? ok : invalid_value;
}
API int cuStreamDestroy_v2(Stream* stream) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    --gpu().streams;
    delete stream;
    return ok;
}
API int cuStreamSynchronize(Stream* given) {
    Stream* const stream = stream_of(given);
    {
        const std::lock_guard<std::mutex> lock(gpu().mutex);
        ++gpu().synchronizations;
        gpu().others += stream->is_own ? 0 : 1;
        if (const int failure = status()) {
            return failure;
        }
        if (stream->records) {
            return capture_unsupported;
        }
    }
    do_work(stream, nullptr);
    return ok;
}
API int cuStreamIsCapturing(Stream* stream, int* records) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    *records = is_stream(stream) && stream_of(stream)->records ? 1 : 0;
    return status();
}
API int cuEventCreate(Event** event, unsigned flags) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    ++gpu().events;
    *event = new Event;
    return flags == 2 ? status() : invalid_value;
}
API int cuEventRecord(Event* event, Stream* stream) {
    if (!is_stream(stream)) {
        return invalid_handle;
    }
    event->mark = std::make_shared<Mark>(Mark{stream_of(stream)});
    return add(stream, [mark = event->mark] {
        const std::lock_guard<std::mutex> lock(gpu().mutex);
        mark->reached = true;
    });
}
API int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    {
        const std::lock_guard<std::mutex> lock(gpu().mutex);
        ++gpu().waits;
    }
    return add(stream, [mark = event->mark] { do_work(mark->stream, mark.get()); });
}
API int cuEventDestroy_v2(Event* event) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    --gpu().events;
    delete event;
    return ok;
}
API int cuPointerGetAttribute(void* value, int attribute, Pointer pointer) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    const auto after = gpu().blocks.upper_bound(pointer);
    if (after == gpu().blocks.begin()) {
        return invalid_value;
    }
    const auto& [start, bytes] = *std::prev(after);
    if (pointer >= start + bytes) {
        return invalid_value;
    }
    // Device memory, of the only GPU unless a test says otherwise.
    const int answer = attribute == 2 ? 2 : static_cast<int>(from_environment("STAND_IN_OWNER", 0));
    std::memcpy(value, &answer, sizeof answer);
    return ok;
}

API int cuMemcpyHtoDAsync_v2(Pointer target, const void* source, std::size_t bytes,
                             Stream* stream) {
    count(gpu().uploaded, bytes);
    if (is_pinned(source, bytes)) {
        return copy(address(target), source, bytes, stream);
    }
    if (records(stream)) {
        return capture_unsupported;
    }
    const auto* const start = static_cast<const char*>(source);
    return add(stream, [=, staged = std::vector<char>(start, start + bytes)] {
        std::memcpy(address(target), staged.data(), bytes);
    });
}
API int cuMemcpyDtoHAsync_v2(void* target, Pointer source, std::size_t bytes, Stream* stream) {
    count(gpu().downloaded, bytes);
    return copy(target, address(source), bytes, stream);
}
API int cuMemcpyDtoDAsync_v2(Pointer target, Pointer source, std::size_t bytes, Stream* stream) {
    return copy(address(target), address(source), bytes, stream);
}
API int cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* argument) {
    return add(stream, [=] {
        count(gpu().runs, 1);
        function(argument);
    });
}

API int cuStreamBeginCapture_v2(Stream* stream, int) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (from_environment("STAND_IN_CAPTURE", 1) == 0) {
        return capture_unsupported;
    }
    stream->records = true;
    return stream->queued.empty() ? status() : invalid_value;
}
API int cuStreamEndCapture(Stream* stream, void** graph) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    stream->records = false;
    *graph = new Work(std::move(stream->recorded));
    stream->recorded.clear();
    ++gpu().graphs;
    return status();
}
API int cuGraphInstantiateWithFlags(Work** executable, Work* graph, unsigned long long) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    ++gpu().graphs;
    *executable = new Work(*graph);
    return status();
}
API int cuGraphDestroy(Work* graph) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    --gpu().graphs;
    delete graph;
    return ok;
}
API int cuGraphExecDestroy(Work* graph) { return cuGraphDestroy(graph); }
API int cuGraphLaunch(Work* graph, Stream* stream) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (const int failure = status()) {
        return failure;
    }
    ++gpu().launches;
    stream->queued.insert(stream->queued.end(), graph->begin(), graph->end());
    return ok;
}

API int cuModuleLoadData(void** module, const void* image) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    if (std::strstr(static_cast<const char*>(image), "make_masks") == nullptr) {
        return 200;
    }
    ++gpu().modules;
    *module = &gpu();
    return status();
}
API int cuModuleUnload(void*) {
    const std::lock_guard<std::mutex> lock(gpu().mutex);
    --gpu().modules;
    return ok;
}
API int cuModuleGetFunction(void** function, void*, const char* name) {
    static const std::map<std::string, void*> kernels = {
        {"convert_image", reinterpret_cast<void*>(convert_image)},
        {"resize_weights", reinterpret_cast<void*>(resize_weights)},
        {"resize_image", reinterpret_cast<void*>(resize_image)},
        {"find_runs", reinterpret_cast<void*>(find_runs)},
        {"join_runs", reinterpret_cast<void*>(join_runs)},
        {"count_areas", reinterpret_cast<void*>(count_areas)},
        {"clean_logits", reinterpret_cast<void*>(clean_logits)},
        {"make_masks", reinterpret_cast<void*>(make_masks)},
    };
    *function = kernels.at(name);
    return ok;
}
API int cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned, Stream* stream, void** arguments, void**) {
    {
        const std::lock_guard<std::mutex> lock(gpu().mutex);
        ++gpu().kernels;
    }
    const void* const job = address(*static_cast<Pointer*>(arguments[0]));
    auto* const kernel = reinterpret_cast<void (*)(const void*)>(function);
    return add(stream, [=] { kernel(job); });
}
