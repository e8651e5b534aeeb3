// Bundles: a folder with two ONNX graphs and everything a consumer must know about them.
#pragma once

#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

class JsonValue;

/// The content of a file: read into memory of its own, or lent by the caller.
class Content {
public:
    explicit Content(Bytes own) : own_(std::move(own)), bytes_(own_) {}
    Content(ByteView lent, std::shared_ptr<const void> owner)
        : owner_(std::move(owner)), bytes_(lent) {}
    // A copy's bytes would be those of the first.
    Content(const Content&) = delete;
    Content& operator=(const Content&) = delete;
    Content(Content&&) = default;
    Content& operator=(Content&&) = default;
    ~Content() = default;

    ByteView bytes() const { return bytes_; }

private:
    Bytes own_;
    std::shared_ptr<const void> owner_;
    ByteView bytes_;
};

/// The files of a bundle that callers gave in memory. Every method may be called from many threads
/// at once.
class MemoryFiles {
public:
    /// Throws InvalidInputError where a file comes twice, or has no content.
    explicit MemoryFiles(const std::vector<BundleFile>& files);

    /// The content of a file, where it is. Throws BundleError where there is no such file.
    Content find(const std::string& name) const;

    /// Keep a copy of the parity record, which is small, and let go of all but the graphs' files.
    void keep_what_is_needed(const Manifest& manifest);

    /// Let go of the files of a graph, which has been loaded.
    void release(const GraphSpec& graph);

private:
    mutable std::mutex mutex_;
    std::map<std::string, BundleFile> files_;
};

/// A bundle whose manifest has been read and checked.
struct Bundle {
    /// Its folder as an absolute path; empty for one in memory.
    std::filesystem::path path;
    Manifest manifest;
    /// The content of bundle.json.
    std::string text;
    /// Null for one in a folder.
    std::shared_ptr<MemoryFiles> memory;
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
const std::vector<std::string>& decoder_outputs(const Manifest& manifest, bool multimask);

/// Read a bundle's manifest and check it against itself and, if asked to, its files.
/// Throws BundleError, naming the file at fault.
Bundle open_bundle(const std::filesystem::path& folder, bool check_files);

/// The same for a bundle in memory. Throws InvalidInputError as MemoryFiles does, too.
Bundle open_bundle(const std::vector<BundleFile>& files, bool check_files);

/// A file as documents list it. Throws BundleError, naming the document.
FileEntry read_file_entry(const JsonValue& value);

/// Parse and validate the content of bundle.json. Throws BundleError.
Manifest parse_manifest(const Bytes& raw);

/// The content of a plain file of at most `limit` bytes, called `name` in errors. Throws BundleError
/// where it cannot be read, with `advice` at the end.
Bytes read_or_refuse(const std::filesystem::path& path, std::uint64_t limit, const std::string& name,
                     Links links = Links::follow, const std::string& advice = "");

/// Refuse a file that is missing, not a plain file, a link that leaves the folder, or of another
/// length or hash than its entry says. Throws BundleError.
void check_file(const std::filesystem::path& folder, const FileEntry& entry);

/// The content of a file that check_file would accept. What is checked is what was read, whatever
/// happens to the file meanwhile. Throws BundleError.
Bytes read_checked(const std::filesystem::path& folder, const FileEntry& entry);

/// The same for a file of a bundle, wherever that is. One in memory is hashed and not copied.
Content read_checked(const Bundle& bundle, const FileEntry& entry);

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
