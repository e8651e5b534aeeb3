#include "tensorrt/imaging.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "log.hpp"
#include "resize.hpp"

namespace sam3rt {

/// The text of kernels.cu, which the build writes.
extern const char* const kernels_source;

namespace {

// Each kernel loops over what there is to do, so that one launch serves every size. These fill any
// GPU, and cost little where there is nothing to do.
constexpr unsigned blocks = 1024;
constexpr unsigned threads = 128;

void set(int (&target)[2], const Size& size) {
    target[0] = static_cast<int>(size.height);
    target[1] = static_cast<int>(size.width);
}

void set_step(float (&target)[2], const Size& from, const Size& to) {
    target[0] =
        static_cast<float>(static_cast<double>(from.height) / static_cast<double>(to.height));
    target[1] = static_cast<float>(static_cast<double>(from.width) / static_cast<double>(to.width));
}

/// The most inputs that an output of a resize takes.
int taps(int source, int filled) {
    return 2 * static_cast<int>(std::ceil(std::max(1.0, static_cast<double>(source) / filled))) + 1;
}

/// The largest whole number of pixels that an area allows.
int whole(double area) {
    return static_cast<int>(std::floor(std::min(std::max(area, 0.0), 2147483647.0)));
}

}  // namespace

Imaging::Imaging(const Manifest& manifest, Cuda& cuda) : manifest_(manifest), cuda_(cuda) {
    try {
        const Cuda::Active active(cuda);
        kernels_ = cuda.load_kernels(kernels_source,
                                     {"convert_image", "resize_weights", "resize_image", "find_runs",
                                      "join_runs", "count_areas", "clean_logits", "make_masks"});
    } catch (const BackendError& error) {
        log(LogLevel::warning,
            std::string("images and masks are resized on the host: ") + error.what());
    }
}

bool Imaging::resizes(const ImageGeometry& geometry) const {
    const bool rounds = manifest_.image.resize_dtype == ImageSpec::Rounding::uint8;
    return available() && !(rounds && rows_first(geometry.original_size, geometry.input_size));
}

ConvertJob Imaging::convert_job(const ImageView& image, DevicePointer rgb) {
    ConvertJob job{};
    job.image = reinterpret_cast<DevicePointer>(image.pixels);
    job.rgb = rgb;
    set(job.size, {image.height, image.width});
    job.step = static_cast<int>(bytes_per_pixel(image.format));
    job.row_stride = image.row_stride == 0 ? job.step * image.width : image.row_stride;
    if (is_planar(image.format)) {
        job.plane_stride = image.plane_stride == 0 ? image.height * job.row_stride
                                                   : static_cast<long long>(image.plane_stride);
    } else if (image.format != PixelFormat::grey) {
        const bool is_reversed =
            image.format == PixelFormat::bgr || image.format == PixelFormat::bgra;
        for (int channel = 0; channel < 3; ++channel) {
            job.places[channel] = is_reversed ? 2 - channel : channel;
        }
    }
    if (is_nv12(image.format)) {
        const std::array<int, 5> matrix = nv12_matrix(image.format);
        std::copy(matrix.begin(), matrix.end(), job.matrix);
    }
    return job;
}

ResizeJob Imaging::resize_job(const ImageGeometry& geometry) const {
    const ImageSpec& spec = manifest_.image;
    ResizeJob job{};
    set(job.source, geometry.original_size);
    set(job.filled, geometry.input_size);
    set(job.side, spec.size);
    for (int axis = 0; axis < 2; ++axis) {
        job.taps[axis] = taps(job.source[axis], job.filled[axis]);
    }
    job.rounds = spec.resize_dtype == ImageSpec::Rounding::uint8 ? 1 : 0;
    job.pad = spec.pad_value;
    std::copy_n(spec.mean, 3, job.mean);
    std::copy_n(spec.std, 3, job.std);
    return job;
}

std::size_t Imaging::span_bytes(const ResizeJob& job) {
    return sizeof(int) * 2 * static_cast<std::size_t>(job.filled[0] + job.filled[1]);
}

std::size_t Imaging::weight_bytes(const ResizeJob& job) {
    std::size_t count = 0;
    for (int axis = 0; axis < 2; ++axis) {
        count +=
            static_cast<std::size_t>(job.filled[axis]) * static_cast<std::size_t>(job.taps[axis]);
    }
    return sizeof(float) * count;
}

MaskJob Imaging::mask_job(std::int64_t planes, const ImageGeometry& geometry,
                          const Cleaning& cleaning) const {
    const Size& size = manifest_.masks.low_res_size;
    const Size& padded = manifest_.image.size;
    MaskJob job{};
    job.planes = static_cast<int>(planes);
    set(job.size, size);
    set(job.kept, geometry.input_size);
    set(job.target, geometry.original_size);
    if (manifest_.masks.upsampling == MaskSpec::Upsampling::unpad) {
        set(job.padded, padded);
        set_step(job.first_step, size, padded);
        set_step(job.step, geometry.input_size, geometry.original_size);
    } else {
        set_step(job.step, size, geometry.original_size);
    }
    job.max_hole = whole(cleaning.max_hole_area);
    job.max_sprinkle = whole(cleaning.max_sprinkle_area);
    job.threshold = static_cast<float>(cleaning.threshold);
    return job;
}

void Imaging::queue(std::size_t first, std::size_t end, DevicePointer job, Stream stream) const {
    for (std::size_t i = first; i < end; ++i) {
        cuda_.launch_kernel(kernels_[i], blocks, threads, job, stream);
    }
}

}  // namespace sam3rt
