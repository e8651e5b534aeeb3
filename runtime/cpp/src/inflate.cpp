#include "inflate.hpp"

#include <array>

namespace sam3rt {
namespace {

constexpr std::size_t max_length_codes = 286;
constexpr std::size_t max_distance_codes = 30;

/// Thrown and caught in this file: the data are not what DEFLATE makes.
struct Damaged {};

/// The packed bits, the lowest of each byte first.
class Bits {
public:
    Bits(const std::uint8_t* bytes, std::size_t count) : next_(bytes), end_(bytes + count) {}

    /// A number of up to 16 bits, the lowest first.
    unsigned take(unsigned count) {
        while (known_ < count) {
            buffer_ |= static_cast<std::uint32_t>(byte()) << known_;
            known_ += 8;
        }
        const unsigned value = buffer_ & ((1U << count) - 1U);
        buffer_ >>= count;
        known_ -= count;
        return value;
    }

    /// The next whole byte. Bits that were left of the last one are dropped.
    std::uint8_t whole_byte() {
        buffer_ = 0;
        known_ = 0;
        return byte();
    }

    bool at_end() const { return next_ == end_; }

private:
    std::uint8_t byte() {
        if (next_ == end_) {
            throw Damaged{};
        }
        return *next_++;
    }

    const std::uint8_t* next_;
    const std::uint8_t* end_;
    std::uint32_t buffer_ = 0;
    unsigned known_ = 0;
};

/// A canonical Huffman code of at most 15 bits per symbol.
class Huffman {
public:
    /// `lengths` holds the length of each symbol's code, 0 for symbols without one.
    Huffman(const std::uint8_t* lengths, std::size_t count) {
        for (std::size_t symbol = 0; symbol < count; ++symbol) {
            ++counts_.at(lengths[symbol]);
        }
        const std::size_t used = count - counts_[0];
        counts_[0] = 0;
        // How many codes of a length are left over by the shorter ones.
        int left = 1;
        std::array<std::uint16_t, 17> first{};
        for (std::size_t length = 1; length < counts_.size(); ++length) {
            left = 2 * left - counts_[length];
            if (left < 0) {
                throw Damaged{};
            }
            first[length + 1] = static_cast<std::uint16_t>(first[length] + counts_[length]);
        }
        // A code that leaves bits without a meaning is allowed for one symbol, or none, alone.
        if (left > 0 && !(used == counts_[1] && used <= 1)) {
            throw Damaged{};
        }
        for (std::size_t symbol = 0; symbol < count; ++symbol) {
            if (lengths[symbol] != 0) {
                symbols_[first[lengths[symbol]]++] = static_cast<std::uint16_t>(symbol);
            }
        }
    }

    unsigned read(Bits& bits) const {
        // Codes of one length are consecutive numbers, which follow on those of shorter ones.
        unsigned code = 0;
        unsigned first = 0;
        unsigned index = 0;
        for (std::size_t length = 1; length < counts_.size(); ++length) {
            code |= bits.take(1);
            const unsigned count = counts_[length];
            if (code < first + count) {
                return symbols_[index + (code - first)];
            }
            index += count;
            first = (first + count) << 1U;
            code <<= 1U;
        }
        throw Damaged{};
    }

private:
    /// How many codes there are of each length, and their symbols in order.
    std::array<std::uint16_t, 16> counts_{};
    std::array<std::uint16_t, 288> symbols_{};
};

struct Codes {
    Huffman lengths;
    Huffman distances;
};

Codes fixed_codes() {
    std::array<std::uint8_t, 288> lengths{};
    for (std::size_t symbol = 0; symbol < lengths.size(); ++symbol) {
        lengths[symbol] = symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8;
    }
    std::array<std::uint8_t, 32> distances{};
    distances.fill(5);
    return {Huffman(lengths.data(), lengths.size()), Huffman(distances.data(), distances.size())};
}

/// The codes at the start of a block that brings its own.
Codes read_codes(Bits& bits) {
    static constexpr std::array<std::uint8_t, 19> order = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                           11, 4,  12, 3, 13, 2, 14, 1, 15};
    const std::size_t length_count = bits.take(5) + 257;
    const std::size_t distance_count = bits.take(5) + 1;
    const std::size_t order_count = bits.take(4) + 4;
    if (length_count > max_length_codes || distance_count > max_distance_codes) {
        throw Damaged{};
    }
    std::array<std::uint8_t, 19> own{};
    for (std::size_t i = 0; i < order_count; ++i) {
        own[order[i]] = static_cast<std::uint8_t>(bits.take(3));
    }
    const Huffman code(own.data(), own.size());
    std::array<std::uint8_t, max_length_codes + max_distance_codes> lengths{};
    for (std::size_t at = 0; at < length_count + distance_count;) {
        const unsigned symbol = code.read(bits);
        if (symbol < 16) {
            lengths[at++] = static_cast<std::uint8_t>(symbol);
            continue;
        }
        if (symbol == 16 && at == 0) {
            throw Damaged{};
        }
        const std::uint8_t repeated = symbol == 16 ? lengths[at - 1] : std::uint8_t{0};
        std::size_t times = symbol == 16   ? 3 + bits.take(2)
                            : symbol == 17 ? 3 + bits.take(3)
                                           : 11 + bits.take(7);
        if (at + times > length_count + distance_count) {
            throw Damaged{};
        }
        for (; times != 0; --times) {
            lengths[at++] = repeated;
        }
    }
    if (lengths[256] == 0) {  // such a block could not end
        throw Damaged{};
    }
    return {Huffman(lengths.data(), length_count),
            Huffman(lengths.data() + length_count, distance_count)};
}

/// Unpack into memory that never grows beyond what was announced.
class Output {
public:
    explicit Output(std::size_t size) : size_(size) {}

