"""Typed graphs in the real parser and builder of TensorRT for RTX, ahead of time, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from sam3rt.backends.tensorrt.engines import find_engines
from sam3rt.backends.tensorrt.sidecar import EngineShapes, EngineSidecar
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.files import sha256_file
from sam3rt.cli import main
from sam3rt_build.builder_process import EngineRequest, build_engine
from sam3rt_build.engine_builder import BuildOptions, graph_profile
from sam3rt_build.errors import BuildError
from sam3rt_build.graph_files import load_graph, save_graph
from sam3rt_build.plan_evidence import PlanEvidence, check_promise, load_evidence, read_engine
from sam3rt_build.recipes import HALF_SUMS, RECIPES, Recipe, recipe_named
from sam3rt_build.typed_graph import Role, apply_recipe

LOGGER = trt.Logger(trt.Logger.ERROR)
_STRONGLY_TYPED = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
FLAGS = 0 if _STRONGLY_TYPED is None else 1 << int(_STRONGLY_TYPED)
TYPES = {"float32": trt.float32, "float16": trt.float16, "int64": trt.int64}
# The graphs of TF32 are those of FP32, and so is what their engines say.
BUILT = [recipe for recipe in RECIPES if recipe.name != "tf32"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_every_recipe_parses_as_a_strongly_typed_network(
    role: Role, recipe: Recipe, tmp_path: Path
) -> None:
    parse(default_bundle_path(), role, recipe, tmp_path)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_sam2_parses_as_a_strongly_typed_network(
    role: Role, small_sam2: Path, tmp_path: Path
) -> None:
    parse(small_sam2, role, recipe_named("fp16-activations"), tmp_path)


def parse(path: Path, role: Role, recipe: Recipe, folder: Path) -> None:
    """Type a bundle's graph, and hold what the parser makes of it to the manifest."""
    bundle = open_bundle(path, check_files=False)
    model = load_graph(bundle, role)
    apply_recipe(model, recipe, recipe.features_dtype)
    save_graph(model, folder / "typed.onnx")
    builder = trt.Builder(LOGGER)
    network = builder.create_network(FLAGS)
    parser = trt.OnnxParser(network, LOGGER)
    parser.parse_from_file(str(folder / "typed.onnx"))
    assert [str(parser.get_error(i)) for i in range(parser.num_errors)] == []
    maps = {spec.name for spec in bundle.manifest.encoder.outputs}
    graph = getattr(bundle.manifest, role)
    for count, get, specs in (
        (network.num_inputs, network.get_input, graph.inputs),
        (network.num_outputs, network.get_output, graph.outputs),
    ):
        assert count == len(specs)
        for index, spec in enumerate(specs):
            tensor = get(index)
            dtype = recipe.features_dtype if spec.name in maps else spec.dtype
            assert (tensor.name, tensor.dtype) == (spec.name, TYPES[dtype])


# --- what engines compute with --------------------------------------------------------------------


def evidence(bundle: Path, role: Role, recipe: Recipe, folder: Path, target: str) -> PlanEvidence:
    """What the engine of a graph says of itself, built by one recipe for one kind of GPU."""
    opened = open_bundle(bundle, check_files=False)
    options = BuildOptions(backend="tensorrt-rtx", max_objects=2, max_points=8)
    model = load_graph(opened, role)
    apply_recipe(model, recipe, recipe.features_dtype)
    graph, engine = folder / f"{role}.onnx", folder / f"{role}.engine"
    save_graph(model, graph)
    profile = graph_profile(opened, role, options)
    build_engine(
        EngineRequest(
            str(graph), str(engine), "tensorrt-rtx", profile, targets=(target,), tf32=recipe.tf32
        )
    )
    found = read_engine(engine)
    assert found is not None, "this TensorRT lays its engines out differently"
    return found


def check(found: PlanEvidence, role: Role, recipe: Recipe, *, fused: int) -> None:
    """Hold an engine to its recipe. In an encoder, every matmul is of a type that we expect."""
    check_promise(recipe, found)
    blocks = found.blocks.values()
    attentions = sum(block.attentions for block in blocks)
    sums = [pair for block in blocks for pair in block.attention_sums]
    kinds = {kind for block in blocks for kind in block.matmul_sums}
    fuses = recipe.factors == "float16" and not recipe.tf32
    assert sums == [("fp32", "fp32")] * (fused if fuses else 0)
    assert sum(block.fused for block in blocks) == len(sums)
    if recipe.factors == "float32":
        assert kinds == {"fp32 throughout"}
    elif role == "encoder":
        # Only the attention that is to be in TF32 multiplies FP32 factors.
        assert kinds == ({"fp32", "fp32 throughout"} if recipe.tf32 else {"fp32"})
        for name, block in found.blocks.items():
            wide = 2 * block.attentions if recipe.tf32 else 0
            assert block.matmul_sums.get("fp32 throughout", 0) == wide, name
    else:
        assert "fp32" in kinds  # and the scores' heads, in FP32 by a rule
    assert attentions >= fused
    assert found.layers > 30


