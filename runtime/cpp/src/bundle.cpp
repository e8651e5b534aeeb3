#include "bundle.hpp"

#include <algorithm>
#include <set>
#include <system_error>

#include "json_reader.hpp"
#include "sha256.hpp"

namespace fs = std::filesystem;

namespace sam3rt {
namespace {

const std::string manifest_name = "bundle.json";
const std::string object_score = "object_score_logits";
const std::string format_name = "sam3rt-bundle";
constexpr std::int64_t format_version = 1;
// A manifest lists two graphs and their tensors; anything near this size is not one of ours.
constexpr std::uint64_t max_manifest_bytes = std::uint64_t{1} << 20;

[[noreturn]] void refuse(const std::string& message) { throw BundleError(message, manifest_name); }

TensorSpec read_tensor(const JsonValue& value) {
    static const std::vector<std::string> types = {"float32", "float16", "int64", "int32", "bool"};
    value.check_fields({"name", "dtype", "shape"});
    TensorSpec spec;
    spec.name = value.field("name").text();
    spec.dtype = types[value.field("dtype").one_of(types)];
    for (const JsonValue& side : value.field("shape").list()) {
        if (side.is_text()) {
            spec.shape.emplace_back(side.text());
        } else {
            spec.shape.emplace_back(side.whole_number());
        }
    }
    return spec;
}

std::vector<TensorSpec> read_tensors(const JsonValue& value) {
    std::vector<TensorSpec> specs;
    for (const JsonValue& entry : value.list()) {
        specs.push_back(read_tensor(entry));
    }
    return specs;
}

GraphSpec read_graph(const JsonValue& value) {
    value.check_fields({"model", "external_data", "opset", "nodes", "inputs", "outputs"});
    GraphSpec spec;
    spec.model = read_file_entry(value.field("model"));
    for (const JsonValue& entry : value.field("external_data").list()) {
        spec.external_data.push_back(read_file_entry(entry));
    }
    spec.opset = value.field("opset").whole_number();
    spec.nodes = value.field("nodes").whole_number();
    spec.inputs = read_tensors(value.field("inputs"));
    spec.outputs = read_tensors(value.field("outputs"));
    return spec;
}

Size read_size(const JsonValue& value) {
    const std::vector<JsonValue> sides = value.list(2);
    return {sides[0].whole_number(), sides[1].whole_number()};
}

void read_channels(const JsonValue& value, float (&channels)[3]) {
    const std::vector<JsonValue> entries = value.list(3);
    for (std::size_t i = 0; i < 3; ++i) {
        channels[i] = static_cast<float>(entries[i].number());
    }
}

ImageSpec read_image(const JsonValue& value) {
    value.check_fields({"size", "resize", "resize_dtype", "mean", "std", "pad_value"});
    ImageSpec spec;
    spec.size = read_size(value.field("size"));
    spec.resize = value.field("resize").one_of({"stretch", "longest_side"}) == 0
                      ? ImageSpec::Resize::stretch
                      : ImageSpec::Resize::longest_side;
    spec.resize_dtype = value.field("resize_dtype").one_of({"float32", "uint8"}) == 0
                            ? ImageSpec::Rounding::float32
                            : ImageSpec::Rounding::uint8;
    read_channels(value.field("mean"), spec.mean);
    read_channels(value.field("std"), spec.std);
    if (value.has("pad_value")) {
        spec.pad_value = static_cast<float>(value.field("pad_value").number());
    }
    return spec;
}

PromptSpec read_prompts(const JsonValue& value) {
    value.check_fields({"box_position", "padding_point", "mask_size"});
    PromptSpec spec;
    spec.box_position = value.field("box_position").one_of({"before_points", "after_points"}) == 0
                            ? PromptSpec::BoxPosition::before_points
                            : PromptSpec::BoxPosition::after_points;
    spec.padding_point = value.field("padding_point").one_of({"always", "without_box"}) == 0
                             ? PromptSpec::PaddingPoint::always
                             : PromptSpec::PaddingPoint::without_box;
    spec.mask_size = read_size(value.field("mask_size"));
    return spec;
}

MaskSpec read_masks(const JsonValue& value) {
    value.check_fields(
        {"multimask", "low_res_size", "low_res_limit", "upsampling", "max_hole_area"});
    MaskSpec spec;
    spec.multimask = value.field("multimask").whole_number();
    spec.low_res_size = read_size(value.field("low_res_size"));
    const JsonValue limit = value.field("low_res_limit");
    if (!limit.is_null()) {
        spec.low_res_limit = static_cast<float>(limit.number());
    }
    spec.upsampling = value.field("upsampling").one_of({"direct", "unpad"}) == 0
                          ? MaskSpec::Upsampling::direct
                          : MaskSpec::Upsampling::unpad;
    spec.max_hole_area = value.field("max_hole_area").number();
    return spec;
}

SourceSpec read_source(const JsonValue& value) {
    value.check_fields({"kind", "reference", "sha256", "license", "license_file", "weights",
                        "notes"});
    SourceSpec spec;
    spec.kind = value.field("kind").text();
    spec.reference = value.field("reference").text();
    spec.sha256 = value.field("sha256").text();
    spec.license = value.field("license").text();
    if (value.has("license_file") && !value.field("license_file").is_null()) {
        spec.license_file = read_file_entry(value.field("license_file"));
    }
    if (value.has("weights")) {
        spec.weights = value.field("weights").text();
    }
    if (value.has("notes")) {
        for (const JsonValue& note : value.field("notes").list()) {
            spec.notes.push_back(note.text());
        }
    }
    return spec;
}

ParityLimits read_limits(const JsonValue& value) {
    value.check_fields({"feature_error", "feature_cosine", "logit_error", "iou_error", "mask_iou"});
    ParityLimits limits;
    for (const NamedLimit& limit : named_limits) {
        limits.*limit.value = value.field(limit.name).number();
    }
    return limits;
}

Manifest read_manifest(const JsonValue& value) {
    value.check_fields({"format", "format_version", "fingerprint", "export_id", "name",
                        "model_type", "weights", "source", "image", "prompts", "masks", "encoder",
                        "decoder", "parity", "producer"});
    static const std::vector<std::string> families = {"sam3", "efficient_sam3", "sam2",
                                                      "mobile_sam"};
    static const std::vector<std::string> types = {"float32", "float16"};
    Manifest manifest;
    manifest.fingerprint = value.field("fingerprint").text();
    manifest.export_id = value.field("export_id").text();
    manifest.name = value.field("name").text();
    manifest.model_type = families[value.field("model_type").one_of(families)];
    manifest.weights = types[value.field("weights").one_of(types)];
    manifest.source = read_source(value.field("source"));
    manifest.image = read_image(value.field("image"));
    manifest.prompts = read_prompts(value.field("prompts"));
    manifest.masks = read_masks(value.field("masks"));
    manifest.encoder = read_graph(value.field("encoder"));
    manifest.decoder = read_graph(value.field("decoder"));
    const JsonValue parity = value.field("parity");
    parity.check_fields({"record", "limits"});
    manifest.parity_record = read_file_entry(parity.field("record"));
    manifest.parity_limits = read_limits(parity.field("limits"));
    if (value.has("producer")) {
        for (const auto& [name, text] : value.field("producer").fields()) {
            manifest.producer[name] = text.text();
        }
    }
    return manifest;
}

bool in_range(const Size& size) {
    return size.height >= 1 && size.height <= max_image_side && size.width >= 1 &&
           size.width <= max_image_side;
}

std::vector<FileEntry> files_of(const GraphSpec& graph) {
    std::vector<FileEntry> files = {graph.model};
    files.insert(files.end(), graph.external_data.begin(), graph.external_data.end());
    return files;
}

void require_sha256(const std::string& name, const std::string& digest) {
    if (!is_sha256(digest)) {
        refuse("\"" + name + "\" is not a SHA-256");
    }
}

/// ASCII letters in lower case.
std::string lower_case(std::string text) {
    for (char& c : text) {
        if (c >= 'A' && c <= 'Z') {
            c = static_cast<char>(c - 'A' + 'a');
        }
    }
    return text;
}

/// Whether Windows takes a file's name for one of its devices, which stay devices with any ending.
bool is_device_name(const std::string& name) {
    const std::string stem = lower_case(name.substr(0, name.find('.')));
    if (stem == "con" || stem == "prn" || stem == "aux" || stem == "nul") {
        return true;
    }
    const std::string start = stem.substr(0, 3);
    return stem.size() == 4 && (start == "com" || start == "lpt") && stem[3] >= '0' &&
           stem[3] <= '9';
}

/// What the types alone do not say.
void check_rules(const Manifest& manifest) {
    require_sha256("fingerprint", manifest.fingerprint);
    require_sha256("export_id", manifest.export_id);
    std::set<std::string> names;
    const std::vector<FileEntry> files = manifest.files();
    for (const FileEntry& entry : files) {
        require_sha256("sha256 of " + entry.file, entry.sha256);
        if (!is_safe_name(entry.file) || lower_case(entry.file) == manifest_name) {
            refuse("file name " + json_text(entry.file) + " is not allowed in a bundle");
        }
        // Windows and macOS take names that differ in case only for the same file.
        names.insert(lower_case(entry.file));
    }
    if (names.size() != files.size()) {
        refuse("lists one file twice");
    }
    if (!in_range(manifest.image.size) || !in_range(manifest.prompts.mask_size) ||
        !in_range(manifest.masks.low_res_size)) {
        refuse("has an image or mask size outside 1..65536");
    }
    if (std::any_of(std::begin(manifest.image.std), std::end(manifest.image.std),
                    [](float value) { return !(value > 0); })) {
        refuse("has a standard deviation that is not positive");
    }
    if (manifest.masks.multimask < 1) {
        refuse("\"masks.multimask\" is not positive");
    }
    if (manifest.masks.max_hole_area < 0) {
        refuse("\"masks.max_hole_area\" is negative");
    }
    if (manifest.image.resize == ImageSpec::Resize::longest_side &&
        manifest.image.size.height != manifest.image.size.width) {
        refuse("resizes by the longest side to an input that is not square");
    }
    if (manifest.encoder.inputs.size() != 1 || manifest.encoder.outputs.empty()) {
        refuse("has an encoder that does not make feature maps of one input");
    }
    for (const TensorSpec& spec : manifest.encoder.outputs) {
        if (spec.shape.size() != 4 ||
            !std::all_of(spec.shape.begin() + 1, spec.shape.end(), [](const Axis& axis) {
                const auto* side = std::get_if<std::int64_t>(&axis);
                return side != nullptr && *side >= 1 && *side <= max_image_side;
            })) {
            refuse("feature map '" + spec.name + "' is not [B, C, h, w]");
        }
    }
    if (manifest.masks.low_res_limit && !(*manifest.masks.low_res_limit > 0)) {
        refuse("\"masks.low_res_limit\" is not positive");
    }
    for (const NamedLimit& limit : named_limits) {
        const double value = manifest.parity_limits.*limit.value;
        const double loosest = loosest_limits.*limit.value;
        if (limit.at_least ? value < loosest : value > loosest) {
            refuse("\"parity.limits." + std::string(limit.name) + "\" is " +
                   std::to_string(value) + ", wider than " + std::to_string(loosest));
        }
    }
}

void check_size(std::uint64_t length, const FileEntry& entry) {
    if (length != entry.bytes) {
        throw BundleError("has " + std::to_string(length) + " bytes, the manifest says " +
                              std::to_string(entry.bytes) +
                              ": the file is cut or from another export",
                          entry.file);
    }
}

void check_digest(const std::string& digest, const FileEntry& entry) {
    if (digest != entry.sha256) {
        throw BundleError("has SHA-256 " + digest.substr(0, 16) + "..., the manifest says " +
                              entry.sha256.substr(0, 16) +
                              "...: the file was changed or is from another export",
                          entry.file);
    }
}

/// Whether a file of a hub's snapshot lies among the blobs of the same repository.
/// `huggingface_hub` keeps models--X/snapshots/REVISION/FILE as links to models--X/blobs/HASH.
bool is_blob(const fs::path& path, const fs::path& folder) {
    const fs::path target = fs::weakly_canonical(path);
    for (fs::path parent = fs::canonical(folder).parent_path(); parent.has_relative_path();
         parent = parent.parent_path()) {
        if (parent.filename() == "snapshots") {
            return target.parent_path() == parent.parent_path() / "blobs";
        }
    }
    return false;
}

/// A bundle whose files are those that its manifest lists, where that is asked for.
Bundle checked(Bundle bundle, bool check_files) {
    for (const FileEntry& entry : bundle.manifest.files()) {
        if (check_files && bundle.memory == nullptr) {
            check_file(bundle.path, entry);
        } else if (check_files) {
            read_checked(bundle, entry);
        }
    }
    return bundle;
}

/// The SHA-256 of a manifest's bytes with the digits of its fingerprint zeroed.
std::string fingerprint_of(Bytes raw, const std::string& current) {
    const auto found = std::search(raw.begin(), raw.end(), current.begin(), current.end());
    if (found != raw.end()) {
        std::fill_n(found, current.size(), static_cast<std::uint8_t>('0'));
    }
    return sha256_hex(raw.data(), raw.size());
}

}  // namespace

Bytes read_or_refuse(const fs::path& path, std::uint64_t limit, const std::string& name,
                     Links links, const std::string& advice) {
    try {
        return read_file(path, limit, links);
    } catch (const std::system_error& error) {
        throw BundleError(std::string("cannot be read: ") + error.what() + advice, name);
    }
}

bool is_inside(const fs::path& path, const fs::path& folder) {
    const fs::path target = fs::weakly_canonical(path);
    const fs::path base = fs::canonical(folder);
    return std::mismatch(base.begin(), base.end(), target.begin(), target.end()).first ==
           base.end();
}

bool has_object_score(const Manifest& manifest) {
    const auto& outputs = manifest.decoder.outputs;
    return std::any_of(outputs.begin(), outputs.end(),
                       [](const TensorSpec& spec) { return spec.name == object_score; });
}

const std::vector<std::string>& decoder_outputs(const Manifest& manifest, bool multimask) {
    // By whether there are scores of objects. Every call asks: it allocates nothing.
    static const std::array<std::vector<std::string>, 2> multi = {
        {{"pred_masks", "iou_scores"}, {"pred_masks", "iou_scores", object_score}}};
    static const std::array<std::vector<std::string>, 2> single = {
        {{"single_pred_masks", "single_iou_scores"},
         {"single_pred_masks", "single_iou_scores", object_score}}};
    return (multimask ? multi : single)[has_object_score(manifest) ? 1 : 0];
}

std::vector<FileEntry> Manifest::files() const {
    std::vector<FileEntry> entries;
    for (const GraphSpec* graph : {&encoder, &decoder}) {
        const std::vector<FileEntry> files = files_of(*graph);
        entries.insert(entries.end(), files.begin(), files.end());
    }
    entries.push_back(parity_record);
    if (source.license_file) {
        entries.push_back(*source.license_file);
    }
    return entries;
}

bool is_safe_name(const std::string& name) {
    const auto is_alphanumeric = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    };
    return !name.empty() && name.size() <= 128 && is_alphanumeric(name[0]) &&
           name.back() != '.' && !is_device_name(name) &&
           std::all_of(name.begin(), name.end(), [&](char c) {
               return is_alphanumeric(c) || c == '.' || c == '_' || c == '-';
           });
}

