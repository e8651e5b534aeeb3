// TensorRT, as much of it as is used here. The file that implements this is the only one that
// includes TensorRT's headers; tests have one of their own in its place.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "files.hpp"
#include "sam3rt/sam3rt.hpp"
#include "tensorrt/cuda.hpp"

namespace sam3rt {

enum class ElementType { float32, float16, int32, int64, boolean };

/// One input or output of an engine.
struct EngineTensor {
    std::string name;
    ElementType type = ElementType::float32;
    bool is_input = false;
    /// -1 for a dynamic axis.
    Shape shape;
    /// The greatest sizes of an input that the engine takes.
    Shape most;
};

/// One way of running an engine: shapes and addresses. Serves one stream at a time. Methods throw
/// BackendError where TensorRT refuses something.
class EngineContext {
public:
    EngineContext() = default;
    EngineContext(const EngineContext&) = delete;
    EngineContext& operator=(const EngineContext&) = delete;
    virtual ~EngineContext() = default;

    /// Say how large an input with a dynamic axis is.
    virtual void set_shape(const std::string& name, const Shape& shape) = 0;
    /// The size of a tensor, once all inputs have theirs.
    virtual Shape shape(const std::string& name) const = 0;
    /// Working memory for the shapes that are set.
    virtual std::size_t scratch_bytes() = 0;
    /// Lend that much or more. What runs at the same time must not share it.
    virtual void set_scratch(DevicePointer address, std::size_t bytes) = 0;
    /// Say where a tensor lies: at a multiple of 256.
    virtual void set_address(const std::string& name, DevicePointer address) = 0;
    /// Whether a run may be recorded.
    virtual bool can_be_recorded(Stream stream) const = 0;
    /// Queue one run.
    virtual void enqueue(Stream stream) = 0;
};

/// A loaded engine: weights on the device, shared by all its contexts, which need it.
class Engine {
public:
    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    virtual ~Engine() = default;

    const std::map<std::string, EngineTensor>& tensors() const { return tensors_; }
    /// Throws BackendError where there is none of this name.
    const EngineTensor& tensor(const std::string& name) const {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) {
            throw BackendError("an engine has no tensor " + name + ": build it again");
        }
        return found->second;
    }

    /// A context without working memory of its own. May be called by many threads.
    virtual std::unique_ptr<EngineContext> make_context() = 0;

    /// Keep what was compiled for the shapes that have run, where TensorRT compiles anything then.
    virtual void keep_compiled() = 0;

protected:
    std::map<std::string, EngineTensor> tensors_;
};

/// "tensorrt" or "tensorrt-rtx".
const char* tensorrt_flavour();

/// The version of TensorRT's library, which is loaded at the first call and stays, such as
/// "10.3.0.26". Ask query_gpu first: TensorRT may end a process without a driver.
/// Throws BackendError where it cannot be loaded or is older than the headers.
std::string tensorrt_version();

/// Load an engine from its content, which is not needed afterwards. `name` stands in errors;
/// `compiled` is a file that TensorRT for RTX keeps what it compiles in.
/// Throws BackendError where TensorRT refuses it.
std::shared_ptr<Engine> load_engine(const Bytes& content, const std::string& name,
                                    const std::filesystem::path& compiled);

}  // namespace sam3rt
