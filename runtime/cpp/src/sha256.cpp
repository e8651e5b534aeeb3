#include "sha256.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__GNUC__) && defined(__x86_64__)
#define SAM3RT_SHA_INSTRUCTIONS 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define SAM3RT_SHA_INSTRUCTIONS 0
#endif

namespace sam3rt {
namespace {

using State = std::array<std::uint32_t, 8>;

// FIPS 180-4, 4.2.2: the first 32 bits of the fractions of the cube roots of the first 64 primes.
alignas(16) constexpr std::array<std::uint32_t, 64> round_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::atomic<bool> portable_only{false};

constexpr std::uint32_t rotate_right(std::uint32_t value, int bits) {
    return (value >> bits) | (value << (32 - bits));
}

void compress_portable(State& state, const std::uint8_t* block, std::size_t blocks) {
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
        const State worked = {a, b, c, d, e, f, g, h};
        for (std::size_t i = 0; i < 8; ++i) {
            state[i] += worked[i];
        }
    }
}

#if SAM3RT_SHA_INSTRUCTIONS
bool has_sha_instructions() {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    const bool sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & bit_SHA) != 0;
    return sha && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_SSE4_1) != 0 &&
           (c & bit_SSSE3) != 0;
}

// The instructions keep the state as the words (A, B, E, F) and (C, D, G, H), highest first, and do
// two rounds at a time (Intel's Software Developer's Manual, SHA256RNDS2).
__attribute__((target("sha,sse4.1,ssse3"))) void compress_with_instructions(
    State& state, const std::uint8_t* block, std::size_t blocks) {
    const auto pack = [](std::uint32_t w3, std::uint32_t w2, std::uint32_t w1, std::uint32_t w0) {
        return _mm_set_epi32(static_cast<int>(w3), static_cast<int>(w2), static_cast<int>(w1),
                             static_cast<int>(w0));
    };
    const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abef = pack(state[0], state[1], state[4], state[5]);
    __m128i cdgh = pack(state[2], state[3], state[6], state[7]);
    for (; blocks != 0; --blocks, block += 64) {
        const __m128i abef_before = abef;
        const __m128i cdgh_before = cdgh;
        __m128i words[4];  // the last sixteen words of the schedule
        for (std::size_t group = 0; group < 16; ++group) {
            __m128i& current = words[group % 4];
            if (group < 4) {
                const auto* source = reinterpret_cast<const __m128i*>(block + 16 * group);
                current = _mm_shuffle_epi8(_mm_loadu_si128(source), swap_bytes);
            } else {
                const __m128i w12 = words[(group + 1) % 4];
                const __m128i w8 = words[(group + 2) % 4];
                const __m128i w4 = words[(group + 3) % 4];
                const __m128i seven_back = _mm_alignr_epi8(w4, w8, 4);
                current = _mm_sha256msg2_epu32(
                    _mm_add_epi32(_mm_sha256msg1_epu32(current, w12), seven_back), w4);
            }
            const auto* constants =
                reinterpret_cast<const __m128i*>(round_constants.data() + 4 * group);
            const __m128i sum = _mm_add_epi32(current, _mm_load_si128(constants));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    alignas(16) std::array<std::uint32_t, 4> first;
    alignas(16) std::array<std::uint32_t, 4> second;
    _mm_store_si128(reinterpret_cast<__m128i*>(first.data()), abef);
    _mm_store_si128(reinterpret_cast<__m128i*>(second.data()), cdgh);
    state = {first[3], first[2], second[3], second[2], first[1], first[0], second[1], second[0]};
}
#endif

void compress(State& state, const std::uint8_t* block, std::size_t blocks) {
#if SAM3RT_SHA_INSTRUCTIONS
    static const bool available = has_sha_instructions();
    if (available && !portable_only.load(std::memory_order_relaxed)) {
        compress_with_instructions(state, block, blocks);
        return;
    }
#endif
    compress_portable(state, block, blocks);
}

}  // namespace

// FIPS 180-4, 5.3.3: the fractions of the square roots of the first eight primes.
Sha256::Sha256()
    : state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19} {}

void Sha256::use_portable(bool portable) noexcept {
    portable_only.store(portable, std::memory_order_relaxed);
}

void Sha256::update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    total_ += size;
    if (pending_size_ != 0) {
        const std::size_t taken = std::min(size, block_size - pending_size_);
        std::copy_n(bytes, taken, pending_.data() + pending_size_);
        pending_size_ += taken;
        bytes += taken;
        size -= taken;
        if (pending_size_ < block_size) {
            return;
        }
        compress(state_, pending_.data(), 1);
        pending_size_ = 0;
    }
    compress(state_, bytes, size / block_size);
    pending_size_ = size % block_size;
    std::copy_n(bytes + (size - pending_size_), pending_size_, pending_.data());
}

std::string Sha256::hex_digest() {
    const std::uint64_t bits = total_ * 8;
    const std::uint8_t one = 0x80;
    update(&one, 1);
    const std::array<std::uint8_t, block_size> zeros{};
    update(zeros.data(), (2 * block_size - 8 - pending_size_) % block_size);
    std::array<std::uint8_t, 8> length;
    for (std::size_t i = 0; i < 8; ++i) {
        length[i] = static_cast<std::uint8_t>(bits >> (56 - 8 * i));
    }
    update(length.data(), length.size());
    std::string text;
    for (const std::uint32_t word : state_) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            text += "0123456789abcdef"[(word >> shift) & 15U];
        }
    }
    return text;
}

std::string sha256_hex(const void* data, std::size_t size) {
    Sha256 digest;
    digest.update(data, size);
    return digest.hex_digest();
}

}  // namespace sam3rt
