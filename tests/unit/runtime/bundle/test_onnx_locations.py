"""Tests of `sam3rt.bundle.onnx_locations`: tensors that lie where a bundle does not say."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.support.helpers import examples, flip, noise, relist

from sam3rt import BackendError, BundleError, load_model
from sam3rt.bundle import FileEntry
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.onnx_locations import check_tensor_places

BESIDE = (FileEntry("weights.data", "0" * 64, 100),)


def tensor(**place: object) -> TensorProto:
    """Four floats that lie elsewhere, at what ``place`` says."""
    found = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
    )
    for key, value in place.items():
        found.external_data.add(key=key, value=str(value))
    return found


def graph(*initializers: TensorProto) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    return helper.make_graph(nodes, "g", values[:1], values[1:], initializers)


def model(found: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph(found), opset_imports=[helper.make_opsetid("", 18)])


def node_with(name: str, value: object) -> onnx.NodeProto:
    return helper.make_node("Anything", [], ["z"], **{name: value})


def hide(kind: str, found: TensorProto) -> bytes:
    """A model that holds a tensor in one of the places where ONNX allows one."""
    whole = model(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    sparse = onnx.SparseTensorProto(values=found, indices=found, dims=[4])
    inner = graph(found)
    if kind == "initializer":
        whole.graph.initializer.append(found)
    elif kind == "attribute":
        whole.graph.node.append(node_with("value", found))
    elif kind == "list of tensors":
        whole.graph.node.append(node_with("values", [found]))
    elif kind == "subgraph":
        whole.graph.node.append(node_with("body", inner))
    elif kind == "list of subgraphs":
        whole.graph.node.append(node_with("bodies", [inner]))
    elif kind == "subgraph of a subgraph":
        outer = graph()
        outer.node.append(node_with("body", inner))
        whole.graph.node.append(node_with("body", outer))
    elif kind == "sparse initializer":
        whole.graph.sparse_initializer.append(sparse)
    elif kind == "sparse attribute":
        whole.graph.node.append(node_with("value", sparse))
    elif kind == "list of sparse tensors":
        whole.graph.node.append(node_with("values", [sparse]))
    elif kind == "function":
        function = whole.functions.add(name="f", domain="d")
        function.node.append(node_with("value", found))
    elif kind == "default of a function's attribute":
        function = whole.functions.add(name="f", domain="d")
        function.attribute_proto.append(helper.make_attribute("value", found))
    elif kind == "training":
        whole.training_info.add().algorithm.CopyFrom(inner)
    elif kind == "initialization of a training":
        whole.training_info.add().initialization.CopyFrom(inner)
    return whole.SerializeToString()


HIDING_PLACES = (
    "initializer",
    "attribute",
    "list of tensors",
    "subgraph",
    "list of subgraphs",
    "subgraph of a subgraph",
    "sparse initializer",
    "sparse attribute",
    "list of sparse tensors",
    "function",
    "default of a function's attribute",
    "training",
    "initialization of a training",
)
LOCATIONS = (
    "../weights.data",
    "/etc/passwd",
    "./weights.data",
    "sub/../weights.data",
    "weights.data/",
    "weights.data\0",
    "WEIGHTS.DATA",
    "\\\\server\\weights.data",
    "file:weights.data",
    "*/_ORT_MEM_ADDR_/*",
    "",
)


@pytest.mark.parametrize("kind", HIDING_PLACES)
def test_no_tensor_is_overlooked(kind: str) -> None:
    check_tensor_places(hide(kind, tensor(location="weights.data", length=16)), "m.onnx", BESIDE)
    with pytest.raises(BundleError, match=r"m\.onnx.*elsewhere\.data"):
        check_tensor_places(hide(kind, tensor(location="elsewhere.data")), "m.onnx", BESIDE)


def test_every_field_of_onnx_that_can_hold_a_tensor_is_walked() -> None:
    """Field numbers are those of the installed ``onnx.proto``."""
    from sam3rt.bundle.onnx_locations import _MESSAGES

    holders = {"TensorProto"}
    kinds = {
        name: value.DESCRIPTOR
        for name, value in vars(onnx).items()
        if isinstance(value, type) and hasattr(value, "DESCRIPTOR")
    }
    assert "ModelProto" in kinds
    while True:
        more = {
            name
            for name, kind in kinds.items()
            if any(f.message_type and f.message_type.name in holders for f in kind.fields)
        }
        if more <= holders:
            break
        holders |= more
    wanted = {
        name: {
            field.number: field.message_type.name
            for field in kinds[name].fields
            if field.message_type and field.message_type.name in holders
        }
        for name in holders
        if name != "TensorProto"
    }
    walked = {name: fields for name, fields in _MESSAGES.items() if name != "TensorProto"}
    # Values of sequences and maps, and libraries of functions, are files of their own.
    assert walked == {name: wanted[name] for name in walked}
    assert set(wanted) - set(walked) == {
        "SequenceProto",
        "MapProto",
        "OptionalProto",
        "OperatorSetProto",
    }
    field = kinds["TensorProto"].fields_by_name["external_data"]
    assert _MESSAGES["TensorProto"] == {field.number: field.message_type.name}


@pytest.mark.parametrize("location", LOCATIONS)
def test_other_places_are_refused(location: str) -> None:
    with pytest.raises(BundleError, match=r"m\.onnx"):
        check_tensor_places(hide("initializer", tensor(location=location)), "m.onnx", BESIDE)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"location": "weights.data", "offset": 85, "length": 16}, "end at byte 101"),
        ({"location": "weights.data", "offset": 10**17}, "which has 100"),
        ({"location": "weights.data", "length": 10**40}, "length"),
        ({"location": "weights.data", "offset": -1}, "offset '-1'"),
        ({"location": "weights.data", "offset": "0x10"}, "offset"),
        ({"location": "weights.data", "length": ""}, "length"),
        ({"offset": 0, "length": 16}, "without saying where"),
        ({}, "without saying where"),
    ],
)
def test_data_beyond_the_file_are_refused(place: dict[str, object], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        check_tensor_places(hide("initializer", tensor(**place)), "m.onnx", BESIDE)


def test_data_to_the_end_of_the_file_are_taken() -> None:
    found = tensor(location="weights.data", offset=84, length=16, checksum="anything")
    check_tensor_places(hide("initializer", found), "m.onnx", BESIDE)


def test_a_place_said_twice_is_refused() -> None:
    """Readers differ in which of the two they take."""
    found = tensor(location="weights.data")
    found.external_data.add(key="location", value="weights.data")
    with pytest.raises(BundleError, match="twice"):
        check_tensor_places(hide("initializer", found), "m.onnx", BESIDE)


def test_a_place_counts_even_where_the_data_are_said_to_be_inside() -> None:
    """Messages in parts are merged, so the part that says otherwise may come later."""
    found = tensor(location="../elsewhere")
    found.data_location = TensorProto.DEFAULT
    with pytest.raises(BundleError, match="elsewhere"):
        check_tensor_places(hide("attribute", found), "m.onnx", BESIDE)


def test_a_message_in_two_parts_is_walked_whole() -> None:
    inside = hide("initializer", helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]))
    outside = hide("attribute", tensor(location="elsewhere"))
    with pytest.raises(BundleError, match="elsewhere"):
        check_tensor_places(inside + outside, "m.onnx", BESIDE)


def test_onnx_runtimes_own_format_is_refused() -> None:
    with pytest.raises(BundleError, match="own format"):
        check_tensor_places(b"\x0a\x02\0\0ORTM" + b"\0" * 20, "m.onnx", ())


@pytest.mark.parametrize(
    "content",
    [
        b"\x00",  # a field without a number
        b"\x3a\x05ab",  # ends within a field
        b"\x3b",  # a group
        b"\x3a" + b"\xff" * 11,  # a number without an end
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # nine exabytes
        b"<net/>",
        b"\x3a" * 3,
    ],
)
def test_what_is_no_onnx_file_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match="is not an ONNX file"):
        check_tensor_places(content, "m.onnx", ())


def nested(depth: int) -> bytes:
    """A model whose graph holds a node that holds a graph, and so on."""
    content = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute's graph, node's attribute, graph's node
            content = tag + onnx_varint(len(content)) + content
    return b"\x3a" + onnx_varint(len(content)) + content


def onnx_varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def test_deep_nesting_is_refused_without_recursion() -> None:
    check_tensor_places(nested(20), "m.onnx", ())
    with pytest.raises(BundleError, match="deep"):
        check_tensor_places(nested(5000), "m.onnx", ())


@given(data=st.data())
@examples(200)
def test_damage_raises_only_bundle_errors(data: st.DataObject) -> None:
    content = hide(data.draw(st.sampled_from(HIDING_PLACES)), tensor(location="weights.data"))
    damaged = flip(content, data.draw(st.integers(0, 8 * len(content) - 1)))
    cut = damaged[: data.draw(st.integers(0, len(damaged)))]
    for candidate in (damaged, cut):
        with contextlib.suppress(BundleError):
            check_tensor_places(candidate, "m.onnx", BESIDE)


# --- whole bundles --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(default_bundle_path().glob("*.onnx")), ids=lambda p: p.name)
def test_the_bundled_graphs_hold_their_own_weights(path: Path) -> None:
    check_tensor_places(path.read_bytes(), path.name, ())


def hostile(folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The bundled model with a changed decoder and a manifest that vouches for it."""
    bundle = folder / "hostile"
    shutil.copytree(default_bundle_path(), bundle, ignore=shutil.ignore_patterns("verdicts"))
    loaded = onnx.load(bundle / "decoder.onnx")
    change(loaded)
    onnx.save(loaded, bundle / "decoder.onnx")
    relist(bundle)
    return bundle


