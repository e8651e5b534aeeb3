// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace sam3rt {

/// A digest over data that come in pieces.
class Sha256 {
public:
    Sha256();

    void update(const void* data, std::size_t size);

    /// The digest in lower-case hexadecimal, 64 digits. Call once, last.
    std::string hex_digest();

    /// Use the portable code even where the processor has instructions for SHA-256.
    static void use_portable(bool portable) noexcept;

private:
    static constexpr std::size_t block_size = 64;

    std::array<std::uint32_t, 8> state_;
    std::array<std::uint8_t, block_size> pending_{};
    std::size_t pending_size_ = 0;
    std::uint64_t total_ = 0;
};

/// The digest of one piece, 64 hexadecimal digits.
std::string sha256_hex(const void* data, std::size_t size);

}  // namespace sam3rt
