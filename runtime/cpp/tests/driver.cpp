// Runs the steps of a JSON file and writes what each returned or threw, so that the Python tests
// can compare the library, and its parts, with the Python runtime. Arrays travel in .npy files.
//
//   driver STEPS.json RESULTS.json

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "accuracy.hpp"
#include "backend.hpp"
#include "bundle.hpp"
#include "callers_memory.hpp"
#include "components.hpp"
#include "embedding.hpp"
#include "engines.hpp"
#include "files.hpp"
#include "geometry.hpp"
#include "gpu.hpp"
#include "inflate.hpp"
#include "npy.hpp"
#include "npz.hpp"
#include "onnx_locations.hpp"
#include "postprocess.hpp"
#include "prompts.hpp"
#include "record.hpp"
#include "resize.hpp"
#include "sam3rt/sam3rt.hpp"
#include "sha256.hpp"
#include "verdicts.hpp"
#if SAM3RT_ONNXRUNTIME
#include "onnx_split.hpp"
#include "ort_session.hpp"
#endif

namespace {

using namespace sam3rt;
using nlohmann::json;
using testing::CallersMemory;
using testing::read_npy;
using testing::write_npy;

/// The limit for files of the tests themselves.
constexpr std::uint64_t whole_file = std::uint64_t{1} << 40U;

std::string text(const json& step, const std::string& name) {
    return step.at(name).get<std::string>();
}

/// The entry of a map that a step names. Throws StateError where an earlier step has not made it.
template <typename Map>
auto& named(Map& entries, const json& step, const std::string& kind) {
    const auto found = entries.find(text(step, kind));
    if (found == entries.end()) {
        throw StateError("no step has made the " + kind + " " + text(step, kind));
    }
    return found->second;
}

/// What later steps may refer to by name.
struct Session {
    const Model& model(const json& step) const { return named(models, step, "model"); }
    const ImageEmbedding& embedding(const json& step) const {
        return named(embeddings, step, "embedding");
    }
    Predictor& predictor(const json& step) { return named(predictors, step, "predictor"); }

    std::map<std::string, Model> models;
    std::map<std::string, ImageEmbedding> embeddings;
    std::map<std::string, Predictor> predictors;
    /// The files of a bundle that was loaded from memory.
    std::map<std::string, std::weak_ptr<const Bytes>> lent;
};

/// Where a step's result of a given name goes.
std::string result_path(const json& step, const std::string& name) {
    return text(step, "out") + "." + name + ".npy";
}

Size size_of(const json& value) {
    return {value.at(0).get<std::int64_t>(), value.at(1).get<std::int64_t>()};
}

ImageGeometry geometry_from(const json& value) {
    return {size_of(value.at("original_size")), size_of(value.at("input_size"))};
}

json as_json(const Size& size) { return json::array({size.height, size.width}); }

/// Device memory of so many bytes for what a step has there. "device" says how: with a stream of
/// its "own" or the "default" one.
std::unique_ptr<CallersMemory> callers_memory(const json& step, std::size_t bytes) {
    return std::make_unique<CallersMemory>(bytes, text(step, "device") != "default");
}

/// The stream to name, which is wrong where "stream" says so.
void* stream_to_name(const json& step, const CallersMemory& memory) {
    return step.value("stream", "") == "another's" ? reinterpret_cast<void*>(64)
                                                   : memory.stream();
}

/// An image from a .npy file: [H, W, 3], [H, W, 4], [H, W], or [H, stride] bytes with a width. With
/// "device" it is in device memory, or only said to be, and will be there after "delay" copies.
struct Image {
    explicit Image(const json& step, const std::string& name = "image")
        : pixels(read_npy<std::uint8_t>(text(step, name))) {
        view.pixels = pixels.data();
        view.height = pixels.shape().at(0);
        view.width = step.value("width", pixels.shape().at(1));
        view.row_stride =
            step.contains("width") ? static_cast<std::ptrdiff_t>(pixels.shape()[1]) : 0;
        view.height = step.value("height", view.height);
        view.row_stride = step.value("row_stride", view.row_stride);
        view.plane_stride = step.value("plane_stride", std::size_t{0});
        // Where the first row stands, for images that are stored bottom up.
        view.pixels += step.value("first_row", 0) * pixels.shape().at(1);
        static const std::map<std::string, PixelFormat> formats = {{"rgb", PixelFormat::rgb},
                                                                   {"bgr", PixelFormat::bgr},
                                                                   {"rgba", PixelFormat::rgba},
                                                                   {"bgra", PixelFormat::bgra},
                                                                   {"grey", PixelFormat::grey},
                                                                   {"planar", PixelFormat::planar},
                                                                   {"nv12", PixelFormat::nv12},
                                                                   {"nv12_bt709", PixelFormat::nv12_bt709}};
        view.format = formats.at(step.value("format", "rgb"));
        view.on_device = step.contains("device");
        if (view.on_device && text(step, "device") != "host") {
            memory = callers_memory(step, pixels.size());
            memory->fill(pixels.data(), step.value("delay", std::size_t{0}));
            view.pixels = memory->address() + (view.pixels - pixels.data());
            view.stream = stream_to_name(step, *memory);
            if (step.value("stream", "") == "recorded") {
                memory->content();
                memory->record(true);
                recorded = true;
            }
        }
    }
    Image(Image&&) = default;
    // NOLINTNEXTLINE(bugprone-exception-escape): where CUDA fails here, the test has failed.
    ~Image() {
        if (memory != nullptr && recorded) {
            memory->record(false);
        }
    }

