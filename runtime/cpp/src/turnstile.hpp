// Bounds how many threads do something at once.
#pragma once

#include <condition_variable>
#include <mutex>

#include "cancellation.hpp"

namespace sam3rt {

/// Lets at most so many threads at once past a point; others wait.
class Turnstile {
public:
    explicit Turnstile(int places) : free_(places) {}

private:
    friend class Turn;

    bool take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_ == 0) {
            return false;
        }
        --free_;
        return true;
    }

    std::mutex mutex_;
    std::condition_variable left_;
    int free_;
};

/// A thread's turn, which it waits for, and which ends with its scope.
class Turn {
public:
    /// Throws CancelledError where the call ends before its turn comes.
    explicit Turn(Turnstile& turnstile, const Cancellation* cancellation = nullptr)
        : turnstile_(turnstile) {
        while (!turnstile_.take()) {
            wait_until(turnstile_.mutex_, turnstile_.left_, cancellation,
                       [this] { return turnstile_.free_ > 0; });
        }
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
        {
            const std::lock_guard<std::mutex> lock(turnstile_.mutex_);
            ++turnstile_.free_;
        }
        turnstile_.left_.notify_one();
    }

private:
    Turnstile& turnstile_;
};

}  // namespace sam3rt