def move_a_weight(location: str, offset: int = 0) -> Callable[[onnx.ModelProto], object]:
    """Let the first weight lie somewhere else."""

    def change(loaded: onnx.ModelProto) -> None:
        weight = next(w for w in loaded.graph.initializer if len(w.raw_data) > 64)
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            weight.external_data.add(key=key, value=str(value))

    return change


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_reads_another_file_is_refused(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 10_000_000)
    monkeypatch.chdir(tmp_path)
    model = load_model(hostile(tmp_path, move_a_weight("secret")), backend=backend, device="cpu")
    with pytest.raises(BundleError, match=r"decoder\.onnx.*'secret'"):
        model.warm_up()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_reads_memory_is_refused(backend: str, tmp_path: Path) -> None:
    secret = ctypes.create_string_buffer(10_000_000)
    change = move_a_weight("*/_ORT_MEM_ADDR_/*", ctypes.addressof(secret))
    model = load_model(hostile(tmp_path, change), backend=backend, device="cpu")
    with pytest.raises(BundleError, match=r"decoder\.onnx.*MEM_ADDR"):
        model.warm_up()


@pytest.mark.parametrize("check_files", [True, False])
def test_a_link_out_of_the_bundle_is_not_opened(check_files: bool, tmp_path: Path) -> None:
    bundle = hostile(tmp_path, lambda loaded: None)
    (bundle / "encoder.onnx").rename(tmp_path / "outside.onnx")
    (bundle / "encoder.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match="link that leaves"):
        load_model(bundle, backend="onnxruntime", device="cpu", check_files=check_files).encode(
            noise(8, 8)
        )


@pytest.mark.parametrize("check_files", [True, False])
def test_a_file_of_another_length_is_not_read(check_files: bool, tmp_path: Path) -> None:
    """A sparse file of a terabyte takes no room on the disk, and all of it in memory."""
    bundle = hostile(tmp_path, lambda loaded: None)
    with (bundle / "encoder.onnx").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BundleError, match="1099511627776 bytes"):
        load_model(bundle, backend="onnxruntime", device="cpu", check_files=check_files).encode(
            noise(8, 8)
        )


