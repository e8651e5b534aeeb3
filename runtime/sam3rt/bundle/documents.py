"""Strict reading of our own JSON documents into msgspec Structs.

The Structs are the schema. Declare them with ``frozen=True, forbid_unknown_fields=True`` and use
:data:`Number` for floats: then unknown fields, missing ones, other types, NaN, infinities and
numbers beyond 1e30 are refused, and the message names the file and the field. Nothing in a document
raises anything but :class:`BundleError`.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import BundleError

# A float of ordinary size. JSON's grammar has no NaN; 1e999 would be an infinity.
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]

_LONGEST_MESSAGE = 300
_Document = TypeVar("_Document")


def parse_document(raw: bytes, file: str, form: str, newest: int, advice: str) -> dict[str, Any]:
    """Parse a JSON object that names its format and version.

    Args:
        raw: the file's content.
        file: its name, for messages.
        form: what its ``format`` must be.
        newest: the newest ``format_version`` that can be read.
        advice: what to do about a newer one.

    Raises:
        BundleError: it is not JSON, of another format, or newer.
    """
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"is not valid JSON: {_shown(error)}", file) from error
    if not isinstance(document, dict) or document.get("format") != form:
        raise BundleError(f'"format" is not "{form}"', file)
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        found = reprlib.repr(version)
        raise BundleError(f'"format_version" is {found}, expected a whole number', file)
    if version > newest:
        raise BundleError(
            f"has format version {version}; this sam3rt reads up to {newest}: {advice}", file
        )
    return document


def read_as(kind: type[_Document], document: Any, file: str) -> _Document:
    """Build ``kind``, a Struct, from the parsed JSON of a file.

    Raises:
        BundleError: naming the field at fault, what it is and what was expected.
    """
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BundleError(_shown(error), file) from error


def as_document(value: msgspec.Struct) -> dict[str, Any]:
    """What JSON has of a Struct, its format and version first."""
    document: dict[str, Any] = msgspec.to_builtins(value)
    return {key: document[key] for key in ("format", "format_version")} | document


def _shown(error: Exception) -> str:
    """The message, which quotes the document, as something that can be printed."""
    text = "".join(c if c.isprintable() else "?" for c in str(error))
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."
