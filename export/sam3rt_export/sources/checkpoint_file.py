"""Read tensors from an untrusted checkpoint file. Nothing in the file is executed."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from safetensors.torch import load_file
from torch import Tensor

from sam3rt.bundle.files import sha256_file

from ..errors import CheckpointError
from .state_dict import ACCEPTED, describe_names, family_of

# Tensors may share or repeat stored values, which costs a few bytes in the file and gigabytes in
# memory. Tied weights double a file at most.
_MAX_EXPANSION = 4
# Training checkpoints keep their state dict at most this deep.
_MAX_DEPTH = 3


def read_state(path: Path, weights_key: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint file.

    A ``torch.save``d file is mapped where its format allows, and a safetensors file always, so
    that unused tensors take no memory. A ``.safetensors.index.json`` stands for the files it lists.

    Args:
        path: the file.
        weights_key: which dict of the file to take, such as ``"ema"`` or ``"state.model"``;
            needed only where several would do.

    Returns:
        Tensors by name, as stored, and the file's SHA-256; where an index lists several, that of
        the SHA-256s of all of them in the order of their names, as text.

    Raises:
        CheckpointError: the file cannot be read as such, holds no state dict of a model that is
            exported or several, expands to far more than its own size, or changes meanwhile.
    """
    content, files = _load(path)
    before = [_version(file) for file in files]
    stored = sum(file.stat().st_size for file in files)
    state = _choose(content, path, weights_key)
    expanded = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if expanded > _MAX_EXPANSION * stored:
        raise CheckpointError(
            f"{path}: its tensors expand to {expanded / 1e9:.3g} GB, the file has "
            f"{stored / 1e9:.3g} GB: they repeat what is stored"
        )
    digests = [sha256_file(file) for file in files]
    if before != [_version(file) for file in files]:
        raise CheckpointError(f"{path}: changed while it was read; export a copy of it")
    if files == [path]:
        return state, digests[0]
    return state, hashlib.sha256("".join(digests).encode()).hexdigest()


def _version(file: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _load(path: Path) -> tuple[Any, list[Path]]:
    """The content of a file, and the files that hold its tensors."""
    with path.open("rb") as stream:
        start = stream.read(512)
    size = path.stat().st_size
    try:
        if path.name.endswith(".index.json"):
            return _load_shards(path)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
            return load_file(path), [path]
        if start.startswith(b"PK"):
            _check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True), [path]
        if start.startswith(b"\x80"):  # older than PyTorch 1.6
            return torch.load(path, map_location="cpu", weights_only=True), [path]
    except CheckpointError:
        raise
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: its path or the locale is not UTF-8, and PyTorch and safetensors open no "
            "other: rename it, or set LC_ALL=C.UTF-8"
        ) from error
    except pickle.UnpicklingError as error:
        # PyTorch's own text recommends to load the file in a way that runs its code.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds a Python object ({found[1]}) beside its tensors, and nothing in a "
            "checkpoint is run; save the state dict alone: torch.save(model.state_dict(), path)"
            if found
            else "its pickle is damaged or none"
        )
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}") from error
    except Exception as error:  # the readers raise whatever a malformed file provokes
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}") from error
    raise CheckpointError(f"{path}: {_describe_start(start)}; {ACCEPTED}")


class _Index(Struct):
    """A ``.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]


def read_index(path: Path) -> dict[str, str]:
    """Which file beside an index holds which tensor.

    Raises:
        CheckpointError: it says nothing of the kind.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as an index: {error}") from error


def _load_shards(path: Path) -> tuple[dict[str, Tensor], list[Path]]:
    weight_map = read_index(path)
    tensors: dict[str, Tensor] = {}
    files = []
    for name in sorted(set(weight_map.values())):
        shard = path.parent / name
        # A pipe would be waited for.
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(f"{path}: {name!r} is not a file beside it")
        found = load_file(shard)
        # Another run's file under the same name, or one tensor in two files: which one counts?
        for key in sorted(found.keys() ^ {k for k, file in weight_map.items() if file == name}):
            where = "is in" if key in found else "is not in"
            raise CheckpointError(f"{path}: {key!r} {where} {name}, other than it lists")
        tensors |= found
        files.append(shard)
    return tensors, files


def _check_archive(path: Path) -> None:
    """Refuse archives that PyTorch would map or read wrongly, and damaged ones.

    Raises:
        CheckpointError: PyTorch does not map such an archive rightly.
        zipfile.BadZipFile: it is damaged; PyTorch compares no checksums.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if not any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        raise CheckpointError(
            f"{path}: is a zip archive without PyTorch's data.pkl; it holds {names[:3]}"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: is a TorchScript program; pass the checkpoint's state dict")
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path}: its records are compressed, such as {packed[0]!r}: it was zipped again after "
            "torch.save; load and save it with PyTorch once more"
        )
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            if entry.CRC:  # torch.save may have been told to leave them out
                with archive.open(entry) as stream:
                    while stream.read(1 << 20):
                        pass  # at its end it is compared


def _choose(content: Any, path: Path, weights_key: str | None) -> dict[str, Tensor]:
    """The one state dict of a file, or the one asked for."""
    found = dict(_state_dicts(content))
    if weights_key is not None:
        if weights_key not in found:
            raise CheckpointError(
                f"{path}: weights_key is {weights_key!r}, the file has {_list_keys(found)}"
            )
        return found[weights_key]
    usable = {key: state for key, state in found.items() if family_of(state) is not None}
    if len(usable) > 1:
        raise CheckpointError(
            f"{path}: holds several models, {_list_keys(usable)}; choose one with weights_key "
            "(--weights-key)"
        )
    if usable:
        return next(iter(usable.values()))
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected named tensors; {ACCEPTED}"
        )
    largest: dict[str, Tensor] = max(found.values(), key=len, default={})
    raise CheckpointError(f"{path}: {describe_names(largest)}; {ACCEPTED}")


def _state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every dict in a file that holds tensors by name, under its dotted key."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _state_dicts(value, f"{key}.{name}" if key else name, depth + 1)


def _list_keys(found: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in found) or "no state dicts"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _describe_start(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint: the download failed or needs a login"
    return f"is no checkpoint; it starts with {start[:16]!r}"
