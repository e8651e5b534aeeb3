"""Simulated recipes: roundings that really happen, and what large activations do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.support.build_helpers import (
    RememberingBackend,
    edited_bundle,
    first_cases,
    run_onnx,
    scale_weight,
    toy_graph,
)

from sam3rt.accuracy.gate import GATE_LIMITS, Verdict, judge
from sam3rt.accuracy.record import ParityRecord, load_record
from sam3rt.accuracy.run import rerecord, verify
from sam3rt.accuracy.verdicts import StoredVerdict
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.geometry import preprocess
from sam3rt.loading import load_model
from sam3rt_build.errors import RecipeError
from sam3rt_build.graph_files import load_graph, mark_layers, save_graph
from sam3rt_build.recipes import RECIPES, Recipe, recipe_named
from sam3rt_build.simulated import SimulatedBackend, simulate

Array = NDArray[np.float32]
# What rounds between the matmuls as well.
NARROW = ("fp16-activations", "fp16-half-sums")


def rounded(array: Array, recipe: str = "fp16") -> Array:
    """As NumPy rounds it."""
    return to_tf32(array) if recipe == "tf32" else array.astype(np.float16).astype(np.float32)


def to_tf32(array: Array) -> Array:
    """The nearest number of 11 significant bits, ties to even, by the bits of FP32."""
    bits = array.view(np.uint32)
    kept = (bits + np.uint32(0xFFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return kept.view(np.float32)


def simulated(model: ir.Model, recipe: str, folder: Path) -> Path:
    simulate(model, recipe_named(recipe), "float32")
    path = folder / "simulated.onnx"
    save_graph(model, path)
    return path


def between_1_and_2(seed: int, *shape: int) -> Array:
    """Numbers whose products, once rounded to 11 bits, add up exactly in FP32, four at a time."""
    rng = np.random.default_rng(seed)
    return (1.0 + rng.random(shape, np.float32)).astype(np.float32)


# --- one operator at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp16", *NARROW, "tf32"])
def test_a_matrix_product_rounds_its_factors_and_its_result(recipe: str, tmp_path: Path) -> None:
    x, w = between_1_and_2(0, 16, 4), between_1_and_2(1, 4, 8)
    model = toy_graph([("MatMul", ["x", "w"], "blocks.0.fc1")], {"x": x.shape}, {"w": w})
    found = run_onnx(simulated(model, recipe, tmp_path), {"x": x})["y"]
    product = rounded(x, recipe) @ rounded(w, recipe)
    # Tensor cores yield FP32 from TF32 factors.
    expected = product if recipe == "tf32" else rounded(product, recipe)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, x @ w)
    assert (recipe == "tf32") == (not np.array_equal(found, rounded(found, recipe)))


@pytest.mark.parametrize("recipe", ["fp16", *NARROW, "tf32", "fp32"])
def test_a_sum_rounds_what_it_adds_and_the_result(recipe: str, tmp_path: Path) -> None:
    x, b = between_1_and_2(2, 16, 4), between_1_and_2(3, 4)
    model = toy_graph([("Add", ["x", "b"], "blocks.0.fc1")], {"x": x.shape}, {"b": b})
    found = run_onnx(simulated(model, recipe, tmp_path), {"x": x})["y"]
    if recipe in NARROW:
        assert np.array_equal(found, rounded(rounded(x, recipe) + rounded(b, recipe), recipe))
    assert np.array_equal(found, x + b) == (recipe not in NARROW)


@pytest.mark.parametrize("scope", ["iou_head.0", "object_head.2", "single_mask"])
def test_what_a_rule_keeps_is_not_rounded(scope: str, tmp_path: Path) -> None:
    x, w = between_1_and_2(4, 16, 4), between_1_and_2(5, 4, 8)
    model = toy_graph([("MatMul", ["x", "w"], scope)], {"x": x.shape}, {"w": w})
    found = run_onnx(simulated(model, "fp16-half-sums", tmp_path), {"x": x})["y"]
    assert np.array_equal(found, x @ w)


def softmax(array: Array) -> NDArray[np.float64]:
    exponentials = np.exp(array.astype(np.float64) - array.max(-1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / exponentials.sum(-1, keepdims=True)
    return shares


def normalized(array: Array) -> NDArray[np.float64]:
    wide = array.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    shifted: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return shifted


@pytest.mark.parametrize("recipe", ["fp16", *NARROW])
@pytest.mark.parametrize(
    ("operator", "given", "plain"),
    [
        ("Softmax", ["v0"], softmax),
        ("LayerNormalization", ["v0", "ones", "zeros"], normalized),
    ],
)
def test_softmax_and_normalization_read_rounded_values_and_round_nothing(
    recipe: str,
    operator: str,
    given: list[str],
    plain: Callable[[Array], NDArray[np.float64]],
    tmp_path: Path,
) -> None:
    x, w = between_1_and_2(6, 16, 4), between_1_and_2(7, 4, 8)
    model = toy_graph(
        [("MatMul", ["x", "w"], "blocks.0.fc1"), (operator, given, "blocks.0")],
        {"x": x.shape},
        {"w": w, "ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32)},
        axis=-1,
    )
    found = run_onnx(simulated(model, recipe, tmp_path), {"x": x})["y"]
    product = rounded(rounded(x, recipe) @ rounded(w, recipe), recipe)
    assert np.allclose(found, plain(product), rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, plain(x @ w), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(found, rounded(found, recipe))


@pytest.mark.parametrize("recipe", ["fp16", *NARROW])
def test_an_attention_core_rounds_where_types_change(recipe: str, tmp_path: Path) -> None:
    """Scores narrow, softmax FP32, mixing narrow; the core's recipe rounds factors to TF32 only."""
    q, k, v = between_1_and_2(8, 6, 4), between_1_and_2(9, 4, 6), between_1_and_2(10, 6, 4)
    nodes = [
        ("MatMul", ["q", "k"], "blocks.0.attention"),
        ("Softmax", ["v0"], "blocks.0.attention"),
        ("MatMul", ["v1", "v"], "blocks.0.attention"),
    ]
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
    inputs = {"q": q, "k": k, "v": v}
    found = run_onnx(simulated(toy_graph(nodes, shapes, {}, axis=-1), recipe, tmp_path), inputs)
    scores = rounded(rounded(q, recipe) @ rounded(k, recipe), recipe)
    shares = rounded(softmax(scores).astype(np.float32), recipe)
    exact = shares.astype(np.float64) @ rounded(v, recipe).astype(np.float64)
    step = 2.0**-10  # spacing between 1 and 2
    assert np.array_equal(found["y"], rounded(found["y"], recipe))
    assert np.abs(found["y"] - exact).max() < 0.51 * step
    whole = toy_graph(nodes, shapes, {}, axis=-1)
    found = run_onnx(simulated(whole, "fp16-attention-tf32", tmp_path), inputs)
    scores = to_tf32(q) @ to_tf32(k)
    shares = to_tf32(softmax(scores).astype(np.float32))
    assert np.allclose(found["y"], shares @ to_tf32(v), rtol=1e-5)
    assert not np.array_equal(found["y"], rounded(found["y"], recipe))


