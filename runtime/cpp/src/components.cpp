#include "components.hpp"

#include <algorithm>

namespace sam3rt {
namespace {

/// Consecutive pixels of one row, end exclusive.
struct Run {
    std::size_t row;
    std::size_t start;
    std::size_t end;
};

std::vector<Run> find_runs(const std::vector<std::uint8_t>& wanted, std::size_t height,
                           std::size_t width) {
    std::vector<Run> runs;
    for (std::size_t y = 0; y < height; ++y) {
        const std::uint8_t* row = wanted.data() + y * width;
        for (std::size_t x = 0; x < width;) {
            const std::size_t start =
                static_cast<std::size_t>(std::find(row + x, row + width, 1) - row);
            x = static_cast<std::size_t>(std::find(row + start, row + width, 0) - row);
            if (start < width) {
                runs.push_back({y, start, x});
            }
        }
    }
    return runs;
}

/// Sets of runs that touch (union by the lower root, with path halving).
class Sets {
public:
    explicit Sets(std::size_t count) : parents_(count) {
        for (std::size_t i = 0; i < count; ++i) {
            parents_[i] = i;
        }
    }

    std::size_t root(std::size_t member) {
        while (parents_[member] != member) {
            parents_[member] = parents_[parents_[member]];
            member = parents_[member];
        }
        return member;
    }

    void join(std::size_t a, std::size_t b) {
        a = root(a);
        b = root(b);
        parents_[std::max(a, b)] = std::min(a, b);
    }

private:
    std::vector<std::size_t> parents_;
};

/// Joins every run with those of the row above that it touches, corners included. Runs are in
/// reading order, so one pass with a second index that trails by a row finds all pairs.
Sets join_touching(const std::vector<Run>& runs) {
    Sets sets(runs.size());
    std::size_t above = 0;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const Run& run = runs[i];
        while (runs[above].row + 1 < run.row ||
               (runs[above].row + 1 == run.row && runs[above].end < run.start)) {
            ++above;
        }
        for (std::size_t j = above; runs[j].row + 1 == run.row && runs[j].start <= run.end; ++j) {
            sets.join(i, j);
        }
    }
    return sets;
}

}  // namespace

std::vector<std::uint8_t> small_components(const std::vector<std::uint8_t>& wanted,
                                           std::size_t height, std::size_t width, double max_area) {
    const std::vector<Run> runs = find_runs(wanted, height, width);
    Sets sets = join_touching(runs);
    std::vector<std::size_t> areas(runs.size());
    for (std::size_t i = 0; i < runs.size(); ++i) {
        areas[sets.root(i)] += runs[i].end - runs[i].start;
    }
    std::vector<std::uint8_t> small;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        if (static_cast<double>(areas[sets.root(i)]) > max_area) {
            continue;
        }
        if (small.empty()) {
            small.resize(wanted.size());
        }
        std::fill(small.begin() + static_cast<std::ptrdiff_t>(runs[i].row * width + runs[i].start),
                  small.begin() + static_cast<std::ptrdiff_t>(runs[i].row * width + runs[i].end),
                  std::uint8_t{1});
    }
    return small;
}

}  // namespace sam3rt
