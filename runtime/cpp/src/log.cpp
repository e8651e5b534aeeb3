#include "log.hpp"

#include <memory>
#include <mutex>

#include "errors.hpp"

namespace sam3rt {
namespace {

struct Sink {
    LogCallback callback;
    LogLevel level;
};

std::mutex sink_mutex;

/// Never destroyed: models of static lifetime may outlive every other static.
std::shared_ptr<const Sink>& current_sink() {
    static auto* const sink = new std::shared_ptr<const Sink>();
    return *sink;
}

std::shared_ptr<const Sink> sink() {
    const std::lock_guard<std::mutex> lock(sink_mutex);
    return current_sink();
}

}  // namespace

void set_log_callback(LogCallback callback, LogLevel level) {
    std::shared_ptr<const Sink> fresh;
    if (callback) {
        fresh = std::make_shared<const Sink>(Sink{std::move(callback), level});
    }
    const std::lock_guard<std::mutex> lock(sink_mutex);
    current_sink().swap(fresh);
}

void log(LogLevel level, const std::string& line) noexcept {
    const std::shared_ptr<const Sink> found = sink();
    if (found == nullptr || level < found->level) {
        return;
    }
    try {
        found->callback(level, one_line(line));
    } catch (...) {
        // A log must not make a call fail.
    }
}

std::optional<LogLevel> log_level() noexcept {
    const std::shared_ptr<const Sink> found = sink();
    return found == nullptr ? std::nullopt : std::optional<LogLevel>(found->level);
}

}  // namespace sam3rt
