// Counts what the library allocates for a click on a large image, from `predict` to its results:
// how often and how many bytes. ONNX Runtime's own allocations are left out: its library is not in
// this program, while the static sam3rt is.
//
//   allocations BUNDLE HEIGHT WIDTH
//
// Prints: count, bytes, and the bytes of the results themselves.

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <new>
#include <vector>

#include "sam3rt/sam3rt.hpp"

/// Where this program's code begins and ends; the linker says so.
extern "C" const char __executable_start;  // NOLINT(bugprone-reserved-identifier)
extern "C" const char etext;

namespace {

std::atomic<std::size_t> count{0};
std::atomic<std::size_t> bytes{0};

void* allocate(std::size_t size, std::size_t alignment, const void* caller) {
    if (caller >= &__executable_start && caller < &etext) {
        ++count;
        bytes += size;
    }
    void* memory = alignment == 0 ? std::malloc(size == 0 ? 1 : size)
                                  : std::aligned_alloc(
                                        alignment, (size + alignment - 1) / alignment * alignment);
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return memory;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, 0, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
    return allocate(size, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

int main(int argument_count, char** arguments) {
    if (argument_count != 4) {
        std::cerr << "usage: allocations BUNDLE HEIGHT WIDTH\n";
        return 2;
    }
    const std::int64_t height = std::atoll(arguments[2]);
    const std::int64_t width = std::atoll(arguments[3]);
    const std::vector<std::uint8_t> pixels(static_cast<std::size_t>(height * width * 3), 127);
    sam3rt::ModelOptions options;
    options.device = "cpu";
    options.threads = 1;
    sam3rt::PredictorOptions as_they_are;
    as_they_are.max_hole_area = 0;
    sam3rt::Predictor predictor(sam3rt::Model::load(arguments[1], options), as_they_are);
    predictor.set_image({pixels.data(), height, width});
    sam3rt::Prompts click;
    click.point_coords = sam3rt::Array<float>::rows({{4, 4}});
    click.point_labels = sam3rt::Array<std::int64_t>::list({1});
    // The first click loads the decoder and makes what later ones find.
    predictor.predict(click);
    count = 0;
    bytes = 0;
    const sam3rt::Prediction found = predictor.predict(click);
    const std::size_t taken = bytes;
    std::cout << count << " " << taken << " "
              << found.masks.size() +
                     sizeof(float) * (found.low_res_masks.size() + found.iou_predictions.size())
              << "\n";
}
