"""Tests of `sam3rt.backends.base`: what every backend does the same way."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.support.helpers import (
    WrappedBackend,
    external_weights,
    noise,
    one_image_form,
    wrapped,
)

from sam3rt import (
    BackendError,
    Bundle,
    BundleError,
    InvalidInputError,
    Prompts,
    SegmentationModel,
    load_model,
)
from sam3rt.backends.base import OBJECTS_AT_ONCE
from sam3rt.bundle.contract import IMAGES_AXIS, decoder_outputs
from sam3rt.masks import MaskOptions
from sam3rt.prompts import PackedPrompts

FORK = """
import os, sys
import numpy as np
import sam3rt

def load():
    return sam3rt.load_model(sys.argv[2], backend=sys.argv[1], device="cpu", precision="fp32")

model = load()
click = sam3rt.Prompts(point_coords=[[4, 4]], point_labels=[1])
embedding = model.encode(np.zeros((16, 16, 3), np.uint8))
model.decode(embedding, click)
child = os.fork()
if child == 0:
    image = np.zeros((9, 9, 3), np.uint8)
    for call in (
        lambda: model.decode(embedding, click), lambda: model.encode(image), model.warm_up
    ):
        try:
            call()
        except sam3rt.StateError as error:
            assert "after the fork" in str(error)
        else:
            sys.exit(1)
    load().warm_up()
    sys.exit(42)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
model.decode(embedding, click)
print("both work")
"""


@pytest.mark.serial
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_forked_child_says_so_loads_its_own_and_ends(tiny_sam3: Path, backend: str) -> None:
    """A child that destroyed what it inherited would hang or die at its end."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, backend, str(tiny_sam3)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "both work\n"


class Counting(WrappedBackend):
    """Remembers how many objects each run of the decoder had."""

    def _decode(self, features, prompts: PackedPrompts, outputs):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("runs", []).append(len(prompts.labels))
        return super()._decode(features, prompts, outputs)


@pytest.mark.parametrize("own_masks", [False, True])
def test_many_objects_are_decoded_in_several_runs_to_the_same_result(
    tiny_model: SegmentationModel, own_masks: bool
) -> None:
    count = 2 * OBJECTS_AT_ONCE + 1
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 60, (count, 2, 2)), axis=1)
    size = tiny_model.manifest.prompts.mask_size
    shape = (count if own_masks else 1, 1, *size)
    mask = rng.normal(0, 4, shape).astype(np.float32) if own_masks else None
    backend = Counting(tiny_model.backend)
    model = SegmentationModel(tiny_model.bundle, backend)
    embedding = model.encode(noise(64, 64))
    found = model.decode(embedding, Prompts(box=corners.reshape(count, 4), mask_input=mask))
    assert backend.runs == [OBJECTS_AT_ONCE, OBJECTS_AT_ONCE, 1]  # type: ignore[attr-defined]
    for index in (0, OBJECTS_AT_ONCE, count - 1):
        own = None if mask is None else mask[index]
        alone = model.decode(embedding, Prompts(box=corners[index].reshape(4), mask_input=own))
        np.testing.assert_allclose(
            found.low_res_masks[index], alone.low_res_masks[0], rtol=0, atol=1e-3
        )


