// Stands in for src/tensorrt/nvinfer.cpp in the tests: runs "engines" that are ONNX graphs behind a
// line of text, in ONNX Runtime, on copies that it queues to the host and back as TensorRT would
// queue its kernels. So it works on the stand-in for the driver and on a real GPU.
//
// The line reads "stand-in OBJECTS POINTS TYPE FACTOR IMAGES JOINED": the greatest sizes, the type of
// the feature maps (float or half), what all outputs are multiplied by, 1 for an engine that is right,
// how many images the encoder takes, and of how many the decoder takes feature maps.
//
// STAND_IN_ONNXRUNTIME names ONNX Runtime's library; STAND_IN_TENSORRT is the version that TensorRT
// is to have, or "none".

#if !SAM3RT_ONNXRUNTIME
#define ORT_API_MANUAL_INIT
#endif
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "tensorrt/memory.hpp"
#include "tensorrt/nvinfer.hpp"

namespace sam3rt {
namespace {

template <typename Function>
Function* in(const char* library, const char* name) {
    auto* found = reinterpret_cast<Function*>(::dlsym(::dlopen(library, RTLD_NOW), name));
    if (found == nullptr) {
        throw BackendError(std::string(library) + " has no " + name);
    }
    return found;
}

Ort::Env& environment() {
    static auto* const only = [] {
#if !SAM3RT_ONNXRUNTIME
        const char* const library = std::getenv("STAND_IN_ONNXRUNTIME");
        Ort::InitApi(in<const OrtApiBase*()>(library, "OrtGetApiBase")()->GetApi(ORT_API_VERSION));
#endif
        return new Ort::Env(ORT_LOGGING_LEVEL_ERROR, "stand-in");
    }();
    return *only;
}

ElementType type_of(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? ElementType::int64 : ElementType::float32;
}

/// A function of the driver. Real or not, it is the one that the library has loaded.
template <typename... Arguments>
int cuda(const char* name, Arguments... arguments) {
    return in<int(Arguments...)>("libcuda.so.1", name)(arguments...);
}

/// Pinned memory of the host: CUDA reads any other when an upload is queued, and not when its turn
/// comes.
class Pinned {
public:
    Pinned() = default;
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
    ~Pinned() {
        if (data_ != nullptr) {
            cuda("cuMemFreeHost", data_);
        }
    }

    /// Make it that large, once: what is queued knows the address.
    void allocate(std::size_t bytes) {
        if (data_ == nullptr && cuda("cuMemHostAlloc", &data_, bytes, 0U) != 0) {
            throw BackendError("TensorRT has too little memory of the host");
        }
    }
    std::uint8_t* data() const { return static_cast<std::uint8_t*>(data_); }

private:
    void* data_ = nullptr;
};

/// A tensor of a context, and what the host has of it.
struct Place {
    EngineTensor tensor;
    Shape shape;
    DevicePointer address = 0;
    /// As it crosses the bus, and as ONNX Runtime takes it.
    Pinned raw;
    std::vector<float> floats;

    std::size_t nbytes() const { return element_count(shape) * size_of(tensor.type); }
};

class StandInEngine : public Engine, public std::enable_shared_from_this<StandInEngine> {
public:
    explicit StandInEngine(const Bytes& content) {
        const auto end = std::find(content.begin(), content.end(), '\n');
        std::istringstream line(std::string(content.begin(), end));
        std::string word;
        std::string type;
        line >> word >> objects_ >> points_ >> type >> factor >> images_ >> joined_;
        if (!line || word != "stand-in") {
            throw BackendError("it is no engine");
        }
        Ort::Env& ready = environment();
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(1);
        session_ = std::make_unique<Ort::Session>(
            ready, &*end + 1, static_cast<std::size_t>(content.end() - end - 1), options);
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session_->GetInputCount(); ++i) {
            add(session_->GetInputNameAllocated(i, allocator).get(), session_->GetInputTypeInfo(i),
                true);
        }
        for (std::size_t i = 0; i < session_->GetOutputCount(); ++i) {
            add(session_->GetOutputNameAllocated(i, allocator).get(),
                session_->GetOutputTypeInfo(i), false);
        }
        if (type == "half") {
            const bool is_decoder = tensors_.count("input_points") != 0;
            for (auto& [name, tensor] : tensors_) {
                if (tensor.is_input == is_decoder && name.find("image_embeddings") == 0) {
                    tensor.type = ElementType::float16;
                }
            }
        }
    }

    std::unique_ptr<EngineContext> make_context() override;
    void keep_compiled() override {}

    Ort::Session& session() { return *session_; }
    float factor = 1;

private:
    void add(const std::string& name, const Ort::TypeInfo& type, bool is_input) {
        const auto info = type.GetTensorTypeAndShapeInfo();
        EngineTensor tensor{name, type_of(info.GetElementType()), is_input, info.GetShape(), {}};
        tensor.most = tensor.shape;
        for (std::size_t axis = 0; axis < tensor.most.size(); ++axis) {
            if (tensor.most[axis] < 0) {
                const std::int64_t images = name == "pixel_values"           ? images_
                                            : name.find("image_embeddings") == 0 ? joined_
                                                                             : 1;
                tensor.most[axis] = axis == 0 ? images : axis == 1 ? objects_ : points_;
            }
        }
        tensors_[name] = tensor;
    }

    std::int64_t objects_ = 0;
    std::int64_t points_ = 0;
    std::int64_t images_ = 0;
    std::int64_t joined_ = 0;
    std::unique_ptr<Ort::Session> session_;
};

class StandInContext : public EngineContext {
public:
    explicit StandInContext(std::shared_ptr<StandInEngine> engine) : engine_(std::move(engine)) {
        for (const auto& [name, tensor] : engine_->tensors()) {
            Place& place = places_[name];
            place.tensor = tensor;
            place.shape = tensor.shape;
        }
    }

