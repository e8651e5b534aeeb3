"""What services ask of the C++ runtime and its C interface, beyond masks of an image."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterator
from ctypes import byref, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.c_library import (
    Library,
    LogCallback,
    PredictOptions,
    Sam3rtError,
    copied,
    image,
    prompts,
)
from tests.support.cpp_driver import ROOT, Build, Step, as_prompts
from tests.support.helpers import noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt.masks.rle import compress, decompress, mask_of, runs_of

CLICK: dict[str, Any] = {"point_coords": [[30, 25]], "point_labels": [1]}
MOBILE_SAM = ROOT / "engines" / "mobile_sam"
PICTURE = noise(50, 70)


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few nodes, with object scores."""
    return runnable_bundle(tmp_path_factory.mktemp("toy") / "bundle").path


@pytest.fixture(scope="module")
def toy(library: Library, toy_bundle: Path) -> Iterator[c_void_p]:
    loaded = library.load(toy_bundle)
    yield loaded
    library.c.sam3rt_model_free(loaded)


@pytest.fixture(scope="module")
def mobile_sam(library: Library) -> Iterator[c_void_p]:
    """A model whose encoder runs for some tenths of a second on any machine, loaded."""
    loaded = library.load(MOBILE_SAM, skip_file_checks=1, threads=1)
    library.call("model_prepare", loaded)
    yield loaded
    library.c.sam3rt_model_free(loaded)


def toy_steps(bundle: Path, *steps: Step) -> list[Step]:
    return [
        {"op": "load_model", "model": "m", "path": bundle},
        {"op": "encode", "model": "m", "embedding": "e", "image": PICTURE},
        {"op": "predictor", "model": "m", "predictor": "p"},
        {"op": "set_embedding", "predictor": "p", "embedding": "e"},
        *steps,
    ]


# --- cancellation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_an_encode_ends_while_it_runs(library: Library, mobile_sam: c_void_p, how: str) -> None:
    cancellation = library.cancellation(0.05 if how == "deadline" else 0)
    timer = threading.Timer(0.05, library.c.sam3rt_cancellation_cancel, [cancellation])
    if how == "cancel":
        timer.start()
    picture = image(PICTURE)
    encode = ("model_encode_cancellable", mobile_sam, byref(picture))
    assert not library.c.sam3rt_cancellation_cancelled(cancellation)
    for _ in range(2):  # also the next call, at once
        with pytest.raises(Sam3rtError, match="deadline" if how == "deadline" else "cancel") as e:
            library.make(*encode, cancellation)
        assert e.value.status == "CANCELLED"
    assert library.c.sam3rt_cancellation_cancelled(cancellation)
    library.c.sam3rt_cancellation_free(cancellation)
    if how == "cancel":
        timer.join()


def test_a_call_does_not_wait_for_its_turn_any_longer(
    library: Library, mobile_sam: c_void_p
) -> None:
    """One thread encodes at a time; the other's deadline passes before its turn comes, and what
    ends it touches nobody else."""
    patient, hasty = library.cancellation(0), library.cancellation(0.05)
    said: dict[str, str] = {}

    def encode(name: str, cancellation: c_void_p) -> None:
        try:
            library.make(
                "model_encode_cancellable", mobile_sam, byref(image(PICTURE)), cancellation
            )
        except Sam3rtError as error:
            said[name] = error.message

    threads = [
        threading.Thread(target=encode, args=arguments)
        for arguments in (("patient", patient), ("hasty", hasty))
    ]
    for thread in threads:
        thread.start()
    threads[1].join()
    assert list(said) == ["hasty"]
    assert "deadline" in said["hasty"]
    library.c.sam3rt_cancellation_cancel(patient)
    threads[0].join()
    assert "cancelled" in said["patient"]
    for cancellation in (patient, hasty):
        library.c.sam3rt_cancellation_free(cancellation)


