#include "embedding.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <system_error>

#include "bundle.hpp"
#include "errors.hpp"
#include "files.hpp"
#include "json_reader.hpp"
#include "sha256.hpp"
#include "signature.hpp"

namespace sam3rt {
namespace {

const std::string format_name = "sam3rt-embedding-1";
const std::string no_digest(64, '0');
constexpr std::uint64_t max_header = std::uint64_t{1} << 16;
constexpr std::size_t alignment = 8;
constexpr std::size_t length_size = 8;

[[noreturn]] void refuse(const std::string& subject, const std::string& message) {
    throw EmbeddingError(subject + ": " + message);
}

[[noreturn]] void refuse_damaged(const std::string& subject) {
    refuse(subject, "is damaged or not a sam3rt embedding");
}

std::string size_text(const Size& size) {
    return std::to_string(size.height) + " " + std::to_string(size.width);
}

/// One side of an image, as text without a leading zero; 0 where it is none.
std::int64_t parse_side(const std::string& text) {
    const bool plain = !text.empty() && text.size() <= 10 && text[0] != '0' &&
                       text.find_first_not_of("0123456789") == std::string::npos;
    return plain ? std::stoll(text) : 0;
}

Size parse_size(const std::string& subject, const std::string& text) {
    const std::size_t blank = text.find(' ');
    Size size;
    if (blank != std::string::npos) {
        size = {parse_side(text.substr(0, blank)), parse_side(text.substr(blank + 1))};
    }
    if (!is_image_size(size)) {
        refuse(subject, "has an image size of '" + text.substr(0, 40) + "'");
    }
    return size;
}

/// Little-endian, as in the file, whatever this machine is.
std::uint64_t read_length(const std::uint8_t* content) {
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < length_size; ++i) {
        length |= std::uint64_t{content[i]} << (8 * i);
    }
    return length;
}

std::string length_bytes(std::uint64_t length) {
    std::string bytes;
    for (std::size_t i = 0; i < length_size; ++i) {
        bytes += static_cast<char>(length >> (8 * i) & 0xffU);
    }
    return bytes;
}

std::string numbers_text(const std::vector<std::int64_t>& numbers) {
    std::string text = "[";
    for (const std::int64_t number : numbers) {
        text += (text.size() == 1 ? "" : ",") + std::to_string(number);
    }
    return text + "]";
}

void replace_first(std::string& text, const std::string& old, const std::string& fresh) {
    const std::size_t found = text.find(old);
    if (found != std::string::npos) {
        text.replace(found, old.size(), fresh);
    }
}

/// Throws EmbeddingError.
void require_finite(const Array<float>& map, const std::string& name, const std::string& subject) {
    if (!is_finite(map)) {
        throw EmbeddingError(subject + ": the feature map " + name + " holds NaN or an infinity");
    }
}

/// One tensor of a file's header.
struct TensorEntry {
    std::string dtype;
    Shape shape;
    std::vector<std::int64_t> data_offsets;
};

struct Header {
    std::map<std::string, std::string> metadata;
    std::map<std::string, TensorEntry> tensors;
};

struct Parsed {
    Header header;
    const std::uint8_t* data;
    std::size_t data_size;
};

std::vector<std::int64_t> read_numbers(const JsonValue& value) {
    std::vector<std::int64_t> numbers;
    for (const JsonValue& entry : value.list()) {
        numbers.push_back(entry.whole_number());
    }
    return numbers;
}

/// Throws BundleError where the header is not what the format says.
Header read_header(const std::uint8_t* text, std::size_t size) {
    const JsonDocument document(text, size, "");
    Header header;
    for (const auto& [name, value] : document.root().fields()) {
        if (name == "__metadata__") {
            value.check_fields({"format", "fingerprint", "original_size", "input_size", "sha256"});
            for (const auto& [key, entry] : value.fields()) {
                header.metadata[key] = entry.text();
            }
        } else {
            value.check_fields({"dtype", "shape", "data_offsets"});
            header.tensors[name] = {value.field("dtype").text(), read_numbers(value.field("shape")),
                                    read_numbers(value.field("data_offsets"))};
        }
    }
    return header;
}

/// Split a file into its header and data, after checking its digest.
Parsed parse(const std::string& subject, const std::uint8_t* content, std::size_t size) {
    if (size < length_size) {
        refuse_damaged(subject);
    }
    const std::uint64_t length = read_length(content);
    if (length < 2 || length > std::min<std::uint64_t>(max_header, size - length_size)) {
        refuse_damaged(subject);
    }
    const std::uint8_t* start = content + length_size;
    Parsed parsed;
    try {
        parsed.header = read_header(start, static_cast<std::size_t>(length));
    } catch (const BundleError&) {
        refuse_damaged(subject);
    }
    std::map<std::string, std::string>& metadata = parsed.header.metadata;
    const std::string digest = metadata["sha256"];
    if (metadata.size() != 5 || !is_sha256(digest)) {
        refuse_damaged(subject);
    }
    if (metadata["format"] != format_name) {
        refuse(subject, "has another format, expected '" + format_name + "'");
    }
    parsed.data = start + length;
    parsed.data_size = size - length_size - static_cast<std::size_t>(length);
    std::string text(start, start + length);
    replace_first(text, digest, no_digest);
    Sha256 actual;
    actual.update(text.data(), text.size());
    actual.update(parsed.data, parsed.data_size);
    if (actual.hex_digest() != digest) {
        refuse_damaged(subject);
    }
    return parsed;
}

/// Bytes of each feature map.
std::vector<std::size_t> sizes_of(const std::string& subject,
                                  const std::vector<TensorSpec>& specs) {
    std::vector<std::size_t> sizes;
    std::size_t sum = 0;
    for (const TensorSpec& spec : specs) {
        sizes.push_back(element_count(shape_of_map(spec)) * sizeof(float));
        sum += sizes.back();
        if (sum > max_elements) {
            refuse(subject, "the model's feature maps are larger than memory can be");
        }
    }
    return sizes;
}

std::size_t total(const std::vector<std::size_t>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
}

/// Refuse content that cannot hold feature maps of these sizes, before anything is read.
void check_size(const std::string& subject, std::uint64_t size,
                const std::vector<std::size_t>& sizes) {
    const std::size_t data = total(sizes);
    if (size <= data || size > data + max_header + length_size) {
        refuse(subject, "has " + std::to_string(size) + " bytes, an embedding of this model about " +
                            std::to_string(data) + ": it is cut or belongs to another model");
    }
}

/// What stands in a file before the maps: the header's length, and the header.
std::string file_start(const std::vector<std::string>& names, const std::vector<Array<float>>& maps,
                       const ImageGeometry& geometry, const std::string& fingerprint) {
    std::string text = "{\"__metadata__\":{\"format\":" + json_text(format_name) +
                       ",\"fingerprint\":" + json_text(fingerprint) +
                       ",\"original_size\":" + json_text(size_text(geometry.original_size)) +
                       ",\"input_size\":" + json_text(size_text(geometry.input_size)) +
                       ",\"sha256\":" + json_text(no_digest) + "}";
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < maps.size(); ++i) {
        require_finite(maps[i], names[i], "the embedding");
        const std::int64_t end = offset + static_cast<std::int64_t>(maps[i].size() * sizeof(float));
        text += "," + json_text(names[i]) +
                ":{\"dtype\":\"F32\",\"shape\":" + numbers_text(maps[i].shape()) +
                ",\"data_offsets\":" + numbers_text({offset, end}) + "}";
        offset = end;
    }
    text += "}";
    text.append((alignment - text.size() % alignment) % alignment, ' ');
    Sha256 digest;
    digest.update(text.data(), text.size());
    for (const Array<float>& map : maps) {
        digest.update(map.data(), map.size() * sizeof(float));
    }
    replace_first(text, no_digest, digest.hex_digest());
    return length_bytes(text.size()) + text;
}

}  // namespace

