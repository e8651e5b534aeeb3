"""Tests of `sam3rt.backends.openvino.bf16`, on graphs written here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import openvino as ov
import pytest
from hypothesis import given
from numpy.typing import NDArray
from openvino import opset13 as ops

from sam3rt.backends.openvino.bf16 import (
    FIRST_BLOCKS,
    FRAGILE,
    NOTHING,
    TOKENS,
    matmuls_in_bf16,
    rounded_constant,
)

RNG = np.random.default_rng(0)


def weight(*shape: int) -> Any:
    """A constant of normal values, scaled for matmuls along its first side."""
    values = RNG.standard_normal(shape) / np.sqrt(shape[0])
    return ops.constant(values.astype(np.float32))


def transformer_block() -> ov.Model:
    """x + Wo softmax(a aT) a, then the MLP with GELU added to that, over a normalization each."""
    x = ops.parameter([1, 12, 16], np.float32, name="x")
    normal = ops.mvn(x, ops.constant(np.array([2])), True, 1e-5, "INSIDE_SQRT")
    normal.set_friendly_name("norm 1")
    a = ops.add(ops.matmul(normal, weight(16, 16), False, False), weight(16))
    scores = ops.multiply(ops.matmul(a, a, False, True), ops.constant(np.float32(0.25)))
    attended = ops.matmul(ops.softmax(scores, 2), a, False, False)
    stream = ops.add(x, ops.matmul(attended, weight(16, 16), False, False))
    stream.set_friendly_name("stream 1")
    again = ops.mvn(stream, ops.constant(np.array([2])), True, 1e-5, "INSIDE_SQRT")
    again.set_friendly_name("norm 2")
    hidden = ops.add(ops.matmul(again, weight(16, 64), False, False), weight(64))
    active = ops.gelu(hidden, "ERF")
    second = ops.add(stream, ops.matmul(active, weight(64, 16), False, False))
    second.set_friendly_name("stream 2")
    return ov.Model([ops.result(second)], [x], "block")


def kinds(model: ov.Model, element: Any) -> list[str]:
    """Types of the operators that give this element type, constants and conversions aside."""
    return sorted(
        node.get_type_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() not in ("Constant", "Convert", "Parameter", "Result")
        and node.get_output_element_type(0) == element
    )


def test_sums_over_blocks_and_normalizations_stay_fp32() -> None:
    model = transformer_block()
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.f32) == ["Add", "Add", "MVN", "MVN"]
    wide = {n.get_friendly_name() for n in model.get_ordered_ops()}
    assert {"norm 1", "stream 1", "norm 2", "stream 2"} <= wide
    assert kinds(model, ov.Type.bf16) == [
        *("Add", "Add", "Gelu"),
        *["MatMul"] * 6,
        *("Multiply", "Softmax"),
    ]


def test_no_value_is_converted_there_and_back() -> None:
    model = transformer_block()
    matmuls_in_bf16(model)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == ov.Type.bf16:
            assert node.input_value(0).get_node().get_type_name() != "Convert"


def test_the_boundary_stays_fp32_and_results_stay_near() -> None:
    plain, mixed = transformer_block(), transformer_block()
    # The same weights in both.
    for a, b in zip(
        *(
            [n for n in m.get_ordered_ops() if n.get_type_name() == "Constant"]
            for m in (plain, mixed)
        ),
        strict=True,
    ):
        b.output(0).replace(ops.constant(a.data).output(0))
    matmuls_in_bf16(mixed)
    assert mixed.inputs[0].get_element_type() == mixed.outputs[0].get_element_type() == ov.Type.f32
    core = ov.Core()
    x = RNG.standard_normal((1, 12, 16)).astype(np.float32)
    said = [
        core.compile_model(m, "CPU", {"INFERENCE_PRECISION_HINT": hint})(x)[0]
        for m, hint in ((plain, "f32"), (mixed, "dynamic"))
    ]
    assert np.abs(said[0] - said[1]).max() < 0.02 * np.abs(said[0]).max()


def test_a_result_used_by_both_kinds_is_given_to_both() -> None:
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    matmul = ops.matmul(x, weight(8, 8), False, False)
    wide = ops.exp(matmul)
    narrow = ops.softmax(matmul, 2)
    model = ov.Model([ops.result(wide), ops.result(narrow)], [x], "fork")
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.f32) == ["Exp"]
    assert kinds(model, ov.Type.bf16) == ["MatMul", "Softmax"]
    assert [o.get_element_type() for o in model.outputs] == [ov.Type.f32] * 2


@pytest.mark.parametrize("kind", ["Add", "Multiply"])
def test_an_operator_with_an_exact_operand_stays_fp32(kind: str) -> None:
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    matmul = ops.matmul(x, weight(8, 8), False, False)
    make = {"Add": ops.add, "Multiply": ops.multiply}[kind]
    model = ov.Model([ops.result(make(matmul, x))], [x], "operand")
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.f32) == [kind]


def test_a_graph_without_products_is_left_alone() -> None:
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    model = ov.Model([ops.result(ops.softmax(ops.add(x, weight(8)), 2))], [x], "plain")
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.f32) == ["Add", "Softmax"]
    assert not any(n.get_type_name() == "Convert" for n in model.get_ordered_ops())


def test_values_are_converted_before_they_are_moved() -> None:
    """Half as many bytes are moved, and moves are not mixed with conversions."""
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    wide = ops.exp(x)
    moved = ops.transpose(ops.reshape(wide, np.array([1, 4, 2, 4]), False), np.array([0, 2, 1, 3]))
    model = ov.Model([ops.result(ops.matmul(moved, moved, False, True))], [x], "moves")
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.bf16) == ["MatMul"]
    single = ops.transpose(ops.reshape(ops.exp(x), np.array([1, 4, 2, 4]), False), [0, 2, 1, 3])
    model = ov.Model([ops.result(ops.matmul(single, weight(4, 4), False, False))], [x], "moves")
    matmuls_in_bf16(model)
    assert kinds(model, ov.Type.bf16) == ["MatMul", "Reshape", "Transpose"]
    assert kinds(model, ov.Type.f32) == ["Exp"]


@pytest.mark.parametrize(
    ("name", "exact_in"),
    [
        ("patch/Conv_0", {FIRST_BLOCKS}),
        ("project2/MatMul_0", {FIRST_BLOCKS}),
        ("blocks.0.attention.v/MatMul_0", {FIRST_BLOCKS}),
        ("blocks.1.fc2/MatMul_0", {FIRST_BLOCKS}),
        ("up0_second/MatMul_0", {FIRST_BLOCKS}),
        ("blocks.10.attention.v/MatMul_0", set()),
        ("blocks.2.attention.out/MatMul_0", set()),
        ("trunk.stages.2.1.linear_attention/MatMul_0", {FRAGILE, FIRST_BLOCKS}),
        ("trunk.blocks.7.mixer/Conv_0", {FRAGILE, FIRST_BLOCKS}),
        ("trunk.blocks.7.widen/Conv_0", set()),
        ("trunk.stages.2.1.project/Conv_0", set()),
    ],
)
def test_what_stays_exact_in_an_encoder(name: str, exact_in: set[re.Pattern[str]]) -> None:
    for exact in (NOTHING, FRAGILE, FIRST_BLOCKS):
        assert stays_exact(name, exact) == (exact in exact_in)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("positions/MatMul_0", True),
        ("blocks.0.self_attention.q/MatMul_0", True),
        ("blocks.1.mlp.0/MatMul_0", True),
        ("hyper.0/MatMul_0", True),
        ("graph/MatMul_0", False),
        ("iou_head.0/MatMul_0", True),
        ("blocks.0.token_to_image/MatMul_1", False),
        ("blocks.11.image_to_token/MatMul_4", False),
        ("final/MatMul_2", False),
        ("up1/MatMul_0", False),
        ("up2/MatMul_0", False),
    ],
)
def test_what_stays_exact_in_a_decoder(name: str, exact: bool) -> None:
    assert stays_exact(name, TOKENS) == exact


def stays_exact(name: str, exact: re.Pattern[str]) -> bool:
    """Whether a matmul of that name is left in FP32."""
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    matmul = ops.matmul(x, weight(8, 8), False, False)
    matmul.set_friendly_name(name)
    model = ov.Model([ops.result(matmul)], [x], "named")
    matmuls_in_bf16(model, exact)
    return kinds(model, ov.Type.f32) == ["MatMul"]


@pytest.mark.parametrize(
    ("graph", "where"),
    [
        *(("encoder", name) for name in ("patch", "blocks.0.", "blocks.1.", "project", "up")),
        *(("decoder", f"blocks.0.{name}") for name in ("token_to_image", "image_to_token")),
        *(("decoder", name) for name in ("final", "up1/", "up2/", "positions", "hyper", "graph/")),
    ],
)
def test_exports_have_the_modules_that_recipes_name(
    small_bundle: Path, graph: str, where: str
) -> None:
    """Names are all there is to find them by: were they to change, the recipe would lose them."""
    model = ov.Core().read_model(small_bundle / f"{graph}.onnx")
    matmuls = [n for n in model.get_ordered_ops() if n.get_type_name() in ("MatMul", "Convolution")]
    found = [n.get_friendly_name() for n in matmuls if n.get_friendly_name().startswith(where)]
    assert 0 < len(found) < len(matmuls)


def as_float(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Values of BF16 numbers, given as their bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of(constant: Any) -> NDArray[np.uint16]:
    """BF16 numbers of a constant, as their bits."""
    assert constant.get_output_element_type(0) == ov.Type.bf16
    bits: NDArray[np.uint16] = constant.data.view(np.uint16)
    return bits


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_constants_are_rounded_to_the_nearest_of_two_the_even(values: NDArray[np.float32]) -> None:
    bits = bits_of(rounded_constant(values))
    assert bits.shape == values.shape
    near = as_float(bits)
    exact = values.astype(np.float64)
    # The next BF16 numbers either way; infinity stands for 2^128, as it does in rounding.
    sides = [as_float((bits.astype(np.int32) + step).astype(np.uint16)) for step in (-1, 1)]
    for side in sides:
        usable = ~np.isnan(side) & (np.signbit(side) == np.signbit(values))
        error, other = (
            np.abs(
                np.clip(np.where(usable, v, 0).astype(np.float64), -(2.0**128), 2.0**128) - exact
            )
            for v in (near, side)
        )
        assert (error <= other)[usable].all()
        ties = usable & (error == other) & (error > 0)
        assert (bits[ties] % 2 == 0).all()


def test_infinity_and_nan_stay_what_they_are() -> None:
    nan = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(as_float(bits_of(rounded_constant(nan)))).all()
    infinite = np.array([np.inf, -np.inf], np.float32)
    assert np.array_equal(as_float(bits_of(rounded_constant(infinite))), infinite)


def test_values_that_are_not_contiguous_are_rounded_like_others() -> None:
    values = RNG.standard_normal((6, 8)).astype(np.float32)
    part = bits_of(rounded_constant(values[:, 2:5]))
    assert np.array_equal(part, bits_of(rounded_constant(values))[:, 2:5])


def test_weights_are_rounded_and_not_left_to_be_converted() -> None:
    """OpenVINO's own conversion of constants cuts off what should be rounded up."""
    values = RNG.standard_normal((8, 8)).astype(np.float32)
    x = ops.parameter([1, 4, 8], np.float32, name="x")
    model = ov.Model([ops.result(ops.matmul(x, ops.constant(values), False, False))], [x], "one")
    matmuls_in_bf16(model)
    (matmul,) = [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]
    weights = matmul.input_value(1).get_node()
    assert weights.get_type_name() == "Constant"
    assert np.array_equal(bits_of(weights), bits_of(rounded_constant(values)))


