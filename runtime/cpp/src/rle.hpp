// Masks as run lengths, in COCO's compressed text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sam3rt {

/// COCO's text for a mask [height, width] of 0 and anything else, byte for byte that of
/// pycocotools: lengths of runs of zeros and ones in turn, down each column and column after column.
std::string compressed_runs(const std::uint8_t* mask, std::size_t height, std::size_t width);

}  // namespace sam3rt
