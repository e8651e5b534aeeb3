"""Tests of `sam3rt.backends.base`: what every backend does the same way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.support.helpers import (
    WrappedBackend,
    edit_manifest,
    external_weights,
    noise,
    one_image_form,
    relist,
    wrapped,
)

from sam3rt import (
    BackendError,
    Bundle,
    BundleError,
    EmbeddingError,
    InvalidInputError,
    Prompts,
    SegmentationModel,
    load_model,
)
from sam3rt.backends.base import OBJECTS_AT_ONCE
from sam3rt.bundle.contract import IMAGES_AXIS, decoder_outputs
from sam3rt.features import HostFeatures
from sam3rt.masks import MaskOptions
from sam3rt.prompts import PackedPrompts

BACKENDS = ("onnxruntime", "openvino")
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
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


# --- the same on the CPU, whatever runs the graphs ------------------------------------------------


@pytest.fixture(scope="module", params=BACKENDS)
def cpu_model(request: pytest.FixtureRequest, tiny_sam3: Path) -> SegmentationModel:
    return load(tiny_sam3, request.param)


def load(path: Path, backend: str) -> SegmentationModel:
    return load_model(path, backend=backend, device="cpu", precision="fp32")


def test_uploaded_maps_are_copies(cpu_model: SegmentationModel) -> None:
    embedding = cpu_model.encode(noise(50, 70))
    maps = list(embedding.numpy().values())
    views = [maps[0].astype(np.float64), np.asfortranarray(maps[1]), maps[2]]
    features = cpu_model.backend.upload(views)
    assert features.nbytes == embedding.nbytes
    for array in views:
        array[...] = 0
    del views
    for array, expected in zip(features.numpy(), embedding.numpy().values(), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_features_of_another_backend_are_refused(cpu_model: SegmentationModel) -> None:
    class OtherFeatures(HostFeatures):
        pass

    embedding = cpu_model.encode(noise(9, 9))
    features = OtherFeatures(embedding.features.numpy())
    outputs = decoder_outputs(cpu_model.manifest, multimask_output=True)
    prompts = PackedPrompts(np.zeros((1, 1, 2), np.float32), np.ones((1, 1), np.int64), None)
    with pytest.raises(EmbeddingError, match=r"OtherFeatures.*save the embedding"):
        cpu_model.backend.decode(features, prompts, outputs)


def test_results_are_the_callers_own(cpu_model: SegmentationModel) -> None:
    """What was returned earlier must not change when a request's memory is used again."""
    embedding = cpu_model.encode(noise(50, 70))
    first = cpu_model.decode(embedding, Prompts([[30, 25]], [1]))
    kept = first.low_res_masks.copy()
    features = [array.copy() for array in embedding.numpy().values()]
    cpu_model.decode(embedding, Prompts(box=[[1, 2, 20, 18], [3, 4, 25, 15]]))
    cpu_model.encode(noise(9, 9, seed=5))
    np.testing.assert_array_equal(first.low_res_masks, kept)
    for array, expected in zip(embedding.numpy().values(), features, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_threads_share_one_model(cpu_model: SegmentationModel) -> None:
    embedding = cpu_model.encode(noise(50, 70))
    prompts = [
        Prompts([[30, 25]], [1]),
        Prompts(box=[[1, 2, 20, 18], [3, 4, 25, 15], [30, 20, 60, 45]]),
        Prompts(),
        Prompts([[30, 25]], [1], mask_input=np.linspace(-9, 9, 256).reshape(1, 16, 16)),
    ] * 2
    barrier = threading.Barrier(8)

    def work(prompt: Prompts) -> np.ndarray:
        barrier.wait()
        return cpu_model.decode(embedding, prompt).low_res_masks

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, prompts))
    for prompt, result in zip(prompts, results, strict=True):
        np.testing.assert_array_equal(result, cpu_model.decode(embedding, prompt).low_res_masks)


def test_failure_inside_a_library_is_a_backend_error(cpu_model: SegmentationModel) -> None:
    embedding = cpu_model.encode(noise(9, 9))
    with pytest.raises(BackendError, match="encoder"):
        cpu_model.backend.encode(np.zeros((1, 3, 10, 10), np.float32))
    wrong = PackedPrompts(np.zeros((1, 1, 3), np.float32), np.zeros((1, 1), np.int64), None)
    with pytest.raises(BackendError, match="decoder"):
        cpu_model.backend.decode(embedding.features, wrong, ["pred_masks"])
    cpu_model.decode(embedding, Prompts([[4, 4]], [1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("damage", ["cut", "other graph", "missing"])
def test_graph_exchanged_after_opening_is_refused(
    tiny_copy: Path, name: str, damage: str, backend: str
) -> None:
    model = load(tiny_copy, backend)
    content = (tiny_copy / name).read_bytes()
    other = "decoder.onnx" if name == "encoder.onnx" else "encoder.onnx"
    if damage == "missing":
        (tiny_copy / name).unlink()
    elif damage == "cut":
        (tiny_copy / name).write_bytes(content[:-1])
    else:
        shutil.copy(tiny_copy / other, tiny_copy / name)
    with pytest.raises(BundleError) as caught:
        model.backend.prepare()
    assert caught.value.file == name
    # It may come back: the failure is not remembered.
    (tiny_copy / name).write_bytes(content)
    model.backend.prepare()


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_of_another_export_or_swapped_are_refused(tiny_copy: Path, backend: str) -> None:
    # Both carry the right export id.
    (tiny_copy / "encoder.onnx").rename(tiny_copy / "other")
    (tiny_copy / "decoder.onnx").rename(tiny_copy / "encoder.onnx")
    (tiny_copy / "other").rename(tiny_copy / "decoder.onnx")
    relist(tiny_copy)
    with pytest.raises(BundleError, match="the manifest says"):
        load(tiny_copy, backend).backend.prepare()
    edit_manifest(tiny_copy, lambda d: d.update(export_id="0" * 64))
    with pytest.raises(BundleError, match="mixed"):
        load(tiny_copy, backend).backend.prepare()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [b"", b"not ONNX", b"\0" * 1000])
def test_file_that_is_no_graph_is_refused(tiny_copy: Path, content: bytes, backend: str) -> None:
    (tiny_copy / "decoder.onnx").write_bytes(content)
    relist(tiny_copy)
    with pytest.raises((BackendError, BundleError), match=r"decoder\.onnx"):
        load(tiny_copy, backend).backend.prepare()


# --- weights beside a graph -----------------------------------------------------------------------


def load_external(bundle: Bundle, backend: str, *, map_weights: bool = False) -> SegmentationModel:
    return load_model(
        bundle.path, backend=backend, device="cpu", precision="fp32", map_weights=map_weights
    )


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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
