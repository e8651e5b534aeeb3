// Ends calls early, whatever they are doing.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <thread>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

struct Cancellation::State {
    std::atomic<bool> cancelled{false};
    std::optional<std::chrono::steady_clock::time_point> deadline;
    std::mutex mutex;
    std::list<std::function<void()>> listeners;
};

/// Whether there is a cancellation that says so.
bool is_cancelled(const Cancellation* cancellation) noexcept;

/// Throws CancelledError where there is a cancellation that says so.
void check_cancelled(const Cancellation* cancellation);

/// Calls a function when a call is cancelled or its deadline passes, by any thread, while this
/// object lives, and at once where that has happened already. The function may be called twice.
class OnCancel {
public:
    /// `cancellation` may be null. Throws BackendError where no thread can be started to watch the
    /// deadline.
    OnCancel(const Cancellation* cancellation, std::function<void()> function);
    OnCancel(const OnCancel&) = delete;
    OnCancel& operator=(const OnCancel&) = delete;
    ~OnCancel();

private:
    Cancellation::State* state_ = nullptr;
    std::list<std::function<void()>>::iterator own_;
    std::thread watch_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool ended_ = false;
};

/// Wait until `ready`, which is asked with the mutex held and again whenever something changed. Other
/// threads wait too: it may be over when this returns. Throws CancelledError where the call ends
/// before; if it had been woken, another thread is.
template <typename Ready>
void wait_until(std::mutex& mutex, std::condition_variable& changed,
                const Cancellation* cancellation, const Ready& ready) {
    const OnCancel wake(cancellation, [&mutex, &changed] {
        {
            // So that this cannot come between a waiter's look and its sleep.
            const std::lock_guard<std::mutex> lock(mutex);
        }
        changed.notify_all();
    });
    {
        // Released before `wake` ends, which waits for the function above.
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return ready() || is_cancelled(cancellation); });
    }
    if (is_cancelled(cancellation)) {
        changed.notify_one();
        check_cancelled(cancellation);
    }
}

}  // namespace sam3rt
