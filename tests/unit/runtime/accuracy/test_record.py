"""Tests of `sam3rt.accuracy.record`: right models pass, wrong outputs are caught."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.helpers import WrappedBackend, examples, flip, noise, relist, wrapped

from sam3rt import BundleError, SegmentationModel, load_model, open_bundle
from sam3rt.accuracy import run
from sam3rt.accuracy.gate import GATE_LIMITS
from sam3rt.accuracy.metrics import Measurement, relative_error
from sam3rt.accuracy.record import (
    ExpectedCase,
    ParityCase,
    ParityRecord,
    load_record,
    subsample_features,
)
from sam3rt.bundle import ParityLimits
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts

Arrays = dict[str, NDArray[np.float32]]
Maps = list[NDArray[np.float32]]
Wrong = set[tuple[str, str]]

LIMITS = ParityLimits(5e-4, 0.999999, 1e-3, 1e-3, 0.998)


class Remembering(WrappedBackend):
    """Runs everything only once, so that many verifications cost little."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._encoded: dict[bytes, Features] = {}
        # With the feature maps, so that no others come to have their id.
        self._decoded: dict[Any, tuple[Features, Maps]] = {}

    def encode(self, pixels: NDArray[np.float32]) -> Features:
        key = pixels.tobytes()
        if key not in self._encoded:
            self._encoded[key] = super().encode(pixels)
        return self._encoded[key]

    def decode(self, features: Any, prompts: PackedPrompts, outputs: Sequence[str]) -> Maps:
        arrays = (prompts.points, prompts.labels, prompts.masks)
        content = [None if array is None else (array.shape, array.tobytes()) for array in arrays]
        key = (id(features), *content, *outputs)
        if key not in self._decoded:
            self._decoded[key] = (features, super().decode(features, prompts, outputs))
        return [array.copy() for array in self._decoded[key][1]]


@pytest.fixture(scope="module", params=["tiny_model", "default_model"])
def model(request: pytest.FixtureRequest) -> SegmentationModel:
    """SAM 3 and MobileSAM in turn."""
    chosen: SegmentationModel = request.getfixturevalue(request.param)
    return SegmentationModel(chosen.bundle, Remembering(chosen.backend))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def record(model: SegmentationModel) -> ParityRecord:
    """The model's own record."""
    return load_record(model.bundle)


def verify(model: SegmentationModel, record: ParityRecord) -> list[Measurement]:
    limits = model.manifest.parity.limits
    return list(run.verify(model.backend, model.manifest, record, limits))


def answer(model: SegmentationModel, record: ParityRecord, case: ParityCase) -> ExpectedCase:
    features = run.encode(model.backend, model.manifest, record.images()[case.image])
    return run.run_case(model.backend, model.manifest, features, case)


def shorter(record: ParityRecord, *names: str) -> ParityRecord:
    """The record with these cases alone, which is much faster to verify."""
    kept = [case for case in record._description["cases"] if case["name"] in names]
    assert len(kept) == len(names)
    return ParityRecord(record._arrays, {**record._description, "cases": kept})


def wrong(measurements: Iterable[Measurement]) -> Wrong:
    """(subject, metric) of everything that did not pass; mean and least IoU are one here."""
    return {
        (m.subject, "IoU" if m.metric.endswith(" IoU") else m.metric)
        for m in measurements
        if not m.passed
    }


# --- right models ---------------------------------------------------------------------------------


def test_models_pass_their_own_records(model: SegmentationModel, record: ParityRecord) -> None:
    measurements = verify(model, record)
    assert wrong(measurements) == set()
    assert all(math.isfinite(m.value) for m in measurements)
    levels = len(model.manifest.encoder.outputs)
    per_case = 5 if model.manifest.model_type == "sam3" else 4
    expected = 2 * levels * len(record.images()) + per_case * len(record.cases())
    assert len(measurements) == len({(m.subject, m.metric) for m in measurements}) == expected
    names = {case.name for case in record.cases()}
    assert {"click_0", "box_0", "objects_0", "refine_0", "nothing_0", "click_1"} <= names


