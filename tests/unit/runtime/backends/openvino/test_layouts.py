"""Tests of `sam3rt.backends.openvino.layouts`, on graphs written here and an exported one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sam3rt.backends.openvino.layouts import rearrange_decoder

from .test_hidden_layers import gelu

RNG = np.random.default_rng(0)
IMAGE, HEADS, WIDTH = 24, 2, 8


def attention(turns: tuple[int, ...] = (0, 2, 1), turned_query: bool = False) -> ov.Model:
    """Image tokens attend to any number of others, by head, as an export writes it."""
    query = ops.parameter([-1, WIDTH, IMAGE] if turned_query else [-1, IMAGE, WIDTH], np.float32)
    sides = [-1, -1, WIDTH] if turns == (0, 2, 1) else [-1, WIDTH, -1]
    key, value = (ops.parameter(side, np.float32) for side in (sides, [-1, -1, WIDTH]))
    offset = ops.parameter([-1, 1, -1], np.float32)
    turned = ops.transpose(key, np.array(turns))
    matmul = ops.matmul(query, turned, turned_query, False)
    matmul.set_friendly_name("scores/MatMul")
    scores = ops.add(matmul, offset)
    softmax = ops.softmax(ops.reshape(scores, np.array([0, IMAGE, HEADS, -1]), True), -1)
    softmax.set_friendly_name("softmax")
    weights = ops.reshape(softmax, np.array([0, IMAGE, -1]), True)
    mixed = ops.matmul(weights, value, False, False)
    mixed.set_friendly_name("mixed/MatMul")
    return ov.Model([ops.result(mixed)], [query, key, value, offset], "attention")


def values_for(model: ov.Model, objects: int = 2, tokens: int = 3) -> list[Any]:
    """Values for :func:`attention`."""
    shapes = []
    for port in model.inputs:
        dynamic = [objects, HEADS * tokens, HEADS * tokens]
        sides = port.get_partial_shape()
        shapes.append([s.get_length() if s.is_static else dynamic[i] for i, s in enumerate(sides)])
    return [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(model: ov.Model, values: list[Any]) -> list[Any]:
    """What OpenVINO computes in FP32."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(values).values())


def softmax_axes(model: ov.Model) -> dict[str, int]:
    """The axis of each softmax, by name, from the front."""
    return {
        n.get_friendly_name(): n.get_attributes()["axis"] % len(n.get_output_partial_shape(0))
        for n in model.get_ordered_ops()
        if n.get_type_name() == "Softmax"
    }


@pytest.mark.parametrize(("objects", "tokens"), [(1, 1), (2, 3), (3, 9)])
def test_image_tokens_attend_to_few_others_along_another_axis(objects: int, tokens: int) -> None:
    plain, changed = attention(), attention()
    rearrange_decoder(changed)
    assert softmax_axes(plain) == {"softmax": 3}
    assert softmax_axes(changed) == {"softmax": 2}
    names = [n.get_friendly_name() for n in changed.get_ordered_ops()]
    assert {"scores/MatMul", "mixed/MatMul"} <= set(names)
    values = values_for(plain, objects, tokens)
    for expected, actual in zip(run(plain, values), run(changed, values), strict=True):
        assert expected.shape == actual.shape == (objects, IMAGE, WIDTH)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: attention(turns=(0, 1, 2)), lambda: attention(turned_query=True)]
)
def test_another_attention_stays_as_it_is(make: Callable[[], ov.Model]) -> None:
    model = make()
    rearrange_decoder(model)
    assert softmax_axes(model) == {"softmax": 3}


def enlarged(rows: int = 128, channels: int = 8, other: Any = None, **scalars: float) -> ov.Model:
    """GELU of the sum of two maps, or of one and a constant."""
    maps = [ops.parameter([-1, rows, channels], np.float32) for _ in range(1 if other else 2)]
    constant = [ops.constant(np.ones(other, np.float32))] if other else []
    total = ops.add(*maps, *constant)
    total.set_friendly_name("sum")
    return ov.Model([ops.result(gelu(total, **scalars))], maps, "enlarged")


def shapes_of_sum(model: ov.Model) -> list[list[int | None]]:
    return [
        [s.get_length() if s.is_static else None for s in node.get_output_partial_shape(0)]
        for node in model.get_ordered_ops()
        if node.get_friendly_name() == "sum"
    ]


def test_pixels_with_few_channels_are_joined_for_an_activation() -> None:
    plain, changed = enlarged(), enlarged()
    rearrange_decoder(changed)
    assert shapes_of_sum(plain) == [[None, 128, 8]]
    assert shapes_of_sum(changed) == [[None, 2, 512]]
    # A map for each object, and that of their one image.
    values = [RNG.standard_normal((n, 128, 8)).astype(np.float32) for n in (3, 1)]
    (expected,), (actual,) = run(plain, values), run(changed, values)
    assert actual.shape == (3, 128, 8)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def test_who_else_reads_the_sum_gets_it_as_it_was() -> None:
    model = enlarged()
    (total,) = [n for n in model.get_ordered_ops() if n.get_friendly_name() == "sum"]
    model.add_results([ops.result(total)])
    rearrange_decoder(model)
    values = [RNG.standard_normal((1, 128, 8)).astype(np.float32) for _ in range(2)]
    _, plain = run(model, values)
    np.testing.assert_array_equal(plain, values[0] + values[1])


@pytest.mark.parametrize(
    "model",
    [
        enlarged(rows=100),
        enlarged(channels=128),
        enlarged(other=(8,)),
        enlarged(root=2.0),
    ],
    ids=["odd rows", "enough channels", "a bias", "no GELU"],
)
def test_another_activation_stays_as_it_is(model: ov.Model) -> None:
    before = shapes_of_sum(model)
    rearrange_decoder(model)
    assert shapes_of_sum(model) == before


def test_an_exported_decoder_has_what_is_looked_for(small_bundle: Path) -> None:
    core = ov.Core()
    plain, changed = (core.read_model(small_bundle / "decoder.onnx") for _ in range(2))
    rearrange_decoder(changed)
    for model, axis in ((plain, 3), (changed, 2)):
        axes = softmax_axes(model)
        assert [axes[f"blocks.{i}.image_to_token/Softmax_0"] for i in (0, 1)] == [axis] * 2
    activations = [n for n in changed.get_ordered_ops() if n.get_type_name() == "Gelu"]
    sizes = [[s.get_length() for s in n.get_output_partial_shape(0)[1:]] for n in activations]
    assert sizes == [[1296, 64 * 32]]
    maps = {0: (32, 288), 1: (64, 144), 2: (256, 72)}
    values = {
        f"image_embeddings.{i}": RNG.standard_normal((1, c, side, side)).astype(np.float32)
        for i, (c, side) in maps.items()
    } | {
        "input_points": RNG.uniform(0, 1008, (1, 2, 3, 2)).astype(np.float32),
        "input_labels": np.array([[[1, 0, -1], [2, 3, -1]]]),
        "input_masks": np.zeros((1, 1, 288, 288), np.float32),
        "has_input_masks": np.zeros(1, np.float32),
    }
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    expected, actual = (
        list(core.compile_model(m, "CPU", settings)(values).values()) for m in (plain, changed)
    )
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-3)
