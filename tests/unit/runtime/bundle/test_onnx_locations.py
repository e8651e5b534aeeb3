"""Tests of `sam3rt.bundle.onnx_locations`: tensors that lie where a bundle does not say.

Single files, on which all runtimes agree, are in ``tests/conformance/onnx_files.json``.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.support.helpers import examples, noise, relist

from sam3rt import BackendError, BundleError, load_model
from sam3rt.bundle import FileEntry
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.onnx_locations import ExternalTensor, check_tensor_locations, with_addresses

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
    return helper.make_model(
        graph(found), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )


def node_with(name: str, value: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["z"], **{name: value})


def hide(kind: str, found: TensorProto) -> bytes:
    """A model that holds a tensor in one of the places where ONNX allows one."""
    whole = model(helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0]))
    sparse = onnx.SparseTensorProto(values=found, indices=found, dims=[4])
    inner = graph(found)
    if kind == "initializer":
        whole.graph.initializer.append(found)
    elif kind == "attribute":
        whole.graph.node.append(node_with("value", found))
    elif kind == "list of tensors":
        whole.graph.node.append(node_with("values", [found]))
    elif kind == "subgraph of a subgraph":
        outer = graph()
        outer.node.append(node_with("body", inner))
        whole.graph.node.append(node_with("body", outer))
    elif kind == "list of sparse tensors":
        whole.graph.node.append(node_with("values", [sparse]))
    elif kind == "default of a function's attribute":
        function = whole.functions.add(name="f", domain="d")
        function.attribute_proto.append(helper.make_attribute("value", found))
    elif kind == "initialization of a training":
        whole.training_info.add().initialization.CopyFrom(inner)
    return whole.SerializeToString()


HIDING_PLACES = (
    "list of tensors",
    "subgraph of a subgraph",
    "list of sparse tensors",
    "default of a function's attribute",
    "initialization of a training",
)


def check(content: bytes) -> tuple[ExternalTensor, ...]:
    return check_tensor_locations(content, "m.onnx", BESIDE)


def refused(content: bytes, match: str = "") -> None:
    with pytest.raises(BundleError, match=r"m\.onnx.*" + match):
        check(content)


def external(content: bytes) -> list[ExternalTensor]:
    """The initializers that lie elsewhere, as the package onnx reads the file."""
    found = []
    for one in onnx.load_model_from_string(content).graph.initializer:
        place = {entry.key: entry.value for entry in one.external_data}
        if place or one.data_location:
            found.append(
                ExternalTensor(
                    one.name,
                    one.data_type,
                    tuple(one.dims),
                    place["location"],
                    int(place.get("offset", 0)),
                    int(place.get("length", 4 * int(np.prod(one.dims)))),
                )
            )
    return found


def test_initializers_may_lie_beside_the_graph() -> None:
    content = hide("initializer", tensor(location="weights.data", offset=84, length=16, checksum=1))
    assert check(content) == (ExternalTensor("w", TensorProto.FLOAT, (4,), "weights.data", 84, 16),)
    assert check(hide("initializer", tensor(location="weights.data")))[0].length == 16
    assert check(hide("attribute", helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))) == ()


@pytest.mark.parametrize("kind", HIDING_PLACES)
def test_no_tensor_is_overlooked(kind: str) -> None:
    refused(hide(kind, tensor(location="elsewhere.data")))
    refused(hide(kind, tensor(location="weights.data", length=16)))


def tagged(tag: bytes, value: bytes) -> bytes:
    return tag + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


# Encodings that parsers read as the field 5 of a graph: an initializer. Some of them refuse some.
OVERLONG_TAGS = {
    "bits above 32": b"\xaa\x80\x80\x80\x10",
    "two bytes": b"\xaa\x00",
    "five bytes": b"\xaa\x80\x80\x80\x00",
    "ten bytes": b"\xaa" + b"\x80" * 8 + b"\x00",
}


def with_tag(tag: bytes, found: TensorProto) -> bytes:
    """A model with a second initializer behind a tag of our choice."""
    outer = graph()
    outer.node[0].CopyFrom(helper.make_node("Add", ["x", "w"], ["y"]))
    inner = outer.SerializeToString() + tagged(tag, found.SerializeToString())
    return b"\x08\x08" + tagged(b"\x3a", inner) + b"\x42\x02\x10\x12"


def test_openvino_follows_a_location_behind_an_overlong_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the next tests worth something: so a secret came into the feature maps.

    Since 2026.4 OpenVINO stays below the working directory.
    """
    monkeypatch.chdir(tmp_path)
    openvino = pytest.importorskip("openvino")
    secret = np.arange(4, dtype=np.float32)
    secret.tofile(tmp_path / "secret")
    absolute = tensor(location=str(tmp_path / "secret"), offset=0, length=16)
    for name in ("bits above 32", "two bytes", "five bytes"):
        content = with_tag(OVERLONG_TAGS[name], absolute)
        core = openvino.Core()
        found = core.compile_model(core.read_model(content), "CPU")(np.zeros(4, np.float32))[0]
        np.testing.assert_array_equal(found, secret)


