// What the gate found on this machine, as the Python runtime remembers it.
//
// Verdicts lie in the user's cache folder and nowhere else: one that came with a bundle would be
// somebody else's claim. Python and C++ read each other's.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

namespace sam3rt {

/// What a verdict is about: the fields of Subject in sam3rt.accuracy.verdicts, and the bundle. The
/// variables of the environment that choose kernels come to it by themselves.
struct VerdictSubject {
    std::string fingerprint;
    std::string backend;
    /// Of the library that computes.
    std::string version;
    /// The GPU and its driver.
    std::string processor;
    /// The recipe, or "ENCODER+DECODER".
    std::string precision;
    /// SHA-256 of both engines, with a blank between.
    std::string files;
};

struct Verdict {
    bool passed = false;
    /// How it failed, or that it did not.
    std::string explanation;
    /// The worst figure of each output and metric, by their names.
    std::map<std::string, double> figures;
    /// Whether the feature maps were wrong already.
    bool encoder_failed = false;
};

/// The verdict remembered for a subject, if there is one. A file that is damaged, a link, or about
/// something else is as good as none.
std::optional<Verdict> load_verdict(const VerdictSubject& subject);

/// Remember a verdict. Where nothing can be written, this process alone remembers it.
void save_verdict(const VerdictSubject& subject, const Verdict& verdict);

}  // namespace sam3rt
