"""Toy modules through the tracer, and the rules their graphs are held to."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tests.support.export_helpers import leftovers, relative, run_onnx
from torch import Tensor, nn
from torch.export import Dim

from sam3rt.bundle import TensorSpec, check_file
from sam3rt.bundle.files import sha256_file
from sam3rt_export import tracing
from sam3rt_export.errors import GraphRuleError
from sam3rt_export.tracing import FORBIDDEN, TraceRequest, check_rules, trace_to_file

METADATA = {"sam3rt.export_id": "ab" * 32, "sam3rt.role": "toy"}


class Affine(nn.Module):
    """A matrix product wide enough to be stored as FP16."""

    def __init__(self, inputs: int = 200, outputs: int = 300) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(inputs, outputs, generator=generator))
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.matrix + self.bias)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def affine_request(**changes: Any) -> TraceRequest:
    request = TraceRequest(
        module=Affine().eval(),
        arguments=(torch.zeros(2, 200),),
        dynamic_shapes=({0: Dim.DYNAMIC},),
        inputs=(TensorSpec("x", "float32", ("batch", 200)),),
        outputs=(TensorSpec("y", "float32", ("batch", 300)),),
        weights="float32",
        metadata=METADATA,
    )
    return dataclasses.replace(request, **changes)


def function_request(
    function: Callable[..., Any],
    inputs: int = 1,
    shape: tuple[int | str, ...] = ("batch", 6),
    output: tuple[int | str, ...] = ("batch", 6),
    dtype: Any = "float32",
    **changes: Any,
) -> TraceRequest:
    """A function of ``inputs`` tensors [batch, 6] with a dynamic batch."""
    request = TraceRequest(
        module=Function(function).eval(),
        arguments=tuple(torch.zeros(3, 6) for _ in range(inputs)),
        # One entry for the whole *inputs tuple.
        dynamic_shapes=(tuple({0: Dim.DYNAMIC} for _ in range(inputs)),),
        inputs=tuple(TensorSpec(f"x{i}", "float32", shape) for i in range(inputs)),
        outputs=(TensorSpec("y", dtype, output),),
        weights="float32",
        metadata=METADATA,
    )
    return dataclasses.replace(request, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where to trace to."""
    return tmp_path / "toy.onnx"


def initializers(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def feed(rows: int, columns: int = 200) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, columns), dtype=np.float32)


# --- what is written ------------------------------------------------------------------------------


def test_names_axes_opset_and_metadata(path: Path) -> None:
    spec = trace_to_file(affine_request(), path)
    onnx.checker.check_model(str(path))
    model = onnx.load(path)
    assert [(e.domain, e.version) for e in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    assert model.producer_name == "sam3rt"
    assert {p.key: p.value for p in model.metadata_props} == METADATA
    session = ort.InferenceSession(str(path))
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("x", "tensor(float)", ["batch", 200])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("y", "tensor(float)", ["batch", 300])
    ]
    assert session.get_modelmeta().custom_metadata_map == METADATA
    assert (spec.opset, spec.nodes) == (18, len(model.graph.node))
    assert spec.inputs == affine_request().inputs
    assert spec.outputs == affine_request().outputs
    assert spec.external_data == ()
    check_file(path.parent, spec.model)
    assert leftovers(path.parent) == ["toy.onnx"]


