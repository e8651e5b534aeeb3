"""The vectors of ``tests/conformance`` and what they stand for: arrays, patches, engines, files."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.support.helpers import noise

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "conformance"
Document = dict[str, Any]

DTYPES = {"point_labels": np.int64, "point_counts": np.int64, "labels": np.int64}


def load(name: str) -> Document:
    """A file of vectors."""
    document: Document = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def as_array(value: Any, dtype: Any = np.float32) -> NDArray[Any]:
    """An array as the vectors write it: lists, or a shape and what fills it."""
    if not isinstance(value, dict):
        return np.array(value, np.float64 if dtype == np.float32 else dtype).astype(dtype)
    size = int(np.prod(value["shape"]))
    filled = (
        np.arange(size) * value.get("step", 1) + value["from"]
        if "from" in value
        else np.full(size, value.get("value", 0))
    )
    return filled.astype(dtype).reshape(value["shape"])


def as_prompts(prompts: Document) -> Document:
    """The prompts of a case, with arrays."""
    return {
        name: value if isinstance(value, bool) else as_array(value, DTYPES.get(name, np.float32))
        for name, value in prompts.items()
    }


def patched(document: Any, patch: Sequence[Document]) -> Any:
    """A copy of a JSON document with a patch (RFC 6902) applied."""
    document = copy.deepcopy(document)

    def find(pointer: str) -> tuple[Any, Any]:
        *parents, last = pointer.split("/")[1:]
        target = document
        for step in parents:
            target = target[int(step) if isinstance(target, list) else step]
        if isinstance(target, list):
            return target, len(target) if last == "-" else int(last)
        return target, last

    for change in patch:
        action, (target, key) = change["op"], find(change["path"])
        value = change.get("value")
        if action in ("move", "copy"):
            source, source_key = find(change["from"])
            value = copy.deepcopy(source[source_key])
            if action == "move":
                del source[source_key]
                target, key = find(change["path"])
        if action == "remove":
            del target[key]
        elif isinstance(target, list) and action != "replace":
            target.insert(key, value)
        else:
            assert action != "replace" or isinstance(target, list) or key in target, change
            target[key] = value
    return document


def as_image(size: Sequence[int] | None) -> NDArray[np.uint8] | None:
    """The picture that stands for an image of a size in the vectors."""
    return None if size is None else noise(size[0], size[1])


def embedding_maps(vectors: Document) -> dict[str, NDArray[np.float32]]:
    """The feature maps that the vectors describe."""
    start, step = vectors["values"]["from"], vectors["values"]["step"]
    maps = {}
    for name, shape in vectors["maps"].items():
        maps[name] = as_array({"shape": [1, *shape], "from": start, "step": step})
        start += step * maps[name].size
    return maps


def embedding_file(header: Any, data: bytes) -> bytes:
    """An embedding file with a digest that fits, where its header has room for one."""
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text + data).hexdigest()
    text = text.replace(b"0" * 64, digest.encode(), 1)
    return struct.pack("<Q", len(text)) + text + data


def add_engine(bundle: Path, folder: str, role: str, patch: Sequence[Document] = ()) -> Path:
    """Put an engine with its sidecar, and a wrapper for ONNX Runtime, into a bundle."""
    where = bundle / "engines" / folder
    where.mkdir(parents=True, exist_ok=True)
    engine = where / f"{role}.engine"
    engine.write_bytes(f"{folder} {role}".encode())
    sidecar = copy.deepcopy(load("engines")["sidecar"])
    sidecar["role"] = role
    sidecar["engine"] = _entry(engine)
    sidecar["bundle_fingerprint"] = json.loads((bundle / "bundle.json").read_text())["fingerprint"]
    if role == "decoder" and (where / "encoder.engine").exists():
        sidecar["paired_with"] = _entry(where / "encoder.engine")["sha256"]
    engine.with_name(f"{role}.engine.json").write_text(json.dumps(patched(sidecar, patch)))
    (where / f"{role}_ctx.onnx").write_bytes(b"wrapper")
    return engine


def _entry(path: Path) -> Document:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": len(content)}