@pytest.mark.parametrize("name", OVERLONG_TAGS)
def test_overlong_tags_are_refused(name: str) -> None:
    content = with_tag(OVERLONG_TAGS[name], tensor(location="/etc/passwd"))
    refused(content, "not an ONNX file")
    inside = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    refused(with_tag(OVERLONG_TAGS[name], inside), "not an ONNX file")
    assert check(with_tag(b"\x2a", inside)) == ()


# A tensor in encodings that parsers may read in different ways.
PLAIN = tensor(location="weights.data", length=16).SerializeToString()
ODD = {
    "a location beyond 32 bits": PLAIN.replace(b"\x70\x01", b"\x70\x81\x80\x80\x80\x10"),
    "two locations": PLAIN + b"\x70\x01",
    "a type beyond 32 bits": PLAIN.replace(b"\x10\x01", b"\x10\x81\x80\x80\x80\x10"),
    "a segment": PLAIN + tagged(b"\x1a", b""),
}


def with_initializer(found: bytes) -> bytes:
    """A model with a serialized tensor as its initializer."""
    inner = graph().SerializeToString() + tagged(b"\x2a", found)
    return b"\x08\x08" + tagged(b"\x3a", inner) + b"\x42\x02\x10\x12"


@pytest.mark.parametrize("kind", ODD)
def test_odd_encodings_are_refused(kind: str) -> None:
    assert check(with_initializer(PLAIN))
    refused(with_initializer(ODD[kind]))


def test_engines_inside_a_graph_are_refused() -> None:
    whole = model(helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    whole.graph.node[0].op_type = "EPContext"
    refused(whole.SerializeToString(), "operator")


def test_accepted_operators_are_onnx_own_and_hold_no_graphs() -> None:
    from sam3rt.bundle.onnx_locations import _OPERATORS

    kinds = onnx.defs.OpSchema.AttrType
    for name in _OPERATORS:
        schema = onnx.defs.get_schema(name.decode())
        assert schema.domain == ""
        used = {attribute.type for attribute in schema.attributes.values()}
        assert not used & {kinds.GRAPH, kinds.GRAPHS}, name


def test_accepted_fields_are_those_of_onnx() -> None:
    """Names, numbers and wire formats are those of the installed ``onnx.proto``."""
    from sam3rt.bundle.onnx_wire import MESSAGES

    formats = {1: 1, 2: 5, 3: 0, 4: 0, 5: 0, 9: 2, 11: 2, 12: 2, 13: 0, 14: 0}
    for message, rules in MESSAGES.items():
        descriptor = getattr(onnx, message).DESCRIPTOR
        for number, rule in rules.items():
            field = descriptor.fields_by_number[number]
            repeated = hasattr(getattr(onnx, message)(), field.name) and not isinstance(
                getattr(getattr(onnx, message)(), field.name), int | float | str | bytes | Message
            )
            assert rule.is_list == repeated, field.full_name
            wanted = {formats[field.type]}
            if repeated:
                wanted |= {2}  # packed
            assert set(rule.formats) == wanted, field.full_name


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"location": "weights.data", "offset": 85, "length": 16}, "end at byte 101"),
        ({"location": "weights.data", "length": 15}, "its shape has 16"),
        ({"location": "weights.data", "prepacked_0": "k|0;16;s"}, "prepacked_0"),
        ({"offset": 0, "length": 16}, "without saying where"),
    ],
)
def test_the_message_says_what_is_wrong_with_a_place(place: dict[str, object], said: str) -> None:
    refused(hide("initializer", tensor(**place)), said)


@pytest.mark.parametrize("mark", [b"ORTM", b"TFL3"])
def test_other_formats_are_refused(mark: bytes) -> None:
    refused(b"\x0a\x02\0\0" + mark + b"\0" * 20, "another format")
    whole = hide("initializer", helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    refused(whole[:2] + tagged(b"\x12", mark) + whole[2:], "another format")


def test_files_of_another_name_are_refused() -> None:
    content = hide("initializer", helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0]))
    for name in ("encoder.ort", "encoder.xml", "encoder"):
        with pytest.raises(BundleError, match="reader by the name"):
            check_tensor_locations(content, name, ())


IR = '<net name="n" version="11"><layers></layers><edges></edges></net>'


@pytest.mark.parametrize(
    "content",
    [
        *(f"{blank}{IR}".encode() for blank in ("", "\n", "\r\n", " ", "\t", "\ufeff")),
        IR.encode("utf-16"),
        f"\n{IR}".encode("utf-16-be"),
    ],
)
def test_openvinos_own_format_is_refused(content: bytes) -> None:
    refused(content)


def nested(depth: int) -> bytes:
    """A model whose graph holds a node that holds a graph, and so on."""
    content = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute's graph, node's attribute, graph's node
            content = tagged(tag, content)
    return tagged(b"\x3a", content)


def test_deep_nesting_is_refused() -> None:
    for depth in (1, 20, 5000):
        refused(nested(depth))


