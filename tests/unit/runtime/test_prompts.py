"""Tests of `sam3rt.prompts`: packing against a plain re-implementation, and what only Python takes.

Single cases of packing and refusing, on which all runtimes agree, are in
``tests/conformance/prompts.json``.
"""

from __future__ import annotations

import contextlib
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

from sam3rt import ImageEmbedding, PromptError, Prompts, PromptWarning, SegmentationModel
from sam3rt.bundle import PromptSpec
from sam3rt.geometry import ImageGeometry, geometry
from sam3rt.object_prompts import by_object, with_labels
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


# --- objects with different numbers of points -----------------------------------------------------


@pytest.fixture(scope="module", params=["tiny_model", "default_model"])
def decoder(request: pytest.FixtureRequest) -> tuple[SegmentationModel, ImageEmbedding]:
    """A decoder of SAM 3 and one of MobileSAM in turn, and an image of 90 x 120 pixels for it."""
    model: SegmentationModel = request.getfixturevalue(request.param)
    return model, model.encode(noise(90, 120))


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
    decoder: tuple[SegmentationModel, ImageEmbedding], multimask: bool
) -> None:
    model, embedding = decoder
    coords = [[[30, 40], [60, 50], [100, 80]], [[10, 10]], [[70, 20], [80, 30]]]
    labels = [[1, 0, 1], [1], [1, -1]]
    together = model.decode(embedding, Prompts(coords, labels), multimask)
    for index in range(3):
        alone = model.decode(embedding, Prompts(coords[index], labels[index]), multimask)
        for name in ("low_res_masks", "iou_predictions"):
            np.testing.assert_allclose(
                getattr(together, name)[index], getattr(alone, name)[0], rtol=1e-4, atol=2e-4
            )


def test_a_point_that_is_no_point_changes_the_masks(
    decoder: tuple[SegmentationModel, ImageEmbedding],
) -> None:
    """Which is why objects cannot be padded with it."""
    model, embedding = decoder
    one = model.decode(embedding, Prompts([[30, 40]], [1])).low_res_masks
    more = model.decode(embedding, Prompts([[30, 40], [0, 0]], [1, -1])).low_res_masks
    assert np.abs(one - more).max() > 0.01


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=5), data=st.data())
@examples(100)
def test_prompts_come_back_object_by_object(counts: list[int], data: st.DataObject) -> None:
    """Whether objects have as many points as each other or not, with labels and without."""
    rng = np.random.default_rng(sum(counts))
    points = [rng.uniform(0, 99, (count, 2)).astype(np.float32) for count in counts]
    labels = [rng.integers(-1, 2, count) for count in counts] if data.draw(st.booleans()) else None
    boxes = np.sort(rng.uniform(0, 99, (len(counts), 4))) if data.draw(st.booleans()) else None
    found = by_object(Prompts(*with_labels(points, labels), boxes))
    assert len(found) == len(counts)
    for index, one in enumerate(found):
        np.testing.assert_array_equal(one.points, points[index])
        expected = np.ones(counts[index]) if labels is None else labels[index]
        np.testing.assert_array_equal(one.labels, expected)
        assert (one.box is None) == (boxes is None)
        if boxes is not None:
            np.testing.assert_allclose(one.box, boxes[index], rtol=1e-6)


# --- no objects -----------------------------------------------------------------------------------


@Spec
@pytest.mark.parametrize(
    "prompts",
    [
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

pytestmark = pytest.mark.filterwarnings("ignore::sam3rt.errors.PromptWarning")

BAD_POINTS: dict[str, Any] = {
    "beyond float32": [[1e300, 1]],
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
    "ragged": [[1], [1, 0]],
    "dict": {"label": 1},
}


@pytest.mark.parametrize("name", BAD_LABELS)
@Spec
def test_bad_labels_are_refused(spec: PromptSpec, name: str) -> None:
    with pytest.raises(PromptError) as caught:
        packed(spec, point_coords=[[1, 2]], point_labels=BAD_LABELS[name])
    assert caught.value.argument == "point_labels"
    assert isinstance(caught.value, ValueError)


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
    "beyond float32": [1, 2, 1e300, 4],
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
    "beyond float32": MASK.astype(np.float64) * 1e300,
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


def test_largest_logits_give_finite_masks(
    decoder: tuple[SegmentationModel, ImageEmbedding],
) -> None:
    model, embedding = decoder
    height, width = model.manifest.prompts.mask_size
    logits = np.full((1, height, width), MAX_MASK_LOGIT)
    logits[..., ::2] *= -1
    decoded = model.decode(embedding, Prompts(mask_input=logits))
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
    ("coords", "labels"),
    [
        ([[[1, 1]], np.ones((MAX_POINTS + 1, 2))], [[1], np.ones(MAX_POINTS + 1)]),
        (
            [[[1, 1]] * (1 + index % 2) for index in range(MAX_OBJECTS + 1)],
            [[1] * (1 + index % 2) for index in range(MAX_OBJECTS + 1)],
        ),
    ],
)
def test_ragged_objects_and_points_have_a_limit(coords: Any, labels: Any) -> None:
    with pytest.raises(PromptError, match="at most 1024") as caught:
        packed(point_coords=coords, point_labels=labels)
    assert caught.value.argument == "point_coords"


def test_as_many_objects_as_the_limit_are_taken() -> None:
    assert len(packed(box=np.ones((MAX_OBJECTS, 4), np.float32)).points) == MAX_OBJECTS


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
    with contextlib.suppress(PromptError):
        for one in by_object(Prompts(*with_labels(points, labels), box)):
            assert one.points.shape == (*one.labels.shape, 2)
            assert one.box is None or one.box.shape == (4,)
    try:
        result = packed(normalize_coords=normalize, **arguments)
    except PromptError as error:
        refused = error.argument
    else:
        assert np.isfinite(result.points).all()
        assert result.points.shape[:2] == result.labels.shape
        return
    assert refused in arguments
