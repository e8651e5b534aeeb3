"""The decoder graph on a tiny model, and its rules against plain implementations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.export_helpers import (
    DECODER,
    PROMPT,
    random_mobile_sam,
    relative,
    tiny_tensors,
)
from torch import Tensor

from sam3rt_export.graphs.sam_decoder import (
    DecoderArchitecture,
    MaskPrompt,
    SamDecoderGraph,
    count_children,
)
from sam3rt_export.references.mobile_sam import MobileSamReference
from sam3rt_export.references.transformers_sam3 import TransformersReference, build_tracker_model
from sam3rt_export.sources.sam3_architecture import read_architecture

modest = settings(deadline=None, max_examples=40)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


# --- positions and points -------------------------------------------------------------------------


def fourier(unit: Tensor, matrix: Tensor) -> Tensor:
    angle = 2.0 * math.pi * ((2.0 * unit.double() - 1.0) @ matrix.double())
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1).float()


ARCHITECTURE = DecoderArchitecture(image_size=8, grid=4)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A tiny SAM 3."""
    return tiny_tensors()


@pytest.fixture(scope="module")
def decoder(tensors: dict[str, Tensor]) -> SamDecoderGraph:
    """Its decoder graph."""
    return SamDecoderGraph(ARCHITECTURE, tensors, PROMPT, DECODER).eval()


@pytest.mark.parametrize("label", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("point", [(0.0, 0.0), (7.5, 3.25), (-4.0, 1e6)])
@torch.no_grad()
def test_one_point_of_each_label(
    decoder: SamDecoderGraph, tensors: dict[str, Tensor], label: int, point: tuple[float, float]
) -> None:
    points, labels = torch.tensor([[point]]), torch.tensor([[label]])
    embedded = decoder.embed_points(points, labels)
    if label == -1:
        expected = tensors[PROMPT + "not_a_point_embed.weight"][None]
        assert torch.equal(embedded, expected), "coordinates of an ignored point leak"
        return
    matrix = tensors[PROMPT + "pe_layer.positional_encoding_gaussian_matrix"]
    # In FP32 up to the angle, as in the reference: far outside the image, its rounding counts.
    unit = (points + 0.5) / 8
    expected = fourier(unit, matrix) + tensors[f"{PROMPT}point_embeddings.{label}.weight"]
    if abs(point[1]) < 100:
        assert relative(embedded, expected) < 1e-5
    assert torch.isfinite(embedded).all()


# --- mask prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [0.0, 1.0, -1e4, 1e15, 3e38, math.inf, -math.inf, math.nan],
)
@torch.no_grad()
def test_without_its_flag_the_mask_does_not_matter(
    tensors: dict[str, Tensor], value: float
) -> None:
    masks = rows(1, 1, 2, 16, 16)
    masks[0, 0, 3, 5] = value
    masks[0, 1] = value
    actual = MaskPrompt(tensors, PROMPT, 4)(masks, torch.zeros(1))
    expected = tensors[PROMPT + "no_mask_embed.weight"].expand(2, 16, -1)
    assert torch.equal(actual, expected)


# --- the single mask ------------------------------------------------------------------------------

DELTA, THRESHOLD = np.float32(0.05), np.float32(0.98)


def plain_select(masks: Tensor, iou: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The reference's rule, one pixel and one object at a time."""
    chosen = []
    for logits, scores in zip(masks.numpy(), iou.tolist(), strict=True):
        inner = outer = 0
        for value in logits[0].ravel():
            inner += bool(value > DELTA)
            outer += bool(value > -DELTA)
        stability = np.float32(1.0)
        if outer > 0:
            stability = np.float32(inner) / np.float32(outer)
        best = 0
        if stability < THRESHOLD:
            best = 1
            for token in (2, 3):
                if scores[token] > scores[best]:
                    best = token
        chosen.append(best)
    index = torch.arange(len(chosen)), torch.tensor(chosen)
    return masks[index][:, None], iou[index][:, None], chosen


def mask_of_areas(inner: int, outer: int, seed: int = 0) -> Tensor:
    """A 16x16 logit map with the given areas over +0.05 and over -0.05."""
    values = torch.full((256,), -3.0)
    values[:outer] = 0.0
    values[:inner] = 2.0
    return values[torch.randperm(256, generator=generator(seed))].reshape(16, 16)


def four_masks(first: Tensor, seed: int = 0) -> Tensor:
    return torch.cat([first[None], rows(seed, 3, 16, 16)])[None]


def check_selection(decoder: SamDecoderGraph, masks: Tensor, iou: Tensor) -> list[int]:
    mask, score = decoder.single_mask(masks, iou)
    expected, expected_score, chosen = plain_select(masks, iou)
    assert torch.equal(mask, expected)
    assert torch.equal(score, expected_score)
    return chosen


@pytest.mark.parametrize(
    ("inner", "outer", "stable"),
    [
        (0, 0, True),  # nothing over -0.05: the score is 1 by definition
        (0, 1, False),
        (1, 1, True),
        (256, 256, True),
        (98, 100, True),  # exactly at the threshold
        (49, 50, True),
        (196, 200, True),
        (97, 100, False),
        (195, 199, False),
        (250, 256, False),
        (251, 256, True),
    ],
)
@pytest.mark.parametrize("best", [1, 2, 3])
def test_stability_decides_between_token_0_and_the_best(
    decoder: SamDecoderGraph, inner: int, outer: int, stable: bool, best: int
) -> None:
    iou = torch.tensor([[0.99, 0.1, 0.1, 0.1]])
    iou[0, best] = 0.2
    chosen = check_selection(decoder, four_masks(mask_of_areas(inner, outer)), iou)
    assert chosen == [0 if stable else best]


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ((0.5, 0.5, 0.5), 1),
        ((0.4, 0.5, 0.5), 2),
        ((0.5, 0.4, 0.5), 1),
        ((0.3, 0.4, 0.5), 3),
        ((0.0, 0.0, 0.0), 1),
        ((1.0, 0.0, 1.0), 1),
    ],
)
def test_among_equal_ious_the_first_wins(
    decoder: SamDecoderGraph, scores: tuple[float, float, float], winner: int
) -> None:
    masks = four_masks(mask_of_areas(0, 10))
    assert check_selection(decoder, masks, torch.tensor([[0.9, *scores]])) == [winner]


