#include "ort_features.hpp"

#include <algorithm>

namespace sam3rt {
namespace {

// About 30 MB each for SAM 3, on top of the features. Calls on more images in turn compute it anew.
constexpr std::size_t kept_images = 4;

Array<float> copy_of(const Ort::Value& value) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        throw BackendError("a graph returned a tensor of another type than float32");
    }
    return Array<float>(info.GetShape(), value.GetTensorData<float>(), info.GetElementCount());
}

}  // namespace

std::shared_ptr<const CutValues> ImageSide::find(Slot& slot) {
    const std::lock_guard<std::mutex> lock(slot.mutex);
    return slot.values;
}

void ImageSide::keep(const std::shared_ptr<Slot>& slot,
                     const std::shared_ptr<const CutValues>& values) {
    {
        const std::lock_guard<std::mutex> lock(slot->mutex);
        slot->values = values;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    recent_.remove_if([&slot](const std::weak_ptr<Slot>& kept) {
        const std::shared_ptr<Slot> found = kept.lock();
        return found == nullptr || found == slot;
    });
    recent_.push_back(slot);
    while (recent_.size() > kept_images) {
        if (const std::shared_ptr<Slot> oldest = recent_.front().lock()) {
            const std::lock_guard<std::mutex> oldest_lock(oldest->mutex);
            oldest->values = nullptr;
        }
        recent_.pop_front();
    }
}

FeatureTransfer::FeatureTransfer(const Device& device, const std::string& dtype)
    : half_(dtype == "float16") {
    if (!half_ && dtype != "float32") {
        throw BackendError("feature maps of type " + dtype + " are not known");
    }
    if (device.on_gpu()) {
        copier_.emplace(device, element_types().at(dtype));
    }
}

Array<float> FeatureTransfer::to_host(const Ort::Value& value) const {
    std::optional<Ort::Value> copied;
    if (copier_) {
        copied.emplace(copier_->to_host(value));
    }
    const Ort::Value& host = copied ? *copied : value;
    const auto info = host.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        return copy_of(host);
    }
    Array<float> map(info.GetShape());
    const auto* values = host.GetTensorData<Ort::Float16_t>();
    std::transform(values, values + map.size(), map.data(),
                   [](const Ort::Float16_t& number) { return number.ToFloat(); });
    return map;
}

Ort::Value FeatureTransfer::to_device(const Array<float>& map) const {
    Ort::AllocatorWithDefaultOptions allocator;
    const Shape& shape = map.shape();
    Ort::Value host{nullptr};
    if (half_) {
        host = Ort::Value::CreateTensor<Ort::Float16_t>(allocator, shape.data(), shape.size());
        std::transform(map.begin(), map.end(), host.GetTensorMutableData<Ort::Float16_t>(),
                       [](float number) { return Ort::Float16_t(number); });
    } else {
        host = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
        std::copy(map.begin(), map.end(), host.GetTensorMutableData<float>());
    }
    return copier_ ? copier_->to_device(host) : std::move(host);
}

std::size_t OrtFeatures::nbytes() const {
    std::size_t total = 0;
    for (const Ort::Value& value : values_) {
        const auto info = value.GetTensorTypeAndShapeInfo();
        const std::size_t width =
            info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 4;
        total += width * info.GetElementCount();
    }
    return total;
}

std::vector<Array<float>> OrtFeatures::maps() const {
    try {
        std::vector<Array<float>> maps;
        for (const Ort::Value& value : values_) {
            maps.push_back(transfer_->to_host(value));
        }
        return maps;
    } catch (const Ort::Exception& error) {
        throw BackendError("feature maps cannot be brought from " + device_ + ": " + error.what());
    }
}

}  // namespace sam3rt