def test_nodes_are_named_after_their_modules(small_bundle: Path) -> None:
    """Precision recipes go by these names."""
    nodes = {
        role: [node.name for node in onnx.load(small_bundle / f"{role}.onnx").graph.node]
        for role in ("encoder", "decoder")
    }
    for names in nodes.values():
        assert len(set(names)) == len(names)
        assert all("/" in name and "_empty" not in name for name in names)
    for name in ("patch/Conv_0", "blocks.1.attention/Softmax_0", "blocks.0.fc1/MatMul_0"):
        assert name in nodes["encoder"]
    for name in ("positions/Sin_0", "blocks.0.self_attention/Softmax_0", "single_mask/ReduceSum_0"):
        assert name in nodes["decoder"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_dynamic_axis_takes_any_size(path: Path, rows: int) -> None:
    trace_to_file(affine_request(), path)
    (y,) = run_onnx(path, {"x": feed(rows)})
    assert relative(y, Affine()(torch.from_numpy(feed(rows)))) < 1e-6


def test_tracing_twice_gives_the_same_file(tmp_path: Path) -> None:
    one = trace_to_file(affine_request(), tmp_path / "one.onnx")
    other = trace_to_file(affine_request(), tmp_path / "other.onnx")
    assert one.model.sha256 == other.model.sha256


def test_nothing_of_the_exporting_machine_is_in_the_file(path: Path) -> None:
    trace_to_file(affine_request(), path)
    check_anonymous(path)


def check_anonymous(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        # Numbers, in which any few letters turn up by chance.
        tensor.ClearField("raw_data")
    content = model.SerializeToString()
    here = Path(__file__).resolve()
    for trace in (
        b"site-packages",
        b"dist-packages",
        b".py",
        b"Traceback",
        b'File "',
        b"torch.nn",
        str(here.parents[3]).encode(),
        str(Path(sys.prefix)).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content, trace


def test_the_exported_bundles_are_anonymous_too(small_bundle: Path) -> None:
    for name in ("encoder.onnx", "decoder.onnx"):
        check_anonymous(small_bundle / name)


def test_loggers_and_warnings_are_as_before(path: Path) -> None:
    import logging
    import warnings

    names = ("torch.onnx", "onnx_ir", "onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.INFO)
    levels = [logging.getLogger(name).level for name in names]
    filters = list(warnings.filters)
    trace_to_file(affine_request(), path)
    assert [logging.getLogger(name).level for name in names] == levels
    assert list(warnings.filters) == filters
    logging.getLogger("onnxscript").setLevel(logging.NOTSET)


# --- promises about inputs and outputs ------------------------------------------------------------

BROKEN_PROMISES: dict[str, tuple[dict[str, Any], str]] = {
    "another input size": (
        {"inputs": (TensorSpec("x", "float32", ("batch", 100)),)},
        "x has shape",
    ),
    "another output size": (
        {"outputs": (TensorSpec("y", "float32", ("batch", 100)),)},
        "y has shape",
    ),
    "another rank": ({"outputs": (TensorSpec("y", "float32", ("batch", 1, 300)),)}, "y has shape"),
    "another output type": (
        {"outputs": (TensorSpec("y", "float16", ("batch", 300)),)},
        "y is FLOAT, expected float16",
    ),
    "another input type": (
        {"inputs": (TensorSpec("x", "int64", ("batch", 200)),)},
        "x is FLOAT, expected int64",
    ),
    "a fixed size where the graph takes any": (
        {"inputs": (TensorSpec("x", "float32", (2, 200)),)},
        "x has shape",
    ),
    "any size where the graph is fixed": (
        {"dynamic_shapes": ({0: None},)},
        "x has shape|y has shape",
    ),
}


@pytest.mark.parametrize(
    ("changes", "message"), BROKEN_PROMISES.values(), ids=list(BROKEN_PROMISES)
)
def test_broken_promises_are_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphRuleError, match=message):
        trace_to_file(affine_request(**changes), path)
    assert leftovers(path.parent) == []


def test_an_output_that_loses_its_batch_is_refused(path: Path) -> None:
    request = function_request(lambda x: x.sum(dim=0, keepdim=True))
    with pytest.raises(GraphRuleError, match="y has shape"):
        trace_to_file(request, path)


def test_one_output_less_than_promised_is_refused(path: Path) -> None:
    two = (TensorSpec("y", "float32", ("batch", 300)), TensorSpec("z", "float32", ("batch", 300)))
    with pytest.raises((GraphRuleError, ValueError)):
        trace_to_file(affine_request(outputs=two), path)
    assert leftovers(path.parent) == []


# --- rules ----------------------------------------------------------------------------------------


def graph_of(*nodes: ir.Node, inputs: list[ir.Value] | None = None) -> ir.Model:
    graph = ir.Graph(
        inputs or [],
        list(nodes[-1].outputs),
        nodes=nodes,
        opset_imports={"": 18, "com.example": 1},
    )
    return ir.Model(graph, ir_version=8)


def value(name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([2, 3]), type=ir.TensorType(dtype))


def test_a_plain_graph_passes_the_rules() -> None:
    x = value("x")
    check_rules(graph_of(ir.node("Relu", [x]), inputs=[x]))


@pytest.mark.parametrize("operator", sorted(FORBIDDEN))
def test_forbidden_operators_are_refused(operator: str) -> None:
    x = value("x")
    with pytest.raises(GraphRuleError, match=f"forbidden operators: {operator}"):
        check_rules(graph_of(ir.node(operator, [x]), inputs=[x]))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.topk(x, 6).values, "TopK"),
        (lambda x: x.index_put((torch.tensor([0, 1]),), torch.ones(2, 6)), "ScatterND"),
        (lambda x: x + torch.nonzero(x).sum(), "NonZero"),
    ],
    ids=["TopK", "ScatterND", "NonZero"],
)
def test_modules_that_need_them_are_refused(
    path: Path, function: Callable[..., Any], operator: str
) -> None:
    with pytest.raises(GraphRuleError, match=operator):
        trace_to_file(function_request(function), path)
    assert leftovers(path.parent) == []


