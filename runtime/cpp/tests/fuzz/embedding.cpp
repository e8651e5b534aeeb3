// libFuzzer: any bytes as an embedding. A digest of 64 zeros is replaced by the right one, which no
// mutation would find.
#include "embedding.hpp"

#include <algorithm>

#include "sha256.hpp"

namespace {

void set_digest(sam3rt::Bytes& content) {
    static const std::string zeros(64, '0');
    const auto found = std::search(content.begin(), content.end(), zeros.begin(), zeros.end());
    if (content.size() > 8 && found != content.end()) {
        const std::string digest = sam3rt::sha256_hex(content.data() + 8, content.size() - 8);
        std::copy(digest.begin(), digest.end(), found);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    // The feature map of the tests' runnable bundle.
    static const std::vector<sam3rt::TensorSpec> specs = {
        {"image_embeddings.0", "float32", {std::string("batch"), 4, 2, 2}}};
    sam3rt::Bytes content(data, data + size);
    set_digest(content);
    try {
        sam3rt::parse_embedding(content.data(), content.size(), "content", std::string(64, 'a'),
                                specs);
    } catch (const sam3rt::EmbeddingError&) {
        // The only way to refuse it.
    }
    return 0;
}