def test_fp16_attention_is_fused_and_added_up_in_fp32(small_bundle: Path, tmp_path: Path) -> None:
    recipe = recipe_named("fp16")
    found = evidence(small_bundle, "encoder", recipe, tmp_path, "8.9")
    check(found, "encoder", recipe, fused=4)
    assert [name for name, block in found.blocks.items() if block.fused] == [
        f"blocks.{index}" for index in range(4)
    ]


def test_left_to_itself_the_builder_adds_up_in_fp16(small_bundle: Path, tmp_path: Path) -> None:
    """Why the casts are there. Should this fail, a newer builder may need them no more."""
    found = evidence(small_bundle, "encoder", HALF_SUMS, tmp_path, "8.9")
    for index in range(4):
        block = found.blocks[f"blocks.{index}"]
        assert block.attention_sums == (("fp32", "fp16"),)
        assert set(block.matmul_sums) == {"unspecified"}
    with pytest.raises(BuildError, match=r"promise of recipe fp16: blocks\.0 adds up a product"):
        check_promise(recipe_named("fp16"), found)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BUILT, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_every_recipe_of_both_graphs_keeps_its_promise(
    role: Role, recipe: Recipe, bundle: Path, tmp_path: Path
) -> None:
    fused = 4 if role == "decoder" else 10 if bundle == default_bundle_path() else 4
    check(evidence(bundle, role, recipe, tmp_path, "8.9"), role, recipe, fused=fused)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BUILT[:-1], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_every_recipe_of_sam2_that_promises_something_keeps_it(
    role: Role, recipe: Recipe, small_sam2: Path, tmp_path: Path
) -> None:
    fused = 4 if role == "decoder" else 9
    check(evidence(small_sam2, role, recipe, tmp_path, "8.9"), role, recipe, fused=fused)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["7.5", "8.0", "8.6", "12.0"])
def test_fp16_is_added_up_in_fp32_on_every_kind_of_gpu(
    target: str, small_bundle: Path, tmp_path: Path
) -> None:
    recipe = recipe_named("fp16")
    check(evidence(small_bundle, "encoder", recipe, tmp_path, target), "encoder", recipe, fused=4)


def one_attention(operator: str, *, between_casts: bool) -> onnx.ModelProto:
    """FP16 attention as ONNX's ``Attention``, or as matmuls around a softmax in FP32."""
    nodes = []

    def add(kind: str, given: list[str], made: str, **attributes: Any) -> str:
        name = f"blocks.0.attention/{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, given, [made], name, **attributes))
        return made

    def product(kind: str, given: list[str], made: str, **attributes: Any) -> str:
        if not between_casts:
            return add(kind, given, made, **attributes)
        wide = [add("Cast", [x], f"{x}.for_{made}", to=TensorProto.FLOAT) for x in given]
        result = add(kind, wide, f"{made}.wide", **attributes)
        return add("Cast", [result], made, to=TensorProto.FLOAT16)

    if operator == "Attention":
        product("Attention", ["q", "k", "v"], "y", scale=1.0)
    else:
        turned = add("Transpose", ["k"], "turned", perm=[0, 1, 3, 2])
        scores = product("MatMul", ["q", turned], "scores")
        wide = add("Cast", [scores], "wide", to=TensorProto.FLOAT)
        shares = add("Softmax", [wide], "shares", axis=-1)
        narrow = add("Cast", [shares], "narrow", to=TensorProto.FLOAT16)
        product("MatMul", [narrow, "v"], "y")
    shape = [9, 16, 576, 64]
    q, k, v, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in "qkvy"
    )
    graph = helper.make_graph(nodes, "attention", [q, k, v], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["8.6", "8.9"])
