"""ONNX files as messages in the wire format of protocol buffers, in its plain encoding only.

Parsers differ in what they make of odd encodings. What every writer produces is read by all of them
in the same way, so nothing else is accepted; see :mod:`.onnx_locations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


class _Rule(NamedTuple):
    """Wire formats that a field may have, and whether it may come more than once."""

    formats: tuple[int, ...]
    is_list: bool = False


_NUMBER, _FLOAT, _ONE = _Rule((_VARINT,)), _Rule((_FIXED32,)), _Rule((_BYTES,))
_MANY = _Rule((_BYTES,), True)
# Lists of numbers, one by one or packed.
_NUMBERS = _Rule((_VARINT, _BYTES), True)
_FLOATS, _DOUBLES = _Rule((_FIXED32, _BYTES), True), _Rule((_FIXED64, _BYTES), True)

# Fields that are accepted, by their numbers in onnx.proto.
MESSAGES: dict[str, dict[int, _Rule]] = {
    "ModelProto": {
        1: _NUMBER,  # ir_version
        2: _ONE,  # producer_name
        3: _ONE,  # producer_version
        4: _ONE,  # domain
        5: _NUMBER,  # model_version
        6: _ONE,  # doc_string
        7: _ONE,  # graph
        8: _MANY,  # opset_import
        14: _MANY,  # metadata_props
    },
    "OperatorSetIdProto": {1: _ONE, 2: _NUMBER},  # domain, version
    "GraphProto": {
        1: _MANY,  # node
        2: _ONE,  # name
        5: _MANY,  # initializer
        10: _ONE,  # doc_string
        11: _MANY,  # input
        12: _MANY,  # output
        13: _MANY,  # value_info
        16: _MANY,  # metadata_props
    },
    "NodeProto": {
        1: _MANY,  # input
        2: _MANY,  # output
        3: _ONE,  # name
        4: _ONE,  # op_type
        5: _MANY,  # attribute
        6: _ONE,  # doc_string
        7: _ONE,  # domain
        9: _MANY,  # metadata_props
    },
    "AttributeProto": {
        1: _ONE,  # name
        2: _FLOAT,  # f
        3: _NUMBER,  # i
        4: _ONE,  # s
        5: _ONE,  # t
        7: _FLOATS,  # floats
        8: _NUMBERS,  # ints
        9: _MANY,  # strings
        13: _ONE,  # doc_string
        20: _NUMBER,  # type
    },
    "TensorProto": {
        1: _NUMBERS,  # dims
        2: _NUMBER,  # data_type
        4: _FLOATS,  # float_data
        5: _NUMBERS,  # int32_data
        7: _NUMBERS,  # int64_data
        8: _ONE,  # name
        9: _ONE,  # raw_data
        10: _DOUBLES,  # double_data
        11: _NUMBERS,  # uint64_data
        12: _ONE,  # doc_string
        13: _MANY,  # external_data
        14: _NUMBER,  # data_location
        16: _MANY,  # metadata_props
    },
    "StringStringEntryProto": {1: _ONE, 2: _ONE},  # key, value
    "ValueInfoProto": {1: _ONE, 2: _ONE, 3: _ONE, 4: _MANY},  # name, type, doc_string, metadata
}


class Malformed(ValueError):
    """A file is not in the plain wire format, or not an ONNX file."""


class Refused(ValueError):
    """A file holds what a bundle's graph must not."""


class Field(NamedTuple):
    """A field of a message: its number, and where its tag and its value begin and the value ends.

    A value that is a number is given too.
    """

    number: int
    tag: int
    start: int
    end: int
    value: int


def fields(content: bytes, start: int, end: int, message: str) -> Iterator[Field]:
    """The fields of one message.

    Raises:
        Malformed: the bytes are not such a message in the plain encoding.
        Refused: it holds a field that is not accepted.
    """
    rules = MESSAGES[message]
    seen = 0
    at = start
    while at < end:
        tag_at = at
        tag, at = _varint(content, at, end)
        number, wire_format = tag >> 3, tag & 7
        rule = rules.get(number)
        if rule is None and (number == 0 or tag >= 1 << 32):
            raise Malformed(f"it has the tag {tag} at byte {tag_at}")
        if rule is None:
            raise Refused(f"has the field {number} of {message}, which no bundle needs")
        if wire_format not in rule.formats:
            raise Malformed(
                f"its field {number} of {message} has the format {wire_format} at byte {tag_at}"
            )
        if not rule.is_list:
            if seen >> number & 1:
                raise Malformed(f"it has the field {number} of {message} twice at byte {tag_at}")
            seen |= 1 << number
        begin, value = at, 0
        if wire_format == _VARINT:
            value, at = _varint(content, at, end)
        elif wire_format == _BYTES:
            length, begin = _varint(content, at, end)
            at = begin + length
        else:
            at += _FIXED_BYTES[wire_format]
        if at > end:
            raise Malformed(f"it ends within a field that begins at byte {begin}")
        yield Field(number, tag_at, begin, at, value)


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits in groups of seven, lowest first, and where it ends."""
    value, start = 0, at
    for shift in range(0, 70, 7):
        if at >= end:
            raise Malformed(f"it ends within a number at byte {at}")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if (byte == 0 and shift) or value >= 1 << 64:
                break
            return value, at
    raise Malformed(f"it has an overlong number at byte {start}")


def message_field(number: int, content: bytes) -> bytes:
    """A field with a message, text or bytes, encoded. Its number must be below 16."""
    encoded = bytearray([number << 3 | _BYTES])
    length = len(content)
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + content


def numbers(content: bytes, field: Field) -> Iterator[int]:
    """The numbers of a list's field: one, or several where they are packed."""
    if content[field.tag] & 7 == _VARINT:
        yield field.value
        return
    at = field.start
    while at < field.end:
        number, at = _varint(content, at, field.end)
        yield number