def test_cpp_calls_end_too(cpp_build: Build, toy_bundle: Path) -> None:
    # The last one is 292 years from now, where the clock ends.
    past, late, never = {"deadline": -1}, {"deadline": 60}, {"deadline": 9.2233720368e9}
    on_model: Step = {"model": "m", "embedding": "e", "prompts": as_prompts(CLICK)}
    on_predictor: Step = {"op": "predict", "predictor": "p", "prompts": as_prompts(CLICK)}
    results = cpp_build.run(
        toy_steps(
            toy_bundle,
            {"op": "encode", "model": "m", "embedding": "f", "image": PICTURE, **past},
            {"op": "decode", **on_model, **past},
            {**on_predictor, **past},
            {"op": "encode", "model": "m", "embedding": "f", "image": PICTURE, **late},
            {"op": "decode", **on_model, **late},
            {**on_predictor, **late},
            {**on_predictor, **never},
            {**on_predictor, "cancel_after": 0},
        )
    )[4:]
    for result in results[:3]:
        assert "deadline" in result.refusal("CancelledError")
    for result in results[3:7]:
        assert result.error is None
    # Whichever is first: nothing breaks.
    assert results[7].error is None or results[7].error["class"] == "CancelledError"


def test_deadlines_that_make_no_sense(library: Library) -> None:
    for seconds in (-1.0, float("nan"), float("inf"), 2e9):
        with pytest.raises(Sam3rtError) as caught:
            library.cancellation(seconds)
        assert (caught.value.status, caught.value.subject) == ("INVALID_INPUT", "seconds")
    library.c.sam3rt_cancellation_cancel(None)
    library.c.sam3rt_cancellation_free(None)
    assert library.c.sam3rt_cancellation_cancelled(None) == 0


def test_a_predict_option(library: Library, toy: c_void_p) -> None:
    predictor = library.predictor(toy)
    library.call("predictor_set_image", predictor, byref(image(PICTURE)))
    cancellation = library.cancellation(0)
    options = PredictOptions(ctypes.sizeof(PredictOptions), cancellation=cancellation)
    arguments = ("predictor_predict", predictor, byref(prompts(CLICK)), byref(options))
    library.c.sam3rt_prediction_free(library.make(*arguments))
    library.c.sam3rt_cancellation_cancel(cancellation)
    with pytest.raises(Sam3rtError) as caught:
        library.make(*arguments)
    assert caught.value.status == "CANCELLED"
    # An older caller's structure ends before that field.
    options.struct_size = PredictOptions.cancellation.offset
    library.c.sam3rt_prediction_free(library.make(*arguments))
    library.c.sam3rt_cancellation_free(cancellation)
    library.c.sam3rt_predictor_free(predictor)


# --- the log --------------------------------------------------------------------------------------


def test_the_log_goes_to_a_callback(cpp_build: Build, toy_bundle: Path, tmp_path: Path) -> None:
    broken = runnable_bundle(tmp_path / "broken").path
    load = {"op": "load_model", "path": toy_bundle}
    lines: Step = {"op": "log_lines"}
    prepare = {"op": "prepare"}
    results = cpp_build.run(
        [
            {"op": "log", "level": 1, "fails": True},
            {**load, "model": "a"},
            {**prepare, "model": "a"},
            lines,
            {"op": "log", "level": 3},
            {**load, "model": "b"},
            {**prepare, "model": "b"},
            lines,
            {**load, "model": "c", "path": broken},
            {"op": "copy_file", "from": toy_bundle / "bundle.json", "to": broken / "encoder.onnx"},
            {**prepare, "model": "c"},
            lines,
            {"op": "log", "level": None},
            {**prepare, "model": "c"},
            lines,
            {"op": "log", "level": 0},
            {**load, "model": "d", "device": "auto"},
            {**prepare, "model": "d"},
            lines,
        ]
    )
    told = [line for level, line in results[3].value if level == 1]
    for file in ("encoder.onnx", "decoder.onnx"):
        assert any(file in line and "loaded on cpu" in line for line in told), told
    assert results[7].value == []
    assert [level for level, _ in results[11].value] == [3]
    assert "encoder.onnx" in results[11].value[0][1]
    assert results[14].value == []
    everything = [line for _, line in results[18].value]
    assert any("device auto: c" in line for line in everything)
    assert any(line.startswith("onnxruntime: ") for line in everything)


