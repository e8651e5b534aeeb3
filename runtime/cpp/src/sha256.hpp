// SHA-256 (FIPS 180-4): OpenSSL's where this library was built with it, else portable code.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace sam3rt {

/// A digest over data that come in pieces. Throws std::bad_alloc where memory runs out.
class Sha256 {
public:
    Sha256();
    ~Sha256();

    void update(const void* data, std::size_t size);

    /// The digest in lower-case hexadecimal, 64 digits. Call once, last.
    std::string hex_digest();

private:
    struct State;
    std::unique_ptr<State> state_;
};

/// The digest of one piece, 64 hexadecimal digits.
std::string sha256_hex(const void* data, std::size_t size);

}  // namespace sam3rt