def over_an_image(positions: int = 20, channels: int = 8) -> ov.Model:
    """Tokens and an image of 20 that attend to each other, as a decoder's do; sums over both."""
    image = ops.parameter([-1, 20, channels], np.float32, name="image")
    tokens = ops.parameter([-1, -1, channels], np.float32, name="tokens")
    table = ops.sin(ops.constant(RNG.standard_normal((1, positions, channels)).astype(np.float32)))
    placed = ops.add(image, table)
    projected = ops.matmul(tokens, weight(channels, channels), False, False)
    projected.set_friendly_name("mlp/MatMul_0")
    scores = ops.softmax(ops.matmul(placed, projected, False, True), 2)
    image_after = ops.add(image, ops.matmul(scores, projected, False, False))
    normal = ops.mvn(image_after, ops.constant(np.array([2])), True, 1e-5, "INSIDE_SQRT")
    scaled = ops.multiply(normal, weight(channels))
    learned = ops.matmul(scores, scaled, True, False)
    learned.set_friendly_name("final/MatMul_0")
    total = ops.add(tokens, learned)
    total.set_friendly_name("graph/Add_0")
    return ov.Model([ops.result(total), ops.result(scaled)], [image, tokens], "decoder")


def test_all_that_runs_over_the_image_becomes_bf16_and_tokens_stay_exact() -> None:
    model = over_an_image()
    matmuls_in_bf16(model, TOKENS, tokens=20)
    assert kinds(model, ov.Type.f32) == ["Add", "MatMul"]
    wide = {n.get_friendly_name() for n in model.get_ordered_ops()}
    assert {"graph/Add_0", "mlp/MatMul_0"} <= wide
    narrow = ["Add", "Add", "MVN", "MatMul", "MatMul", "MatMul", "Multiply", "Softmax"]
    assert kinds(model, ov.Type.bf16) == narrow
    assert [o.get_element_type() for o in model.outputs] == [ov.Type.f32] * 2