Size ImageEmbedding::original_size() const noexcept { return data_->geometry.original_size; }
Size ImageEmbedding::input_size() const noexcept { return data_->geometry.input_size; }
const std::string& ImageEmbedding::fingerprint() const noexcept { return data_->fingerprint; }
const std::vector<std::string>& ImageEmbedding::names() const noexcept { return data_->names; }

std::size_t ImageEmbedding::nbytes() const noexcept { return data_->features->nbytes(); }

std::vector<Array<float>> ImageEmbedding::maps() const { return data_->features->maps(); }

void ImageEmbedding::save(const std::filesystem::path& path) const {
    write_embedding(path, data_->names, maps(), data_->geometry, data_->fingerprint);
}

std::vector<std::uint8_t> ImageEmbedding::to_bytes() const {
    return encode_embedding(data_->names, maps(), data_->geometry, data_->fingerprint);
}

void write_embedding(const std::filesystem::path& path, const std::vector<std::string>& names,
                     const std::vector<Array<float>>& maps, const ImageGeometry& geometry,
                     const std::string& fingerprint) {
    const std::string start = file_start(names, maps, geometry, fingerprint);
    write_atomically(path, [&](const Write& write) {
        write(start.data(), start.size());
        for (const Array<float>& map : maps) {
            write(map.data(), map.size() * sizeof(float));
        }
    });
}

