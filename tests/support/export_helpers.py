"""Toy models and plain implementations that the tests of the export share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tests.golden.efficientsam3 import synthetic as efficient_sam3
from tests.golden.sam2 import synthetic as sam2_synthetic
from tests.golden.sam3 import synthetic
from torch import Tensor, nn

from sam3rt.bundle import GraphSpec, file_entry, open_bundle
from sam3rt.bundle.contract import EXPORT_ID, ROLE
from sam3rt_export.tracing import TraceRequest

TRUNK = "detector.backbone.vision_backbone.trunk."
NECK = "detector.backbone.vision_backbone.sam2_convs."
PROMPT = "tracker.sam_prompt_encoder."
DECODER = "tracker.sam_mask_decoder."
NO_MEMORY = "tracker.no_mem_embed"

# The interactive predictor reads these and nothing else.
USED = (TRUNK, NECK, PROMPT, DECODER, NO_MEMORY)

Mutation = Callable[[dict[str, Tensor]], Any]


def _remember_operators() -> None:
    """Let PyTorch's exporter make its table of operators once, and not for every graph.

    For a small graph, making the table takes longer than everything else. Where another version of
    PyTorch has it elsewhere, tests are slower and nothing else.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return
    if not hasattr(ONNXRegistry, "from_torchlib"):
        return
    make = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**options: Any) -> ONNXRegistry:
        registry = copy.copy(make(**options))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]


_remember_operators()


# --- SAM 3 checkpoints ----------------------------------------------------------------------------


