// Typed access to parsed JSON that comes from outside.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sam3rt {

using Json = nlohmann::json;

/// Parses a file's JSON text. Throws BundleError, naming the file, where it is not valid JSON.
Json parse_json(const std::vector<std::uint8_t>& text, const std::string& file);

/// A value of a JSON file, and where in the file it stands. Every reading function throws
/// BundleError that names the file and the place where the value is not of the type asked for.
class JsonValue {
public:
    JsonValue(const Json& value, std::string file, std::string where = "")
        : value_(value), file_(std::move(file)), where_(std::move(where)) {}

    std::string text() const;
    std::int64_t whole_number() const;
    /// A number of ordinary size: at most 1e30 either way.
    double number() const;
    bool is_null() const { return value_.is_null(); }
    bool is_text() const { return value_.is_string(); }

    /// The position of this text in `options`.
    std::size_t one_of(const std::vector<std::string>& options) const;

    /// The entries of a list; with `count`, of exactly that many.
    std::vector<JsonValue> list() const;
    std::vector<JsonValue> list(std::size_t count) const;

    /// Refuse anything but an object whose fields are all among `known`.
    void check_fields(const std::vector<std::string>& known) const;
    bool has(const std::string& name) const { return value_.contains(name); }
    /// A field, which must be there.
    JsonValue field(const std::string& name) const;
    /// The names and values of an object.
    std::vector<std::pair<std::string, JsonValue>> fields() const;

    [[noreturn]] void refuse(const std::string& expected) const;

private:
    void require_object() const;
    std::string below(const std::string& name) const;

    const Json& value_;
    std::string file_;
    std::string where_;
};

}  // namespace sam3rt
