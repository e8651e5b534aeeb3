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
          owned_backend(open_backend(bundle, options)),
          backend(*owned_backend) {}

    const Bundle bundle;
    const std::shared_ptr<const Backend> owned_backend;
    const Backend& backend;
    mutable ResamplingCache resampling;
};

/// Model::decode, which may make masks on the device as well.
DecodedMasks decode_prompts(const Model& model, const ImageEmbedding& embedding,
                            const Prompts& prompts, bool multimask_output,
                            const Cancellation* cancellation, DeviceMasks* masks);

/// The same for several images, together where the backend gains by it. As many prompts as
/// embeddings; as many masks, or none.
std::vector<DecodedMasks> decode_batch(const Model& model,
                                       const std::vector<ImageEmbedding>& embeddings,
                                       const std::vector<Prompts>& prompts, bool multimask_output,
                                       const Cancellation* cancellation,
                                       std::vector<DeviceMasks>* masks);

}  // namespace sam3rt
