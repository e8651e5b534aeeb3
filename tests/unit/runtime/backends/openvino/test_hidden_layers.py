"""Tests of `sam3rt.backends.openvino.hidden_layers`, on graphs written here and an exported one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from sam3rt.backends.openvino.bf16 import matmuls_in_bf16, rounded_constant
from sam3rt.backends.openvino.hidden_layers import split_hidden_layers

RNG = np.random.default_rng(0)


def weight(*shape: int) -> Any:
    """A constant of normal values that BF16 has, scaled for matmuls along its first side."""
    values = (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    return ops.constant((values.view(np.uint32) & 0xFFFF0000).view(np.float32))


def gelu(x: Any, root: float = np.sqrt(2.0), one: float = 1.0, half: float = 0.5) -> Any:
    """The five operators that exports have."""
    erf = ops.erf(ops.divide(x, ops.constant(np.float32(root))))
    return ops.multiply(
        ops.multiply(x, ops.add(erf, ops.constant(np.float32(one)))),
        ops.constant(np.float32(half)),
    )


def mlp(hidden: int, activation: Any = gelu, transposed: bool = False) -> ov.Model:
    """x + W2 activation(W1 x + b1) + b2 of 16 channels."""
    x = ops.parameter([1, 12, 16], np.float32, name="x")
    first = (
        ops.matmul(x, weight(hidden, 16), False, True)
        if transposed
        else ops.matmul(x, weight(16, hidden), False, False)
    )
    first.set_friendly_name("fc1/MatMul")
    second = ops.matmul(
        activation(ops.add(first, weight(hidden))), weight(hidden, 16), False, False
    )
    second.set_friendly_name("fc2/MatMul")
    total = ops.add(x, ops.add(second, weight(16)))
    total.set_friendly_name("total")
    return ov.Model([ops.result(total)], [x], "mlp")


def matmuls(model: ov.Model) -> dict[str, list[int]]:
    """Shapes of the matmuls' results, by name."""
    return {
        node.get_friendly_name(): list(node.get_output_shape(0))
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul"
    }


def run(model: ov.Model, x: Any, hint: str = "f32") -> Any:
    """What OpenVINO computes."""
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})(x)[0]


@pytest.mark.parametrize(
    ("hidden", "width", "widths"),
    [
        (64, 64, [64]),
        (64, 63, [32, 32]),
        (64, 16, [16, 16, 16, 16]),
        (50, 16, [13, 13, 12, 12]),
        (7, 1, [1] * 7),
        # Whole multiples of 64 where the layer is one.
        (320, 128, [128, 128, 64]),
        (320, 200, [192, 128]),
        (320, 60, [54, 54, 53, 53, 53, 53]),
        (4736, 640, [640, 640, *[576] * 6]),
    ],
)
def test_layers_come_in_parts_no_wider_than_asked(
    hidden: int, width: int, widths: list[int]
) -> None:
    model = mlp(hidden)
    x = RNG.standard_normal((1, 12, 16)).astype(np.float32)
    expected = run(model, x)
    assert split_hidden_layers(model, width) == (len(widths) > 1)
    found = matmuls(model)
    assert [shape[2] for name, shape in found.items() if name.startswith("fc1")] == widths
    assert [shape[2] for name, shape in found.items() if name.startswith("fc2")] == [16] * len(
        widths
    )
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_the_last_sum_keeps_its_name() -> None:
    model = mlp(32)
    split_hidden_layers(model, 8)
    result = model.get_results()[0].input_value(0).get_node()
    assert result.get_friendly_name() == "total"


@pytest.mark.parametrize(
    "activation",
    [
        ops.relu,
        lambda x: gelu(x, root=1.5),
        lambda x: gelu(x, one=2.0),
        lambda x: gelu(x, half=1.0),
    ],
    ids=["ReLU", "another root", "another one", "another half"],
)
def test_other_activations_are_left_alone(activation: Any) -> None:
    model = mlp(32, activation)
    before = matmuls(model)
    assert split_hidden_layers(model, 8) == 0
    assert matmuls(model) == before


def test_transposed_weights_are_left_alone() -> None:
    model = mlp(32, transposed=True)
    assert split_hidden_layers(model, 8) == 0


def test_layers_that_follow_each_other_are_split_each() -> None:
    x = ops.parameter([1, 12, 16], np.float32, name="x")
    stream: Any = x
    for _ in range(3):
        hidden = gelu(ops.add(ops.matmul(stream, weight(16, 32), False, False), weight(32)))
        share = ops.add(ops.matmul(hidden, weight(32, 16), False, False), weight(16))
        stream = ops.add(stream, share)
    model = ov.Model([ops.result(stream)], [x], "three")
    image = RNG.standard_normal((1, 12, 16)).astype(np.float32)
    expected = run(model, image)
    assert split_hidden_layers(model, 16) == 3
    assert len(matmuls(model)) == 12
    np.testing.assert_allclose(run(model, image), expected, rtol=1e-4, atol=1e-4)


def test_parts_are_added_in_fp32_where_products_are_bf16() -> None:
    """Biases and GELU go with the matmuls; the stream does not."""
    model = mlp(32)
    split_hidden_layers(model, 8)
    matmuls_in_bf16(model)
    typed: dict[tuple[str, str], int] = {}
    for node in model.get_ordered_ops():
        kind = (node.get_type_name(), node.get_output_element_type(0).get_type_name())
        typed[kind] = typed.get(kind, 0) + 1
    assert typed["MatMul", "bf16"] == 8
    assert typed["Gelu", "bf16"] == 4
    assert typed["Add", "bf16"] == 5  # four parts' first biases, the second bias once
    assert typed["Add", "f32"] == 4
    assert ("MatMul", "f32") not in typed


def test_layers_that_stay_exact_are_left_alone() -> None:
    model = mlp(32)
    before = matmuls(model)
    for name in ("fc1", "fc2"):
        assert split_hidden_layers(model, 8, re.compile(name)) == 0
    assert matmuls(model) == before
    assert split_hidden_layers(model, 8, re.compile("c1")) == 1


def test_weights_of_parts_are_rounded() -> None:
    model = mlp(32)
    values = RNG.standard_normal((16, 32)).astype(np.float32)
    (first,) = [n for n in model.get_ordered_ops() if n.get_friendly_name() == "fc1/MatMul"]
    first.input(1).replace_source_output(ops.constant(values).output(0))
    split_hidden_layers(model, 16)
    matmuls_in_bf16(model)
    found = [
        node.input_value(1).get_node()
        for node in model.get_ordered_ops()
        if node.get_friendly_name().startswith("fc1/MatMul") and node.get_type_name() == "MatMul"
    ]
    assert [n.get_type_name() for n in found] == ["Constant"] * 2
    expected = rounded_constant(values).data.view(np.uint16)
    assert np.array_equal(np.hstack([n.data.view(np.uint16) for n in found]), expected)


def test_exported_encoders_have_such_layers(small_bundle: Path) -> None:
    """Were the export to write them otherwise, they would not be found."""
    model = ov.Core().read_model(small_bundle / "encoder.onnx")
    modules = {n.get_friendly_name().split("/")[0] for n in model.get_ordered_ops()}
    layers = [name for name in modules if name.endswith(".fc1")]
    assert split_hidden_layers(model, 8) == len(layers) > 0
