// libFuzzer: any bytes as a parity record. The first byte says as what: packed data, an archive, or
// an array in an archive whose checksum is right, which no mutation would find.
#include <string>

#include "inflate.hpp"
#include "npz.hpp"

namespace {

std::uint32_t crc32(const sam3rt::Bytes& content) {
    std::uint32_t crc = 0xffffffffU;
    for (const std::uint8_t byte : content) {
        crc ^= byte;
        for (int bit = 0; bit < 8; ++bit) {
            crc = (crc >> 1U) ^ ((crc & 1U) != 0 ? 0xedb88320U : 0U);
        }
    }
    return ~crc;
}

class Writer {
public:
    Writer& number(std::size_t value, std::size_t bytes) {
        for (std::size_t i = 0; i < bytes; ++i) {
            content.push_back(static_cast<std::uint8_t>(value));
            value >>= 8U;
        }
        return *this;
    }
    Writer& bytes(const sam3rt::Bytes& added) {
        content.insert(content.end(), added.begin(), added.end());
        return *this;
    }

    sam3rt::Bytes content;
};

/// An archive with one stored member.
sam3rt::Bytes archive_of(const sam3rt::Bytes& member) {
    const sam3rt::Bytes name = {'a'};
    const std::size_t crc = crc32(member);
    const auto sizes = [&](Writer& writer) -> Writer& {
        return writer.number(crc, 4).number(member.size(), 4).number(member.size(), 4);
    };
    Writer writer;
    writer.number(0x04034b50, 4).number(0, 10);
    sizes(writer).number(name.size(), 2).number(0, 2).bytes(name).bytes(member);
    const std::size_t directory = writer.content.size();
    writer.number(0x02014b50, 4).number(0, 12);
    sizes(writer).number(name.size(), 2).number(0, 16).bytes(name);
    const std::size_t end = writer.content.size();
    writer.number(0x06054b50, 4).number(0, 4).number(1, 2).number(1, 2);
    return writer.number(end - directory, 4).number(directory, 4).number(0, 2).content;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) {
        return 0;
    }
    const sam3rt::Bytes content(data + 1, data + size);
    try {
        if (data[0] == 0) {
            for (const std::size_t wanted : {std::size_t{10}, std::size_t{10000}}) {
                sam3rt::inflate(content.data(), content.size(), wanted);
            }
        } else {
            sam3rt::read_npz(data[0] == 1 ? content : archive_of(content), "parity.npz");
        }
    } catch (const sam3rt::BundleError&) {
        // The only way to refuse it.
    }
    return 0;
}