Bytes encode_embedding(const std::vector<std::string>& names, const std::vector<Array<float>>& maps,
                       const ImageGeometry& geometry, const std::string& fingerprint) {
    const std::string start = file_start(names, maps, geometry, fingerprint);
    Bytes content;
    content.reserve(std::accumulate(
        maps.begin(), maps.end(), start.size(), [](std::size_t sum, const Array<float>& map) {
            return sum + map.size() * sizeof(float);
        }));
    content.assign(start.begin(), start.end());
    for (const Array<float>& map : maps) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(map.data());
        content.insert(content.end(), bytes, bytes + map.size() * sizeof(float));
    }
    return content;
}

StoredEmbedding read_embedding(const std::filesystem::path& path, const std::string& fingerprint,
                               const std::vector<TensorSpec>& specs) {
    const std::string subject = path.string();
    Bytes content;
    try {
        const std::uint64_t size = std::filesystem::file_size(path);
        check_size(subject, size, sizes_of(subject, specs));
        content = read_file(path, size);
    } catch (const std::system_error& error) {
        refuse(subject, std::string("cannot be read: ") + error.what());
    }
    return parse_embedding(content.data(), content.size(), subject, fingerprint, specs);
}

StoredEmbedding parse_embedding(const std::uint8_t* content, std::size_t size,
                                const std::string& subject, const std::string& fingerprint,
                                const std::vector<TensorSpec>& specs) {
    const std::vector<std::size_t> sizes = sizes_of(subject, specs);
    check_size(subject, size, sizes);
    const Parsed parsed = parse(subject, content, size);
    const std::map<std::string, std::string>& metadata = parsed.header.metadata;
    const std::string& maker = metadata.at("fingerprint");
    if (maker != fingerprint) {
        refuse(subject, "made by the bundle " + maker.substr(0, 16) + "..., this model is " +
                         fingerprint.substr(0, 16) + "...; encode the image again");
    }
    StoredEmbedding stored;
    stored.geometry = {parse_size(subject, metadata.at("original_size")),
                       parse_size(subject, metadata.at("input_size"))};
    const std::map<std::string, TensorEntry>& tensors = parsed.header.tensors;
    if (parsed.data_size != total(sizes) || tensors.size() != specs.size()) {
        refuse(subject, "does not hold exactly this model's feature maps");
    }
    std::size_t offset = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const Shape shape = shape_of_map(specs[i]);
        const std::vector<std::int64_t> offsets = {static_cast<std::int64_t>(offset),
                                                   static_cast<std::int64_t>(offset + sizes[i])};
        const auto found = tensors.find(specs[i].name);
        if (found == tensors.end() || found->second.dtype != "F32" ||
            found->second.shape != shape || found->second.data_offsets != offsets) {
            refuse(subject, "tensor " + specs[i].name + " is not F32 " + shape_text(shape) +
                             " at bytes " + numbers_text(offsets));
        }
        Array<float> map(shape);
        // The data need not be aligned for float.
        std::memcpy(map.data(), parsed.data + offset, sizes[i]);
        require_finite(map, specs[i].name, subject);
        stored.maps.push_back(std::move(map));
        offset += sizes[i];
    }
    return stored;
}

}  // namespace sam3rt
