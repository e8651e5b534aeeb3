"""Typed graphs: one float type per operator, what stays in FP32, what the numbers then are."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tests.support.build_helpers import (
    FLOATS,
    edited_bundle,
    float_types,
    relist,
    run_onnx,
    scale_weight,
)

from sam3rt.accuracy.metrics import relative_error
from sam3rt.accuracy.record import load_record
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.errors import BundleError
from sam3rt.geometry import preprocess
from sam3rt_build import graph_files
from sam3rt_build.errors import BuildError, RecipeError
from sam3rt_build.graph_files import load_graph, mark_layers, save_graph
from sam3rt_build.recipes import RECIPES, SIMULATED_RECIPES, Recipe, recipe_named
from sam3rt_build.simulated import simulate
from sam3rt_build.typed_graph import Role, apply_recipe, node_types, scope_of

ATTENTION = ("attention", "self_attention", "token_to_image", "image_to_token", "final")
KINDS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
PRODUCTS = ("MatMul", "Conv")


@dataclasses.dataclass(frozen=True)
class Typed:
    """One graph of one bundle, typed by one recipe and written."""

    bundle: Bundle
    role: Role
    recipe: Recipe
    plain: list[str]  # names of the nodes of the untyped graph
    path: Path
    model: onnx.ModelProto
    types: dict[str, int]

    @property
    def factors(self) -> int:
        return KINDS[self.recipe.factors]

    @property
    def activations(self) -> int:
        return KINDS[self.recipe.activations]

    def producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output}

    def computes_in(self, node: onnx.NodeProto) -> set[int]:
        return {self.types[name] for name in (*node.input, *node.output) if name in self.types}


CASES = [
    (name, role, recipe)
    for name in ("small", "default")
    for role in ("encoder", "decoder")
    for recipe in SIMULATED_RECIPES
]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].name}"
)
def typed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Typed]:
    """Every graph in every recipe, one at a time."""
    name, role, recipe = request.param
    small = request.getfixturevalue("small_bundle") if name == "small" else None
    bundle = open_bundle(small or default_bundle_path(), check_files=False)
    model = load_graph(bundle, role)
    plain = [node.name or "" for node in model.graph]
    apply_recipe(model, recipe, recipe.features_dtype)
    folder = tmp_path_factory.mktemp("typed")
    path = folder / f"{role}.onnx"
    assert save_graph(model, path) == ()
    proto = onnx.load(path)
    yield Typed(bundle, role, recipe, plain, path, proto, float_types(proto))
    shutil.rmtree(folder)


def scope(node: onnx.NodeProto) -> str:
    return node.name.rpartition("/")[0]


def test_the_file_is_valid_and_its_types_agree(typed: Typed) -> None:
    onnx.checker.check_model(str(typed.path))
    # With full_check, types are inferred anew and held to those that the file states.
    onnx.checker.check_model(typed.model, full_check=True)


def test_every_operator_has_one_float_type(typed: Typed) -> None:
    allowed = {TensorProto.FLOAT, typed.activations}
    for node in typed.model.graph.node:
        kinds = typed.computes_in(node)
        if node.op_type == "Cast":
            continue
        if node.op_type not in PRODUCTS:
            assert kinds <= allowed, node.name
        assert len(kinds) <= 1, f"{node.name} mixes {kinds}"
        for name in node.output:
            assert name in typed.types or name in {v.name for v in typed.model.graph.value_info}


def test_inputs_and_outputs_are_fp32_but_for_feature_maps(typed: Typed) -> None:
    graph = typed.model.graph
    spec = getattr(typed.bundle.manifest, typed.role)
    assert [value.name for value in graph.input] == [tensor.name for tensor in spec.inputs]
    assert [value.name for value in graph.output] == [tensor.name for tensor in spec.outputs]
    maps = {tensor.name for tensor in typed.bundle.manifest.encoder.outputs}
    seen = set()
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if value.name in maps:
            seen.add(value.name)
            assert kind == KINDS[typed.recipe.features_dtype], value.name
        elif value.name == "input_labels":
            assert kind == TensorProto.INT64
        else:
            assert kind == TensorProto.FLOAT, value.name
    assert seen == maps


def test_sums_exponentials_scores_and_counts_stay_in_fp32(typed: Typed) -> None:
    kept = 0
    for node in typed.model.graph.node:
        named = scope(node) == "single_mask" or scope(node).startswith(("iou_head", "object_head"))
        summing = ("LayerNormalization", "ReduceMean", "Softmax", "Sin", "Cos")
        if node.op_type in summing or (named and node.op_type != "Cast"):
            kept += 1
            assert typed.computes_in(node) <= {TensorProto.FLOAT}, node.name
    assert kept > 10


def test_everything_before_a_sine_stays_in_fp32(typed: Typed) -> None:
    producers = typed.producers()
    waiting = [n for n in typed.model.graph.node if n.op_type in ("Sin", "Cos")]
    assert bool(waiting) == (typed.role == "decoder")
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        seen.add(node.name)
        assert typed.computes_in(node) <= {TensorProto.FLOAT}, node.name
        before = (producers[name] for name in node.input if name in producers)
        waiting += [producer for producer in before if producer.name not in seen]


def is_kept(typed: Typed, name: str) -> bool:
    """Whether a product of this name stays in FP32 by a rule of the recipe."""
    path = name.rpartition("/")[0]
    return path.startswith(("positions", "iou_head", "object_head")) or (
        typed.recipe.name == "fp16-attention-tf32" and path.rpartition(".")[2] in ATTENTION
    )


def test_fp16_products_are_added_up_in_fp32(typed: Typed) -> None:
    """Factors are FP16 values cast to FP32, by casts of the product's own, and so is the result."""
    graph, producers = typed.model.graph, typed.producers()
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    assert len(products) > 30
    for node in products:
        kinds = typed.computes_in(node)
        if typed.recipe.factors == "float32" or is_kept(typed, node.name):
            assert kinds == {TensorProto.FLOAT}, node.name
        elif typed.recipe.accumulation == "float16":
            assert kinds == {TensorProto.FLOAT16}, node.name
        else:
            assert kinds == {TensorProto.FLOAT}, node.name
            for name in node.input[:2]:
                cast = producers[name]
                assert cast.op_type == "Cast", node.name
                assert typed.types[cast.input[0]] == TensorProto.FLOAT16, node.name
                assert users[name] == [node], f"{name} is not {node.name}'s own"
            (result,) = node.output
            for user in users.get(result, ()):
                assert user.op_type == "Cast", f"{user.name} reads what is not rounded"
                assert typed.types[user.output[0]] == TensorProto.FLOAT16
            assert users.get(result) or result in outputs, node.name


