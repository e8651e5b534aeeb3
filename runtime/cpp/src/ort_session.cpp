#include "ort_session.hpp"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "log.hpp"
#include "onnx_wire.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

/// An ONNX model with one Identity node; field numbers are those of onnx.proto.
Bytes identity_model(ONNXTensorElementDataType type) {
    using onnx::Writer;
    const Bytes tensor = Writer().number(1, static_cast<std::uint64_t>(type)).message();
    const Bytes value_type = Writer().bytes(1, tensor).message();
    const auto value = [&value_type](const std::string& name) {
        return Writer().text(1, name).bytes(2, value_type).message();
    };
    const Bytes node = Writer().text(1, "x").text(2, "y").text(4, "Identity").message();
    const Bytes graph =
        Writer().bytes(1, node).text(2, "copy").bytes(11, value("x")).bytes(12, value("y")).message();
    const Bytes opset = Writer().number(2, 13).message();
    return Writer().number(1, 8).bytes(7, graph).bytes(8, opset).message();
}

LogLevel level_of(OrtLoggingLevel severity) {
    switch (severity) {
        case ORT_LOGGING_LEVEL_VERBOSE:
            return LogLevel::debug;
        case ORT_LOGGING_LEVEL_INFO:
            return LogLevel::info;
        case ORT_LOGGING_LEVEL_WARNING:
            return LogLevel::warning;
        case ORT_LOGGING_LEVEL_ERROR:
        case ORT_LOGGING_LEVEL_FATAL:
            break;
    }
    return LogLevel::error;
}

/// The least severe lines that are wanted of ONNX Runtime.
OrtLoggingLevel ort_log_level() noexcept {
    switch (log_level().value_or(LogLevel::error)) {
        case LogLevel::debug:
            return ORT_LOGGING_LEVEL_VERBOSE;
        case LogLevel::info:
            return ORT_LOGGING_LEVEL_INFO;
        case LogLevel::warning:
            return ORT_LOGGING_LEVEL_WARNING;
        case LogLevel::error:
            break;
    }
    return ORT_LOGGING_LEVEL_ERROR;
}

/// What our environment gives its lines to: the callback, or stderr without one.
void ORT_API_CALL log_ort_line(void* /*unused*/, OrtLoggingLevel severity, const char* /*category*/,
                               const char* /*id*/, const char* location,
                               const char* message) noexcept {
    if (!log_level()) {
        if (severity >= ORT_LOGGING_LEVEL_ERROR) {
            std::fprintf(stderr, "onnxruntime: %s (%s)\n", message, location);
        }
        return;
    }
    try {
        log(level_of(severity), std::string("onnxruntime: ") + message + " (" + location + ")");
    } catch (const std::bad_alloc&) {
        // Then there is no line.
    }
}

void require_version() {
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
        throw BackendError(std::string("the ONNX Runtime library is version ") +
                           OrtGetApiBase()->GetVersionString() +
                           ", older than the headers sam3rt was built with (1." +
                           std::to_string(ORT_API_VERSION) + ")");
    }
}

/// ONNX Runtime's environment, of which a process has one.
struct Environment {
    Ort::Env value;
    bool is_ours;
    /// Whether it has threads that sessions can share.
    bool has_threads;
};
std::mutex environment_mutex;
// Never destroyed: models of static lifetime may outlive every other static.
Environment* current_environment = nullptr;
/// How many threads our environment gets; 0 leaves it to ONNX Runtime.
int shared_threads = 0;

/// An environment that was created before this one, by whoever, has no threads to share unless it
/// was asked for them: a session tells.
Environment* environment_of(OrtEnv* environment, bool is_ours) {
    auto* const result = new Environment{Ort::Env(environment), is_ours, true};
    try {
        Ort::SessionOptions options;
        options.DisablePerSessionThreads();
        const Bytes model = identity_model(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        const Ort::Session session(result->value, model.data(), model.size(), options);
    } catch (const Ort::Exception&) {
        result->has_threads = false;
    }
    return result;
}

Ort::Session identity_session(const Device& device, ONNXTensorElementDataType type) {
    // TensorRT would build an engine for it; its ONNX Runtime always has the CUDA provider too.
    Device simple = device;
    if (device.provider == Provider::tensorrt) {
        simple.provider = Provider::cuda;
    }
    const Bytes model = identity_model(type);
    ModelOptions options;
    // It has nothing to compute.
    options.threads = 1;
    return {ort_environment(), model.data(), model.size(), session_options(simple, options)};
}

/// Options of a provider as two lists, those of the model after the library's own.
struct ProviderOptions {
    ProviderOptions(std::map<std::string, std::string> own,
                    const std::map<std::string, std::string>& model)
        : options(std::move(own)) {
        options.insert(model.begin(), model.end());
        for (const auto& [name, value] : options) {
            names.push_back(name.c_str());
            values.push_back(value.c_str());
        }
    }
    ProviderOptions(const ProviderOptions&) = delete;
    ProviderOptions& operator=(const ProviderOptions&) = delete;

    std::map<std::string, std::string> options;
    std::vector<const char*> names;
    std::vector<const char*> values;
};

void append_cuda(Ort::SessionOptions& options, const std::string& number,
                 const std::map<std::string, std::string>& model) {
    const OrtApi& api = Ort::GetApi();
    OrtCUDAProviderOptionsV2* raw = nullptr;
    Ort::ThrowOnError(api.CreateCUDAProviderOptions(&raw));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> cuda(
        raw, api.ReleaseCUDAProviderOptions);
    // Without use_tf32=0, matrix multiplications would keep 10 bits of a float32's 23.
    const ProviderOptions given({{"device_id", number}, {"use_tf32", "0"}}, model);
    Ort::ThrowOnError(api.UpdateCUDAProviderOptions(
        cuda.get(), given.names.data(), given.values.data(), given.names.size()));
    options.AppendExecutionProvider_CUDA_V2(*cuda);
}

void append_tensorrt(Ort::SessionOptions& options, const std::string& number,
                     const std::map<std::string, std::string>& model) {
    const OrtApi& api = Ort::GetApi();
    OrtTensorRTProviderOptionsV2* raw = nullptr;
    Ort::ThrowOnError(api.CreateTensorRTProviderOptions(&raw));
    const std::unique_ptr<OrtTensorRTProviderOptionsV2,
                          decltype(api.ReleaseTensorRTProviderOptions)>
        tensorrt(raw, api.ReleaseTensorRTProviderOptions);
    const ProviderOptions given({{"device_id", number}}, model);
    Ort::ThrowOnError(api.UpdateTensorRTProviderOptions(
        tensorrt.get(), given.names.data(), given.values.data(), given.names.size()));
    options.AppendExecutionProvider_TensorRT_V2(*tensorrt);
}

}  // namespace

