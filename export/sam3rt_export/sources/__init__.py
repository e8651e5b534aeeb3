"""Checkpoints of every supported kind, as :class:`~sam3rt_export.source.ExportSource`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sam3rt.errors import Sam3rtError

from ..errors import CheckpointError
from ..source import ExportSource
from .checkpoint_file import read_state
from .state_dict import ACCEPTED, canonical_tensors, describe_names, family_of, mobile_sam_tensors

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".json", ".pkl", ".zip", ".tar")
_KINDS = {"sam3": "sam3.pt", "sam3.1": "sam3.1_multiplex.pt"}


def open_source(checkpoint: Any, weights_key: str | None = None) -> ExportSource:
    """Recognize a checkpoint and load it.

    Args:
        checkpoint: Meta's ``sam3.pt`` or ``sam3.1_multiplex.pt``, MobileSAM's ``mobile_sam.pt``,
            either also as a ``.safetensors`` file or a ``.safetensors.index.json``; a folder with
            one of these; a transformers folder or hub id; a live ``Sam3TrackerModel``; or a module
            of the ``sam3`` package that holds the interactive predictor and its backbone.
        weights_key: the dict to take from a file that holds several models.

    Raises:
        CheckpointError: it is none of these, cannot be read, or holds what cannot be exported.
    """
    what = f"{checkpoint}" if isinstance(checkpoint, str | os.PathLike) else "checkpoint"
    try:
        if isinstance(checkpoint, nn.Module):
            return _open_live(checkpoint)
        return _open_path(checkpoint, weights_key)
    except Sam3rtError:
        raise
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{what}: reading it needs {error.name}: pip install 'sam3rt[export]'"
        ) from error
    except Exception as error:  # whatever the libraries that read it raise
        raise CheckpointError(f"{what}: cannot be read: {type(error).__name__}: {error}") from error


def _open_path(checkpoint: Any, weights_key: str | None) -> ExportSource:
    if not isinstance(checkpoint, str | os.PathLike):
        raise CheckpointError(
            f"checkpoint: got {type(checkpoint).__qualname__}, expected a path, a hub id or a model"
        )
    path = Path(checkpoint)
    if path.is_dir() and not _is_transformers_folder(path):
        path = _only_checkpoint(path)
    if path.is_file():
        return _open_file(path, weights_key)
    if weights_key is not None:
        raise CheckpointError(f"weights_key: {checkpoint} is not a checkpoint file")
    if path.is_dir():
        from .transformers_model import open_pretrained

        return open_pretrained(os.fspath(checkpoint))
    if isinstance(checkpoint, str) and _is_hub_id(checkpoint):
        return _open_hub(checkpoint)
    raise CheckpointError(f"checkpoint: {checkpoint} is no file, no folder and no hub id")


def _open_file(path: Path, weights_key: str | None = None) -> ExportSource:
    state, digest = read_state(path, weights_key)
    return _open_state(state, str(path), path.name, digest)


def _open_hub(name: str) -> ExportSource:
    """A repository in transformers' layout, or one with SAM 3.1's checkpoint, which has another."""
    from .transformers_model import open_pretrained

    try:
        return open_pretrained(name)
    except CheckpointError as error:
        import huggingface_hub

        try:
            path = huggingface_hub.hf_hub_download(name, _KINDS["sam3.1"])
        except Exception:  # it has no such file, or cannot be reached
            raise error from None
    return _open_file(Path(path))


def _is_transformers_folder(folder: Path) -> bool:
    """Whether a folder has transformers' files; Meta's checkpoints may lie beside a config.json."""
    return (folder / "config.json").is_file() and (
        any(folder.glob("*.safetensors")) or not any(folder.glob("*.pt"))
    )


def _only_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder that is not in transformers' layout."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds LoRA adapters; merge them into the model first "
            "(PEFT: model.merge_and_unload()) and save that"
        )
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt", "*.pth"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{folder}: holds several checkpoints, pass one of them: {files}")
    raise CheckpointError(f"{folder}: holds no config.json and no checkpoint; {ACCEPTED}")


def _open_live(model: nn.Module) -> ExportSource:
    from .transformers_model import is_tracker_model, open_tracker_model

    # torch.compile and DistributedDataParallel wrap the model itself.
    inner: nn.Module = getattr(model, "_orig_mod", getattr(model, "module", model))
    if is_tracker_model(inner):
        return open_tracker_model(inner)
    state = model.state_dict()
    if family_of(state) is None:
        raise CheckpointError(
            f"checkpoint: got a {type(model).__name__}: {describe_names(state)}; expected a "
            "Sam3TrackerModel or the reference's tracker built with its backbone"
        )
    return _open_state(state, "checkpoint", type(inner).__name__, kind="live model")


def _open_state(
    state: Mapping[str, Tensor], what: str, origin: str, digest: str = "", kind: str | None = None
) -> ExportSource:
    family = family_of(state)
    # Each family brings libraries of its own, so only the one that is needed is imported.
    if family == "mobile_sam":
        from .mobile_sam import open_mobile_sam

        return open_mobile_sam(
            mobile_sam_tensors(state), kind=kind or "mobile_sam.pt", origin=origin, sha256=digest
        )
    tensors = canonical_tensors(state, what)
    from .sam3 import source_from_tensors

    return source_from_tensors(
        tensors,
        kind=kind or _KINDS[family or "sam3"],
        origin=origin,
        sha256=digest,
        sigmoid_iou=family == "sam3",
    )


def _is_hub_id(text: str) -> bool:
    """Whether a text can be ``owner/name``. A mistyped path must not become a request."""
    return (
        _HUB_ID.fullmatch(text) is not None
        and not text.lower().endswith(_FILES)
        and not Path(text).parent.exists()
    )