def test_a_file_that_vanishes_after_the_check(tmp_path: Path) -> None:
    bundle = hostile(tmp_path, lambda loaded: None)
    model = load_model(bundle, backend="onnxruntime", device="cpu")
    (bundle / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx.*missing"):
        model.encode(noise(8, 8))


def test_an_allocation_that_cannot_be_is_a_backend_error(tmp_path: Path) -> None:
    """A graph may still ask for more memory than there is while it runs."""

    def change(loaded: onnx.ModelProto) -> None:
        shape = helper.make_tensor("huge", TensorProto.INT64, [2], [1 << 22, 1 << 22])
        loaded.graph.initializer.append(shape)
        zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
        name = loaded.graph.output[0].name
        for node in loaded.graph.node:
            node.output[:] = [f"{o}_first" if o == name else o for o in node.output]
        loaded.graph.node.append(
            helper.make_node("ConstantOfShape", ["huge"], ["allocated"], value=zero)
        )
        loaded.graph.node.append(helper.make_node("ReduceMax", ["allocated"], ["most"], keepdims=0))
        loaded.graph.node.append(helper.make_node("Add", [f"{name}_first", "most"], [name]))

    bundle = hostile(tmp_path, change)
    model = load_model(bundle, backend="onnxruntime", device="cpu")
    with pytest.raises(BackendError):
        model.warm_up()
