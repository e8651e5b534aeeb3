"""Checkpoints of every supported kind, as :class:`~sam3rt_export.source.ExportSource`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sam3rt.arguments import number
from sam3rt.bundle import MANIFEST
from sam3rt.errors import Sam3rtError

from ..checkpoint_keys import DECODER, NECK, NO_MEMORY, PROMPT, SAM2_NECK, SAM2_TRUNK, TRUNK
from ..errors import CheckpointError, tensors_of
from ..source import ExportSource
from .checkpoint_file import read_index, read_state
from .state_dict import (
    ACCEPTED,
    InteractiveParts,
    describe_names,
    family_of,
    interactive_parts,
    mobile_sam_tensors,
    stored_types,
    tracker_parts,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".json", ".pkl", ".zip", ".tar")
_KINDS = {"sam3": "sam3.pt", "sam3.1": "sam3.1_multiplex.pt"}


@dataclass(frozen=True)
class SourceOptions:
    """How to read a checkpoint.

    Attributes:
        weights_key: the dict to take from a file that holds several models.
        tracker: the checkpoint file whose decoder for clicks completes one that has none.
        lora: PEFT adapter to merge: a ``.safetensors`` file or a folder.
        lora_alpha: its ``lora_alpha``, where no ``adapter_config.json`` says it.
        image_size: side of the input, pixels; by default that of the training.
    """

    weights_key: str | None = None
    tracker: Path | None = None
    lora: Path | None = None
    lora_alpha: float | None = None
    image_size: int | None = None


def open_source(checkpoint: Any, options: SourceOptions | None = None) -> ExportSource:
    """Recognize a checkpoint and load it.

    Args:
        checkpoint: Meta's ``sam3.pt``, ``sam3.1_multiplex.pt``, ``sam2.1_hiera_*.pt`` or
            ``sam2_hiera_*.pt``, a file of EfficientSAM3, MobileSAM's ``mobile_sam.pt``, any of them
            also as a ``.safetensors`` file or a ``.safetensors.index.json``; a folder with one of
            these; a transformers folder or hub id; a live ``Sam3TrackerModel`` or ``Sam2Model``; a
            module of the ``sam3`` package that holds the interactive predictor and its backbone, or
            a ``SAM2Base`` of the ``sam2`` package.
        options: how to read it.

    Raises:
        CheckpointError: it is none of these, cannot be read, or holds what cannot be exported; or
            an option is not for it.
        InvalidInputError: ``lora_alpha`` is no finite number.
    """
    options = options or SourceOptions()
    _check(options)
    what = f"{checkpoint}" if isinstance(checkpoint, str | os.PathLike) else "checkpoint"
    try:
        if isinstance(checkpoint, nn.Module):
            _refuse(options, "a live model", "weights_key", "tracker", "lora", "lora_alpha")
            return _open_live(checkpoint, options)
        return _open_path(checkpoint, options)
    except Sam3rtError:
        raise
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{what}: reading it needs {error.name}: pip install 'sam3rt[export]'"
        ) from error
    except Exception as error:  # whatever the libraries that read it raise
        raise CheckpointError(f"{what}: cannot be read: {type(error).__name__}: {error}") from error


def _check(options: SourceOptions) -> None:
    """Hold the options to what can be one at all."""
    size = options.image_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise CheckpointError(f"image_size: got {size!r}, expected a whole number")
    if options.lora_alpha is not None:
        if options.lora is None:
            raise CheckpointError("lora_alpha: there is no adapter that it is for (--lora)")
        number("lora_alpha", options.lora_alpha)


def _refuse(options: SourceOptions, what: str, *names: str) -> None:
    """Refuse options that would be passed over."""
    for name in names:
        if getattr(options, name) is not None:
            raise CheckpointError(f"{name}: {what} takes none")


def _open_path(checkpoint: Any, options: SourceOptions) -> ExportSource:
    if not isinstance(checkpoint, str | os.PathLike):
        raise CheckpointError(
            f"checkpoint: got {type(checkpoint).__qualname__}, expected a path, a hub id or a model"
        )
    path = Path(checkpoint)
    if path.is_dir() and not _is_transformers_folder(path):
        path = _only_checkpoint(path)
    if path.is_file():
        return _open_file(path, options)
    _refuse(options, f"{checkpoint}, which is not a checkpoint file,", "weights_key")
    if path.is_dir():
        return _open_pretrained(os.fspath(checkpoint), options)
    if isinstance(checkpoint, str) and _is_hub_id(checkpoint):
        return _open_hub(checkpoint, options)
    raise CheckpointError(f"checkpoint: {checkpoint} is no file, no folder and no hub id")


def _open_file(path: Path, options: SourceOptions) -> ExportSource:
    state, digest = read_state(path, options.weights_key)
    notes: tuple[str, ...] = ()
    if options.lora is not None:
        from .adapters import adapted, read_adapter

        adapter = read_adapter(Path(options.lora), options.lora_alpha)
        exported = (TRUNK, NECK, SAM2_TRUNK, SAM2_NECK, PROMPT, DECODER, NO_MEMORY)
        with tensors_of(str(path)):
            changed, notes = adapted(state, adapter, exported)
        state = state | changed
    source = _open_state(state, str(path), options)
    notes = (*notes, *source.notes)
    return dataclasses.replace(source, origin=path.name, sha256=digest, notes=notes)


def _open_pretrained(name: str, options: SourceOptions) -> ExportSource:
    from .adapters import read_adapter
    from .transformers_model import open_pretrained

    _refuse(options, f"{name}, which has a decoder for clicks,", "tracker")
    adapter = options.lora and read_adapter(Path(options.lora), options.lora_alpha)
    return open_pretrained(name, adapter or None, options.image_size)


def _open_hub(name: str, options: SourceOptions) -> ExportSource:
    """A repository in transformers' layout, or one with SAM 3.1's checkpoint, which has another."""
    try:
        return _open_pretrained(name, options)
    except CheckpointError as error:
        import huggingface_hub

        try:
            path = huggingface_hub.hf_hub_download(name, _KINDS["sam3.1"])
        except Exception:  # it has no such file, or cannot be reached
            raise error from None
    return _open_file(Path(path), options)


def _is_transformers_folder(folder: Path) -> bool:
    """Whether a folder has transformers' files; Meta's checkpoints may lie beside a config.json."""
    return (folder / "config.json").is_file() and (
        any(folder.glob("*.safetensors")) or not any(folder.glob("*.pt"))
    )


def _only_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder that is not in transformers' layout."""
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: is a bundle, which is what an export makes")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds LoRA adapters; pass the model that they are for, and this by --lora"
        )
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    listed = {folder / name for index in indexes for name in read_index(index).values()}
    found = [
        file for pattern in ("*.safetensors", "*.pt", "*.pth") for file in folder.glob(pattern)
    ]
    files = sorted({*indexes, *found} - listed)
    if not files:
        raise CheckpointError(f"{folder}: holds no config.json and no checkpoint; {ACCEPTED}")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: holds several checkpoints, pass one of them: {names}")
    return files[0]


