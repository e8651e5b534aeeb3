#include "tensorrt/memory.hpp"

#include <cstring>

namespace sam3rt {
namespace {

constexpr std::size_t spare_blocks = 6;

std::uint16_t to_half(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t sign = bits >> 16U & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) {
        return static_cast<std::uint16_t>(sign | 0x7e00U);
    }
    if (magnitude >= 0x47800000U) {
        return static_cast<std::uint16_t>(sign | 0x7c00U);
    }
    if (magnitude < 0x33000000U) {
        return static_cast<std::uint16_t>(sign);
    }
    // The bits that are left out decide how the rest is rounded: to the nearest, ties to even.
    const std::uint32_t exponent = magnitude >> 23U;
    const bool is_subnormal = exponent < 113;
    const std::uint32_t shift = is_subnormal ? 126U - exponent : 13U;
    const std::uint32_t mantissa =
        is_subnormal ? (magnitude & 0x7fffffU) | 0x800000U : magnitude - (112U << 23U);
    const std::uint32_t left_out = mantissa & ((1U << shift) - 1U);
    const std::uint32_t half = 1U << (shift - 1U);
    std::uint32_t result = mantissa >> shift;
    if (left_out > half || (left_out == half && (result & 1U) != 0)) {
        ++result;
    }
    return static_cast<std::uint16_t>(sign | result);
}

float from_half(std::uint16_t value) {
    const std::uint32_t sign = (value & 0x8000U) << 16U;
    const std::uint32_t exponent = value >> 10U & 0x1fU;
    const std::uint32_t mantissa = value & 0x3ffU;
    if (exponent == 0) {
        const float tiny = static_cast<float>(mantissa) * 0x1p-24F;
        return sign == 0 ? tiny : -tiny;
    }
    const std::uint32_t bits =
        sign | (exponent == 31 ? 0x7f800000U : (exponent + 112U) << 23U) | mantissa << 13U;
    float result = 0;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

void require_float(ElementType type) {
    if (type != ElementType::float32 && type != ElementType::float16) {
        throw BackendError("an engine takes whole numbers where the manifest has floats");
    }
}

}  // namespace

std::size_t size_of(ElementType type) {
    switch (type) {
        case ElementType::int64:
            return 8;
        case ElementType::float16:
            return 2;
        case ElementType::boolean:
            return 1;
        case ElementType::float32:
        case ElementType::int32:
            break;
    }
    return 4;
}

void store(const float* values, std::size_t count, ElementType type, std::uint8_t* target) {
    require_float(type);
    if (type == ElementType::float32) {
        std::memcpy(target, values, count * sizeof(float));
        return;
    }
    auto* halves = reinterpret_cast<std::uint16_t*>(target);
    std::transform(values, values + count, halves, to_half);
}

void load(const std::uint8_t* source, std::size_t count, ElementType type, float* values) {
    require_float(type);
    if (type == ElementType::float32) {
        std::memcpy(values, source, count * sizeof(float));
        return;
    }
    const auto* halves = reinterpret_cast<const std::uint16_t*>(source);
    std::transform(halves, halves + count, values, from_half);
}

void Layout::add(std::string name, Shape shape, ElementType type) {
    slots_.push_back({std::move(name), std::move(shape), type, aligned(nbytes_)});
    nbytes_ = slots_.back().offset + slots_.back().nbytes();
}

const Slot& Layout::operator[](const std::string& name) const {
    const auto found = std::find_if(slots_.begin(), slots_.end(),
                                    [&name](const Slot& slot) { return slot.name == name; });
    if (found == slots_.end()) {
        throw BackendError("the engines have no tensor " + name);
    }
    return *found;
}

Block::~Block() {
    if (memory_ != nullptr) {
        memory_->give_back(address, nbytes, reusable_);
    }
}

Block Memory::allocate(std::size_t bytes, bool reusable) {
    if (reusable) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = std::find_if(spare_.begin(), spare_.end(), [bytes](const auto& entry) {
            return entry.first == bytes;
        });
        if (found != spare_.end()) {
            const DevicePointer address = found->second;
            spare_.erase(found);
            return {shared_from_this(), address, bytes, true};
        }
    }
    const Cuda::Active active(*cuda_);
    DevicePointer address = 0;
    try {
        address = cuda_->allocate(std::max<std::size_t>(bytes, 1));
    } catch (const OutOfDeviceMemoryError&) {
        release_spare();
        address = cuda_->allocate(std::max<std::size_t>(bytes, 1));
    }
    return {shared_from_this(), address, bytes, reusable};
}

void Memory::give_back(DevicePointer address, std::size_t bytes, bool reusable) noexcept {
    if (reusable) {
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            spare_.emplace_back(bytes, address);
            if (spare_.size() <= spare_blocks) {
                return;
            }
            address = spare_.front().second;
            spare_.pop_front();
        } catch (const std::bad_alloc&) {
            // Then it is given back.
        }
    }
    try {
        const Cuda::Active active(*cuda_);
        cuda_->free(address);
    } catch (const Error&) {
        // The GPU is lost, or the process ends.
    }
}

void Memory::release_spare() noexcept {
    std::list<std::pair<std::size_t, DevicePointer>> spare;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        spare.swap(spare_);
    }
    for (const auto& [bytes, address] : spare) {
        give_back(address, bytes, false);
    }
}

DevicePointer GrowingBuffer::device(std::size_t bytes) {
    if (block_.nbytes < bytes) {
        // The old one goes first: there may not be room for both.
        block_ = Block();
        block_ = memory_->allocate(bytes);
    }
    return block_.address;
}

std::uint8_t* GrowingBuffer::pinned(std::size_t bytes) {
    if (pinned_bytes_ < bytes) {
        free_pinned();
        pinned_ = static_cast<std::uint8_t*>(memory_->cuda().allocate_host(bytes));
        pinned_bytes_ = bytes;
    }
    return pinned_;
}

void GrowingBuffer::free_pinned() noexcept {
    if (pinned_ != nullptr) {
        try {
            const Cuda::Active active(memory_->cuda());
            memory_->cuda().free_host(pinned_);
        } catch (const Error&) {
            // The GPU is lost, or the process ends.
        }
    }
    pinned_ = nullptr;
    pinned_bytes_ = 0;
}

}  // namespace sam3rt
