#include "image_files.hpp"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iterator>
#include <memory>
#include <sam3rt/sam3rt.hpp>
#include <system_error>

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_NO_HDR
#define STBI_NO_LINEAR
#define STBI_NO_STDIO
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBI_WRITE_NO_STDIO
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include <stb_image.h>
#include <stb_image_write.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace fs = std::filesystem;

namespace {

using Bytes = std::vector<std::uint8_t>;

[[noreturn]] void refuse(const fs::path& path, const std::string& problem) {
    throw sam3rt::ImageError("image", path.string() + ": " + problem, "a readable image file");
}

std::uint32_t number(const Bytes& bytes, std::size_t at, std::size_t size, bool little) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const std::size_t from = little ? at + size - 1 - i : at + i;
        value = value << 8U | bytes[from];
    }
    return value;
}

/// The orientation in a TIFF structure that lies in `bytes` from `start` to `end`.
int orientation_of_tiff(const Bytes& bytes, std::size_t start, std::size_t end) {
    constexpr std::size_t entry_size = 12;
    constexpr std::uint32_t orientation_tag = 0x112;
    if (end - start < 8) {
        return 1;
    }
    const bool little = bytes[start] == 'I';
    const std::size_t folder = number(bytes, start + 4, 4, little);
    if (folder > end - start - 2) {
        return 1;
    }
    const std::size_t first = start + folder + 2;
    const std::size_t count = number(bytes, start + folder, 2, little);
    for (std::size_t i = 0; i < count && first + (i + 1) * entry_size <= end; ++i) {
        const std::size_t entry = first + i * entry_size;
        if (number(bytes, entry, 2, little) == orientation_tag) {
            const std::uint32_t value = number(bytes, entry + 8, 2, little);
            return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
        }
    }
    return 1;
}

int orientation_of_jpeg(const Bytes& bytes) {
    static const std::string signature("Exif\0\0", 6);
    // Segments follow each other until the picture itself starts.
    for (std::size_t at = 2;
         at + 4 <= bytes.size() && bytes[at] == 0xff && bytes[at + 1] != 0xda;) {
        const std::size_t length = number(bytes, at + 2, 2, false);
        const std::size_t end = at + 2 + length;
        const std::size_t tiff = at + 4 + signature.size();
        if (length < 2 || end > bytes.size()) {
            break;
        }
        if (bytes[at + 1] == 0xe1 && tiff <= end &&
            std::equal(signature.begin(), signature.end(),
                       bytes.begin() + static_cast<std::ptrdiff_t>(at + 4),
                       [](char a, std::uint8_t b) { return static_cast<std::uint8_t>(a) == b; })) {
            return orientation_of_tiff(bytes, tiff, end);
        }
        at = end;
    }
    return 1;
}

int orientation_of_png(const Bytes& bytes) {
    constexpr std::uint32_t exif = 0x65584966;  // "eXIf"
    for (std::size_t at = 8; at + 12 <= bytes.size();) {
        const std::size_t length = number(bytes, at, 4, false);
        if (length > bytes.size() - at - 12) {
            break;
        }
        if (number(bytes, at + 4, 4, false) == exif) {
            return orientation_of_tiff(bytes, at + 8, at + 8 + length);
        }
        at += length + 12;
    }
    return 1;
}

/// Orientations 5 to 8 lie on their side; 2 and so on are mirrored (EXIF 2.3, tag 0x112).
Picture upright(const Picture& stored, int orientation) {
    if (orientation == 1) {
        return stored;
    }
    const bool turned = orientation >= 5;
    const bool flip_x =
        orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    const bool flip_y =
        orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    Picture result{turned ? stored.width : stored.height, turned ? stored.height : stored.width,
                   stored.channels, Bytes(stored.pixels.size())};
    auto out = result.pixels.begin();
    for (std::int64_t y = 0; y < result.height; ++y) {
        for (std::int64_t x = 0; x < result.width; ++x) {
            std::int64_t from_x = turned ? y : x;
            std::int64_t from_y = turned ? x : y;
            from_x = flip_x ? stored.width - 1 - from_x : from_x;
            from_y = flip_y ? stored.height - 1 - from_y : from_y;
            const auto from = stored.pixels.begin() + (from_y * stored.width + from_x) * 3;
            out = std::copy(from, from + 3, out);
        }
    }
    return result;
}

