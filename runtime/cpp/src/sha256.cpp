#include "sha256.hpp"

#include <array>
#include <cstdint>
#include <new>
#include <stdexcept>

#if SAM3RT_OPENSSL
#include <openssl/evp.h>
#else
#include <algorithm>
#endif

namespace sam3rt {
namespace {

std::string hexadecimal(const std::array<std::uint8_t, 32>& digest) {
    std::string text;
    for (const std::uint8_t byte : digest) {
        text += "0123456789abcdef"[byte >> 4U];
        text += "0123456789abcdef"[byte & 15U];
    }
    return text;
}

}  // namespace

#if SAM3RT_OPENSSL

struct Sha256::State {
    State() : context(EVP_MD_CTX_new()) {
        if (context == nullptr) {
            throw std::bad_alloc();
        }
        require(EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr));
    }

    static void require(int success) {
        if (success != 1) {
            throw std::runtime_error("OpenSSL cannot compute SHA-256 here");
        }
    }

    struct Free {
        void operator()(EVP_MD_CTX* used) const { EVP_MD_CTX_free(used); }
    };
    std::unique_ptr<EVP_MD_CTX, Free> context;
};

Sha256::Sha256() : state_(std::make_unique<State>()) {}

void Sha256::update(const void* data, std::size_t size) {
    State::require(EVP_DigestUpdate(state_->context.get(), data, size));
}

std::string Sha256::hex_digest() {
    std::array<std::uint8_t, 32> digest{};
    State::require(EVP_DigestFinal_ex(state_->context.get(), digest.data(), nullptr));
    return hexadecimal(digest);
}

#else

namespace {

constexpr std::size_t block_size = 64;
using Words = std::array<std::uint32_t, 8>;

// FIPS 180-4, 4.2.2: the first 32 bits of the fractions of the cube roots of the first 64 primes.
constexpr std::array<std::uint32_t, 64> round_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr std::uint32_t rotate_right(std::uint32_t value, int bits) {
    return (value >> bits) | (value << (32 - bits));
}

void compress(Words& state, const std::uint8_t* block, std::size_t blocks) {
    for (; blocks != 0; --blocks, block += 64) {
        std::array<std::uint32_t, 64> schedule;
        for (std::size_t t = 0; t < 16; ++t) {
            const std::uint8_t* word = block + 4 * t;
            schedule[t] = std::uint32_t{word[0]} << 24 | std::uint32_t{word[1]} << 16 |
                          std::uint32_t{word[2]} << 8 | std::uint32_t{word[3]};
        }
        for (std::size_t t = 16; t < 64; ++t) {
            const std::uint32_t w15 = schedule[t - 15];
            const std::uint32_t w2 = schedule[t - 2];
            const std::uint32_t s0 = rotate_right(w15, 7) ^ rotate_right(w15, 18) ^ (w15 >> 3);
            const std::uint32_t s1 = rotate_right(w2, 17) ^ rotate_right(w2, 19) ^ (w2 >> 10);
            schedule[t] = schedule[t - 16] + s0 + schedule[t - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (std::size_t t = 0; t < 64; ++t) {
            const std::uint32_t sum1 =
                rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
            const std::uint32_t choice = (e & f) ^ (~e & g);
            const std::uint32_t first = h + sum1 + choice + round_constants[t] + schedule[t];
            const std::uint32_t sum0 =
                rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
            const std::uint32_t second = sum0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + first;
            d = c;
            c = b;
            b = a;
            a = first + second;
        }
        const Words worked = {a, b, c, d, e, f, g, h};
        for (std::size_t i = 0; i < 8; ++i) {
            state[i] += worked[i];
        }
    }
}

}  // namespace

struct Sha256::State {
    // FIPS 180-4, 5.3.3: the fractions of the square roots of the first eight primes.
    Words words = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    /// What is not yet a whole block.
    std::array<std::uint8_t, block_size> pending{};
    std::size_t pending_size = 0;
    std::uint64_t total = 0;
};

Sha256::Sha256() : state_(std::make_unique<State>()) {}

void Sha256::update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    State& state = *state_;
    state.total += size;
    if (state.pending_size != 0) {
        const std::size_t taken = std::min(size, block_size - state.pending_size);
        std::copy_n(bytes, taken, state.pending.data() + state.pending_size);
        state.pending_size += taken;
        bytes += taken;
        size -= taken;
        if (state.pending_size < block_size) {
            return;
        }
        compress(state.words, state.pending.data(), 1);
    }
    compress(state.words, bytes, size / block_size);
    state.pending_size = size % block_size;
    std::copy_n(bytes + (size - state.pending_size), state.pending_size, state.pending.data());
}

std::string Sha256::hex_digest() {
    const std::uint64_t bits = state_->total * 8;
    const std::uint8_t one = 0x80;
    update(&one, 1);
    const std::array<std::uint8_t, block_size> zeros{};
    update(zeros.data(), (2 * block_size - 8 - state_->pending_size) % block_size);
    std::array<std::uint8_t, 8> length{};
    for (std::size_t i = 0; i < length.size(); ++i) {
        length[i] = static_cast<std::uint8_t>(bits >> (56 - 8 * i));
    }
    update(length.data(), length.size());
    std::array<std::uint8_t, 32> digest{};
    for (std::size_t i = 0; i < digest.size(); ++i) {
        digest[i] = static_cast<std::uint8_t>(state_->words[i / 4] >> (24 - 8 * (i % 4)));
    }
    return hexadecimal(digest);
}

#endif

Sha256::~Sha256() = default;

std::string sha256_hex(const void* data, std::size_t size) {
    Sha256 digest;
    digest.update(data, size);
    return digest.hex_digest();
}

}  // namespace sam3rt
