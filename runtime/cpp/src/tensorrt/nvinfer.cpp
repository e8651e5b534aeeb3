// The only file that includes TensorRT's headers. Its library is loaded at run time, so that one
// program runs with and without it.
#include "tensorrt/nvinfer.hpp"

#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <mutex>
#include <system_error>

#include "log.hpp"
#include "sha256.hpp"

#ifndef TRT_MAJOR_RTX
static_assert(NV_TENSORRT_VERSION >= 100300, "TensorRT 10.3 or newer is needed");
#endif

namespace sam3rt {
namespace {

/// Gives TensorRT's lines to the log and keeps the last errors for error messages. TensorRT calls
/// it from its own threads.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* text) noexcept override {
        const LogLevel level = severity <= Severity::kERROR     ? LogLevel::error
                               : severity == Severity::kWARNING ? LogLevel::warning
                                                                : LogLevel::debug;
        try {
            sam3rt::log(level, std::string(tensorrt_flavour()) + ": " + text);
            if (level == LogLevel::error) {
                const std::lock_guard<std::mutex> lock(mutex_);
                last_ = text;
            }
        } catch (const std::bad_alloc&) {
            // Then there is no line.
        }
    }

    /// What TensorRT last complained about, to end an error message with.
    std::string said() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string text = last_.empty() ? "" : ": " + last_;
        last_.clear();
        return text;
    }

private:
    std::mutex mutex_;
    std::string last_;
};

/// TensorRT's library. Neither it nor the logger ever goes away: engines of static lifetime need
/// both.
struct Library {
    Logger logger;
    nvinfer1::IRuntime* runtime = nullptr;
    std::string version;

    Library() {
        // Within one major version, a newer library serves what was built with older headers.
#ifdef TRT_MAJOR_RTX
        const std::string name = "libtensorrt_rtx.so." + std::to_string(TRT_MAJOR_RTX);
#else
        const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
#endif
        void* const library = ::dlopen(name.c_str(), RTLD_NOW);
        if (library == nullptr) {
            const char* const reason = ::dlerror();
            throw BackendError(name + " cannot be loaded: " + (reason == nullptr ? "" : reason));
        }
        const auto number = [library](const char* function) {
            auto* found = reinterpret_cast<std::int32_t (*)()>(::dlsym(library, function));
            return found == nullptr ? 0 : found();
        };
        const int combined = number("getInferLibVersion");
        auto* create = reinterpret_cast<void* (*)(void*, std::int32_t)>(
            ::dlsym(library, "createInferRuntime_INTERNAL"));
        if (create == nullptr || combined < NV_TENSORRT_VERSION) {
            throw BackendError(name + " has version " + std::to_string(combined) +
                               ", older than the headers sam3rt was built with (" +
                               std::to_string(NV_TENSORRT_VERSION) + ")");
        }
        version = std::to_string(combined / 10000) + "." + std::to_string(combined / 100 % 100) +
                  "." + std::to_string(combined % 100) + "." +
                  std::to_string(number("getInferLibBuildVersion"));
        runtime = static_cast<nvinfer1::IRuntime*>(
            create(static_cast<nvinfer1::ILogger*>(&logger), NV_TENSORRT_VERSION));
        if (runtime == nullptr) {
            throw BackendError(name + " cannot start" + logger.said());
        }
    }

    static Library& get() {
        static auto* const library = new Library();
        return *library;
    }

    void require(bool done, const std::string& what) {
        if (!done) {
            throw BackendError(std::string(tensorrt_flavour()) + " refuses " + what +
                               logger.said());
        }
    }
};

Shape shape_of(const nvinfer1::Dims& dims) {
    return Shape(dims.d, dims.d + std::max(dims.nbDims, 0));
}

bool is_dynamic(const Shape& shape) {
    return std::find(shape.begin(), shape.end(), -1) != shape.end();
}

ElementType type_of(const std::string& name, nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
            return ElementType::float32;
        case nvinfer1::DataType::kHALF:
            return ElementType::float16;
        case nvinfer1::DataType::kINT32:
            return ElementType::int32;
        case nvinfer1::DataType::kINT64:
            return ElementType::int64;
        case nvinfer1::DataType::kBOOL:
            return ElementType::boolean;
        default:
            throw BackendError("tensor " + name + " of an engine has type " +
                               std::to_string(static_cast<int>(type)) + ": build it again");
    }
}

class Context : public EngineContext {
public:
    Context(std::shared_ptr<nvinfer1::ICudaEngine> engine, nvinfer1::IExecutionContext* context)
        : engine_(std::move(engine)), context_(context) {}

    void set_shape(const std::string& name, const Shape& shape) override {
        nvinfer1::Dims dims{};
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        std::copy_n(shape.begin(), std::min<std::size_t>(shape.size(), nvinfer1::Dims::MAX_DIMS),
                    dims.d);
        Library::get().require(context_->setInputShape(name.c_str(), dims), "the shape of " + name);
    }

    Shape shape(const std::string& name) const override {
        return shape_of(context_->getTensorShape(name.c_str()));
    }

    std::size_t scratch_bytes() override { return context_->updateDeviceMemorySizeForShapes(); }

    void set_scratch(DevicePointer address, std::size_t bytes) override {
        context_->setDeviceMemoryV2(pointer(address), static_cast<std::int64_t>(bytes));
    }

    void set_address(const std::string& name, DevicePointer address) override {
        Library::get().require(context_->setTensorAddress(name.c_str(), pointer(address)),
                               "the address of " + name);
    }

    bool can_be_recorded([[maybe_unused]] Stream stream) const override {
#ifdef TRT_MAJOR_RTX
        return context_->isStreamCapturable(stream);
#else
        return true;
#endif
    }