def _open_live(model: nn.Module, options: SourceOptions) -> ExportSource:
    from .transformers_model import is_tracker_model, open_tracker_model

    # torch.compile and DistributedDataParallel wrap the model itself.
    inner: nn.Module = getattr(model, "_orig_mod", getattr(model, "module", model))
    if is_tracker_model(inner):
        with tensors_of("checkpoint"):
            source = open_tracker_model(inner, options.image_size)
        return dataclasses.replace(source, kind=type(inner).__name__, origin="live model")
    state = model.state_dict()
    family = family_of(state)
    if family is None:
        raise CheckpointError(
            f"checkpoint: got a {type(model).__name__}: {describe_names(state)}; expected a "
            "Sam3TrackerModel, a Sam2Model, or a reference's model with its image encoder"
        )
    size = getattr(inner, "image_size", None)
    if family == "sam2" and options.image_size is None and isinstance(size, int):
        options = dataclasses.replace(options, image_size=size)
    source = _open_state(state, "checkpoint", options)
    return dataclasses.replace(source, kind="live model", origin=type(inner).__name__)


def _open_state(state: Mapping[str, Tensor], what: str, options: SourceOptions) -> ExportSource:
    """A state dict that holds a model, which ``what`` names in messages."""
    family = family_of(state)
    # Each family brings libraries of its own, so only the one that is needed is imported.
    if family == "mobile_sam":
        from .mobile_sam import open_mobile_sam

        _refuse(options, "MobileSAM", "tracker", "lora", "lora_alpha", "image_size")
        with tensors_of(what):
            source = open_mobile_sam(mobile_sam_tensors(state))
        stored = _in_words(stored_types(state, state))
        return dataclasses.replace(source, kind="mobile_sam.pt", stored=stored)
    if family == "sam2":
        _refuse(options, "SAM 2, which has a decoder of its own,", "tracker")
    tracker, notes = _open_tracker(options.tracker)
    parts = interactive_parts(state, what, tracker)
    with tensors_of(what):
        source = _open_parts(state, parts, options.image_size)
    return dataclasses.replace(
        source,
        kind=f"{source.name}.pt" if family == "sam2" else _kind(parts),
        stored=_in_words(parts.stored),
        notes=(*parts.notes, *notes, *source.notes),
    )


def _open_parts(
    state: Mapping[str, Tensor], parts: InteractiveParts, image_size: int | None
) -> ExportSource:
    if any(name.startswith(SAM2_TRUNK) for name in parts.tensors):
        from . import sam2

        version = sam2.version_of(state)
        return sam2.source_from_tensors(parts.tensors, version=version, image_size=image_size)
    if parts.student:
        from .efficient_sam3 import open_efficient_sam3 as open_parts
    else:
        from .sam3 import source_from_tensors as open_parts

    return open_parts(parts.tensors, sigmoid_iou=not parts.multiplex, image_size=image_size)


def _kind(parts: InteractiveParts) -> str:
    return "EfficientSAM3" if parts.student else _KINDS["sam3.1" if parts.multiplex else "sam3"]


def _open_tracker(path: Path | None) -> tuple[InteractiveParts | None, tuple[str, ...]]:
    """What completes a checkpoint without a decoder for clicks, and where it is from."""
    if path is None:
        return None, ()
    path = Path(path)
    if path.is_dir():
        path = _only_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"tracker: {path} is no checkpoint file")
    state, digest = read_state(path)
    return tracker_parts(state, str(path)), (f"tracker's file: {path.name}, SHA-256 {digest}",)


def _in_words(types: frozenset[str]) -> str:
    return " and ".join(sorted(types))


def _is_hub_id(text: str) -> bool:
    """Whether a text can be ``owner/name``. A mistyped path must not become a request."""
    return (
        _HUB_ID.fullmatch(text) is not None
        and not text.lower().endswith(_FILES)
        and not Path(text).parent.exists()
    )
