"""What every backend holds a loaded graph to: the bytes that were hashed, and the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import BundleError
from .manifest import Bundle, GraphSpec, Manifest, TensorSpec, check_length
from .onnx_locations import check_tensor_places

EXPORT_ID = "sam3rt.export_id"

# Outputs of the decoder: mask logits and predicted IoUs of a multi-mask call, those of a
# single-mask call, and a score that not every model has.
MULTIMASK_OUTPUTS = ("pred_masks", "iou_scores")
SINGLE_MASK_OUTPUTS = ("single_pred_masks", "single_iou_scores")
OBJECT_SCORE = "object_score_logits"


class LoadedTensor(NamedTuple):
    """An input or output as the backend sees it.

    Attributes:
        name: its name.
        dtype: its NumPy dtype name, or the backend's own where NumPy has none.
        shape: its sizes; anything but a whole number stands for a dynamic axis.
    """

    name: str
    dtype: str
    shape: Sequence[int | str | None]


def graph_source(bundle: Bundle, graph: GraphSpec) -> bytes | str:
    """The graph's bytes, checked against the manifest, or its path.

    Weights beside the graph are found through the path. Without them, what is loaded is what was
    hashed, even if the file is exchanged meanwhile.

    Raises:
        BundleError: a file is missing, a link that leaves the bundle, or changed since the bundle
            was opened; or a tensor of the graph lies in a file that the manifest does not list.
    """
    for entry in (graph.model, *graph.external_data):
        check_length(bundle.path, entry)
    path = bundle.file(graph.model)
    try:
        with path.open("rb") as stream:
            content = stream.read(graph.model.bytes + 1)
    except OSError as error:
        raise BundleError(f"cannot be read: {error}", graph.model.file) from error
    if hashlib.sha256(content).hexdigest() != graph.model.sha256:
        raise BundleError("changed since the bundle was opened", graph.model.file)
    check_tensor_places(content, graph.model.file, graph.external_data)
    return str(path) if graph.external_data else content


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
    for kind, actual, promised in (
        ("inputs", inputs, graph.inputs),
        ("outputs", outputs, graph.outputs),
    ):
        found = [_signature(tensor) for tensor in actual]
        wanted = [_signature(tensor) for tensor in promised]
        if not _agree(found, wanted):
            raise BundleError(f"has {kind} {found}, the manifest says {wanted}", name)


def decoder_outputs(manifest: Manifest, multimask_output: bool) -> tuple[str, ...]:
    """The outputs that a call wants: mask logits, predicted IoUs, and the object score if any."""
    masks = MULTIMASK_OUTPUTS if multimask_output else SINGLE_MASK_OUTPUTS
    return (*masks, OBJECT_SCORE) if has_object_score(manifest) else masks


def has_object_score(manifest: Manifest) -> bool:
    """Whether the model says how sure it is that there is an object."""
    return any(spec.name == OBJECT_SCORE for spec in manifest.decoder.outputs)


_Signature = tuple[str, str, tuple[int | None, ...]]


def _signature(tensor: LoadedTensor | TensorSpec) -> _Signature:
    """Name, type and sizes, ``None`` for dynamic axes, which each side may name as it likes."""
    sizes = tuple(side if isinstance(side, int) else None for side in tensor.shape)
    return tensor.name, tensor.dtype, sizes


def _agree(found: list[_Signature], wanted: list[_Signature]) -> bool:
    """Whether names, types and ranks are equal, and all sizes that both sides fix."""
    return len(found) == len(wanted) and all(
        a[:2] == b[:2]
        and len(a[2]) == len(b[2])
        and all(x == y for x, y in zip(a[2], b[2], strict=True) if None not in (x, y))
        for a, b in zip(found, wanted, strict=True)
    )
