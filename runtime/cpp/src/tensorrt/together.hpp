// Objects of several images in common runs of the decoder.
#pragma once

#include <vector>

#include "tensorrt/lane.hpp"

namespace sam3rt {

/// Divide the objects of images, each a part of its own, among as few runs as their sizes allow:
/// as many objects as the engine takes, and masks of no more bytes than are made at once.
///
/// An object's points are padded as if it were alone, so that it has the same result: only objects
/// of one class of points share a run. All objects of a run have mask prompts, or none has. Unless
/// `joins`, all objects of a run are of one image.
std::vector<std::vector<RunPart>> share_runs(const std::vector<RunPart>& images,
                                             const Network& network, bool joins);

}  // namespace sam3rt
