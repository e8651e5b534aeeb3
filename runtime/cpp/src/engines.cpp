#include "engines.hpp"

#include <algorithm>
#include <optional>
#include <set>
#include <sstream>
#include <system_error>
#include <vector>

#include "bundle.hpp"
#include "json_reader.hpp"
#include "log.hpp"
#include "onnx_locations.hpp"
#include "verdicts.hpp"

namespace fs = std::filesystem;

namespace sam3rt {
namespace {

constexpr std::uint64_t max_sidecar_bytes = std::uint64_t{1} << 20;
constexpr std::uint64_t max_wrapper_bytes = std::uint64_t{1} << 20;

/// What the choice depends on, of an engine and its sidecar.
struct Engine {
    fs::path folder;
    FileEntry file;
    std::string role;
    std::string backend;
    std::string fingerprint;
    std::optional<Gpu> gpu;
    std::string recipe;
    std::string tensorrt_version;
    std::string driver_version;
    std::vector<std::string> targets;
    std::string features_dtype;
    std::string state;

    fs::path wrapper() const { return folder / (role + "_ctx.onnx"); }
};

struct Pair {
    Engine encoder;
    Engine decoder;

    std::string precision() const {
        return encoder.recipe == decoder.recipe ? encoder.recipe
                                                : encoder.recipe + "+" + decoder.recipe;
    }
};

Engine read_sidecar(const fs::path& folder, const std::string& role) {
    const std::string engine_name = role + ".engine";
    const std::string name = engine_name + ".json";
    const Bytes raw = read_or_refuse(folder / name, max_sidecar_bytes, name);
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
    Engine engine;
    engine.folder = folder;
    engine.file = read_file_entry(root.field("engine"));
    engine.role = root.field("role").text();
    engine.backend = backends[root.field("backend").one_of(backends)];
    engine.fingerprint = root.field("bundle_fingerprint").text();
    if (!root.field("gpu").is_null()) {
        const JsonValue gpu = root.field("gpu");
        gpu.check_fields({"name", "compute_capability"});
        engine.gpu = Gpu{gpu.field("name").text(), gpu.field("compute_capability").text()};
    }
    engine.features_dtype = types[root.field("features_dtype").one_of(types)];
    engine.recipe = root.field("recipe").text();
    engine.tensorrt_version = root.field("tensorrt_version").text();
    if (!root.field("driver_version").is_null()) {
        engine.driver_version = root.field("driver_version").text();
    }
    for (const JsonValue& capability : root.field("targets").list()) {
        engine.targets.push_back(capability.text());
    }
    engine.state = states[root.field("state").one_of(states)];
    if (engine.role != role || engine.file.file != engine_name || engine.file.bytes == 0 ||
        !is_sha256(engine.file.sha256) || !is_sha256(engine.fingerprint) ||
        !is_safe_name(engine.recipe) || !is_safe_name(engine.tensorrt_version)) {
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
/// with a dot and in which nothing is finished. A bundle in memory, whose folder is empty, has none.
std::vector<Engine> find_engines(const fs::path& bundle, const std::string& role) {
    if (bundle.empty()) {
        return {};
    }
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

/// The recipes from the fastest on. One that is not listed, as engines of older builds have, comes
/// last.
std::size_t rank(const Engine& engine) {
    static const std::vector<std::string> order = {"fp16", "fp16-activations",
                                                   "fp16-attention-tf32", "tf32", "fp32"};
    return static_cast<std::size_t>(std::find(order.begin(), order.end(), engine.recipe) -
                                    order.begin());
}

/// Whether an engine is for a version of TensorRT, or none is asked for. Some releases of TensorRT
/// for Python leave the fourth number out; TensorRT itself refuses what differs in it alone.
bool is_of(const Engine& engine, const std::string& version) {
    const auto numbers = [](const std::string& text) {
        std::vector<std::string> parts;
        std::istringstream stream(text);
        for (std::string part; std::getline(stream, part, '.') && parts.size() < 3;) {
            parts.push_back(part);
        }
        return parts;
    };
    return version.empty() || numbers(engine.tensorrt_version) == numbers(version);
}

/// What an engine has to fit.
struct Target {
    const Bundle& bundle;
    std::string backend;
    Machine machine;
    /// Of the TensorRT that loads engines itself, or empty.
    std::string version;

    bool takes(const Engine& engine) const {
        const std::string& capability = machine.gpu.compute_capability;
        const auto& targets = engine.targets;
        const bool fits_gpu = targets.empty() ? engine.gpu == machine.gpu
                                              : std::find(targets.begin(), targets.end(),
                                                          capability) != targets.end();
        const bool failed_here = engine.state == "refused" && engine.gpu == machine.gpu &&
                                 engine.driver_version == machine.driver_version;
        return engine.backend == backend && fits_gpu && !failed_here && is_of(engine, version) &&
               engine.fingerprint == bundle.manifest.fingerprint;
    }

    /// The engines of a role that fit, the fastest first.
    std::vector<Engine> fitting(const std::string& role) const {
        std::vector<Engine> engines = find_engines(bundle.path, role);
        engines.erase(std::remove_if(engines.begin(), engines.end(),
                                     [this](const Engine& engine) { return !takes(engine); }),
                      engines.end());
        std::stable_sort(engines.begin(), engines.end(),
                         [](const Engine& a, const Engine& b) { return rank(a) < rank(b); });
        return engines;
    }

    /// What a verdict on a pair is about. TensorRT itself refuses engines of another version than
    /// its own, so the sidecars' word for the version is enough.
    VerdictSubject subject_of(const Pair& pair) const {
        return {bundle.manifest.fingerprint,
                backend,
                pair.encoder.tensorrt_version,
                machine.gpu.name + ", " + machine.gpu.compute_capability + ", driver " +
                    machine.driver_version,
                pair.precision(),
                pair.encoder.file.sha256 + " " + pair.decoder.file.sha256};
    }

    std::string command(const std::string& name) const {
        return "sam3rt " + name + " " + bundle.path.string() + " --backend " + backend;
    }
};

/// Refuse an engine or a wrapper that is not the file it should be.
void check(const Engine& engine) {
    check_file(engine.folder, engine.file);
    const fs::path wrapper = engine.wrapper();
    const std::string name = wrapper.filename().string();
    const Bytes content =
        read_or_refuse(wrapper, max_wrapper_bytes, name, Links::refuse,
                       "; build the engine again, so that ONNX Runtime can load it");
    check_wrapper(content, name, engine.file.file);
}

/// Judges pairs of engines that nobody has judged here.
class Prover {
public:
    explicit Prover(const Target& target) : target_(target) {}

    /// The parity record is read before the engines are, since it is not their fault if it is
    /// damaged.
    void read_record() {
        if (!record_) {
            record_.emplace(load_record(target_.bundle));
            // A warning, because a service that starts would seem to hang.
            log(LogLevel::warning, target_.backend +
                                       " engines are compared with the parity record, once on this "
                                       "machine; at full size that takes a minute or two");
        }
    }

    Verdict prove(const Runner& runner, const VerdictSubject& subject) const {
        Verdict verdict = sam3rt::prove(runner, target_.bundle.manifest, *record_);
        save_verdict(subject, verdict);
        return verdict;
    }

private:
    const Target& target_;
    std::optional<ParityRecord> record_;
};

}  // namespace

bool has_engines(const Bundle& bundle, const std::string& backend) {
    const std::vector<Engine> engines = find_engines(bundle.path, "encoder");
    return std::any_of(engines.begin(), engines.end(),
                       [&backend](const Engine& engine) { return engine.backend == backend; });
}

EngineSet choose_engines(const Bundle& bundle, const std::string& backend, const Machine& machine,
                         const fs::path& engine_folder, const OpenEngines& open,
                         const std::string& loaded_by) {
    const Target target{bundle, backend, machine, loaded_by};
    std::vector<Pair> pairs;
    const std::vector<Engine> decoders = target.fitting("decoder");
    for (const Engine& encoder : target.fitting("encoder")) {
        for (const Engine& decoder : decoders) {
            if (decoder.features_dtype == encoder.features_dtype &&
                decoder.tensorrt_version == encoder.tensorrt_version) {
                pairs.push_back({encoder, decoder});
            }
        }
    }
    if (pairs.empty()) {
        throw BackendError(bundle.path.string() + " has no " + backend +
                           " engines of this bundle for " + machine.gpu.name +
                           " (compute capability " + machine.gpu.compute_capability + ")" +
                           (loaded_by.empty() ? "" : " and version " + loaded_by) +
                           "; build them on this machine: " + target.command("build"));
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
    std::string problems;
    std::set<std::string> failed_encoders;
    Prover prover(target);
    for (const Pair& pair : chosen) {
        if (failed_encoders.count(pair.encoder.file.sha256) != 0) {
            continue;
        }
        const VerdictSubject subject = target.subject_of(pair);
        std::optional<Verdict> verdict = load_verdict(subject);
        if (!verdict) {
            prover.read_record();
        }
        EngineSet engines{pair.encoder.wrapper(),
                          pair.decoder.wrapper(),
                          pair.encoder.features_dtype,
                          pair.precision(),
                          {pair.encoder.folder, pair.encoder.file},
                          {pair.decoder.folder, pair.decoder.file}};
        std::string problem;
        try {
            if (loaded_by.empty() && (!verdict || verdict->passed)) {
                check(pair.encoder);
                check(pair.decoder);
            }
            if (!verdict) {
                verdict = prover.prove(open(engines), subject);
            } else if (verdict->passed && !loaded_by.empty()) {
                open(engines);
            }
        } catch (const BackendError& error) {
            problem = error.what();
        } catch (const BundleError& error) {
            if (chosen.size() == 1) {
                throw;
            }
            problem = error.what();
        }
        if (problem.empty() && verdict->passed) {
            log(LogLevel::info, "computing in " + engines.precision + problems);
            return engines;
        }
        if (problem.empty()) {
            problem = "fails the gate on this machine: " + verdict->explanation;
            if (verdict->encoder_failed) {
                failed_encoders.insert(pair.encoder.file.sha256);
            }
        }
        problems += "; not " + name_of(pair) + ": " + problem;
        log(LogLevel::warning, "not " + name_of(pair) + ": " + problem);
    }
    throw BackendError("none of the " + backend + " engines of " + bundle.path.string() +
                       " can serve on this machine" + problems +
                       "; build others: " + target.command("build"));
}

}  // namespace sam3rt
