#include "tensorrt/network.hpp"

#include <algorithm>
#include <array>
#include <set>

#include "signature.hpp"
#include "tensorrt/imaging.hpp"

namespace sam3rt {
namespace {

// What both kinds of call want stands in the middle, so that either is one copy to the host.
const std::vector<std::string> output_order = {"pred_masks", "iou_scores", "object_score_logits",
                                               "single_pred_masks", "single_iou_scores"};
// And four times the last for more.
constexpr std::array<std::int64_t, 3> object_counts = {1, 4, 16};
constexpr std::array<std::int64_t, 3> point_counts = {4, 8, 32};

std::int64_t padded(std::int64_t count, const std::array<std::int64_t, 3>& sizes,
                    std::int64_t limit) {
    for (const std::int64_t size : sizes) {
        if (count <= size) {
            return std::min(size, limit);
        }
    }
    std::int64_t size = sizes.back();
    while (size < count) {
        size *= 4;
    }
    return std::min(size, limit);
}

void check(const std::string& role, const Engine& engine, const GraphSpec& graph) {
    std::vector<LoadedTensor> inputs;
    std::vector<LoadedTensor> outputs;
    for (const auto& [name, tensor] : engine.tensors()) {
        (tensor.is_input ? inputs : outputs).push_back({name, "", tensor.shape});
    }
    const std::string mismatch =
        signature_mismatch(graph, std::move(inputs), std::move(outputs), true);
    if (!mismatch.empty()) {
        throw BackendError("the " + role + " engine " + mismatch + ": build it again");
    }
}

/// The greatest size of an input along an axis.
std::int64_t most(const EngineTensor& tensor, std::size_t axis) {
    if (tensor.most.size() != 4 || tensor.most[axis] < 1) {
        throw BackendError("tensor " + tensor.name +
                           " of an engine is of another shape than known: "
                           "build it again");
    }
    return tensor.most[axis];
}

}  // namespace

Network::Network(const Manifest& manifest, std::shared_ptr<Engine> encoder,
                 std::shared_ptr<Engine> decoder)
    : encoder_(std::move(encoder)), decoder_(std::move(decoder)), manifest_(manifest) {
    check("encoder", *encoder_, manifest.encoder);
    check("decoder", *decoder_, manifest.decoder);
    const EngineTensor& pixels = encoder_->tensor(manifest.encoder.inputs.at(0).name);
    pixels_ = {
        pixels.name, {1, 3, manifest.image.size.height, manifest.image.size.width}, pixels.type};
    max_images_ = most(pixels, 0);
    auto features = std::make_shared<Layout>();
    for (const TensorSpec& spec : manifest.encoder.outputs) {
        const ElementType type = encoder_->tensor(spec.name).type;
        if (decoder_->tensor(spec.name).type != type ||
            (type != ElementType::float32 && type != ElementType::float16)) {
            throw BackendError("the encoder engine makes feature map " + spec.name +
                               " in another type than the decoder engine takes it; build both "
                               "again with one recipe");
        }
        features->add(spec.name, shape_of_map(spec), type);
    }
    features_ = std::move(features);
    fits_kernels_ = pixels.type == ElementType::float32;
    for (const std::string& name : output_order) {
        const auto found = decoder_->tensors().find(name);
        if (found != decoder_->tensors().end() && !found->second.is_input) {
            output_names_.push_back(name);
            if (name == "pred_masks" || name == "single_pred_masks") {
                const Size& size = manifest.masks.low_res_size;
                const Shape& shape = found->second.shape;
                if (shape.size() != 5 || shape[3] != size.height || shape[4] != size.width) {
                    throw BackendError("the decoder engine makes " + name +
                                       " of another size than the manifest says");
                }
                fits_kernels_ = fits_kernels_ && found->second.type == ElementType::float32;
            }
        }
    }
    max_objects_ = most(decoder_->tensor("input_points"), 1);
    max_points_ = most(decoder_->tensor("input_points"), 2);
    joins_images_ = max_objects_ > 1;
    for (const Slot& map : features_->slots()) {
        joins_images_ = joins_images_ && most(decoder_->tensor(map.name), 0) >= max_objects_;
    }
    const std::int64_t own_masks = most(decoder_->tensor("input_masks"), 1);
    if (own_masks < max_objects_) {
        throw BackendError("the decoder engine takes " + std::to_string(max_objects_) +
                           " objects but " + std::to_string(own_masks) +
                           " mask prompts: build it again");
    }
}

Layout Network::batch(std::int64_t images) const {
    Layout layout;
    for (const Slot& one : features_->slots()) {
        Shape shape = one.shape;
        shape[0] = images;
        layout.add(one.name, std::move(shape), one.type);
    }
    return layout;
}

Layout Network::inputs(const ShapeClass& shape) const {
    const auto type_of = [this](const std::string& name) { return decoder_->tensor(name).type; };
    Layout layout;
    layout.add("input_points", {1, shape.objects, shape.points, 2}, type_of("input_points"));
    layout.add("input_labels", {1, shape.objects, shape.points}, type_of("input_labels"));
    layout.add("has_input_masks", {1}, type_of("has_input_masks"));
    layout.add(job_name, {sizeof(MaskJob)}, ElementType::boolean);
    return layout;
}

Layout Network::masks(const ShapeClass& shape) const {
    const Size& size = manifest_.prompts.mask_size;
    Layout layout;
    layout.add("input_masks", {1, shape.masks, size.height, size.width},
               decoder_->tensor("input_masks").type);
    return layout;
}

Layout Network::outputs(const ShapeClass& shape) const {
    Layout layout;
    for (const std::string& name : output_names_) {
        const auto spec =
            std::find_if(manifest_.decoder.outputs.begin(), manifest_.decoder.outputs.end(),
                         [&name](const TensorSpec& s) { return s.name == name; });
        // Objects are the outputs' only dynamic axis.
        layout.add(name, shape_of(*spec, shape.objects), decoder_->tensor(name).type);
    }
    return layout;
}

ShapeClass Network::classify(std::int64_t objects, std::int64_t points, bool own_masks,
                             bool own_images) const {
    const std::int64_t count = padded(objects, object_counts, max_objects_);
    return {count, padded(points, point_counts, max_points_), own_masks ? count : 1,
            own_images ? count : 1};
}

std::vector<ShapeClass> Network::usual_classes() const {
    std::set<std::pair<std::int64_t, std::int64_t>> sizes;
    for (const std::int64_t objects : object_counts) {
        for (const std::int64_t points : point_counts) {
            sizes.emplace(std::min(objects, max_objects_), std::min(points, max_points_));
        }
    }
    std::vector<ShapeClass> classes;
    for (auto size = sizes.rbegin(); size != sizes.rend(); ++size) {
        classes.push_back({size->first, size->second, 1, 1});
    }
    return classes;
}

}  // namespace sam3rt
