"""What the gate found on this machine, remembered, so that a start need not repeat it.

A verdict holds for one bundle, backend, library version, processor, precision and set of limits.
Its file lies in the folder ``verdicts`` of the bundle, or, where that cannot be written, in the
user's cache folder. A file that is damaged or about something else is as good as none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle, is_inside
from ..bundle.files import atomic_write
from .gate import GATE_LIMITS, Verdict

_LOG = logging.getLogger(__name__)

_FORMAT = "sam3rt-verdict-1"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Subject:
    """What a verdict is about.

    Attributes:
        backend: the backend's name.
        version: of the library that computes.
        processor: what it computes on.
        precision: what it computes in.
    """

    backend: str
    version: str
    processor: str
    precision: str


@dataclass(frozen=True)
class StoredVerdict:
    """A verdict in short.

    Attributes:
        passed: whether everything was within the gate's limits.
        explanation: how it failed, or that it did not.
        figures: the worst figure of each output and metric.
    """

    passed: bool
    explanation: str
    figures: dict[str, float]

    @classmethod
    def of(cls, verdict: Verdict) -> StoredVerdict:
        """The short form of a verdict."""
        figures = {name: float(m.value) for name, m in verdict.worst().items()}
        return cls(verdict.passed, verdict.explain(), figures)


def load_verdict(bundle: Bundle, subject: Subject) -> StoredVerdict | None:
    """The verdict remembered for a subject, or ``None``."""
    key = _key(bundle, subject)
    for folder in _folders(bundle):
        path = folder / _file_name(key)
        try:
            if path.stat().st_size > _MAX_BYTES:
                continue
            document = json.loads(path.read_bytes())
            stored = _parse(document, key)
        except FileNotFoundError:
            continue
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            _LOG.info("ignoring %s: %s", path, error)
            continue
        return stored
    return None


def save_verdict(bundle: Bundle, subject: Subject, verdict: StoredVerdict) -> Path | None:
    """Remember a verdict, and say where; ``None`` where nothing could be written."""
    key = _key(bundle, subject)
    # JSON has no NaN; null is read back as one.
    figures = {n: v if math.isfinite(v) else None for n, v in verdict.figures.items()}
    document = {
        "format": _FORMAT,
        "key": key,
        "passed": verdict.passed,
        "explanation": verdict.explanation,
        "figures": figures,
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    for folder in _folders(bundle):
        path = folder / _file_name(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as stream:
                stream.write(text.encode())
        except OSError as error:
            _LOG.info("cannot write %s: %s", path, error)
            continue
        return path
    _LOG.info("no place to remember the verdict: the next start repeats it")
    return None


def _key(bundle: Bundle, subject: Subject) -> dict[str, Any]:
    limits = dataclasses.asdict(GATE_LIMITS)
    return {
        "fingerprint": bundle.manifest.fingerprint,
        **dataclasses.asdict(subject),
        "limits": limits,
    }


def _file_name(key: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{key['backend']}-{key['precision']}-{digest[:16]}.json"


def _folders(bundle: Bundle) -> list[Path]:
    folders = []
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a loop of links, before 3.13
        beside = bundle.path / "verdicts"
        # A bundle from elsewhere must not choose where on this machine files are written.
        if is_inside(beside, bundle.path):
            folders.append(beside)
    with contextlib.suppress(RuntimeError):  # there may be no home folder
        folders.append(_cache_folder() / "sam3rt" / "verdicts")
    return folders


def _cache_folder() -> Path:
    """The user's cache folder by each system's custom."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if Path(named).is_absolute() else Path.home() / ".cache"


def _parse(document: Any, key: dict[str, Any]) -> StoredVerdict:
    if document["format"] != _FORMAT or document["key"] != key:
        raise ValueError("it is about something else")
    passed, explanation, figures = (document[name] for name in ("passed", "explanation", "figures"))
    kinds_are_right = (
        isinstance(passed, bool) and isinstance(explanation, str) and isinstance(figures, dict)
    )
    if not kinds_are_right:
        raise ValueError("it is damaged")
    values = {n: math.nan if value is None else float(value) for n, value in figures.items()}
    return StoredVerdict(passed, explanation, values)
