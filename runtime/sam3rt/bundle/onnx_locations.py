"""Where an ONNX file says its tensors lie, read without the onnx package.

A tensor of an ONNX file may name a file, an offset and a length in place of its values. Libraries
that load graphs differ in what they accept there: names that leave the folder, absolute ones, and
even addresses in the process's own memory (``*/_ORT_MEM_ADDR_/*``) have been followed. So the file
is walked before any of them sees it.

A walk is worth something only if the libraries read the same file in the same way. Parsers of
protocol buffers differ in what they make of odd encodings, so only the plain encoding that every
writer produces is accepted, and only what bundles need. An ONNX file is refused unless:

1. Its name ends in ``.onnx``. Bytes 4 to 7 are not the mark of another format (``ORTM`` of ONNX
   Runtime, ``TFL3`` of TensorFlow Lite), which libraries look at before anything else.
2. Numbers take as few bytes as they can. Tags fit into 32 bits and other numbers into 64; parsers
   drop bits above. Messages end where their last field ends. No field has the number 0, and none is
   a group.
3. Every message that is entered holds only the fields listed in ``onnx_wire.MESSAGES``, each in the
   wire format listed there, and at most once unless it is a list. That leaves no functions, no
   training information, no subgraphs and no sparse tensors. It refuses an OpenVINO IR too, since a
   text that begins with ``<``, blank or not, begins with a field in another format than listed.
   Messages that can hold neither tensors nor operators are stepped over by their length.
4. There is a graph, all operators are in ``_OPERATORS``, and the domains of nodes and
   operator sets are ONNX's own. Graphs that were made from a bundle for ONNX Runtime may also hold
   the operators of its domain in ``_FUSED``.
5. A tensor's type has a size of whole bytes, and raw data are of the size that type and shape give.
6. Data lie elsewhere only for initializers that say so (``data_location`` is 1 exactly if there is
   ``external_data``) and hold no data themselves. Keys are ``location``, ``offset``, ``length`` and
   ``checksum``, each at most once. The location is a file that the caller vouches for, numbers are
   decimal without leading zeros, the length is what type and shape give, and the data end within
   the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import BundleError
from .files import FileEntry
from .onnx_wire import Field, Malformed, Refused, fields, message_field, numbers

_TENSOR_VALUES = frozenset([4, 5, 7, 9, 10, 11])

# Operators of ONNX without subgraphs, sequences, strings and random numbers. Exports and what is
# made from them use about half of these.
_OPERATORS = frozenset(
    b"""
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or
    PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Where Xor
    """.split()
)
_DOMAINS = (b"", b"ai.onnx")
_FUSED = frozenset(b"BiasGelu MultiHeadAttention RotaryEmbedding SkipLayerNormalization".split())
_FUSED_DOMAIN = b"com.microsoft"
# Bytes of an element, by TensorProto.DataType.
_ELEMENT_BYTES = {
    **dict.fromkeys((2, 3, 9), 1),  # uint8, int8, bool
    **dict.fromkeys((4, 5, 10, 16), 2),  # uint16, int16, float16, bfloat16
    **dict.fromkeys((1, 6, 12), 4),  # float32, int32, uint32
    **dict.fromkeys((7, 11, 13), 8),  # int64, float64, uint64
}
_OTHER_FORMATS = (b"ORTM", b"TFL3")
_KEYS = (b"location", b"offset", b"length", b"checksum")
_DECIMAL = re.compile(rb"0|[1-9]\d{0,17}")
# How ONNX and its readers name memory of this process in place of a file.
_MEMORY = b"*/_ORT_MEM_ADDR_/*"


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose data lie in a file beside the graph.

    Attributes:
        name: its name.
        data_type: its element type, a ``TensorProto.DataType``.
        shape: its sizes.
        location: the file.
        offset: where in the file its data begin.
        length: how many bytes they take.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def check_tensor_locations(
    content: bytes, file: str, beside: Iterable[FileEntry], *, is_fused: bool = False
) -> tuple[ExternalTensor, ...]:
    """Refuse an ONNX file that breaks the rules above.

    Args:
        content: the ``.onnx`` file.
        file: its name, for messages.
        beside: the files that may hold its weights.
        is_fused: whether it may hold ONNX Runtime's own operators.

    Returns:
        The tensors whose data lie in those files, in the file's order.

    Raises:
        BundleError: it breaks one.
    """
    if not file.endswith(".onnx"):
        raise BundleError("is not named .onnx: libraries choose a reader by the name", file)
    if content[4:8] in _OTHER_FORMATS:
        mark = content[4:8].decode()
        raise BundleError(f"is in another format, marked {mark}, expected ONNX", file)
    lengths = {entry.file.encode(): entry.bytes for entry in beside}
    try:
        return tuple(_external_tensors(content, lengths, is_fused))
    except Malformed as error:
        raise BundleError(f"is not an ONNX file: {error}", file) from error
    except Refused as error:
        raise BundleError(str(error), file) from error


def with_addresses(content: bytes, addresses: Mapping[str, int]) -> bytes:
    """The graph with its weights in this process's memory in place of files.

    OpenVINO's ONNX reader follows such addresses. ONNX Runtime does not: it takes the files'
    content by ``SessionOptions.add_external_initializers_from_files_in_memory``.

    Args:
        content: an ``.onnx`` file that :func:`check_tensor_locations` has accepted.
        addresses: where each file's content begins in memory, by the file's name.

    Returns:
        A graph that is good for as long as the memory is.
    """
    graph = next(f for f in fields(content, 0, len(content), "ModelProto") if f.number == 7)
    parts = []
    for field in fields(content, graph.start, graph.end, "GraphProto"):
        whole = content[field.tag : field.end]
        tensor = _external_tensor(content, field, None) if field.number == 5 else None
        if tensor is not None:
            kept = [
                content[inner.tag : inner.end]
                for inner in fields(content, field.start, field.end, "TensorProto")
                if inner.number != 13
            ]
            address = addresses[tensor.location] + tensor.offset
            for key, value in (
                (b"location", _MEMORY),
                (b"offset", b"%d" % address),
                (b"length", b"%d" % tensor.length),
            ):
                kept.append(message_field(13, message_field(1, key) + message_field(2, value)))
            whole = message_field(5, b"".join(kept))
        parts.append(whole)
    return content[: graph.tag] + message_field(7, b"".join(parts)) + content[graph.end :]


def _external_tensors(
    content: bytes, lengths: dict[bytes, int], is_fused: bool
) -> Iterator[ExternalTensor]:
    has_graph = False
    domains = (*_DOMAINS, _FUSED_DOMAIN) if is_fused else _DOMAINS
    for field in fields(content, 0, len(content), "ModelProto"):
        if field.number == 8:
            for inner in fields(content, field.start, field.end, "OperatorSetIdProto"):
                if inner.number == 1:
                    _check_domain(content[inner.start : inner.end], domains)
        elif field.number == 7:
            has_graph = True
            for inner in fields(content, field.start, field.end, "GraphProto"):
                if inner.number == 1:
                    _check_node(content, inner, domains)
                elif inner.number == 5:
                    tensor = _external_tensor(content, inner, lengths)
                    if tensor is not None:
                        yield tensor
    if not has_graph:
        raise Malformed("it holds no graph")


def _check_node(content: bytes, node: Field, domains: tuple[bytes, ...]) -> None:
    operator = domain = b""
    for field in fields(content, node.start, node.end, "NodeProto"):
        if field.number == 4:
            operator = content[field.start : field.end]
        elif field.number == 7:
            domain = content[field.start : field.end]
            _check_domain(domain, domains)
        elif field.number == 5:
            for inner in fields(content, field.start, field.end, "AttributeProto"):
                if inner.number == 5 and _external_tensor(content, inner, {}) is not None:
                    raise Refused("has a tensor in an attribute whose data lie elsewhere")
    if operator not in (_FUSED if domain == _FUSED_DOMAIN else _OPERATORS):
        raise Refused(f"has the operator {_shown(operator)}, which no bundle needs")


def _check_domain(domain: bytes, domains: tuple[bytes, ...]) -> None:
    if domain not in domains:
        raise Refused(f"uses operators of the domain {_shown(domain)}, not ONNX's own")


def _external_tensor(
    content: bytes, tensor: Field, lengths: dict[bytes, int] | None
) -> ExternalTensor | None:
    """A tensor whose data lie elsewhere; ``None`` for one that holds them itself.

    Args:
        content: the file.
        tensor: the field with it.
        lengths: length of each file that may hold data; ``None`` skips that check.

    Raises:
        Refused: it breaks a rule.
    """
    entries: dict[bytes, bytes] = {}
    data_type = 0
    is_external, has_values = False, False
    raw_bytes: int | None = None
    shape: tuple[int, ...] = ()
    name = b""
    for field in fields(content, tensor.start, tensor.end, "TensorProto"):
        if field.number == 1:
            shape += tuple(numbers(content, field))
        elif field.number == 2:
            data_type = field.value
        elif field.number == 8:
            name = content[field.start : field.end]
        elif field.number == 13:
            key, value = _entry(content, field)
            if key not in _KEYS:
                raise Refused(f"has a tensor whose data lie at an unknown {_shown(key)}")
            if key in entries:
                raise Refused(f"says twice what the {_shown(key)} of a tensor's data is")
            entries[key] = value
        elif field.number == 14:
            if field.value > 1:
                raise Refused(f"has a tensor whose data location is {field.value}")
            is_external = field.value == 1
        elif field.number in _TENSOR_VALUES:
            has_values = True
            if field.number == 9:
                raw_bytes = field.end - field.start
    if data_type not in _ELEMENT_BYTES:
        raise Refused(f"has a tensor {_shown(name)} of a type that no bundle needs")
    nbytes = math.prod(shape) * _ELEMENT_BYTES[data_type]
    if raw_bytes not in (None, nbytes):
        raise Refused(
            f"has a tensor {_shown(name)} with {raw_bytes} bytes of data, its shape has {nbytes}"
        )
    if not is_external and not entries:
        return None
    if not is_external or has_values:
        raise Refused(f"has a tensor {_shown(name)} whose data lie both in the file and elsewhere")
    location, offset = _location(entries, nbytes, lengths)
    text = name.decode(errors="backslashreplace")
    return ExternalTensor(text, data_type, shape, location.decode(), offset, nbytes)


def _location(
    entries: dict[bytes, bytes], nbytes: int, lengths: dict[bytes, int] | None
) -> tuple[bytes, int]:
    """File and offset of a tensor's data, held to the files that are vouched for."""
    location = entries.get(b"location")
    if location is None:
        raise Refused("has a tensor whose data lie elsewhere, without saying where")
    if lengths is not None and location not in lengths:
        raise Refused(
            f"has a tensor whose data lie in {_shown(location)}, a file that the manifest does "
            "not list for this graph"
        )
    for key in (b"offset", b"length"):
        number = entries.get(key, b"0")
        if not _DECIMAL.fullmatch(number):
            raise Refused(f"has a tensor whose data have the {key.decode()} {_shown(number)}")
    offset = int(entries.get(b"offset", b"0"))
    length = int(entries.get(b"length", b"%d" % nbytes))
    if length != nbytes:
        raise Refused(f"has a tensor whose data have the length {length}, its shape has {nbytes}")
    end = offset + length
    limit = math.inf if lengths is None else lengths[location]
    if end > limit:
        raise Refused(
            f"has a tensor whose data end at byte {end} of {_shown(location)}, which has {limit}"
        )
    return location, offset


def _entry(content: bytes, entry: Field) -> tuple[bytes, bytes]:
    """Key and value of a StringStringEntryProto."""
    parts = {1: b"", 2: b""}
    for field in fields(content, entry.start, entry.end, "StringStringEntryProto"):
        parts[field.number] = content[field.start : field.end]
    return parts[1], parts[2]


def _shown(value: bytes) -> str:
    text = value.decode(errors="backslashreplace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
