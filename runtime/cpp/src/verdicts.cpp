#include "verdicts.hpp"

#include <pwd.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <system_error>
#include <vector>

#include "files.hpp"
#include "json_reader.hpp"
#include "sam3rt/sam3rt.hpp"
#include "sha256.hpp"

namespace fs = std::filesystem;

namespace sam3rt {
namespace {

const std::string format_name = "sam3rt-verdict-2";
constexpr std::uint64_t max_verdict_bytes = std::uint64_t{1} << 20;

/// GATE_LIMITS of sam3rt.accuracy.gate, as JSON writes them: a verdict by other limits is another.
constexpr std::array<std::pair<const char*, const char*>, 5> gate_limits = {{
    {"feature_cosine", "0.999"},
    {"feature_error", "0.1"},
    {"iou_error", "0.05"},
    {"logit_error", "0.1"},
    {"mask_iou", "0.99"},
}};

/// The texts of a verdict's key. Its limits stand beside them.
std::map<std::string, std::string> key_of(const VerdictSubject& subject) {
    return {{"backend", subject.backend},         {"files", subject.files},
            {"fingerprint", subject.fingerprint}, {"precision", subject.precision},
            {"processor", subject.processor},     {"version", subject.version}};
}

/// The name of a verdict's file: a hash of its key as Python's json.dumps writes it, sorted.
std::string file_name(const VerdictSubject& subject) {
    std::string limits;
    for (const auto& [name, value] : gate_limits) {
        limits += (limits.empty() ? "" : ", ") + json_text(name) + ": " + value;
    }
    std::map<std::string, std::string> fields;
    for (const auto& [name, value] : key_of(subject)) {
        fields[name] = json_text(value);
    }
    fields["limits"] = "{" + limits + "}";
    std::string text;
    for (const auto& [name, value] : fields) {
        text += (text.empty() ? "{" : ", ") + json_text(name) + ": " + value;
    }
    text += "}";
    return subject.backend + "-" + subject.precision + "-" +
           sha256_hex(text.data(), text.size()).substr(0, 16) + ".json";
}

bool is_about(const JsonValue& key, const VerdictSubject& subject) {
    std::map<std::string, std::string> expected = key_of(subject);
    for (const auto& [name, value] : key.fields()) {
        if (name == "limits") {
            for (const auto& [limit, number] : gate_limits) {
                if (value.field(limit).number() != std::strtod(number, nullptr)) {
                    return false;
                }
            }
        } else if (value.text() != expected[name]) {
            return false;
        }
    }
    return key.fields().size() == expected.size() + 1;
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

}  // namespace

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

std::optional<Verdict> load_verdict(const VerdictSubject& subject) {
    const fs::path folder = verdict_folder();
    if (folder.empty()) {
        return std::nullopt;
    }
    const std::string name = file_name(subject);
    try {
        const Bytes content = read_file(folder / name, max_verdict_bytes, Links::refuse);
        const JsonDocument document(content.data(), content.size(), name);
        const JsonValue root = document.root();
        if (root.field("format").text() != format_name || !is_about(root.field("key"), subject)) {
            return std::nullopt;
        }
        return Verdict{root.field("passed").boolean(), root.field("explanation").text()};
    } catch (const BundleError&) {
        return std::nullopt;
    } catch (const std::system_error&) {
        return std::nullopt;
    }
}

}  // namespace sam3rt
