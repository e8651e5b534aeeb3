// Two engines that belong together, the layouts that follow from them, and the few sizes that
// decoder calls are padded to.
#pragma once

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bundle.hpp"
#include "tensorrt/memory.hpp"
#include "tensorrt/nvinfer.hpp"

namespace sam3rt {

/// The sizes of one decoder call. A CUDA graph is recorded for one size, and TensorRT spends time
/// whenever sizes change, so calls are padded to few. Padding points carry a label that the decoder
/// leaves out of every attention, and padding objects are independent of the others: neither
/// changes a result.
struct ShapeClass {
    std::int64_t objects;
    /// Of each object.
    std::int64_t points;
    /// 1, or as many as objects where each has a mask prompt of its own.
    std::int64_t masks;
    /// 1, or as many as objects where each has an image of its own.
    std::int64_t images = 1;

    bool operator==(const ShapeClass& other) const {
        return std::tie(objects, points, masks, images) ==
               std::tie(other.objects, other.points, other.masks, other.images);
    }
};

/// Not the decoder's: what masks to make travels in the same block as the prompts.
inline const std::string job_name = "job";

/// An encoder and a decoder engine.
class Network {
public:
    /// Throws BackendError where an engine is not what the manifest describes, or the two differ in
    /// the feature maps between them.
    Network(const Manifest& manifest, std::shared_ptr<Engine> encoder,
            std::shared_ptr<Engine> decoder);

    Engine& encoder() const { return *encoder_; }
    Engine& decoder() const { return *decoder_; }

    /// The encoder's input, for one image.
    const Slot& pixels() const { return pixels_; }
    /// Images in one run of the encoder, at most.
    std::int64_t max_images() const { return max_images_; }
    /// One image's feature maps.
    const std::shared_ptr<const Layout>& features() const { return features_; }
    /// Those of several images, as the encoder makes them and the decoder takes them.
    Layout batch(std::int64_t images) const;

    /// Everything of a prompt but its mask, and the job of making masks.
    Layout inputs(const ShapeClass& shape) const;
    /// A prompt's mask.
    Layout masks(const ShapeClass& shape) const;
    Layout outputs(const ShapeClass& shape) const;

    /// The class of a call, of at most max_objects() objects.
    ShapeClass classify(std::int64_t objects, std::int64_t points, bool own_masks,
                        bool own_images) const;
    /// Those of all calls on one image without mask prompts, up to 16 objects and 32 points, the
    /// largest first.
    std::vector<ShapeClass> usual_classes() const;
    /// The one whose blocks all others fit into.
    ShapeClass largest() const { return {max_objects_, max_points_, max_objects_}; }
    std::int64_t max_objects() const { return max_objects_; }
    std::int64_t max_points() const { return max_points_; }
    /// Whether each object of a decoder call may have an image of its own.
    bool joins_images() const { return joins_images_; }

    /// All outputs of the decoder.
    const std::vector<std::string>& output_names() const { return output_names_; }
    /// Whether masks and pixels are FP32, as the kernels around the network want them.
    bool fits_kernels() const { return fits_kernels_; }

private:
    const std::shared_ptr<Engine> encoder_;
    const std::shared_ptr<Engine> decoder_;
    const Manifest& manifest_;
    Slot pixels_;
    std::shared_ptr<const Layout> features_;
    std::vector<std::string> output_names_;
    std::int64_t max_images_ = 0;
    std::int64_t max_objects_ = 0;
    std::int64_t max_points_ = 0;
    bool joins_images_ = false;
    bool fits_kernels_ = false;
};

}  // namespace sam3rt
