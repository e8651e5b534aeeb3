// Lines for whoever operates the process.
#pragma once

#include <onnxruntime_c_api.h>

#include <string>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Whether anybody wants lines of this level.
bool is_logged(LogLevel level) noexcept;

/// Give a line to the callback, if there is one that wants it.
void log(LogLevel level, const std::string& line) noexcept;

/// The least severe lines that are wanted of ONNX Runtime.
OrtLoggingLevel ort_log_level() noexcept;

/// What our environment of ONNX Runtime gives its lines to: the callback, or stderr without one.
void ORT_API_CALL log_ort_line(void* unused, OrtLoggingLevel severity, const char* category,
                               const char* id, const char* location, const char* message) noexcept;

}  // namespace sam3rt