    void set_shape(const std::string& name, const Shape& shape) override {
        Place& place = places_.at(name);
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            const bool fits = place.tensor.shape.at(axis) < 0
                                  ? shape[axis] <= place.tensor.most[axis]
                                  : shape[axis] == place.tensor.shape[axis];
            if (!fits || shape[axis] < 1) {
                throw BackendError("TensorRT refuses the shape of " + name);
            }
        }
        place.shape = shape;
        // Outputs have as many images as there are, and as many objects as points were given for.
        const std::int64_t objects = name == "input_points" ? shape[1] : 1;
        for (auto& [other, output] : places_) {
            if (!output.tensor.is_input && output.tensor.shape.size() > 1) {
                output.shape[0] = shape[0];
                output.shape[1] = name == "input_points" && output.tensor.shape[1] < 0
                                      ? objects
                                      : output.shape[1];
            }
        }
    }

    Shape shape(const std::string& name) const override { return places_.at(name).shape; }

    std::size_t scratch_bytes() override {
        std::size_t bytes = 0;
        for (const auto& [name, place] : places_) {
            bytes += place.nbytes();
        }
        return bytes;
    }

    void set_scratch(DevicePointer address, std::size_t bytes) override {
        if (address % 256 != 0 || bytes < scratch_bytes()) {
            throw BackendError("TensorRT has too little working memory");
        }
        scratch_ = address;
    }

    void set_address(const std::string& name, DevicePointer address) override {
        if (address % 256 != 0) {
            throw BackendError("TensorRT refuses the address of " + name);
        }
        places_.at(name).address = address;
    }

    bool can_be_recorded(Stream /*stream*/) const override { return true; }

    void enqueue(Stream stream) override {
        bool done = scratch_ != 0;
        for (auto& [name, place] : places_) {
            done = done && place.address != 0;
            place.raw.allocate(place.nbytes());
            if (place.tensor.is_input) {
                done = done && download(place, stream) == 0;
            }
        }
        void (*const call)(void*) = [](void* context) {
            static_cast<StandInContext*>(context)->compute();
        };
        done = done && cuda("cuLaunchHostFunc", stream, call, static_cast<void*>(this)) == 0;
        for (auto& [name, place] : places_) {
            if (!place.tensor.is_input) {
                done = done && upload(place.address, place, stream) == 0;
            }
        }
        // As working memory would be written to.
        done = done && upload(scratch_, places_.begin()->second, stream) == 0;
        if (!done) {
            throw BackendError("TensorRT refuses to run");
        }
    }

private:
    static int download(const Place& place, Stream stream) {
        return cuda("cuMemcpyDtoHAsync_v2", static_cast<void*>(place.raw.data()), place.address,
                    place.nbytes(), stream);
    }

    static int upload(DevicePointer target, const Place& place, Stream stream) {
        return cuda("cuMemcpyHtoDAsync_v2", target, static_cast<const void*>(place.raw.data()),
                    place.nbytes(), stream);
    }

    Ort::Value value_of(Place& place) {
        static const Ort::MemoryInfo memory =
            Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const std::size_t count = element_count(place.shape);
        if (place.tensor.type == ElementType::int64) {
            return Ort::Value::CreateTensor(memory,
                                            reinterpret_cast<std::int64_t*>(place.raw.data()),
                                            count, place.shape.data(), place.shape.size());
        }
        place.floats.resize(count);
        if (place.tensor.is_input) {
            load(place.raw.data(), count, place.tensor.type, place.floats.data());
        }
        return Ort::Value::CreateTensor(memory, place.floats.data(), count, place.shape.data(),
                                        place.shape.size());
    }

    void compute() {
        std::vector<const char*> input_names;
        std::vector<const char*> output_names;
        std::vector<Ort::Value> inputs;
        std::vector<Ort::Value> outputs;
        for (auto& [name, place] : places_) {
            (place.tensor.is_input ? input_names : output_names).push_back(name.c_str());
            (place.tensor.is_input ? inputs : outputs).push_back(value_of(place));
        }
        engine_->session().Run(Ort::RunOptions{nullptr}, input_names.data(), inputs.data(),
                               inputs.size(), output_names.data(), outputs.data(), outputs.size());
        for (auto& [name, place] : places_) {
            if (!place.tensor.is_input) {
                for (float& value : place.floats) {
                    value *= engine_->factor;
                }
                store(place.floats.data(), place.floats.size(), place.tensor.type,
                      place.raw.data());
            }
        }
    }

    const std::shared_ptr<StandInEngine> engine_;
    std::map<std::string, Place> places_;
    DevicePointer scratch_ = 0;
};

std::unique_ptr<EngineContext> StandInEngine::make_context() {
    return std::make_unique<StandInContext>(shared_from_this());
}

}  // namespace

const char* tensorrt_flavour() { return "tensorrt"; }

std::string tensorrt_version() {
    const char* const version = std::getenv("STAND_IN_TENSORRT");
    if (version != nullptr && std::strcmp(version, "none") == 0) {
        throw BackendError("libnvinfer.so.10 cannot be loaded");
    }
    return version == nullptr ? "10.3.0.26" : version;
}

std::shared_ptr<Engine> load_engine(const Bytes& content, const std::string& name,
                                    const std::filesystem::path& /*compiled*/) {
    try {
        return std::make_shared<StandInEngine>(content);
    } catch (const Ort::Exception& error) {
        throw BackendError("tensorrt cannot load " + name + ": " + error.what());
    }
}

}  // namespace sam3rt
