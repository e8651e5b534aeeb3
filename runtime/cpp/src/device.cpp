#include "device.hpp"

#include <algorithm>
#include <array>

#include "log.hpp"
#include "ort_session.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

/// A provider, what callers call it, what ONNX Runtime calls it.
struct Entry {
    Provider provider;
    const char* name;
    const char* ort_name;
};
constexpr std::array<Entry, 4> providers = {{
    {Provider::cpu, "cpu", "CPUExecutionProvider"},
    {Provider::cuda, "cuda", "CUDAExecutionProvider"},
    {Provider::tensorrt, "tensorrt", "TensorrtExecutionProvider"},
    {Provider::tensorrt_rtx, "tensorrt-rtx", "NvTensorRTRTXExecutionProvider"},
}};

const Entry& entry_of(Provider provider) {
    return *std::find_if(providers.begin(), providers.end(),
                         [provider](const Entry& entry) { return entry.provider == provider; });
}

bool is_available(Provider provider) {
    const std::vector<std::string> names = Ort::GetAvailableProviders();
    return std::find(names.begin(), names.end(), entry_of(provider).ort_name) != names.end();
}

/// Empty where the device can hold a tensor, else what it said. ONNX Runtime lists its CUDA
/// provider even where there is no driver.
std::string failure_of(const Device& device) {
    try {
        const Copier copier(device, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        std::array<float, 1> number = {1};
        const std::array<std::int64_t, 1> shape = {1};
        copier.to_device(Ort::Value::CreateTensor<float>(
            host_memory(), number.data(), number.size(), shape.data(), shape.size()));
        return "";
    } catch (const Ort::Exception& error) {
        return error.what();
    }
}

[[noreturn]] void refuse(const std::string& text) {
    throw InvalidInputError(
        "device", "'" + text + "'",
        "\"auto\", \"cpu\", or \"cuda\", \"tensorrt\" or \"tensorrt-rtx\", each "
        "also with \":N\"");
}

Device parse(const std::string& text) {
    const std::size_t colon = text.find(':');
    const std::string name = text.substr(0, colon);
    for (const Entry& entry : providers) {
        if (name != entry.name) {
            continue;
        }
        if (colon == std::string::npos) {
            return {entry.provider, 0};
        }
        const std::string digits = text.substr(colon + 1);
        if (entry.provider == Provider::cpu || digits.empty() || digits.size() > 3 ||
            digits.find_first_not_of("0123456789") != std::string::npos) {
            refuse(text);
        }
        return {entry.provider, std::stoi(digits)};
    }
    refuse(text);
}

}  // namespace

std::string Device::name() const {
    const std::string name = entry_of(provider).name;
    return on_gpu() ? name + ":" + std::to_string(number) : name;
}

Device choose_device(const std::string& text) {
    ort_environment();
    if (text == "auto") {
        const Device cuda{Provider::cuda, 0};
        const std::string failure = is_available(cuda.provider)
                                        ? failure_of(cuda)
                                        : "this ONNX Runtime was built without it";
        log(LogLevel::info, failure.empty() ? "device auto: cuda:0"
                                            : "device auto: cpu, as CUDA cannot be used: " + failure);
        return failure.empty() ? cuda : Device{};
    }
    const Device device = parse(text);
    if (!is_available(device.provider)) {
        throw BackendError("device '" + text + "' was asked for, but this ONNX Runtime (" +
                           OrtGetApiBase()->GetVersionString() + ") was built without " +
                           entry_of(device.provider).ort_name);
    }
    if (device.on_gpu()) {
        const std::string failure = failure_of(device);
        if (!failure.empty()) {
            throw BackendError("device '" + text +
                               "' was asked for, but is not usable here: " + failure);
        }
    }
    return device;
}

}  // namespace sam3rt
