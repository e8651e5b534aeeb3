#include "results.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <regex>
#include <set>

#include "overlay.hpp"

namespace {

using Json = nlohmann::ordered_json;

std::int64_t area(const Found& found) {
    return std::count(found.mask.begin(), found.mask.end(), 1);
}

/// x0, y0, x1, y1 with x1 and y1 just outside, or null for an empty mask.
Json bounding_box(const Found& found, std::int64_t width) {
    std::int64_t x0 = width;
    std::int64_t x1 = -1;
    std::int64_t y0 = -1;
    std::int64_t y1 = -1;
    for (std::size_t i = 0; i < found.mask.size(); ++i) {
        if (found.mask[i] == 0) {
            continue;
        }
        const std::int64_t x = static_cast<std::int64_t>(i) % width;
        const std::int64_t y = static_cast<std::int64_t>(i) / width;
        x0 = std::min(x0, x);
        x1 = std::max(x1, x);
        y0 = y0 < 0 ? y : y0;
        y1 = y;
    }
    return x1 < 0 ? Json() : Json{x0, y0, x1 + 1, y1 + 1};
}

double rounded(double value, double unit) { return std::round(value * unit) / unit; }

Json prompts_of(const Arguments& arguments) {
    Json prompts = Json::object();
    if (!arguments.points.empty()) {
        prompts["point_coords"] = Json::array();
        prompts["point_labels"] = Json::array();
        for (const Click& click : arguments.points) {
            prompts["point_coords"].push_back({double{click.x}, double{click.y}});
            prompts["point_labels"].push_back(click.label);
        }
    }
    Json boxes = Json::array();
    for (const auto& box : arguments.boxes) {
        boxes.push_back(std::vector<double>(box.begin(), box.end()));
    }
    if (!boxes.empty()) {
        prompts["box"] = boxes.size() == 1 ? boxes[0] : boxes;
    }
    return prompts;
}

/// What runs the graphs; devices of TensorRT are called by its name.
std::string backend_of(const std::string& device) {
    return device.rfind("tensorrt", 0) == 0 ? device.substr(0, device.find(':')) : "onnxruntime";
}

std::string mask_name(std::size_t index) { return "mask_" + std::to_string(index) + ".png"; }

/// The names that an earlier run's result.json accounts for, itself included.
std::set<std::string> listed(const std::filesystem::path& path) {
    std::set<std::string> names = {"overlay.png", "result.json"};
    try {
        std::ifstream file(path, std::ios::binary);
        const Json document = Json::parse(file);
        document.at("model").at("fingerprint").get<std::string>();
        for (const Json& entry : document.at("masks")) {
            names.insert(entry.at("file").get<std::string>());
        }
    } catch (const Json::exception&) {
        return {};
    }
    return names;
}

template <typename... Values>
std::string formatted(const char* form, Values... values) {
    std::array<char, 256> line{};
    std::snprintf(line.data(), line.size(), form, values...);
    return line.data();
}

}  // namespace

std::vector<Found> sorted(const sam3rt::Prediction& prediction) {
    const sam3rt::Shape& shape = prediction.masks.shape();
    const auto masks_per_object = static_cast<std::size_t>(shape[shape.size() - 3]);
    const std::size_t count = prediction.iou_predictions.size();
    const std::size_t size = prediction.masks.size() / count;
    std::vector<Found> found;
    for (std::size_t first = 0; first < count; first += masks_per_object) {
        std::vector<std::size_t> order(masks_per_object);
        std::iota(order.begin(), order.end(), first);
        std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
            return prediction.iou_predictions[a] > prediction.iou_predictions[b];
        });
        for (const std::size_t i : order) {
            const std::uint8_t* mask = prediction.masks.data() + i * size;
            found.push_back({first / masks_per_object, prediction.iou_predictions[i],
                             std::vector<std::uint8_t>(mask, mask + size)});
        }
    }
    return found;
}

std::vector<std::filesystem::path> earlier_results(const Arguments& arguments) {
    static const std::regex form(R"(result\.json|overlay\.png|mask_\d+\.png)");
    std::vector<std::filesystem::path> earlier;
    if (!std::filesystem::is_directory(arguments.output)) {
        return earlier;
    }
    const std::set<std::string> ours = listed(arguments.output / "result.json");
    for (const auto& entry : std::filesystem::directory_iterator(arguments.output)) {
        const std::string name = entry.path().filename().string();
        if (!std::regex_match(name, form)) {
            continue;
        }
        std::error_code no_image;
        if (ours.count(name) == 0 ||
            std::filesystem::equivalent(entry.path(), arguments.image, no_image)) {
            throw UsageError("argument --output: " + entry.path().string() +
                             " is not from an earlier run, expected a folder without it");
        }
        earlier.push_back(entry.path());
    }
    return earlier;
}

void write_results(const Arguments& arguments,
                   const std::vector<std::filesystem::path>& earlier, const Picture& image,
                   const sam3rt::Model& model, const std::vector<Found>& found,
                   const Seconds& seconds) {
    const std::filesystem::path& folder = arguments.output;
    std::filesystem::create_directories(folder);
    for (const std::filesystem::path& path : earlier) {
        std::filesystem::remove(path);
    }
    Json entries = Json::array();
    std::vector<std::vector<std::uint8_t>> best;
    for (std::size_t i = 0; i < found.size(); ++i) {
        Picture picture{image.height, image.width, 1, found[i].mask};
        for (std::uint8_t& level : picture.pixels) {
            level = level != 0 ? 255 : 0;
        }
        write_png(folder / mask_name(i), picture);
        entries.push_back({{"file", mask_name(i)},
                           {"object", found[i].object},
                           {"predicted_iou", rounded(double{found[i].score}, 1e6)},
                           {"area", area(found[i])},
                           {"bounding_box", bounding_box(found[i], image.width)}});
        if (found[i].object == best.size()) {
            best.push_back(found[i].mask);
        }
    }
    write_png(folder / "overlay.png", draw_overlay(image, best, arguments.points, arguments.boxes));
    const Json document = {
        {"image", arguments.image.string()},
        {"height", image.height},
        {"width", image.width},
        {"prompts", prompts_of(arguments)},
        {"masks", entries},
        {"overlay", "overlay.png"},
        {"model",
         {{"name", model.manifest().name},
          {"fingerprint", model.manifest().fingerprint},
          {"backend", backend_of(model.device())},
          {"device", model.device()}}},
        {"seconds",
         {{"load", rounded(seconds.load, 1e4)},
          {"encode", rounded(seconds.encode, 1e4)},
          {"predict", rounded(seconds.predict, 1e4)}}},
    };
    write_text(folder / "result.json",
               document.dump(2, ' ', true, Json::error_handler_t::replace) + "\n");
}

std::string table(const std::vector<Found>& found, const Arguments& arguments,
                  const Seconds& seconds) {
    std::string text = formatted("%-14s%7s%15s%11s\n", "mask", "object", "predicted IoU", "area");
    for (std::size_t i = 0; i < found.size(); ++i) {
        text +=
            formatted("%-14s%7zu%15.4f%11lld\n", mask_name(i).c_str(), found[i].object,
                      static_cast<double>(found[i].score), static_cast<long long>(area(found[i])));
    }
    return text +
           formatted("loaded in %.2f s, encoded in %.2f s, predicted in %.0f ms; ", seconds.load,
                     seconds.encode, seconds.predict * 1e3) +
           "results and overlay.png in " + arguments.output.string() + "\n";
}
