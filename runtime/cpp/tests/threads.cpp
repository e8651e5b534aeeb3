// Many threads on one model: each encodes, saves, loads, decodes and predicts at once with the
// others, from a model whose graphs nobody has loaded yet, and must get what one thread gets alone.
// Then they encode until they are stopped.
//
//   threads BUNDLE FOLDER [DEVICE]
//
// On TensorRT without ONNX Runtime each also has an image in device memory, and masks left there.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "callers_memory.hpp"
#include "sam3rt/sam3rt.hpp"

namespace {

constexpr std::int64_t height = 24;
constexpr std::int64_t width = 32;
constexpr int thread_count = 4;
constexpr int rounds = 3;

sam3rt::Array<std::uint8_t> picture() {
    sam3rt::Array<std::uint8_t> pixels({height, width, 3});
    for (std::size_t i = 0; i < pixels.size(); ++i) {
        pixels[i] = static_cast<std::uint8_t>(i * 31 % 251);
    }
    return pixels;
}

sam3rt::Prompts click(int number) {
    sam3rt::Prompts prompts;
    prompts.point_coords = sam3rt::Array<float>::rows({{4.0F + static_cast<float>(number), 12.0F}});
    prompts.point_labels = sam3rt::Array<std::int64_t>::list({1});
    return prompts;
}

/// Equal but for what the order of sums in a busy thread pool may change; a GPU's library may choose
/// other kernels, which sum in half precision, each time a model is loaded.
bool close(const sam3rt::Array<float>& a, const sam3rt::Array<float>& b, const std::string& device) {
    const float limit = device == "cpu" ? 1e-3F : 5e-2F;
    return a.shape() == b.shape() &&
           std::equal(a.begin(), a.end(), b.begin(),
                      [limit](float x, float y) { return std::abs(x - y) <= limit; });
}

/// Threads that wait for their turn and run, half of them until a time, half until they are told to
/// end. How many ended otherwise.
int calls_that_do_not_end(const sam3rt::Model& model, const sam3rt::ImageView& image) {
    const sam3rt::Cancellation request;
    const sam3rt::Cancellation deadline(std::chrono::milliseconds(20));
    std::atomic<int> others{thread_count};
    std::vector<std::thread> threads;
    for (int i = 0; i < thread_count; ++i) {
        threads.emplace_back([&, i] {
            try {
                for (;;) {
                    model.encode(image, i % 2 == 0 ? &request : &deadline);
                }
            } catch (const sam3rt::CancelledError&) {
                --others;
            } catch (const std::exception& error) {
                std::cerr << error.what() << "\n";
            }
        });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    request.cancel();
    for (std::thread& thread : threads) {
        thread.join();
    }
    return others;
}

/// Whether an image in device memory gives masks there that are those of the host's image.
bool device_memory_does(const sam3rt::Model& model, const sam3rt::Array<std::uint8_t>& pixels,
                        int number) {
    using sam3rt::testing::CallersMemory;
    sam3rt::Predictor predictor(model);
    predictor.set_image({pixels.data(), height, width});
    const sam3rt::Prediction expected = predictor.predict(click(number));
    CallersMemory image(pixels.size(), number % 2 == 0);
    CallersMemory masks(expected.masks.size(), number % 2 == 0);
    image.fill(pixels.data(), 0);
    sam3rt::ImageView view{image.address(), height, width};
    view.on_device = true;
    view.stream = image.stream();
    predictor.set_image_batch({view, view});
    sam3rt::PredictOptions options;
    options.output = masks.address();
    options.output_size = expected.masks.size();
    options.output_on_device = true;
    options.stream = masks.stream();
    predictor.predict(click(number), options);
    const std::vector<std::uint8_t> found = masks.content();
    std::size_t differing = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        differing += found[i] == expected.masks[i] ? 0 : 1;
    }
    // Two images at a time may run on other kernels than one.
    return found.size() == expected.masks.size() && differing * 100 <= found.size();
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3 && count != 4) {
        std::cerr << "usage: threads BUNDLE FOLDER [DEVICE]\n";
        return 2;
    }
    sam3rt::ModelOptions options;
    options.device = count == 4 ? arguments[3] : "cpu";
    options.threads = 1;
    // Fewer than threads, so that some wait.
    options.concurrent_decodes = thread_count - 1;
    const sam3rt::Array<std::uint8_t> pixels = picture();
    const sam3rt::ImageView image{pixels.data(), height, width};

    const sam3rt::Model alone = sam3rt::Model::load(arguments[1], options);
    const sam3rt::ImageEmbedding expected_embedding = alone.encode(image);
    std::vector<sam3rt::DecodedMasks> expected;
    for (int i = 0; i < thread_count; ++i) {
        expected.push_back(alone.decode(expected_embedding, click(i)));
    }

    // One model, and one embedding, that all threads share.
    const sam3rt::Model model = sam3rt::Model::load(arguments[1], options);
    const std::filesystem::path folder = arguments[2];
    const std::filesystem::path shared_path = folder / "shared.embedding";
    std::atomic<int> failures{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < thread_count; ++i) {
        threads.emplace_back([&, i] {
            try {
                const sam3rt::ImageEmbedding own = model.encode(image);
                own.save(shared_path);  // all to one path: it always holds a whole file
                const sam3rt::ImageEmbedding loaded = model.load_embedding(shared_path);
                sam3rt::Predictor predictor(model);
                predictor.set_embedding(loaded);
                for (int round = 0; round < rounds; ++round) {
                    const auto decoded = model.decode(expected_embedding, click(i));
                    const auto prediction = predictor.predict(click(i));
                    const auto& wanted = expected[static_cast<std::size_t>(i)];
                    if (!close(decoded.low_res_masks, wanted.low_res_masks, model.device()) ||
                        !close(prediction.iou_predictions,
                               sam3rt::Array<float>({3}, wanted.iou_predictions.data(), 3),
                               model.device())) {
                        ++failures;
                    }
                }
                predictor.set_embedding_batch({loaded, expected_embedding, own});
                for (const auto& prediction :
                     predictor.predict_batch({click(i), click(i), click(i)})) {
                    const auto& wanted = expected[static_cast<std::size_t>(i)].iou_predictions;
                    if (!close(prediction.iou_predictions,
                               sam3rt::Array<float>({3}, wanted.data(), 3), model.device())) {
                        ++failures;
                    }
                }
                if (model.device().find("tensorrt") == 0 && !device_memory_does(model, pixels, i)) {
                    ++failures;
                }
            } catch (const std::exception& error) {
                std::cerr << error.what() << "\n";
                ++failures;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    failures += calls_that_do_not_end(model, image);
    std::cout << thread_count << " threads, " << failures << " failures\n";
    return failures == 0 ? 0 : 1;
}