bool is_sha256(const std::string& text) {
    return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
               return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
           });
}

FileEntry read_file_entry(const JsonValue& value) {
    value.check_fields({"file", "sha256", "bytes"});
    const std::int64_t bytes = value.field("bytes").whole_number();
    if (bytes < 0) {
        value.field("bytes").refuse("a number of bytes");
    }
    return {value.field("file").text(), value.field("sha256").text(),
            static_cast<std::uint64_t>(bytes)};
}

Manifest parse_manifest(const Bytes& raw) {
    const JsonDocument document(raw.data(), raw.size(), manifest_name);
    const JsonValue root = document.root();
    if (!root.has("format") || !root.field("format").is_text() ||
        root.field("format").text() != format_name) {
        refuse("\"format\" is not \"" + format_name + "\"");
    }
    const std::int64_t version = root.field("format_version").whole_number();
    if (version < 1) {
        refuse("\"format_version\" is " + std::to_string(version) + ", expected a whole number");
    }
    if (version > format_version) {
        refuse("has format version " + std::to_string(version) + "; this sam3rt reads up to " +
               std::to_string(format_version) + ": update sam3rt or export the model again");
    }
    Manifest manifest = read_manifest(root);
    check_rules(manifest);
    if (fingerprint_of(raw, manifest.fingerprint) != manifest.fingerprint) {
        refuse("does not match its fingerprint " + manifest.fingerprint.substr(0, 16) +
               "...: it was edited or cut");
    }
    return manifest;
}

