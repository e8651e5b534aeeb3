"""Tests of `sam3rt_build.ort_graphs` and of `sam3rt build --backend onnxruntime`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto
from tests.support.build_helpers import float_types

from sam3rt import InvalidInputError, open_bundle
from sam3rt.backends.onnxruntime.sessions import open_session
from sam3rt.backends.onnxruntime.typed import ON_REQUEST, TYPED_ORDER, find_typed, typed_folder
from sam3rt.backends.tensorrt.engines import find_engines
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.cli import main
from sam3rt.errors import BundleError
from sam3rt_build.engines_folder import exclusive
from sam3rt_build.errors import BuildError
from sam3rt_build.ort_graphs import build_typed_graphs


def test_the_command_writes_every_recipe(
    tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [part for name in TYPED_ORDER for part in ("--precision", name)]
    assert main(["build", str(tiny_copy), "--backend", "onnxruntime", *asked]) == 0
    said = capsys.readouterr()
    assert said.out.count("unproven until it first loads on a GPU") == len(TYPED_ORDER)
    assert f"sam3rt verify {tiny_copy} --backend onnxruntime --device cuda" in said.out
    assert "2 MultiHeadAttention" in said.err
    found = find_typed(open_bundle(tiny_copy))
    assert [graphs.precision for graphs in found] == list(TYPED_ORDER)
    assert [graphs.tf32 for graphs in found] == [False, False, True]
    # Decoders keep heads in FP32; with BF16, convolutions stay there, too.
    assert [graphs.narrow for graphs in found] == [("encoder.onnx",), ("encoder.onnx",), ()]
    assert find_engines(open_bundle(tiny_copy)) == ()
    open_bundle(tiny_copy).check_files()
    assert not list((tiny_copy / "engines").glob(".build-*"))


def test_unless_it_is_asked_for_there_is_no_bf16(tiny_copy: Path) -> None:
    folders = build_typed_graphs(open_bundle(tiny_copy))
    names = [name for name in TYPED_ORDER if name not in ON_REQUEST]
    assert folders == tuple(typed_folder(tiny_copy, name) for name in names)
    assert not typed_folder(tiny_copy, "bf16").exists()


def test_one_build_at_a_time_and_what_a_killed_one_left_is_removed(tiny_copy: Path) -> None:
    opened, engines = open_bundle(tiny_copy), tiny_copy / "engines"
    with exclusive(opened), pytest.raises(BuildError, match="another build is at work"):
        build_typed_graphs(opened, ["fp16"])
    (engines / ".build-killed").mkdir()
    build_typed_graphs(opened, ["fp16"])
    assert not list(engines.glob(".build-*"))


def test_nothing_is_written_behind_a_link(tiny_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tiny_copy / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link that leaves the bundle"):
        build_typed_graphs(open_bundle(tiny_copy), ["fp16"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_second_build_replaces_the_first(tiny_copy: Path) -> None:
    opened = open_bundle(tiny_copy)
    (folder,) = build_typed_graphs(opened, ["fp16"])
    (folder / "encoder.onnx").write_bytes(b"")
    (folder / "stale").write_bytes(b"")
    assert build_typed_graphs(opened, ["fp16"]) == (folder,)
    assert sorted(path.name for path in folder.iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "graphs.json",
    ]


@pytest.mark.parametrize("name", ["tf32", "fp32", "fp16-attention-tf32", "nonsense"])
def test_other_recipes_are_refused(tiny_copy: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="need no build"):
        build_typed_graphs(open_bundle(tiny_copy), [name])


def test_targets_mean_nothing_here(tiny_copy: Path) -> None:
    command = ["build", str(tiny_copy), "--backend", "onnxruntime", "--target", "8.9"]
    assert main(command) != 0
    assert not (tiny_copy / "engines").exists()


def test_every_value_has_the_type_that_its_recipe_says(tiny_copy: Path) -> None:
    build_typed_graphs(open_bundle(tiny_copy), TYPED_ORDER)
    wanted = {
        # Matmul's and attention's, the residual stream's.
        "fp16-activations": (TensorProto.FLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT16),
        "fp16": (TensorProto.FLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT),
        "bf16": (TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT),
    }
    for recipe, expected in wanted.items():
        model = onnx.load(typed_folder(tiny_copy, recipe) / "encoder.onnx")
        types = float_types(model) | {
            value.name: value.type.tensor_type.elem_type for value in model.graph.value_info
        }
        nodes = {node.name: node for node in model.graph.node}
        matmul = nodes["blocks.0.fc1/MatMul_0"]
        (attention,) = (n for n in nodes.values() if n.name.startswith("blocks.0.attention/Multi"))
        (skip,) = (n for n in nodes.values() if n.name.startswith("blocks.0.norm2/Skip"))
        found = (types[matmul.output[0]], types[attention.output[0]], types[skip.output[3]])
        assert found == expected, recipe
        # No product is between casts to FP32: ONNX Runtime would not fold them.
        makers = {output: node for node in model.graph.node for output in node.output}
        maker = makers.get(matmul.input[0])
        assert maker is None or maker.op_type != "Cast" or types[matmul.input[0]] == expected[0]


def test_only_typed_graphs_may_hold_fused_operators(tiny_copy: Path) -> None:
    opened = open_bundle(tiny_copy)
    (folder,) = build_typed_graphs(opened, ["fp16"])
    content = (folder / "encoder.onnx").read_bytes()
    with pytest.raises(BundleError, match=r"com\.microsoft"):
        check_tensor_locations(content, "encoder.onnx", ())
    check_tensor_locations(content, "encoder.onnx", (), is_fused=True)
    for domain, operator in (("com.microsoft", "Conv"), ("", "MultiHeadAttention"), ("x", "Add")):
        model = onnx.load_from_string(content)
        node = next(node for node in model.graph.node if node.domain == "com.microsoft")
        node.op_type, node.domain = operator, domain
        with pytest.raises(BundleError):
            check_tensor_locations(model.SerializeToString(), "encoder.onnx", (), is_fused=True)


def test_fp16_graphs_load_where_there_is_no_gpu(tiny_copy: Path) -> None:
    """Types, shapes and operators are checked by ONNX Runtime itself. It has no BF16 there."""
    build_typed_graphs(open_bundle(tiny_copy), ["fp16", "fp16-activations"])
    for graphs in find_typed(open_bundle(tiny_copy)):
        for graph in (graphs.bundle.manifest.encoder, graphs.bundle.manifest.decoder):
            open_session(graphs, graph)


def test_building_takes_no_onnx_runtime() -> None:
    """As on a Jetson, where TensorRT is and ONNX Runtime is not."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; sys.modules['onnxruntime'] = None\n"
        "import sam3rt_build.cli.build, sam3rt_build.ort_graphs"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
