"""Tests of `sam3rt.prompts`: packing against a plain re-implementation, and every bad input."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.helpers import (
    MOBILE_IMAGE,
    MOBILE_PROMPTS,
    SAM3_IMAGE,
    SAM3_PROMPTS,
    examples,
    noise,
)

from sam3rt import PromptError, Prompts, PromptWarning, SegmentationModel
from sam3rt.bundle import PromptSpec
from sam3rt.geometry import ImageGeometry, geometry
from sam3rt.prompts import (
    MAX_MASK_LOGIT,
    MAX_OBJECTS,
    MAX_POINTS,
    PADDING_LABEL,
    PackedPrompts,
    pack,
)

# Small masks keep the examples small; the real sizes are the specs' only difference.
SPECS = {
    "sam3": (SAM3_IMAGE, msgspec.structs.replace(SAM3_PROMPTS, mask_size=(6, 4))),
    "mobile_sam": (MOBILE_IMAGE, msgspec.structs.replace(MOBILE_PROMPTS, mask_size=(6, 4))),
}
SAM3, MOBILE = SPECS["sam3"][1], SPECS["mobile_sam"][1]
PLACE = ImageGeometry((480, 640), (1008, 1008))
MASK = np.arange(24, dtype=np.float32).reshape(1, 6, 4)

Spec = pytest.mark.parametrize("spec", [SAM3, MOBILE], ids=["sam3", "mobile_sam"])


def packed(spec: PromptSpec = SAM3, **prompts: Any) -> PackedPrompts:
    return pack(Prompts(**prompts), spec, PLACE)


def same(actual: PackedPrompts, expected: PackedPrompts) -> None:
    """Assert that two packings are equal in values, shapes and types."""
    assert actual.points.dtype == np.float32
    assert actual.labels.dtype == np.int64
    np.testing.assert_array_equal(actual.points, expected.points)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    assert (actual.masks is None) == (expected.masks is None)
    if actual.masks is not None:
        assert actual.masks.dtype == np.float32
        np.testing.assert_array_equal(actual.masks, expected.masks)


# --- packing rules --------------------------------------------------------------------------------


def slow_pack(
    family: str,
    points: list[list[list[float]]] | None,
    labels: list[list[int]] | None,
    boxes: list[list[float]] | None,
    masks: int,
    scale: tuple[float, float],
) -> tuple[list[list[tuple[float, float]]], list[list[int]]]:
    """The reference's rules in plain Python: one object, one token after the other."""
    objects = len(points or boxes or range(max(1, masks)))
    all_coords, all_labels = [], []
    for index in range(objects):
        tokens: list[tuple[float, float, int]] = []
        corners: list[tuple[float, float, int]] = []
        if points is not None and labels is not None:
            for (x, y), label in zip(points[index], labels[index], strict=True):
                tokens.append((x * scale[0], y * scale[1], label))
        if boxes is not None:
            x0, y0, x1, y1 = boxes[index]
            corners = [
                (x0 * scale[0], y0 * scale[1], 2),
                (x1 * scale[0], y1 * scale[1], 3),
            ]
        if points is None and boxes is None:
            sequence = []
        elif family == "sam3":
            sequence = [*corners, *tokens, (0.0, 0.0, -1)]
        elif boxes is None:
            sequence = [*tokens, (0.0, 0.0, -1)]
        else:
            sequence = [*tokens, *corners]
        all_coords.append([(x, y) for x, y, _ in sequence])
        all_labels.append([label for _, _, label in sequence])
    return all_coords, all_labels


coordinates = st.floats(-5000, 5000, width=32)


