"""Cutting a decoder in C++ as `sam3rt.bundle.onnx_split` does it, and what that must not change."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.cpp_driver import Build, Step, as_prompts
from tests.support.golden_calls import Golden
from tests.support.helpers import external_weights, noise
from tests.support.runnable_bundle import runnable_bundle

from sam3rt.bundle import open_bundle
from sam3rt.bundle.onnx_split import split_onnx

MASKS = ("input_masks", "has_input_masks")


def same_as_python(build: Build, graph: Path, inputs: list[str], *, cut: bool) -> None:
    """Assert that both languages make the same two files of a graph, or that neither cuts it."""
    expected = split_onnx(graph.read_bytes(), inputs)
    found = build.one(op="split_onnx", path=graph, inputs=inputs)
    assert (found.value is not None) == (expected is not None) == cut
    if expected is not None:
        assert found.value == {"cut": list(expected.cut), "inputs": list(expected.inputs)}
        assert found.arrays["first"].tobytes() == expected.first
        assert found.arrays["rest"].tobytes() == expected.rest


def test_real_decoders(cpp_build: Build, golden: Golden) -> None:
    manifest = open_bundle(golden.bundle).manifest
    inputs = [*(spec.name for spec in manifest.encoder.outputs), *MASKS]
    decoder = golden.bundle / manifest.decoder.model.file
    same_as_python(cpp_build, decoder, inputs, cut=True)
    same_as_python(cpp_build, decoder, inputs[:-1], cut=True)
    same_as_python(cpp_build, decoder, [], cut=False)


def node(operator: str, inputs: str, output: str) -> Any:
    return helper.make_node(operator, inputs.split(), [output])


@pytest.mark.parametrize(
    ("nodes", "info", "cut"),
    [
        ((node("Relu", "x", "r"), node("Add", "y r", "z")), (), True),
        ((node("Shape", "x", "size"), node("Slice", "y size size", "z")), ("size",), True),
        ((node("Relu", "x", "r"), node("MatMul", "y r", "m"), node("Add", "m x", "z")), (), False),
        ((node("MatMul", "y x", "z"),), (), False),
        ((node("Relu", "y", "z"),), (), False),
        (
            (
                node("Relu", "x", "r"),
                node("Transpose", "r", "turned"),
                node("MatMul", "r ones", "p"),
                node("MatMul", "y p", "left"),
                node("MatMul", "left turned", "z"),
            ),
            (),
            True,
        ),
        (
            (node("Add", "two ones", "c"), node("Add", "x c", "s"), node("Mul", "y s", "z")),
            (),
            True,
        ),
    ],
    ids=["cut", "type stated", "read late", "nothing alone", "unread", "transposed", "constants"],
)
def test_graphs(
    cpp_build: Build, tmp_path: Path, nodes: tuple[Any, ...], info: tuple[str, ...], cut: bool
) -> None:
    def value(name: str, shape: list[int] | None) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        list(nodes),
        "g",
        [value("x", [2, 3]), value("y", [2, 2])],
        [value("z", None)],
        [
            numpy_helper.from_array(np.float32(2), "two"),
            numpy_helper.from_array(np.ones((3, 3), np.float32), "ones"),
        ],
        value_info=[helper.make_tensor_value_info(name, TensorProto.INT64, [2]) for name in info],
    )
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    same_as_python(cpp_build, path, ["x"], cut=cut)


def test_odd_files_are_left_to_others(cpp_build: Build, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [node("Relu", "x", "r"), node("Add", "y r", "z")],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    content = helper.make_model(graph).SerializeToString()
    start = content.index(b"Z\x0f\n\x01x")
    path = tmp_path / "graph.onnx"
    # An input whose description has a field that nothing knows.
    path.write_bytes(content[: start + 2] + b"\x7a" + content[start + 3 :])
    same_as_python(cpp_build, path, ["x"], cut=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle that is cut, and the same with weights in a file, which is not."""
    folder = tmp_path_factory.mktemp("cut")
    whole = runnable_bundle(folder / "cut").path
    return {"cut": whole, "whole": external_weights(folder / "whole", whole).path}


def test_a_decoder_in_parts_answers_as_the_whole(
    cpp_build: Build, bundles: dict[str, Path]
) -> None:
    """More images in turn than are kept, with and without mask prompts, one and several."""
    masks = np.random.default_rng(1).standard_normal((20, 1, 8, 8)).astype(np.float32)
    calls = [
        as_prompts({"point_coords": [[4, 4]], "point_labels": [1]}),
        as_prompts({"point_coords": [[4, 4]], "point_labels": [1], "mask_input": masks[0]}),
        as_prompts({"box": [[1, 1, 6, 7]] * 20}),
        as_prompts({"box": [[1, 1, 6, 7]] * 20, "mask_input": masks}),
    ]
    images = [noise(9, 9, seed) for seed in range(6)]

    def answers(name: str) -> list[Any]:
        steps: list[Step] = [
            {"op": "log", "level": 1},
            {"op": "load_model", "model": "m", "path": bundles[name]},
        ]
        steps += [
            {"op": "encode", "model": "m", "embedding": str(i), "image": image}
            for i, image in enumerate(images)
        ]
        steps += [
            {"op": "decode", "model": "m", "embedding": str(i), "prompts": call}
            for call in calls
            for i in (0, 1, 2, 3, 4, 5, 0, 0)
        ]
        return cpp_build.run([*steps, {"op": "log_lines"}])

    cut, whole = answers("cut"), answers("whole")
    for results, is_cut in ((cut, True), (whole, False)):
        lines = [line for _, line in results[-1].value if "decoder.onnx" in line]
        assert ["in two parts" in line for line in lines] == [is_cut]
    for found, expected in zip(cut[8:-1], whole[8:-1], strict=True):
        assert found.error is None
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)


def test_what_an_image_decides_is_computed_once(cpp_build: Build, bundles: dict[str, Path]) -> None:
    """For the images used last: a click on another one takes more of the host's memory."""
    click = as_prompts({"point_coords": [[4, 4]], "point_labels": [1]})
    steps: list[Step] = [
        {"op": "set_environment"},
        {
            "op": "load_model",
            "model": "m",
            "path": bundles["cut"],
            "environment_allocators": True,
        },
    ]
    for name in "abcde":
        steps.append({"op": "encode", "model": "m", "embedding": name, "image": noise(9, 9)})
    start = len(steps)
    # The first click loads the graph.
    order = "aabbacdeb"
    for name in order:
        steps.append({"op": "decode", "model": "m", "embedding": name, "prompts": click})
        steps.append({"op": "host_allocations"})
    counts = [result.value for result in cpp_build.run(steps)[start + 1 :: 2]]
    taken = [later - earlier for earlier, later in pairwise(counts)]
    same, other = taken[0], taken[1]
    assert same < other
    # a, b, b and a again, then c, d and e, after which b is no longer among the last four.
    assert taken == [same, other, same, same, other, other, other, other]
