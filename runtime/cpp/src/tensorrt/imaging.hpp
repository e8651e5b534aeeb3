// What surrounds the network, on the GPU: kernels.cu of the Python runtime, compiled by NVRTC.
#pragma once

#include <vector>

#include "bundle.hpp"
#include "geometry.hpp"
#include "postprocess.hpp"
#include "tensorrt/cuda.hpp"

namespace sam3rt {

/// The struct of this name in kernels.cu, whose comments describe it.
struct ConvertJob {
    DevicePointer image, rgb;
    long long row_stride, plane_stride;
    int size[2], step, places[3], matrix[5];
};

/// Likewise.
struct ResizeJob {
    DevicePointer image, pixels, spans, weights;
    int source[2], filled[2], side[2], taps[2];
    int rounds;
    float pad, mean[3], std[3];
};

/// Likewise.
struct MaskJob {
    DevicePointer logits, cleaned, parents, areas, masks;
    int planes, size[2], kept[2], target[2], padded[2];
    float first_step[2], step[2];
    int max_hole, max_sprinkle;
    float threshold;
};

/// Preprocessing and postprocessing on the device.
class Imaging {
public:
    /// Where the kernels cannot be compiled, the log says why, and all is left to the host.
    Imaging(const Manifest& manifest, Cuda& cuda);

    bool available() const { return !kernels_.empty(); }
    /// Whether the kernels resize such an image as the host does.
    bool resizes(const ImageGeometry& geometry) const;

    /// The job of copying an image in device memory to `rgb` as [height, width, 3].
    static ConvertJob convert_job(const ImageView& image, DevicePointer rgb);
    /// The job of resizing an image, without addresses, and the bytes of its two tables.
    ResizeJob resize_job(const ImageGeometry& geometry) const;
    static std::size_t span_bytes(const ResizeJob& job);
    static std::size_t weight_bytes(const ResizeJob& job);
    /// The job of making masks of so many low-resolution ones, without addresses.
    MaskJob mask_job(std::int64_t planes, const ImageGeometry& geometry,
                     const Cleaning& cleaning) const;
    static bool cleans(const MaskJob& job) { return job.max_hole > 0 || job.max_sprinkle > 0; }

    /// Queue what a job on the device says.
    void queue_convert(DevicePointer job, Stream stream) const { queue(0, 1, job, stream); }
    void queue_resize(DevicePointer job, Stream stream) const { queue(1, 3, job, stream); }
    void queue_masks(DevicePointer job, Stream stream) const {
        queue(3, kernels_.size(), job, stream);
    }

private:
    void queue(std::size_t first, std::size_t end, DevicePointer job, Stream stream) const;

    const Manifest& manifest_;
    const Cuda& cuda_;
    std::vector<Kernel> kernels_;
};

}  // namespace sam3rt