def test_the_log_in_c(library: Library, toy_bundle: Path) -> None:
    found: list[tuple[int | None, int, str]] = []
    callback = LogCallback(lambda context, level, line: found.append((context, level, line)))
    library.call("set_log_callback", callback, c_void_p(77), 1)
    try:
        loaded = library.load(toy_bundle)
        library.call("model_prepare", loaded)
        library.c.sam3rt_model_free(loaded)
    finally:
        library.call("set_log_callback", None, None, 2)
    assert any(entry[:2] == (77, 1) and b"loaded on cpu" in entry[2] for entry in found)
    for level in (-1, 4):
        with pytest.raises(Sam3rtError) as caught:
            library.call("set_log_callback", callback, None, level)
        assert caught.value.subject == "level"


# --- embeddings in memory -------------------------------------------------------------------------


def test_embeddings_in_memory(cpp_build: Build, toy_bundle: Path, tmp_path: Path) -> None:
    """The bytes are those of the file, which Python gives too; changed ones are refused."""
    files = {name: tmp_path / name for name in ("saved", "bytes", "again", "cut", "changed")}
    model = sam3rt.load_model(toy_bundle, backend="onnxruntime", device="cpu")
    content = model.encode(PICTURE).to_bytes()
    files["cut"].write_bytes(content[:-1])
    files["changed"].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "python").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    take = {"op": "embedding_from_bytes", "model": "m", "embedding": "f"}
    steps = [
        {"op": "save_embedding", "embedding": "e", "path": files["saved"]},
        {"op": "embedding_to_bytes", "embedding": "e", "path": files["bytes"]},
        {**take, "path": files["bytes"]},
        {"op": "embedding_to_bytes", "embedding": "f", "path": files["again"]},
        {**take, "path": tmp_path / "python"},
        {**take, "path": files["cut"]},
        {**take, "path": files["changed"]},
        {**take, "path": tmp_path / "empty"},
    ]
    results = cpp_build.run(toy_steps(toy_bundle, *steps))[4:]
    saved = files["saved"].read_bytes()
    assert saved == files["bytes"].read_bytes() == files["again"].read_bytes()
    restored = sam3rt.ImageEmbedding.from_bytes(saved)
    assert restored.original_size == PICTURE.shape[:2]
    assert results[2].value["original_size"] == [50, 70]
    assert results[4].error is None
    assert "content: is damaged" in results[5].refusal("EmbeddingError")
    assert "content: is damaged" in results[6].refusal("EmbeddingError")
    assert "content: has 0 bytes" in results[7].refusal("EmbeddingError")


# --- the decoder alone, and what a model is -------------------------------------------------------


@pytest.mark.parametrize("model_type", ["sam3", "mobile_sam"])
def test_decode_alone(library: Library, tmp_path: Path, model_type: str) -> None:
    """Unclamped logits, IoUs and object scores, as Python's decode gives them."""
    bundle = runnable_bundle(tmp_path / "bundle", model_type).path
    python = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")
    loaded = library.load(bundle)
    embedding, expected_embedding = library.encode(loaded, PICTURE), python.encode(PICTURE)
    predictor = library.predictor(loaded)
    library.call("predictor_set_embedding", predictor, embedding)
    several = {"point_coords": [[[30, 25]], [[5, 8]]], "point_labels": [[1], [0]]}
    for arguments, single in ((CLICK, 0), (several, 0), (several, 1)):
        given = prompts(arguments)
        made = library.make("model_decode", loaded, embedding, byref(given), single, None)
        wanted = python.decode(expected_embedding, sam3rt.Prompts(**arguments), not single)
        for name, array in (
            ("low_res", wanted.low_res_masks),
            ("iou", wanted.iou_predictions),
            ("object_scores", wanted.object_score_logits),
        ):
            view = getattr(library.c, f"sam3rt_prediction_{name}")(made)
            if array is None:
                assert (name, view.axes) == ("object_scores", 0)
            else:
                np.testing.assert_allclose(copied(view, np.float32), array, atol=1e-4, rtol=1e-6)
        for name in ("masks", "logits"):
            assert getattr(library.c, f"sam3rt_prediction_{name}")(made).axes == 0
        library.c.sam3rt_prediction_free(made)
        # A prediction has the scores as well.
        made = library.make("predictor_predict", predictor, byref(given), None)
        view = library.c.sam3rt_prediction_object_scores(made)
        assert view.axes == (0 if model_type == "mobile_sam" else 1)
        if view.axes and not single:
            assert wanted.object_score_logits is not None
            scores = copied(view, np.float32)
            np.testing.assert_allclose(scores, wanted.object_score_logits, atol=1e-4, rtol=1e-6)
        library.c.sam3rt_prediction_free(made)
    library.c.sam3rt_predictor_free(predictor)
    library.c.sam3rt_embedding_free(embedding)
    library.c.sam3rt_model_free(loaded)


