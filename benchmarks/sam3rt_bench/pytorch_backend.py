"""The PyTorch model as a backend, so that benchmarks run it like any other.

The model is transformers' parts for SAM 3, put together as the reference predictor does, and
MobileSAM's own code; see :mod:`sam3rt_export.references`. Every call computes what it is asked for
and no more: one pass of the mask decoder, all objects at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam3rt.backends.base import Backend
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, EmbeddingError
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts
from sam3rt_export.references.transformers_sam3 import TransformersReference
from sam3rt_export.source import Reference
from sam3rt_export.sources import open_source

from .document import Ceiling
from .timing import fastest

_MATRIX_SIDE = 4096
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class TorchFeatures(Features):
    """Feature maps held by PyTorch.

    Attributes:
        tensors: float32 [1, C, h, w] each, finest map first.
    """

    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory."""
        return tuple(np.array(tensor.cpu().numpy()) for tensor in self.tensors)


class PyTorchBackend(Backend):
    """Runs the PyTorch model, all objects in one run of the decoder.

    Args:
        bundle: the export of the checkpoint, for its names and sizes.
        checkpoint: as :func:`sam3rt_export.sources.open_source` takes it.
        precision: ``"fp32"``, ``"bf16"`` (autocast), and either after ``"compile-"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: CPU threads, for the whole process; ``None`` leaves them.

    Raises:
        BackendError: the device is not there, or the bundle is not the checkpoint's export.
        CheckpointError: the checkpoint cannot be read.
    """

    name = "pytorch"

    def __init__(
        self, bundle: Bundle, checkpoint: Path, *, precision: str, device: str, threads: int | None
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device != "cpu" and not torch.cuda.is_available():
            raise BackendError(f"device {device!r} was asked for; PyTorch sees no CUDA")
        if threads is not None:
            torch.set_num_threads(threads)
        super().__init__(bundle, device, precision, objects_at_once=1 << 30)
        self._autocast = precision.endswith("bf16")
        model, source = _open(checkpoint, device)
        _expect_export_of(bundle, source, checkpoint)
        self._run_encoder: Callable[..., Any] = model.encode
        self._run_decoder: Callable[..., Any] = model.decode_together
        if precision.startswith("compile-"):
            # Objects and points vary from call to call; a graph for each number of them would be
            # compiled over and over, and after eight not at all.
            self._run_encoder = torch.compile(model.encode)
            self._run_decoder = torch.compile(model.decode_together, dynamic=True)

    def prepare(self) -> None:
        """Nothing: what is compiled is compiled for the shapes of its first calls."""

    def versions(self) -> dict[str, str]:
        """Version of PyTorch."""
        return {"torch": str(torch.__version__)}

    def _encode(self, pixels: NDArray[np.float32]) -> TorchFeatures:
        """Returns when the encoder is done."""
        tensors = self.encode_tensor(torch.from_numpy(pixels).to(self.device))
        self._wait()
        return TorchFeatures(tensors)

    def encode_tensor(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Queue the encoder on float32 [1, 3, H, W] of the device; the feature maps in FP32."""
        with self._context():
            return tuple(tensor.float() for tensor in self._run_encoder(pixels))

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        if not isinstance(features, TorchFeatures):
            raise EmbeddingError(f"features are {type(features).__name__}, not PyTorch's")
        prefix = "" if "pred_masks" in outputs else "single_"
        masks = None if prompts.masks is None else self._tensor(prompts.masks)
        with self._context():
            logits, iou, score = self._run_decoder(
                features.tensors,
                self._tensor(prompts.points),
                self._tensor(prompts.labels),
                masks,
                prefix == "",
            )
        named = {f"{prefix}pred_masks": logits, f"{prefix}iou_scores": iou}
        if score is not None:
            named["object_score_logits"] = score
        return [named[name].float().cpu().numpy()[None] for name in outputs]

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> TorchFeatures:
        """Copy feature maps to the device."""
        return TorchFeatures(tuple(self._tensor(np.array(array, np.float32)) for array in maps))

    def peak_device_bytes(self) -> int:
        """Most memory PyTorch has held on the device."""
        return torch.cuda.max_memory_allocated() if self.device != "cpu" else 0

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        kind = self.device.partition(":")[0]
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self._autocast):
            yield

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


class _MobileSam:
    """MobileSAM's two halves."""

    def __init__(self, reference: Reference, device: str) -> None:
        if device != "cpu":
            raise BackendError("MobileSAM in PyTorch is compared on the CPU")
        self._reference = reference
        self.encode = reference.encode

    def decode_together(
        self,
        features: tuple[Tensor, ...],
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        multimask: bool,
    ) -> tuple[Tensor, Tensor, None]:
        """Logits [P, C, h, w] and IoUs [P, C]; its decoder makes all four masks either way."""
        said = self._reference.decode(features, points, labels, masks)
        chosen = slice(0, 3) if multimask else slice(3, 4)
        return said.logits[:, chosen], said.iou[:, chosen], None


@lru_cache(maxsize=1)
def _open(
    checkpoint: Path, device: str
) -> tuple[TransformersReference | _MobileSam, dict[str, object]]:
    """The model, loaded once for all precisions, and what tells it from others."""
    source = open_source(checkpoint)
    facts: dict[str, object] = {
        "SHA-256": source.sha256,
        "input size": source.image.size,
        "notes": source.notes,
    }
    if isinstance(source.reference, TransformersReference):
        return source.reference.to(device), facts
    return _MobileSam(source.reference, device), facts


def _expect_export_of(bundle: Bundle, facts: dict[str, object], checkpoint: Path) -> None:
    """Refuse another model, whose masks would be taken for the right ones."""
    manifest = bundle.manifest
    made_from = (manifest.source.sha256, manifest.image.size, manifest.source.notes)
    for (name, found), expected in zip(facts.items(), made_from, strict=True):
        unknown = name == "SHA-256" and not (found and expected)  # of folders and live models
        if found != expected and not unknown:
            raise BackendError(
                f"{checkpoint} as it is was not exported to {bundle.path}: {name} {found!r}, the "
                f"bundle's {expected!r}"
            )


def measure_ceilings(device: str, threads: int | None) -> Iterator[Ceiling]:
    """The fastest matrix products and copies PyTorch reaches on a device."""
    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = device != "cpu"
    side = 2 * _MATRIX_SIDE if on_gpu else _MATRIX_SIDE // 2
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if on_gpu:
        kinds["fp16"] = torch.float16
    for element, dtype in kinds.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = fastest(partial(_wait_for, device, partial(torch.matmul, a, b)))
        yield Ceiling("matrix product", element, device, "torch", 2 * side**3 / seconds)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(partial(_wait_for, device, partial(target.copy_, source)))
    yield Ceiling("copy", "", device, "torch", 2 * _COPY_BYTES / seconds)


def _wait_for(device: str, call: Callable[[], Any]) -> None:
    call()
    if device != "cpu":
        torch.cuda.synchronize()
