// The lanes of a backend, which its threads take turns on.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "cancellation.hpp"
#include "tensorrt/lane.hpp"

namespace sam3rt {

/// Decoder lanes for many threads.
class DecoderLanes {
public:
    DecoderLanes(const Network& network, std::shared_ptr<Memory> memory, const Imaging& imaging,
                 int limit)
        : network_(network), memory_(std::move(memory)), imaging_(imaging), limit_(limit) {}

    /// Use a lane, best one that holds these feature maps. Where memory is short, a lane that is
    /// not needed is given up, and the call made again.
    template <typename Function>
    void run(const DeviceFeatures* features, const Cancellation* cancellation,
             const Function& function) {
        for (;;) {
            std::unique_ptr<DecoderLane> lane = take(features, cancellation);
            const Return back(*this, lane);
            const Cuda::Active active(memory_->cuda());
            try {
                function(*lane);
                return;
            } catch (const OutOfDeviceMemoryError& error) {
                if (!give_up_one(error)) {
                    throw;
                }
            }
        }
    }

    /// Use every lane that no call is using, and make as many as there may be. With little memory,
    /// fewer.
    template <typename Function>
    void each(const Function& function) {
        std::vector<std::unique_ptr<DecoderLane>> lanes;
        std::exception_ptr failure;
        try {
            const Cuda::Active active(memory_->cuda());
            while (std::unique_ptr<DecoderLane> lane = take_if_free(nullptr)) {
                lanes.push_back(std::move(lane));
                function(*lanes.back());
            }
        } catch (const OutOfDeviceMemoryError& error) {
            if (lanes.size() < 2) {
                failure = std::current_exception();
            } else {
                lanes.pop_back();
                count_one_less(error.what());
            }
        } catch (...) {
            failure = std::current_exception();
        }
        for (std::unique_ptr<DecoderLane>& lane : lanes) {
            put_back(lane);
        }
        if (failure != nullptr) {
            std::rethrow_exception(failure);
        }
    }

    /// Give up a lane that nobody uses; whether there was one.
    bool give_up_one(const BackendError& error);

private:
    /// Puts a lane back at the end of its use.
    struct Return {
        Return(DecoderLanes& owner, std::unique_ptr<DecoderLane>& used)
            : lanes(owner), lane(used) {}
        Return(const Return&) = delete;
        Return& operator=(const Return&) = delete;
        ~Return() { lanes.put_back(lane); }

        DecoderLanes& lanes;
        std::unique_ptr<DecoderLane>& lane;
    };

    /// A lane for one call, best one that holds these feature maps; waits until there is one.
    /// Throws CancelledError where the call ends before that.
    std::unique_ptr<DecoderLane> take(const DeviceFeatures* features,
                                      const Cancellation* cancellation);
    /// A lane that no call is using, or a new one; nothing where there can be no more now.
    std::unique_ptr<DecoderLane> take_if_free(const DeviceFeatures* features);
    /// A lane that no call is using, if there is one. This and the next need the mutex.
    std::unique_ptr<DecoderLane> take_free(const DeviceFeatures* features);
    bool may_grow() const;
    void put_back(std::unique_ptr<DecoderLane>& lane);
    /// How many lanes are left.
    int count_one_less(const char* reason);

    const Network& network_;
    const std::shared_ptr<Memory> memory_;
    const Imaging& imaging_;
    const int limit_;
    std::mutex mutex_;
    std::condition_variable changed_;
    /// The one unused for longest stands first.
    std::vector<std::unique_ptr<DecoderLane>> free_;
    int count_ = 0;
    std::chrono::steady_clock::time_point retry_at_;
};

}  // namespace sam3rt
