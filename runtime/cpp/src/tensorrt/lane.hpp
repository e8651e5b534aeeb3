// A lane: a stream, contexts and buffers, all that one thread needs to run an engine. It serves one
// call at a time, to its end: every method returns, or throws, with the stream idle, and needs the
// GPU to be the thread's current one.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "backend.hpp"
#include "tensorrt/imaging.hpp"
#include "tensorrt/memory.hpp"
#include "tensorrt/network.hpp"

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

/// A stream with an owner.
class OwnStream {
public:
    explicit OwnStream(const Cuda& cuda) : cuda_(cuda), stream_(cuda.create_stream()) {}
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;
    ~OwnStream();

    operator Stream() const { return stream_; }

private:
    const Cuda& cuda_;
    const Stream stream_;
};

/// Queues the same work again and again: as a CUDA graph, once it has run. TensorRT wants a run
/// before the recording, and a context of its own for each recording.
class Replay {
public:
    Replay(const Cuda& cuda, Stream stream, std::unique_ptr<EngineContext> context,
           std::function<void(EngineContext&)> work)
        : cuda_(cuda), stream_(stream), context_(std::move(context)), work_(std::move(work)) {}
    Replay(const Replay&) = delete;
    Replay& operator=(const Replay&) = delete;
    ~Replay();

    void queue();
    /// Make the graph, once, with the stream idle and a run behind it. Whether this was the first
    /// run.
    bool record();

private:
    const Cuda& cuda_;
    const Stream stream_;
    const std::unique_ptr<EngineContext> context_;
    const std::function<void(EngineContext&)> work_;
    Graph graph_ = nullptr;
    bool tried_ = false;
};

/// Runs the encoder, one image at a time.
class EncoderLane {
public:
    EncoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                const Imaging& imaging);

    /// Encode float32 [1, 3, H, W]: a block with the feature maps.
    Block encode(const Array<float>& pixels);
    /// Resize and normalize an image on the device and encode it.
    Block encode(const ImageView& image, const ImageGeometry& geometry);
    /// What that would encode.
    Array<float> pixels(const ImageView& image, const ImageGeometry& geometry);

private:
    void queue_resize(const ImageView& image, const ImageGeometry& geometry);
    Block run();

    const Network& network_;
    const std::shared_ptr<Memory> memory_;
    const Cuda& cuda_;
    const Imaging& imaging_;
    OwnStream stream_;
    Block scratch_;
    Block pixels_;
    Block features_;
    GrowingBuffer images_;
    GrowingBuffer tables_;
    std::optional<Replay> replay_;
};

/// Runs the decoder. Memory is taken for the shapes in use.
class DecoderLane {
public:
    DecoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                const Imaging& imaging);

    /// Run the decoder on `count` objects of the prompts, at most as many as the engine takes, from
    /// one on. The named outputs go to that place of `results`, [1, P, ...] each; masks of the
    /// first one, if they are wanted, to that place of masks [P, C, H, W].
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

    /// Masks that are being made.
    struct Making {
        DevicePointer masks = 0;
        std::size_t nbytes = 0;
    };

    Run& run_for(const ShapeClass& shape);
    /// Whether the block is a new one.
    bool make_room(Block& block, std::size_t bytes);
    void fill_prompts(const Run& run, const PackedPrompts& prompts, std::size_t first,
                      std::size_t count);
    MaskJob job_for(DevicePointer logits, std::int64_t planes, const ImageGeometry& geometry,
                    const Cleaning& cleaning, Making& making);

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