def test_nothing_is_lost_and_every_value_is_cast_once(typed: Typed) -> None:
    nodes = typed.model.graph.node
    assert [node.name for node in nodes if not node.name.startswith("types/")] == typed.plain
    added = [node for node in nodes if node.name.startswith("types/")]
    assert {node.op_type for node in added} <= {"Cast"}
    made = {node.output[0]: node for node in added}
    factors = {name for node in nodes if node.op_type in PRODUCTS for name in node.input[:2]}
    shared = [node for node in added if node.output[0] not in factors]
    keys = [(node.input[0], typed.types[node.output[0]]) for node in shared]
    assert len(set(keys)) == len(keys)
    for node in added:
        assert typed.types[node.input[0]] != typed.types[node.output[0]], node.name
        if node.input[0] in made:  # of a factor or a result: rounded, then widened
            assert typed.types[node.output[0]] == TensorProto.FLOAT, node.name
            assert made[node.input[0]].input[0] not in made, f"{node.name} is a third cast"
    assert bool(added) == (typed.recipe.factors == "float16")


def test_weights_have_the_type_they_are_used_in(typed: Typed) -> None:
    graph = typed.model.graph
    used = {name for node in graph.node for name in node.input}
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert set(weights) <= used
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in weights:
            # Half the bytes; TensorRT folds the cast into the product.
            assert weights[node.input[0]] == TensorProto.FLOAT16, node.name
            assert typed.types[node.output[0]] == TensorProto.FLOAT, node.name
    assert (TensorProto.FLOAT16 in weights.values()) == (typed.recipe.factors == "float16")


def test_the_file_says_what_it_is(typed: Typed) -> None:
    properties = {entry.key: entry.value for entry in typed.model.metadata_props}
    assert properties["sam3rt.recipe"] == typed.recipe.name
    assert properties["sam3rt.export_id"] == typed.bundle.manifest.export_id


# --- numbers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default() -> Bundle:
    return open_bundle(default_bundle_path(), check_files=False)


@pytest.fixture(scope="module")
def tiny(tiny_sam3: Path) -> Bundle:
    return open_bundle(tiny_sam3, check_files=False)


