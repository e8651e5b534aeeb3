// Stands in for a build of ONNX Runtime with the CUDA provider, by LD_PRELOAD: what is asked of the
// provider is computed on the CPU. The options that each session gives it are added to the file that
// SAM3RT_PROVIDER_OPTIONS names, as NAME=VALUE; "unknown" is refused. So is an input without elements,
// which CUDA's kernels for reductions do not take.

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

namespace {

const OrtApi* real = nullptr;

OrtStatus* ORT_API_CALL get_available_providers(char*** names, int* count) noexcept {
    static char cuda[] = "CUDAExecutionProvider";
    static char cpu[] = "CPUExecutionProvider";
    static char* all[] = {cuda, cpu};
    *names = all;
    *count = 2;
    return nullptr;
}

OrtStatus* ORT_API_CALL release_available_providers(char** /*names*/, int /*count*/) noexcept {
    return nullptr;
}

OrtStatus* ORT_API_CALL create_options(OrtCUDAProviderOptionsV2** options) noexcept {
    static char nothing = 0;
    *options = reinterpret_cast<OrtCUDAProviderOptionsV2*>(&nothing);
    return nullptr;
}

void ORT_API_CALL release_options(OrtCUDAProviderOptionsV2* /*options*/) noexcept {}

OrtStatus* ORT_API_CALL update_options(OrtCUDAProviderOptionsV2* /*options*/,
                                       const char* const* names, const char* const* values,
                                       size_t count) noexcept {
    const char* const path = std::getenv("SAM3RT_PROVIDER_OPTIONS");
    std::ofstream file(path == nullptr ? "" : path, std::ios::app);
    for (size_t i = 0; i < count; ++i) {
        if (std::strcmp(names[i], "unknown") == 0) {
            return real->CreateStatus(ORT_INVALID_ARGUMENT, "unknown provider option: unknown");
        }
        file << names[i] << "=" << values[i] << (i + 1 == count ? "\n" : " ");
    }
    return nullptr;
}

OrtStatus* ORT_API_CALL append_provider(OrtSessionOptions* /*session*/,
                                        const OrtCUDAProviderOptionsV2* /*options*/) noexcept {
    return nullptr;
}

OrtStatus* ORT_API_CALL create_memory_info(const char* name, OrtAllocatorType type, int id,
                                           OrtMemType memory, OrtMemoryInfo** result) noexcept {
    return std::strcmp(name, "Cuda") == 0 ? real->CreateCpuMemoryInfo(type, memory, result)
                                          : real->CreateMemoryInfo(name, type, id, memory, result);
}

OrtStatus* ORT_API_CALL bind_input(OrtIoBinding* binding, const char* name,
                                   const OrtValue* value) noexcept {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t count = 0;
    OrtStatus* status = real->GetTensorTypeAndShape(value, &info);
    if (status == nullptr) {
        status = real->GetTensorShapeElementCount(info, &count);
        real->ReleaseTensorTypeAndShapeInfo(info);
    }
    if (status != nullptr) {
        return status;
    }
    return count == 0 ? real->CreateStatus(ORT_EP_FAIL, "an input has no elements")
                      : real->BindInput(binding, name, value);
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept;

const OrtApiBase* real_base() {
    using Function = const OrtApiBase* (*)();
    static const auto* base =
        reinterpret_cast<Function>(::dlsym(RTLD_NEXT, "OrtGetApiBase"))();
    return base;
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept {
    static OrtApi api;
    real = real_base()->GetApi(version);
    if (real == nullptr) {
        return nullptr;
    }
    api = *real;
    api.GetAvailableProviders = get_available_providers;
    api.ReleaseAvailableProviders = release_available_providers;
    api.CreateCUDAProviderOptions = create_options;
    api.ReleaseCUDAProviderOptions = release_options;
    api.UpdateCUDAProviderOptions = update_options;
    api.SessionOptionsAppendExecutionProvider_CUDA_V2 = append_provider;
    api.CreateMemoryInfo = create_memory_info;
    api.BindInput = bind_input;
    return &api;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const OrtApiBase* ORT_API_CALL
OrtGetApiBase() noexcept {
    static const OrtApiBase base = {get_api, real_base()->GetVersionString};
    return &base;
}
