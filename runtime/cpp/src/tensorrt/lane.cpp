#include "tensorrt/lane.hpp"

#include <atomic>
#include <cstring>


namespace sam3rt {
namespace {

// Classes of shapes whose contexts a lane keeps. Each holds a little device memory of TensorRT's
// own. A warm-up makes nine; the others are for calls in which each object has a mask prompt or an
// image of its own.
constexpr std::size_t kept_classes = 24;

std::uint64_t next_number() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
}

/// Set the shapes of all inputs of a layout but the job's.
void set_shapes(EngineContext& context, const Layout& layout) {
    for (const Slot& slot : layout.slots()) {
        if (slot.name != job_name) {
            context.set_shape(slot.name, slot.shape);
        }
    }
}

/// Whether only the best of each object's masks goes to the caller's device memory.
bool picks_best(const RunPart& part) {
    return part.masks->output != nullptr && part.masks->best_only &&
           part.results.at(0).shape()[2] > 1;
}

void store_labels(const std::int64_t* labels, std::size_t count, ElementType type,
                  std::uint8_t* target) {
    if (type == ElementType::int64) {
        std::memcpy(target, labels, count * sizeof(std::int64_t));
    } else if (type == ElementType::int32) {
        std::transform(labels, labels + count, reinterpret_cast<std::int32_t*>(target),
                       [](std::int64_t label) { return static_cast<std::int32_t>(label); });
    } else {
        throw BackendError(
            "the decoder engine takes labels that are not whole numbers: build it "
            "again");
    }
}

}  // namespace

DeviceFeatures::DeviceFeatures(Block block, std::shared_ptr<Memory> memory,
                               std::shared_ptr<const Layout> layout, std::string device)
    : block_(std::move(block)),
      memory_(std::move(memory)),
      layout_(std::move(layout)),
      device_(std::move(device)),
      number_(next_number()) {}

std::vector<Array<float>> DeviceFeatures::maps() const {
    const Cuda& cuda = memory_->cuda();
    const Cuda::Active active(cuda);
    const OwnStream stream(cuda);
    Bytes host(layout_->nbytes());
    cuda.download(host.data(), block_.address, host.size(), stream);
    cuda.synchronize(stream);
    std::vector<Array<float>> maps;
    for (const Slot& slot : layout_->slots()) {
        Array<float> map(slot.shape);
        load(host.data() + slot.offset, map.size(), slot.type, map.data());
        maps.push_back(std::move(map));
    }
    return maps;
}

DecoderLane::DecoderLane(const Network& network, const std::shared_ptr<Memory>& memory,
                         const Imaging& imaging)
    : network_(network),
      cuda_(memory->cuda()),
      memory_(memory),
      imaging_(imaging),
      stream_(cuda_),
      features_(memory->allocate(network.features()->nbytes())),
      inputs_(memory->allocate(network.inputs(network.largest()).nbytes())),
      prompts_(memory),
      uploads_(memory),
      results_(memory),
      pictures_(memory),
      search_(memory),
      jobs_(memory) {
    prompts_.pinned(inputs_.nbytes);
}

void DecoderLane::decode(const std::vector<RunPart>& parts,
                         const std::vector<std::string>& outputs) {
    try {
        idle_on_error(cuda_, stream_, [&] { run(parts, outputs); });
    } catch (const OutOfDeviceMemoryError&) {
        // So that there is room for another try, which may be for fewer objects.
        runs_.clear();
        for (Block* const block : {&images_, &scratch_, &masks_, &outputs_}) {
            *block = Block();
        }
        throw;
    }
}