def test_many_objects_take_the_memory_of_their_masks_once(tiny_model: SegmentationModel) -> None:
    count = 16 * OBJECTS_AT_ONCE
    prompts = Prompts(box=np.tile([1.0, 2, 6, 7], (count, 1)))
    embedding = tiny_model.encode(noise(9, 9))
    tiny_model.decode(embedding, prompts)
    tracemalloc.start()
    try:
        found = tiny_model.decode(embedding, prompts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * found.low_res_masks.nbytes


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("form", ["each object its image", "one image"])
def test_several_images_are_answered_as_each_alone(
    tiny_sam3: Path, tmp_path: Path, backend: str, form: str
) -> None:
    """By bundles of earlier versions, too."""
    path = tiny_sam3 if form != "one image" else one_image_form(tmp_path / "old", tiny_sam3).path
    model = load_model(path, backend=backend, device="cpu", precision="fp32")
    axis = model.manifest.decoder.inputs[0].shape[0]
    assert axis == (1 if form == "one image" else IMAGES_AXIS)
    today = load_model(tiny_sam3, backend=backend, device="cpu", precision="fp32")
    images = [noise(9, 12), noise(30, 20, 1), noise(8, 8, 2)]
    asked = [
        Prompts([[4.0, 4.0]], [1]),
        Prompts(box=[[1, 1, 9, 6], [2, 0, 5, 5]]),
        Prompts([[3.0, 3.0]], [1], mask_input=np.ones((1, 16, 16))),
    ]
    options = MaskOptions(max_hole_area=4, dtype=np.bool_)
    found = model.segment_batch(model.encode_batch(images), asked, True, options)
    for image, prompts, (decoded, masks) in zip(images, asked, found, strict=True):
        expected, alone = today.segment(
            today.encode(image), prompts, max_hole_area=4, dtype=np.bool_
        )
        np.testing.assert_array_equal(decoded.low_res_masks, expected.low_res_masks)
        np.testing.assert_array_equal(masks, alone)


def test_each_image_needs_its_prompts(tiny_model: SegmentationModel) -> None:
    embedding = tiny_model.encode(noise(9, 9))
    with pytest.raises(InvalidInputError, match="prompts: got 1, expected one for each of 2"):
        tiny_model.segment_batch([embedding] * 2, [Prompts([[4, 4]], [1])])
    assert tiny_model.segment_batch([], []) == []


def test_no_objects_give_empty_outputs(tiny_model: SegmentationModel) -> None:
    nothing = PackedPrompts(np.zeros((0, 2, 2), np.float32), np.zeros((0, 2), np.int64), None)
    embedding = tiny_model.encode(noise(9, 9))
    outputs = decoder_outputs(tiny_model.manifest, multimask_output=True)
    masks, scores, *_ = tiny_model.backend.decode(embedding.features, nothing, outputs)
    assert masks.shape == (1, 0, 3, *tiny_model.manifest.masks.low_res_size)
    assert scores.shape == (1, 0, 3)


@pytest.mark.parametrize("output", ["pred_masks", "iou_scores", "object_score_logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_an_error(
    tiny_model: SegmentationModel, output: str, value: float
) -> None:
    def spoil(outputs: dict[str, np.ndarray]) -> None:
        outputs[output].flat[-1] = value

    model = wrapped(tiny_model, on_decode=spoil)
    embedding, click = model.encode(noise(9, 9)), Prompts([[4, 4]], [1])
    with pytest.raises(BackendError, match="not finite"):
        model.decode(embedding, click)
    with pytest.raises(BackendError, match="not finite"):
        model.segment(embedding, click)


def test_a_feature_map_that_left_its_range_gives_no_empty_mask(
    tiny_model: SegmentationModel,
) -> None:
    """The finest map reaches the masks alone: scores do not tell."""

    def spoil(maps: list[np.ndarray]) -> list[np.ndarray]:
        maps[0][0, 0] = np.inf
        return maps

    model = wrapped(tiny_model, on_encode=spoil)
    with pytest.raises(BackendError, match="not finite"):
        model.segment(model.encode(noise(9, 9)), Prompts([[4, 4]], [1]))


# --- weights beside a graph -----------------------------------------------------------------------


def load_external(bundle: Bundle, backend: str, *, map_weights: bool = False) -> SegmentationModel:
    return load_model(
        bundle.path, backend=backend, device="cpu", precision="fp32", map_weights=map_weights
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("map_weights", [False, True])
def test_weights_beside_a_graph_give_the_same_result(
    tmp_path: Path, tiny_sam3: Path, tiny_model: SegmentationModel, backend: str, map_weights: bool
) -> None:
    model = load_external(
        external_weights(tmp_path / "e", tiny_sam3), backend, map_weights=map_weights
    )
    click = Prompts([[4, 4]], [1])
    expected = tiny_model.decode(tiny_model.encode(noise(9, 9)), click)
    found = model.decode(model.encode(noise(9, 9)), click)
    scale = np.abs(expected.low_res_masks).max()
    np.testing.assert_allclose(found.low_res_masks, expected.low_res_masks, atol=1e-3 * scale)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_weights_exchanged_before_first_use_are_not_served(
    tmp_path: Path, tiny_sam3: Path, backend: str
) -> None:
    bundle = external_weights(tmp_path / "e", tiny_sam3)
    model = load_external(bundle, backend)
    path = bundle.path / "decoder.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.data"):
        model.warm_up()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_happens_to_weights_in_use_changes_nothing(
    tmp_path: Path, tiny_sam3: Path, backend: str
) -> None:
    """A mapped file that is cut would end the process."""
    bundle = external_weights(tmp_path / "e", tiny_sam3)
    model = load_external(bundle, backend)
    click = Prompts([[4, 4]], [1])
    embedding = model.encode(noise(9, 9))
    before = model.decode(embedding, click).low_res_masks
    path = bundle.path / "decoder.data"
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(model.decode(embedding, click).low_res_masks, before)
    path.write_bytes(b"")
    np.testing.assert_array_equal(model.decode(embedding, click).low_res_masks, before)
