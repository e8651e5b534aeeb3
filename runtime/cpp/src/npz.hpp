// Reading .npz files, NumPy's archives of arrays, that somebody else may have made.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// The types of a parity record: uint8, int64, float32, and one text, as UTF-8.
using NpzArray = std::variant<Array<std::uint8_t>, Array<std::int64_t>, Array<float>, std::string>;

/// At most this many bytes of arrays are read. A record of the published SAM 3 holds 4 MB.
constexpr std::uint64_t max_npz_bytes = std::uint64_t{1} << 28;

/// Every array of an archive, by name without the suffix: stored, or deflated as
/// numpy.savez_compressed does it. Sizes are held to what the archive can hold, and to the limit,
/// before anything is allocated.
/// Throws BundleError, naming the file, where the content is damaged, too large, or holds anything
/// else.
std::map<std::string, NpzArray> read_npz(ByteView content, const std::string& file);

}  // namespace sam3rt