void check_file(const fs::path& folder, const FileEntry& entry) {
    check_length(folder, entry);
    std::string digest;
    try {
        digest = sha256_file(folder / entry.file);
    } catch (const std::system_error& error) {
        throw BundleError(std::string("cannot be read: ") + error.what(), entry.file);
    }
    check_digest(digest, entry);
}

Bytes read_checked(const fs::path& folder, const FileEntry& entry) {
    check_length(folder, entry);
    Bytes content = read_or_refuse(folder / entry.file, entry.bytes, entry.file);
    check_digest(sha256_hex(content.data(), content.size()), entry);
    return content;
}

Content read_checked(const Bundle& bundle, const FileEntry& entry) {
    if (bundle.memory == nullptr) {
        return Content(read_checked(bundle.path, entry));
    }
    Content content = bundle.memory->find(entry.file);
    check_size(content.bytes().size(), entry);
    check_digest(sha256_hex(content.bytes().data(), content.bytes().size()), entry);
    return content;
}

void check_length(const fs::path& folder, const FileEntry& entry) {
    const fs::path path = folder / entry.file;
    try {
        if (fs::is_symlink(path) && !is_inside(path, folder) && !is_blob(path, folder)) {
            throw BundleError(
                "is a link that leaves the bundle; copy the bundle with the files in place of "
                "their links: cp -rL " +
                    folder.string() + " COPY",
                entry.file);
        }
        if (!fs::is_regular_file(path)) {
            throw BundleError("is missing from the bundle " + folder.string(), entry.file);
        }
        check_size(fs::file_size(path), entry);
    } catch (const std::system_error& error) {
        throw BundleError(std::string("cannot be read: ") + error.what(), entry.file);
    }
}