    void add(std::uint8_t byte) {
        if (bytes_.size() == size_) {
            throw Damaged{};
        }
        bytes_.push_back(byte);
    }

    void repeat(std::size_t distance, std::size_t count) {
        if (distance > bytes_.size()) {
            throw Damaged{};
        }
        for (; count != 0; --count) {
            add(bytes_[bytes_.size() - distance]);
        }
    }

    bool is_full() const { return bytes_.size() == size_; }
    Bytes bytes() && { return std::move(bytes_); }

private:
    std::size_t size_;
    Bytes bytes_;
};

void copy_stored_block(Bits& bits, Output& output) {
    std::array<unsigned, 4> header{};
    for (unsigned& byte : header) {
        byte = bits.whole_byte();
    }
    const unsigned count = header[0] | header[1] << 8U;
    if (count != ((header[2] | header[3] << 8U) ^ 0xffffU)) {
        throw Damaged{};
    }
    for (unsigned i = 0; i < count; ++i) {
        output.add(bits.whole_byte());
    }
}

void unpack_block(Bits& bits, const Codes& codes, Output& output) {
    static constexpr std::array<std::uint16_t, 29> lengths = {
        3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
        31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static constexpr std::array<std::uint8_t, 29> length_bits = {
        0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static constexpr std::array<std::uint16_t, max_distance_codes> distances = {
        1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
        193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    static constexpr std::array<std::uint8_t, max_distance_codes> distance_bits = {
        0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
        6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
    for (;;) {
        const unsigned symbol = codes.lengths.read(bits);
        if (symbol == 256) {
            return;
        }
        if (symbol < 256) {
            output.add(static_cast<std::uint8_t>(symbol));
            continue;
        }
        const std::size_t length = symbol - 257;
        if (length >= lengths.size()) {
            throw Damaged{};
        }
        const std::size_t count = lengths[length] + bits.take(length_bits[length]);
        const std::size_t distance = codes.distances.read(bits);
        if (distance >= distances.size()) {
            throw Damaged{};
        }
        output.repeat(distances[distance] + bits.take(distance_bits[distance]), count);
    }
}

}  // namespace

std::optional<Bytes> inflate(const std::uint8_t* packed, std::size_t count, std::size_t size) {
    try {
        Bits bits(packed, count);
        Output output(size);
        for (bool is_last = false; !is_last;) {
            is_last = bits.take(1) == 1;
            switch (bits.take(2)) {
                case 0:
                    copy_stored_block(bits, output);
                    break;
                case 1:
                    unpack_block(bits, fixed_codes(), output);
                    break;
                case 2:
                    unpack_block(bits, read_codes(bits), output);
                    break;
                default:
                    return std::nullopt;
            }
        }
        if (!output.is_full() || !bits.at_end()) {
            return std::nullopt;
        }
        return std::move(output).bytes();
    } catch (const Damaged&) {
        return std::nullopt;
    }
}

}  // namespace sam3rt