def test_no_form_of_attention_is_added_up_in_fp32_but_between_casts(
    target: str, tmp_path: Path
) -> None:
    """Why graphs keep matmuls: both forms are fused, and both take the casts."""
    found: dict[tuple[str, bool], list[tuple[bytes, bytes]]] = {}
    graph, engine = tmp_path / "attention.onnx", tmp_path / "attention.engine"
    for operator in ("Attention", "MatMul"):
        for between_casts in (False, True):
            onnx.save(one_attention(operator, between_casts=between_casts), graph)
            build_engine(
                EngineRequest(str(graph), str(engine), "tensorrt-rtx", {}, targets=(target,))
            )
            content = engine.read_bytes()
            assert b"name=_gemm_mha_v2" in content
            traits = rb"hmma_(fp16|fp32)_traits,\s+\S*hmma_(fp16|fp32)_traits"
            found[operator, between_casts] = re.findall(traits, content)
    half, full = b"fp16", b"fp32"
    assert found == {
        ("Attention", False): [(half, half)],
        ("Attention", True): [(full, full)],
        ("MatMul", False): [(full, half)],
        ("MatMul", True): [(full, full)],
    }


# --- whole builds ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundled model in FP16, built by the command for one kind of GPU, and what it printed.

    Two builds begin at once: one wins, the other says so and leaves things as they are.
    """
    path = tmp_path_factory.mktemp("built") / "mobile_sam"
    shutil.copytree(default_bundle_path(), path, ignore=shutil.ignore_patterns("engines"))
    command = ["build", str(path), "--backend", "tensorrt-rtx", "--target", "sm89"]
    options = [
        "--precision",
        "fp16",
        "--max-objects",
        "2",
        "--max-points",
        "8",
        "--max-batch",
        "2",
    ]
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "sam3rt", *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [build.communicate(timeout=600) for build in builds]
    codes = [build.returncode for build in builds]
    assert sorted(codes) == [0, 1], said
    printed, log = said[codes.index(0)]
    assert "the engines are unproven until they first load on their target" in log
    assert "another build is at work" in said[codes.index(1)][1]
    return path, printed


def sidecars(path: Path) -> dict[str, EngineSidecar]:
    return {e.sidecar.role: e.sidecar for e in find_engines(open_bundle(path, check_files=False))}


@pytest.mark.slow
def test_the_command_builds_engines_that_nobody_has_proven(built: tuple[Path, str]) -> None:
    path, printed = built
    found = sidecars(path)
    assert set(found) == {"encoder", "decoder"}
    manifest = open_bundle(path).manifest
    for role, sidecar in found.items():
        assert sidecar.state == "unproven"
        assert sidecar.targets == ("8.9",)
        assert sidecar.gpu is None
        assert sidecar.parity == {}
        assert sidecar.backend == "tensorrt-rtx"
        assert sidecar.tensorrt_version == trt.__version__
        assert sidecar.bundle_fingerprint == manifest.fingerprint
        assert sidecar.build_seconds > 0
        assert sidecar.shapes == EngineShapes(2, 8, 2)
        assert sidecar.recipe == "fp16"
        (engine,) = path.glob(f"engines/*/{role}.engine")
        assert sidecar.engine.sha256 == sha256_file(engine)
        assert f"{engine}: unproven" in printed
    assert found["encoder"].features_dtype == found["decoder"].features_dtype == "float16"


@pytest.mark.slow
def test_the_command_says_what_the_engines_compute_with(built: tuple[Path, str]) -> None:
    path, printed = built
    for role, fused in (("encoder", "10 of 10"), ("decoder", "4 of 7")):
        (engine,) = path.glob(f"engines/*/{role}.engine")
        kept = load_evidence(engine)
        assert kept is not None
        assert kept.bytes == engine.stat().st_size
        assert f"  plan: {kept.summary()}\n" in printed
        assert f"{fused} attentions fused" in kept.summary()
        assert "sums in fp32 and fp32" in kept.summary()


@pytest.mark.slow
def test_engines_hold_the_weights_in_fp16(built: tuple[Path, str]) -> None:
    path, _ = built
    found = sidecars(path)
    manifest = open_bundle(path).manifest
    # The bundle's weights are stored in FP16 as well. Beside them an engine holds its kernels,
    # about 10 MB for each of the two.
    for role in ("encoder", "decoder"):
        stored = getattr(manifest, role).model.bytes
        assert stored < found[role].engine.bytes < stored + 20e6


@pytest.mark.slow
def test_nothing_else_is_left_beside_the_engines(built: tuple[Path, str]) -> None:
    path, _ = built
    names = sorted(entry.name for entry in path.glob("engines/*/*"))
    roles = ("encoder", "decoder")
    engines = [f"{role}.engine{end}" for role in roles for end in ("", ".json", ".plan.json")]
    assert names == sorted([*engines, "encoder_ctx.onnx", "decoder_ctx.onnx"])
    assert [p.name for p in (path / "engines").iterdir() if p.is_file()] == [".lock"]
    assert open_bundle(path).manifest  # the bundle's own files are as they were


@pytest.mark.slow
def test_the_wrapper_states_the_engines_types(built: tuple[Path, str]) -> None:
    path, _ = built
    (wrapper,) = path.glob("engines/*/decoder_ctx.onnx")
    kinds = {v.name: v.type.tensor_type.elem_type for v in onnx.load(wrapper).graph.input}
    assert kinds["image_embeddings.0"] == onnx.TensorProto.FLOAT16
    assert kinds["input_labels"] == onnx.TensorProto.INT64


# --- the command's arguments ----------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options that the command passes on, instead of a build."""
    import sam3rt_build.build as module

    seen: list[Any] = []
    monkeypatch.setattr(
        module, "build_bundle", lambda bundle, options, say: seen.append(options) or ()
    )
    return seen


