// The lane that encodes: like a decoder's, it serves one call at a time, and returns, or throws, with
// its stream idle.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "geometry.hpp"
#include "tensorrt/imaging.hpp"
#include "tensorrt/memory.hpp"
#include "tensorrt/network.hpp"
#include "tensorrt/replay.hpp"

namespace sam3rt {

/// One image to encode.
struct EncoderInput {
    ImageView image;
    ImageGeometry geometry;
    /// The encoder's input, float32 [1, 3, H, W], where the host has resized the image.
    std::optional<Array<float>> pixels;
};

/// Runs the encoder, on several images at a time where the engine takes them. Memory is taken for
/// the numbers of images in use. Methods need the GPU to be the thread's current one.
class EncoderLane {
public:
    EncoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                const Imaging& imaging);

    /// Encode images, at most as many as the engine takes: a block for each one's feature maps.
    std::vector<Block> encode(const std::vector<EncoderInput>& inputs);
    /// What that would encode of one image: float32 [1, 3, H, W].
    Array<float> pixels(const EncoderInput& input);
    /// An image in device memory, whatever its format, as uint8 [H, W, 3] on the host.
    Array<std::uint8_t> as_rgb(const ImageView& image);

private:
    /// Bring what is to be encoded into the encoder's input, once there is room for all.
    void queue_inputs(const std::vector<EncoderInput>& inputs);
    Replay& run_for(std::size_t images);
    void make_room(Block& block, std::size_t bytes);

    const Network& network_;
    const std::shared_ptr<Memory> memory_;
    const Cuda& cuda_;
    const Imaging& imaging_;
    OwnStream stream_;
    Block scratch_;
    Block pixels_;
    Block maps_;
    GrowingBuffer images_;
    GrowingBuffer tables_;
    /// By the number of images. Addresses are theirs for good, so they go when a block does.
    std::map<std::size_t, Replay> runs_;
};

}  // namespace sam3rt
