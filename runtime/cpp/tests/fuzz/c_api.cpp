// libFuzzer: calls of the C interface whose structures, arrays and bytes come from the input, on the
// model in the folder that SAM3RT_FUZZ_BUNDLE names. Memory is as long as the structures say, so
// that AddressSanitizer notices every byte beyond it.
#include "sam3rt.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

/// Hands out the input piece by piece; zeros after its end.
class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

    void fill(void* out, std::size_t size) {
        if (size == 0) {
            return;
        }
        std::memset(out, 0, size);
        const std::size_t count = std::min(size, size_);
        if (count != 0) {
            std::memcpy(out, data_, count);
        }
        data_ += count;
        size_ -= count;
    }
    template <typename T>
    T take() {
        T value;
        fill(&value, sizeof value);
        return value;
    }
    int below(int limit) { return take<std::uint8_t>() % limit; }
    std::vector<std::uint8_t> rest() const { return {data_, data_ + size_}; }

private:
    const std::uint8_t* data_;
    std::size_t size_;
};

template <typename T>
using Memory = std::vector<T>;

/// An array of small or impossible sizes over memory that is as long as they say.
template <typename View, typename T>
void take_array(Input& input, Memory<T>& memory, View& view) {
    if (input.below(3) == 0) {
        return;
    }
    view.axes = input.below(8) == 0 ? input.take<std::int32_t>() : input.below(5);
    std::size_t count = 1;
    for (std::int64_t& side : view.shape) {
        side = input.below(10);
        count *= static_cast<std::size_t>(side);
    }
    memory.resize(count);
    input.fill(memory.data(), count * sizeof(T));
    view.values = memory.data();
    if (input.below(16) == 0) {
        view.shape[input.below(4)] = -1 - input.below(100);
    }
    if (input.below(16) == 0) {
        // More than memory can be, unless another side is 0.
        std::fill_n(view.shape, 4, std::int64_t{1} << (16 + input.below(46)));
        view.axes = 4;
    }
}

/// Now and then a size of no version of a structure, or of an older one.
template <typename T>
void take_size(Input& input, T& structure) {
    structure.struct_size = input.below(8) == 0 ? input.take<std::uint8_t>() % (sizeof(T) + 1)
                                                : sizeof(T);
}

sam3rt_model* model = nullptr;
sam3rt_predictor* predictor = nullptr;

void check(sam3rt_status status, sam3rt_error* error) {
    if ((status == SAM3RT_OK) != (error == nullptr) || status == SAM3RT_INTERNAL_ERROR) {
        std::fprintf(stderr, "status %d: %s\n", status, sam3rt_error_message(error));
        std::abort();
    }
    sam3rt_error_free(error);
}

void predict(Input& input) {
    Memory<float> coords;
    Memory<float> box;
    Memory<float> mask;
    Memory<std::int64_t> labels;
    Memory<std::int64_t> counts;
    sam3rt_prompts prompts{};
    take_array(input, coords, prompts.point_coords);
    take_array(input, labels, prompts.point_labels);
    take_array(input, box, prompts.box);
    take_array(input, mask, prompts.mask_input);
    take_array(input, counts, prompts.point_counts);
    // Labels and counts that are legal now and then.
    std::for_each(labels.begin(), labels.end(), [](std::int64_t& label) { label %= 5; });
    std::for_each(counts.begin(), counts.end(), [](std::int64_t& count) { count %= 5; });
    prompts.coords_are_normalized = input.below(2);
    take_size(input, prompts);

    sam3rt_predict_options options{};
    options.single_mask = input.below(2);
    options.return_logits = input.below(4) == 0;
    options.best_mask_only = input.below(2);
    options.foreground = input.take<std::int16_t>() % 300;
    options.mask_form = input.below(5) - 1;
    Memory<float> output(input.below(4) == 0 ? 1024 : 0);
    options.output = output.empty() ? nullptr : output.data();
    options.output_size = output.size() * sizeof(float);
    take_size(input, options);

    sam3rt_prediction* prediction = nullptr;
    sam3rt_error* error = nullptr;
    check(sam3rt_predictor_predict(predictor, &prompts, &options, &prediction, &error), error);
    for (std::size_t i = 0; i < sam3rt_prediction_rle_count(prediction); ++i) {
        if (std::strlen(sam3rt_prediction_rle(prediction, i)) == 0) {
            std::abort();
        }
    }
    sam3rt_prediction_free(prediction);
}