const std::map<std::string, ONNXTensorElementDataType>& element_types() {
    static const std::map<std::string, ONNXTensorElementDataType> types = {
        {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
        {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
        {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
        {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
        {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
    };
    return types;
}

void set_ort_environment(OrtEnv* environment) {
    if (environment == nullptr) {
        throw InvalidInputError("environment", "NULL", "an OrtEnv of this process");
    }
    require_version();
    const std::lock_guard<std::mutex> lock(environment_mutex);
    if (current_environment != nullptr) {
        throw StateError("ONNX Runtime's environment is in use: set it before anything else");
    }
    current_environment = environment_of(environment, false);
}

void set_shared_threads(int threads) {
    if (threads < 1) {
        throw InvalidInputError("threads", std::to_string(threads), "a positive whole number");
    }
    const std::lock_guard<std::mutex> lock(environment_mutex);
    if (current_environment != nullptr) {
        throw StateError("the pool of threads is in use: set their number before anything else");
    }
    shared_threads = threads;
}

const Ort::Env& ort_environment() {
    require_version();
    const std::lock_guard<std::mutex> lock(environment_mutex);
    if (current_environment == nullptr) {
        // From 1.29 on ONNX Runtime reports to its maker which models and devices a process uses. It
        // asks for this variable alone, and once. A host that has set it has decided.
        setenv("ORT_DISABLE_TELEMETRY", "1", 0);
        // Threads that look out for work between runs would take processor time from others.
        Ort::ThreadingOptions threading;
        threading.SetGlobalSpinControl(0);
        threading.SetGlobalIntraOpNumThreads(shared_threads);
        current_environment = environment_of(
            Ort::Env(threading, log_ort_line, nullptr, ort_log_level(), "sam3rt").release(), true);
    }
    return current_environment->value;
}

Ort::SessionOptions session_options(const Device& device, const ModelOptions& model) {
    ort_environment();
    Ort::SessionOptions options;
    if (current_environment->is_ours) {
        options.SetLogSeverityLevel(ort_log_level());
    }
    if (!model.spin_between_runs) {
        // A session's own threads look out for work while it runs, and rest once it has run.
        options.AddConfigEntry("session.force_spinning_stop", "1");
    }
    if (!model.thread_affinities.empty()) {
        options.AddConfigEntry("session.intra_op_thread_affinities",
                               model.thread_affinities.c_str());
    }
    if (!model.memory_arena) {
        options.DisableCpuMemArena();
    }
    if (model.environment_allocators) {
        options.AddConfigEntry("session.use_env_allocators", "1");
    }
    if (model.threads > 0) {
        options.SetIntraOpNumThreads(model.threads);
    } else if (current_environment->has_threads) {
        options.DisablePerSessionThreads();
    }
    const std::string number = std::to_string(device.number);
    switch (device.provider) {
        case Provider::cpu:
            break;
        case Provider::cuda:
            append_cuda(options, number, model.provider_options);
            break;
        case Provider::tensorrt:
            append_tensorrt(options, number, model.provider_options);
            break;
        case Provider::tensorrt_rtx: {
            std::unordered_map<std::string, std::string> given(model.provider_options.begin(),
                                                               model.provider_options.end());
            given["device_id"] = number;
            options.AppendExecutionProvider("NvTensorRTRTXExecutionProvider", given);
            break;
        }
    }
    return options;
}

Ort::MemoryInfo memory_of(const Device& device) {
    if (!device.on_gpu()) {
        return host_memory();
    }
    // Both TensorRT providers keep tensors in CUDA memory.
    return {"Cuda", OrtDeviceAllocator, device.number, OrtMemTypeDefault};
}

Ort::MemoryInfo host_memory() {
    return Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
}

Copier::Copier(const Device& device, ONNXTensorElementDataType type)
    : device_(device), session_(identity_session(device, type)) {}

Ort::Value Copier::to_host(const Ort::Value& value) const { return run(value, host_memory()); }

Ort::Value Copier::to_device(const Ort::Value& value) const {
    return run(value, memory_of(device_));
}

Ort::Value Copier::run(const Ort::Value& value, const Ort::MemoryInfo& target) const {
    Ort::IoBinding binding(session_);
    binding.BindInput("x", value);
    binding.BindOutput("y", target);
    session_.Run(Ort::RunOptions{nullptr}, binding);
    binding.SynchronizeOutputs();
    return std::move(binding.GetOutputValues()[0]);
}

}  // namespace sam3rt
