"""Folded operators against the operators they replace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.export_helpers import relative, rope, rotate
from torch import Tensor
from torch.nn import functional as F

from sam3rt_export.graphs import folding

channels = st.integers(1, 9)
sides = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)
modest = settings(deadline=None, max_examples=40)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@modest
@given(channels, channels, channels, st.integers(1, 3), st.integers(1, 3), sides, sides, seeds)
def test_pointwise_after_conv_equals_the_two_convolutions(
    inputs: int, middle: int, outputs: int, kh: int, kw: int, height: int, width: int, seed: int
) -> None:
    weight, bias, outer, outer_bias, x = draw(
        seed,
        (middle, inputs, kh, kw),
        (middle,),
        (outputs, middle, 1, 1),
        (outputs,),
        (2, inputs, height + kh, width + kw),
    )
    merged, merged_bias = folding.pointwise_after_conv(weight, bias, outer, outer_bias)
    assert merged.dtype == merged_bias.dtype == torch.float32
    inner = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    expected = F.conv2d(inner, outer.double(), outer_bias.double())
    actual = F.conv2d(x.double(), merged.double(), merged_bias.double(), padding=1)
    assert relative(actual, expected) < 1e-5


@modest
@given(channels, channels, channels, st.integers(1, 3), sides, sides, seeds)
def test_pointwise_after_transposed_equals_the_two_convolutions(
    inputs: int, middle: int, outputs: int, kernel: int, height: int, width: int, seed: int
) -> None:
    weight, bias, outer, outer_bias, x = draw(
        seed,
        (inputs, middle, kernel, kernel),
        (middle,),
        (outputs, middle, 1, 1),
        (outputs,),
        (2, inputs, height, width),
    )
    merged, merged_bias = folding.pointwise_after_transposed(weight, bias, outer, outer_bias)
    assert merged.dtype == merged_bias.dtype == torch.float32
    inner = F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2)
    expected = F.conv2d(inner, outer.double(), outer_bias.double())
    actual = F.conv_transpose2d(x.double(), merged.double(), merged_bias.double(), stride=2)
    assert relative(actual, expected) < 1e-5


def test_folding_costs_one_rounding_of_the_folded_weight() -> None:
    weight, bias, outer, outer_bias = draw(0, (256, 8, 3, 3), (256,), (4, 256, 1, 1), (4,))
    merged, merged_bias = folding.pointwise_after_conv(weight, bias, outer, outer_bias)
    exact = torch.tensordot(outer.double()[:, :, 0, 0], weight.double(), dims=1)
    assert ((merged - exact).abs() <= exact.abs() * 2**-23).all()
    exact_bias = outer.double()[:, :, 0, 0] @ bias.double() + outer_bias.double()
    assert ((merged_bias - exact_bias).abs() <= exact_bias.abs() * 2**-23).all()


@modest
@given(channels, channels, sides, sides, seeds)
def test_transposed_2x2_is_one_product_per_pixel(
    inputs: int, outputs: int, height: int, width: int, seed: int
) -> None:
    weight, bias, x = draw(seed, (inputs, outputs, 2, 2), (outputs,), (2, inputs, height, width))
    matrix, matrix_bias = folding.transposed_2x2_as_matrix(weight, bias)
    assert matrix.shape == (inputs, 4 * outputs)
    cells = x.permute(0, 2, 3, 1).double() @ matrix.double() + matrix_bias.double()
    cells = cells.reshape(2, height, width, 2, 2, outputs).permute(0, 5, 1, 3, 2, 4)
    expected = F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2)
    assert relative(cells.reshape(expected.shape), expected) < 1e-12


@modest
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), sides, seeds)
def test_halves_give_the_dot_products_of_the_complex_rotation(
    heads: int, quarter: int, side: int, width: int, seed: int
) -> None:
    head_dim = 4 * quarter
    rows = heads * head_dim
    q, k, q_bias, k_bias, x = draw(
        seed, (rows, width), (rows, width), (rows,), (rows,), (side * side, width)
    )
    table = rope(side, head_dim, 0.7).to(torch.complex128)

    def scores(turn: Callable[[Tensor], Tensor], *weights: Tensor) -> Tensor:
        wq, wk, bq, bk = (w.double() for w in weights)
        turned = [
            turn((x.double() @ w.T + b).reshape(-1, heads, head_dim).transpose(0, 1))
            for w, b in ((wq, bq), (wk, bk))
        ]
        return turned[0] @ turned[1].transpose(1, 2)

    def turn_halves(v: Tensor) -> Tensor:
        real, imaginary = v.chunk(2, dim=-1)
        cos, sin = table.real, table.imag
        return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)

    expected = scores(lambda v: rotate(v, table), q, k, q_bias, k_bias)
    halved = [folding.rope_halves(w, head_dim) for w in (q, k, q_bias, k_bias)]
    assert relative(scores(turn_halves, *halved), expected) < 1e-12


@modest
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([(), (3,), (2, 3)]))
def test_halves_permute_rows_within_each_head(heads: int, half: int, rest: tuple[int, ...]) -> None:
    head_dim = 2 * half
    rows = torch.arange(heads * head_dim).reshape(-1, *(1 for _ in rest)).expand(-1, *rest)
    result = folding.rope_halves(rows, head_dim)
    assert result.shape == rows.shape
    first = result.reshape(heads * head_dim, -1)[:, 0].reshape(heads, head_dim)
    for head in range(heads):
        start = head * head_dim
        evens = list(range(start, start + head_dim, 2))
        assert first[head].tolist() == evens + [even + 1 for even in evens]
