#include "verdicts.hpp"

#include <pwd.h>
#include <unistd.h>
#ifdef __APPLE__
#include <crt_externs.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <regex>
#include <system_error>
#include <vector>

#include "bundle.hpp"
#include "files.hpp"
#include "json_reader.hpp"
#include "log.hpp"
#include "sam3rt/sam3rt.hpp"
#include "sha256.hpp"

namespace fs = std::filesystem;

namespace sam3rt {
namespace {

const std::string format_name = "sam3rt-verdict-2";
constexpr std::uint64_t max_verdict_bytes = std::uint64_t{1} << 20;

using Texts = std::map<std::string, std::string>;

/// Variables of the environment by which the libraries that compute take other kernels, or sum up in
/// other types.
Texts kernel_choices() {
    static const std::regex form(
        "(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)|"
        "ORT_(?!DISABLE_TELEMETRY$).*|NVIDIA_TF32_OVERRIDE|(CUBLAS|CUDNN)_.*");
#ifdef __APPLE__
    char** entry = *_NSGetEnviron();
#else
    char** entry = environ;
#endif
    Texts chosen;
    for (; entry != nullptr && *entry != nullptr; ++entry) {
        const std::string text = *entry;
        const std::size_t equals = text.find('=');
        const std::string name = text.substr(0, equals);
        if (equals != std::string::npos && std::regex_match(name, form)) {
            chosen[name] = text.substr(equals + 1);
        }
    }
    return chosen;
}

/// The texts of a verdict's key. Its limits stand beside them, and such variables if there are any.
Texts key_of(const VerdictSubject& subject) {
    return {{"backend", subject.backend},         {"files", subject.files},
            {"fingerprint", subject.fingerprint}, {"precision", subject.precision},
            {"processor", subject.processor},     {"sam3rt", version()},
            {"version", subject.version}};
}

/// As Python's json.dumps writes an object, sorted; its values are JSON.
std::string object_text(const Texts& fields) {
    std::string text;
    for (const auto& [name, value] : fields) {
        text += (text.empty() ? "" : ", ") + json_text(name) + ": " + value;
    }
    return "{" + text + "}";
}

Texts as_json(Texts texts) {
    for (auto& [name, value] : texts) {
        value = json_text(value);
    }
    return texts;
}

/// A verdict's key as JSON. A verdict by other limits is another.
std::string key_text(const VerdictSubject& subject) {
    Texts limits;
    for (const NamedLimit& limit : named_limits) {
        limits[limit.name] = json_number(loosest_limits.*limit.value);
    }
    Texts fields = as_json(key_of(subject));
    fields["limits"] = object_text(limits);
    const Texts chosen = kernel_choices();
    if (!chosen.empty()) {
        fields["environment"] = object_text(as_json(chosen));
    }
    return object_text(fields);
}

/// The name of a verdict's file, with a hash of its key.
std::string file_name(const VerdictSubject& subject) {
    const std::string key = key_text(subject);
    return subject.backend + "-" + subject.precision + "-" +
           sha256_hex(key.data(), key.size()).substr(0, 16) + ".json";
}

bool has_texts(const JsonValue& object, const Texts& texts) {
    return std::all_of(texts.begin(), texts.end(), [&object](const auto& entry) {
        return object.field(entry.first).text() == entry.second;
    });
}

bool is_about(const JsonValue& key, const VerdictSubject& subject) {
    const Texts expected = key_of(subject);
    const Texts chosen = kernel_choices();
    const std::size_t more = chosen.empty() ? 1 : 2;
    if (!has_texts(key, expected) || key.fields().size() != expected.size() + more) {
        return false;
    }
    if (!chosen.empty() && (!has_texts(key.field("environment"), chosen) ||
                            key.field("environment").fields().size() != chosen.size())) {
        return false;
    }
    const JsonValue limits = key.field("limits");
    for (const NamedLimit& limit : named_limits) {
        if (limits.field(limit.name).number() != loosest_limits.*limit.value) {
            return false;
        }
    }
    return limits.fields().size() == named_limits.size();
}

/// Parse a verdict's file. Throws BundleError where it is damaged or about something else.
Verdict parse(const Bytes& content, const std::string& name, const VerdictSubject& subject) {
    const JsonDocument document(content.data(), content.size(), name);
    const JsonValue root = document.root();
    if (root.field("format").text() != format_name || !is_about(root.field("key"), subject)) {
        throw BundleError("is about something else", name);
    }
    Verdict verdict{root.field("passed").boolean(), root.field("explanation").text(), {}, false};
    verdict.encoder_failed = root.field("encoder_failed").boolean();
    for (const auto& [figure, value] : root.field("figures").fields()) {
        verdict.figures[figure] =
            value.is_null() ? std::numeric_limits<double>::quiet_NaN()
                            : value.number(std::numeric_limits<double>::max());
    }
    return verdict;
}

std::string text_of(const VerdictSubject& subject, const Verdict& verdict) {
    Texts figures;
    for (const auto& [name, value] : verdict.figures) {
        // JSON has no NaN; null is read back as one.
        figures[name] = std::isfinite(value) ? json_number(value) : "null";
    }
    const auto boolean = [](bool value) { return value ? "true" : "false"; };
    return "{\n  \"format\": " + json_text(format_name) + ",\n  \"key\": " + key_text(subject) +
           ",\n  \"passed\": " + boolean(verdict.passed) + ",\n  \"explanation\": " +
           json_text(verdict.explanation) + ",\n  \"figures\": " + object_text(figures) +
           ",\n  \"encoder_failed\": " + boolean(verdict.encoder_failed) + "\n}\n";
}

/// For a cache folder that cannot be written: this process need not repeat what it has found.
class Unwritten {
public:
    void remember(const std::string& name, const Verdict& verdict) {
        const std::lock_guard<std::mutex> lock(mutex_);
        verdicts_.insert_or_assign(name, verdict);
    }
    std::optional<Verdict> find(const std::string& name) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = verdicts_.find(name);
        return found == verdicts_.end() ? std::nullopt : std::optional<Verdict>(found->second);
    }

private:
    std::mutex mutex_;
    std::map<std::string, Verdict> verdicts_;
};

Unwritten& unwritten() {
    // Never destroyed: models of static lifetime may be loaded, or live on, after other statics.
    static auto* const verdicts = new Unwritten;
    return *verdicts;
}

fs::path home_folder() {
    const char* home = std::getenv("HOME");
    if (home != nullptr && *home != '\0') {
        return home;
    }
    // A service may have no HOME.
    passwd entry{};
    passwd* found = nullptr;
    std::vector<char> texts(16384);
    if (::getpwuid_r(::getuid(), &entry, texts.data(), texts.size(), &found) != 0 ||
        found == nullptr) {
        return {};
    }
    return entry.pw_dir;
}

/// Where verdicts lie, by each system's custom; empty where there is no home folder.
fs::path verdict_folder() {
    const fs::path home = home_folder();
#ifdef __APPLE__
    const fs::path cache = home / "Library" / "Caches";
#else
    const char* named = std::getenv("XDG_CACHE_HOME");
    if (named != nullptr && fs::path(named).is_absolute()) {
        return fs::path(named) / "sam3rt" / "verdicts";
    }
    const fs::path cache = home / ".cache";
#endif
    return home.empty() ? fs::path() : cache / "sam3rt" / "verdicts";
}

}  // namespace