def test_a_model_says_what_it_is(library: Library, toy: c_void_p, toy_bundle: Path) -> None:
    c = library.c
    manifest = sam3rt.open_bundle(toy_bundle).manifest
    assert c.sam3rt_model_name(toy).decode() == manifest.name
    assert c.sam3rt_model_device(toy) == b"cpu"
    assert c.sam3rt_model_type(toy).decode() == manifest.model_type
    assert c.sam3rt_model_path(toy) == bytes(toy_bundle)
    text = c.sam3rt_model_manifest_json(toy).decode()
    assert text == (toy_bundle / "bundle.json").read_text()
    assert json.loads(text)["fingerprint"] == c.sam3rt_model_fingerprint(toy).decode()
    height, width = c_int64(), c_int64()
    c.sam3rt_model_image_size(toy, byref(height), byref(width))
    assert (height.value, width.value) == tuple(manifest.image.size)
    c.sam3rt_model_mask_size(toy, byref(height), byref(width))
    assert (height.value, width.value) == tuple(manifest.prompts.mask_size)
    c.sam3rt_model_mask_size(toy, None, None)
    for name in ("type", "path", "manifest_json"):
        assert getattr(c, f"sam3rt_model_{name}")(None) == b""


# --- images ---------------------------------------------------------------------------------------


def levels_of_nv12(
    luma: NDArray[np.uint8], chroma: NDArray[np.uint8], kr: float, kb: float
) -> NDArray[np.uint8]:
    """RGB of limited range in double precision, each pixel with its block's chroma."""
    y = (luma.astype(float).clip(16) - 16) * 255 / 219
    u, v = ((chroma[..., i].repeat(2, 0).repeat(2, 1) - 128.0) * 255 / 112 for i in (0, 1))
    red, blue = y + (1 - kr) * v, y + (1 - kb) * u
    green = y - (1 - kb) * kb / (1 - kr - kb) * u - (1 - kr) * kr / (1 - kr - kb) * v
    levels: NDArray[np.uint8] = np.stack([red, green, blue], -1).round().clip(0, 255).astype("u1")
    return levels


def test_bottom_up_and_planar_images(cpp_build: Build) -> None:
    """Every layout of the same pixels gives the same encoder input."""
    target = {"op": "resize", "target": [20, 30], "rounded": False}
    padded = np.zeros((50, 216), np.uint8)
    padded[:, :210] = PICTURE[::-1].reshape(50, 210)
    planes = np.ascontiguousarray(np.moveaxis(PICTURE, 2, 0))
    spaced = np.zeros((3, 52, 80), np.uint8)
    spaced[:, :50, :70] = planes
    plain, *others = cpp_build.run(
        [
            {**target, "image": PICTURE},
            {**target, "image": padded, "width": 70, "row_stride": -216, "first_row": 49},
            {
                **target,
                "image": padded[:, :210].reshape(50, 70, 3)[..., ::-1],
                "format": "bgr",
                "row_stride": -210,
                "first_row": 0,
                "height": 1,
            },
            {**target, "image": planes.reshape(150, 70), "format": "planar", "height": 50},
            {
                **target,
                "image": spaced.reshape(156, 80),
                "format": "planar",
                "height": 50,
                "width": 70,
                "row_stride": 80,
                "plane_stride": 52 * 80,
            },
        ]
    )
    for number, other in enumerate(others):
        if number != 1:  # a single row, which is the last one of the picture
            np.testing.assert_array_equal(other.arrays["pixels"], plain.arrays["pixels"])
    last_row = cpp_build.one(**target, image=np.ascontiguousarray(PICTURE[-1:]))
    np.testing.assert_array_equal(others[1].arrays["pixels"], last_row.arrays["pixels"])