Bundle open_bundle(const fs::path& folder, bool check_files) {
    std::error_code ignored;
    if (!fs::is_directory(folder, ignored)) {
        throw BundleError("no bundle folder at " + folder.string());
    }
    const fs::path path = folder / manifest_name;
    Bytes raw;
    try {
        if (!fs::is_regular_file(path)) {
            refuse("is missing from " + folder.string() + ": not a sam3rt bundle");
        }
        if (fs::file_size(path) > max_manifest_bytes) {
            refuse("is larger than " + std::to_string(max_manifest_bytes) + " bytes");
        }
        raw = read_file(path, max_manifest_bytes);
    } catch (const std::system_error& error) {
        refuse(std::string("cannot be read: ") + error.what());
    }
    std::error_code no_current_folder;
    // Files are opened later too, when the process may have another current folder.
    const fs::path absolute = fs::absolute(folder, no_current_folder);
    if (no_current_folder) {
        throw BundleError("no bundle folder at " + folder.string() +
                          ": the current folder cannot be read");
    }
    return checked({absolute, parse_manifest(raw), std::string(raw.begin(), raw.end()), nullptr},
                   check_files);
}

Bundle open_bundle(const std::vector<BundleFile>& files, bool check_files) {
    auto memory = std::make_shared<MemoryFiles>(files);
    const Content content = memory->find(manifest_name);
    if (content.bytes().size() > max_manifest_bytes) {
        refuse("is larger than " + std::to_string(max_manifest_bytes) + " bytes");
    }
    const Bytes raw(content.bytes().begin(), content.bytes().end());
    Bundle bundle = checked(
        {{}, parse_manifest(raw), std::string(raw.begin(), raw.end()), memory}, check_files);
    memory->keep_what_is_needed(bundle.manifest);
    return bundle;
}