Bytes read_bytes(const fs::path& path) {
    if (!fs::is_regular_file(path)) {
        refuse(path, "no such file");
    }
    std::ifstream file(path, std::ios::binary);
    Bytes content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (file.bad() || content.empty()) {
        refuse(path, "cannot be read");
    }
    return content;
}

/// A file's content as stb_image reads it, which takes zeros for what a file lacks at its end.
struct Reader {
    const Bytes& content;
    std::size_t at = 0;
    bool is_cut = false;

    int advance(int size) {
        const auto left = static_cast<std::ptrdiff_t>(content.size() - at);
        const std::ptrdiff_t step = std::min<std::ptrdiff_t>(size, left);
        is_cut = is_cut || (size > 0 && step == 0);
        at = static_cast<std::size_t>(static_cast<std::ptrdiff_t>(at) + step);
        return static_cast<int>(step);
    }
};

const stbi_io_callbacks reader_calls = {
    [](void* reader, char* data, int size) {
        auto& from = *static_cast<Reader*>(reader);
        const std::uint8_t* start = from.content.data() + from.at;
        const int count = from.advance(size);
        std::copy_n(start, count, data);
        return count;
    },
    [](void* reader, int size) { static_cast<Reader*>(reader)->advance(size); },
    [](void* reader) {
        const auto& from = *static_cast<Reader*>(reader);
        return from.at == from.content.size() ? 1 : 0;
    }};

void write_file(const fs::path& path, const std::vector<char>& content) {
    const fs::path temporary = path.parent_path() / ("." + path.filename().string() + ".tmp");
    std::ofstream file(temporary, std::ios::binary);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    file.close();
    if (!file) {
        std::error_code ignored;
        fs::remove(temporary, ignored);
        throw std::system_error(errno == 0 ? EIO : errno, std::generic_category(), path.string());
    }
    fs::rename(temporary, path);
}

}  // namespace

int exif_orientation(const Bytes& content) {
    static const Bytes png = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
    if (content.size() >= 2 && content[0] == 0xff && content[1] == 0xd8) {
        return orientation_of_jpeg(content);
    }
    if (content.size() >= png.size() && std::equal(png.begin(), png.end(), content.begin())) {
        return orientation_of_png(content);
    }
    return 1;
}

Picture read_image(const fs::path& path) {
    const Bytes content = read_bytes(path);
    Reader header{content};
    if (stbi_is_16_bit_from_callbacks(&reader_calls, &header) != 0) {
        refuse(path, "more than 8 bits per channel; convert it first");
    }
    int width = 0;
    int height = 0;
    int stored_channels = 0;
    Reader reader{content};
    const std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
        stbi_load_from_callbacks(&reader_calls, &reader, &width, &height, &stored_channels, 3),
        stbi_image_free);
    if (pixels == nullptr || reader.is_cut) {
        refuse(path, pixels == nullptr ? stbi_failure_reason() : "is cut");
    }
    const std::size_t count =
        std::size_t{3} * static_cast<std::size_t>(width) * static_cast<std::size_t>(height);
    return upright({height, width, 3, Bytes(pixels.get(), pixels.get() + count)},
                   exif_orientation(content));
}

void write_png(const fs::path& path, const Picture& picture) {
    std::vector<char> content;
    const auto collect = [](void* context, void* data, int size) {
        auto* target = static_cast<std::vector<char>*>(context);
        const char* bytes = static_cast<const char*>(data);
        target->insert(target->end(), bytes, bytes + size);
    };
    const int stride = static_cast<int>(picture.width) * picture.channels;
    if (stbi_write_png_to_func(collect, &content, static_cast<int>(picture.width),
                               static_cast<int>(picture.height), picture.channels,
                               picture.pixels.data(), stride) == 0) {
        throw std::system_error(ENOMEM, std::generic_category(), path.string());
    }
    write_file(path, content);
}

void write_text(const fs::path& path, const std::string& text) {
    write_file(path, {text.begin(), text.end()});
}
