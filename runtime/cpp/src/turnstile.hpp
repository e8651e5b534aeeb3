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
        {
            const std::lock_guard<std::mutex> lock(turnstile_.mutex_);
            if (turnstile_.free_ > 0) {
                --turnstile_.free_;
                return;
            }
        }
        const OnCancel wake(cancellation, [this] {
            {
                // So that this cannot come between a waiter's look and its sleep.
                const std::lock_guard<std::mutex> lock(turnstile_.mutex_);
            }
            turnstile_.left_.notify_all();
        });
        // Released before `wake` ends, which waits for the function above.
        std::unique_lock<std::mutex> lock(turnstile_.mutex_);
        turnstile_.left_.wait(
            lock, [&] { return turnstile_.free_ > 0 || is_cancelled(cancellation); });
        if (is_cancelled(cancellation)) {
            lock.unlock();
            // If a free place woke this thread, it is another's.
            turnstile_.left_.notify_one();
            check_cancelled(cancellation);
        }
        --turnstile_.free_;
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
