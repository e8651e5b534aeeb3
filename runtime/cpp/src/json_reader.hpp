// Typed access to parsed JSON that comes from outside.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace sam3rt {

/// A value of a JSON document, which must outlive it. Every reading function throws BundleError
/// that names the file and the place in it where the value is not of the type asked for.
class JsonValue {
public:
    JsonValue(const nlohmann::json& value, std::string file, std::string where = "")
        : value_(value), file_(std::move(file)), where_(std::move(where)) {}

    std::string text() const;
    std::int64_t whole_number() const;
    /// A number of ordinary size: at most 1e30 either way, unless `limit` says otherwise.
    double number(double limit = 1e30) const;
    bool boolean() const;
    bool is_null() const;
    bool is_text() const;

    /// The position of this text in `options`.
    std::size_t one_of(const std::vector<std::string>& options) const;

    /// The entries of a list; with `count`, of exactly that many.
    std::vector<JsonValue> list() const;
    std::vector<JsonValue> list(std::size_t count) const;

    /// Refuse anything but an object whose fields are all among `known`.
    void check_fields(const std::vector<std::string>& known) const;
    bool has(const std::string& name) const;
    /// A field, which must be there.
    JsonValue field(const std::string& name) const;
    /// The names and values of an object.
    std::vector<std::pair<std::string, JsonValue>> fields() const;

    [[noreturn]] void refuse(const std::string& expected) const;

private:
    void require_object() const;
    std::string below(const std::string& name) const;

    const nlohmann::json& value_;
    std::string file_;
    std::string where_;
};

/// A file's JSON text, parsed.
class JsonDocument {
public:
    /// Throws BundleError, naming the file, where the text is not valid JSON.
    JsonDocument(const std::uint8_t* text, std::size_t size, std::string file);
    ~JsonDocument();

    JsonValue root() const;

private:
    std::unique_ptr<const nlohmann::json> document_;
    std::string file_;
};

/// A text as JSON, of ASCII characters only.
std::string json_text(const std::string& text);

/// A finite number as JSON, in as few digits as read back as the same number.
std::string json_number(double number);

}  // namespace sam3rt
