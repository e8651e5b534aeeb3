"""Strict reading of our own JSON documents into dataclasses.

The dataclasses are the schema: unknown fields, missing ones and other types are refused, and the
message names the field. Nothing in a document can raise anything but :class:`SchemaError`.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


class SchemaError(ValueError):
    """A document is not what its schema asks for; the message says where and why."""


def parse_document(raw: bytes, form: str, newest: int, advice: str) -> dict[str, Any]:
    """Parse a JSON object that names its format and version.

    Args:
        raw: the file's content.
        form: what its ``format`` must be.
        newest: the newest ``format_version`` that can be read.
        advice: what to do about a newer one.

    Raises:
        SchemaError: it is not JSON, of another format, or newer.
    """
    try:
        document = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SchemaError(f"is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != form:
        raise SchemaError(f'"format" is not "{form}"')
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SchemaError(f'"format_version" is {version!r}, expected a whole number')
    if version > newest:
        raise SchemaError(
            f"has format version {version}; this sam3rt reads up to {newest}: {advice}"
        )
    return document


def read(kind: Any, document: Any) -> Any:
    """Build ``kind``, a dataclass, from parsed JSON.

    Fields may be dataclasses, literals, unions with ``None``, tuples, dicts of one type and
    plain types.

    Raises:
        SchemaError: naming the field at fault, what it is and what was expected.
    """
    try:
        return _read(kind, document, "")
    except RecursionError as error:
        raise SchemaError("is nested too deeply") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise _refusal(where, value, f"one of {', '.join(map(str, typing.get_args(kind)))}")
        return value
    if origin is types.UnionType:
        return _read_union(kind, value, where)
    if origin is tuple:
        return _read_tuple(kind, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _refusal(where, value, "an object")
        inner = typing.get_args(kind)[1]
        return {name: _read(inner, entry, _join(where, name)) for name, entry in value.items()}
    if kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _refusal(where, value, "a number")
        if abs(value) > 1e30:
            raise _refusal(where, value, "a number of ordinary size")
        return float(value)
    if type(value) is not kind:
        raise _refusal(where, value, kind.__name__)
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _refusal(where, value, "an object")
    hints = _hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise SchemaError(f"unknown field {_join(where, unknown[0])!r}")
    arguments = {}
    for name, entry in known.items():
        if name in value:
            arguments[name] = _read(hints[name], value[name], _join(where, name))
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise SchemaError(f"field {_join(where, name)!r} is missing")
    return kind(**arguments)


def _read_union(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if value is None and types.NoneType in options:
        return None
    for option in options:
        if option is types.NoneType:
            continue
        if dataclasses.is_dataclass(option) or option is float or type(value) is option:
            return _read(option, value, where)
    raise _refusal(where, value, str(kind))


def _read_tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _refusal(where, value, "a list")
    options = typing.get_args(kind)
    if options[-1] is Ellipsis:
        kinds: tuple[Any, ...] = (options[0],) * len(value)
    else:
        kinds = options
        if len(kinds) != len(value):
            raise _refusal(where, value, f"a list of {len(kinds)}")
    return tuple(
        _read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
    )


def _refusal(where: str, value: Any, expected: str) -> SchemaError:
    shown = reprlib.repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return SchemaError(f"field {where!r} is {shown}, expected {expected}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)