MemoryFiles::MemoryFiles(const std::vector<BundleFile>& files) {
    for (const BundleFile& file : files) {
        if (file.content == nullptr && file.size != 0) {
            throw InvalidInputError("files", "NULL for " + file.name, "its content");
        }
        if (!files_.emplace(file.name, file).second) {
            throw InvalidInputError("files", file.name + " twice", "every file once");
        }
    }
}

Content MemoryFiles::find(const std::string& name) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = files_.find(name);
    if (found == files_.end()) {
        throw BundleError("is missing from the bundle's files", name);
    }
    const BundleFile& file = found->second;
    return {{static_cast<const std::uint8_t*>(file.content), file.size}, file.owner};
}

void MemoryFiles::keep_what_is_needed(const Manifest& manifest) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::map<std::string, BundleFile> kept;
    for (const GraphSpec* graph : {&manifest.encoder, &manifest.decoder}) {
        for (const FileEntry& entry : files_of(*graph)) {
            kept.insert(files_.extract(entry.file));
        }
    }
    const FileEntry& record = manifest.parity_record;
    const auto found = files_.find(record.file);
    // One of another length would be refused when it is read: it may as well be missing.
    if (found != files_.end() && found->second.size == record.bytes) {
        BundleFile& file = found->second;
        const auto* bytes = static_cast<const std::uint8_t*>(file.content);
        const auto copy = std::make_shared<const Bytes>(bytes, bytes + file.size);
        kept.insert({record.file, {record.file, copy->data(), copy->size(), copy}});
    }
    files_.swap(kept);
}

void MemoryFiles::release(const GraphSpec& graph) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const FileEntry& entry : files_of(graph)) {
        files_.erase(entry.file);
    }
}

}  // namespace sam3rt
