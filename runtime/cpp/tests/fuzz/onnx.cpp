// libFuzzer: any bytes as an ONNX graph with a file of weights beside it.
#include "onnx_locations.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        sam3rt::check_onnx(sam3rt::Bytes(data, data + size), "m.onnx", {{"weights.data", "", 64}});
    } catch (const sam3rt::BundleError&) {
        // The only way to refuse it.
    }
    return 0;
}
