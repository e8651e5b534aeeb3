// Bounds how many threads do something at once.
#pragma once

#include <condition_variable>
#include <mutex>

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
    explicit Turn(Turnstile& turnstile) : turnstile_(turnstile) {
        std::unique_lock<std::mutex> lock(turnstile_.mutex_);
        turnstile_.left_.wait(lock, [this] { return turnstile_.free_ > 0; });
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
