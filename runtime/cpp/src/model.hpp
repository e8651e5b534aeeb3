// What a Model's copies share.
#pragma once

#include "backend.hpp"
#include "bundle.hpp"
#include "sam3rt/sam3rt.hpp"
#include "upsampling.hpp"

namespace sam3rt {

struct Model::Data {
    Data(Bundle opened, const ModelOptions& options)
        : bundle(std::move(opened)),
          backend(open_backend(bundle, options)) {}

    const Bundle bundle;
    const std::shared_ptr<const Backend> backend;
    mutable ResamplingCache resampling;
};

/// What is asked about one image.
struct Question {
    const ImageEmbedding& embedding;
    const Prompts& prompts;
    /// Masks that the backend may make as well, or null.
    DeviceMasks* masks;
};

/// Model::decode for questions about an image each, together where the backend gains by it. All are
/// checked before the decoder runs.
std::vector<DecodedMasks> decode_all(const Model& model, const std::vector<Question>& questions,
                                     bool multimask_output, const Cancellation* cancellation);

}  // namespace sam3rt