void DecoderLane::run(const std::vector<RunPart>& parts, const std::vector<std::string>& outputs) {
    const RunPart& first = parts.front();
    std::size_t objects = 0;
    std::int64_t points = 0;
    bool own_images = false;
    for (const RunPart& part : parts) {
        objects += part.count;
        points = std::max(points, part.prompts.points.shape()[1]);
        own_images = own_images || part.features.number() != first.features.number();
    }
    const std::optional<Array<float>>& masks = first.prompts.masks;
    const bool own_masks = masks && (parts.size() > 1 || masks->shape()[0] > 1);
    const ShapeClass shape = network_.classify(static_cast<std::int64_t>(objects), points,
                                               own_masks, own_images);
    Run& ready = run_for(shape);
    const std::vector<MaskJob> jobs = mask_jobs(parts, ready.outputs[outputs.at(0)]);
    // One image's job is a part of what is recorded.
    const MaskJob own_job = jobs.size() == 1 ? jobs[0] : MaskJob{};
    std::memcpy(prompts_.pinned(inputs_.nbytes) + ready.inputs[job_name].offset, &own_job,
                sizeof(own_job));
    const std::uint64_t held = bring_features(ready, parts);
    fill_prompts(ready, parts);
    ready.replay->queue();
    if (jobs.size() > 1) {
        queue_jobs(jobs);
    }
    std::size_t start = ready.outputs.nbytes();
    std::size_t end = 0;
    for (const std::string& name : outputs) {
        const Slot& slot = ready.outputs[name];
        start = std::min(start, slot.offset);
        end = std::max(end, slot.offset + slot.nbytes());
    }
    std::uint8_t* const host = results_.pinned(end - start);
    cuda_.download(host, outputs_.address + start, end - start, stream_);
    const std::uint8_t* pictures = nullptr;
    if (!jobs.empty() && first.masks->output == nullptr) {
        std::size_t bytes = 0;
        for (const RunPart& part : parts) {
            bytes += part.count * part.mask_bytes;
        }
        std::uint8_t* const pinned = pictures_.pinned(bytes);
        cuda_.download(pinned, jobs[0].masks, bytes, stream_);
        pictures = pinned;
    }
    cuda_.synchronize(stream_);
    std::size_t object = 0;
    for (const RunPart& part : parts) {
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const Slot& slot = ready.outputs[outputs[i]];
            const std::size_t step = slot.count() / static_cast<std::size_t>(shape.objects);
            load(host + slot.offset - start + object * step * size_of(slot.type),
                 part.count * step, slot.type, part.results[i].data() + part.first * step);
        }
        object += part.count;
        if (pictures != nullptr) {
            const std::size_t bytes = part.count * part.mask_bytes;
            std::copy_n(pictures, bytes,
                        part.masks->masks->data() + part.first * part.mask_bytes);
            pictures += bytes;
        } else if (!jobs.empty() && picks_best(part)) {
            keep_best(part, jobs[0].masks);
        }
    }
    if (ready.replay->record()) {
        network_.decoder().keep_compiled();
    }
    held_ = held;
}

Array<std::uint8_t> DecoderLane::make_masks(const Array<float>& logits,
                                            const ImageGeometry& geometry,
                                            const Cleaning& cleaning) {
    return idle_on_error(cuda_, stream_, [&] {
        const Shape& shape = logits.shape();
        const std::size_t at = aligned(sizeof(MaskJob));
        const std::size_t bytes = at + logits.size() * sizeof(float);
        std::uint8_t* const host = uploads_.pinned(bytes);
        const DevicePointer place = uploads_.device(bytes);
        Array<std::uint8_t> masks(
            {shape[0], shape[1], geometry.original_size.height, geometry.original_size.width});
        const DevicePointer made = pictures_.device(masks.size());
        const auto planes = static_cast<std::size_t>(shape[0] * shape[1]);
        const MaskJob job = job_for(place + at, planes, planes, geometry, cleaning, made);
        std::memcpy(host, &job, sizeof(job));
        std::memcpy(host + at, logits.data(), logits.size() * sizeof(float));
        cuda_.upload(place, host, bytes, stream_);
        imaging_.queue_masks(place, stream_);
        cuda_.download(masks.data(), made, masks.size(), stream_);
        cuda_.synchronize(stream_);
        return masks;
    });
}

void DecoderLane::warm_up(const std::vector<ShapeClass>& shapes) {
    const std::shared_ptr<const Layout> layout = network_.features();
    const DeviceFeatures nothing(memory_->allocate(layout->nbytes(), true), memory_, layout, "");
    const std::vector<std::string>& names = network_.output_names();
    for (const ShapeClass& shape : shapes) {
        const PackedPrompts prompts{
            Array<float>(
                {shape.objects, shape.points, 2},
                std::vector<float>(static_cast<std::size_t>(shape.objects * shape.points * 2))),
            Array<std::int64_t>(
                {shape.objects, shape.points},
                std::vector<std::int64_t>(static_cast<std::size_t>(shape.objects * shape.points),
                                          padding_label)),
            std::nullopt, ""};
        std::vector<Array<float>> results;
        results.reserve(names.size());
        const Layout outputs = network_.outputs(shape);
        for (const std::string& name : names) {
            results.emplace_back(outputs[name].shape);
        }
        decode({{nothing, prompts, results, nullptr, 0, 0,
                 static_cast<std::size_t>(shape.objects)}},
               names);
    }
}

