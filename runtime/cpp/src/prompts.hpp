// Prompts: what a caller may pass, checked, and how it becomes labelled points.
#pragma once

#include "geometry.hpp"
#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// The label of a point that does not count: no attention of the decoder sees it, unlike one that
/// is labelled -1.
constexpr std::int64_t padding_label = -10;

/// Prompts as the decoder graph reads them.
struct PackedPrompts {
    /// [P, N, 2], pixels of the encoder's input; P and N may be 0.
    Array<float> points;
    /// [P, N].
    Array<std::int64_t> labels;
    /// [M, h, w] with M 1 or P.
    std::optional<Array<float>> masks;
    /// What is odd about them, or empty; see DecodedMasks::warning.
    std::string warning;
};

/// Check prompts and bring them to the decoder's form.
/// Throws PromptError naming the argument, what came and what was expected.
PackedPrompts pack(const Prompts& prompts, const PromptSpec& spec, const ImageGeometry& geometry);

}  // namespace sam3rt
