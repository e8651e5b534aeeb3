#include "tensorrt/together.hpp"

#include <algorithm>
#include <map>
#include <tuple>

namespace sam3rt {
namespace {

// Bytes of masks that are made at once; more objects take several turns.
constexpr std::size_t most_masks = std::size_t{128} << 20;

/// A run that is not full yet.
struct OpenRun {
    std::vector<RunPart> parts;
    std::size_t objects = 0;
    std::size_t bytes = 0;
};

}  // namespace

std::vector<std::vector<RunPart>> share_runs(const std::vector<RunPart>& images,
                                             const Network& network, bool joins) {
    const auto most_objects = static_cast<std::size_t>(network.max_objects());
    std::vector<std::vector<RunPart>> full;
    std::map<std::tuple<std::size_t, std::int64_t, bool>, OpenRun> open;
    for (std::size_t i = 0; i < images.size(); ++i) {
        const RunPart& image = images[i];
        const std::int64_t points =
            network.classify(1, image.prompts.points.shape()[1], false, false).points;
        OpenRun& run = open[{joins ? 0 : i, points, image.prompts.masks.has_value()}];
        const std::size_t at_once = std::clamp<std::size_t>(
            most_masks / std::max<std::size_t>(image.mask_bytes, 1), 1, most_objects);
        for (std::size_t done = 0; done < image.count; done += at_once) {
            const std::size_t count = std::min(at_once, image.count - done);
            const std::size_t bytes = count * image.mask_bytes;
            if (!run.parts.empty() &&
                (run.objects + count > most_objects || run.bytes + bytes > most_masks)) {
                full.push_back(std::move(run.parts));
                run = OpenRun();
            }
            run.parts.push_back({image.features, image.prompts, image.results, image.masks,
                                 image.mask_bytes, image.first + done, count});
            run.objects += count;
            run.bytes += bytes;
        }
    }
    for (auto& [kind, run] : open) {
        full.push_back(std::move(run.parts));
    }
    return full;
}

}  // namespace sam3rt