@pytest.fixture(scope="module")
def inputs(tiny: Bundle) -> dict[str, dict[str, NDArray[np.generic]]]:
    """The parity record's first image, and a box and a click on it."""
    record, manifest = load_record(tiny), tiny.manifest
    pixels, _ = preprocess(manifest.image, record.images()[0])
    encoder = {manifest.encoder.inputs[0].name: pixels}
    maps = run_onnx(tiny.path / "encoder.onnx", encoder)
    (case,) = (case for case in record.cases() if case.name == "box_click_0")
    decoder = {
        **maps,
        "input_points": case.prompts.points[None],
        "input_labels": case.prompts.labels[None],
        "input_masks": np.zeros((1, 1, *manifest.prompts.mask_size), np.float32),
        "has_input_masks": np.zeros(1, np.float32),
    }
    return {"encoder": encoder, "decoder": decoder}


def written(
    bundle: Bundle, role: Role, recipe: str, path: Path, *, simulated: bool = False
) -> Path:
    model = load_graph(bundle, role)
    chosen = recipe_named(recipe)
    (simulate if simulated else apply_recipe)(model, chosen, chosen.features_dtype)
    save_graph(model, path)
    return path


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_the_fp32_recipe_changes_no_bit(
    role: Role,
    tiny: Bundle,
    inputs: dict[str, dict[str, NDArray[np.generic]]],
    tmp_path: Path,
) -> None:
    expected = run_onnx(tiny.path / f"{role}.onnx", inputs[role])
    for simulated in (False, True):
        path = written(tiny, role, "fp32", tmp_path / "typed.onnx", simulated=simulated)
        found = run_onnx(path, inputs[role])
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_the_fp16_graph_runs_and_agrees_with_its_simulation(
    role: Role,
    tiny: Bundle,
    inputs: dict[str, dict[str, NDArray[np.generic]]],
    tmp_path: Path,
) -> None:
    real = written(tiny, role, "fp16", tmp_path / "typed.onnx")
    simulated = written(tiny, role, "fp16", tmp_path / "simulated.onnx", simulated=True)
    maps = {spec.name for spec in tiny.manifest.encoder.outputs}
    halved = {
        name: array.astype(np.float16) if name in maps else array
        for name, array in inputs[role].items()
    }
    found, expected = run_onnx(real, halved), run_onnx(simulated, inputs[role])
    exact = run_onnx(tiny.path / f"{role}.onnx", inputs[role])
    for name, array in expected.items():
        assert found[name].dtype == (np.float16 if name in maps else np.float32)
        # ONNX Runtime keeps sums of two FP16 operators in FP32 where it can, the simulation rounds
        # after each: they differ by FP16's rounding and not by more.
        assert relative_error(found[name].astype(np.float32), array) < 0.02, name
        assert relative_error(array, exact[name]) < 0.02, name
        # It does round.
        assert not np.array_equal(array, exact[name]), name


# --- what does not fit ----------------------------------------------------------------------------


def test_a_weight_beyond_fp16_is_named(small_bundle: Path, tmp_path: Path) -> None:
    node = "blocks.1.fc1/MatMul_0"

    def grow(graphs: dict[str, onnx.ModelProto]) -> None:
        largest = np.abs(scale_weight(graphs["encoder"], node, 1.0)).max()
        assert np.abs(scale_weight(graphs["encoder"], node, 1e5 / largest)).max() > 65504

    bundle = edited_bundle(small_bundle, tmp_path / "edited", grow)
    model = load_graph(bundle, "encoder")
    (weight,) = (
        value.name
        for n in model.graph
        if n.name == node
        for value in n.inputs
        if value is not None and value.is_initializer()
    )
    for change in (apply_recipe, simulate):
        with pytest.raises(RecipeError, match=r"reaches 1e\+05, beyond FLOAT16") as caught:
            change(load_graph(bundle, "encoder"), recipe_named("fp16"), "float16")
        assert repr(weight) in str(caught.value)
        for name in ("tf32", "fp32"):
            recipe = recipe_named(name)
            change(load_graph(bundle, "encoder"), recipe, recipe.features_dtype)


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if r.promises_fp32_sums], ids=lambda r: r.name
)
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_nodes_without_module_names_are_refused(
    default: Bundle, role: Role, recipe: Recipe
) -> None:
    model = load_graph(default, role)
    for index, node in enumerate(model.graph):
        node.name = f"node_{node.op_type}_{index}"
    with pytest.raises(RecipeError, match="not named after modules: export the model again"):
        apply_recipe(model, recipe, recipe.features_dtype)