@pytest.mark.parametrize(
    ("form", "kr", "kb"), [("nv12", 0.299, 0.114), ("nv12_bt709", 0.2126, 0.0722)]
)
def test_video_frames(cpp_build: Build, form: str, kr: float, kb: float) -> None:
    """Every level of luma, with chroma of all kinds, in both places where the planes may lie."""
    rng = np.random.default_rng(0)
    luma = rng.permutation(np.arange(1024) % 256).astype(np.uint8).reshape(32, 32)
    chroma = rng.integers(0, 256, (16, 16, 2), np.uint8)
    frame = np.concatenate([luma, chroma.reshape(16, 32)])
    spaced = np.zeros((50, 40), np.uint8)
    spaced[:32, :32], spaced[34:, :32] = luma, chroma.reshape(16, 32)
    step = {"op": "resize", "target": [32, 32], "rounded": True, "format": form, "height": 32}
    place = {"width": 32, "row_stride": 40, "plane_stride": 34 * 40}
    tight, wide = cpp_build.run([{**step, "image": frame}, {**step, "image": spaced, **place}])
    expected = levels_of_nv12(luma, chroma, kr, kb).astype(int)
    assert np.abs(tight.arrays["pixels"] - expected).max() <= 1
    # OpenCV's numbers for BT.601 have three decimals.
    assert (tight.arrays["pixels"] == expected).mean() > 0.95
    np.testing.assert_array_equal(tight.arrays["pixels"], wide.arrays["pixels"])


def test_layouts_that_are_refused(library: Library, toy: c_void_p) -> None:
    planar, nv12, bt709 = 5, 6, 7
    for changes, words in (
        ({"row_stride": -209}, "row_stride"),
        ({"plane_stride": 1}, "plane_stride"),
        ({"format": planar, "row_stride": -70}, "row_stride"),
        ({"format": planar, "plane_stride": 1 << 62}, "plane_stride"),
        ({"format": nv12, "row_stride": -70}, "row_stride"),
        ({"format": nv12, "row_stride": 69}, "row_stride"),
        ({"format": nv12, "width": 69}, "even"),
        ({"format": bt709, "height": 49}, "even"),
        ({"format": -1}, "format"),
        ({"format": 8}, "format"),
    ):
        given = image(PICTURE)
        for name, value in changes.items():
            setattr(given, name, value)
        with pytest.raises(Sam3rtError, match=words) as caught:
            library.make("model_encode", toy, byref(given))
        assert (caught.value.status, caught.value.subject) == ("IMAGE_ERROR", "image")


def test_images_in_c(library: Library, toy: c_void_p) -> None:
    """A bottom-up image and planes through the C structure; an older one ends before the planes."""
    expected = library.taken(library.make("embedding_to_bytes", library.encode(toy, PICTURE)))
    flipped = image(PICTURE[::-1])
    flipped.pixels += 49 * 210
    flipped.row_stride = -210
    planar = image(np.moveaxis(PICTURE, 2, 0))
    planar.height, planar.width, planar.format = 50, 70, 5
    older = image(PICTURE)
    older.plane_stride, older.struct_size = 99, type(older).plane_stride.offset
    for given in (flipped, planar, older):
        embedding = library.make("model_encode", toy, byref(given))
        assert library.taken(library.make("embedding_to_bytes", embedding)) == expected
        library.c.sam3rt_embedding_free(embedding)


# --- masks ----------------------------------------------------------------------------------------

SEVERAL: dict[str, Any] = {"point_coords": [[[30, 25]], [[5, 8]]], "point_labels": [[1], [0]]}


