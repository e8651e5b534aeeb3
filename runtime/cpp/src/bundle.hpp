// Bundles: a folder with two ONNX graphs and everything a consumer must know about them.
#pragma once

#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// A bundle folder, as an absolute path, whose manifest has been read and checked.
struct Bundle {
    std::filesystem::path path;
    Manifest manifest;
    /// The content of bundle.json.
    std::string text;
};

/// One of a manifest's limits: its name, and where it stands.
struct NamedLimit {
    const char* name;
    double ParityLimits::* value;
    /// Whether a figure must reach it rather than stay below it.
    bool at_least;
};

/// All of them, by name.
inline constexpr std::array<NamedLimit, 5> named_limits = {{
    {"feature_cosine", &ParityLimits::feature_cosine, true},
    {"feature_error", &ParityLimits::feature_error, false},
    {"iou_error", &ParityLimits::iou_error, false},
    {"logit_error", &ParityLimits::logit_error, false},
    {"mask_iou", &ParityLimits::mask_iou, true},
}};

/// Beyond these a graph is broken, whatever its manifest allows: they are what is asked of types
/// narrower than FP32.
inline constexpr ParityLimits loosest_limits{0.1, 0.999, 0.1, 0.05, 0.99};

/// Whether the decoder says of each object how sure it is that there is one.
bool has_object_score(const Manifest& manifest);

/// The decoder's outputs that a call needs: logits, IoUs and, where there is one, the object score.
std::vector<std::string> decoder_outputs(const Manifest& manifest, bool multimask);

/// Read a bundle's manifest and check it against itself and, if asked to, its files.
/// Throws BundleError, naming the file at fault.
Bundle open_bundle(const std::filesystem::path& folder, bool check_files);

/// Parse and validate the content of bundle.json. Throws BundleError.
Manifest parse_manifest(const Bytes& raw);

/// Refuse a file that is missing, not a plain file, a link that leaves the folder, or of another
/// length or hash than its entry says. Throws BundleError.
void check_file(const std::filesystem::path& folder, const FileEntry& entry);

/// The content of a file that check_file would accept. What is checked is what was read, whatever
/// happens to the file meanwhile. Throws BundleError.
Bytes read_checked(const std::filesystem::path& folder, const FileEntry& entry);

/// The part of check_file that opens nothing. A link of a hub's snapshot into the blobs of the same
/// repository does not leave the folder. Throws BundleError.
void check_length(const std::filesystem::path& folder, const FileEntry& entry);

/// Whether a path lies in a folder when all links are followed. Throws std::system_error.
bool is_inside(const std::filesystem::path& path, const std::filesystem::path& folder);

/// Whether a text may name a file of a bundle: no separators, no leading dot, at most 128 letters,
/// digits, dots, dashes and underscores.
bool is_safe_name(const std::string& name);

/// Whether a text is a SHA-256 in lower-case hexadecimal.
bool is_sha256(const std::string& text);

}  // namespace sam3rt