void encode(Input& input) {
    sam3rt_image image{};
    image.height = input.below(12);
    image.width = input.below(12);
    image.format = input.below(10) - 1;
    const std::int64_t pad = input.below(5);
    static const std::int64_t bytes[] = {3, 3, 4, 4, 1, 1, 1, 1};
    const bool is_known = image.format >= 0 && image.format < 8;
    const std::int64_t stride = image.width * (is_known ? bytes[image.format] : 3) + pad;
    const std::int64_t plane = stride * image.height + (image.format >= SAM3RT_PLANAR ? pad : 0);
    const std::int64_t planes = image.format == SAM3RT_PLANAR ? 3 : 1;
    Memory<std::uint8_t> pixels(static_cast<std::size_t>(
        image.format >= SAM3RT_NV12 ? plane + stride * image.height / 2 : plane * planes));
    input.fill(pixels.data(), pixels.size());
    image.pixels = pixels.empty() ? nullptr : pixels.data();
    image.row_stride = static_cast<std::ptrdiff_t>(stride);
    image.plane_stride = image.format >= SAM3RT_PLANAR ? static_cast<std::size_t>(plane) : 0;
    switch (input.below(8)) {
        case 0:
            if (image.height > 0 && image.format < SAM3RT_PLANAR) {
                image.pixels = pixels.data() + (image.height - 1) * stride;
            }
            image.row_stride = -image.row_stride;
            break;
        case 1:
            // Too small, too large, or negative for one row.
            image.row_stride = input.below(2) == 0 ? 0 : PTRDIFF_MIN + input.below(100);
            break;
        case 2:
            image.height = input.take<std::int64_t>() | (std::int64_t{1} << 40U);
            break;
        default:
            break;
    }
    if (image.row_stride == 0 && pad != 0) {
        image.plane_stride = 0;
    }
    sam3rt_cancellation* cancellation = nullptr;
    if (input.below(8) == 0) {
        sam3rt_error* error = nullptr;
        check(sam3rt_cancellation_new(input.take<double>(), &cancellation, &error), error);
        sam3rt_cancellation_cancel(cancellation);
    }
    image.struct_size = sizeof image;
    sam3rt_embedding* embedding = nullptr;
    sam3rt_error* error = nullptr;
    check(sam3rt_model_encode_cancellable(model, &image, cancellation, &embedding, &error), error);
    sam3rt_cancellation_free(cancellation);
    sam3rt_embedding_free(embedding);
}

void load_embedding(Input& input) {
    const std::vector<std::uint8_t> content = input.rest();
    sam3rt_embedding* embedding = nullptr;
    sam3rt_error* error = nullptr;
    check(sam3rt_embedding_from_bytes(model, content.data(), content.size(), &embedding, &error),
          error);
    sam3rt_embedding_free(embedding);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*count*/, char*** /*arguments*/) {
    const char* bundle = std::getenv("SAM3RT_FUZZ_BUNDLE");
    sam3rt_model_options options{};
    options.struct_size = sizeof options;
    options.device = "cpu";
    options.threads = 1;
    const std::vector<std::uint8_t> pixels(std::size_t{3} * 10 * 14, 90);
    sam3rt_image image{};
    image.struct_size = sizeof image;
    image.pixels = pixels.data();
    image.height = 10;
    image.width = 14;
    sam3rt_error* error = nullptr;
    check(sam3rt_model_load(bundle, &options, &model, &error), error);
    check(sam3rt_predictor_new(model, nullptr, &predictor, &error), error);
    check(sam3rt_predictor_set_image(predictor, &image, &error), error);
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    switch (input.below(4)) {
        case 0:
            encode(input);
            break;
        case 1:
            load_embedding(input);
            break;
        default:
            predict(input);
    }
    return 0;
}
