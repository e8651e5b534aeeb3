#include "engines.hpp"

#include <algorithm>
#include <optional>
#include <system_error>
#include <vector>

#include "bundle.hpp"
#include "json_reader.hpp"

namespace fs = std::filesystem;

namespace sam3rt {
namespace {

constexpr std::uint64_t max_sidecar_bytes = std::uint64_t{1} << 20;

/// What the choice depends on, of an engine and its sidecar.
struct Engine {
    fs::path folder;
    FileEntry file;
    std::string role;
    std::string backend;
    std::string fingerprint;
    std::optional<Gpu> gpu;
    std::string features_dtype;
    std::string state;
    std::string paired_with;

    fs::path path() const { return folder / file.file; }
    fs::path wrapper() const { return folder / (role + "_ctx.onnx"); }
};

struct Pair {
    Engine encoder;
    Engine decoder;
};

Engine read_sidecar(const fs::path& folder, const std::string& role) {
    const std::string engine_name = role + ".engine";
    const std::string name = engine_name + ".json";
    Bytes raw;
    try {
        raw = read_file(folder / name, max_sidecar_bytes);
    } catch (const std::system_error& error) {
        throw BundleError(std::string("cannot be read: ") + error.what(), name);
    }
    const JsonDocument document(raw.data(), raw.size(), name);
    const JsonValue root = document.root();
    static const std::vector<std::string> fields = {
        "format",      "format_version",     "role",           "backend", "engine",
        "targets",     "bundle_fingerprint", "driver_version", "gpu",     "tensorrt_version",
        "recipe",      "features_dtype",     "shapes",         "state",   "parity",
        "paired_with", "build_seconds"};
    root.check_fields(fields);
    for (const std::string& field : fields) {
        root.field(field);
    }
    if (root.field("format").text() != "sam3rt-engine") {
        throw BundleError("\"format\" is not \"sam3rt-engine\"", name);
    }
    if (root.field("format_version").whole_number() != 1) {
        throw BundleError("is of a newer format: update sam3rt or build the engine again", name);
    }
    static const std::vector<std::string> backends = {"tensorrt", "tensorrt-rtx"};
    static const std::vector<std::string> types = {"float32", "float16"};
    static const std::vector<std::string> states = {"proven", "unproven", "refused"};
    const JsonValue file = root.field("engine");
    file.check_fields({"file", "sha256", "bytes"});
    const std::int64_t bytes = file.field("bytes").whole_number();
    Engine engine;
    engine.folder = folder;
    engine.file = {file.field("file").text(), file.field("sha256").text(),
                   static_cast<std::uint64_t>(bytes)};
    engine.role = root.field("role").text();
    engine.backend = backends[root.field("backend").one_of(backends)];
    engine.fingerprint = root.field("bundle_fingerprint").text();
    if (!root.field("gpu").is_null()) {
        const JsonValue gpu = root.field("gpu");
        gpu.check_fields({"name", "compute_capability"});
        engine.gpu = Gpu{gpu.field("name").text(), gpu.field("compute_capability").text()};
    }
    engine.features_dtype = types[root.field("features_dtype").one_of(types)];
    engine.state = states[root.field("state").one_of(states)];
    if (!root.field("paired_with").is_null()) {
        engine.paired_with = root.field("paired_with").text();
    }
    if (engine.role != role || engine.file.file != engine_name || bytes < 1 ||
        !is_sha256(engine.file.sha256) || !is_sha256(engine.fingerprint)) {
        throw BundleError("does not describe " + engine_name, name);
    }
    return engine;
}

/// Whether an engine's sidecar lies in the bundle, links followed; its other files are checked
/// against its folder where they are used.
bool is_in_bundle(const fs::path& bundle, const fs::path& folder, const std::string& role) {
    try {
        return is_inside(folder / (role + ".engine.json"), bundle);
    } catch (const std::system_error&) {
        return false;
    }
}

/// Every engine of a role whose sidecar can be read. About any other nothing is known. What lies
/// elsewhere, behind a link, is passed over, and so is a build's own folder, whose name begins
/// with a dot and in which nothing is finished.
std::vector<Engine> find_engines(const fs::path& bundle, const std::string& role) {
    std::vector<fs::path> folders;
    std::error_code no_folder;
    for (const auto& entry : fs::directory_iterator(bundle / "engines", no_folder)) {
        folders.push_back(entry.path());
    }
    std::sort(folders.begin(), folders.end());
    std::vector<Engine> engines;
    for (const fs::path& folder : folders) {
        if (folder.filename().string().front() == '.' || !is_in_bundle(bundle, folder, role)) {
            continue;
        }
        try {
            engines.push_back(read_sidecar(folder, role));
        } catch (const BundleError&) {
            continue;
        }
    }
    return engines;
}

bool is_in(const Engine& engine, const fs::path& folder) {
    std::error_code missing;
    return fs::equivalent(engine.folder, folder, missing);
}

/// The pairs of which an engine lies in the folder, or, if there are any, of which both do.
std::vector<Pair> in_folder(const std::vector<Pair>& pairs, const fs::path& folder) {
    std::vector<Pair> both;
    std::vector<Pair> either;
    for (const Pair& pair : pairs) {
        const bool encoder = is_in(pair.encoder, folder);
        const bool decoder = is_in(pair.decoder, folder);
        if (encoder && decoder) {
            both.push_back(pair);
        }
        if (encoder || decoder) {
            either.push_back(pair);
        }
    }
    return both.empty() ? either : both;
}

std::string name_of(const Pair& pair) {
    const std::string encoder = pair.encoder.folder.filename().string();
    const std::string decoder = pair.decoder.folder.filename().string();
    return encoder == decoder ? encoder : encoder + " with the decoder of " + decoder;
}

std::string names_of(const std::vector<Pair>& pairs) {
    std::string text;
    for (const Pair& pair : pairs) {
        text += (text.empty() ? "" : ", ") + name_of(pair);
    }
    return text;
}

[[noreturn]] void refuse(const Bundle& bundle, const std::string& backend, const Gpu& gpu,
                         bool unproven) {
    const std::string path = bundle.path.string();
    if (unproven) {
        throw BackendError(
            "the " + backend + " engines of " + path +
            " for this GPU have not passed the gate here; prove them: sam3rt verify " + path +
            " --backend " + backend);
    }
    throw BackendError(path + " has no " + backend + " engines of this bundle for " + gpu.name +
                       " (compute capability " + gpu.compute_capability +
                       "); build them on this machine: sam3rt build " + path + " --backend " +
                       backend);
}

/// Refuse an engine or a wrapper that is not the file it should be.
void check(const Engine& engine) {
    check_file(engine.folder, engine.file);
    const fs::path wrapper = engine.wrapper();
    std::error_code ignored;
    if (fs::is_symlink(wrapper, ignored) || !fs::is_regular_file(wrapper, ignored)) {
        throw BundleError("is missing from " + engine.folder.string() +
                              ": build the engine again, so that ONNX Runtime can load it",
                          wrapper.filename().string());
    }
}

}  // namespace

EngineSet choose_engines(const Bundle& bundle, const std::string& backend, const Gpu& gpu,
                         const fs::path& engine_folder) {
    const auto usable = [&](const std::string& role) {
        std::vector<Engine> engines = find_engines(bundle.path, role);
        engines.erase(std::remove_if(engines.begin(), engines.end(),
                                     [&](const Engine& engine) {
                                         return engine.backend != backend ||
                                                engine.fingerprint != bundle.manifest.fingerprint;
                                     }),
                      engines.end());
        return engines;
    };
    const std::vector<Engine> encoders = usable("encoder");
    const std::vector<Engine> decoders = usable("decoder");
    const auto proven = [&gpu](const Engine& engine) {
        return engine.state == "proven" && engine.gpu && *engine.gpu == gpu;
    };
    std::vector<Pair> pairs;
    for (const Engine& encoder : encoders) {
        for (const Engine& decoder : decoders) {
            if (proven(encoder) && proven(decoder) && decoder.paired_with == encoder.file.sha256 &&
                decoder.features_dtype == encoder.features_dtype) {
                pairs.push_back({encoder, decoder});
            }
        }
    }
    if (pairs.empty()) {
        const auto may_be_proven = [&gpu](const Engine& engine) {
            return engine.state != "refused" && (!engine.gpu || *engine.gpu == gpu);
        };
        refuse(bundle, backend, gpu,
               std::any_of(encoders.begin(), encoders.end(), may_be_proven) &&
                   std::any_of(decoders.begin(), decoders.end(), may_be_proven));
    }
    std::vector<Pair> chosen = pairs;
    if (!engine_folder.empty()) {
        const fs::path below = bundle.path / "engines" / engine_folder;
        std::error_code ignored;
        chosen = in_folder(pairs, fs::exists(below, ignored) ? below : engine_folder);
        if (chosen.empty()) {
            throw BackendError("engine_folder " + engine_folder.string() +
                               " holds none of the engines that fit: " + names_of(pairs));
        }
    }
    if (chosen.size() > 1) {
        throw BackendError("several " + backend + " engines of " + bundle.path.string() +
                           " fit; choose by engine_folder: " + names_of(chosen));
    }
    check(chosen[0].encoder);
    check(chosen[0].decoder);
    return {chosen[0].encoder.wrapper(), chosen[0].decoder.wrapper(),
            chosen[0].encoder.features_dtype};
}

}  // namespace sam3rt
