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

/// Runs the decoder. Memory is taken for the shapes in use.
class DecoderLane {
public:
    DecoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                const Imaging& imaging);

    /// Run the decoder on `count` objects of the prompts, at most as many as the engine takes, from
    /// one on. The named outputs go to that place of `results`, [1, P, ...] each; masks of the
    /// first one, if they are wanted, to that place of masks [P, C, H, W]. The second one are their
    /// scores.
    void decode(const DeviceFeatures& features, const PackedPrompts& prompts, std::size_t first,
                std::size_t count, const std::vector<std::string>& outputs,
                std::vector<Array<float>>& results, DeviceMasks* masks);

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
        Layout inputs;
        Layout masks;
        Layout outputs;
        std::unique_ptr<Replay> replay;
    };

    Run& run_for(const ShapeClass& shape);
    /// Whether the block is a new one.
    bool make_room(Block& block, std::size_t bytes);
    void fill_prompts(const Run& run, const PackedPrompts& prompts, std::size_t first,
                      std::size_t count);
    MaskJob job_for(DevicePointer logits, std::int64_t planes, const ImageGeometry& geometry,
                    const Cleaning& cleaning, DevicePointer masks);
    /// Copy the best mask of each object to the caller's device memory.
    void keep_best(const DeviceMasks& masks, const float* scores, DevicePointer made,
                   std::size_t first, std::size_t count, std::size_t kinds);

    const Network& network_;
    const Cuda& cuda_;
    const std::shared_ptr<Memory> memory_;
    const Imaging& imaging_;
    OwnStream stream_;
    Block features_;
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
    /// The one used last stands first. Addresses are theirs for good, so they go when a block does.
    std::list<Run> runs_;
    std::uint64_t held_ = 0;
};

}  // namespace sam3rt