DecoderLane::Run& DecoderLane::run_for(const ShapeClass& shape) {
    const auto found = std::find_if(runs_.begin(), runs_.end(),
                                    [&shape](const Run& run) { return run.shape == shape; });
    if (found != runs_.end()) {
        runs_.splice(runs_.begin(), runs_, found);
        return runs_.front();
    }
    while (runs_.size() >= kept_classes) {
        runs_.pop_back();
    }
    Run run{shape,
            network_.batch(shape.images),
            network_.inputs(shape),
            network_.masks(shape),
            network_.outputs(shape),
            nullptr};
    auto context = network_.decoder().make_context();
    set_shapes(*context, run.maps);
    set_shapes(*context, run.inputs);
    set_shapes(*context, run.masks);
    make_room(scratch_, context->scratch_bytes());
    if (make_room(masks_, run.masks.nbytes())) {
        // What a decoder multiplies by 0 must be a number.
        const std::vector<std::uint8_t> zeros(run.masks.nbytes());
        cuda_.upload(masks_.address, zeros.data(), zeros.size(), stream_);
        cuda_.synchronize(stream_);
    }
    make_room(outputs_, run.outputs.nbytes());
    const bool own_images = shape.images > 1;
    if (own_images) {
        make_room(images_, run.maps.nbytes());
    }
    context->set_scratch(scratch_.address, scratch_.nbytes);
    set_addresses(*context, run.maps, own_images ? images_ : features_);
    set_addresses(*context, run.inputs, inputs_);
    set_addresses(*context, run.masks, masks_);
    set_addresses(*context, run.outputs, outputs_);
    check_shapes(*context, run.outputs);
    // It never moves: it is as large as prompts can be.
    const std::uint8_t* const packed = prompts_.pinned(inputs_.nbytes);
    run.replay = std::make_unique<Replay>(
        cuda_, stream_, std::move(context),
        [this, packed, bytes = run.inputs.nbytes(),
         job = inputs_.address + run.inputs[job_name].offset](EngineContext& ready) {
            cuda_.upload(inputs_.address, packed, bytes, stream_);
            ready.enqueue(stream_);
            if (imaging_.available()) {
                imaging_.queue_masks(job, stream_);
            }
        });
    runs_.push_front(std::move(run));
    return runs_.front();
}

bool DecoderLane::make_room(Block& block, std::size_t bytes) {
    bytes = std::max<std::size_t>(bytes, 1);
    if (block.nbytes >= bytes) {
        return false;
    }
    // What was recorded knows the old address.
    runs_.clear();
    block = Block();
    block = memory_->allocate(bytes);
    return true;
}

std::uint64_t DecoderLane::bring_features(const Run& run, const std::vector<RunPart>& parts) {
    if (run.shape.images == 1) {
        const DeviceFeatures& only = parts.front().features;
        if (!holds(only)) {
            // Known again when all went well.
            held_ = 0;
            cuda_.copy(features_.address, only.address(), only.nbytes(), stream_);
        }
        return only.number();
    }
    // Maps of padding objects are whatever lies there: no other object sees them.
    std::size_t object = 0;
    for (const RunPart& part : parts) {
        for (std::size_t i = 0; i < part.count; ++i, ++object) {
            for (const Slot& one : network_.features()->slots()) {
                const DevicePointer target = images_.address + run.maps[one.name].offset;
                cuda_.copy(target + object * one.nbytes(), part.features.address() + one.offset,
                           one.nbytes(), stream_);
            }
        }
    }
    return held_;
}

void DecoderLane::fill_prompts(const Run& run, const std::vector<RunPart>& parts) {
    std::uint8_t* const packed = prompts_.pinned(inputs_.nbytes);
    const auto padded = static_cast<std::size_t>(run.shape.points);
    const auto objects = static_cast<std::size_t>(run.shape.objects);
    std::vector<float> coordinates(objects * padded * 2);
    std::vector<std::int64_t> labels(objects * padded, padding_label);
    std::size_t object = 0;
    for (const RunPart& part : parts) {
        const auto points = static_cast<std::size_t>(part.prompts.points.shape()[1]);
        for (std::size_t i = 0; i < part.count; ++i, ++object) {
            const std::size_t source = (part.first + i) * points;
            std::copy_n(part.prompts.points.data() + source * 2, points * 2,
                        &coordinates[object * padded * 2]);
            std::copy_n(part.prompts.labels.data() + source, points, &labels[object * padded]);
        }
    }
    const Slot& points_slot = run.inputs["input_points"];
    store(coordinates.data(), coordinates.size(), points_slot.type, packed + points_slot.offset);
    const Slot& labels_slot = run.inputs["input_labels"];
    store_labels(labels.data(), labels.size(), labels_slot.type, packed + labels_slot.offset);
    const bool has_masks = parts.front().prompts.masks.has_value();
    const float present = has_masks ? 1.0F : 0.0F;
    const Slot& present_slot = run.inputs["has_input_masks"];
    store(&present, 1, present_slot.type, packed + present_slot.offset);
    if (has_masks) {
        fill_mask_prompts(run, parts);
    }
}

