"""Where an ONNX file says its tensors lie, read without the onnx package.

A tensor of an ONNX file may name a file, an offset and a length in place of its values. Libraries
that load graphs differ in what they accept there: names that leave the folder, absolute ones, and
even addresses in the process's own memory (``*/_ORT_MEM_ADDR_/*``) have been followed. So the file
is walked before any of them sees it.

What is walked is the wire format of protocol buffers, by the field numbers of ``onnx.proto``. Only
messages that can hold a tensor are entered; everything else is stepped over by its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..errors import BundleError
from .files import FileEntry

# Field numbers of the messages that can hold a tensor, and what each then holds (onnx.proto).
_TENSOR = "TensorProto"
_ENTRY = "StringStringEntryProto"
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: _ENTRY},
}
_DATA_LOCATION = 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
# Protocol buffers' own parsers stop here too.
_MAX_DEPTH = 100
# ONNX Runtime takes a file for its own flat format, whatever its name, by these bytes.
_ORT_FORMAT = b"ORTM"
_NUMBER = re.compile(rb"\d{1,18}")


class _Malformed(ValueError):
    """A file is not in the wire format."""


class _Field(NamedTuple):
    number: int
    kind: int
    start: int
    end: int


def check_tensor_places(content: bytes, file: str, beside: Iterable[FileEntry]) -> None:
    """Refuse an ONNX file whose tensors lie anywhere but in it or in the files vouched for.

    Args:
        content: the ``.onnx`` file.
        file: its name, for messages.
        beside: the files that may hold its weights; a tensor must lie within their lengths.

    Raises:
        BundleError: a tensor names another place, or the file is not an ONNX file.
    """
    lengths = {entry.file.encode(): entry.bytes for entry in beside}
    if content[4:8] == _ORT_FORMAT:
        raise BundleError("is in ONNX Runtime's own format, expected ONNX", file)
    try:
        for tensor in _tensors(content):
            _check_tensor(content, tensor, lengths)
    except _Malformed as error:
        raise BundleError(f"is not an ONNX file: {error}", file) from error
    except _Misplaced as error:
        raise BundleError(str(error), file) from error


class _Misplaced(ValueError):
    """A tensor lies where it must not."""


def _tensors(content: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of every tensor message, wherever it is nested."""
    todo = [("ModelProto", 0, len(content), 0)]
    while todo:
        message, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise _Malformed(f"is nested more than {_MAX_DEPTH} deep")
        if message == _TENSOR:
            yield start, end
            continue
        inner = _MESSAGES[message]
        for field in _fields(content, start, end):
            if field.kind == _BYTES and field.number in inner:
                todo.append((inner[field.number], field.start, field.end, depth + 1))


def _check_tensor(content: bytes, tensor: tuple[int, int], lengths: dict[bytes, int]) -> None:
    """Hold one tensor to the files vouched for.

    Protocol buffers merge a message that comes in parts, so every entry is held to the rules by
    itself, whether or not this part says that the data lie elsewhere.

    Raises:
        _Misplaced: it breaks them.
    """
    place: dict[bytes, bytes] = {}
    elsewhere = False
    for field in _fields(content, *tensor):
        if field.number == _DATA_LOCATION and field.kind == _VARINT:
            elsewhere |= content[field.start : field.end] != b"\0"
        elif field.number in _MESSAGES[_TENSOR] and field.kind == _BYTES:
            key, value = _entry(content, field.start, field.end)
            if key in place:
                raise _Misplaced(f"says twice what the {_shown(key)} of a tensor's data is")
            place[key] = value
    if not place and not elsewhere:
        return
    location = place.get(b"location")
    if location is None:
        raise _Misplaced("has a tensor whose data lie elsewhere, without saying where")
    if location not in lengths:
        raise _Misplaced(
            f"has a tensor whose data lie in {_shown(location)}, a file that the manifest does "
            "not list for this graph"
        )
    end = 0
    for key in (b"offset", b"length"):
        number = place.get(key, b"0")
        if not _NUMBER.fullmatch(number):
            raise _Misplaced(f"has a tensor whose data have the {key.decode()} {_shown(number)}")
        end += int(number)
    if end > lengths[location]:
        raise _Misplaced(
            f"has a tensor whose data end at byte {end} of {_shown(location)}, which has "
            f"{lengths[location]}"
        )


def _entry(content: bytes, start: int, end: int) -> tuple[bytes, bytes]:
    """Key and value of a StringStringEntryProto."""
    parts = {1: b"", 2: b""}
    for field in _fields(content, start, end):
        if field.kind == _BYTES and field.number in parts:
            parts[field.number] = content[field.start : field.end]
    return parts[1], parts[2]


def _fields(content: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of one message.

    Raises:
        _Malformed: the bytes are not a message.
    """
    at = start
    while at < end:
        tag, at = _varint(content, at, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise _Malformed(f"has a field without a number before byte {at}")
        begin = at
        if kind == _VARINT:
            _, at = _varint(content, at, end)
        elif kind == _BYTES:
            length, begin = _varint(content, at, end)
            at = begin + length
        elif kind in _FIXED_BYTES:
            at += _FIXED_BYTES[kind]
        else:
            raise _Malformed(f"has a field of the unknown kind {kind} before byte {at}")
        if at > end:
            raise _Malformed(f"ends within a field that begins at byte {begin}")
        yield _Field(number, kind, begin, at)


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits in groups of seven, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _Malformed(f"ends within a number at byte {at}")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed(f"has a number of more than ten bytes before byte {at}")


def _shown(value: bytes) -> str:
    text = value.decode(errors="backslashreplace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
