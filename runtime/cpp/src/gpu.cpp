#include "gpu.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <memory>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

// Of the CUDA driver API: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
constexpr int capability_major = 75;
constexpr int capability_minor = 76;

template <typename Function>
Function* symbol(void* library, const char* name) {
    auto* found = reinterpret_cast<Function*>(::dlsym(library, name));
    if (found == nullptr) {
        throw BackendError(std::string("the NVIDIA driver's library has no ") + name);
    }
    return found;
}

using Library = std::unique_ptr<void, int (*)(void*)>;

Library open_library(const char* name) { return {::dlopen(name, RTLD_NOW), ::dlclose}; }

/// What NVML calls the driver's version; empty where it does not say. A Jetson may have no NVML.
std::string driver_version() {
    const Library library = open_library("libnvidia-ml.so.1");
    if (library == nullptr || symbol<int()>(library.get(), "nvmlInit_v2")() != 0) {
        return "";
    }
    std::array<char, 96> text{};
    const int status = symbol<int(char*, unsigned)>(library.get(), "nvmlSystemGetDriverVersion")(
        text.data(), unsigned{text.size() - 1});
    symbol<int()>(library.get(), "nvmlShutdown")();
    return status == 0 ? text.data() : "";
}

}  // namespace

std::string Gpu::capability_digits() const {
    std::string digits = compute_capability;
    digits.erase(std::remove(digits.begin(), digits.end(), '.'), digits.end());
    return digits;
}

Machine query_gpu(int number) {
    const Library library = open_library("libcuda.so.1");
    if (library == nullptr) {
        throw BackendError("tensorrt needs an NVIDIA driver, and there is none here");
    }
    std::array<char, 256> name{};
    int device = 0;
    int major = 0;
    int minor = 0;
    int cuda = 0;
    auto* get_attribute = symbol<int(int*, int, int)>(library.get(), "cuDeviceGetAttribute");
    if (symbol<int(unsigned)>(library.get(), "cuInit")(0) != 0 ||
        symbol<int(int*, int)>(library.get(), "cuDeviceGet")(&device, number) != 0 ||
        symbol<int(char*, int, int)>(library.get(), "cuDeviceGetName")(
            name.data(), static_cast<int>(name.size()) - 1, device) != 0 ||
        get_attribute(&major, capability_major, device) != 0 ||
        get_attribute(&minor, capability_minor, device) != 0 ||
        symbol<int(int*)>(library.get(), "cuDriverGetVersion")(&cuda) != 0) {
        throw BackendError("the NVIDIA driver knows no GPU " + std::to_string(number));
    }
    std::string driver = driver_version();
    if (driver.empty()) {
        driver = "CUDA " + std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10);
    }
    return {{name.data(), std::to_string(major) + "." + std::to_string(minor)}, driver};
}

}  // namespace sam3rt
