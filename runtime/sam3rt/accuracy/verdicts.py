"""What the gate found on this machine, remembered, so that a start need not repeat it.

A verdict holds for one bundle, backend, version of this package and of the library that computes,
processor (or GPU and driver), precision, set of limits and choice of kernels by environment
variables. Verdicts lie in the user's cache folder and nowhere else: one that came with a bundle
would be somebody else's claim. A file that is damaged or about something else is as good as none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from .._version import __version__
from ..bundle import Bundle
from ..bundle.files import atomic_write
from ..machine import user_folder
from .gate import GATE_LIMITS, Verdict

_LOG = logging.getLogger(__name__)

_FORMAT = "sam3rt-verdict-2"
_MAX_BYTES = 1 << 20
# Variables by which the libraries that compute take other kernels, or sum up in other types, as C++
# knows them.
_CHOICES = re.compile(
    "(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE)|ORT_(?!DISABLE_TELEMETRY$).*|"
    "NVIDIA_TF32_OVERRIDE|(CUBLAS|CUDNN)_.*"
)
# For a cache folder that cannot be written: this process need not repeat what it has found.
_unwritten: dict[str, StoredVerdict] = {}


@dataclass(frozen=True)
class Subject:
    """What a verdict is about.

    Attributes:
        backend: the backend's name.
        version: of the library that computes, with the settings that matter.
        processor: what it computes on; for a GPU with its driver's version.
        precision: what it computes in.
        files: hashes of files beyond the bundle's that were run, such as engines; else empty.
    """

    backend: str
    version: str
    processor: str
    precision: str
    files: str = ""


@dataclass(frozen=True)
class StoredVerdict:
    """A verdict in short.

    Attributes:
        passed: whether everything was within the gate's limits.
        explanation: how it failed, or that it did not.
        figures: the worst figure of each output and metric.
        encoder_failed: whether the feature maps were wrong already. Where they were not, encoder
            or decoder may be to blame: features just within wide limits may be too far off for a
            decoder that is right.
    """

    passed: bool
    explanation: str
    figures: dict[str, float]
    encoder_failed: bool = False

    @classmethod
    def of(cls, verdict: Verdict) -> StoredVerdict:
        """The short form of a verdict."""
        figures = {name: float(m.value) for name, m in verdict.worst().items()}
        encoder_failed = any(m.output.startswith("features") for m in verdict.failures)
        return cls(verdict.passed, verdict.explain(), figures, encoder_failed)


def load_verdict(bundle: Bundle, subject: Subject) -> StoredVerdict | None:
    """The verdict remembered for a subject, or ``None``."""
    key = _key(bundle, subject)
    name = _file_name(key)
    folder = verdict_folder()
    if folder is not None:
        try:
            return _parse(_read(folder / name), key)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever lies there, it is as good as none
            _LOG.info("ignoring %s: %s", folder / name, error)
    return _unwritten.get(name)


def save_verdict(bundle: Bundle, subject: Subject, verdict: StoredVerdict) -> Path | None:
    """Remember a verdict, and say where; ``None`` where nothing could be written."""
    key = _key(bundle, subject)
    name = _file_name(key)
    # JSON has no NaN; null is read back as one.
    figures = {n: v if math.isfinite(v) else None for n, v in verdict.figures.items()}
    document = {"format": _FORMAT, "key": key} | dataclasses.asdict(verdict) | {"figures": figures}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    folder = verdict_folder()
    try:
        if folder is None:
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as stream:
            stream.write(text.encode())
    except OSError as error:
        _LOG.info("the verdict cannot be kept (%s): the next process repeats it", error)
        _unwritten[name] = verdict
        return None
    return folder / name


def verdict_folder() -> Path | None:
    """Where verdicts lie: in the user's cache folder by each system's custom, if there is one."""
    try:
        return user_folder("cache") / "sam3rt" / "verdicts"
    except RuntimeError:  # there is no home folder
        return None


def _read(path: Path) -> bytes:
    """A small plain file, without following a link, and without waiting at a pipe.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a plain file")
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    return content


def _key(bundle: Bundle, subject: Subject) -> dict[str, Any]:
    key = {
        "sam3rt": __version__,
        "fingerprint": bundle.manifest.fingerprint,
        **dataclasses.asdict(subject),
        "limits": msgspec.structs.asdict(GATE_LIMITS),
    }
    chosen = {name: value for name, value in os.environ.items() if _CHOICES.fullmatch(name)}
    return key | {"environment": chosen} if chosen else key


def _file_name(key: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{key['backend']}-{key['precision']}-{digest[:16]}.json"


class _Document(Struct):
    format: str
    key: dict[str, Any]
    passed: bool
    explanation: str
    figures: dict[str, float | None]
    encoder_failed: bool


def _parse(content: bytes, key: dict[str, Any]) -> StoredVerdict:
    found = msgspec.json.decode(content, type=_Document)
    if found.format != _FORMAT or found.key != key:
        raise ValueError("it is about something else")
    figures = {n: math.nan if value is None else value for n, value in found.figures.items()}
    return StoredVerdict(found.passed, found.explanation, figures, found.encoder_failed)
