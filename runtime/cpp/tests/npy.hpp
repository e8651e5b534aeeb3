// NumPy's .npy files (format 1.0), as far as the tests exchange arrays in them.
#pragma once

#include <filesystem>
#include <fstream>
#include <regex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt::testing {

template <typename T>
std::string npy_type() {
    if (std::is_same_v<T, float>) {
        return "<f4";
    }
    if (std::is_same_v<T, std::int64_t>) {
        return "<i8";
    }
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, std::int64_t> ||
                  std::is_same_v<T, std::uint8_t>);
    return "|u1";
}

/// Read an array of exactly this type. Throws std::runtime_error.
template <typename T>
Array<T> read_npy(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string prefix(10, '\0');
    file.read(prefix.data(), 10);
    const auto low = static_cast<unsigned char>(prefix[8]);
    const auto high = static_cast<unsigned char>(prefix[9]);
    std::string header(low + std::size_t{256} * high, '\0');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    std::smatch match;
    const std::regex form("'descr': '([^']*)', 'fortran_order': False, 'shape': \\(([^)]*)\\)");
    if (!file || !std::regex_search(header, match, form) || match[1] != npy_type<T>()) {
        throw std::runtime_error(path.string() + " is no .npy file of " + npy_type<T>());
    }
    Shape shape;
    const std::string sides = match[2];
    const std::regex number("[0-9]+");
    for (std::sregex_iterator it(sides.begin(), sides.end(), number), end; it != end; ++it) {
        shape.push_back(std::stoll(it->str()));
    }
    Array<T> array(shape);
    file.read(reinterpret_cast<char*>(array.data()),
              static_cast<std::streamsize>(array.size() * sizeof(T)));
    if (!file) {
        throw std::runtime_error(path.string() + " is cut");
    }
    return array;
}

/// Write an array. Throws std::runtime_error.
template <typename T>
void write_npy(const std::filesystem::path& path, const Array<T>& array) {
    std::string header = "{'descr': '" + npy_type<T>() + "', 'fortran_order': False, 'shape': (";
    for (const std::int64_t side : array.shape()) {
        header += std::to_string(side) + ",";
    }
    header += "), }";
    header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ');
    header += '\n';
    std::ofstream file(path, std::ios::binary);
    file << std::string("\x93NUMPY\x01\x00", 8) << static_cast<char>(header.size() & 0xffU)
         << static_cast<char>(header.size() >> 8U) << header;
    file.write(reinterpret_cast<const char*>(array.data()),
               static_cast<std::streamsize>(array.size() * sizeof(T)));
    if (!file.flush()) {
        throw std::runtime_error(path.string() + " cannot be written");
    }
}

}  // namespace sam3rt::testing
