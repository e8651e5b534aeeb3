// sam3rt_segment: one image, prompts, masks as PNG files.

#include <chrono>
#include <exception>
#include <iostream>
#include <sam3rt/sam3rt.hpp>

#include "arguments.hpp"
#include "image_files.hpp"
#include "results.hpp"

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

sam3rt::Prompts prompts_of(const Arguments& arguments) {
    sam3rt::Prompts prompts;
    std::vector<float> coords;
    std::vector<std::int64_t> labels;
    for (const Click& click : arguments.points) {
        coords.insert(coords.end(), {click.x, click.y});
        labels.push_back(click.label);
    }
    const auto count = static_cast<std::int64_t>(labels.size());
    if (count != 0) {
        prompts.point_coords = sam3rt::Array<float>({count, 2}, coords);
        prompts.point_labels = sam3rt::Array<std::int64_t>({count}, labels);
    }
    std::vector<float> corners;
    for (const auto& box : arguments.boxes) {
        corners.insert(corners.end(), box.begin(), box.end());
    }
    if (!corners.empty()) {
        prompts.box =
            sam3rt::Array<float>({static_cast<std::int64_t>(arguments.boxes.size()), 4}, corners);
    }
    return prompts;
}

void segment(const Arguments& arguments) {
    const std::vector<std::filesystem::path> earlier = earlier_results(arguments);
    const Picture image = read_image(arguments.image);
    sam3rt::ModelOptions model_options;
    model_options.device = arguments.device;
    model_options.threads = arguments.threads;
    const sam3rt::Model model = sam3rt::Model::load(arguments.bundle, model_options);
    sam3rt::PredictorOptions predictor_options;
    predictor_options.mask_threshold = arguments.mask_threshold;
    predictor_options.max_hole_area = arguments.max_hole_area;
    predictor_options.max_sprinkle_area = arguments.max_sprinkle_area;
    sam3rt::Predictor predictor(model, predictor_options);
    const sam3rt::Prompts prompts = prompts_of(arguments);

    Seconds seconds{};
    auto start = std::chrono::steady_clock::now();
    model.prepare();
    seconds.load = seconds_since(start);
    start = std::chrono::steady_clock::now();
    predictor.set_image({image.pixels.data(), image.height, image.width});
    seconds.encode = seconds_since(start);
    start = std::chrono::steady_clock::now();
    sam3rt::PredictOptions options;
    options.multimask_output = !arguments.single_mask;
    const sam3rt::Prediction prediction = predictor.predict(prompts, options);
    seconds.predict = seconds_since(start);
    if (!prediction.warning.empty()) {
        std::cerr << "sam3rt_segment: " << prediction.warning << "\n";
    }

    const std::vector<Found> found = sorted(prediction);
    write_results(arguments, earlier, image, model, found, seconds);
    std::cout << table(found, arguments, seconds);
}

}  // namespace

int main(int count, char** words) {
    try {
        const Arguments arguments = parse_arguments({words + 1, words + count});
        if (arguments.help) {
            std::cout << usage_text;
            return 0;
        }
        segment(arguments);
        return 0;
    } catch (const UsageError& error) {
        std::cerr << "sam3rt_segment: " << error.what() << "\n";
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "sam3rt_segment: " << error.what() << "\n";
        return 1;
    }
}
