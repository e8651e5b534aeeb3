#include "device.hpp"

#include <algorithm>
#include <array>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

/// A provider and what callers call it.
struct Entry {
    Provider provider;
    const char* name;
};
constexpr std::array<Entry, 4> providers = {{
    {Provider::cpu, "cpu"},
    {Provider::cuda, "cuda"},
    {Provider::tensorrt, "tensorrt"},
    {Provider::tensorrt_rtx, "tensorrt-rtx"},
}};

const Entry& entry_of(Provider provider) {
    return *std::find_if(providers.begin(), providers.end(),
                         [provider](const Entry& entry) { return entry.provider == provider; });
}

[[noreturn]] void refuse(const std::string& text) {
    throw InvalidInputError(
        "device", "'" + text + "'",
        "\"auto\", \"cpu\", or \"cuda\", \"tensorrt\" or \"tensorrt-rtx\", each "
        "also with \":N\"");
}

}  // namespace

std::string name_of(Provider provider) { return entry_of(provider).name; }

std::string Device::name() const {
    const std::string name = name_of(provider);
    return on_gpu() ? name + ":" + std::to_string(number) : name;
}

Device parse_device(const std::string& text) {
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

}  // namespace sam3rt