def test_fp32_needs_no_module_names(default: Bundle) -> None:
    model = load_graph(default, "decoder")
    for node in model.graph:
        node.name = None
    apply_recipe(model, recipe_named("fp32"), "float32")


def test_weights_stored_as_fp16_are_fp32_in_memory(default: Bundle) -> None:
    stored = onnx.load(default.path / "encoder.onnx")
    halved = {t.name for t in stored.graph.initializer if t.data_type == TensorProto.FLOAT16}
    assert halved
    model = load_graph(default, "encoder")
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert ir.DataType.FLOAT16 not in kinds
    assert ir.DataType.FLOAT in kinds
    assert not any(
        node.op_type == "Cast" and node.inputs[0].is_initializer() for node in model.graph
    )
    assert len(model.graph) == len(stored.graph.node) - len(halved)
    values = {t.name: numpy_helper.to_array(t) for t in stored.graph.initializer}
    for name in halved:
        found = model.graph.initializers[f"{name}.stored"].const_value
        assert np.array_equal(found.numpy(), values[name].astype(np.float32)), name


def test_a_damaged_graph_is_refused(default: Bundle, tmp_path: Path) -> None:
    shutil.copytree(default.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    graph = tmp_path / "copy" / "encoder.onnx"
    graph.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"encoder\.onnx: has 11 bytes"):
        load_graph(Bundle(tmp_path / "copy", default.manifest), "encoder")
    relist(tmp_path / "copy")
    with pytest.raises(BundleError, match=r"encoder\.onnx: .*which no bundle needs"):
        load_graph(open_bundle(tmp_path / "copy"), "encoder")


# --- layers and files -----------------------------------------------------------------------------


def test_marked_layers_become_outputs_in_graph_order(default: Bundle) -> None:
    model = load_graph(default, "encoder")
    before = len(model.graph.outputs)
    names = mark_layers(model, r"^stages\.\d\.\d\.fc2/Add")
    order = [node.name for node in model.graph if node.name in names]
    assert len(names) == 10
    assert list(names) == order
    assert [output.name for output in model.graph.outputs[before:]] == list(names)
    types = node_types(model, recipe_named("fp16"))
    marks = [node for node in model.graph if "/marked_" in (node.name or "")]
    assert len(marks) == 10
    for node in marks:
        assert types[node] == types[node.inputs[0].producer()]
        assert scope_of(node) == scope_of(node.inputs[0].producer())


def test_layers_that_are_not_there_are_refused(default: Bundle) -> None:
    model = load_graph(default, "decoder")
    with pytest.raises(BuildError, match="not a regular expression"):
        mark_layers(model, "(")
    with pytest.raises(BuildError, match="no node that yields floats is named like 'nowhere'"):
        mark_layers(model, "nowhere")
    (shape,) = (node.name for node in model.graph if node.op_type == "Shape")
    with pytest.raises(BuildError, match="no node that yields floats"):
        mark_layers(model, f"^{shape}$")


def test_marked_layers_of_a_typed_graph_are_fp32_outputs(default: Bundle, tmp_path: Path) -> None:
    model = load_graph(default, "decoder")
    names = mark_layers(model, r"^blocks\.\d\.mlp\.2/Add")
    apply_recipe(model, recipe_named("fp16"), "float16")
    save_graph(model, tmp_path / "decoder.onnx")
    types = float_types(onnx.load(tmp_path / "decoder.onnx"))
    assert {types[name] for name in names} == {TensorProto.FLOAT}
    assert all(kind in FLOATS for kind in types.values())


def test_large_weights_lie_beside_the_graph(
    tiny: Bundle,
    inputs: dict[str, dict[str, NDArray[np.generic]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph_files, "_EXTERNAL_BYTES", 1 << 16)
    model = load_graph(tiny, "decoder")
    (beside,) = save_graph(model, tmp_path / "decoder.onnx")
    assert beside == tmp_path / "decoder.onnx.data"
    assert beside.stat().st_size > 200_000
    assert (tmp_path / "decoder.onnx").stat().st_size < 400_000
    found = run_onnx(tmp_path / "decoder.onnx", inputs["decoder"])
    expected = run_onnx(tiny.path / "decoder.onnx", inputs["decoder"])
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