def test_the_image_of_a_model_without_tokens_stays_exact() -> None:
    model = over_an_image()
    matmuls_in_bf16(model, TOKENS)
    assert kinds(model, ov.Type.bf16) == ["MatMul"]


def test_an_image_with_as_many_tokens_as_channels_is_not_told_from_them() -> None:
    model = over_an_image(channels=20)
    matmuls_in_bf16(model, TOKENS, tokens=20)
    assert kinds(model, ov.Type.bf16) == ["MatMul"]


@pytest.mark.parametrize("enlarged", [1, 4, 16])
def test_the_enlarged_image_counts_as_well(enlarged: int) -> None:
    x = ops.parameter([-1, 20 * enlarged, 8], np.float32, name="x")
    model = ov.Model([ops.result(ops.add(x, weight(8)))], [x], "enlarged")
    matmuls_in_bf16(model, TOKENS, tokens=20)
    assert kinds(model, ov.Type.bf16) == ["Add"]


def test_positions_are_computed_before_they_are_rounded() -> None:
    """OpenVINO's own conversion of what it computes from constants would cut half of them off."""
    model = over_an_image()
    (table,) = [n for n in model.get_ordered_ops() if n.get_type_name() == "Sin"]
    expected = np.sin(table.input_value(0).get_node().data)
    matmuls_in_bf16(model, TOKENS, tokens=20)
    assert not any(n.get_type_name() == "Sin" for n in model.get_ordered_ops())
    first = next(n for n in model.get_ordered_ops() if n.get_type_name() == "Add")
    sources = [first.input_value(i).get_node() for i in (0, 1)]
    (constant,) = [n for n in sources if n.get_type_name() == "Constant"]
    np.testing.assert_allclose(as_float(bits_of(constant)), expected, rtol=2**-8)
    assert np.array_equal(bits_of(constant), bits_of(rounded_constant(expected)))