    void enqueue(Stream stream) override {
        Library::get().require(context_->enqueueV3(stream), "to run");
    }

private:
    static void* pointer(DevicePointer address) {
        // TensorRT takes addresses in device memory as pointers.
        return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
    }

    std::shared_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

#ifdef TRT_MAJOR_RTX
/// What TensorRT for RTX compiled for this GPU, in a file that begins with the SHA-256 of the rest.
/// One that is damaged, or of another GPU, driver or version, is ignored and replaced.
class CompiledCache {
public:
    CompiledCache(nvinfer1::IRuntimeConfig& configuration, std::filesystem::path path)
        : path_(std::move(path)), cache_(configuration.createRuntimeCache()) {
        Library::get().require(cache_ != nullptr, "a cache of compiled kernels");
        constexpr std::uint64_t limit = std::uint64_t{1} << 32;
        try {
            const Bytes raw = read_file(path_, limit);
            if (raw.size() > digest_size) {
                Bytes digest = digest_of(raw.data() + digest_size, raw.size() - digest_size);
                if (std::equal(digest.begin(), digest.end(), raw.begin()) &&
                    cache_->deserialize(raw.data() + digest_size, raw.size() - digest_size)) {
                    saved_ = std::move(digest);
                }
            }
        } catch (const std::system_error&) {
            // There is none yet.
        }
        if (!configuration.setRuntimeCache(*cache_)) {
            log(LogLevel::warning, "tensorrt-rtx compiles its kernels at every load");
        }
    }

    void save() {
        const std::unique_ptr<nvinfer1::IHostMemory> content(cache_->serialize());
        if (content == nullptr) {
            return;
        }
        const Bytes digest =
            digest_of(static_cast<const std::uint8_t*>(content->data()), content->size());
        if (digest == saved_) {
            return;
        }
        saved_ = digest;
        try {
            write_atomically(path_, [&](const Write& write) {
                write(digest.data(), digest.size());
                write(content->data(), content->size());
            });
        } catch (const std::system_error& error) {
            log(LogLevel::info, std::string("compiled kernels are not kept: ") + error.what());
        }
    }

private:
    static constexpr std::size_t digest_size = 32;

    static Bytes digest_of(const std::uint8_t* data, std::size_t size) {
        const std::string hex = sha256_hex(data, size);
        Bytes digest;
        for (std::size_t i = 0; i < hex.size(); i += 2) {
            digest.push_back(static_cast<std::uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
        }
        return digest;
    }

    std::filesystem::path path_;
    std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
    /// The digest of what was saved last.
    Bytes saved_;
};
#endif

class LoadedEngine : public Engine {
public:
    LoadedEngine(nvinfer1::ICudaEngine* engine,
                 [[maybe_unused]] const std::filesystem::path& compiled)
        : engine_(engine) {
        for (std::int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
            const char* const name = engine->getIOTensorName(i);
            EngineTensor tensor;
            tensor.name = name;
            tensor.type = type_of(name, engine->getTensorDataType(name));
            tensor.is_input = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
            tensor.shape = shape_of(engine->getTensorShape(name));
            tensor.most = tensor.shape;
            if (tensor.is_input && is_dynamic(tensor.shape)) {
                tensor.most =
                    shape_of(engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMAX));
            }
            tensors_[name] = std::move(tensor);
        }
#ifdef TRT_MAJOR_RTX
        configuration_.reset(engine->createRuntimeConfig());
        Library::get().require(configuration_ != nullptr, "a runtime configuration");
        configuration_->setExecutionContextAllocationStrategy(
            nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
        // The default begins with kernels for any shape, which a CUDA graph would keep.
        configuration_->setDynamicShapesKernelSpecializationStrategy(
            nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
        cache_.emplace(*configuration_, compiled);
#endif
    }

    std::unique_ptr<EngineContext> make_context() override {
        const std::lock_guard<std::mutex> lock(mutex_);
#ifdef TRT_MAJOR_RTX
        auto* context = engine_->createExecutionContext(configuration_.get());
#else
        auto* context = engine_->createExecutionContext(
            nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#endif
        Library::get().require(context != nullptr,
                               "an execution context; free device memory, or build engines with "
                               "fewer objects at once (--max-objects)");
        return std::make_unique<Context>(engine_, context);
    }

    void keep_compiled() override {
#ifdef TRT_MAJOR_RTX
        const std::lock_guard<std::mutex> lock(mutex_);
        cache_->save();
#endif
    }

private:
    std::mutex mutex_;
    std::shared_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef TRT_MAJOR_RTX
    std::unique_ptr<nvinfer1::IRuntimeConfig> configuration_;
    std::optional<CompiledCache> cache_;
#endif
};

}  // namespace

const char* tensorrt_flavour() {
#ifdef TRT_MAJOR_RTX
    return "tensorrt-rtx";
#else
    return "tensorrt";
#endif
}

std::string tensorrt_version() { return Library::get().version; }

std::shared_ptr<Engine> load_engine(const Bytes& content, const std::string& name,
                                    const std::filesystem::path& compiled) {
    Library& library = Library::get();
    nvinfer1::ICudaEngine* const engine =
        library.runtime->deserializeCudaEngine(content.data(), content.size());
    if (engine == nullptr) {
        throw BackendError(std::string(tensorrt_flavour()) + " " + library.version +
                           " cannot load " + name + library.logger.said() +
                           "; build it again on this machine");
    }
    return std::make_shared<LoadedEngine>(engine, compiled);
}

}  // namespace sam3rt