def test_another_models_record_does_not_pass(tiny_model: SegmentationModel) -> None:
    """Other weights would give other features; here the record's channels are in another order."""
    record = load_record(tiny_model.bundle)
    arrays = {name: array.copy() for name, array in record._arrays.items()}
    arrays["features_0_2"] = arrays["features_0_2"][::-1].copy()
    other = ParityRecord(arrays, record._description)
    model = SegmentationModel(tiny_model.bundle, Remembering(tiny_model.backend))  # type: ignore[arg-type]
    assert wrong(verify(model, shorter(other, "click_0"))) == {
        ("image 0 features 2", "cosine"),
        ("image 0 features 2", "relative error"),
    }


# --- wrong features -------------------------------------------------------------------------------


def replaced(change: Callable[[NDArray[np.float32]], NDArray[np.float32]], level: int) -> Any:
    """A change of one feature map."""

    def on_encode(maps: Maps) -> Maps:
        maps[level] = change(maps[level])
        return maps

    return on_encode


def with_noise(array: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    scale = share * float(np.abs(array).max())
    return (array + np.random.default_rng(0).normal(0, scale, array.shape)).astype(np.float32)


def with_nan(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array = array.copy()
    array.reshape(-1)[0] = np.nan
    return array


# What fails the gate's wider limits, too, stands in test_select.py.
FEATURES: dict[str, tuple[Callable[[NDArray[np.float32]], NDArray[np.float32]], set[str]]] = {
    "noise": (lambda a: with_noise(a, 0.02), {"cosine", "relative error"}),
    "scaled": (lambda a: a * np.float32(1.05), {"relative error"}),
    "negated": (lambda a: -a, {"cosine", "relative error"}),
    "one NaN": (with_nan, {"cosine", "relative error"}),
    "infinite": (lambda a: np.full_like(a, np.inf), {"cosine", "relative error"}),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", FEATURES)
def test_wrong_features_are_caught(
    model: SegmentationModel, record: ParityRecord, name: str
) -> None:
    change, metrics = FEATURES[name]
    limits = model.manifest.parity.limits
    for index, image in enumerate(record.images()):
        maps = list(model.encode(image).features.numpy())
        assert wrong(record.compare_features(index, tuple(maps), limits)) == set()
        for level in range(len(maps)):
            changed = (*maps[:level], change(maps[level]), *maps[level + 1 :])
            subject = f"image {index} features {level}"
            found = wrong(record.compare_features(index, changed, limits))
            assert found == {(subject, metric) for metric in metrics}


def test_features_of_another_shape_are_caught(
    model: SegmentationModel, record: ParityRecord
) -> None:
    maps = model.encode(record.images()[0]).features.numpy()
    smaller = tuple(array[:, :-4] for array in maps)
    found = wrong(record.compare_features(0, smaller, model.manifest.parity.limits))
    assert len(found) == 2 * len(maps)


def test_features_that_did_not_come_are_caught(
    model: SegmentationModel, record: ParityRecord
) -> None:
    """A map that is missing must not pass for one that was compared."""
    maps = model.encode(record.images()[0]).features.numpy()
    limits = model.manifest.parity.limits
    try:
        found = wrong(record.compare_features(0, maps[:-1], limits))
    except BundleError:
        return
    assert found


def test_wrong_features_reach_the_verification(
    model: SegmentationModel, record: ParityRecord
) -> None:
    scaled = wrapped(model, on_encode=replaced(lambda a: a * np.float32(1.2), -1))
    found = wrong(verify(scaled, shorter(record, "click_0", "click_1")))
    last = len(model.manifest.encoder.outputs) - 1
    assert {(f"image {i} features {last}", "relative error") for i in (0, 1)} <= found
    assert any("logits" in subject for subject, _ in found)


# --- wrong outputs --------------------------------------------------------------------------------


def change_output(name: str, change: Callable[[NDArray[np.float32]], object]) -> Any:
    """A change in place of one decoder output."""

    def on_decode(outputs: Arrays) -> None:
        if name in outputs:
            change(outputs[name])

    return on_decode


def add_noise(array: NDArray[np.float32]) -> None:
    array[...] = with_noise(array, 0.05)


def negate(array: NDArray[np.float32]) -> None:
    array *= -1


def shift(array: NDArray[np.float32]) -> None:
    array[...] = np.roll(array, array.shape[-1] // 16 + 4, axis=-1)


def one_nan(array: NDArray[np.float32]) -> None:
    array.reshape(-1)[-1] = np.nan  # a place that the subsampled logits do not hold


def infinite(array: NDArray[np.float32]) -> None:
    array[...] = np.inf


def off(array: NDArray[np.float32]) -> None:
    array += np.float32(0.01)


LOGITS, MASKS = ("logits", "relative error"), ("masks", "IoU")
IOU, SCORE = ("predicted IoU", "error"), ("object score", "relative error")

# For each change, what must be wrong in every case that has several masks or one.
OUTPUTS: dict[str, tuple[Any, set[tuple[str, str]]]] = {
    "noise on the masks": (change_output("pred_masks", add_noise), {LOGITS, MASKS}),
    "negated masks": (change_output("pred_masks", negate), {LOGITS, MASKS}),
    "NaN in one pixel": (change_output("pred_masks", one_nan), {LOGITS, MASKS}),
    "infinite masks": (change_output("pred_masks", infinite), {LOGITS, MASKS}),
    "shifted single mask": (change_output("single_pred_masks", shift), {LOGITS, MASKS}),
    "NaN in the single mask": (change_output("single_pred_masks", one_nan), {LOGITS, MASKS}),
    "predicted IoU off": (change_output("iou_scores", off), {IOU}),
    "NaN in the predicted IoU": (change_output("iou_scores", one_nan), {IOU}),
    "infinite predicted IoU": (change_output("iou_scores", infinite), {IOU}),
    "single predicted IoU off": (change_output("single_iou_scores", off), {IOU}),
    "NaN in the single predicted IoU": (change_output("single_iou_scores", one_nan), {IOU}),
    "negated object score": (change_output("object_score_logits", negate), {SCORE}),
    "NaN in the object score": (change_output("object_score_logits", one_nan), {SCORE}),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_outputs_are_caught(
    model: SegmentationModel, record: ParityRecord, name: str
) -> None:
    on_decode, expected = OUTPUTS[name]
    if SCORE in expected and model.manifest.model_type != "sam3":
        pytest.skip("this model has no object score")
    cases = ("click_0", "objects_masks_0", "box_1")
    found = wrong(verify(wrapped(model, on_decode=on_decode), shorter(record, *cases)))
    wanted = {(f"{case} {subject}", metric) for case in cases for subject, metric in expected}
    assert found == wanted


def test_wrong_choice_of_the_single_mask_is_caught(
    model: SegmentationModel, record: ParityRecord
) -> None:
    """The mask of another token with its own score: a plausible single mask, but not this one."""
    by_case = {}
    for case in shorter(record, "click_0", "objects_masks_0", "box_1").cases():
        right = answer(model, record, case)
        logits, iou = right.logits.copy(), right.iou.copy()
        # The token whose mask differs most from the right one.
        errors = np.abs(logits[:, :3] - logits[:, 3:]).max(axis=(0, 2, 3))
        token = int(errors.argmax())
        logits[:, 3], iou[:, 3] = logits[:, token], iou[:, token]
        said = ExpectedCase(logits, iou, right.object_score)
        limits = model.manifest.parity.limits
        assert wrong(record.compare_case(case, right, limits)) == set()
        by_case[case.name] = wrong(record.compare_case(case, said, limits))
    for name, found in by_case.items():
        assert (f"{name} logits", "relative error") in found
        assert (f"{name} masks", "IoU") in found


class Ignoring(WrappedBackend):
    """Changes the prompts on their way to the decoder."""

    def __init__(self, inner: Any, change: Callable[[PackedPrompts], PackedPrompts]) -> None:
        super().__init__(inner)
        self._change = change

    def decode(self, features: Any, prompts: PackedPrompts, outputs: Any) -> Any:
        return super().decode(features, self._change(prompts), outputs)


Change = Callable[[PackedPrompts], PackedPrompts]
PROMPTS: dict[str, tuple[Change, Callable[[ParityCase], bool]]] = {
    "mask prompts are ignored": (
        lambda p: PackedPrompts(p.points, p.labels, None),
        lambda c: c.prompts.masks is not None,
    ),
    "all objects get the first mask prompt": (
        lambda p: PackedPrompts(p.points, p.labels, None if p.masks is None else p.masks[:1]),
        lambda c: c.prompts.masks is not None and len(c.prompts.masks) > 1,
    ),
    "objects are reversed": (
        lambda p: PackedPrompts(p.points[::-1], p.labels[::-1], p.masks),
        lambda c: len(c.prompts.points) > 1,
    ),
    "x and y are swapped": (
        lambda p: PackedPrompts(p.points[..., ::-1], p.labels, p.masks),
        lambda c: c.prompts.points.any(),  # type: ignore[arg-type, return-value]
    ),
    "labels are ignored": (
        lambda p: PackedPrompts(p.points, np.where(p.labels == 0, 1, p.labels), p.masks),
        lambda c: bool((c.prompts.labels == 0).any()),
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_wrong_use_of_prompts_is_caught(
    model: SegmentationModel, record: ParityRecord, name: str
) -> None:
    change, affected = PROMPTS[name]
    other = SegmentationModel(model.bundle, Ignoring(model.backend, change))  # type: ignore[arg-type]
    short = shorter(record, "clicks_0", "objects_0", "refine_0", "objects_masks_0", "nothing_0")
    found = wrong(verify(other, short))
    cases = {case.name for case in short.cases() if affected(case)}
    assert cases
    assert {subject.split()[0] for subject, _ in found} == cases
    assert {(f"{case} logits", "relative error") for case in cases} <= found


@pytest.mark.parametrize("field", ["logits", "iou", "object_score"])
def test_outputs_of_another_shape_are_caught(tiny_model: SegmentationModel, field: str) -> None:
    """By a measurement that fails, not by an exception of NumPy's."""
    record = load_record(tiny_model.bundle)
    case = next(c for c in record.cases() if c.name == "objects_0")
    right = answer(tiny_model, record, case)
    assert right.object_score is not None
    shapes = {
        "logits": ExpectedCase(right.logits[:, :3], right.iou, right.object_score),
        "iou": ExpectedCase(right.logits, right.iou[:, :3], right.object_score),
        "object_score": ExpectedCase(right.logits, right.iou, right.object_score[:1]),
    }
    limits = tiny_model.manifest.parity.limits
    assert wrong(record.compare_case(case, right, limits)) == set()
    assert wrong(record.compare_case(case, shapes[field], limits))


def test_object_score_that_did_not_come_is_caught(tiny_model: SegmentationModel) -> None:
    """The record has it, so a model without it is not the one recorded."""
    record = load_record(tiny_model.bundle)
    case = record.cases()[0]
    right = answer(tiny_model, record, case)
    without = ExpectedCase(right.logits, right.iou, None)
    assert wrong(record.compare_case(case, without, tiny_model.manifest.parity.limits))


def test_log_odds_are_compared_as_the_ious_they_mean(tiny_model: SegmentationModel) -> None:
    """At 6, an IoU of 0.9975, log-odds may be off by far more than IoUs may."""
    record = load_record(tiny_model.bundle)
    case = record.cases()[0]
    right = answer(tiny_model, record, case)

    def log_odds(iou: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.log(iou / (1 - iou))

    maps = [
        run.encode(tiny_model.backend, tiny_model.manifest, image).numpy()
        for image in record.images()
    ]
    sure = dataclasses.replace(right, iou=np.full_like(right.iou, 6.0))
    other = ParityRecord.build(record.images(), maps, [(case, sure)], log_odds=True)
    assert other.log_odds
    limits = tiny_model.manifest.parity.limits
    near = dataclasses.replace(right, iou=sure.iou + np.float32(0.2))
    assert wrong(other.compare_case(case, near, limits)) == set()
    off = dataclasses.replace(right, iou=log_odds(np.full_like(right.iou, 0.99)))
    assert wrong(other.compare_case(case, off, limits)) == {(f"{case.name} predicted IoU", "error")}
    for value in (np.nan, np.inf):  # the IoU that an infinity means is a number
        broken = dataclasses.replace(right, iou=np.full_like(right.iou, value))
        assert wrong(other.compare_case(case, broken, GATE_LIMITS))


# --- measurements ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passed"),
    [
        (0.1, 0.2, False, True),
        (0.2, 0.2, False, True),
        (0.3, 0.2, False, False),
        (0.3, 0.2, True, True),
        (0.2, 0.2, True, True),
        (0.1, 0.2, True, False),
        (float("nan"), 0.2, False, False),
        (float("nan"), 0.2, True, False),
        (float("nan"), float("inf"), False, False),
        (float("nan"), float("-inf"), True, False),
        (float("inf"), 0.2, False, False),
        (float("-inf"), 0.2, True, False),
    ],
)
def test_passing(value: float, limit: float, at_least: bool, passed: bool) -> None:
    assert Measurement("x", "y", "z", value, limit, at_least).passed is passed


def test_relative_error() -> None:
    expected = np.array([0, -4, 2], np.float32)
    assert relative_error(expected, expected) == 0
    assert relative_error(expected + np.float32(1), expected) == 0.25
    assert relative_error(expected[:2], expected) == math.inf
    assert math.isnan(relative_error(np.array([0, np.nan, 2], np.float32), expected))
    assert math.isnan(relative_error(expected, np.array([0, np.nan, 2], np.float32)))
    assert relative_error(np.array([0, np.inf, 2], np.float32), expected) == math.inf
    assert relative_error(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0
    assert relative_error(np.ones(3, np.float32), np.zeros(3, np.float32)) > 1e5


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (1, 32, 288, 288), (1, 256, 72, 72), (1, 4, 1, 1)])
def test_subsampling_is_a_strided_view(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stride = max(1, shape[-1] // 24)
    result = subsample_features(array)
    np.testing.assert_array_equal(result, array[0, ::4, ::stride, ::stride])
    assert result.size <= 64 * 30 * 30


# --- a small record for the rest ------------------------------------------------------------------

LEVELS = ((1, 4, 8, 8), (1, 8, 4, 4))


def small_features(seed: int) -> tuple[NDArray[np.float32], ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in LEVELS)


def small_case(name: str, image: int, masks: bool) -> tuple[ParityCase, ExpectedCase]:
    rng = np.random.default_rng(image)
    prompts = PackedPrompts(
        rng.normal(size=(2, 3, 2)).astype(np.float32),
        rng.integers(-1, 4, (2, 3)),
        rng.normal(size=(2, 16, 16)).astype(np.float32) if masks else None,
    )
    return ParityCase(name, image, prompts), ExpectedCase(
        rng.normal(size=(2, 4, 16, 16)).astype(np.float32),
        rng.random((2, 4)).astype(np.float32),
        rng.normal(size=2).astype(np.float32) if masks else None,
    )


CASES = [small_case("click", 0, False), small_case("refine", 1, True)]
IMAGES = [noise(6, 9), noise(9, 6, 1)]
FEATURE_MAPS = [small_features(0), small_features(1)]


@pytest.fixture
def small() -> ParityRecord:
    """Two images, two cases, a few kilobytes."""
    return ParityRecord.build(IMAGES, FEATURE_MAPS, CASES)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The small record's file."""
    path = tmp_path_factory.mktemp("records") / "parity.npz"
    ParityRecord.build(IMAGES, FEATURE_MAPS, CASES).save(path)
    return path.read_bytes()


def consume(record: ParityRecord) -> list[Measurement]:
    """Read everything that a record holds, as a verification does."""
    measurements: list[Measurement] = []
    for index, _ in enumerate(record.images()):
        measurements += record.compare_features(index, FEATURE_MAPS[index % 2], LIMITS)
    for index, case in enumerate(record.cases()):
        assert record.images()[case.image] is not None
        measurements += record.compare_case(case, CASES[index % 2][1], LIMITS)
    return measurements


def test_record_survives_its_file(small: ParityRecord, tmp_path: Path) -> None:
    path = tmp_path / "parity.npz"
    small.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["parity.npz"]
    loaded = ParityRecord.load(path)
    for record in (small, loaded):
        for actual, expected in zip(record.images(), IMAGES, strict=True):
            assert actual.dtype == np.uint8
            np.testing.assert_array_equal(actual, expected)
        for case, (expected_case, _) in zip(record.cases(), CASES, strict=True):
            assert (case.name, case.image) == (expected_case.name, expected_case.image)
            for field in ("points", "labels", "masks"):
                actual, wanted = (getattr(c.prompts, field) for c in (case, expected_case))
                assert (actual is None) == (wanted is None)
                if actual is not None:
                    assert actual.dtype == wanted.dtype
                    np.testing.assert_array_equal(actual, wanted)
    assert consume(loaded) == consume(small)
    assert wrong(consume(loaded)) == set()
    assert len(consume(loaded)) == 2 * 2 * 2 + 4 + 5


def test_record_file_holds_no_pickles(small: ParityRecord, tmp_path: Path) -> None:
    small.save(tmp_path / "parity.npz")
    with np.load(tmp_path / "parity.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
        description = json.loads(str(archive["description"]))
    assert description["version"] == 1


def test_record_written_again_is_the_same(model: SegmentationModel, tmp_path: Path) -> None:
    record = load_record(model.bundle)
    record.save(tmp_path / "parity.npz")
    again = ParityRecord.load(tmp_path / "parity.npz")
    measurements = verify(model, shorter(again, "click_0", "refine_0"))
    assert wrong(measurements) == set()
    assert measurements == verify(model, shorter(record, "click_0", "refine_0"))


# --- damaged records ------------------------------------------------------------------------------


def read_damaged(path: Path) -> str | None:
    """Load and read a record: the file named by the error, or nothing if it can be read."""
    try:
        consume(ParityRecord.load(path))
    except BundleError as error:
        return error.file
    return None


def test_record_cut_anywhere_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "parity.npz"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(BundleError) as caught:
            ParityRecord.load(path)
        assert caught.value.file == "parity.npz"


def test_flipped_bit_raises_only_bundle_errors(content: bytes, tmp_path: Path) -> None:
    """Some bits of a zip file, such as dates, matter to nobody; the others must be refused."""
    path = tmp_path / "parity.npz"
    refused = 0
    for index in range(0, len(content), 3):
        path.write_bytes(flip(content, index * 8 + index % 8))
        refused += read_damaged(path) == "parity.npz"
    assert refused > len(content) // 6


@given(data=st.data())
@examples(150)
def test_any_damage_raises_only_bundle_errors(
    content: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 100)))
    path = tmp_path_factory.mktemp("damage") / "parity.npz"
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=100)) + content[end:])
    assert read_damaged(path) in (None, "parity.npz")


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "npy": lambda path: path.write_bytes(npy(np.zeros(3))),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"description": "{}"})),
    "no description": lambda path: path.write_bytes(npz(image_0=np.zeros(3))),
    "no arrays": lambda path: path.write_bytes(npz()),
    "objects": lambda path: path.write_bytes(npz(description=np.array({}, object))),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_record_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "parity.npz"
    FILES[kind](path)
    with pytest.raises(BundleError, match=r"parity\.npz"):
        ParityRecord.load(path)


GOOD = {
    "version": 1,
    "images": 2,
    "levels": 2,
    "cases": [{"name": "click", "image": 0}, {"name": "refine", "image": 1}],
}
DESCRIPTIONS: dict[str, Any] = {
    "not JSON": "{",
    "number": "1",
    "null": "null",
    "list": "[1]",
    "text": '"version"',
    "no version": {"images": 2, "cases": []},
    "version 2": {**GOOD, "version": 2},
    "version text": {**GOOD, "version": "1"},
    "version null": {**GOOD, "version": None},
    "no images": {"version": 1, "cases": []},
    "too many images": {**GOOD, "images": 3},
    "images text": {**GOOD, "images": "2"},
    "no cases": {"version": 1, "images": 2},
    "cases number": {**GOOD, "cases": 5},
    "case text": {**GOOD, "cases": ["click"]},
    "case without a name": {**GOOD, "cases": [{"image": 0}]},
    "case without an image": {**GOOD, "cases": [{"name": "click"}]},
    "unknown case": {**GOOD, "cases": [{"name": "other", "image": 0}]},
    "image out of range": {**GOOD, "cases": [{"name": "click", "image": 2}]},
    "negative image": {**GOOD, "cases": [{"name": "click", "image": -1}]},
    "image text": {**GOOD, "cases": [{"name": "click", "image": "0"}]},
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_wrong_description_is_refused(small: ParityRecord, tmp_path: Path, name: str) -> None:
    value = DESCRIPTIONS[name]
    text = value if isinstance(value, str) else json.dumps(value)
    path = tmp_path / "parity.npz"
    path.write_bytes(npz(**{**small._arrays, "description": np.array(text)}))
    with pytest.raises(BundleError, match=r"parity\.npz"):
        consume(ParityRecord.load(path))


def test_description_helper_is_right(small: ParityRecord, tmp_path: Path) -> None:
    """Otherwise every refusal above would be one of the helper's own making."""
    path = tmp_path / "parity.npz"
    path.write_bytes(npz(**{**small._arrays, "description": np.array(json.dumps(GOOD))}))
    assert wrong(consume(ParityRecord.load(path))) == set()


OPTIONAL = ("refine/mask_prompt", "refine/object_score")


@pytest.mark.parametrize(
    "name", sorted(set(ParityRecord.build(IMAGES, FEATURE_MAPS, CASES)._arrays) - set(OPTIONAL))
)
def test_missing_array_is_refused(small: ParityRecord, tmp_path: Path, name: str) -> None:
    del small._arrays[name]
    path = tmp_path / "parity.npz"
    small.save(path)
    with pytest.raises(BundleError, match=r"parity\.npz"):
        consume(ParityRecord.load(path))


def test_damaged_record_of_a_bundle_is_refused(tiny_copy: Path) -> None:
    content = (tiny_copy / "parity.npz").read_bytes()
    (tiny_copy / "parity.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"parity\.npz"):
        open_bundle(tiny_copy)
    relist(tiny_copy)
    model = load_model(tiny_copy, device="cpu")
    with pytest.raises(BundleError, match=r"parity\.npz"):
        load_record(model.bundle)


def test_nan_in_the_record_never_passes(small: ParityRecord) -> None:
    """A record that was made by a broken model refuses everything."""
    for name, array in list(small._arrays.items()):
        if array.dtype == np.float32 and not name.endswith(("points", "mask_prompt")):
            small._arrays[name] = np.full_like(array, np.nan)
    failed = wrong(consume(small))
    assert {metric for _, metric in failed} == {"cosine", "relative error", "error"}
    assert len(failed) == 2 * 2 * 2 + 2 * 2 + 1
