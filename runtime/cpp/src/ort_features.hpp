// Feature maps that ONNX Runtime keeps, and what follows from them before any prompt.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "ort_session.hpp"

namespace sam3rt {

/// Values between the two parts of a decoder that was cut.
struct CutValues {
    /// The one that made them. Destroyed after them.
    std::shared_ptr<Ort::Session> owner;
    std::vector<Ort::Value> values;
};

/// What the decoder makes of images alone, kept for those that were used last, for as long as their
/// features live.
class ImageSide {
public:
    /// Lies in an image's features. Models of one bundle may share it.
    struct Slot {
        std::mutex mutex;
        std::shared_ptr<const CutValues> values;
    };

    /// The values of an image. Two threads may make them at once.
    template <typename Make>
    std::shared_ptr<const CutValues> get(const std::shared_ptr<Slot>& slot, const Make& make) {
        std::shared_ptr<const CutValues> values = find(*slot);
        if (values == nullptr) {
            values = make();
        }
        keep(slot, values);
        return values;
    }

private:
    static std::shared_ptr<const CutValues> find(Slot& slot);
    void keep(const std::shared_ptr<Slot>& slot, const std::shared_ptr<const CutValues>& values);

    std::mutex mutex_;
    /// The one used last comes last.
    std::list<std::weak_ptr<Slot>> recent_;
};

/// Brings float32 maps to a device and back, in the type that the graphs use for them.
class FeatureTransfer {
public:
    /// `dtype` is "float32" or "float16".
    FeatureTransfer(const Device& device, const std::string& dtype);

    Array<float> to_host(const Ort::Value& value) const;
    Ort::Value to_device(const Array<float>& map) const;

private:
    bool half_;
    /// Absent on the CPU, whose memory is the host's.
    std::optional<Copier> copier_;
};

/// One image's feature maps, wherever ONNX Runtime keeps them.
class OrtFeatures : public Features {
public:
    /// The session is the one whose allocator the values are from, if any.
    OrtFeatures(std::vector<Ort::Value> maps, std::shared_ptr<const FeatureTransfer> transfer,
                std::string device, std::shared_ptr<Ort::Session> owner)
        : owner_(std::move(owner)),
          transfer_(std::move(transfer)),
          device_(std::move(device)),
          values_(std::move(maps)) {}

    std::string device() const override { return device_; }
    std::size_t nbytes() const override;
    std::vector<Array<float>> maps() const override;

    const std::vector<Ort::Value>& values() const { return values_; }

    /// What the decoder makes of the image alone, if it is kept.
    const std::shared_ptr<ImageSide::Slot>& image_side() const { return image_side_; }

private:
    const std::shared_ptr<ImageSide::Slot> image_side_ = std::make_shared<ImageSide::Slot>();
    // Destroyed after the values.
    std::shared_ptr<Ort::Session> owner_;
    std::shared_ptr<const FeatureTransfer> transfer_;
    std::string device_;
    std::vector<Ort::Value> values_;
};

}  // namespace sam3rt