def test_operators_of_other_domains_are_refused() -> None:
    x = value("x")
    with pytest.raises(GraphRuleError, match=r"outside ONNX: \['com.example'\]"):
        check_rules(graph_of(ir.node("Fused", [x], domain="com.example"), inputs=[x]))


@pytest.mark.parametrize(
    "dtype", [ir.DataType.DOUBLE, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128]
)
def test_types_that_tensorrt_lacks_are_refused(dtype: ir.DataType) -> None:
    x = value("x")
    node = ir.node("Cast", [x], attributes={"to": dtype.value})
    node.outputs[0].type = ir.TensorType(dtype)
    with pytest.raises(GraphRuleError, match=dtype.name):
        check_rules(graph_of(node, inputs=[x]))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.double(), lambda x: (x.double() + 1e-9).float()],
    ids=["output", "inside"],
)
def test_doubles_are_refused(path: Path, function: Callable[..., Any]) -> None:
    dtype = "float64" if function(torch.zeros(1)).dtype == torch.float64 else "float32"
    with pytest.raises(GraphRuleError, match="DOUBLE"):
        trace_to_file(function_request(function, dtype=dtype), path)
    assert leftovers(path.parent) == []


def test_too_many_nodes_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = trace_to_file(affine_request(), path).nodes
    path.unlink()
    monkeypatch.setattr(tracing, "MAX_NODES", nodes)
    trace_to_file(affine_request(), path)
    path.unlink()
    monkeypatch.setattr(tracing, "MAX_NODES", nodes - 1)
    with pytest.raises(GraphRuleError, match=f"has {nodes} nodes, at most {nodes - 1}"):
        trace_to_file(affine_request(), path)
    assert leftovers(path.parent) == []


def with_size_of_the_second(x: Tensor, y: Tensor) -> Tensor:
    return x.sum(dim=0) + torch.zeros(y.shape[0], 6) + y


def with_size_of_a_copy(x: Tensor, y: Tensor) -> Tensor:
    doubled = y * 2.0
    return x.sum(dim=0) + torch.zeros(doubled.shape[0], 6) + doubled


def broadcasting(x: Tensor, y: Tensor) -> Tensor:
    return x.sum(dim=0) + y


@pytest.mark.parametrize("function", [with_size_of_the_second, with_size_of_a_copy])
def test_computing_with_the_size_of_an_input_is_refused_where_promised(
    path: Path, function: Callable[..., Any]
) -> None:
    request = function_request(function, inputs=2)
    trace_to_file(request, path)
    path.unlink()
    free = dataclasses.replace(request, size_free_inputs=("x1",))
    with pytest.raises(GraphRuleError, match="computes with the size of x1"):
        trace_to_file(free, path)


def test_inputs_may_be_free_of_size(path: Path) -> None:
    request = function_request(broadcasting, inputs=2, size_free_inputs=("x1", "x0"))
    trace_to_file(request, path)
    x, y = feed(4, 6), feed(2, 6)
    assert relative(run_onnx(path, {"x0": x, "x1": y})[0], x.sum(axis=0) + y) < 1e-6


@pytest.mark.parametrize("operator", ["Shape", "Size"])
def test_every_way_to_ask_for_a_size_is_refused(operator: str) -> None:
    x = value("x")
    with pytest.raises(GraphRuleError, match="computes with the size of x"):
        check_rules(graph_of(ir.node(operator, [x]), inputs=[x]), ["x"])


# --- weights as FP16 ------------------------------------------------------------------------------


