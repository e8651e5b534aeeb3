#include "tensorrt/lane.hpp"

#include <atomic>
#include <cstring>


namespace sam3rt {
namespace {

// Classes of shapes whose contexts a lane keeps. Each holds a little device memory of TensorRT's
// own. A warm-up makes nine; another nine are for calls in which each object has a mask prompt.
constexpr std::size_t kept_classes = 18;

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

/// Bytes of one mask.
std::size_t picture_size(const ImageGeometry& geometry) {
    return static_cast<std::size_t>(geometry.original_size.height * geometry.original_size.width);
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
      search_(memory) {
    prompts_.pinned(inputs_.nbytes);
}

void DecoderLane::decode(const DeviceFeatures& features, const PackedPrompts& prompts,
                         std::size_t first, std::size_t count,
                         const std::vector<std::string>& outputs,
                         std::vector<Array<float>>& results, DeviceMasks* masks) {
    const bool own_masks = prompts.masks && prompts.masks->shape()[0] > 1;
    const ShapeClass shape =
        network_.classify(static_cast<std::int64_t>(count), prompts.points.shape()[1], own_masks);
    // What the buffers hold is known again when all went well.
    const bool is_held = holds(features);
    held_ = 0;
    idle_on_error(cuda_, stream_, [&] {
        Run& run = run_for(shape);
        std::uint8_t* const packed = prompts_.pinned(inputs_.nbytes);
        MaskJob job{};
        const Slot& logits = run.outputs[outputs.at(0)];
        const auto kinds = static_cast<std::size_t>(logits.shape[2]);
        const std::size_t made_bytes =
            masks == nullptr ? 0 : count * kinds * picture_size(masks->geometry);
        const bool stays = masks != nullptr && masks->output != nullptr;
        const bool picks = stays && masks->best_only && kinds > 1;
        DevicePointer made = 0;
        if (stays && first == 0) {
            cuda_.wait_for(stream_, masks->stream);
        }
        if (masks != nullptr) {
            made = stays && !picks ? reinterpret_cast<DevicePointer>(masks->output) +
                                         first * (made_bytes / count)
                                   : pictures_.device(made_bytes);
            job = job_for(outputs_.address + logits.offset,
                          static_cast<std::int64_t>(count * kinds), masks->geometry,
                          masks->cleaning, made);
        }
        std::memcpy(packed + run.inputs[job_name].offset, &job, sizeof(job));
        if (!is_held) {
            cuda_.copy(features_.address, features.address(), features.nbytes(), stream_);
        }
        fill_prompts(run, prompts, first, count);
        run.replay->queue();
        std::size_t start = run.outputs.nbytes();
        std::size_t end = 0;
        for (const std::string& name : outputs) {
            const Slot& slot = run.outputs[name];
            start = std::min(start, slot.offset);
            end = std::max(end, slot.offset + slot.nbytes());
        }
        std::uint8_t* const host = results_.pinned(end - start);
        cuda_.download(host, outputs_.address + start, end - start, stream_);
        const std::uint8_t* pictures = nullptr;
        if (masks != nullptr && !stays) {
            std::uint8_t* const pinned = pictures_.pinned(made_bytes);
            cuda_.download(pinned, made, made_bytes, stream_);
            pictures = pinned;
        }
        cuda_.synchronize(stream_);
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const Slot& slot = run.outputs[outputs[i]];
            const std::size_t step = slot.count() / static_cast<std::size_t>(shape.objects);
            load(host + slot.offset - start, count * step, slot.type,
                 results[i].data() + first * step);
        }
        if (pictures != nullptr) {
            std::copy_n(pictures, made_bytes,
                        masks->masks->data() + first * (made_bytes / count));
        } else if (picks) {
            keep_best(*masks, results.at(1).data(), made, first, count, kinds);
        }
        if (run.replay->record()) {
            network_.decoder().keep_compiled();
        }
    });
    held_ = features.number();
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
        const MaskJob job = job_for(place + at, shape[0] * shape[1], geometry, cleaning, made);
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
        decode(nothing, prompts, 0, static_cast<std::size_t>(shape.objects), names, results,
               nullptr);
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
    Run run{shape, network_.inputs(shape), network_.masks(shape), network_.outputs(shape), nullptr};
    auto context = network_.decoder().make_context();
    set_shapes(*context, *network_.features());
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
    context->set_scratch(scratch_.address, scratch_.nbytes);
    set_addresses(*context, *network_.features(), features_);
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

void DecoderLane::fill_prompts(const Run& run, const PackedPrompts& prompts, std::size_t first,
                               std::size_t count) {
    std::uint8_t* const packed = prompts_.pinned(inputs_.nbytes);
    const auto points = static_cast<std::size_t>(prompts.points.shape()[1]);
    const auto padded = static_cast<std::size_t>(run.shape.points);
    const auto objects = static_cast<std::size_t>(run.shape.objects);
    std::vector<float> coordinates(objects * padded * 2);
    std::vector<std::int64_t> labels(objects * padded, padding_label);
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t source = (first + i) * points;
        std::copy_n(prompts.points.data() + source * 2, points * 2, &coordinates[i * padded * 2]);
        std::copy_n(prompts.labels.data() + source, points, &labels[i * padded]);
    }
    const Slot& points_slot = run.inputs["input_points"];
    store(coordinates.data(), coordinates.size(), points_slot.type, packed + points_slot.offset);
    const Slot& labels_slot = run.inputs["input_labels"];
    store_labels(labels.data(), labels.size(), labels_slot.type, packed + labels_slot.offset);
    const float present = prompts.masks ? 1.0F : 0.0F;
    const Slot& present_slot = run.inputs["has_input_masks"];
    store(&present, 1, present_slot.type, packed + present_slot.offset);
    if (!prompts.masks) {
        return;
    }
    const Slot& slot = run.masks.slots()[0];
    std::uint8_t* const host = uploads_.pinned(slot.nbytes());
    std::fill_n(host, slot.nbytes(), std::uint8_t{0});
    const bool is_shared = prompts.masks->shape()[0] == 1;
    const std::size_t plane =
        prompts.masks->size() / static_cast<std::size_t>(prompts.masks->shape()[0]);
    store(prompts.masks->data() + (is_shared ? 0 : first * plane), (is_shared ? 1 : count) * plane,
          slot.type, host);
    cuda_.upload(masks_.address, host, slot.nbytes(), stream_);
}

MaskJob DecoderLane::job_for(DevicePointer logits, std::int64_t planes,
                             const ImageGeometry& geometry, const Cleaning& cleaning,
                             DevicePointer masks) {
    MaskJob job = imaging_.mask_job(planes, geometry, cleaning);
    job.logits = logits;
    job.masks = masks;
    if (Imaging::cleans(job)) {
        const std::size_t each =
            aligned(static_cast<std::size_t>(planes) * sizeof(float) *
                    static_cast<std::size_t>(job.size[0]) * static_cast<std::size_t>(job.size[1]));
        const DevicePointer search = search_.device(3 * each);
        job.cleaned = search;
        job.parents = search + each;
        job.areas = search + 2 * each;
    }
    return job;
}

void DecoderLane::keep_best(const DeviceMasks& masks, const float* scores, DevicePointer made,
                            std::size_t first, std::size_t count, std::size_t kinds) {
    const std::size_t plane = picture_size(masks.geometry);
    auto target = reinterpret_cast<DevicePointer>(masks.output) + first * plane;
    for (std::size_t i = 0; i < count; ++i, target += plane) {
        const std::size_t best = best_mask(scores + (first + i) * kinds, kinds);
        cuda_.copy(target, made + (i * kinds + best) * plane, plane, stream_);
    }
    cuda_.synchronize(stream_);
}

}  // namespace sam3rt
