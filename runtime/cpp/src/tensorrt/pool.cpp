#include "tensorrt/pool.hpp"

#include "log.hpp"

namespace sam3rt {
namespace {

// After memory was too short for a lane, callers share those there are for this long.
constexpr std::chrono::seconds retry_time{10};

}  // namespace

bool DecoderLanes::give_up_one(const BackendError& error) {
    std::unique_ptr<DecoderLane> spare;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        spare = take_free(nullptr);
    }
    if (spare == nullptr) {
        return false;
    }
    spare.reset();
    count_one_less(error.what());
    return true;
}

std::unique_ptr<DecoderLane> DecoderLanes::take(const DeviceFeatures* features,
                                                const Cancellation* cancellation) {
    for (;;) {
        if (std::unique_ptr<DecoderLane> lane = take_if_free(features)) {
            return lane;
        }
        wait_until(mutex_, changed_, cancellation,
                   [this] { return !free_.empty() || may_grow(); });
    }
}

std::unique_ptr<DecoderLane> DecoderLanes::take_if_free(const DeviceFeatures* features) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (std::unique_ptr<DecoderLane> lane = take_free(features)) {
            return lane;
        }
        if (!may_grow()) {
            return nullptr;
        }
        ++count_;
    }
    try {
        const Cuda::Active active(memory_->cuda());
        return std::make_unique<DecoderLane>(network_, memory_, imaging_);
    } catch (const std::exception& error) {
        // One is needed; more are a matter of speed.
        if (count_one_less(error.what()) == 0) {
            throw;
        }
        return nullptr;
    }
}

std::unique_ptr<DecoderLane> DecoderLanes::take_free(const DeviceFeatures* features) {
    if (free_.empty()) {
        return nullptr;
    }
    auto best = free_.begin();
    for (auto lane = free_.begin(); features != nullptr && lane != free_.end(); ++lane) {
        if ((*lane)->holds(*features)) {
            best = lane;
        }
    }
    std::unique_ptr<DecoderLane> lane = std::move(*best);
    free_.erase(best);
    return lane;
}

void DecoderLanes::put_back(std::unique_ptr<DecoderLane>& lane) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(lane));
    }
    changed_.notify_all();
}

bool DecoderLanes::may_grow() const {
    return count_ == 0 || (count_ < limit_ && std::chrono::steady_clock::now() >= retry_at_);
}

int DecoderLanes::count_one_less(const char* reason) {
    int left = 0;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        left = --count_;
        retry_at_ = std::chrono::steady_clock::now() + retry_time;
    }
    changed_.notify_all();
    log(LogLevel::warning, "no more than " + std::to_string(left) + " calls at a time: " + reason);
    return left;
}

}  // namespace sam3rt