def test_logits_exactly_at_the_offsets_do_not_count(decoder: SamDecoderGraph) -> None:
    first = torch.full((16, 16), -1.0)
    first[0] = 0.05  # not over +0.05, but over -0.05
    first[1] = -0.05  # not over -0.05
    first[2:4] = 1.0
    masks = four_masks(first)
    iou = torch.tensor([[0.9, 0.1, 0.2, 0.3]])
    assert check_selection(decoder, masks, iou) == [3]
    first[0] = torch.nextafter(torch.tensor(0.05), torch.tensor(1.0))
    assert check_selection(decoder, four_masks(first), iou) == [0]


@modest
@given(
    st.lists(
        st.tuples(
            st.integers(0, 256),
            st.integers(0, 8),
            st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_selection_of_many_objects_equals_the_loop(
    decoder: SamDecoderGraph, objects: list[tuple[int, int, list[float]]], seed: int
) -> None:
    masks = torch.cat(
        [
            four_masks(mask_of_areas(max(0, outer - gap), outer, seed + i), seed + i)
            for i, (outer, gap, _) in enumerate(objects)
        ]
    )
    iou = torch.tensor([scores for _, _, scores in objects])
    check_selection(decoder, masks, iou)


def test_token_0_models_always_take_it(tensors: dict[str, Tensor]) -> None:
    plain = dataclasses.replace(ARCHITECTURE, single_mask="token0")
    graph = SamDecoderGraph(plain, tensors, PROMPT, DECODER)
    masks, iou = four_masks(mask_of_areas(0, 100)), torch.tensor([[0.1, 0.9, 0.9, 0.9]])
    mask, score = graph.single_mask(masks, iou)
    assert torch.equal(mask, masks[:, :1])
    assert torch.equal(score, iou[:, :1])


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "count"),
    [((), 0), (("p.0.w",), 1), (("p.1.w", "p.0.w", "p.0.b", "q.7"), 2)],
)
def test_children_are_counted(names: tuple[str, ...], count: int) -> None:
    assert count_children({name: torch.zeros(1) for name in names}, "p.") == count


@pytest.mark.parametrize("names", [("p.1.w",), ("p.0.w", "p.2.w")])
def test_children_with_gaps_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(KeyError, match=r"p\."):
        count_children({name: torch.zeros(1) for name in names}, "p.")


# --- the whole decoder ----------------------------------------------------------------------------

OUTPUTS = ("masks", "iou", "single mask", "single iou", "object score")


def random_prompts(
    seed: int, objects: int, count: int, masks: int, size: int, side: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = generator(seed)
    points = size * torch.rand(objects, count, 2, generator=g)
    labels = torch.randint(-1, 4, (objects, count), generator=g)
    given = 8 * torch.randn(masks, side, side, generator=g) if masks else None
    return points, labels, given


def call(graph: SamDecoderGraph, features: Any, prompts: Any, side: int) -> tuple[Tensor, ...]:
    points, labels, given = prompts
    masks = torch.zeros(1, 1, side, side) if given is None else given[None]
    flag = torch.tensor([0.0 if given is None else 1.0])
    return graph(features, points[None], labels[None], masks, flag)


@pytest.fixture(scope="module")
def reference(tensors: dict[str, Tensor]) -> TransformersReference:
    """The tiny SAM 3 in transformers' code."""
    return TransformersReference(build_tracker_model(read_architecture(tensors), tensors))


@pytest.mark.parametrize("objects", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("masks", ["none", "one", "each"])
@torch.no_grad()
def test_tiny_decoder_equals_transformers(
    decoder: SamDecoderGraph, reference: TransformersReference, objects: int, count: int, masks: str
) -> None:
    features = (rows(1, 1, 4, 16, 16), rows(2, 1, 8, 8, 8), rows(3, 1, 32, 4, 4))
    given = {"none": 0, "one": 1, "each": objects}[masks]
    prompts = random_prompts(objects + count, objects, count, given, 8, 16)
    multi, iou, single, single_iou, score = call(decoder, features, prompts, 16)
    said = reference.decode(features, *prompts)
    assert said.object_score is not None
    assert relative(torch.cat([multi[0], single[0]], dim=1), said.logits) < 1e-4
    assert relative(torch.cat([iou[0], single_iou[0]], dim=1), said.iou) < 1e-4
    assert relative(score[0, :, 0], said.object_score) < 1e-4


@pytest.fixture(scope="module")
def mobile_sam() -> dict[str, Tensor]:
    """A random MobileSAM."""
    return random_mobile_sam().state_dict()


@pytest.mark.parametrize(("objects", "count", "masks"), [(1, 2, 0), (3, 4, 0), (2, 3, 2)])
@torch.no_grad()
def test_mobile_sam_decoder_equals_the_official_one(
    mobile_sam: dict[str, Tensor], objects: int, count: int, masks: int
) -> None:
    rules = DecoderArchitecture(
        image_size=1024,
        grid=64,
        object_score=False,
        high_resolution=False,
        single_mask="token0",
        sigmoid_iou=False,
    )
    graph = SamDecoderGraph(rules, mobile_sam, "prompt_encoder.", "mask_decoder.")
    features = (rows(1, 1, 256, 64, 64),)
    points, labels, given = random_prompts(count, objects, count, masks, 1024, 256)
    labels[:] = torch.arange(count) % 3 - 1  # clicks and padding; corners have a place of their own
    labels[:, -2:] = torch.tensor([2, 3])
    multi, iou, single, single_iou = call(graph, features, (points, labels, given), 256)
    said = MobileSamReference(mobile_sam).decode(features, points, labels, given)
    assert said.object_score is None
    assert relative(torch.cat([multi[0], single[0]], dim=1), said.logits) < 1e-4
    assert relative(torch.cat([iou[0], single_iou[0]], dim=1), said.iou) < 1e-4


@torch.no_grad()
def test_objects_do_not_see_each_other(decoder: SamDecoderGraph) -> None:
    features = (rows(1, 1, 4, 16, 16), rows(2, 1, 8, 8, 8), rows(3, 1, 32, 4, 4))
    points, labels, given = random_prompts(5, 3, 4, 3, 8, 16)
    together = call(decoder, features, (points, labels, given), 16)
    assert given is not None
    for i in range(3):
        part = slice(i, i + 1)
        alone = call(decoder, features, (points[part], labels[part], given[part]), 16)
        for name, one, all_of_them in zip(OUTPUTS, alone, together, strict=True):
            assert relative(all_of_them[:, part], one) < 1e-5, name


@pytest.mark.parametrize("masks", [1, 3])
@torch.no_grad()
def test_each_object_may_have_its_own_image(decoder: SamDecoderGraph, masks: int) -> None:
    features = (rows(1, 3, 4, 16, 16), rows(2, 3, 8, 8, 8), rows(3, 3, 32, 4, 4))
    points, labels, given = random_prompts(5, 3, 4, masks, 8, 16)
    together = call(decoder, features, (points, labels, given), 16)
    assert given is not None
    for i in range(3):
        part = slice(i, i + 1)
        own = tuple(level[part] for level in features)
        mask = given[part] if masks > 1 else given
        alone = call(decoder, own, (points[part], labels[part], mask), 16)
        for name, one, all_of_them in zip(OUTPUTS, alone, together, strict=True):
            assert relative(all_of_them[:, part], one) < 1e-5, name


@pytest.mark.parametrize("label", [-2, -10])
@pytest.mark.parametrize(("objects", "count", "extra"), [(1, 2, 2), (1, 0, 4), (3, 3, 5)])
@torch.no_grad()
def test_padding_points_change_nothing(
    decoder: SamDecoderGraph, objects: int, count: int, extra: int, label: int
) -> None:
    """Wherever they stand, and whatever their coordinates: as if they were not there."""
    features = (rows(1, 1, 4, 16, 16), rows(2, 1, 8, 8, 8), rows(3, 1, 32, 4, 4))
    points, labels, _ = random_prompts(7, objects, count, 0, 8, 16)
    order = torch.randperm(count + extra, generator=generator(9))
    padded = torch.cat([points, 50 * rows(8, objects, extra, 2)], dim=1)[:, order]
    padded_labels = torch.cat([labels, torch.full((objects, extra), label)], dim=1)[:, order]
    expected = call(decoder, features, (points, labels, None), 16)
    actual = call(decoder, features, (padded, padded_labels, None), 16)
    for name, one, other in zip(OUTPUTS, expected, actual, strict=True):
        assert relative(other, one) < 1e-5, name
    ignored = padded_labels.clamp(min=-1)
    differing = call(decoder, features, (padded, ignored, None), 16)
    assert relative(differing[0], expected[0]) > 1e-3, "label -1 is a token, not padding"