std::optional<Verdict> load_verdict(const VerdictSubject& subject) {
    const fs::path folder = verdict_folder();
    const std::string name = file_name(subject);
    if (!folder.empty()) {
        try {
            return parse(read_file(folder / name, max_verdict_bytes, Links::refuse), name, subject);
        } catch (const BundleError& error) {  // whatever lies there, it is as good as none
            log(LogLevel::info, std::string("ignoring a verdict: ") + error.what());
        } catch (const std::system_error& error) {
            if (error.code() != std::errc::no_such_file_or_directory) {
                log(LogLevel::info, std::string("ignoring a verdict: ") + error.what());
            }
        }
    }
    return unwritten().find(name);
}

void save_verdict(const VerdictSubject& subject, const Verdict& verdict) {
    const fs::path folder = verdict_folder();
    const std::string name = file_name(subject);
    const std::string text = text_of(subject, verdict);
    std::string problem = "there is no home folder";
    if (!folder.empty()) {
        try {
            fs::create_directories(folder);
            write_atomically(folder / name,
                             [&text](const Write& write) { write(text.data(), text.size()); });
            return;
        } catch (const std::system_error& error) {
            problem = error.what();
        }
    }
    log(LogLevel::info,
        "the verdict cannot be kept (" + problem + "): the next process repeats it");
    unwritten().remember(name, verdict);
}

}  // namespace sam3rt
