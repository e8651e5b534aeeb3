#include "log.hpp"

#include <cstdio>
#include <memory>
#include <mutex>

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

LogLevel level_of(OrtLoggingLevel severity) {
    switch (severity) {
        case ORT_LOGGING_LEVEL_VERBOSE:
            return LogLevel::debug;
        case ORT_LOGGING_LEVEL_INFO:
            return LogLevel::info;
        case ORT_LOGGING_LEVEL_WARNING:
            return LogLevel::warning;
        case ORT_LOGGING_LEVEL_ERROR:
        case ORT_LOGGING_LEVEL_FATAL:
            break;
    }
    return LogLevel::error;
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

bool is_logged(LogLevel level) noexcept {
    const std::shared_ptr<const Sink> found = sink();
    return found != nullptr && level >= found->level;
}

void log(LogLevel level, const std::string& line) noexcept {
    const std::shared_ptr<const Sink> found = sink();
    if (found == nullptr || level < found->level) {
        return;
    }
    try {
        found->callback(level, line);
    } catch (...) {
        // A log must not make a call fail.
    }
}

OrtLoggingLevel ort_log_level() noexcept {
    const std::shared_ptr<const Sink> found = sink();
    if (found == nullptr) {
        return ORT_LOGGING_LEVEL_ERROR;
    }
    switch (found->level) {
        case LogLevel::debug:
            return ORT_LOGGING_LEVEL_VERBOSE;
        case LogLevel::info:
            return ORT_LOGGING_LEVEL_INFO;
        case LogLevel::warning:
            return ORT_LOGGING_LEVEL_WARNING;
        case LogLevel::error:
            break;
    }
    return ORT_LOGGING_LEVEL_ERROR;
}

void ORT_API_CALL log_ort_line(void* /*unused*/, OrtLoggingLevel severity, const char* /*category*/,
                               const char* /*id*/, const char* location,
                               const char* message) noexcept {
    if (sink() == nullptr) {
        if (severity >= ORT_LOGGING_LEVEL_ERROR) {
            std::fprintf(stderr, "onnxruntime: %s (%s)\n", message, location);
        }
        return;
    }
    try {
        log(level_of(severity), std::string("onnxruntime: ") + message + " (" + location + ")");
    } catch (const std::bad_alloc&) {
        // Then there is no line.
    }
}

}  // namespace sam3rt
