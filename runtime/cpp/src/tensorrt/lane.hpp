// A lane: a stream, contexts and buffers, all that one thread needs to run the decoder. It serves one
// call at a time, to its end: every method returns, or throws, with the stream idle, and needs the
// GPU to be the thread's current one.
#pragma once

#include <list>
#include <memory>
#include <vector>

#include "backend.hpp"
#include "tensorrt/imaging.hpp"
#include "tensorrt/memory.hpp"
#include "tensorrt/network.hpp"
#include "tensorrt/replay.hpp"

namespace sam3rt {

/// One image's feature maps in a device block of their own.
class DeviceFeatures : public Features {
public:
    DeviceFeatures(Block block, std::shared_ptr<Memory> memory,
                   std::shared_ptr<const Layout> layout, std::string device);

    std::string device() const override { return device_; }
    std::size_t nbytes() const override { return layout_->nbytes(); }
    std::vector<Array<float>> maps() const override;

    const Layout& layout() const { return *layout_; }
    DevicePointer address() const { return block_.address; }
    /// No other feature maps of this process have the same.
    std::uint64_t number() const { return number_; }

private:
    const Block block_;
    const std::shared_ptr<Memory> memory_;
    const std::shared_ptr<const Layout> layout_;
    const std::string device_;
    const std::uint64_t number_;
};

/// Some objects of one image, for a run of the decoder.
struct RunPart {
    const DeviceFeatures& features;
    const PackedPrompts& prompts;
    /// The outputs of all the image's objects, [1, P, ...] each.
    std::vector<Array<float>>& results;
    /// Masks of all the image's objects, or null for none.
    DeviceMasks* masks;
    /// Bytes of one object's masks.
    std::size_t mask_bytes;
    /// The number of the first object among the image's.
    std::size_t first;
    /// How many objects there are.
    std::size_t count;
};

/// Runs the decoder. Memory is taken for the shapes in use.
class DecoderLane {
public:
    DecoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                const Imaging& imaging);

    /// Run the decoder on objects of one image or, if the engine joins them, of several: together
    /// at most as many as it takes, all with mask prompts or none. The named outputs go to the
    /// objects' place in their image's results; masks of the first output, if they are wanted, to
    /// their place in its masks. The second output are the scores of the masks. Only a run on one
    /// part may leave masks in the caller's device memory.
    void decode(const std::vector<RunPart>& parts, const std::vector<std::string>& outputs);

    /// What that would make of float32 [P, C, h, w]: [P, C, H, W] of 0 and 1.
    Array<std::uint8_t> make_masks(const Array<float>& logits, const ImageGeometry& geometry,
                                   const Cleaning& cleaning);

    /// Run the decoder for classes of shapes, and record it.
    void warm_up(const std::vector<ShapeClass>& shapes);

    /// Whether its fixed buffers hold these feature maps.
    bool holds(const DeviceFeatures& features) const { return held_ == features.number(); }

private:
    /// The decoder for one class of shapes.
    struct Run {
        ShapeClass shape;
        Layout maps;
        Layout inputs;
        Layout masks;
        Layout outputs;
        std::unique_ptr<Replay> replay;
    };

    void run(const std::vector<RunPart>& parts, const std::vector<std::string>& outputs);
    Run& run_for(const ShapeClass& shape);
    /// Whether the block is a new one.
    bool make_room(Block& block, std::size_t bytes);
    /// Queue copies of feature maps to where a run reads them, unless they are there. Returns the
    /// number of those that features_ then holds.
    std::uint64_t bring_features(const Run& run, const std::vector<RunPart>& parts);
    void fill_prompts(const Run& run, const std::vector<RunPart>& parts);
    void fill_mask_prompts(const Run& run, const std::vector<RunPart>& parts);
    /// The jobs of making the parts' masks, of the logits in a slot of the outputs; none where no
    /// masks are wanted.
    std::vector<MaskJob> mask_jobs(const std::vector<RunPart>& parts, const Slot& logits);
    /// A job that has room to clean so many planes.
    MaskJob job_for(DevicePointer logits, std::size_t planes, std::size_t room,
                    const ImageGeometry& geometry, const Cleaning& cleaning, DevicePointer masks);
    /// Queue jobs that are not in a run's own block.
    void queue_jobs(const std::vector<MaskJob>& jobs);
    /// Copy the best mask of each object to the caller's device memory.
    void keep_best(const RunPart& part, DevicePointer made);

    const Network& network_;
    const Cuda& cuda_;
    const std::shared_ptr<Memory> memory_;
    const Imaging& imaging_;
    OwnStream stream_;
    Block features_;
    Block images_;
    Block inputs_;
    Block scratch_;
    Block masks_;
    Block outputs_;
    /// Pinned only, for what goes to the fixed buffers and comes from them.
    GrowingBuffer prompts_;
    GrowingBuffer uploads_;
    GrowingBuffer results_;
    GrowingBuffer pictures_;
    GrowingBuffer search_;
    GrowingBuffer jobs_;
    /// The one used last stands first. Addresses are theirs for good, so they go when a block does.
    std::list<Run> runs_;
    std::uint64_t held_ = 0;
};

}  // namespace sam3rt