@st.composite
def prompt_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Valid prompts of any combination, with leading object axes always present."""
    objects = draw(st.integers(1, 4))
    result: dict[str, Any] = {}
    if draw(st.booleans()):
        count = draw(st.integers(0, 5))
        one = st.lists(
            st.lists(coordinates, min_size=2, max_size=2), min_size=count, max_size=count
        )
        result["points"] = draw(st.lists(one, min_size=objects, max_size=objects))
        some = st.lists(st.integers(-1, 3), min_size=count, max_size=count)
        result["labels"] = draw(st.lists(some, min_size=objects, max_size=objects))
    if draw(st.booleans()):
        corners = st.lists(coordinates, min_size=4, max_size=4).map(
            lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
        )
        result["boxes"] = draw(st.lists(corners, min_size=objects, max_size=objects))
    result["masks"] = draw(st.sampled_from([0, 1, objects]))
    result["objects"] = objects
    return result


@given(
    prompts=prompt_sets(),
    family=st.sampled_from(["sam3", "mobile_sam"]),
    normalize=st.booleans(),
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
@examples(300)
def test_packing_follows_the_rules(
    prompts: dict[str, Any], family: str, normalize: bool, size: tuple[int, int]
) -> None:
    image, spec = SPECS[family]
    place = geometry(image, size)
    points, labels, boxes = (prompts.get(key) for key in ("points", "labels", "boxes"))
    masks = np.random.default_rng(0).normal(size=(prompts["masks"], 1, 6, 4))
    result = pack(
        Prompts(
            None if points is None else np.reshape(points, (len(points), -1, 2)),
            None if labels is None else np.reshape(labels, (len(labels), -1)),
            boxes,
            masks if prompts["masks"] else None,
            normalize,
        ),
        spec,
        place,
    )
    input_height, input_width = place.input_size
    height, width = size if normalize else (1, 1)
    scale = (input_width / width, input_height / height)
    coords, codes = slow_pack(family, points, labels, boxes, prompts["masks"], scale)
    expected = np.array(coords, np.float64).reshape(len(coords), -1, 2)
    assert result.points.dtype == np.float32
    assert result.labels.dtype == np.int64
    assert result.points.shape == expected.shape
    assert result.labels.shape == expected.shape[:2]
    np.testing.assert_allclose(result.points, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(result.labels, np.reshape(codes, result.labels.shape))
    if prompts["masks"]:
        assert result.masks is not None
        assert result.masks.dtype == np.float32
        assert result.masks.flags.c_contiguous
        np.testing.assert_array_equal(result.masks, masks[:, 0].astype(np.float32))
    else:
        assert result.masks is None


@pytest.mark.parametrize(
    ("spec", "prompts", "labels"),
    [
        (SAM3, {}, []),
        (MOBILE, {}, []),
        (SAM3, {"mask_input": MASK}, []),
        (MOBILE, {"mask_input": MASK}, []),
        (SAM3, {"point_coords": [[1, 2]], "point_labels": [0]}, [0, -1]),
        (MOBILE, {"point_coords": [[1, 2]], "point_labels": [0]}, [0, -1]),
        (SAM3, {"box": [1, 2, 3, 4]}, [2, 3, -1]),
        (MOBILE, {"box": [1, 2, 3, 4]}, [2, 3]),
        (
            SAM3,
            {"box": [1, 2, 3, 4], "point_coords": [[1, 2], [3, 4]], "point_labels": [1, 0]},
            [2, 3, 1, 0, -1],
        ),
        (
            MOBILE,
            {"box": [1, 2, 3, 4], "point_coords": [[1, 2], [3, 4]], "point_labels": [1, 0]},
            [1, 0, 2, 3],
        ),
        (SAM3, {"point_coords": np.zeros((0, 2)), "point_labels": []}, [-1]),
        (SAM3, {"point_coords": [[1, 2]] * 4, "point_labels": [-1, 3, 2, 0]}, [-1, 3, 2, 0, -1]),
        (SAM3, {"box": [1, 2, 3, 4], "mask_input": MASK}, [2, 3, -1]),
    ],
)
def test_order_of_tokens(spec: PromptSpec, prompts: dict[str, Any], labels: list[int]) -> None:
    result = packed(spec, **prompts)
    assert result.labels.tolist() == [labels]
    assert result.points.shape == (1, len(labels), 2)
    if labels and labels[-1] == -1:
        assert result.points[0, -1].tolist() == [0, 0]


def test_coordinates_are_scaled_per_axis() -> None:
    result = packed(point_coords=[[320, 120]], point_labels=[1], box=[0, 0, 640, 480])
    np.testing.assert_allclose(result.points[0], [[0, 0], [1008, 1008], [504, 252], [0, 0]])


def test_normalized_coordinates_ignore_the_image_size() -> None:
    result = packed(
        point_coords=[[0.5, 0.25]], point_labels=[1], box=[0, 0, 1, 1], normalize_coords=False
    )
    np.testing.assert_allclose(result.points[0], [[0, 0], [1008, 1008], [504, 252], [0, 0]])


def test_coordinates_outside_the_image_are_kept() -> None:
    """The reference does not clip them either."""
    result = packed(point_coords=[[-64, 960]], point_labels=[1])
    np.testing.assert_allclose(result.points[0, 0], [-100.8, 2016], rtol=1e-6)


@Spec
def test_several_masks_alone_are_several_objects(spec: PromptSpec) -> None:
    result = packed(spec, mask_input=np.stack([MASK] * 3))
    assert result.points.shape == (3, 0, 2)
    assert result.labels.shape == (3, 0)
    assert result.masks is not None
    assert result.masks.shape == (3, 6, 4)


@Spec
def test_one_mask_serves_all_objects(spec: PromptSpec) -> None:
    result = packed(spec, box=np.tile([1, 2, 3, 4], (5, 1)), mask_input=MASK)
    assert len(result.points) == 5
    assert result.masks is not None
    assert result.masks.shape == (1, 6, 4)


def test_a_point_box_is_a_box() -> None:
    assert packed(box=[5, 5, 5, 5]).labels.tolist() == [[2, 3, -1]]


# --- objects with different numbers of points -----------------------------------------------------


@Spec
@pytest.mark.parametrize("with_boxes", [False, True])
def test_ragged_points_are_padded_behind_each_object_s_own(
    spec: PromptSpec, with_boxes: bool
) -> None:
    coords = [[[1, 2], [3, 4], [5, 6]], [[7, 8]], []]
    labels = [[1, 0, -1], [1], []]
    boxes = [[0, 0, 9, 9], [1, 1, 8, 8], [2, 2, 7, 7]]
    together = packed(
        spec, point_coords=coords, point_labels=labels, box=boxes if with_boxes else None
    )
    for index in range(3):
        alone = packed(
            spec,
            point_coords=np.reshape(coords[index], (-1, 2)),
            point_labels=labels[index],
            box=boxes[index] if with_boxes else None,
        )
        present = together.labels[index] >= -1
        np.testing.assert_array_equal(together.points[index][present], alone.points[0])
        np.testing.assert_array_equal(together.labels[index][present], alone.labels[0])
        assert (together.labels[index][~present] == PADDING_LABEL).all()


def test_ragged_points_may_be_arrays_or_tensors() -> None:
    expected = packed(point_coords=[[[1, 2], [3, 4]], [[5, 6]]], point_labels=[[1, 0], [1]])
    arrays = [np.array([[1, 2], [3, 4]]), np.array([[5, 6]], np.float32)]
    labels = [np.array([1, 0]), np.array([1])]
    same(packed(point_coords=arrays, point_labels=labels), expected)
    same(packed(point_coords=tuple(arrays), point_labels=tuple(labels)), expected)
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(array) for array in arrays]
    same(packed(point_coords=tensors, point_labels=labels), expected)


@pytest.mark.parametrize(
    ("coords", "labels", "argument"),
    [
        ([[[1, 2], [3, 4]], [[5, 6]]], [[1, 0], [1, 1]], "point_labels"),
        ([[[1, 2], [3, 4]], [[5, 6]]], [[1, 0]], "point_labels"),
        ([[[1, 2], [3, 4]], [[5, 6]]], np.ones((2, 2)), "point_labels"),
        ([[[1, 2], [3, 4]], [[5, 6]]], [[1, 0], [-10]], "point_labels"),
        ([[[1, 2], [3, 4]], [[5, 6, 7]]], [[1, 0], [1]], "point_coords"),
        ([[[1, 2], [3, 4]], [[5, np.nan]]], [[1, 0], [1]], "point_coords"),
        ([[[1, 2], [3, 4]], "ab"], [[1, 0], [1, 1]], "point_coords"),
        ([[[1, 2]], [[[1, 2]], [[1, 2]]]], [[1], [[1], [1]]], "point_coords"),
    ],
)
def test_ragged_points_that_do_not_fit_are_refused(coords: Any, labels: Any, argument: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(point_coords=coords, point_labels=labels)
    assert caught.value.argument == argument


@pytest.mark.parametrize("multimask", [True, False])
def test_ragged_results_are_those_of_calls_of_their_own(
    model: SegmentationModel, multimask: bool
) -> None:
    embedding = model.encode(noise(90, 120))
    coords = [[[30, 40], [60, 50], [100, 80]], [[10, 10]], [[70, 20], [80, 30]]]
    labels = [[1, 0, 1], [1], [1, -1]]
    together = model.decode(embedding, Prompts(coords, labels), multimask)
    for index in range(3):
        alone = model.decode(embedding, Prompts(coords[index], labels[index]), multimask)
        for name in ("low_res_masks", "iou_predictions"):
            np.testing.assert_allclose(
                getattr(together, name)[index], getattr(alone, name)[0], rtol=1e-4, atol=2e-4
            )


def test_a_point_that_is_no_point_changes_the_masks(model: SegmentationModel) -> None:
    """Which is why objects cannot be padded with it."""
    embedding = model.encode(noise(90, 120))
    one = model.decode(embedding, Prompts([[30, 40]], [1])).low_res_masks
    more = model.decode(embedding, Prompts([[30, 40], [0, 0]], [1, -1])).low_res_masks
    assert np.abs(one - more).max() > 0.01


# --- no objects -----------------------------------------------------------------------------------


@Spec
@pytest.mark.parametrize(
    "prompts",
    [
        {"box": np.zeros((0, 4))},
        {"point_coords": np.zeros((0, 3, 2)), "point_labels": np.zeros((0, 3))},
        {
            "box": np.zeros((0, 4)),
            "point_coords": np.zeros((0, 3, 2)),
            "point_labels": np.zeros((0, 3)),
        },
        {"box": np.zeros((0, 4)), "mask_input": MASK},
    ],
)
def test_an_empty_set_of_objects_is_packed_as_one(
    spec: PromptSpec, prompts: dict[str, Any]
) -> None:
    result = packed(spec, **prompts)
    assert len(result.points) == len(result.labels) == 0


# --- warnings -------------------------------------------------------------------------------------


FAR: dict[str, dict[str, Any]] = {
    "nothing": {},
    "right": {"point_coords": [[710, 10]], "point_labels": [1]},
    "left": {"point_coords": [[-70, 10]], "point_labels": [1]},
    "above": {"point_coords": [[10, -50]], "point_labels": [0]},
    "one of two": {"point_coords": [[10, 10], [10, 530]], "point_labels": [1, 1]},
    "pixels for shares": {
        "point_coords": [[225, 150]],
        "point_labels": [1],
        "normalize_coords": False,
    },
    "box": {"box": [700, 500, 800, 600]},
    "endless box": {"box": [0, 0, 1e9, 1e9]},
    "box that only just fits float32": {"box": [2e38, 1.5e38, 2e38, 1.5e38]},
    "one of two boxes": {"box": [[0, 0, 9, 9], [-500, 0, -400, 9]]},
    "point beside a good box": {
        "box": [0, 0, 9, 9],
        "point_coords": [[10, 1e6]],
        "point_labels": [1],
    },
    "one of ragged": {
        "point_coords": [[[1, 1], [2, 2]], [[-900, 1]]],
        "point_labels": [[1, 1], [1]],
    },
}


@pytest.mark.parametrize("name", FAR)
@Spec
@pytest.mark.filterwarnings("always::sam3rt.errors.PromptWarning")
def test_prompts_that_are_hardly_meant_are_warned_of_once(spec: PromptSpec, name: str) -> None:
    with pytest.warns(PromptWarning) as caught:
        packed(spec, **FAR[name])
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert caught[0].filename == __file__
    assert ("no prompt" if name == "nothing" else "far outside") in str(caught[0].message)


@pytest.mark.parametrize(
    "prompts",
    [
        {"mask_input": MASK},
        {"point_coords": [[-60, 500]], "point_labels": [1]},
        {"point_coords": [[0, 0], [640, 480]], "point_labels": [1, 0]},
        {"point_coords": [[9e9, 9e9], [3, 3]], "point_labels": [-1, 1]},
        {"point_coords": np.zeros((0, 2)), "point_labels": []},
        {"box": [-100, -100, 740, 580]},
        {"box": [400, 300, 800, 600]},
        {"box": np.zeros((0, 4))},
        {"point_coords": [[0.9, 0.9]], "point_labels": [1], "normalize_coords": False},
    ],
)
@Spec
@pytest.mark.filterwarnings("error")
def test_usual_prompts_are_not_warned_of(spec: PromptSpec, prompts: dict[str, Any]) -> None:
    packed(spec, **prompts)


# --- forms that are accepted ----------------------------------------------------------------------


POINTS = np.array([[[3, 4], [50, 60]], [[7, 8], [90, 10]]], np.float32)
LABELS = np.array([[1, 0], [-1, 1]], np.int64)
BOXES = np.array([[1, 2, 30, 40], [5, 6, 70, 80]], np.float32)
MASKS = np.arange(48, dtype=np.float32).reshape(2, 1, 6, 4) - 20


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS: dict[str, Any] = {
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(tuple(row) for row in a.tolist()),
    "list of arrays": list,
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "longdouble": lambda a: a.astype(np.longdouble),
    "int8": lambda a: a.astype(np.int8),
    "int64": lambda a: a.astype(np.int64),
    "big-endian": lambda a: a.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: a[::-1, ..., ::-1].copy()[::-1, ..., ::-1],
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "read-only": read_only,
}


@pytest.mark.parametrize("form", FORMS)
@Spec
def test_other_forms_of_the_same_prompts(spec: PromptSpec, form: str) -> None:
    make = FORMS[form]
    expected = packed(spec, point_coords=POINTS, point_labels=LABELS, box=BOXES, mask_input=MASKS)
    actual = packed(
        spec,
        point_coords=make(POINTS),
        point_labels=make(LABELS),
        box=make(BOXES),
        mask_input=make(MASKS),
    )
    same(actual, expected)


def test_bools_and_unsigned_numbers_count_as_numbers() -> None:
    expected = packed(point_coords=[[1, 0]], point_labels=[1])
    same(packed(point_coords=np.array([[True, False]]), point_labels=[True]), expected)
    same(packed(point_coords=np.array([[1, 0]], np.uint64), point_labels=np.uint8([1])), expected)


def test_torch_tensors_are_accepted() -> None:
    torch = pytest.importorskip("torch")
    expected = packed(point_coords=POINTS, point_labels=LABELS)
    actual = packed(point_coords=torch.from_numpy(POINTS), point_labels=torch.from_numpy(LABELS))
    same(actual, expected)


def test_bfloat16_of_ml_dtypes_is_accepted() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    expected = packed(point_coords=POINTS, point_labels=LABELS, box=BOXES, mask_input=MASKS)
    actual = packed(
        point_coords=POINTS.astype(ml_dtypes.bfloat16),
        point_labels=LABELS,
        box=BOXES.astype(ml_dtypes.bfloat16),
        mask_input=MASKS.astype(ml_dtypes.bfloat16),
    )
    same(actual, expected)


def test_tensors_that_numpy_cannot_read_are_refused_with_advice() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2, requires_grad=True)):
        with pytest.raises(PromptError, match=r"\.detach\(\)\.cpu\(\)\.float\(\)") as caught:
            packed(point_coords=tensor, point_labels=[1])
        assert caught.value.argument == "point_coords"


def test_masked_arrays_are_accepted_where_nothing_is_masked() -> None:
    expected = packed(point_coords=POINTS, point_labels=LABELS)
    actual = packed(
        point_coords=np.ma.masked_array(POINTS), point_labels=np.ma.masked_array(LABELS)
    )
    same(actual, expected)


def test_inputs_are_left_alone_and_not_shared() -> None:
    arrays = {"point_coords": POINTS, "point_labels": LABELS, "box": BOXES, "mask_input": MASKS}
    given_arrays = {name: array.copy() for name, array in arrays.items()}
    result = packed(**given_arrays)
    before = [result.points.copy(), result.labels.copy()]
    for name, array in arrays.items():
        np.testing.assert_array_equal(given_arrays[name], array)
    for name in ("point_coords", "point_labels", "box"):
        given_arrays[name][...] = 0
    np.testing.assert_array_equal(result.points, before[0])
    np.testing.assert_array_equal(result.labels, before[1])


# --- refusals -------------------------------------------------------------------------------------

CLICK: dict[str, Any] = {"point_coords": [[1, 2]], "point_labels": [1]}
# Every number class can hold at most this; beyond is not a float32.
HUGE = 3e38

pytestmark = pytest.mark.filterwarnings("ignore::sam3rt.errors.PromptWarning")

BAD_POINTS: dict[str, Any] = {
    "NaN": [[1, float("nan")]],
    "infinite": [[float("inf"), 1]],
    "minus infinite": [[float("-inf"), 1]],
    "beyond float32": [[1e300, 1]],
    "overflows when scaled": [[HUGE, 1]],
    "overflows when scaled down": [[1, -HUGE]],
    "one number": 5,
    "one point without a list": [1, 2],
    "three coordinates": [[1, 2, 3]],
    "one coordinate": [[1]],
    "four axes": [[[[1, 2]]]],
    "empty list": [],
    "ragged": [[1, 2], [3]],
    "strings": [["1", "2"]],
    "text": "click",
    "bytes": b"click",
    "None inside": [[1, None]],
    "objects": np.array([[1, 2]], dtype=object),
    "complex": [[1j, 2]],
    "dates": np.array([["2020-01-01", "2020-01-02"]], "datetime64[D]"),
    "records": np.zeros((1, 2), [("x", "f4")]),
    "dict": {"x": 1, "y": 2},
    "set": {(1, 2)},
    "huge whole number": [[10**400, 1]],
    "object": object(),
}


@pytest.mark.parametrize("name", BAD_POINTS)
@pytest.mark.parametrize("normalize", [True, False])
@Spec
def test_bad_points_are_refused(spec: PromptSpec, normalize: bool, name: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, point_coords=BAD_POINTS[name], point_labels=[1], normalize_coords=normalize)
    assert caught.value.argument == "point_coords"
    assert str(caught.value).startswith("point_coords: got ")


BAD_LABELS: dict[str, Any] = {
    "4": [4],
    "-2": [-2],
    "fraction": [0.5],
    "nearly": [1.0000001],
    "NaN": [float("nan")],
    "infinite": [float("inf")],
    "string": ["1"],
    "text": "1",
    "bytes": b"1",
    "None inside": [None],
    "complex": [1 + 0j],
    "objects": np.array([1], dtype=object),
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
    "huge": [2**63],
    "wraps around": np.array([2**64 - 1], np.uint64),
    "too big for any type": [10**400],
    "too many": [1, 1],
    "none": [],
    "scalar": 1,
    "wrong axes": [[1]],
    "ragged": [[1], [1, 0]],
    "dict": {"label": 1},
}


@pytest.mark.parametrize("name", BAD_LABELS)
@Spec
def test_bad_labels_are_refused(spec: PromptSpec, name: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, point_coords=[[1, 2]], point_labels=BAD_LABELS[name])
    assert caught.value.argument == "point_labels"


@given(label=st.integers() | st.floats())
@examples(200)
def test_exactly_five_labels_exist(label: float) -> None:
    if label in (-1, 0, 1, 2, 3):
        assert packed(point_coords=[[1, 2]], point_labels=[label]).labels[0, 0] == label
    else:
        with pytest.raises(PromptError) as caught:
            packed(point_coords=[[1, 2]], point_labels=[label])
        assert caught.value.argument == "point_labels"


BAD_BOXES: dict[str, Any] = {
    "NaN": [1, 2, float("nan"), 4],
    "infinite": [1, 2, float("inf"), 4],
    "beyond float32": [1, 2, 1e300, 4],
    "overflows when scaled": [0, 0, 1, HUGE],
    "x turned": [3, 2, 1, 4],
    "y turned": [1, 4, 3, 2],
    "one of two turned": [[1, 2, 3, 4], [3, 2, 1, 4]],
    "three numbers": [1, 2, 3],
    "five numbers": [1, 2, 3, 4, 5],
    "five by three": [[1, 2, 3]] * 5,
    "transposed": np.ones((4, 2)),
    "corners": [[1, 2], [3, 4]],
    "three axes": [[[1, 2, 3, 4]]],
    "scalar": 7,
    "empty": [],
    "ragged": [[1, 2, 3, 4], [1, 2]],
    "strings": ["1", "2", "3", "4"],
    "complex": [1j, 2, 3, 4],
    "objects": np.array([1, 2, 3, None], dtype=object),
    "text": "box",
}


@pytest.mark.parametrize("name", BAD_BOXES)
@pytest.mark.parametrize("normalize", [True, False])
@Spec
def test_bad_boxes_are_refused(spec: PromptSpec, normalize: bool, name: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, box=BAD_BOXES[name], normalize_coords=normalize)
    assert caught.value.argument == "box"


BAD_MASKS: dict[str, Any] = {
    "NaN": np.where(MASK == 5, np.nan, MASK),
    "infinite": np.where(MASK == 5, np.inf, MASK),
    "beyond float32": MASK.astype(np.float64) * 1e300,
    "two axes": MASK[0],
    "five axes": MASK[None, None],
    "one axis": MASK.ravel(),
    "scalar": 0.0,
    "transposed": MASK.transpose(0, 2, 1),
    "other size": np.zeros((1, 12, 8)),
    "three channels": np.zeros((3, 6, 4)),
    "batch without its channel axis": np.zeros((2, 6, 4)),
    "two channels in a batch": np.zeros((1, 2, 6, 4)),
    "no masks": np.zeros((0, 1, 6, 4)),
    "empty": np.zeros((1, 0, 0)),
    "complex": MASK.astype(np.complex64),
    "objects": MASK.astype(object),
    "strings": MASK.astype(str),
    "ragged": [[[1.0], [1.0, 2.0]]],
    "text": "mask",
}


@pytest.mark.parametrize("name", BAD_MASKS)
@pytest.mark.parametrize("click", [CLICK, {}], ids=["click", "alone"])
@Spec
def test_bad_masks_are_refused(spec: PromptSpec, click: dict[str, Any], name: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, mask_input=BAD_MASKS[name], **click)
    assert caught.value.argument == "mask_input"


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_a_binary_mask_is_not_taken_for_logits(dtype: Any) -> None:
    with pytest.raises(PromptError, match=r"numpy\.where\(mask, 10\.0, -10\.0\)") as caught:
        packed(mask_input=(MASK > 5).astype(dtype))
    assert caught.value.argument == "mask_input"


@pytest.mark.parametrize("value", [1.01e4, -1.01e4, 3e38, -3e38])
def test_logits_too_large_for_the_decoder_are_refused(value: float) -> None:
    """Beyond some 1e36 its sums are infinite, then NaN: empty masks without an error."""
    with pytest.raises(PromptError, match=r"mask_input: got a value of .*10000"):
        packed(mask_input=np.where(MASK == 5, value, MASK))
    assert packed(mask_input=np.full_like(MASK, 1e4)).masks is not None


def test_largest_logits_give_finite_masks(model: SegmentationModel) -> None:
    height, width = model.manifest.prompts.mask_size
    logits = np.full((1, height, width), MAX_MASK_LOGIT)
    logits[..., ::2] *= -1
    decoded = model.decode(model.encode(noise(9, 9)), Prompts(mask_input=logits))
    assert np.isfinite(decoded.low_res_masks).all()
    assert np.isfinite(decoded.iou_predictions).all()


@pytest.mark.parametrize("argument", ["point_coords", "point_labels", "box", "mask_input"])
@pytest.mark.parametrize("inside_a_list", [False, True])
def test_masked_values_are_refused(argument: str, inside_a_list: bool) -> None:
    prompts = {
        "point_coords": POINTS.copy(),
        "point_labels": LABELS,
        "box": BOXES.copy(),
        "mask_input": MASKS.copy(),
    }
    masked = np.ma.masked_array(prompts[argument])
    masked[(0,) * masked.ndim] = np.ma.masked
    prompts[argument] = list(masked) if inside_a_list else masked
    with pytest.raises(PromptError, match="masked") as caught:
        packed(**prompts)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("prompts", "argument"),
    [
        ({"box": np.ones((MAX_OBJECTS + 1, 4))}, "box"),
        ({"mask_input": np.zeros((MAX_OBJECTS + 1, 1, 6, 4))}, "mask_input"),
        (
            {
                "point_coords": np.ones((MAX_OBJECTS + 1, 1, 2)),
                "point_labels": np.ones((MAX_OBJECTS + 1, 1)),
            },
            "point_coords",
        ),
        (
            {
                "point_coords": np.ones((MAX_POINTS + 1, 2)),
                "point_labels": np.ones(MAX_POINTS + 1),
            },
            "point_coords",
        ),
        (
            {
                "point_coords": [[[1, 1]], np.ones((MAX_POINTS + 1, 2))],
                "point_labels": [[1], np.ones(MAX_POINTS + 1)],
            },
            "point_coords",
        ),
        (
            {
                "point_coords": [[[1, 1]] * (1 + index % 2) for index in range(MAX_OBJECTS + 1)],
                "point_labels": [[1] * (1 + index % 2) for index in range(MAX_OBJECTS + 1)],
            },
            "point_coords",
        ),
    ],
)
def test_objects_and_points_have_a_limit(prompts: dict[str, Any], argument: str) -> None:
    with pytest.raises(PromptError, match="at most 1024") as caught:
        packed(**prompts)
    assert caught.value.argument == argument
    largest = np.ones((MAX_OBJECTS, 4), np.float32)
    assert len(packed(box=largest).points) == MAX_OBJECTS


@pytest.mark.parametrize(
    ("prompts", "argument"),
    [
        ({"point_coords": [[1, 2]]}, "point_labels"),
        ({"point_labels": [1]}, "point_coords"),
        ({"point_labels": [1], "box": [1, 2, 3, 4]}, "point_coords"),
        ({"point_coords": [[1, 2], [3, 4]], "point_labels": [1]}, "point_labels"),
        ({"point_coords": POINTS, "point_labels": [1, 0]}, "point_labels"),
        ({"point_coords": POINTS, "point_labels": LABELS.T[:, :1]}, "point_labels"),
        ({"point_coords": POINTS[0], "point_labels": LABELS}, "point_labels"),
        ({**CLICK, "box": BOXES}, "box"),
        ({"point_coords": POINTS, "point_labels": LABELS, "box": BOXES[0]}, "box"),
        ({"point_coords": POINTS, "point_labels": LABELS, "box": BOXES[[0, 0, 0]]}, "box"),
        ({**CLICK, "mask_input": MASKS}, "mask_input"),
        ({"box": BOXES, "mask_input": MASKS[[0, 1, 0]]}, "mask_input"),
        ({"box": BOXES[0], "mask_input": MASKS}, "mask_input"),
    ],
)
@Spec
def test_prompts_that_do_not_fit_each_other(
    spec: PromptSpec, prompts: dict[str, Any], argument: str
) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, **prompts)
    assert caught.value.argument == argument
    assert isinstance(caught.value, ValueError)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@given(points=anything, labels=anything, box=anything, mask=anything, normalize=st.booleans())
@examples(300)
def test_nonsense_raises_only_prompt_errors(
    points: Any, labels: Any, box: Any, mask: Any, normalize: bool
) -> None:
    arguments = {
        "point_coords": points,
        "point_labels": labels,
        "box": box,
        "mask_input": mask,
    }
    try:
        result = packed(normalize_coords=normalize, **arguments)
    except PromptError as error:
        refused = error.argument
    else:
        assert np.isfinite(result.points).all()
        assert result.points.shape[:2] == result.labels.shape
        return
    assert refused in arguments
