#include "rle.hpp"

#include <vector>

namespace sam3rt {
namespace {

/// Where, counted down the columns, a mask changes from the pixel before, from a 0 before the first.
/// The mask is read row by row, as it lies in memory.
std::vector<std::size_t> changes_of(const std::uint8_t* mask, std::size_t height,
                                    std::size_t width) {
    const auto changes = [=](std::size_t y, std::size_t x) {
        const std::uint8_t* pixel = mask + y * width + x;
        if (y != 0) {
            return (*pixel != 0) != (pixel[-static_cast<std::ptrdiff_t>(width)] != 0);
        }
        // What comes before a column is the end of the one before it.
        return (*pixel != 0) != (x != 0 && mask[(height - 1) * width + x - 1] != 0);
    };
    std::vector<std::size_t> next(width + 1);
    for (std::size_t y = 0; y < height; ++y) {
        for (std::size_t x = 0; x < width; ++x) {
            next[x + 1] += changes(y, x) ? 1U : 0U;
        }
    }
    for (std::size_t x = 0; x < width; ++x) {
        next[x + 1] += next[x];
    }
    std::vector<std::size_t> places(next[width]);
    for (std::size_t y = 0; y < height; ++y) {
        for (std::size_t x = 0; x < width; ++x) {
            if (changes(y, x)) {
                places[next[x]++] = x * height + y;
            }
        }
    }
    return places;
}

/// A number five bits at a time, the lowest first; a sixth bit says that more follow.
void append(std::string& text, std::int64_t number) {
    bool more = true;
    while (more) {
        const std::int64_t digit = number & 31;
        number >>= 5;
        more = (digit & 16) != 0 ? number != -1 : number != 0;
        text += static_cast<char>(48 + digit + (more ? 32 : 0));
    }
}

}  // namespace

std::string compressed_runs(const std::uint8_t* mask, std::size_t height, std::size_t width) {
    std::vector<std::size_t> bounds = changes_of(mask, height, width);
    bounds.push_back(height * width);
    std::vector<std::int64_t> runs;
    std::size_t start = 0;
    for (const std::size_t end : bounds) {
        runs.push_back(static_cast<std::int64_t>(end - start));
        start = end;
    }
    std::string text;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        // From the fourth run on, the difference from the last run of the same kind.
        append(text, i < 3 ? runs[i] : runs[i] - runs[i - 2]);
    }
    return text;
}

}  // namespace sam3rt
