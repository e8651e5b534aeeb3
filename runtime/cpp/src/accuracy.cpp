#include "accuracy.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

#include "errors.hpp"

namespace sam3rt {
namespace {

EncodedImage encode(const Runner& runner, const Manifest& manifest,
                    const Array<std::uint8_t>& image) {
    const Shape& shape = image.shape();
    const ImageView view{image.data(), shape[0], shape[1]};
    check_image(view, "image");
    return runner(view, geometry_of(manifest.image, {shape[0], shape[1]}));
}

/// [1, P, C, ...] and [1, P, D, ...] as [P, C + D, ...].
Array<float> concatenated(const Array<float>& first, const Array<float>& second) {
    const Shape& shape = first.shape();
    Shape other = second.shape();
    if (shape.size() < 3 || other.size() != shape.size() || shape[0] != 1) {
        throw BackendError("the decoder returned tensors of shapes " + shape_text(shape) +
                           " and " + shape_text(other));
    }
    Shape together(shape.begin() + 1, shape.end());
    together[1] += other[2];
    other[2] = shape[2];
    if (other != shape || shape[1] == 0) {
        throw BackendError("the decoder returned tensors that do not fit each other");
    }
    Array<float> result(together);
    const auto objects = static_cast<std::size_t>(shape[1]);
    float* to = result.data();
    for (std::size_t object = 0; object < objects; ++object) {
        for (const Array<float>* part : {&first, &second}) {
            const std::size_t size = part->size() / objects;
            to = std::copy_n(part->data() + object * size, size, to);
        }
    }
    return result;
}

/// The outputs for one case, multi-mask and single-mask together.
CaseAnswer run_case(const EncodedImage& image, const Manifest& manifest, const RecordCase& entry) {
    std::vector<Array<float>> multi =
        image.decode(entry.prompts, decoder_outputs(manifest, true));
    const std::vector<Array<float>> single =
        image.decode(entry.prompts, decoder_outputs(manifest, false));
    CaseAnswer answer{concatenated(multi.at(0), single.at(0)),
                      concatenated(multi.at(1), single.at(1)),
                      std::nullopt};
    if (answer.logits.shape().size() != 4 || answer.iou.shape().size() != 2) {
        throw BackendError("the decoder returned masks of shape " +
                           shape_text(answer.logits.shape()) + " and scores of shape " +
                           shape_text(answer.iou.shape()));
    }
    if (has_object_score(manifest)) {
        const auto objects = static_cast<std::int64_t>(multi.at(2).size());
        answer.object_score = std::move(multi[2]).reshaped({objects});
    }
    return answer;
}

/// Grows as the figure gets worse; infinite for NaN. Compares one metric's figures.
double badness(const Measurement& m) {
    if (std::isnan(m.value)) {
        return std::numeric_limits<double>::infinity();
    }
    return m.at_least ? -m.value : m.value;
}

/// The worst measurement of each output and metric, in the order in which they came.
std::vector<const Measurement*> worst_of(const std::vector<Measurement>& measurements) {
    std::vector<const Measurement*> worst;
    for (const Measurement& m : measurements) {
        const auto known = std::find_if(worst.begin(), worst.end(), [&m](const Measurement* w) {
            return w->output == m.output && w->metric == m.metric;
        });
        if (known == worst.end()) {
            worst.push_back(&m);
        } else if (badness(m) > badness(**known)) {
            *known = &m;
        }
    }
    return worst;
}

/// A figure as Python writes it with a format such as "%.4g".
std::string number(const char* format, double value) {
    if (std::isnan(value)) {
        return "nan";
    }
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), format, value);
    return text.data();
}

std::string explain(const std::vector<Measurement>& measurements) {
    if (measurements.empty()) {
        return "nothing was compared";
    }
    std::string text;
    for (const Measurement* m : worst_of(measurements)) {
        if (!m->passed()) {
            text += (text.empty() ? "" : "; ") + m->case_name + " " + m->output + ": " +
                    m->metric + " " + number("%.4g", m->value) + ", " +
                    (m->at_least ? "at least " : "at most ") + number("%g", m->limit) +
                    " allowed";
        }
    }
    return text.empty() ? "all outputs are within the gate's limits" : one_line(std::move(text));
}

}  // namespace

const ParityLimits& limits_for(const Manifest& manifest, const std::string& precision) {
    return precision == "fp32" ? manifest.parity_limits : gate_limits;
}

std::vector<Measurement> run_record(const Runner& runner, const Manifest& manifest,
                                    const ParityRecord& record, const ParityLimits& limits) {
    std::vector<Measurement> found;
    std::vector<EncodedImage> encoded;
    for (std::size_t image = 0; image < record.images().size(); ++image) {
        encoded.push_back(encode(runner, manifest, record.images()[image]));
        record.compare_features(image, encoded.back().maps, limits, found);
        encoded.back().maps.clear();
    }
    for (const RecordCase& entry : record.cases()) {
        const CaseAnswer answer = run_case(encoded.at(entry.image), manifest, entry);
        record.compare_case(entry, answer, limits, found);
    }
    return found;
}

VerifyReport judge(std::vector<Measurement> measurements) {
    VerifyReport report;
    report.passed = !measurements.empty() &&
                    std::all_of(measurements.begin(), measurements.end(),
                                [](const Measurement& m) { return m.passed(); });
    report.explanation = explain(measurements);
    report.measurements = std::move(measurements);
    return report;
}

Verdict verdict_of(const VerifyReport& report) {
    Verdict verdict{report.passed, report.explanation, {}, false};
    for (const Measurement* m : worst_of(report.measurements)) {
        verdict.figures[m->output + " " + m->metric] = m->value;
    }
    verdict.encoder_failed = std::any_of(
        report.measurements.begin(), report.measurements.end(), [](const Measurement& m) {
            return !m.passed() && m.output.compare(0, 8, "features") == 0;
        });
    return verdict;
}

Verdict prove(const Runner& runner, const Manifest& manifest, const ParityRecord& record) {
    return verdict_of(judge(run_record(runner, manifest, record, gate_limits)));
}

Health check_health(const Runner& runner, const Bundle& bundle, const ParityLimits& limits) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::duration time) {
        return std::chrono::duration<double>(time).count();
    };
    const Manifest& manifest = bundle.manifest;
    Health health;
    health.fingerprint = manifest.fingerprint;
    try {
        const ParityRecord record = load_record(bundle);
        const RecordCase& entry = record.cases().front();
        const Clock::time_point start = Clock::now();
        const EncodedImage image = encode(runner, manifest, record.images()[entry.image]);
        const Clock::time_point encoded = Clock::now();
        const CaseAnswer answer = run_case(image, manifest, entry);
        // A case is a multi-mask and a single-mask run.
        health.decode_seconds = seconds(Clock::now() - encoded) / 2;
        health.encode_seconds = seconds(encoded - start);
        std::vector<Measurement> found;
        record.compare_features(entry.image, image.maps, limits, found);
        VerifyReport report = judge(std::move(found));
        if (report.passed) {
            found.clear();
            record.compare_case(entry, answer, limits, found);
            report = judge(std::move(found));
        }
        health.healthy = report.passed;
        health.problem = report.passed ? "" : report.explanation;
    } catch (const CancelledError&) {
        throw;
    } catch (const std::exception& error) {  // whatever is wrong, a probe gets an answer
        health.problem = error.what();
    }
    return health;
}

}  // namespace sam3rt
