#include "tensorrt/encoder.hpp"

#include <cstring>

#include "resize.hpp"

namespace sam3rt {
namespace {

/// Where an image's jobs lie among those of all images, and how much room they take.
constexpr std::size_t convert_offset = aligned(sizeof(ResizeJob));
constexpr std::size_t job_bytes = convert_offset + aligned(sizeof(ConvertJob));

std::size_t rgb_bytes(const ImageView& image) {
    return static_cast<std::size_t>(image.height * image.width * 3);
}

/// Whether the kernel that resizes can read an image where it is.
bool is_ready(const ImageView& image) {
    return image.on_device && image.format == PixelFormat::rgb &&
           (image.row_stride == 0 || image.row_stride == image.width * 3);
}

}  // namespace

EncoderLane::EncoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                         const Imaging& imaging)
    : network_(network),
      memory_(memory),
      cuda_(memory->cuda()),
      imaging_(imaging),
      stream_(cuda_),
      images_(memory),
      tables_(memory) {
    run_for(1);
}

std::vector<Block> EncoderLane::encode(const std::vector<EncoderInput>& inputs) {
    return idle_on_error(cuda_, stream_, [&] {
        Replay& run = run_for(inputs.size());
        queue_inputs(inputs);
        std::vector<Block> blocks;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            blocks.push_back(memory_->allocate(network_.features()->nbytes(), true));
        }
        run.queue();
        const Layout& one = *network_.features();
        const Layout all = network_.batch(static_cast<std::int64_t>(inputs.size()));
        for (std::size_t map = 0; map < one.slots().size(); ++map) {
            const Slot& slot = one.slots()[map];
            for (std::size_t i = 0; i < blocks.size(); ++i) {
                cuda_.copy(blocks[i].address + slot.offset,
                           maps_.address + all.slots()[map].offset + i * slot.nbytes(),
                           slot.nbytes(), stream_);
            }
        }
        cuda_.synchronize(stream_);
        if (run.record()) {
            network_.encoder().keep_compiled();
        }
        return blocks;
    });
}

Array<float> EncoderLane::pixels(const EncoderInput& input) {
    return idle_on_error(cuda_, stream_, [&] {
        queue_inputs({input});
        Array<float> pixels(network_.pixels().shape);
        cuda_.download(pixels.data(), pixels_.address, pixels.size() * sizeof(float), stream_);
        cuda_.synchronize(stream_);
        return pixels;
    });
}

Array<std::uint8_t> EncoderLane::as_rgb(const ImageView& image) {
    return idle_on_error(cuda_, stream_, [&] {
        Array<std::uint8_t> rgb({image.height, image.width, 3});
        const DevicePointer converted = images_.device(rgb.size());
        const ConvertJob job = Imaging::convert_job(image, converted);
        std::uint8_t* const host = tables_.pinned(sizeof(job));
        const DevicePointer place = tables_.device(sizeof(job));
        std::memcpy(host, &job, sizeof(job));
        cuda_.wait_for(stream_, image.stream);
        cuda_.upload(place, host, sizeof(job), stream_);
        imaging_.queue_convert(place, stream_);
        cuda_.download(rgb.data(), converted, rgb.size(), stream_);
        cuda_.synchronize(stream_);
        return rgb;
    });
}

void EncoderLane::queue_inputs(const std::vector<EncoderInput>& inputs) {
    const Slot& slot = network_.pixels();
    std::size_t host_bytes = 0;
    std::size_t image_bytes = 0;
    std::size_t table_bytes = inputs.size() * job_bytes;
    for (const auto& [image, geometry, pixels] : inputs) {
        if (pixels) {
            host_bytes += aligned(slot.nbytes());
            continue;
        }
        const ResizeJob job = imaging_.resize_job(geometry);
        table_bytes += aligned(Imaging::span_bytes(job)) + aligned(Imaging::weight_bytes(job));
        host_bytes += image.on_device ? 0 : aligned(rgb_bytes(image));
        image_bytes += is_ready(image) ? 0 : aligned(rgb_bytes(image));
    }
    std::uint8_t* host = images_.pinned(host_bytes);
    DevicePointer rgb = images_.device(image_bytes);
    std::uint8_t* const jobs = tables_.pinned(inputs.size() * job_bytes);
    const DevicePointer places = tables_.device(table_bytes);
    DevicePointer tables = places + inputs.size() * job_bytes;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const auto& [image, geometry, pixels] = inputs[i];
        const DevicePointer target = pixels_.address + i * slot.nbytes();
        if (pixels) {
            store(pixels->data(), pixels->size(), slot.type, host);
            cuda_.upload(target, host, slot.nbytes(), stream_);
            host += aligned(slot.nbytes());
            continue;
        }
        ResizeJob job = imaging_.resize_job(geometry);
        job.pixels = target;
        job.spans = tables;
        job.weights = tables + aligned(Imaging::span_bytes(job));
        tables = job.weights + aligned(Imaging::weight_bytes(job));
        if (is_ready(image)) {
            job.image = reinterpret_cast<DevicePointer>(image.pixels);
        } else {
            job.image = rgb;
            rgb += aligned(rgb_bytes(image));
        }
        if (image.on_device) {
            cuda_.wait_for(stream_, image.stream);
            const ConvertJob convert = Imaging::convert_job(image, job.image);
            std::memcpy(jobs + i * job_bytes + convert_offset, &convert, sizeof(convert));
        } else {
            copy_as_rgb(image, host);
            cuda_.upload(job.image, host, rgb_bytes(image), stream_);
            host += aligned(rgb_bytes(image));
        }
        std::memcpy(jobs + i * job_bytes, &job, sizeof(job));
    }
    cuda_.upload(places, jobs, inputs.size() * job_bytes, stream_);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const EncoderInput& input = inputs[i];
        const DevicePointer place = places + i * job_bytes;
        if (input.pixels) {
            continue;
        }
        if (input.image.on_device && !is_ready(input.image)) {
            imaging_.queue_convert(place + convert_offset, stream_);
        }
        imaging_.queue_resize(place, stream_);
    }
}

Replay& EncoderLane::run_for(std::size_t images) {
    const auto found = runs_.find(images);
    if (found != runs_.end()) {
        return found->second;
    }
    const Slot& slot = network_.pixels();
    const Layout layout = network_.batch(static_cast<std::int64_t>(images));
    Shape shape = slot.shape;
    shape[0] = static_cast<std::int64_t>(images);
    auto context = network_.encoder().make_context();
    context->set_shape(slot.name, shape);
    make_room(scratch_, context->scratch_bytes());
    make_room(pixels_, images * slot.nbytes());
    make_room(maps_, layout.nbytes());
    context->set_scratch(scratch_.address, scratch_.nbytes);
    context->set_address(slot.name, pixels_.address);
    set_addresses(*context, layout, maps_);
    check_shapes(*context, layout);
    return runs_
        .try_emplace(images, cuda_, stream_, std::move(context),
                     [this](EngineContext& ready) { ready.enqueue(stream_); })
        .first->second;
}

void EncoderLane::make_room(Block& block, std::size_t bytes) {
    if (block.nbytes < bytes || block.address == 0) {
        // What was recorded knows the old address.
        runs_.clear();
        block = Block();
        block = memory_->allocate(bytes);
    }
}

}  // namespace sam3rt