@pytest.mark.parametrize(
    ("text", "capability"),
    [
        ("8.9", "8.9"),
        ("sm89", "8.9"),
        ("89", "8.9"),
        ("sm_120", "12.0"),
        ("12.0", "12.0"),
        ("sm_87", "8.7"),
        ("120", "12.0"),
    ],
)
def test_targets_are_read_as_people_write_them(
    text: str, capability: str, asked: list[Any]
) -> None:
    bundle = str(default_bundle_path())
    assert main(["build", bundle, "--backend", "tensorrt-rtx", "--target", text]) == 0
    assert asked[0].targets == (capability,)


@pytest.mark.parametrize("text", ["ada", "8", "0.9", "sm_", "8.9.1", "1200", "-8.9", "08.9"])
def test_what_is_no_capability_is_refused(
    text: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", str(default_bundle_path()), "--backend", "tensorrt-rtx", f"--target={text}"])
    assert caught.value.code == 2
    assert f"{text!r} is not a compute capability such as 8.9" in capsys.readouterr().err
    assert not asked


def test_options_reach_the_build(asked: list[Any]) -> None:
    bundle = str(default_bundle_path())
    several = ["--target", "8.9", "--target", "sm89", "--target", "12.0"]
    recipes = ["--precision", "tf32", "--precision", "fp16"]
    sizes = ["--max-objects", "3", "--max-points", "5", "--max-batch", "4"]
    others = ["--workspace", "2", "--device", "1", "--backend", "tensorrt-rtx"]
    assert main(["build", bundle, *several, *recipes, *sizes, *others]) == 0
    (options,) = asked
    assert options.targets == ("8.9", "12.0")
    assert options.precision == ("tf32", "fp16")
    assert (options.max_objects, options.max_points) == (3, 5)
    assert options.max_batch == 4
    assert (options.workspace, options.device) == (2 << 20, 1)
    assert main(["build", bundle, "--precision", "fp16", "--precision", "auto"]) == 0
    assert asked[1].precision == "auto"
    assert (asked[1].backend, asked[1].targets, asked[1].workspace) == ("tensorrt", (), None)


def test_defaults_on_the_command_line_are_those_of_the_options(asked: list[Any]) -> None:
    from sam3rt_build.build import BuildOptions

    assert main(["build", str(default_bundle_path())]) == 0
    assert asked == [BuildOptions()]


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("SAM3RT_TEST_FULL_SIZE"),
    reason="takes minutes and 10 GB of memory: SAM3RT_TEST_FULL_SIZE=1 asks for it",
)
def test_the_full_size_builds_ahead_of_time_in_fp16(tmp_path: Path) -> None:
    """SAM 3 of the published size by the two fastest recipes."""
    import torch
    from tests.golden.sam3 import synthetic
    from tests.support.export_helpers import parity_images

    from sam3rt_export import ExportOptions, export_bundle

    checkpoint = tmp_path / "sam3.pt"
    tensors = {n: torch.from_numpy(np.asarray(a)) for n, a in synthetic.full_size_checkpoint()}
    torch.save(tensors, checkpoint)
    del tensors
    export_bundle(checkpoint, tmp_path / "sam3", ExportOptions(parity_images=parity_images(1)))
    checkpoint.unlink()
    command = ["build", str(tmp_path / "sam3"), "--backend", "tensorrt-rtx", "--target", "8.9"]
    names = ("fp16", "fp16-activations")
    assert main([*command, *(part for name in names for part in ("--precision", name))]) == 0
    for name in names:
        (folder,) = (tmp_path / "sam3" / "engines").glob(f"*-{name}")
        # 446 million parameters in the encoder at two bytes each.
        assert 0.8e9 < (folder / "encoder.engine").stat().st_size < 1.1e9
        assert (folder / "decoder.engine").stat().st_size > 1e7
        for role, fused in (("encoder", 32), ("decoder", 4)):
            kept = load_evidence(folder / f"{role}.engine")
            assert kept is not None
            check(kept, role, recipe_named(name), fused=fused)
