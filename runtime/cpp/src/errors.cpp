#include "errors.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace sam3rt {

// Defined here so that each class has its type information in this library alone.
Error::~Error() = default;
InvalidInputError::~InvalidInputError() = default;
ImageError::~ImageError() = default;
PromptError::~PromptError() = default;
StateError::~StateError() = default;
BundleError::~BundleError() = default;
EmbeddingError::~EmbeddingError() = default;
BackendError::~BackendError() = default;
CancelledError::~CancelledError() = default;

Error::Error(const std::string& message) : std::runtime_error(one_line(message)) {}

InvalidInputError::InvalidInputError(std::string argument, const std::string& got,
                                     const std::string& expected)
    : Error(argument + ": got " + got + ", expected " + expected), argument_(std::move(argument)) {}

void InvalidInputError::rename(const std::string& argument) {
    const std::string text = argument + std::string(what()).substr(argument_.size());
    std::runtime_error::operator=(std::runtime_error(text));
    argument_ = argument;
}

BundleError::BundleError(const std::string& message, std::string file)
    : Error(file.empty() ? message : file + ": " + message), file_(std::move(file)) {}

std::string one_line(std::string text) {
    std::replace_if(
        text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c == 0x7f; }, ' ');
    using Json = nlohmann::json;
    return Json::parse(Json(text).dump(-1, ' ', false, Json::error_handler_t::replace))
        .get<std::string>();
}

bool is_finite(const Array<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

std::string shape_text(const Shape& shape) {
    std::string text = "(";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

std::size_t element_count(const Shape& shape) {
    std::size_t count = 1;
    bool empty = false;
    bool overflow = false;
    for (const std::int64_t side : shape) {
        if (side < 0) {
            throw InvalidInputError("shape", shape_text(shape), "no negative size");
        }
        empty = empty || side == 0;
        const auto size = static_cast<std::size_t>(side);
        overflow = overflow || (size != 0 && count > max_elements / size);
        count = overflow ? count : count * size;
    }
    if (overflow && !empty) {
        throw InvalidInputError("shape", shape_text(shape),
                                "a number of elements that fits memory");
    }
    return empty ? 0 : count;
}

}  // namespace sam3rt