@pytest.mark.parametrize("arguments", [CLICK, SEVERAL, {"box": np.zeros((0, 4))}])
def test_forms_of_masks(cpp_build: Build, toy_bundle: Path, arguments: dict[str, Any]) -> None:
    """Bits as NumPy packs them and run lengths as Python writes them, in any memory."""
    predict: Step = {"op": "predict", "predictor": "p", "prompts": as_prompts(arguments)}
    room = 1 << 20
    found = cpp_build.run(
        toy_steps(
            toy_bundle,
            predict,
            {**predict, "form": "bits"},
            {**predict, "form": "rle"},
            {**predict, "output": room, "shift": 3, "foreground": 255},
            {**predict, "output": room, "form": "bits"},
            {**predict, "return_logits": True},
            {**predict, "return_logits": True, "output": room},
        )
    )[4:]
    masks = found[0].arrays["masks"]
    np.testing.assert_array_equal(found[1].arrays["masks"], np.packbits(masks, axis=-1))
    texts = [compress(runs_of(mask != 0)) for mask in masks.reshape(-1, *masks.shape[-2:])]
    assert found[2].value["rle"] == texts
    for text, mask in zip(texts, masks.reshape(-1, *masks.shape[-2:]), strict=True):
        np.testing.assert_array_equal(mask_of(decompress(text), mask.shape), mask != 0)
    assert found[2].arrays["masks"].size == 0
    np.testing.assert_array_equal(found[3].arrays["masks"], masks * np.uint8(255))
    np.testing.assert_array_equal(found[4].arrays["masks"], found[1].arrays["masks"])
    if masks.size:
        np.testing.assert_array_equal(found[6].arrays["masks"], found[5].arrays["masks"])
    for result, shape in zip(found, (masks.shape, found[1].arrays["masks"].shape), strict=False):
        assert result.value["shape"] == list(shape)
    assert found[2].value["shape"] == list(masks.shape)


def test_outputs_that_are_refused(cpp_build: Build, toy_bundle: Path) -> None:
    predict: Step = {"op": "predict", "predictor": "p", "prompts": as_prompts(CLICK)}
    size = 3 * 50 * 70
    results = cpp_build.run(
        toy_steps(
            toy_bundle,
            {**predict, "output": size},
            {**predict, "output": size - 1},
            {**predict, "output": size, "shift": 1},
            {**predict, "output": 3 * 50 * 9 - 1, "form": "bits"},
            {**predict, "output": 4 * size, "return_logits": True},
            {**predict, "output": 4 * size - 1, "return_logits": True},
            {**predict, "output": 5 * size, "return_logits": True, "shift": 1},
            {**predict, "output": size, "form": "rle"},
            {**predict, "form": "rle", "return_logits": True},
            {**predict, "form": "bits", "return_logits": True},
        )
    )[4:]
    for number, result in enumerate(results):
        if number in (0, 4):
            assert result.error is None
        else:
            result.refusal("InvalidInputError", "output" if number < 8 else "form")


def test_masks_in_c(library: Library, toy: c_void_p) -> None:
    predictor = library.predictor(toy)
    library.call("predictor_set_image", predictor, byref(image(PICTURE)))
    masks, _, _ = library.predict(predictor, SEVERAL)
    memory = np.zeros(masks.size, np.uint8)
    options = PredictOptions(
        ctypes.sizeof(PredictOptions), output=memory.ctypes.data, output_size=memory.size
    )
    arguments = ("predictor_predict", predictor, byref(prompts(SEVERAL)), byref(options))
    made = library.make(*arguments)
    view = library.c.sam3rt_prediction_masks(made)
    assert view.values == memory.ctypes.data
    np.testing.assert_array_equal(copied(view, np.uint8), masks)
    library.c.sam3rt_prediction_free(made)
    np.testing.assert_array_equal(memory.reshape(masks.shape), masks)
    options.output_size -= 1
    with pytest.raises(Sam3rtError) as caught:
        library.make(*arguments)
    assert (caught.value.status, caught.value.subject) == ("INVALID_INPUT", "output")

    options.output, options.mask_form = None, 2
    made = library.make(*arguments)
    count = library.c.sam3rt_prediction_rle_count(made)
    texts = [
        library.c.sam3rt_prediction_rle(made, ctypes.c_size_t(i)).decode() for i in range(count)
    ]
    assert texts == [compress(runs_of(mask != 0)) for mask in masks.reshape(-1, 50, 70)]
    assert library.c.sam3rt_prediction_rle(made, ctypes.c_size_t(count)) == b""
    assert library.c.sam3rt_prediction_masks(made).axes == 0
    library.c.sam3rt_prediction_free(made)
    options.mask_form = 3
    with pytest.raises(Sam3rtError) as caught:
        library.make(*arguments)
    assert caught.value.subject == "mask_form"
    library.c.sam3rt_predictor_free(predictor)