def test_a_value_used_twice_is_rounded_once_and_rounding_again_changes_nothing(
    tmp_path: Path,
) -> None:
    x, w = between_1_and_2(11, 16, 4), between_1_and_2(12, 4, 4)
    nodes = [
        ("MatMul", ["x", "w"], "blocks.0.fc1"),
        ("Relu", ["v0"], "blocks.0"),
        ("Add", ["v1", "x"], "blocks.0"),
    ]
    model = toy_graph(nodes, {"x": x.shape}, {"w": w})
    path = simulated(model, "fp16-activations", tmp_path)
    casts = [node.input[0] for node in onnx.load(path).graph.node if node.op_type == "Cast"]
    # x, and what each of the three operators yields; down and up.
    assert len(casts) == 8
    assert casts.count("x") == 1
    again = run_onnx(path, {"x": rounded(x, "fp16")})["y"]
    assert np.array_equal(run_onnx(path, {"x": x})["y"], again)


@pytest.mark.parametrize("recipe", ["fp16", "fp16-activations", "tf32"])
def test_onnx_runtime_optimizes_no_rounding_away(recipe: str, tmp_path: Path) -> None:
    """It drops casts between operators that it computes in FP32 if it may."""
    x = between_1_and_2(13, 16, 8)
    weights = {f"w{i}": between_1_and_2(20 + i, 8, 8) / np.float32(8) for i in range(4)}
    weights |= {f"b{i}": between_1_and_2(30 + i, 8) for i in range(4)}
    nodes = []
    for i in range(4):
        before = f"v{3 * i - 1}" if i else "x"
        nodes.append(("MatMul", [before, f"w{i}"], f"blocks.{i}.fc1"))
        nodes.append(("Add", [f"v{3 * i}", f"b{i}"], f"blocks.{i}.fc1"))
        nodes.append(("Mul", [f"v{3 * i + 1}", "x"], f"blocks.{i}"))
    path = simulated(toy_graph(nodes, {"x": x.shape}, weights), recipe, tmp_path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (plain,) = session.run(None, {"x": x})
    optimized = run_onnx(path, {"x": x})["y"]
    exact = x
    for i in range(4):
        exact = (exact @ weights[f"w{i}"] + weights[f"b{i}"]) * x
    error = np.abs(plain - exact).max()
    assert error > 0
    assert np.abs(optimized - plain).max() < 0.05 * error
    if recipe in NARROW:
        assert np.array_equal(optimized, rounded(optimized, recipe))


# --- half accumulators ---------------------------------------------------------------------------


def half_sums(a: Array, b: Array) -> Array:
    """A product as tensor cores add it up in FP16: 16 exact products, one rounding."""
    a, b = rounded(a), rounded(b)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    for start in range(0, a.shape[-1], 16):
        step = slice(start, start + 16)
        total = rounded(total + a[..., step] @ b[step])
    return total


@pytest.mark.parametrize("inner", [1, 5, 16, 17, 32, 100])
def test_half_sums_are_rounded_after_every_sixteen_products(inner: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(inner)
    x = rng.integers(-64, 64, (2, 6, inner)).astype(np.float32)  # products that FP32 adds exactly
    w = rng.integers(-64, 64, (inner, 5)).astype(np.float32)
    model = toy_graph([("MatMul", ["x", "w"], "blocks.0.fc1")], {"x": (2, "n", inner)}, {"w": w})
    found = run_onnx(simulated(model, "fp16-half-sums", tmp_path), {"x": x})["y"]
    assert np.array_equal(found, half_sums(x, w))


def test_half_sums_lose_what_fp32_sums_keep(tmp_path: Path) -> None:
    """As many shares as the published SAM 3 has keys in a global block."""
    x, w = np.full((1, 5184), 0.26, np.float32), np.ones((5184, 1), np.float32)
    outcomes = {}
    for recipe in ("fp16", "fp16-half-sums"):
        nodes = [("MatMul", ["x", "w"], "blocks.0.fc1")]
        model = toy_graph(nodes, {"x": x.shape}, {"w": w})
        outcomes[recipe] = run_onnx(simulated(model, recipe, tmp_path), {"x": x})["y"].item()
    exact = 5184 * float(np.float16(0.26))
    assert abs(outcomes["fp16"] - exact) <= 0.5  # half the spacing of FP16 there
    assert abs(outcomes["fp16-half-sums"] - exact) > 5


def test_a_loop_keeps_the_name_of_an_output(tmp_path: Path) -> None:
    x, w = between_1_and_2(14, 4, 40), between_1_and_2(15, 40, 3)
    model = toy_graph([("MatMul", ["x", "w"], "blocks.0.fc1")], {"x": x.shape}, {"w": w})
    path = simulated(model, "fp16-half-sums", tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    assert [value.name for value in onnx.load(path).graph.output] == ["y"]


# --- TF32 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tf32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Array], Array]:
    """A product with one, which yields its rounded factor."""
    model = toy_graph(
        [("MatMul", ["x", "one"], "blocks.0.fc1")],
        {"x": ("n", 1)},
        {"one": np.ones((1, 1), np.float32)},
    )
    path = simulated(model, "tf32", tmp_path_factory.mktemp("tf32"))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(array: Array) -> Array:
        (found,) = session.run(None, {"x": array[:, None]})
        flat: Array = found[:, 0]
        return flat

    return run


def numbers() -> st.SearchStrategy[Array]:
    """FP32 numbers that are neither subnormal nor so large that a product with 8193 overflows."""
    sizes = st.floats(2.0**-100, 2.0**100, width=32)
    return hnp.arrays(np.float32, st.integers(1, 64), elements=sizes | sizes.map(lambda x: -x))


@given(array=numbers())
@settings(deadline=None, max_examples=200)
def test_tf32_keeps_eleven_bits_and_takes_the_nearest(
    tf32: Callable[[Array], Array], array: Array
) -> None:
    found = tf32(array)
    assert np.all(found.view(np.uint32) & 0x1FFF == 0)
    tie = (array.view(np.uint32) & 0x1FFF) == 0x1000
    expected = to_tf32(array)
    assert np.array_equal(found[~tie], expected[~tie])
    # Halfway between two, either is nearest.
    distance = np.abs(found.astype(np.float64) - array)
    assert np.array_equal(distance, np.abs(expected.astype(np.float64) - array))
    assert np.array_equal(tf32(found), found)


# --- whole models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default() -> Bundle:
    return open_bundle(default_bundle_path(), check_files=False)


def test_the_backend_says_what_it_simulates(default: Bundle) -> None:
    backend = SimulatedBackend(default, recipe_named("fp16"), recipe_named("tf32"))
    assert backend.precision == "fp16+tf32"
    assert (backend.name, backend.device) == ("simulated", "cpu")


def test_features_of_a_narrow_encoder_are_fp16_numbers(default: Bundle) -> None:
    pixels, _ = preprocess(default.manifest.image, load_record(default).images()[0])
    backend = SimulatedBackend(default, recipe_named("fp16"), recipe_named("fp32"))
    (features,) = backend.encode(pixels).numpy()
    assert features.dtype == np.float32
    assert np.array_equal(features, rounded(features, "fp16"))


def test_a_recipe_that_does_not_fit_is_refused_at_once(default: Bundle, tmp_path: Path) -> None:
    def unname(graphs: dict[str, onnx.ModelProto]) -> None:
        for node in graphs["encoder"].graph.node:
            node.name = node.name.replace("/", "_")

    bundle = edited_bundle(default.path, tmp_path / "unnamed", unname)
    with pytest.raises(RecipeError, match="not named after modules"):
        SimulatedBackend(bundle, recipe_named("fp16"), recipe_named("fp16"))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name != "fp32"], ids=lambda r: r.name)
def test_every_rung_of_the_ladder_passes_the_gate_with_sam2(
    recipe: Recipe, small_sam2: Path
) -> None:
    bundle = open_bundle(small_sam2, check_files=False)
    record = first_cases(load_record(bundle), "box_click")
    backend = SimulatedBackend(bundle, recipe, recipe)
    verdict = judge(verify(backend, bundle.manifest, record, GATE_LIMITS))
    assert verdict.passed, verdict.explain()


# --- large activations ----------------------------------------------------------------------------

# Residual channels that hold thousands, as some of trained transformers do.
CHANNELS = (5, 70)


class Edited:
    """An edited bundle, and the record of what its graphs give in FP32."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        model = load_model(bundle.path, backend="onnxruntime", device="cpu", check_files=False)
        record = first_cases(load_record(bundle), "box_click")
        self.record: ParityRecord = rerecord(model.backend, model.manifest, record)

    def verdict(self, encoder: Recipe, decoder: Recipe) -> Verdict:
        backend = RememberingBackend(SimulatedBackend(self.bundle, encoder, decoder))
        return judge(verify(backend, self.bundle.manifest, self.record, GATE_LIMITS))


def grow_values(model: onnx.ModelProto, factor: float) -> None:
    """Multiply what the attentions mix, and divide the projections after them."""
    for block in range(4):
        prefix = f"blocks.{block}.attention"
        scale_weight(model, f"{prefix}.v/MatMul_0", factor)
        scale_weight(model, f"{prefix}.v/Add_0", factor)
        scale_weight(model, f"{prefix}.out/MatMul_0", 1.0 / factor)


def grow_residuals(model: onnx.ModelProto, factor: float) -> None:
    """Make the first block write large numbers into some channels, which later norms shrink."""
    columns = np.ones(128, np.float32)
    columns[list(CHANNELS)] = factor
    scale_weight(model, "blocks.0.fc2/MatMul_0", columns)
    scale_weight(model, "blocks.0.fc2/Add_0", columns)


def largest(bundle: Bundle, pattern: str) -> float:
    """Greatest absolute value of the named nodes' outputs in FP32, on the record's first image."""
    model = load_graph(bundle, "encoder")
    names = mark_layers(model, pattern)
    path = bundle.path / "marked.onnx"
    save_graph(model, path)
    pixels, _ = preprocess(bundle.manifest.image, load_record(bundle).images()[0])
    found = run_onnx(path, {bundle.manifest.encoder.inputs[0].name: pixels})
    path.unlink()
    return max(float(np.abs(found[name]).max()) for name in names)


@pytest.mark.slow
def test_activations_of_a_few_thousand_pass_in_fp16(small_bundle: Path, tmp_path: Path) -> None:
    def edit(graphs: dict[str, onnx.ModelProto]) -> None:
        grow_values(graphs["encoder"], 1024.0)
        grow_residuals(graphs["encoder"], 1024.0)

    edited = Edited(edited_bundle(small_bundle, tmp_path / "large", edit))
    assert 2000 < largest(edited.bundle, r"^blocks\.\d\.attention\.v/Add_0$") < 20_000
    assert 2000 < largest(edited.bundle, r"^blocks\.0/Add_\d$") < 20_000
    fp16 = recipe_named("fp16")
    verdict = edited.verdict(fp16, fp16)
    assert verdict.passed, verdict.explain()


@pytest.mark.slow
def test_activations_beyond_fp16_condemn_the_encoder(small_bundle: Path, tmp_path: Path) -> None:
    def edit(graphs: dict[str, onnx.ModelProto]) -> None:
        grow_values(graphs["encoder"], 2.0**17)

    edited = Edited(edited_bundle(small_bundle, tmp_path / "overflowing", edit))
    fp16, tf32 = recipe_named("fp16"), recipe_named("tf32")
    verdict = edited.verdict(fp16, fp16)
    assert StoredVerdict.of(verdict).encoder_failed
    worst = verdict.worst()
    assert all(np.isnan(worst[f"features {level} cosine"].value) for level in range(3))
    assert "cosine nan, at least 0.999 allowed" in verdict.explain()
    assert edited.verdict(tf32, fp16).passed