@pytest.mark.parametrize(
    ("graph", "exact", "tokens"), [("encoder", NOTHING, None), ("decoder", TOKENS, 72 * 72)]
)
def test_no_constant_of_an_export_is_left_to_be_converted(
    small_bundle: Path, graph: str, exact: re.Pattern[str], tokens: int | None
) -> None:
    model = ov.Core().read_model(small_bundle / f"{graph}.onnx")
    matmuls_in_bf16(model, exact, tokens)
    narrowing = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Convert" and node.get_output_element_type(0) == ov.Type.bf16
    ]
    assert narrowing
    for node in narrowing:
        assert not comes_from_constants_alone(node), node.get_friendly_name()


def comes_from_constants_alone(node: Any) -> bool:
    """Whether nothing that goes into a value depends on an input."""
    seen: set[str] = set()
    todo = [node]
    while todo:
        found = todo.pop()
        if found.get_type_name() == "Parameter":
            return False
        if found.get_name() not in seen:
            seen.add(found.get_name())
            todo += [source.get_node() for source in found.input_values()]
    return True


def test_rotary_embeddings_of_exported_encoders_are_fused(small_bundle: Path) -> None:
    """The export writes them as OpenVINO recognizes them; else each takes four passes."""
    core = ov.Core()
    model = core.read_model(small_bundle / "encoder.onnx")
    blocks = {n.get_friendly_name().split("/")[0] for n in model.get_ordered_ops()}
    attentions = [name for name in blocks if name.endswith(".attention")]
    model.reshape([1, *(side.get_length() for side in model.inputs[0].get_partial_shape()[1:])])
    run = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    kinds_run = [node.get_rt_info()["layerType"].astype(str) for node in run.get_ordered_ops()]
    assert kinds_run.count("RoPE") == 2 * len(attentions) > 0
