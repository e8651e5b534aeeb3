#include "json_reader.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "sam3rt/sam3rt.hpp"

namespace sam3rt {
namespace {

using Json = nlohmann::json;

/// A short description of a value. Lists and objects are only counted, since one may be nested
/// deeper than a recursive printer can go.
std::string shown(const Json& value) {
    if (value.is_object()) {
        return "an object of " + std::to_string(value.size());
    }
    if (value.is_array()) {
        return "a list of " + std::to_string(value.size());
    }
    const std::string text = value.dump(-1, ' ', true);
    return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

Json parse(const std::uint8_t* text, std::size_t size, const std::string& file) {
    // The parser would skip a byte order mark, which JSON does not allow.
    if (size != 0 && text[0] == 0xef) {
        throw BundleError("is not valid JSON: it begins with a byte order mark", file);
    }
    try {
        return Json::parse(text, text + size);
    } catch (const Json::exception& error) {
        throw BundleError(std::string("is not valid JSON: ") + error.what(), file);
    }
}

}  // namespace

JsonDocument::JsonDocument(const std::uint8_t* text, std::size_t size, std::string file)
    : document_(std::make_unique<Json>(parse(text, size, file))), file_(std::move(file)) {}

JsonDocument::~JsonDocument() = default;

JsonValue JsonDocument::root() const { return JsonValue(*document_, file_); }

std::string json_text(const std::string& text) {
    // A message of somebody else's may hold anything.
    return Json(text).dump(-1, ' ', true, Json::error_handler_t::replace);
}

std::string json_number(double number) { return Json(number).dump(); }

void JsonValue::refuse(const std::string& expected) const {
    throw BundleError("field '" + where_ + "' is " + shown(value_) + ", expected " + expected,
                      file_);
}

bool JsonValue::boolean() const {
    if (!value_.is_boolean()) {
        refuse("true or false");
    }
    return value_.get<bool>();
}

std::string JsonValue::text() const {
    if (!value_.is_string()) {
        refuse("a text");
    }
    return value_.get<std::string>();
}

std::int64_t JsonValue::whole_number() const {
    if (!value_.is_number_integer() ||
        (value_.is_number_unsigned() &&
         value_.get<std::uint64_t>() >
             static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))) {
        refuse("a whole number");
    }
    return value_.get<std::int64_t>();
}

bool JsonValue::is_null() const { return value_.is_null(); }

bool JsonValue::is_text() const { return value_.is_string(); }

bool JsonValue::has(const std::string& name) const { return value_.contains(name); }

double JsonValue::number(double limit) const {
    if (!value_.is_number()) {
        refuse("a number");
    }
    const double number = value_.get<double>();
    if (!(std::abs(number) <= limit)) {
        refuse("a number of ordinary size");
    }
    return number;
}

std::size_t JsonValue::one_of(const std::vector<std::string>& options) const {
    const auto found = value_.is_string() ? std::find(options.begin(), options.end(),
                                                      value_.get_ref<const std::string&>())
                                          : options.end();
    if (found == options.end()) {
        std::string expected = "one of ";
        for (std::size_t i = 0; i < options.size(); ++i) {
            expected += (i == 0 ? "" : ", ") + options[i];
        }
        refuse(expected);
    }
    return static_cast<std::size_t>(found - options.begin());
}

std::vector<JsonValue> JsonValue::list() const {
    if (!value_.is_array()) {
        refuse("a list");
    }
    std::vector<JsonValue> entries;
    for (std::size_t i = 0; i < value_.size(); ++i) {
        entries.emplace_back(value_[i], file_, where_ + "[" + std::to_string(i) + "]");
    }
    return entries;
}

std::vector<JsonValue> JsonValue::list(std::size_t count) const {
    if (value_.is_array() && value_.size() != count) {
        refuse("a list of " + std::to_string(count));
    }
    return list();
}

void JsonValue::check_fields(const std::vector<std::string>& known) const {
    require_object();
    for (const auto& item : value_.items()) {
        if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
            throw BundleError("unknown field '" + below(item.key()) + "'", file_);
        }
    }
}

JsonValue JsonValue::field(const std::string& name) const {
    require_object();
    const auto found = value_.find(name);
    if (found == value_.end()) {
        throw BundleError("field '" + below(name) + "' is missing", file_);
    }
    return JsonValue(*found, file_, below(name));
}

std::vector<std::pair<std::string, JsonValue>> JsonValue::fields() const {
    require_object();
    std::vector<std::pair<std::string, JsonValue>> entries;
    for (const auto& item : value_.items()) {
        entries.emplace_back(item.key(), JsonValue(item.value(), file_, below(item.key())));
    }
    return entries;
}

void JsonValue::require_object() const {
    if (!value_.is_object()) {
        refuse("an object");
    }
}

std::string JsonValue::below(const std::string& name) const {
    return where_.empty() ? name : where_ + "." + name;
}

}  // namespace sam3rt
