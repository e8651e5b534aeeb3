// libFuzzer: any bytes as bundle.json.
#include "bundle.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        sam3rt::parse_manifest(sam3rt::Bytes(data, data + size));
    } catch (const sam3rt::BundleError&) {
        // The only way to refuse it.
    }
    return 0;
}