def keys() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the golden data's small SAM 3."""
    lines = (synthetic.FOLDER / "keys.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return {name: tuple(int(side) for side in sides.split("x")) for name, sides, _ in rows}


def stored_ropes() -> dict[str, Tensor]:
    """The reference's own rotary tables: ``window`` [576, 32] and ``global_`` [5184, 32]."""
    tables = np.load(synthetic.FOLDER / "freqs_cis.npz")
    return {name: torch.from_numpy(tables[name]) for name in tables.files}


def rope(side: int, head_dim: int, scale: float, theta: float = 10000.0) -> Tensor:
    """The reference's ``compute_axial_cis``: complex64 [side^2, head_dim / 2]."""
    steps = torch.arange(0, head_dim, 4)[: head_dim // 4].float() / head_dim
    frequencies = 1.0 / theta**steps
    index = torch.arange(side * side)
    x, y = (index % side).float() * scale, (index // side).float() * scale
    angle = torch.cat([torch.outer(x, frequencies), torch.outer(y, frequencies)], dim=1)
    return torch.polar(torch.ones_like(angle), angle)


@dataclasses.dataclass(frozen=True)
class TinySizes:
    """Geometry of a tiny SAM 3; its widths are fixed."""

    grid: int = 4
    window: int = 2
    pretrain: int = 2
    global_blocks: tuple[int, ...] = (1,)
    depth: int = 2


_TINY_TRUNK = {128: 16, 384: 48, 592: 24, 64: 8, 32: 4, 256: 32, 14: 2}
_TINY_DECODER = {256: 32, 128: 16, 64: 8, 32: 4, 2048: 24}


def tiny_tensors(sizes: TinySizes | None = None, salt: str = "tiny-") -> dict[str, Tensor]:
    """A SAM 3 of 8x8 pixels in ``sam3.pt`` naming, interactive part only: opens in no time."""
    sizes = sizes or TinySizes()
    tensors = {}
    for name, published in keys().items():
        if not name.startswith(USED):
            continue
        shape = published
        if name == TRUNK + "pos_embed":
            shape = (1, 1 + sizes.pretrain**2, 16)
        elif name.startswith((TRUNK, NECK)):
            shape = tuple(_TINY_TRUNK.get(side, side) for side in shape)
        elif name == DECODER + "iou_prediction_head.layers.0.weight":
            shape = (256, 32)
        elif "iou_prediction_head" not in name:
            shape = tuple(_TINY_DECODER.get(side, side) for side in shape)
        if not name.startswith(TRUNK + "blocks."):
            tensors[name] = torch.from_numpy(synthetic.weight(name, shape, salt))
        elif name.startswith(TRUNK + "blocks.0."):
            for block in range(sizes.depth):
                own = name.replace("blocks.0.", f"blocks.{block}.")
                if own.endswith("freqs_cis"):
                    tensors[own] = _tiny_rope(sizes, block)
                else:
                    tensors[own] = torch.from_numpy(synthetic.weight(own, shape, salt))
    return tensors


def _tiny_rope(sizes: TinySizes, block: int) -> Tensor:
    if block in sizes.global_blocks:
        return rope(sizes.grid, 8, sizes.window / sizes.grid)
    return rope(sizes.window, 8, 1.0)


def canonical_tensors(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a whole model that the interactive predictor has, in canonical naming."""
    from sam3rt_export.sources.state_dict import interactive_parts

    return interactive_parts(state, what).tensors


def small_tensors() -> dict[str, Tensor]:
    """Every tensor of the golden data's small SAM 3, unused ones included."""
    return {name: torch.from_numpy(np.asarray(a)) for name, a in synthetic.checkpoint().items()}


_MULTIPLEX = (
    (NECK, "detector.backbone.vision_backbone.interactive_convs."),
    (PROMPT, "tracker.model.interactive_sam_prompt_encoder."),
    (DECODER, "tracker.model.interactive_sam_mask_decoder."),
    (NO_MEMORY, "tracker.model.interactivity_no_mem_embed"),
)


def as_multiplex(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as a SAM 3.1 has them, beside the decoder that must not be taken."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(NECK + "3."):
            continue  # its necks have three levels
        new = name
        for old, prefix in _MULTIPLEX:
            if name.startswith(old):
                new = prefix + name.removeprefix(old)
        renamed[new] = tensor
        if name.startswith(DECODER):
            other = name.replace(DECODER, "tracker.model.sam_mask_decoder.")
            renamed[other] = torch.full_like(tensor, 7.0)
    return renamed


# --- EfficientSAM3 checkpoints --------------------------------------------------------------------

STUDENT = efficient_sam3.TRUNK
STUDENTS = ("repvit", "tinyvit", "efficientvit")
# Of each golden student the blocks that are kept, with their new numbers, and by how much its
# widths shrink: one block of every kind in each stage, and two in a row.
_SHRUNK: dict[str, tuple[str, int, str, tuple[int, ...]]] = {
    "repvit": ("repvit_m0_9", 8, r"(.*features\.)(\d+)(\..*)", (0, 1, 2, 4, 5, 8, 9, 24, 25, 26)),
    "tinyvit": ("tinyvit_5m", 8, r"(.*layers\.2\.blocks\.)(\d+)(\..*)", (0, 1)),
    "efficientvit": ("efficientvit_b0", 4, r"(.*stages\.3\.op_list\.)(\d+)(\..*)", (0, 1)),
}


def tiny_student(family: str, salt: str = "tiny-student-") -> dict[str, Tensor]:
    """An EfficientSAM3 in ``sam3.pt`` naming with few channels under the neck of the tiny SAM 3."""
    model, factor, pattern, kept = _SHRUNK[family]
    tensors = {n: t for n, t in tiny_tensors().items() if not n.startswith(TRUNK)}
    for name, published in efficient_sam3.keys(model).items():
        if not name.startswith(STUDENT):
            continue
        own, shape = name, published
        match = re.fullmatch(pattern, name)
        if match:
            if int(match[2]) not in kept:
                continue
            own = f"{match[1]}{kept.index(int(match[2]))}{match[3]}"
        if not name.endswith("attention_biases"):
            # Kernels, single channels and the image's three stay; 1,024 is the tiny neck's 16.
            channels = tuple(
                side if side in (1, 3) else 16 if side == 1024 else side // factor
                for side in shape[:2]
            )
            shape = channels + shape[2:]
        tensors[own] = torch.from_numpy(efficient_sam3.parameter(own, shape, salt))
    return tensors


def register(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor under a dotted name, making plain modules along the way."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    if tensor.is_floating_point():
        root.register_parameter(leaf, nn.Parameter(tensor))
    else:
        root.register_buffer(leaf, tensor)


class ReferenceTracker(nn.Module):
    """A stand-in for the reference's tracker: its parameter names, and no code."""

    def __init__(self, tensors: Mapping[str, Tensor], *, backbone: bool = True) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if name.startswith("tracker."):
                register(self, name.removeprefix("tracker."), tensor)
            elif backbone and name.startswith("detector.backbone."):
                register(self, name.removeprefix("detector."), tensor)


class Exploit:
    """A pickle of this creates a file when it is loaded carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


# --- SAM 2 checkpoints ----------------------------------------------------------------------------


def small_sam2_architecture() -> Any:
    """The ``HieraArchitecture`` of the golden data's small SAM 2.1."""
    from sam3rt_export.graphs.hiera import HieraArchitecture

    model = sam2_synthetic.cases()["model"]
    stages = range(len(model["stages"]))
    return HieraArchitecture(
        image_size=model["image_size"],
        depths=tuple(model["stages"]),
        widths=tuple(model["embed_dim"] * 2**stage for stage in stages),
        heads=tuple(model["num_heads"] * 2**stage for stage in stages),
        windows=tuple(model["window_spec"]),
        global_blocks=tuple(model["global_att_blocks"]),
    )


def small_sam2_model() -> Any:
    """The golden data's small SAM 2.1 as a transformers ``Sam2Model``."""
    from sam3rt_export.references.transformers_sam2 import build_sam2_model

    state = {name: torch.from_numpy(array) for name, array in sam2_synthetic.checkpoint().items()}
    return build_sam2_model(small_sam2_architecture(), canonical_tensors(state, "the small model"))


def sam2_state(architecture: Any, salt: str = "tiny-", neck: int = 32) -> dict[str, Tensor]:
    """A SAM 2.1 in its checkpoints' naming.

    Args:
        architecture: a ``HieraArchitecture``; its widths and heads double from stage to stage.
        salt: another salt gives another model.
        neck: channels of the neck and of the decoder.
    """
    arch = architecture
    named = sam2_synthetic.shapes_of(arch.depths, arch.widths[0], 3, arch.windows[0])
    narrow = {256: neck, 128: neck // 2, 64: neck // 4, 32: neck // 8, 2048: 24}
    state = {}
    for name, shape in named.items():
        if name.startswith("image_encoder.neck"):
            shape = (neck, *shape[1:])
        elif not name.startswith("image_encoder."):
            hidden = 256 if name == "sam_mask_decoder.iou_prediction_head.layers.0.weight" else None
            if hidden:
                shape = (hidden, neck)
            elif "iou_prediction_head" not in name:
                shape = tuple(narrow.get(side, side) for side in shape)
        state[name] = torch.from_numpy(sam2_synthetic.weight(name, shape, salt))
    return state


# --- MobileSAM ------------------------------------------------------------------------------------


def random_mobile_sam(seed: int = 0) -> nn.Module:
    """The official MobileSAM with random parameters and batch statistics, in evaluation mode.

    Fresh batch normalizations are almost the identity, and fresh position biases are zero, so
    mistakes in either would go unnoticed.
    """
    import sam3rt_export.references  # noqa: F401  (makes torchvision importable)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mobile_sam import build_sam_vit_t

    torch.manual_seed(seed)
    model: nn.Module = build_sam_vit_t()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.normal_(0.0, 0.2)
            elif name.endswith("attention_biases"):
                tensor.normal_(0.0, 1.0)
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.normal_(1.0, 0.2)
    return model.eval()


# --- plain implementations ------------------------------------------------------------------------


def parity_images(count: int) -> list[NDArray[np.uint8]]:
    """The first of the images that an export records unless it is told otherwise.

    One is enough where a test is not about the record: each is run in full resolution, by PyTorch
    and by ONNX Runtime.
    """
    from sam3rt_export.parity_inputs import default_images

    return default_images()[:count]


# --- comparing and running ------------------------------------------------------------------------


def relative(actual: Tensor | NDArray[Any], expected: Tensor | NDArray[Any]) -> float:
    """Largest absolute difference over the largest absolute expected value; shapes must agree."""
    a, b = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    if not a.numel():
        return 0.0
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-9)


def run_onnx(path: Path, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs of an ONNX file in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def copied_graphs(traced: Path) -> Callable[[TraceRequest, Path], GraphSpec]:
    """What stands in for ``exporter.trace_to_file`` to save ten seconds: copies a bundle's graphs.

    Args:
        traced: a bundle of the same model.
    """
    manifest = open_bundle(traced).manifest

    def copy(request: TraceRequest, path: Path) -> GraphSpec:
        role = request.metadata[ROLE]
        model = onnx.load(traced / f"{role}.onnx")
        for entry in model.metadata_props:
            if entry.key == EXPORT_ID:
                entry.value = request.metadata[entry.key]
        onnx.save(model, path)
        spec = manifest.encoder if role == "encoder" else manifest.decoder
        # Weights that lay beside the graph are inside now.
        return msgspec.structs.replace(spec, model=file_entry(path), external_data=())

    return copy


def leftovers(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden things included."""
    return sorted(entry.name for entry in folder.iterdir())
