"""ONNX Runtime's sessions, checked and loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import onnxruntime as ort
from numpy.typing import NDArray

from ...bundle import Bundle, GraphSpec
from ...bundle.contract import EXPORT_ID, LoadedTensor, check_graph, graph_source, load_graph
from ...bundle.onnx_split import Parts, split_onnx
from ...errors import BackendError, BundleError
from .typed import Graphs

_LOG = logging.getLogger(__name__)

_CUDA = "CUDAExecutionProvider"
# Of what ONNX Runtime says on standard error; from warnings on is its default.
_WARNINGS, _ERRORS = 2, 3
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
    weights: dict[str, NDArray[Any]] = {}
    source: str | bytes
    # Hashing a bundle leaves out graphs that were made from it: those are hashed here.
    if map_weights and not graphs.digest:
        source = graph_source(graphs.bundle, graph)
    else:
        loaded = load_graph(graphs.bundle, graph, is_fused=graphs.is_fused)
        source, weights = loaded.model, loaded.initializers()
    options = _options(threads, memory_pattern)
    # Not ..._from_files_in_memory, which Python has only since ONNX Runtime 1.24.
    options.add_external_initializers(
        list(weights), [ort.OrtValue.ortvalue_from_numpy(w) for w in weights.values()]
    )
    session = _session(source, options, graph, cuda)
    _check([session], graphs.bundle, graph)
    if cuda is not None and session.get_providers()[0] != _CUDA:
        raise BackendError(
            "CUDA was asked for, but ONNX Runtime could not use it; check the driver and "
            "that CUDA and cuDNN match this onnxruntime-gpu"
        )
    return session


class SessionParts(NamedTuple):
    """A graph as two sessions on the CPU.

    Attributes:
        first: from some inputs to the values at the cut.
        rest: from those values and the other inputs to the outputs.
        cut: names of the values.
    """

    first: Any
    rest: Any
    cut: tuple[str, ...]


def open_parts(
    graphs: Graphs, graph: GraphSpec, inputs: Sequence[str], *, threads: int | None = None
) -> SessionParts | None:
    """Check and load a graph in two parts, see :func:`sam3rt.bundle.onnx_split.split_onnx`.

    Args:
        graphs: what it belongs to.
        graph: one of them.
        inputs: the first part's.
        threads: see :func:`open_session`.

    Returns:
        ``None`` where it cannot be cut, or not be loaded like that.

    Raises:
        BundleError: see :func:`open_session`.
    """
    if graph.external_data:
        return None
    loaded = load_graph(graphs.bundle, graph, is_fused=graphs.is_fused)
    parts = split_onnx(loaded.model, inputs)
    if parts is None:
        return None
    try:
        first, rest = (
            _session(part, _options(threads, memory_pattern=True), graph)
            for part in (parts.first, parts.rest)
        )
    except BackendError as error:
        _LOG.info("%s is loaded as a whole: %s", graph.model.file, str(error))
        return None
    _check([first, rest], graphs.bundle, graph, parts)
    return SessionParts(first, rest, parts.cut)


def _options(threads: int | None, memory_pattern: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS
    options.enable_mem_pattern = memory_pattern
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _session(
    source: str | bytes, options: Any, graph: GraphSpec, cuda: dict[str, Any] | None = None
) -> Any:
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda is not None:
        providers.insert(0, (_CUDA, cuda))
        # From 1.30 on, it warns that a plugin is missing, which it then does without.
        ort.set_default_logger_severity(_ERRORS)
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises classes of its own for each status
        raise BackendError(f"ONNX Runtime cannot load {graph.model.file}: {error}") from error
    finally:
        if cuda is not None:
            ort.set_default_logger_severity(_WARNINGS)


def _check(
    sessions: Sequence[Any], bundle: Bundle, graph: GraphSpec, parts: Parts | None = None
) -> None:
    """Compare a session with what the manifest promises; parts of a graph as the whole."""
    inputs, outputs = (
        [
            LoadedTensor(a.name, ORT_TYPES.get(a.type, a.type), a.shape)
            for a in arguments
            if parts is None or a.name not in parts.cut
        ]
        for arguments in (
            [a for session in sessions for a in session.get_inputs()],
            [a for session in sessions for a in session.get_outputs()],
        )
    )
    if parts is not None:
        inputs.sort(key=lambda tensor: parts.inputs.index(tensor.name))
    metadata = sessions[-1].get_modelmeta().custom_metadata_map
    check_graph(bundle, graph, metadata.get(EXPORT_ID, ""), inputs, outputs)