def test_fp16_storage_halves_the_file_and_rounds_the_weights(tmp_path: Path) -> None:
    full, half = tmp_path / "full.onnx", tmp_path / "half.onnx"
    trace_to_file(affine_request(), full)
    trace_to_file(affine_request(weights="float16"), half)
    onnx.checker.check_model(str(half))
    assert half.stat().st_size < 0.52 * full.stat().st_size
    kinds = {name: array.dtype.name for name, array in initializers(half).items()}
    assert sorted(kinds.values()) == ["float16", "float32"], kinds

    rounded = Affine()
    rounded.matrix.data = rounded.matrix.data.half().float()
    for rows in (1, 3):
        (y,) = run_onnx(half, {"x": feed(rows)})
        assert relative(y, rounded(torch.from_numpy(feed(rows)))) < 1e-6
        assert relative(y, Affine()(torch.from_numpy(feed(rows)))) > 1e-5


def test_small_weights_stay_fp32(path: Path) -> None:
    below, above = Affine(32, 1023), Affine(32, 1024)
    for module, kind in ((below, "float32"), (above, "float16")):
        request = affine_request(
            module=module.eval(),
            arguments=(torch.zeros(2, 32),),
            inputs=(TensorSpec("x", "float32", ("batch", 32)),),
            outputs=(TensorSpec("y", "float32", ("batch", module.bias.numel())),),
            weights="float16",
        )
        trace_to_file(request, path)
        largest = max(initializers(path).values(), key=lambda array: array.size)
        assert largest.dtype.name == kind
    assert tracing.MIN_FP16_VALUES == 32768


def test_whole_numbers_stay_as_they_are(path: Path) -> None:
    table = torch.arange(40000).reshape(200, 200) * 100_000

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.sum(dim=1).remainder(7).to(x.dtype)

    request = affine_request(
        module=Lookup().eval(),
        outputs=(TensorSpec("y", "float32", ("batch", 200)),),
        weights="float16",
    )
    trace_to_file(request, path)
    (y,) = run_onnx(path, {"x": feed(2)})
    assert relative(y, Lookup()(torch.from_numpy(feed(2)))) < 1e-6


def test_one_weight_used_twice_is_stored_once(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(200, 200) / 14)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.matrix) @ self.matrix

    module = Twice().eval()
    request = affine_request(
        module=module, outputs=(TensorSpec("y", "float32", ("batch", 200)),), weights="float16"
    )
    trace_to_file(request, path)
    assert [a.dtype.name for a in initializers(path).values() if a.size > 1] == ["float16"]
    module.matrix.data = module.matrix.data.half().float()
    assert relative(run_onnx(path, {"x": feed(2)})[0], module(torch.from_numpy(feed(2)))) < 1e-5


@pytest.mark.parametrize("wrong", [65520.0, -1e6, float("inf"), float("nan")])
def test_weights_that_do_not_fit_fp16_are_refused(path: Path, wrong: float) -> None:
    module = Affine()
    module.matrix.data[5, 7] = wrong
    with pytest.raises(GraphRuleError, match=r"matrix.* does not fit FP16"):
        trace_to_file(affine_request(module=module.eval(), weights="float16"), path)
    assert leftovers(path.parent) == []


def test_the_largest_fp16_value_fits(path: Path) -> None:
    module = Affine()
    module.matrix.data[5, 7] = 65504.0
    trace_to_file(affine_request(module=module.eval(), weights="float16"), path)
    assert max(array.max() for array in initializers(path).values()) == 65504.0


# --- weights beside the graph ---------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_large_weights_go_into_a_file_of_their_own(
    path: Path, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", 100_000)
    spec = trace_to_file(affine_request(weights=weights), path)
    assert [entry.file for entry in spec.external_data] == ["toy.onnx.data"]
    assert leftovers(path.parent) == ["toy.onnx", "toy.onnx.data"]
    for entry in (spec.model, *spec.external_data):
        file = path.parent / entry.file
        assert (entry.sha256, entry.bytes) == (sha256_file(file), file.stat().st_size)
    assert path.stat().st_size < 10_000
    onnx.checker.check_model(str(path))
    check_anonymous(path)
    expected = Affine()
    if weights == "float16":
        expected.matrix.data = expected.matrix.data.half().float()
    (y,) = run_onnx(path, {"x": feed(2)})
    assert relative(y, expected(torch.from_numpy(feed(2)))) < 1e-6


@pytest.mark.parametrize(("limit", "beside"), [(200 * 300 * 4 + 1200, True), (10**6, False)])
def test_the_size_of_all_weights_decides(
    path: Path, limit: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "EXTERNAL_DATA_BYTES", limit)
    assert bool(trace_to_file(affine_request(), path).external_data) is beside
