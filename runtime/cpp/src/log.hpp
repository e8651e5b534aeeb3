// Lines for whoever operates the process.
#pragma once

#include <optional>
#include <string>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {

/// Give a line to the callback, if there is one that wants it.
void log(LogLevel level, const std::string& line) noexcept;

/// The least severe lines that the callback wants; nothing without a callback.
std::optional<LogLevel> log_level() noexcept;

}  // namespace sam3rt
