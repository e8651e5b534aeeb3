// Image files: reading them upright, and writing PNG.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

/// 8-bit pixels, interleaved: RGB, or grey for masks.
struct Picture {
    std::int64_t height = 0;
    std::int64_t width = 0;
    int channels = 3;
    std::vector<std::uint8_t> pixels;
};

/// Read an image as RGB, with its EXIF orientation applied. Transparency is dropped.
/// Throws sam3rt::ImageError where it is missing, cut, too large or has more than 8 bits.
Picture read_image(const std::filesystem::path& path);

/// Write a PNG file, whole or not at all. Throws std::system_error.
void write_png(const std::filesystem::path& path, const Picture& picture);

/// Write text to a file, whole or not at all. Throws std::system_error.
void write_text(const std::filesystem::path& path, const std::string& text);

/// The EXIF orientation, 1 to 8, of a JPEG or PNG file's content; 1 where there is none.
int exif_orientation(const std::vector<std::uint8_t>& content);
