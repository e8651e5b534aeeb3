"""The outputs of EfficientSAM3's own code, reproduced: each family's smallest student, full size.

See golden/efficientsam3/README.md. Limits are about five times what is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.golden.efficientsam3 import synthetic
from tests.support import golden
from torch import Tensor

import sam3rt
from sam3rt import SAM3InteractiveImagePredictor
from sam3rt.accuracy.metrics import largest_error
from sam3rt.bundle import ImageSpec, open_bundle
from sam3rt.geometry import preprocess
from sam3rt_export.references.efficient_sam3 import PlainStudent
from sam3rt_export.sources.efficient_sam3 import open_efficient_sam3

FEATURE_LIMIT = 2e-4
LIMITS = {"logits": 5e-4, "iou": 1e-5, "mask_pixels": 2e-5}
# Where small holes are filled, a pixel at the threshold can move a component across the limit.
LIMITS_WITH_HOLES = {**LIMITS, "mask_pixels": 2e-3}


def checkpoint(student: str) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(array)
        for name, array in synthetic.checkpoint(student).items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.float32]:
    """The golden image as the encoder sees it."""
    half = (127.5, 127.5, 127.5)
    spec = ImageSpec(
        size=(1008, 1008), resize="stretch", resize_dtype="float32", mean=half, std=half
    )
    return preprocess(spec, synthetic.image())[0]


def test_preprocessing(pixels: NDArray[np.float32]) -> None:
    expected = golden.efficient_sam3_outputs()["input/float"]
    assert largest_error(pixels[0, :, ::21, ::21], expected) < 1e-4


@torch.no_grad()
def test_an_encoder_before_its_export(pixels: NDArray[np.float32]) -> None:
    student = "efficientvit_b0"
    source = open_efficient_sam3(checkpoint(student))
    maps = [m.numpy() for m in source.encoder(torch.from_numpy(pixels))]
    assert golden.efficient_sam3_feature_error(student, *maps) < FEATURE_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("student", synthetic.MODELS)
@torch.no_grad()
def test_what_an_export_is_compared_with_is_itself_the_original(
    student: str, pixels: NDArray[np.float32]
) -> None:
    own = {
        name.removeprefix(synthetic.TRUNK): tensor
        for name, tensor in checkpoint(student).items()
        if name.startswith(synthetic.TRUNK)
    }
    plain = PlainStudent(student.partition("_")[0], own, 72)
    tokens = plain(torch.from_numpy(pixels)).last_hidden_state
    trunk = tokens.transpose(1, 2).reshape(1024, 72, 72)[::16, ::6, ::6].numpy()
    expected = golden.efficient_sam3_outputs()[f"{student}/trunk"]
    assert largest_error(trunk, expected) < FEATURE_LIMIT


@pytest.fixture(scope="module", params=synthetic.MODELS)
def bundle(request: pytest.FixtureRequest, export_once: Callable[..., Path]) -> Path:
    """Each student exported in full size."""
    name = f"efficient_sam3_{request.param}"
    data = [synthetic.FOLDER / "synthetic.py", *synthetic.FOLDER.glob("*.tsv")]
    return export_once(name, lambda: synthetic.checkpoint(request.param), *data) / name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_student_answers_as_the_original(bundle: Path, backend: str) -> None:
    manifest = open_bundle(bundle).manifest
    assert (manifest.model_type, manifest.name) == ("efficient_sam3", bundle.name)
    student = bundle.name.removeprefix("efficient_sam3_")
    precision = "fp32" if backend == "openvino" else "auto"
    model = sam3rt.load_model(bundle, backend=backend, device="cpu", precision=precision)
    embedding = model.encode(synthetic.image())
    maps = embedding.numpy().values()
    assert golden.efficient_sam3_feature_error(student, *maps) < FEATURE_LIMIT
    for max_hole_area, limits in ((256.0, LIMITS_WITH_HOLES), (0.0, LIMITS)):
        predictor = SAM3InteractiveImagePredictor(model, max_hole_area=max_hole_area)
        predictor.set_embedding(embedding)
        for call, arguments in golden.EFFICIENT_SAM3_CALLS.items():
            errors: dict[str, Any] = golden.efficient_sam3_errors(
                student, call, predictor.predict(**arguments), holes_filled=max_hole_area > 0
            )
            assert all(errors[part] <= limit for part, limit in limits.items()), (call, errors)
