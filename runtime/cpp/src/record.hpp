// The parity record: small inputs and the FP32 outputs a model must give for them. Its format is
// described in sam3rt.accuracy.record of the Python runtime, which writes it.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "npz.hpp"
#include "prompts.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// One decoder call of a record.
struct RecordCase {
    std::string name;
    /// Index of the image it is about.
    std::size_t image = 0;
    PackedPrompts prompts;
};

/// Outputs of one decoder call: what a model said.
struct CaseAnswer {
    /// [P, C, h, w], the multi-mask logits, then the single mask's.
    Array<float> logits;
    /// [P, C].
    Array<float> iou;
    /// [P], of models with that head.
    std::optional<Array<float>> object_score;
};

/// A record in memory, which covers every output of its bundle's graphs, with and without a mask
/// prompt.
class ParityRecord {
public:
    /// Throws BundleError, naming the file, where the content is not a whole record for this
    /// manifest.
    ParityRecord(ByteView content, const std::string& file, const Manifest& manifest);

    /// [H, W, 3] each.
    const std::vector<Array<std::uint8_t>>& images() const { return images_; }
    const std::vector<RecordCase>& cases() const { return cases_; }

    /// Compare one image's feature maps, [1, C, h, w] each, with the record.
    /// Throws BundleError where there are more or fewer of them than on record.
    void compare_features(std::size_t image, const std::vector<Array<float>>& maps,
                          const ParityLimits& limits, std::vector<Measurement>& found) const;

    /// Compare one decoder call's outputs with the record.
    void compare_case(const RecordCase& entry, const CaseAnswer& answer,
                      const ParityLimits& limits, std::vector<Measurement>& found) const;

private:
    /// What is expected of one decoder call.
    struct Expected {
        /// [P, C, h / 8, w / 8], rounded up.
        Array<float> logits;
        /// A bit for each unsubsampled logit above 0, the first in the highest bit.
        Array<std::uint8_t> masks;
        CaseAnswer scores;
    };

    template <typename T>
    Array<T> take(const std::string& name);
    void read_images(std::size_t count, std::size_t levels);
    void read_case(const std::string& name, std::size_t image, const Manifest& manifest);
    [[noreturn]] void refuse(const std::string& message) const;

    std::string file_;
    std::map<std::string, NpzArray> arrays_;
    std::vector<Array<std::uint8_t>> images_;
    /// Feature maps of each image, subsampled: [C / 4, h / s, w / s].
    std::vector<std::vector<Array<float>>> features_;
    std::vector<RecordCase> cases_;
    std::map<std::string, Expected> expected_;
    bool log_odds_ = false;
    float largest_score_ = 0;
};

/// The parity record of a bundle. Throws BundleError where it is damaged, not the file that the
/// manifest describes, or does not cover every output of the bundle's graphs, with and
/// without a mask prompt.
ParityRecord load_record(const Bundle& bundle);

}  // namespace sam3rt
