// Device and pinned memory with owners, and how tensors lie in it.
#pragma once

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "tensorrt/cuda.hpp"
#include "tensorrt/nvinfer.hpp"

namespace sam3rt {

/// The next multiple of what TensorRT and CUDA align to.
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

/// Bytes of one element.
std::size_t size_of(ElementType type);

/// Convert `count` float32 values to float16 or float32 elements at `target`.
void store(const float* values, std::size_t count, ElementType type, std::uint8_t* target);
/// Convert such elements back.
void load(const std::uint8_t* source, std::size_t count, ElementType type, float* values);

/// Where a tensor lies in a block.
struct Slot {
    std::string name;
    Shape shape;
    ElementType type;
    std::size_t offset = 0;

    std::size_t count() const { return element_count(shape); }
    std::size_t nbytes() const { return count() * size_of(type); }
};

/// Several tensors in one block, each where TensorRT can read it.
class Layout {
public:
    void add(std::string name, Shape shape, ElementType type);
    const std::vector<Slot>& slots() const { return slots_; }
    const Slot& operator[](const std::string& name) const;
    std::size_t nbytes() const { return nbytes_; }

private:
    std::vector<Slot> slots_;
    std::size_t nbytes_ = 0;
};

class Memory;

/// Device memory, given back when this object goes, by any thread.
class Block {
public:
    Block() = default;
    Block(std::shared_ptr<Memory> memory, DevicePointer block_address, std::size_t bytes,
          bool is_reusable)
        : address(block_address),
          nbytes(bytes),
          memory_(std::move(memory)),
          reusable_(is_reusable) {}
    Block(Block&& other) noexcept { *this = std::move(other); }
    Block& operator=(Block&& other) noexcept {
        std::swap(address, other.address);
        std::swap(nbytes, other.nbytes);
        std::swap(memory_, other.memory_);
        std::swap(reusable_, other.reusable_);
        return *this;
    }
    ~Block();

    DevicePointer address = 0;
    std::size_t nbytes = 0;

private:
    std::shared_ptr<Memory> memory_;
    bool reusable_ = false;
};

/// Hands out the memory of one GPU. A few blocks that went are kept for the next ones of their
/// size, as embeddings are all of one size: allocating halts the device.
class Memory : public std::enable_shared_from_this<Memory> {
public:
    explicit Memory(std::shared_ptr<const Cuda> cuda) : cuda_(std::move(cuda)) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { release_spare(); }

    const Cuda& cuda() const { return *cuda_; }

    /// Where memory is short, spare blocks are given back first. Throws OutOfDeviceMemoryError.
    Block allocate(std::size_t bytes, bool reusable = false);
    void release_spare() noexcept;

private:
    friend class Block;
    void give_back(DevicePointer address, std::size_t bytes, bool reusable) noexcept;

    const std::shared_ptr<const Cuda> cuda_;
    std::mutex mutex_;
    /// The one that went last stands last.
    std::list<std::pair<std::size_t, DevicePointer>> spare_;
};

/// Device and pinned memory that is replaced when more is needed. Nothing queued may use it then.
class GrowingBuffer {
public:
    explicit GrowingBuffer(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) {}
    GrowingBuffer(const GrowingBuffer&) = delete;
    GrowingBuffer& operator=(const GrowingBuffer&) = delete;
    ~GrowingBuffer() { free_pinned(); }

    /// Device memory of at least so many bytes.
    DevicePointer device(std::size_t bytes);
    /// Pinned memory likewise.
    std::uint8_t* pinned(std::size_t bytes);

private:
    void free_pinned() noexcept;

    const std::shared_ptr<Memory> memory_;
    Block block_;
    std::uint8_t* pinned_ = nullptr;
    std::size_t pinned_bytes_ = 0;
};

}  // namespace sam3rt
