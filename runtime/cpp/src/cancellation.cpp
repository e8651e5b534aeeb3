#include "cancellation.hpp"

#include <exception>

namespace sam3rt {

Cancellation::Cancellation() : state_(std::make_shared<State>()) {}

Cancellation::Cancellation(std::chrono::steady_clock::time_point deadline) : Cancellation() {
    if (deadline != std::chrono::steady_clock::time_point::max()) {
        state_->deadline = deadline;
    }
}

void Cancellation::cancel() const noexcept {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->cancelled = true;
    for (const std::function<void()>& listener : state_->listeners) {
        listener();
    }
}

bool Cancellation::cancelled() const noexcept {
    return state_->cancelled ||
           (state_->deadline && std::chrono::steady_clock::now() >= *state_->deadline);
}

bool is_cancelled(const Cancellation* cancellation) noexcept {
    return cancellation != nullptr && cancellation->cancelled();
}

void check_cancelled(const Cancellation* cancellation) {
    if (is_cancelled(cancellation)) {
        throw CancelledError(cancellation->state().cancelled ? "the call was cancelled"
                                                             : "the call's deadline has passed");
    }
}

OnCancel::OnCancel(const Cancellation* cancellation, std::function<void()> function) {
    if (cancellation == nullptr) {
        return;
    }
    state_ = &cancellation->state();
    {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        own_ = state_->listeners.insert(state_->listeners.end(), std::move(function));
        if (state_->cancelled) {
            (*own_)();
        }
    }
    if (!state_->deadline) {
        return;
    }
    try {
        watch_ = std::thread([this] {
            std::unique_lock<std::mutex> lock(mutex_);
            if (!changed_.wait_until(lock, *state_->deadline, [this] { return ended_; })) {
                (*own_)();
            }
        });
    } catch (const std::exception& error) {
        // Nobody destroys this object, and whoever cancels would call its function.
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->listeners.erase(own_);
        throw BackendError(std::string("no thread can be started to watch a deadline: ") +
                           error.what());
    }
}

OnCancel::~OnCancel() {
    if (state_ == nullptr) {
        return;
    }
    if (watch_.joinable()) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ended_ = true;
        }
        changed_.notify_one();
        watch_.join();
    }
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->listeners.erase(own_);
}

}  // namespace sam3rt
