"""The contract of a bundle's two graphs: their tensors' names, their metadata, their signatures.

Export, build tools and backends all take it from here:

* names: ``PIXELS``, :func:`feature_name`, ``IMAGES_AXIS``, ``POINTS``, ``LABELS``, ``MASKS``,
  ``HAS_MASKS``, ``MULTIMASK_OUTPUTS``, ``SINGLE_MASK_OUTPUTS``, ``OBJECT_SCORE``;
* metadata keys: ``EXPORT_ID``, ``ROLE``, ``FINGERPRINT``;
* ``PADDING_LABEL``, the label of a point that does not count;
* :func:`load_graph` for a graph's content, checked and in this process's own memory;
* :func:`check_graph` for an ONNX graph that a backend has loaded, and
  :func:`signature_mismatch` for anything else that has inputs and outputs, such as an engine.

Names follow the common exchange format (``onnx-community/sam3-tracker-ONNX``) wherever they mean
the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError
from .files import check_length, read_file
from .manifest import Bundle, GraphSpec, Manifest, TensorSpec
from .onnx_locations import ExternalTensor, check_tensor_locations, with_addresses

# Keys of a graph's metadata. Both graphs of an export hold the same EXPORT_ID.
EXPORT_ID = "sam3rt.export_id"
ROLE = "sam3rt.role"
# The bundle's fingerprint, in the metadata of graphs made from a bundle, such as an engine's.
FINGERPRINT = "sam3rt.fingerprint"

# The encoder's input, float32 [B, 3, H, W].
PIXELS = "pixel_values"
# The decoder's inputs. Feature maps are float32 [1 or P, C, h, w] where their first axis has this
# name: those of one image for all objects, or of one image for each. In bundles of earlier versions
# that axis is 1.
IMAGES_AXIS = "num_images"
POINTS = "input_points"  # float32 [1, P, N, 2], (x, y) in pixels of the encoder's input
LABELS = "input_labels"  # int64 [1, P, N]
MASKS = "input_masks"  # float32 [1, 1 or P, h, w]
HAS_MASKS = "has_input_masks"  # float32 [1], 0 or 1
# The decoder's outputs.
MASK_LOGITS, IOU_SCORES = "pred_masks", "iou_scores"
SINGLE_MASK_LOGITS, SINGLE_IOU_SCORES = "single_pred_masks", "single_iou_scores"
OBJECT_SCORE = "object_score_logits"  # only of models with that head
MULTIMASK_OUTPUTS = (MASK_LOGITS, IOU_SCORES)
SINGLE_MASK_OUTPUTS = (SINGLE_MASK_LOGITS, SINGLE_IOU_SCORES)

_FEATURES = "image_embeddings."

# The decoder's padding: anything below -1. No attention sees such a point, so the result is that of
# the other points alone. A point labelled -1 is seen: it has an embedding of its own.
PADDING_LABEL = -10


# NumPy's types by TensorProto.DataType; it has no bfloat16.
_NUMPY_TYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
}


def feature_name(level: int) -> str:
    """Name of a feature map: the encoder's output and the decoder's input, finest first."""
    return f"{_FEATURES}{level}"


def is_feature_name(name: str) -> bool:
    """Whether a tensor of that name is a feature map."""
    return name.startswith(_FEATURES)


class LoadedTensor(NamedTuple):
    """An input or output as the backend sees it.

    Attributes:
        name: its name.
        dtype: its NumPy dtype name, or the backend's own where NumPy has none.
        shape: its sizes; anything but a whole number of 0 or more stands for a dynamic axis.
    """

    name: str
    dtype: str
    shape: Sequence[int | str | None]


@dataclass(frozen=True)
class LoadedGraph:
    """A graph in this process's own memory: what is run is what was hashed.

    Nothing that happens to the files afterwards changes it, and weights that are links into a
    hub's cache are read like others.

    Attributes:
        file: the ``.onnx`` file's name, for messages.
        model: its content.
        weights: content of each file beside it that holds weights, uint8, by the file's name.
        tensors: what of the graph lies in those files.
    """

    file: str
    model: bytes
    weights: dict[str, NDArray[np.uint8]]
    tensors: tuple[ExternalTensor, ...]

    def initializers(self) -> dict[str, NDArray[Any]]:
        """The tensors of ``weights`` by name, for ONNX Runtime's
        ``SessionOptions.add_external_initializers``.

        A session copies them when it is made.

        Raises:
            BundleError: one has a type that NumPy lacks.
        """
        found: dict[str, NDArray[Any]] = {}
        for tensor in self.tensors:
            dtype = _NUMPY_TYPES.get(tensor.data_type)
            if dtype is None:
                raise BundleError(
                    f"has the tensor {tensor.name!r} of the type {tensor.data_type} in "
                    f"{tensor.location}, which NumPy lacks",
                    self.file,
                )
            end = tensor.offset + tensor.length
            part = self.weights[tensor.location][tensor.offset : end]
            # Copied only where the file does not align it.
            found[tensor.name] = np.require(part.view(dtype), requirements="A").reshape(
                tensor.shape
            )
        return found

    def with_addresses(self) -> bytes:
        """The model with addresses in ``weights`` in place of files, as OpenVINO reads them.

        This object must live for as long as what was made from it.
        """
        if not self.weights:
            return self.model
        return with_addresses(self.model, {n: a.ctypes.data for n, a in self.weights.items()})


def load_graph(bundle: Bundle, graph: GraphSpec, *, is_fused: bool = False) -> LoadedGraph:
    """Read a graph and its weights into memory and check them.

    Args:
        bundle: the folder that it lies in.
        graph: its manifest entry.
        is_fused: whether it may hold ONNX Runtime's own operators, which no bundle's graph does.

    Raises:
        BundleError: a file is missing, a link that leaves the bundle, or not what the manifest
            says; the graph is not one of a bundle (see :mod:`.onnx_locations`); or there is not
            enough memory.
    """
    model, tensors = _read_model(bundle, graph, is_fused)
    weights = {entry.file: read_file(bundle.path, entry) for entry in graph.external_data}
    return LoadedGraph(graph.model.file, model, weights, tensors)


def graph_source(bundle: Bundle, graph: GraphSpec) -> bytes | str:
    """The graph's bytes, or its path where there are weights beside it, for libraries to map.

    Mapped weights take less memory than those of :func:`load_graph`, but they are read after they
    were hashed, and change when their file does.

    Raises:
        BundleError: as :func:`load_graph`, except that weights are not hashed.
    """
    for entry in graph.external_data:
        check_length(bundle.path, entry)
    model, _ = _read_model(bundle, graph)
    return str(bundle.file(graph.model)) if graph.external_data else model


def _read_model(
    bundle: Bundle, graph: GraphSpec, is_fused: bool = False
) -> tuple[bytes, tuple[ExternalTensor, ...]]:
    content = read_file(bundle.path, graph.model).tobytes()
    file, beside = graph.model.file, graph.external_data
    return content, check_tensor_locations(content, file, beside, is_fused=is_fused)


def check_graph(
    bundle: Bundle,
    graph: GraphSpec,
    export_id: str,
    inputs: Iterable[LoadedTensor],
    outputs: Iterable[LoadedTensor],
) -> None:
    """Compare a loaded graph with what the manifest promises.

    Args:
        bundle: the bundle it came from.
        graph: its manifest entry.
        export_id: the one in the graph's metadata, empty where there is none.
        inputs: as loaded, in order.
        outputs: as loaded, in order.

    Raises:
        BundleError: it is from another export, or names, types or sizes differ.
    """
    name = graph.model.file
    if export_id != bundle.manifest.export_id:
        raise BundleError(
            f"belongs to export {export_id[:16] or 'unknown'}..., the bundle is "
            f"{bundle.manifest.export_id[:16]}...: encoder and decoder are mixed",
            name,
        )
    mismatch = signature_mismatch(graph, inputs, outputs)
    if mismatch:
        raise BundleError(mismatch, name)


def signature_mismatch(
    graph: GraphSpec,
    inputs: Iterable[LoadedTensor],
    outputs: Iterable[LoadedTensor],
    *,
    is_retyped: bool = False,
) -> str:
    """How inputs and outputs differ from what the manifest promises; empty where they do not.

    Sizes are compared where both sides fix them.

    Args:
        graph: its manifest entry.
        inputs: as loaded.
        outputs: as loaded.
        is_retyped: it was made from the graph, as an engine is: types may be other ones, and
            tensors may come in any order.

    Returns:
        Such as ``"has inputs [...], the manifest says [...]"``.
    """
    for kind, actual, promised in (
        ("inputs", inputs, graph.inputs),
        ("outputs", outputs, graph.outputs),
    ):
        found = [_signature(tensor, is_retyped) for tensor in actual]
        wanted = [_signature(tensor, is_retyped) for tensor in promised]
        if is_retyped:
            found, wanted = sorted(found, key=_name), sorted(wanted, key=_name)
        if not _agree(found, wanted):
            return f"has {kind} {found}, the manifest says {wanted}"
    return ""


def decoder_outputs(manifest: Manifest, multimask_output: bool) -> tuple[str, ...]:
    """The outputs that a call wants: mask logits, predicted IoUs, and the object score if any."""
    masks = MULTIMASK_OUTPUTS if multimask_output else SINGLE_MASK_OUTPUTS
    return (*masks, OBJECT_SCORE) if has_object_score(manifest) else masks


def has_object_score(manifest: Manifest) -> bool:
    """Whether the model says how sure it is that there is an object."""
    return any(spec.name == OBJECT_SCORE for spec in manifest.decoder.outputs)


_Signature = tuple[str, str, tuple[int | None, ...]]


def _signature(tensor: LoadedTensor | TensorSpec, is_retyped: bool) -> _Signature:
    """Name, type and sizes, ``None`` for dynamic axes, which each side may name as it likes."""
    sizes = tuple(side if isinstance(side, int) and side >= 0 else None for side in tensor.shape)
    return tensor.name, "any type" if is_retyped else tensor.dtype, sizes


def _name(signature: _Signature) -> str:
    return signature[0]


def _agree(found: list[_Signature], wanted: list[_Signature]) -> bool:
    """Whether names, types and ranks are equal, and all sizes that both sides fix."""
    return len(found) == len(wanted) and all(
        a[:2] == b[:2]
        and len(a[2]) == len(b[2])
        and all(x == y for x, y in zip(a[2], b[2], strict=True) if None not in (x, y))
        for a, b in zip(found, wanted, strict=True)
    )
