// The command line, with the arguments of `sam3rt segment`.
#pragma once

#include <array>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

/// The arguments are wrong; the message says which one and why.
class UsageError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct Click {
    float x;
    float y;
    int label;
};

struct Arguments {
    bool help = false;
    std::filesystem::path image;
    std::vector<Click> points;
    std::vector<std::array<float, 4>> boxes;
    bool single_mask = false;
    std::filesystem::path bundle;
    std::filesystem::path output;
    double mask_threshold = 0;
    std::optional<double> max_hole_area;
    double max_sprinkle_area = 0;
    /// As the library takes it; --backend and --device together say it.
    std::string device = "auto";
    int threads = 0;
};

/// What --help prints.
extern const char* const usage_text;

/// Throws UsageError.
Arguments parse_arguments(const std::vector<std::string>& words);
