#include "embedding.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <system_error>

#include "bundle.hpp"
#include "errors.hpp"
#include "files.hpp"
#include "sha256.hpp"

namespace sam3rt {
namespace {

using Json = nlohmann::json;

const std::string format_name = "sam3rt-embedding-1";
const std::string no_digest(64, '0');
constexpr std::uint64_t max_header = std::uint64_t{1} << 16;
constexpr std::size_t alignment = 8;
constexpr std::size_t length_size = 8;

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& message) {
    throw EmbeddingError(path.string() + ": " + message);
}

[[noreturn]] void refuse_damaged(const std::filesystem::path& path) {
    refuse(path, "is damaged or not a sam3rt embedding");
}

std::string size_text(const Size& size) {
    return std::to_string(size.height) + " " + std::to_string(size.width);
}

Size parse_size(const std::filesystem::path& path, const std::string& text) {
    static const std::regex form("([1-9][0-9]{0,9}) ([1-9][0-9]{0,9})");
    std::smatch match;
    Size size;
    // The pattern bounds the digits; std::regex recurses on long texts.
    if (text.size() <= 21 && std::regex_match(text, match, form)) {
        size = {std::stoll(match[1]), std::stoll(match[2])};
    }
    constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
    if (size.height < 1 || size.height > limit || size.width > limit) {
        refuse(path, "has an image size of '" + text.substr(0, 40) + "'");
    }
    return size;
}

/// Little-endian, as in the file, whatever this machine is.
std::uint64_t read_length(const Bytes& content) {
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

void replace_first(std::string& text, const std::string& old, const std::string& fresh) {
    const std::size_t found = text.find(old);
    if (found != std::string::npos) {
        text.replace(found, old.size(), fresh);
    }
}

struct Parsed {
    Json tensors;
    std::map<std::string, std::string> metadata;
    const std::uint8_t* data;
    std::size_t data_size;
};

std::map<std::string, std::string> read_metadata(const std::filesystem::path& path,
                                                 const Json& header) {
    static const std::set<std::string> wanted = {"format", "fingerprint", "original_size",
                                                 "input_size", "sha256"};
    if (!header.is_object() || !header.contains("__metadata__") ||
        !header["__metadata__"].is_object()) {
        refuse_damaged(path);
    }
    std::map<std::string, std::string> metadata;
    for (const auto& item : header["__metadata__"].items()) {
        if (wanted.count(item.key()) == 0 || !item.value().is_string()) {
            refuse_damaged(path);
        }
        metadata[item.key()] = item.value().get<std::string>();
    }
    if (metadata.size() != wanted.size()) {
        refuse_damaged(path);
    }
    return metadata;
}

/// Split a file into tensor entries, metadata and data, after checking its digest.
Parsed parse(const std::filesystem::path& path, const Bytes& content) {
    if (content.size() < length_size) {
        refuse_damaged(path);
    }
    const std::uint64_t length = read_length(content);
    if (length < 2 || length > std::min<std::uint64_t>(max_header, content.size() - length_size)) {
        refuse_damaged(path);
    }
    const std::uint8_t* start = content.data() + length_size;
    std::string text(start, start + length);
    Parsed parsed;
    // The parser would skip a byte order mark.
    parsed.tensors = Json::parse(text, nullptr, false);
    if (parsed.tensors.is_discarded() || text[0] == '\xef') {
        refuse_damaged(path);
    }
    parsed.metadata = read_metadata(path, parsed.tensors);
    parsed.tensors.erase("__metadata__");
    const std::string& digest = parsed.metadata["sha256"];
    if (!is_sha256(digest)) {
        refuse_damaged(path);
    }
    if (parsed.metadata["format"] != format_name) {
        refuse(path, "has another format, expected '" + format_name + "'");
    }
    parsed.data = start + length;
    parsed.data_size = content.size() - length_size - static_cast<std::size_t>(length);
    replace_first(text, digest, no_digest);
    Sha256 actual;
    actual.update(text.data(), text.size());
    actual.update(parsed.data, parsed.data_size);
    if (actual.hex_digest() != digest) {
        refuse_damaged(path);
    }
    return parsed;
}

Shape shape_of(const TensorSpec& spec) {
    Shape shape = {1};
    for (std::size_t axis = 1; axis < spec.shape.size(); ++axis) {
        shape.push_back(std::get<std::int64_t>(spec.shape[axis]));
    }
    return shape;
}

}  // namespace

Size ImageEmbedding::original_size() const noexcept { return data_->place.original_size; }
Size ImageEmbedding::input_size() const noexcept { return data_->place.input_size; }
const std::string& ImageEmbedding::fingerprint() const noexcept { return data_->fingerprint; }
const std::vector<std::string>& ImageEmbedding::names() const noexcept { return data_->names; }

std::size_t ImageEmbedding::nbytes() const noexcept {
    std::size_t total = 0;
    for (const Ort::Value& value : data_->features->values) {
        const auto info = value.GetTensorTypeAndShapeInfo();
        const std::size_t width =
            info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 4;
        total += width * info.GetElementCount();
    }
    return total;
}

std::vector<Array<float>> ImageEmbedding::maps() const {
    try {
        std::vector<Array<float>> maps;
        for (const Ort::Value& value : data_->features->values) {
            maps.push_back(data_->features->transfer->to_host(value));
        }
        return maps;
    } catch (const Ort::Exception& error) {
        throw BackendError("feature maps cannot be brought from " + data_->features->device + ": " +
                           error.what());
    }
}

void ImageEmbedding::save(const std::filesystem::path& path) const {
    write_embedding(path, data_->names, maps(), data_->place, data_->fingerprint);
}

void write_embedding(const std::filesystem::path& path, const std::vector<std::string>& names,
                     const std::vector<Array<float>>& maps, const ImageGeometry& place,
                     const std::string& fingerprint) {
    nlohmann::ordered_json header;
    header["__metadata__"] = {{"format", format_name},
                              {"fingerprint", fingerprint},
                              {"original_size", size_text(place.original_size)},
                              {"input_size", size_text(place.input_size)},
                              {"sha256", no_digest}};
    std::size_t offset = 0;
    for (std::size_t i = 0; i < maps.size(); ++i) {
        const std::size_t end = offset + maps[i].size() * sizeof(float);
        header[names[i]] = {
            {"dtype", "F32"}, {"shape", maps[i].shape()}, {"data_offsets", {offset, end}}};
        offset = end;
    }
    std::string text = header.dump(-1, ' ', true);
    text.append((alignment - text.size() % alignment) % alignment, ' ');
    Sha256 digest;
    digest.update(text.data(), text.size());
    for (const Array<float>& map : maps) {
        digest.update(map.data(), map.size() * sizeof(float));
    }
    replace_first(text, no_digest, digest.hex_digest());
    write_atomically(path, [&](const Write& write) {
        const std::string length = length_bytes(text.size());
        write(length.data(), length.size());
        write(text.data(), text.size());
        for (const Array<float>& map : maps) {
            write(map.data(), map.size() * sizeof(float));
        }
    });
}

StoredEmbedding read_embedding(const std::filesystem::path& path, const std::string& fingerprint,
                               const std::vector<TensorSpec>& specs) {
    std::size_t data_size = 0;
    std::vector<std::size_t> sizes;
    for (const TensorSpec& spec : specs) {
        sizes.push_back(element_count(shape_of(spec)) * sizeof(float));
        data_size += sizes.back();
        if (data_size > max_elements) {
            refuse(path, "the model's feature maps are larger than memory can be");
        }
    }
    Bytes content;
    try {
        const std::uint64_t size = std::filesystem::file_size(path);
        if (size <= data_size || size > data_size + max_header + length_size) {
            refuse(path, "has " + std::to_string(size) +
                             " bytes, an embedding of this model about " +
                             std::to_string(data_size) +
                             ": it is cut or belongs to another model");
        }
        content = read_file(path, size);
    } catch (const std::system_error& error) {
        refuse(path, std::string("cannot be read: ") + error.what());
    }
    const Parsed parsed = parse(path, content);
    const std::string& maker = parsed.metadata.at("fingerprint");
    if (maker != fingerprint) {
        refuse(path, "made by the bundle " + maker.substr(0, 16) + "..., this model is " +
                         fingerprint.substr(0, 16) + "...; encode the image again");
    }
    StoredEmbedding stored;
    stored.place = {parse_size(path, parsed.metadata.at("original_size")),
                    parse_size(path, parsed.metadata.at("input_size"))};
    if (parsed.data_size != data_size || parsed.tensors.size() != specs.size()) {
        refuse(path, "does not hold exactly this model's feature maps");
    }
    std::size_t offset = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const Shape shape = shape_of(specs[i]);
        const Json expected = {{"dtype", "F32"},
                               {"shape", shape},
                               {"data_offsets", {offset, offset + sizes[i]}}};
        const auto found = parsed.tensors.find(specs[i].name);
        if (found == parsed.tensors.end() || *found != expected) {
            refuse(path, "tensor " + specs[i].name + " is not " + expected.dump());
        }
        Array<float> map(shape);
        // The data need not be aligned for float.
        std::memcpy(map.data(), parsed.data + offset, sizes[i]);
        stored.maps.push_back(std::move(map));
        offset += sizes[i];
    }
    return stored;
}

}  // namespace sam3rt
