#include "arguments.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

const char* const usage_text = R"(usage: sam3rt_segment IMAGE --bundle DIR --output DIR [options]

Segment one image from clicks and boxes.

Coordinates are pixels of the upright image: an EXIF orientation is applied first. Several --point
belong to one object. Several --box are several objects, segmented in one call; points can then not
be given. Without any prompt the model shows what it finds most prominent.

Writes to the output folder:
  mask_0.png, ...   0 and 255, the image's size, best predicted IoU first
  overlay.png       the best mask of each object, its outline and the prompts
  result.json       scores, areas, prompts, model and times

  IMAGE                        a PNG, JPEG, BMP, GIF, TGA or PNM file of 8 bits per channel
  --point X,Y[,LABEL]          a click; LABEL is 1 for the object (default) or 0 for background;
                               repeatable
  --box X0,Y0,X1,Y1            a box around an object; repeatable
  --single-mask                one mask per object instead of three of different extent
  --bundle DIR                 the model
  --output DIR                 folder for the results
  --mask-threshold NUMBER      logits above it are object (default: 0)
  --max-hole-area PIXELS       fill holes up to this many low-resolution pixels (default: as the
                               model's own predictor: 256 for SAM 3, 0 for MobileSAM)
  --max-sprinkle-area PIXELS   remove islands up to this many low-resolution pixels (default: 0)
  --backend NAME               "auto", "onnxruntime", "tensorrt" or "tensorrt-rtx" (default: auto)
  --device NAME                "auto", "cpu", "cuda" or "cuda:N" (default: auto)
  --threads N                  CPU threads per operator (default: all cores)
)";

namespace {

[[noreturn]] void refuse(const std::string& option, const std::string& message) {
    throw UsageError("argument " + option + ": " + message);
}

double number(const std::string& option, const std::string& text) {
    std::size_t used = 0;
    double value = 0;
    try {
        value = std::stod(text, &used);
    } catch (const std::logic_error&) {
        used = 0;
    }
    if (used == 0 || used != text.size()) {
        refuse(option, "'" + text + "' is not a number");
    }
    return value;
}

/// Comma-separated finite numbers.
std::vector<float> numbers(const std::string& option, const std::string& text,
                           const std::string& form) {
    std::vector<float> values;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t end = std::min(text.find(',', start), text.size());
        values.push_back(static_cast<float>(number(option, text.substr(start, end - start))));
        if (!std::isfinite(values.back())) {
            refuse(option, "'" + text + "' is not " + form);
        }
        start = end + 1;
    }
    return values;
}

Click click(const std::string& text) {
    const std::string form = "X,Y or X,Y,LABEL";
    const std::vector<float> values = numbers("--point", text, form);
    if (values.size() != 2 && values.size() != 3) {
        refuse("--point", "'" + text + "' is not " + form);
    }
    const float label = values.size() == 3 ? values[2] : 1.0F;
    if (label != 0.0F && label != 1.0F) {
        refuse("--point", "'" + text + "': the label must be 0 or 1");
    }
    return {values[0], values[1], static_cast<int>(label)};
}

std::array<float, 4> box(const std::string& text) {
    const std::vector<float> values = numbers("--box", text, "X0,Y0,X1,Y1");
    if (values.size() != 4) {
        refuse("--box", "'" + text + "' is not X0,Y0,X1,Y1");
    }
    if (values[2] < values[0] || values[3] < values[1]) {
        refuse("--box", "'" + text + "': X1 must not be below X0, nor Y1 below Y0");
    }
    return {values[0], values[1], values[2], values[3]};
}

int thread_count(const std::string& text) {
    const double value = number("--threads", text);
    if (!(value >= 1 && value <= 4096) || value != std::floor(value)) {
        refuse("--threads", text + " is not a positive whole number");
    }
    return static_cast<int>(value);
}

/// The library has one word for what runs the graphs and where.
std::string device_of(const std::string& backend, const std::string& device) {
    if (backend == "auto" || backend == "onnxruntime") {
        return device;
    }
    if (backend != "tensorrt" && backend != "tensorrt-rtx") {
        refuse("--backend", "'" + backend +
                                "' is not \"auto\", \"onnxruntime\", \"tensorrt\" or "
                                "\"tensorrt-rtx\"");
    }
    if (device == "auto" || device == "cuda") {
        return backend;
    }
    if (device.rfind("cuda:", 0) == 0) {
        return backend + device.substr(4);
    }
    refuse("--device", "'" + device + "' does not go with --backend " + backend);
}

}  // namespace

Arguments parse_arguments(const std::vector<std::string>& words) {
    Arguments arguments;
    std::string backend = "auto";
    std::string device = "auto";
    const std::map<std::string, std::function<void(const std::string&)>> options = {
        {"--point", [&](const std::string& text) { arguments.points.push_back(click(text)); }},
        {"--box", [&](const std::string& text) { arguments.boxes.push_back(box(text)); }},
        {"--bundle", [&](const std::string& text) { arguments.bundle = text; }},
        {"--output", [&](const std::string& text) { arguments.output = text; }},
        {"--mask-threshold",
         [&](const std::string& text) {
             arguments.mask_threshold = number("--mask-threshold", text);
         }},
        {"--max-hole-area",
         [&](const std::string& text) {
             arguments.max_hole_area = number("--max-hole-area", text);
         }},
        {"--max-sprinkle-area",
         [&](const std::string& text) {
             arguments.max_sprinkle_area = number("--max-sprinkle-area", text);
         }},
        {"--backend", [&](const std::string& text) { backend = text; }},
        {"--device", [&](const std::string& text) { device = text; }},
        {"--threads", [&](const std::string& text) { arguments.threads = thread_count(text); }},
    };
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word == "-h" || word == "--help") {
            arguments.help = true;
            return arguments;
        }
        if (word == "--single-mask") {
            arguments.single_mask = true;
            continue;
        }
        if (word.empty() || word[0] != '-') {
            if (!arguments.image.empty()) {
                throw UsageError("unrecognized argument: " + word);
            }
            arguments.image = word;
            continue;
        }
        const std::size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        const auto option = options.find(name);
        if (option == options.end()) {
            throw UsageError("unrecognized argument: " + word);
        }
        if (equals != std::string::npos) {
            option->second(word.substr(equals + 1));
        } else if (i + 1 < words.size()) {
            option->second(words[++i]);
        } else {
            refuse(name, "expected one value");
        }
    }
    for (const auto& [name, value] :
         {std::pair{"IMAGE", &arguments.image}, std::pair{"--bundle", &arguments.bundle},
          std::pair{"--output", &arguments.output}}) {
        if (value->empty()) {
            throw UsageError(std::string("the following argument is required: ") + name);
        }
    }
    if (arguments.boxes.size() > 1 && !arguments.points.empty()) {
        refuse("--point", "clicks and several boxes; clicks go with at most one box");
    }
    arguments.device = device_of(backend, device);
    return arguments;
}
