"""The PyTorch model as a backend: the same results as the export's, and fair work for each call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from sam3rt import BackendError, EmbeddingError, Prompts, SegmentationModel
from sam3rt.bundle import Bundle
from sam3rt_bench import pytorch_backend
from sam3rt_bench.pytorch_backend import PyTorchBackend, measure_ceilings
from sam3rt_bench.scene import draw_scene

IMAGE = draw_scene(60, 90)
MASK = np.linspace(-9, 9, 288 * 288).reshape(1, 288, 288)
PROMPTS = {
    "click": Prompts([[30, 25]], [1]),
    "nothing": Prompts(),
    "boxes": Prompts(box=[[1, 2, 20, 18], [3, 4, 25, 15], [30, 20, 60, 45]]),
    "mask": Prompts([[30, 25]], [1], mask_input=MASK),
    "masks": Prompts(box=[[1, 2, 20, 18], [3, 4, 25, 15]], mask_input=np.stack([MASK, -MASK])),
}


def make(small_model: SegmentationModel, checkpoint: Path, precision: str) -> SegmentationModel:
    backend = PyTorchBackend(
        small_model.bundle, checkpoint, precision=precision, device="cpu", threads=None
    )
    return SegmentationModel(small_model.bundle, backend)


@pytest.fixture(scope="module")
def torch_model(small_model: SegmentationModel, small_checkpoint: Path) -> SegmentationModel:
    return make(small_model, small_checkpoint, "fp32")


@pytest.fixture(scope="module")
def embeddings(torch_model: SegmentationModel, small_model: SegmentationModel) -> tuple[Any, Any]:
    return torch_model.encode(IMAGE), small_model.encode(IMAGE)


def close(actual: Any, expected: Any, limit: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


def test_features_are_those_of_the_export(embeddings: tuple[Any, Any]) -> None:
    for actual, expected in zip(*(e.numpy().values() for e in embeddings), strict=True):
        close(actual, expected, 1e-3)
    assert embeddings[0].nbytes == embeddings[1].nbytes


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_are_those_of_the_export(
    torch_model: SegmentationModel,
    small_model: SegmentationModel,
    embeddings: tuple[Any, Any],
    name: str,
    multimask: bool,
) -> None:
    actual = torch_model.decode(embeddings[0], PROMPTS[name], multimask)
    expected = small_model.decode(embeddings[1], PROMPTS[name], multimask)
    close(actual.low_res_masks, expected.low_res_masks, 2e-3)
    close(actual.iou_predictions, expected.iou_predictions, 1e-3)
    close(actual.object_score_logits, expected.object_score_logits, 1e-3)


def test_bf16_is_bf16(
    torch_model: SegmentationModel,
    small_model: SegmentationModel,
    small_checkpoint: Path,
    embeddings: tuple[Any, Any],
) -> None:
    model = make(small_model, small_checkpoint, "bf16")
    for actual, expected in zip(
        model.encode(IMAGE).numpy().values(), embeddings[0].numpy().values(), strict=True
    ):
        close(actual, expected, 0.05)
        assert np.abs(actual - expected).max() > 1e-5 * np.abs(expected).max()


def test_other_features_and_missing_devices_are_refused(
    torch_model: SegmentationModel, small_model: SegmentationModel, small_checkpoint: Path
) -> None:
    with pytest.raises(EmbeddingError, match="OrtFeatures"):
        torch_model.decode(small_model.encode(IMAGE), PROMPTS["click"])
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            PyTorchBackend(
                small_model.bundle,
                small_checkpoint,
                precision="fp32",
                device="cuda",
                threads=None,
            )


@pytest.mark.parametrize("change", ["another file", "another size", "an adapter"])
def test_another_model_is_not_taken_for_the_right_one(
    small_model: SegmentationModel, small_checkpoint: Path, change: str
) -> None:
    manifest = small_model.manifest
    source = manifest.source
    if change == "another file":
        source = replace(source, sha256="0" * 64)
    elif change == "an adapter":
        source = replace(source, notes=("LoRA: x.safetensors merged into 1 parameters",))
    else:
        manifest = replace(manifest, image=replace(manifest.image, size=(672, 672)))
    bundle = Bundle(small_model.bundle.path, replace(manifest, source=source))
    with pytest.raises(BackendError, match=r"sam3_small\.pt as it is was not exported to"):
        PyTorchBackend(bundle, small_checkpoint, precision="fp32", device="cpu", threads=None)


def test_ceilings_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_backend, "_MATRIX_SIDE", 512)
    monkeypatch.setattr(pytorch_backend, "_COPY_BYTES", 1 << 22)
    found = {(c.what, c.element): c.per_second for c in measure_ceilings("cpu", None)}
    assert set(found) == {("matrix product", "fp32"), ("matrix product", "bf16"), ("copy", "")}
    assert all(1e8 < value < 1e15 for value in found.values())