void DecoderLane::fill_mask_prompts(const Run& run, const std::vector<RunPart>& parts) {
    const Slot& slot = run.masks.slots()[0];
    const std::size_t plane = slot.count() / static_cast<std::size_t>(run.shape.masks);
    std::uint8_t* const host = uploads_.pinned(slot.nbytes());
    std::fill_n(host, slot.nbytes(), std::uint8_t{0});
    std::size_t object = 0;
    for (const RunPart& part : parts) {
        const Array<float>& masks = *part.prompts.masks;
        const bool is_shared = masks.shape()[0] == 1;
        const std::size_t count = run.shape.masks == 1 ? 1 : part.count;
        for (std::size_t i = 0; i < count; ++i, ++object) {
            store(masks.data() + (is_shared ? 0 : part.first + i) * plane, plane, slot.type,
                  host + object * plane * size_of(slot.type));
        }
    }
    cuda_.upload(masks_.address, host, slot.nbytes(), stream_);
}

std::vector<MaskJob> DecoderLane::mask_jobs(const std::vector<RunPart>& parts,
                                            const Slot& logits) {
    std::vector<MaskJob> jobs;
    const DeviceMasks* const masks = parts.front().masks;
    if (masks == nullptr) {
        return jobs;
    }
    const auto kinds = static_cast<std::size_t>(logits.shape[2]);
    const std::size_t plane = logits.count() * size_of(logits.type) /
                              static_cast<std::size_t>(logits.shape[1] * logits.shape[2]);
    std::size_t bytes = 0;
    std::size_t most = 0;
    for (const RunPart& part : parts) {
        bytes += part.count * part.mask_bytes;
        most = std::max(most, part.count * kinds);
    }
    DevicePointer made = 0;
    if (masks->output == nullptr || picks_best(parts.front())) {
        made = pictures_.device(bytes);
    } else {
        made = reinterpret_cast<DevicePointer>(masks->output) +
               parts.front().first * parts.front().mask_bytes;
    }
    if (masks->output != nullptr && parts.front().first == 0) {
        cuda_.wait_for(stream_, masks->stream);
    }
    DevicePointer source = outputs_.address + logits.offset;
    for (const RunPart& part : parts) {
        const std::size_t planes = part.count * kinds;
        jobs.push_back(job_for(source, planes, most, part.masks->geometry, part.masks->cleaning,
                               made));
        source += planes * plane;
        made += part.count * part.mask_bytes;
    }
    return jobs;
}

MaskJob DecoderLane::job_for(DevicePointer logits, std::size_t planes, std::size_t room,
                             const ImageGeometry& geometry, const Cleaning& cleaning,
                             DevicePointer masks) {
    MaskJob job = imaging_.mask_job(static_cast<std::int64_t>(planes), geometry, cleaning);
    job.logits = logits;
    job.masks = masks;
    if (Imaging::cleans(job)) {
        // Jobs of one run use it one after the other.
        const std::size_t each =
            aligned(room * sizeof(float) * static_cast<std::size_t>(job.size[0]) *
                    static_cast<std::size_t>(job.size[1]));
        const DevicePointer search = search_.device(3 * each);
        job.cleaned = search;
        job.parents = search + each;
        job.areas = search + 2 * each;
    }
    return job;
}

void DecoderLane::queue_jobs(const std::vector<MaskJob>& jobs) {
    constexpr std::size_t each = aligned(sizeof(MaskJob));
    std::uint8_t* const host = jobs_.pinned(jobs.size() * each);
    const DevicePointer place = jobs_.device(jobs.size() * each);
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        std::memcpy(host + i * each, &jobs[i], sizeof(MaskJob));
    }
    cuda_.upload(place, host, jobs.size() * each, stream_);
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        imaging_.queue_masks(place + i * each, stream_);
    }
}

void DecoderLane::keep_best(const RunPart& part, DevicePointer made) {
    const Array<float>& scores = part.results.at(1);
    const auto kinds = static_cast<std::size_t>(scores.shape()[2]);
    const std::size_t plane = part.mask_bytes / kinds;
    auto target = reinterpret_cast<DevicePointer>(part.masks->output) + part.first * plane;
    for (std::size_t i = 0; i < part.count; ++i, target += plane) {
        const std::size_t best = best_mask(scores.data() + (part.first + i) * kinds, kinds);
        cuda_.copy(target, made + (i * kinds + best) * plane, plane, stream_);
    }
    cuda_.synchronize(stream_);
}

}  // namespace sam3rt
