// What a call found, best first, and the files it is written to.
#pragma once

#include <filesystem>
#include <sam3rt/sam3rt.hpp>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "image_files.hpp"

/// One mask of one object.
struct Found {
    std::size_t object;
    float score;
    /// height * width, 0 and 1.
    std::vector<std::uint8_t> mask;
};

/// How long the parts took, seconds.
struct Seconds {
    double load;
    double encode;
    double predict;
};

/// All masks of a prediction: object by object, the best predicted IoU first.
std::vector<Found> sorted(const sam3rt::Prediction& prediction);

/// An earlier run's files in the output folder, which may be replaced. Throws UsageError where a file
/// of such a name is none of them, or is the image.
std::vector<std::filesystem::path> earlier_results(const Arguments& arguments);

/// Write mask_N.png, overlay.png and result.json in place of an earlier run's files.
/// Throws std::system_error.
void write_results(const Arguments& arguments,
                   const std::vector<std::filesystem::path>& earlier, const Picture& image,
                   const sam3rt::Model& model, const std::vector<Found>& found,
                   const Seconds& seconds);

/// A table of what was found, for people.
std::string table(const std::vector<Found>& found, const Arguments& arguments,
                  const Seconds& seconds);