def starts() -> list[bytes]:
    """Files to change: several initializers, beside the graph and inside."""
    whole = model(tensor(location="weights.data", offset=16, length=16))
    whole.graph.initializer.append(tensor(location="weights.data", offset=84))
    whole.graph.initializer[-1].name = "u"
    whole.graph.initializer.append(helper.make_tensor("v", TensorProto.FLOAT, [2, 2], [1.0] * 4))
    whole.graph.node.append(
        node_with("value", helper.make_tensor("c", TensorProto.INT64, [3], [1, 2, 3]))
    )
    helper.set_model_props(whole, {"sam3rt.export_id": "0" * 64})
    return [whole.SerializeToString(), with_tag(b"\x2a", tensor(location="weights.data"))]


def changed(data: st.DataObject, content: bytes) -> bytes:
    """A few bytes replaced, removed, repeated, or put in: tags, lengths and overlong numbers."""
    out = bytearray(content)
    pieces = [b"\x2a", b"\x3a", b"\x70\x01", b"\x6a\x00", *OVERLONG_TAGS.values()]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(out)))
        end = start + data.draw(st.integers(0, 3))
        fresh = data.draw(st.sampled_from(pieces) | st.binary(max_size=3) | st.just(out[start:end]))
        out[start : data.draw(st.sampled_from([start, end]))] = fresh
    return bytes(out)


@given(data=st.data())
@examples(600)
def test_what_is_accepted_is_read_alike_by_protocol_buffers(data: st.DataObject) -> None:
    """Whatever the walk lets through, onnx's own parser sees the same tensors elsewhere."""
    content = changed(data, data.draw(st.sampled_from(STARTS)))
    try:
        said = check(content)
    except BundleError:
        return
    try:
        found = external(content)
    except DecodeError:  # then libraries refuse it too
        return
    assert list(said) == found
    for one in found:
        assert one.location == "weights.data"
        assert one.offset + one.length <= 100


STARTS = starts()


def test_unchanged_files_are_read_alike() -> None:
    for content in STARTS:
        assert list(check(content)) == external(content) != []


def test_weights_may_be_replaced_by_addresses() -> None:
    weights = np.arange(25, dtype=np.float32)
    for content in STARTS:
        fresh = with_addresses(content, {"weights.data": weights.ctypes.data})
        loaded = onnx.load_model_from_string(fresh)
        before = onnx.load_model_from_string(content)
        for one, old in zip(loaded.graph.initializer, before.graph.initializer, strict=True):
            place = {entry.key: entry.value for entry in one.external_data}
            if not place:
                assert one == old
                continue
            was = {entry.key: entry.value for entry in old.external_data}
            assert int(place["offset"]) == weights.ctypes.data + int(was.get("offset", 0))
            assert place["length"] == "16"
            assert (one.name, one.dims) == (old.name, old.dims)
            one.ClearField("external_data")
            old.ClearField("external_data")
        assert loaded == before
        refused(fresh, "MEM_ADDR")


# --- whole bundles --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(default_bundle_path().glob("*.onnx")), ids=lambda p: p.name)
def test_the_bundled_graphs_hold_their_own_weights(path: Path) -> None:
    check_tensor_locations(path.read_bytes(), path.name, ())


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


def hide_behind_an_overlong_tag(bundle: Path, location: Path) -> None:
    """Move the decoder's first weight to an absolute location, behind a tag of more than 32 bits.

    C++'s protocol buffers drop the bits above, so that it is an initializer as before.
    """
    loaded = onnx.load(bundle / "decoder.onnx")
    move_a_weight(str(location))(loaded)
    moved = next(w for w in loaded.graph.initializer if w.external_data)
    loaded.graph.initializer.remove(moved)
    inner = loaded.graph.SerializeToString()
    inner += tagged(OVERLONG_TAGS["bits above 32"], moved.SerializeToString())
    loaded.ClearField("graph")
    content = loaded.SerializeToString() + tagged(b"\x3a", inner)
    (bundle / "decoder.onnx").write_bytes(content)
    relist(bundle)


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("a library got the file")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_overlong_tag_reaches_no_library(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 10_000_000)
    bundle = hostile(tmp_path, lambda loaded: None)
    hide_behind_an_overlong_tag(bundle, tmp_path / "secret")
    model = load_model(bundle, backend=backend, device="cpu", precision="fp32")
    model.encode(noise(8, 8))  # the encoder is as it was
    if backend == "onnxruntime":
        monkeypatch.setattr("onnxruntime.InferenceSession", never)
    else:
        monkeypatch.setattr(model.backend, "_core", SimpleNamespace(read_model=never))
    with pytest.raises(BundleError, match=r"decoder\.onnx.*is not an ONNX file"):
        model.warm_up()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_openvino_ir_in_the_encoders_place_is_refused(backend: str, tmp_path: Path) -> None:
    bundle = hostile(tmp_path, lambda loaded: None)
    (bundle / "encoder.onnx").write_text(f"\n{IR}")
    relist(bundle)
    model = load_model(bundle, backend=backend, device="cpu", precision="fp32")
    with pytest.raises(BundleError, match=r"encoder\.onnx.*is not an ONNX file"):
        model.encode(noise(8, 8))


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
