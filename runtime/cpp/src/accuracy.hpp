// The accuracy gate: runs a bundle's parity record on whatever encodes images and decodes prompts,
// and judges what comes out, by the limits and in the words of sam3rt.accuracy in Python.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "geometry.hpp"
#include "prompts.hpp"
#include "record.hpp"
#include "sam3rt/sam3rt.hpp"
#include "verdicts.hpp"

namespace sam3rt {

/// One image after the encoder.
struct EncodedImage {
    /// Its feature maps on the host, [1, C, h, w] each, finest first.
    std::vector<Array<float>> maps;
    /// Run the decoder on it and bring the named outputs, [1, P, ...] each, to the host, in the
    /// order asked for.
    std::function<std::vector<Array<float>>(const PackedPrompts& prompts,
                                            const std::vector<std::string>& outputs)>
        decode;
};

/// What can be run on a record: runs the encoder on one image, an RGB image of the record that has
/// been checked. A backend needs nothing else to be judged.
using Runner =
    std::function<EncodedImage(const ImageView& image, const ImageGeometry& geometry)>;

/// What anything that computes in less than FP32 is held to.
inline constexpr const ParityLimits& gate_limits = loosest_limits;

/// What a backend is held to: the bundle's own limits in "fp32", the gate's in anything less.
const ParityLimits& limits_for(const Manifest& manifest, const std::string& precision);

/// Run a whole record, encoder and decoder, and compare every output.
/// Throws what the runner throws.
std::vector<Measurement> run_record(const Runner& runner, const Manifest& manifest,
                                    const ParityRecord& record, const ParityLimits& limits);

/// Whether something was compared and all of it is within its limits, and how it is not.
VerifyReport judge(std::vector<Measurement> measurements);

/// The report in short, to be remembered.
Verdict verdict_of(const VerifyReport& report);

/// Run a bundle's record by the gate's limits. Throws what the runner throws.
Verdict prove(const Runner& runner, const Manifest& manifest, const ParityRecord& record);

/// Put the first case of a bundle's record to a runner and judge its answer: about as much as one
/// request. Whatever goes wrong, but for CancelledError, is the answer, and is not thrown. Fills
/// `healthy`, `problem`, `fingerprint` and the times.
Health check_health(const Runner& runner, const Bundle& bundle, const ParityLimits& limits);

}  // namespace sam3rt
