"""ONNX Runtime's sessions, checked and loaded."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from ...bundle import Bundle, GraphSpec
from ...bundle.contract import EXPORT_ID, LoadedTensor, check_graph, graph_source, load_graph
from ...errors import BackendError, BundleError
from .typed import Graphs

_CUDA = "CUDAExecutionProvider"
# By ONNX Runtime's names: NumPy's.
ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def cuda_options(
    device_id: int, graphs: Graphs, graph: GraphSpec, *, records: bool = False
) -> dict[str, Any]:
    """Options of the CUDA provider.

    Args:
        device_id: the GPU's number.
        graphs: what it belongs to.
        graph: what is run.
        records: whether runs are recorded as CUDA graphs; all inputs and outputs must be bound.
    """
    options: dict[str, Any] = {
        "device_id": device_id,
        # Unless told otherwise, the provider computes in TF32.
        "use_tf32": int(graphs.allows_tf32(graph)),
        # The default doubles what it has taken whenever it needs more.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if graphs.is_fused:
        # Unless told otherwise, means and variances of FP16 values are added up in FP16.
        options["enable_skip_layer_norm_strict_mode"] = 1
    if records:
        options["enable_cuda_graph"] = 1
    return options


def open_session(
    graphs: Graphs,
    graph: GraphSpec,
    cuda: dict[str, Any] | None = None,
    *,
    threads: int | None = None,
    map_weights: bool = False,
    memory_pattern: bool = False,
) -> Any:
    """Check and load one graph.

    Args:
        graphs: what it belongs to.
        graph: one of them.
        cuda: options of the CUDA provider; ``None`` for the CPU.
        threads: threads per operator on the CPU; ``None`` leaves it to ONNX Runtime.
        map_weights: see :func:`sam3rt.load_model`.
        memory_pattern: whether all of a run's buffers are planned as one block.

    Raises:
        BackendError: ONNX Runtime cannot load it, or not on the device that was asked for.
        BundleError: the files are not what the manifest says, or not those of a bundle.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = memory_pattern
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda is not None:
        providers.insert(0, (_CUDA, cuda))
    source: str | bytes
    if map_weights:
        source = graph_source(graphs.bundle, graph)
    else:
        loaded = load_graph(graphs.bundle, graph, is_fused=graphs.is_fused)
        source, weights = loaded.model, loaded.initializers()
        # Not ..._from_files_in_memory, which Python has only since ONNX Runtime 1.24.
        options.add_external_initializers(
            list(weights), [ort.OrtValue.ortvalue_from_numpy(w) for w in weights.values()]
        )
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises classes of its own for each status
        raise BackendError(f"ONNX Runtime cannot load {graph.model.file}: {error}") from error
    _check(session, graphs.bundle, graph)
    if cuda is not None and session.get_providers()[0] != _CUDA:
        raise BackendError(
            "CUDA was asked for, but ONNX Runtime could not use it; check the driver and "
            "that CUDA and cuDNN match this onnxruntime-gpu"
        )
    return session


def _check(session: Any, bundle: Bundle, graph: GraphSpec) -> None:
    """Compare a session with what the manifest promises."""
    inputs, outputs = (
        [LoadedTensor(a.name, ORT_TYPES.get(a.type, a.type), a.shape) for a in arguments]
        for arguments in (session.get_inputs(), session.get_outputs())
    )
    metadata = session.get_modelmeta().custom_metadata_map
    check_graph(bundle, graph, metadata.get(EXPORT_ID, ""), inputs, outputs)