    Array<std::uint8_t> pixels;
    ImageView view;
    std::unique_ptr<CallersMemory> memory;
    bool recorded = false;
};

/// Ends a step's call at the time that it names, or when a thread says so.
class Ending {
public:
    explicit Ending(const json& step) {
        if (step.contains("deadline")) {
            cancellation_.emplace(seconds(step["deadline"]));
        } else if (step.contains("cancel_after")) {
            cancellation_.emplace();
            thread_ = std::thread([this, wait = seconds(step["cancel_after"])] {
                std::this_thread::sleep_for(wait);
                cancellation_->cancel();
            });
        }
    }
    Ending(const Ending&) = delete;
    Ending& operator=(const Ending&) = delete;
    ~Ending() {
        if (thread_.joinable()) {
            thread_.join();
        }
    }

    const Cancellation* get() const { return cancellation_ ? &*cancellation_ : nullptr; }

private:
    static std::chrono::nanoseconds seconds(const json& value) {
        return std::chrono::nanoseconds(static_cast<std::int64_t>(value.get<double>() * 1e9));
    }

    std::optional<Cancellation> cancellation_;
    std::thread thread_;
};

Prompts prompts_of(const json& value) {
    Prompts prompts;
    if (value.contains("point_coords")) {
        prompts.point_coords = read_npy<float>(text(value, "point_coords"));
    }
    if (value.contains("point_labels")) {
        prompts.point_labels = read_npy<std::int64_t>(text(value, "point_labels"));
    }
    if (value.contains("point_counts")) {
        prompts.point_counts = read_npy<std::int64_t>(text(value, "point_counts"));
    }
    if (value.contains("box")) {
        prompts.box = read_npy<float>(text(value, "box"));
    }
    if (value.contains("mask_input")) {
        prompts.mask_input = read_npy<float>(text(value, "mask_input"));
    }
    prompts.normalize_coords = value.value("normalize_coords", true);
    return prompts;
}

PredictOptions predict_options_of(const json& step) {
    PredictOptions options;
    options.multimask_output = step.value("multimask_output", true);
    options.return_logits = step.value("return_logits", false);
    options.best_mask_only = step.value("best_mask_only", false);
    static const std::map<std::string, MaskForm> forms = {
        {"bytes", MaskForm::bytes}, {"bits", MaskForm::bits}, {"rle", MaskForm::rle}};
    options.form = forms.at(step.value("form", "bytes"));
    options.foreground = static_cast<std::uint8_t>(step.value("foreground", 1));
    return options;
}

void write_prediction(const json& step, const std::string& prefix, const Prediction& prediction) {
    if (prediction.logits.size() != 0) {
        write_npy(result_path(step, prefix + "masks"), prediction.logits);
    } else {
        write_npy(result_path(step, prefix + "masks"), prediction.masks);
    }
    write_npy(result_path(step, prefix + "iou"), prediction.iou_predictions);
    write_npy(result_path(step, prefix + "low_res"), prediction.low_res_masks);
}

json predict(Session& session, const json& step) {
    const Ending ending(step);
    PredictOptions options = predict_options_of(step);
    options.cancellation = ending.get();
    // Memory of the caller's, of so many bytes, from a place that need not be aligned.
    Bytes memory(step.value("output", std::size_t{0}));
    const std::size_t shift = step.value("shift", std::size_t{0});
    options.output = memory.empty() ? nullptr : memory.data() + shift;
    options.output_size = memory.size() - shift;
    std::unique_ptr<CallersMemory> room;
    options.output_on_device = step.contains("device");
    if (options.output_on_device && text(step, "device") != "host" && !memory.empty()) {
        room = callers_memory(step, memory.size());
        // What the caller may still be doing there.
        std::fill(memory.begin(), memory.end(), std::uint8_t{7});
        room->fill(memory.data(), step.value("delay", std::size_t{0}));
        options.output = room->address() + shift;
        options.stream = stream_to_name(step, *room);
    }
    Prediction prediction = session.predictor(step).predict(
        prompts_of(step.value("prompts", json::object())), options);
    if (room != nullptr) {
        memory = room->content();
        options.output = memory.data() + shift;
    }
    if (!memory.empty()) {
        const std::size_t count = element_count(prediction.shape);
        const bool is_empty = prediction.masks.size() == 0 && prediction.logits.size() == 0;
        if (!is_empty) {
            throw StateError("a result is in two places");
        }
        if (options.return_logits) {
            prediction.logits = Array<float>(
                prediction.shape, static_cast<const float*>(options.output), count);
        } else {
            prediction.masks = Array<std::uint8_t>(
                prediction.shape, static_cast<const std::uint8_t*>(options.output), count);
        }
    }
    write_prediction(step, "", prediction);
    return {{"rle", prediction.rle}, {"shape", prediction.shape}};
}

json describe(const Manifest& manifest) {
    json files = json::array();
    for (const FileEntry& entry : manifest.files()) {
        files.push_back({entry.file, entry.sha256, entry.bytes});
    }
    return {{"name", manifest.name},
            {"fingerprint", manifest.fingerprint},
            {"export_id", manifest.export_id},
            {"model_type", manifest.model_type},
            {"weights", manifest.weights},
            {"license", manifest.source.license},
            {"source_weights", manifest.source.weights},
            {"notes", manifest.source.notes},
            {"files", files},
            {"image_size", as_json(manifest.image.size)},
            {"mean", manifest.image.mean},
            {"std", manifest.image.std},
            {"pad_value", manifest.image.pad_value},
            {"mask_size", as_json(manifest.prompts.mask_size)},
            {"low_res_size", as_json(manifest.masks.low_res_size)},
            {"multimask", manifest.masks.multimask},
            {"max_hole_area", manifest.masks.max_hole_area},
            {"mask_iou", manifest.parity_limits.mask_iou},
            {"producer", manifest.producer}};
}

ModelOptions model_options_of(const json& step) {
    ModelOptions options;
    options.device = step.value("device", "cpu");
    options.threads = step.value("threads", 0);
    options.concurrent_encodes = step.value("concurrent_encodes", 1);
    options.concurrent_decodes = step.value("concurrent_decodes", 4);
    options.check_files = step.value("check_files", true);
    options.map_weights = step.value("map_weights", false);
    if (step.contains("expected_fingerprint")) {
        options.expected_fingerprint = text(step, "expected_fingerprint");
    }
    options.engine_folder = step.value("engine_folder", "");
    options.provider_options =
        step.value("provider_options", std::map<std::string, std::string>());
    options.thread_affinities = step.value("thread_affinities", "");
    options.spin_between_runs = step.value("spin_between_runs", false);
    options.memory_arena = step.value("memory_arena", true);
    options.environment_allocators = step.value("environment_allocators", false);
    return options;
}

json add_model(Session& session, const json& step, const Model& model) {
    session.models.insert_or_assign(text(step, "model"), model);
    return {{"device", model.device()},
            {"joins_images", model.joins_images()},
            {"fingerprint", model.manifest().fingerprint},
            {"path", model.path().string()}};
}

json load_model(Session& session, const json& step) {
    return add_model(session, step, Model::load(text(step, "path"), model_options_of(step)));
}

/// Load a bundle from the files of a folder, each [NAME, PATH], or with null for a path, without
/// content.
json load_from_memory(Session& session, const json& step) {
    std::vector<BundleFile> files;
    for (const json& entry : step.at("files")) {
        BundleFile file{entry.at(0), nullptr, 1, nullptr};
        if (!entry.at(1).is_null()) {
            const auto content = std::make_shared<const Bytes>(
                read_file(entry.at(1).get<std::string>(), whole_file));
            session.lent[file.name] = content;
            file = {file.name, content->data(), content->size(), content};
        }
        files.push_back(file);
    }
    return add_model(session, step, Model::load_from_memory(files, model_options_of(step)));
}

/// The names of the files in memory that something still holds.
json lent(const Session& session) {
    json names = json::array();
    for (const auto& [name, content] : session.lent) {
        if (!content.expired()) {
            names.push_back(name);
        }
    }
    return names;
}

json add_embedding(Session& session, const json& step, const ImageEmbedding& embedding) {
    session.embeddings.insert_or_assign(text(step, "embedding"), embedding);
    return {{"original_size", as_json(embedding.original_size())},
            {"input_size", as_json(embedding.input_size())},
            {"names", embedding.names()},
            {"nbytes", embedding.nbytes()}};
}

json maps(Session& session, const json& step) {
    const std::vector<Array<float>> found = session.embedding(step).maps();
    for (std::size_t i = 0; i < found.size(); ++i) {
        write_npy(result_path(step, std::to_string(i)), found[i]);
    }
    return found.size();
}

json decode(Session& session, const json& step) {
    const Ending ending(step);
    const DecodedMasks decoded =
        session.model(step).decode(session.embedding(step), prompts_of(step["prompts"]),
                                   step.value("multimask_output", true), ending.get());
    write_npy(result_path(step, "low_res"), decoded.low_res_masks);
    write_npy(result_path(step, "iou"), decoded.iou_predictions);
    if (decoded.object_score_logits) {
        write_npy(result_path(step, "object_score"), *decoded.object_score_logits);
    }
    return decoded.warning;
}

void new_predictor(Session& session, const json& step) {
    PredictorOptions options;
    // JSON has no NaN.
    const auto number = [](const json& value) {
        return value.is_string() ? std::stod(value.get<std::string>()) : value.get<double>();
    };
    if (step.contains("mask_threshold")) {
        options.mask_threshold = number(step["mask_threshold"]);
    }
    if (step.contains("max_hole_area")) {
        options.max_hole_area = number(step["max_hole_area"]);
    }
    if (step.contains("max_sprinkle_area")) {
        options.max_sprinkle_area = number(step["max_sprinkle_area"]);
    }
    session.predictors.insert_or_assign(text(step, "predictor"),
                                        Predictor(session.model(step), options));
}

void set_image_batch(Session& session, const json& step) {
    std::vector<Image> images;
    std::vector<ImageView> views;
    for (const json& path : step.at("images")) {
        if (path.is_null()) {
            views.emplace_back();
            continue;
        }
        json image = step;
        image["image"] = path;
        images.emplace_back(image);
        views.push_back(images.back().view);
    }
    session.predictor(step).set_image_batch(views);
}

void set_embedding_batch(Session& session, const json& step) {
    std::vector<ImageEmbedding> embeddings;
    for (const json& name : step.at("embeddings")) {
        embeddings.push_back(session.embeddings.at(name));
    }
    session.predictor(step).set_embedding_batch(std::move(embeddings));
}

json predict_batch(Session& session, const json& step) {
    std::vector<Prompts> prompts;
    for (const json& entry : step.at("prompts")) {
        prompts.push_back(prompts_of(entry));
    }
    const Ending ending(step);
    PredictOptions options = predict_options_of(step);
    options.cancellation = ending.get();
    const std::vector<Prediction> predictions =
        session.predictor(step).predict_batch(prompts, options);
    for (std::size_t i = 0; i < predictions.size(); ++i) {
        write_prediction(step, std::to_string(i) + ".", predictions[i]);
    }
    return predictions.size();
}

json pack_prompts(const json& step) {
    PromptSpec spec;
    spec.box_position = text(step, "box_position") == "before_points"
                            ? PromptSpec::BoxPosition::before_points
                            : PromptSpec::BoxPosition::after_points;
    spec.padding_point = text(step, "padding_point") == "always"
                             ? PromptSpec::PaddingPoint::always
                             : PromptSpec::PaddingPoint::without_box;
    spec.mask_size = size_of(step.at("mask_size"));
    const PackedPrompts packed = pack(prompts_of(step["prompts"]), spec, geometry_from(step));
    write_npy(result_path(step, "points"), packed.points);
    write_npy(result_path(step, "labels"), packed.labels);
    if (packed.masks) {
        write_npy(result_path(step, "masks"), *packed.masks);
    }
    return packed.warning;
}

json preprocess_image(Session& session, const json& step) {
    const Image image(step);
    const ImageSpec& spec = session.model(step).manifest().image;
    check_image(image.view, "image");
    const ImageGeometry geometry = geometry_of(spec, {image.view.height, image.view.width});
    write_npy(result_path(step, "pixels"), preprocess(spec, image.view, geometry));
    return as_json(geometry.input_size);
}

void resize(const json& step) {
    const Image image(step);
    const Size target = size_of(step.at("target"));
    const Shape shape = {target.height, target.width, 3};
    if (step.at("rounded").get<bool>()) {
        write_npy(result_path(step, "pixels"),
                  Array<std::uint8_t>(shape, resize_rounded(image.view, target)));
    } else {
        write_npy(result_path(step, "pixels"),
                  Array<float>(shape, resize_unrounded(image.view, target)));
    }
}

void finish(const json& step) {
    ImageSpec image;
    image.size = size_of(step.at("padded"));
    MaskSpec masks;
    masks.upsampling = text(step, "upsampling") == "direct" ? MaskSpec::Upsampling::direct
                                                            : MaskSpec::Upsampling::unpad;
    const Cleaning cleaning{step.at("threshold"), step.at("max_hole_area"),
                            step.at("max_sprinkle_area")};
    const Array<float> low_res = read_npy<float>(text(step, "low_res"));
    masks.low_res_size = {low_res.shape().at(2), low_res.shape().at(3)};
    const Resampling resampling = resampling_to_image(geometry_from(step), image, masks);
    const MaskSource source{low_res, resampling, cleaning, nullptr, nullptr};
    if (step.at("return_logits").get<bool>()) {
        Array<float> logits(full_shape(low_res, resampling));
        finish_logits(source, logits.data());
        write_npy(result_path(step, "masks"), logits);
    } else {
        Array<std::uint8_t> finished(full_shape(low_res, resampling));
        finish_masks(source, 1, finished.data());
        write_npy(result_path(step, "masks"), finished);
    }
}

json components(const json& step) {
    const Array<std::uint8_t> wanted = read_npy<std::uint8_t>(text(step, "wanted"));
    const std::vector<std::uint8_t> small = small_components(
        {wanted.begin(), wanted.end()}, static_cast<std::size_t>(wanted.shape().at(0)),
        static_cast<std::size_t>(wanted.shape().at(1)), step.at("max_area"));
    if (!small.empty()) {
        write_npy(result_path(step, "small"), Array<std::uint8_t>(wanted.shape(), small));
    }
    return !small.empty();
}

void write_embedding_file(const json& step) {
    std::vector<Array<float>> arrays;
    for (const json& path : step.at("maps")) {
        arrays.push_back(read_npy<float>(path.get<std::string>()));
    }
    write_embedding(text(step, "path"), step.at("names").get<std::vector<std::string>>(), arrays,
                    geometry_from(step), text(step, "fingerprint"));
}

json read_embedding_file(const json& step) {
    std::vector<TensorSpec> specs;
    for (const json& entry : step.at("specs")) {
        TensorSpec spec{entry.at(0), "float32", {std::string("batch")}};
        for (const json& side : entry.at(1)) {
            spec.shape.emplace_back(side.get<std::int64_t>());
        }
        specs.push_back(spec);
    }
    const StoredEmbedding stored =
        read_embedding(text(step, "path"), text(step, "fingerprint"), specs);
    if (step.contains("out")) {
        for (std::size_t i = 0; i < stored.maps.size(); ++i) {
            write_npy(result_path(step, std::to_string(i)), stored.maps[i]);
        }
    }
    return json::array(
        {as_json(stored.geometry.original_size), as_json(stored.geometry.input_size)});
}

json hash(const json& step) {
    const Bytes content = read_file(text(step, "path"), whole_file);
    Sha256 digest;
    const std::size_t piece = step.at("piece");
    for (std::size_t at = 0; at < content.size(); at += piece) {
        digest.update(content.data() + at, std::min(piece, content.size() - at));
    }
    return digest.hex_digest();
}

/// A figure; JSON has no NaN and no infinity.
json as_json(double value) {
    return std::isnan(value) ? json("nan") : std::isinf(value) ? json("inf") : json(value);
}

json as_json(const VerifyReport& report) {
    json measurements = json::array();
    for (const Measurement& m : report.measurements) {
        measurements.push_back({m.case_name, m.output, m.metric, as_json(m.value),
                                as_json(m.limit), m.at_least, m.passed()});
    }
    return {{"passed", report.passed},
            {"explanation", report.explanation},
            {"measurements", measurements}};
}

json as_json(const Verdict& verdict) {
    json figures = json::object();
    for (const auto& [name, value] : verdict.figures) {
        figures[name] = as_json(value);
    }
    return {{"passed", verdict.passed},
            {"explanation", verdict.explanation},
            {"figures", figures},
            {"encoder_failed", verdict.encoder_failed}};
}

/// Change an output as one of the steps says: {"output": NAME, "scale": FACTOR} or
/// {"output": NAME, "at": INDEX, "value": NUMBER}.
void change(const json& changes, const std::string& name, Array<float>& values) {
    for (const json& entry : changes) {
        if (text(entry, "output") != name) {
            continue;
        }
        if (entry.contains("scale")) {
            const float factor = entry["scale"];
            std::transform(values.begin(), values.end(), values.data(),
                           [factor](float value) { return factor * value; });
        } else {
            const json& value = entry.at("value");
            values[entry.at("at")] =
                value.is_string() ? std::stof(value.get<std::string>()) : value.get<float>();
        }
    }
}

/// The bundle on the CPU, with outputs changed on the way.
Runner changed_runner(const Bundle& bundle, const json& changes) {
    ModelOptions options;
    options.threads = 1;
    options.device = "cpu";
    const std::shared_ptr<const Backend> backend = open_backend(bundle, options);
    const Runner runner = runner_of(*backend, nullptr);
    return [backend, runner, changes, &manifest = bundle.manifest](const ImageView& image,
                                                                   const ImageGeometry& geometry) {
        EncodedImage encoded = runner(image, geometry);
        for (std::size_t i = 0; i < encoded.maps.size(); ++i) {
            change(changes, manifest.encoder.outputs[i].name, encoded.maps[i]);
        }
        const auto decode = encoded.decode;
        encoded.decode = [decode, changes](const PackedPrompts& prompts,
                                           const std::vector<std::string>& outputs) {
            std::vector<Array<float>> results = decode(prompts, outputs);
            for (std::size_t i = 0; i < outputs.size(); ++i) {
                change(changes, outputs[i], results[i]);
            }
            return results;
        };
        return encoded;
    };
}

/// What the gate says of a bundle whose outputs are changed.
json judge_changed(const json& step) {
    const Bundle bundle = open_bundle(text(step, "path"), false);
    const ParityRecord record = load_record(bundle);
    const VerifyReport report =
        judge(run_record(changed_runner(bundle, step.at("changes")), bundle.manifest, record,
                         step.value("gate", true) ? gate_limits : bundle.manifest.parity_limits));
    return {{"report", as_json(report)}, {"verdict", as_json(verdict_of(report))}};
}

json health(Session& session, const json& step) {
    const Health found = session.model(step).health();
    return {{"healthy", found.healthy},
            {"problem", found.problem},
            {"backend", found.backend},
            {"device", found.device},
            {"precision", found.precision},
            {"fingerprint", found.fingerprint},
            {"encode_seconds", found.encode_seconds},
            {"decode_seconds", found.decode_seconds}};
}

json read_archive(const json& step) {
    const Bytes content = read_file(text(step, "path"), whole_file);
    json names = json::array();
    for (const auto& [name, array] : read_npz(content, "a.npz")) {
        if (const auto* found = std::get_if<std::string>(&array)) {
            names.push_back({name, *found});
            continue;
        }
        const std::string path = result_path(step, std::to_string(names.size()));
        names.push_back({name, nullptr});
        std::visit(
            [&path](const auto& values) {
                if constexpr (!std::is_same_v<std::decay_t<decltype(values)>, std::string>) {
                    write_npy(path, values);
                }
            },
            array);
    }
    return names;
}

json unpack(const json& step) {
    const Bytes packed = read_file(text(step, "path"), whole_file);
    const std::optional<Bytes> found = inflate(packed.data(), packed.size(), step.at("size"));
    if (found) {
        write_npy(result_path(step, "bytes"),
                  Array<std::uint8_t>({static_cast<std::int64_t>(found->size())}, *found));
    }
    return found.has_value();
}

VerdictSubject subject_of(const json& step) {
    return {text(step, "fingerprint"), text(step, "backend"),   text(step, "version"),
            text(step, "processor"),   text(step, "precision"), text(step, "files")};
}

void remember(const json& step) {
    Verdict verdict{step.at("passed"), text(step, "explanation"), {}, step.at("encoder_failed")};
    for (const auto& [name, value] : step.at("figures").items()) {
        verdict.figures[name] =
            value.is_string() ? std::stod(value.get<std::string>()) : value.get<double>();
    }
    save_verdict(subject_of(step), verdict);
}

json recall(const json& step) {
    const std::optional<Verdict> verdict = load_verdict(subject_of(step));
    return verdict ? as_json(*verdict) : json();
}

/// Choose engines; the CPU stands in for those that are opened to be judged, with the outputs
/// changed as "engines" says for "ENCODER DECODER", their folders, or "otherwise" for any. What
/// "fails" cannot be opened.
json choose(const json& step) {
    const Machine machine{{text(step, "gpu"), text(step, "compute_capability")},
                          text(step, "driver_version")};
    const Bundle bundle = open_bundle(text(step, "path"), false);
    json opened = json::array();
    const auto open = [&](const EngineSet& engines) {
        const std::string pair = engines.encoder.parent_path().filename().string() + " " +
                                 engines.decoder.parent_path().filename().string();
        opened.push_back(pair);
        const json changes = step.value("engines", json::object())
                                 .value(pair, step.value("otherwise", json::array()));
        if (changes == "fails") {
            throw BackendError("no memory");
        }
        return changed_runner(bundle, changes);
    };
    const EngineSet set = choose_engines(bundle, text(step, "backend"), machine,
                                         step.value("engine_folder", ""), open);
    return {{"encoder", set.encoder.string()},
            {"decoder", set.decoder.string()},
            {"features_dtype", set.features_dtype},
            {"precision", set.precision},
            {"opened", opened}};
}

json gpu(const json& step) {
    const Machine machine = query_gpu(step.at("number"));
    return {machine.gpu.name, machine.gpu.compute_capability, machine.driver_version};
}

void onnx_locations(const json& step) {
    std::vector<FileEntry> beside;
    for (const json& entry : step.at("beside")) {
        beside.push_back({entry.at(0), "", entry.at(1)});
    }
    check_onnx(read_file(text(step, "path"), whole_file), "m.onnx", beside);
}

/// Where an image of a size lies in the encoder's input, and whether it may have that size.
json image_geometry(const json& step) {
    ImageSpec spec;
    spec.size = size_of(step.at("input"));
    spec.resize = text(step, "resize") == "stretch" ? ImageSpec::Resize::stretch
                                                    : ImageSpec::Resize::longest_side;
    const Size size = size_of(step.at("size"));
    const std::uint8_t pixel = 0;
    check_image({&pixel, size.height, size.width, step.value("row_stride", std::ptrdiff_t{0})},
                "image");
    return as_json(geometry_of(spec, size).input_size);
}

// NOLINTBEGIN(bugprone-use-after-move, clang-analyzer-cplusplus.Move)
/// The shape, size and element count of copies of what was moved from.
json moved_from() {
    Array<float> array({2, 3}, std::vector<float>(6, 1.0F));
    Prompts prompts;
    prompts.box = array;
    const Array<float> taken = std::move(array);
    const Prompts taken_prompts = std::move(prompts);
    Array<float> copy = array;
    const Prompts copied_prompts = prompts;
    json found = {taken.size(),
                  copy.size(),
                  copy.shape().size(),
                  std::distance(copy.begin(), copy.end()),
                  taken_prompts.box->size(),
                  copied_prompts.box->size()};
    copy = taken;
    array = copy;
    found.push_back(array[5]);
    return found;
}
// NOLINTEND(bugprone-use-after-move, clang-analyzer-cplusplus.Move)

/// This process's memory now and at most so far, bytes.
json memory() {
    std::ifstream status("/proc/self/status");
    std::map<std::string, std::size_t> kilobytes;
    for (std::string line; std::getline(status, line);) {
        std::istringstream words(line);
        std::string name;
        std::size_t number = 0;
        if (words >> name >> number) {
            kilobytes[name] = number;
        }
    }
    return {{"now", kilobytes["VmRSS:"] * 1024}, {"peak", kilobytes["VmHWM:"] * 1024}};
}

/// Encode one image in several threads at once; the embeddings are dropped.
void encode_at_once(Session& session, const json& step) {
    const Image image(step);
    const Model& model = session.model(step);
    std::vector<std::thread> threads;
    for (int i = 0; i < step.at("threads").get<int>(); ++i) {
        threads.emplace_back([&] { model.encode(image.view); });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

/// How many threads this process has.
json count_threads() {
    const std::filesystem::directory_iterator tasks("/proc/self/task");
    return std::distance(begin(tasks), end(tasks));
}

/// On which processors each thread of this process may run.
json affinities() {
    // Threads see to it themselves when they begin.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    json found = json::array();
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
        std::ifstream status(task.path() / "status");
        const std::string name = "Cpus_allowed_list:\t";
        for (std::string line; std::getline(status, line);) {
            if (line.compare(0, name.size(), name) == 0) {
                found.push_back(line.substr(name.size()));
            }
        }
    }
    return found;
}

/// Decode, and the processor time that this process then takes while it does nothing, seconds.
json rest_after_decode(Session& session, const json& step) {
    decode(session, step);
    const std::clock_t start = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
}

#if SAM3RT_ONNXRUNTIME
/// The parts of a graph as arrays of bytes, and what they are between and of.
json split(const json& step) {
    const Bytes content = read_file(text(step, "path"), whole_file);
    const std::optional<GraphParts> parts =
        split_onnx(content, step.at("inputs").get<std::vector<std::string>>());
    if (!parts) {
        return nullptr;
    }
    for (const auto& [name, bytes] : {std::pair{"first", &parts->first}, {"rest", &parts->rest}}) {
        write_npy(result_path(step, name), Array<std::uint8_t>({static_cast<std::int64_t>(
                                               bytes->size())}, *bytes));
    }
    return {{"cut", parts->cut}, {"inputs", parts->inputs}};
}

/// What a GPU's memory would be reached by, over the host's memory.
json copy_through_identity(const json& step) {
    Array<float> array = read_npy<float>(text(step, "array"));
    const Copier copier(Device{}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    const Ort::Value host = Ort::Value::CreateTensor<float>(
        host_memory(), array.data(), array.size(), array.shape().data(), array.shape().size());
    const Ort::Value back = copier.to_host(copier.to_device(host));
    write_npy(result_path(step, "copy"), Array<float>(back.GetTensorTypeAndShapeInfo().GetShape(),
                                                      back.GetTensorData<float>(), array.size()));
    return back.GetTensorData<float>() != array.data();
}

int host_lines = 0;

void ORT_API_CALL count_line(void*, OrtLoggingLevel, const char*, const char*, const char*,
                             const char*) {
    ++host_lines;
}

/// A host's allocator, which counts what is asked of it.
struct CountingAllocator : OrtAllocator {
    CountingAllocator() : OrtAllocator{} {
        version = ORT_API_VERSION;
        Alloc = [](OrtAllocator* self, std::size_t size) -> void* {
            ++static_cast<CountingAllocator*>(self)->count;
            return std::aligned_alloc(64, (size + 63) / 64 * 64);
        };
        Free = [](OrtAllocator*, void* memory) { std::free(memory); };
        Info = [](const OrtAllocator* self) -> const OrtMemoryInfo* {
            return static_cast<const CountingAllocator*>(self)->info;
        };
    }

    std::atomic<int> count{0};
    Ort::MemoryInfo info = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
};

CountingAllocator& host_allocator() {
    // It lives as long as what uses it.
    static auto* const allocator = new CountingAllocator;
    return *allocator;
}

/// Let the library use an environment that counts the lines of its log, and has an allocator.
void set_environment() {
    static auto* const environment =
        new Ort::Env(ORT_LOGGING_LEVEL_INFO, "host", count_line, nullptr);
    Ort::ThrowOnError(Ort::GetApi().RegisterAllocator(*environment, &host_allocator()));
    set_ort_environment(*environment);
}
#endif

std::mutex lines_mutex;
json lines = json::array();

/// Collect the log from a level on, or with none, no more.
void collect_log(const json& step) {
    if (step.at("level").is_null()) {
        set_log_callback(nullptr);
        return;
    }
    set_log_callback(
        [fails = step.value("fails", false)](LogLevel level, const std::string& line) {
            const std::lock_guard<std::mutex> lock(lines_mutex);
            lines.push_back({static_cast<int>(level), line});
            if (fails) {
                throw std::runtime_error("no room for a line");
            }
        },
        static_cast<LogLevel>(step.at("level").get<int>()));
}

/// The lines since the last such step.
json log_lines() {
    const std::lock_guard<std::mutex> lock(lines_mutex);
    return std::exchange(lines, json::array());
}

using Step = std::function<json(Session&, const json&)>;

/// What a function of a session and a step, of a step, or of nothing does; its result, if it has one.
template <typename Function>
Step does(const Function& function) {
    return [function](Session& session, const json& given) -> json {
        const auto call = [&] {
            if constexpr (std::is_invocable_v<Function, Session&, const json&>) {
                return function(session, given);
            } else if constexpr (std::is_invocable_v<Function, const json&>) {
                return function(given);
            } else {
                return function();
            }
        };
        if constexpr (std::is_void_v<decltype(call())>) {
            call();
            return nullptr;
        } else {
            return call();
        }
    };
}

const std::map<std::string, Step>& steps() {
    static const std::map<std::string, Step> table = {
        {"hash", does(hash)},
        {"parse_manifest", does([](const json& s) {
             return describe(parse_manifest(read_file(text(s, "path"), whole_file)));
         })},
        {"open_bundle", does([](const json& s) {
             return describe(open_bundle(text(s, "path"), s.value("check_files", true)).manifest);
         })},
        {"load_model", does(load_model)},
        {"load_from_memory", does(load_from_memory)},
        {"lent", does([](Session& all, const json&) { return lent(all); })},
        {"set_shared_threads", does([](const json& s) { set_shared_threads(s.at("threads")); })},
        {"prepare", does([](Session& all, const json& s) { all.model(s).prepare(); })},
        {"encoder_loaded",
         does([](Session& all, const json& s) { return all.model(s).encoder_loaded(); })},
        {"encode", does([](Session& all, const json& s) {
             const Image image(s);
             const Ending ending(s);
             return add_embedding(all, s, all.model(s).encode(image.view, ending.get()));
         })},
        {"encode_view", does([](Session& all, const json& s) {
             const std::array<std::uint8_t, 3> pixel{};
             const ImageView view{s.value("null", false) ? nullptr : pixel.data(), s.at("height"),
                                  s.at("width"), s.value("row_stride", std::ptrdiff_t{0})};
             return add_embedding(all, s, all.model(s).encode(view));
         })},
        {"save_embedding",
         does([](Session& all, const json& s) { all.embedding(s).save(text(s, "path")); })},
        {"load_embedding", does([](Session& all, const json& s) {
             return add_embedding(all, s, all.model(s).load_embedding(text(s, "path")));
         })},
        {"embedding_to_bytes", does([](Session& all, const json& s) {
             const std::vector<std::uint8_t> content = all.embedding(s).to_bytes();
             std::ofstream(text(s, "path"), std::ios::binary)
                 .write(reinterpret_cast<const char*>(content.data()),
                        static_cast<std::streamsize>(content.size()));
         })},
        {"embedding_from_bytes", does([](Session& all, const json& s) {
             const Bytes content = read_file(text(s, "path"), whole_file);
             return add_embedding(
                 all, s, all.model(s).embedding_from_bytes(content.data(), content.size()));
         })},
        {"log", does(collect_log)},
        {"log_lines", does(log_lines)},
        {"maps", does(maps)},
        {"decode", does(decode)},
        {"predictor", does(new_predictor)},
        {"set_image", does([](Session& all, const json& s) {
             const Image image(s);
             all.predictor(s).set_image(image.view);
         })},
        {"set_embedding", does([](Session& all, const json& s) {
             all.predictor(s).set_embedding(all.embedding(s));
         })},
        {"set_image_batch", does(set_image_batch)},
        {"set_embedding_batch", does(set_embedding_batch)},
        {"predict", does(predict)},
        {"predict_batch", does(predict_batch)},
        {"reset", does([](Session& all, const json& s) { all.predictor(s).reset(); })},
        {"pack", does(pack_prompts)},
        {"preprocess", does(preprocess_image)},
        {"resize", does(resize)},
        {"finish", does(finish)},
        {"components", does(components)},
        {"write_embedding", does(write_embedding_file)},
        {"read_embedding", does(read_embedding_file)},
        {"onnx_locations", does(onnx_locations)},
        {"image_geometry", does(image_geometry)},
        {"memory", does(memory)},
        {"encode_at_once", does(encode_at_once)},
        {"threads", does(count_threads)},
        {"affinities", does(affinities)},
        {"rest_after_decode", does(rest_after_decode)},
#if SAM3RT_ONNXRUNTIME
        {"split_onnx", does(split)},
        {"copy_through_identity", does(copy_through_identity)},
        {"set_environment", does(set_environment)},
        {"host_allocations", does([] { return host_allocator().count.load(); })},
        {"host_lines", does([] { return host_lines; })},
#endif
        {"moved_from", does(moved_from)},
        {"copy_file", does([](const json& s) {
             std::filesystem::copy_file(text(s, "from"), text(s, "to"),
                                        std::filesystem::copy_options::overwrite_existing);
         })},
        {"chdir", does([](const json& s) { std::filesystem::current_path(text(s, "path")); })},
        {"query_gpu", does(gpu)},
        {"choose_engines", does(choose)},
        {"verify", does([](Session& all, const json& s) {
             const Ending ending(s);
             return as_json(all.model(s).verify(ending.get()));
         })},
        {"health", does(health)},
        {"judge", does(judge_changed)},
        {"load_record", does([](const json& s) {
             load_record(open_bundle(text(s, "path"), false));
         })},
        {"read_npz", does(read_archive)},
        {"inflate", does(unpack)},
        {"save_verdict", does(remember)},
        {"load_verdict", does(recall)},
    };
    return table;
}

json error(const std::string& kind, const std::exception& e, const std::string& subject = "") {
    return {{"error", {{"class", kind}, {"message", e.what()}, {"subject", subject}}}};
}

/// What a step returns, or the class, message and subject of what it throws.
json run(Session& session, const json& step) {
    try {
        return {{"ok", steps().at(text(step, "op"))(session, step)}};
    } catch (const ImageError& e) {
        return error("ImageError", e, e.argument());
    } catch (const PromptError& e) {
        return error("PromptError", e, e.argument());
    } catch (const InvalidInputError& e) {
        return error("InvalidInputError", e, e.argument());
    } catch (const StateError& e) {
        return error("StateError", e);
    } catch (const BundleError& e) {
        return error("BundleError", e, e.file());
    } catch (const EmbeddingError& e) {
        return error("EmbeddingError", e);
    } catch (const BackendError& e) {
        return error("BackendError", e);
    } catch (const CancelledError& e) {
        return error("CancelledError", e);
    } catch (const std::system_error& e) {
        return error("OSError", e);
    }
}

}  // namespace

// What it throws ends the test. NOLINTNEXTLINE(bugprone-exception-escape)
int main(int count, char** arguments) {
    if (count != 3) {
        std::cerr << "usage: driver STEPS.json RESULTS.json\n";
        return 2;
    }
    json results = json::array();
    Session session;
    std::ifstream input(arguments[1]);
    for (const json& step : json::parse(input)) {
        results.push_back(run(session, step));
    }
    std::ofstream output(arguments[2]);
    output << results.dump(-1, ' ', true, json::error_handler_t::replace);
    return output.flush() ? 0 : 1;
}
