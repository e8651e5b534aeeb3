// Files of one image's embedding.
//
// They use the safetensors layout: eight bytes of header length (little-endian), a JSON header,
// then the raw tensors. Its __metadata__ names the bundle's fingerprint and the image's geometry,
// and holds a SHA-256 over the header (with that digest zeroed) and the data, so that any change to
// a file is noticed. The sizes in the header must account for every byte of the file.
#pragma once

#include <filesystem>
#include <vector>

#include "backend.hpp"
#include "geometry.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

struct ImageEmbedding::Data {
    std::shared_ptr<const Features> features;
    ImageGeometry geometry;
    std::string fingerprint;
    std::vector<std::string> names;
};

/// What an embedding file holds.
struct StoredEmbedding {
    /// [1, C, h, w] each, in the order of the encoder's outputs.
    std::vector<Array<float>> maps;
    ImageGeometry geometry;
};

/// Write feature maps, whole or not at all, byte for byte as the Python runtime does.
/// Throws std::system_error, and EmbeddingError where a map holds NaN or an infinity.
void write_embedding(const std::filesystem::path& path, const std::vector<std::string>& names,
                     const std::vector<Array<float>>& maps, const ImageGeometry& geometry,
                     const std::string& fingerprint);

/// The content of such a file. Throws EmbeddingError likewise.
Bytes encode_embedding(const std::vector<std::string>& names, const std::vector<Array<float>>& maps,
                       const ImageGeometry& geometry, const std::string& fingerprint);

/// Read an embedding file and check it against the bundle that will use it.
/// Throws EmbeddingError where it is missing, cut, changed, of another format or another model,
/// or a map holds NaN or an infinity.
StoredEmbedding read_embedding(const std::filesystem::path& path, const std::string& fingerprint,
                               const std::vector<TensorSpec>& specs);

/// The same from the file's content, which error messages call `subject`.
StoredEmbedding parse_embedding(const std::uint8_t* content, std::size_t size,
                                const std::string& subject, const std::string& fingerprint,
                                const std::vector<TensorSpec>& specs);

}  // namespace sam3rt
