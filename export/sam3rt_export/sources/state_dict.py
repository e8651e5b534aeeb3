"""State dicts as people hold them, brought to the names, parts and types that an export reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint_keys import (
    DECODER,
    LORA,
    NECK,
    NO_MEMORY,
    PROMPT,
    TRUNK,
    unknown_names,
    unknown_tensors,
)
from ..errors import CheckpointError

Family = Literal["sam3", "sam3.1", "mobile_sam"]

ACCEPTED = (
    "accepted are Meta's sam3.pt or sam3.1_multiplex.pt and MobileSAM's mobile_sam.pt (pickled or "
    "as safetensors), a transformers folder or hub id, and live models of these"
)

# Components that DistributedDataParallel and torch.compile put into names.
_WRAPPERS = frozenset(["module", "_orig_mod"])
# Names inside the reference's image model and tracker, and older internal ones.
_ALIASES = (
    ("inst_interactive_predictor.model.", "tracker."),
    ("sam3_model.", "detector."),
    ("sam2_predictor.", "tracker."),
    ("backbone.vision_backbone.", "detector.backbone.vision_backbone."),
    ("sam_prompt_encoder.", PROMPT),
    ("sam_mask_decoder.", DECODER),
    ("no_mem_embed", NO_MEMORY),
)
# SAM 3.1's parts for clicks. Its tracker.model.sam_mask_decoder is another one, for propagation.
_MULTIPLEX_DECODER = "tracker.model.interactive_sam_mask_decoder."
_MULTIPLEX = (
    ("detector.backbone.vision_backbone.interactive_convs.", NECK),
    ("tracker.model.interactive_sam_prompt_encoder.", PROMPT),
    (_MULTIPLEX_DECODER, DECODER),
    ("tracker.model.interactivity_no_mem_embed", NO_MEMORY),
)
_MOBILE_SAM = "image_encoder.patch_embed.seq."


def family_of(state: Mapping[str, Tensor]) -> Family | None:
    """The model that a state dict holds at least the image encoder of, or ``None``."""
    names = set(_plain_names(state).values())
    if any(name.startswith(_MOBILE_SAM) for name in names):
        return "mobile_sam"
    if not any(name.startswith(TRUNK) for name in names):
        return None
    multiplex = any(name.startswith(_MULTIPLEX_DECODER) for name in names)
    return "sam3.1" if multiplex else "sam3"


def canonical_tensors(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a SAM 3 or 3.1 that the interactive predictor has, in ``sam3.pt`` naming.

    Args:
        state: tensors under any of the names that this module knows.
        what: the checkpoint, for messages.

    Returns:
        Detached, dense and finite tensors on the CPU, FP32 or (rotary tables) complex64.

    Raises:
        CheckpointError: the interactive parts are missing; a tensor of theirs has a name that is
            not known, so that leaving it out would export another model; two tensors share a
            name; or a tensor's values cannot be used.
    """
    plain = _plain_names(state)
    if not any(name.startswith((DECODER, _MULTIPLEX_DECODER)) for name in plain.values()):
        raise CheckpointError(f"{what}: {describe_names(state)}; {ACCEPTED}")
    aliases = _MULTIPLEX if family_of(state) == "sam3.1" else ()
    sources: dict[str, str] = {}
    for original, name in plain.items():
        renamed = _replace_prefix(name, aliases)
        if not (renamed.startswith((TRUNK, NECK, PROMPT, DECODER)) or renamed == NO_MEMORY):
            if LORA.search(original) and not name.startswith(("detector.", "tracker.")):
                raise unknown_tensors(what, [original])
        elif renamed in sources:
            raise CheckpointError(
                f"{what}: both {sources[renamed]!r} and {original!r} are {renamed!r}"
            )
        else:
            sources[renamed] = original
    unknown = unknown_names(sources)
    if unknown:
        raise unknown_tensors(what, [sources[name] for name in unknown])
    tensors = {name: ready(original, state[original]) for name, original in sources.items()}
    _join_rotary_tables(tensors)
    return tensors


def mobile_sam_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileSAM's tensors under its own names, as :func:`canonical_tensors` returns them.

    Its batch normalizations count their batches in whole numbers, which stay as they are.
    """
    tensors = {name: state[original] for original, name in _plain_names(state).items()}
    return {
        name: tensor if name.endswith("num_batches_tracked") else ready(name, tensor)
        for name, tensor in tensors.items()
    }


def ready(name: str, tensor: Tensor) -> Tensor:
    """A tensor detached and on the CPU, FP32 or complex64.

    Raises:
        CheckpointError: it is not dense, not floating point, has no data or is not finite.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"a {type(tensor).__name__}"
    elif tensor.is_meta:
        kind = "without data (on the meta device)"
    elif tensor.layout != torch.strided:
        kind = f"sparse ({tensor.layout})"
    elif not (tensor.is_floating_point() or tensor.is_complex()):
        kind = f"{tensor.dtype}"
    else:
        tensor = tensor.detach().cpu()
        tensor = tensor.to(torch.complex64) if tensor.is_complex() else tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name!r} holds NaN or infinity")
        return tensor
    raise CheckpointError(f"tensor {name!r} is {kind}, expected dense floating point weights")


def describe_names(names: Iterable[str]) -> str:
    """What a state dict without the parts of an interactive model seems to be."""
    names = list(names)
    plain = [_replace_prefix(_unwrapped(name), _ALIASES) for name in names]

    def some(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in plain)

    if not names:
        return "it holds no tensors"
    if some(TRUNK):
        if some("tracker.model.sam_mask_decoder."):
            return "it holds SAM 3.1's decoder for propagation, and not the one for clicks"
        if some(TRUNK + "model."):
            return "it holds EfficientSAM3, which sam3rt does not export"
        return "it holds SAM 3's detector without the tracker, whose decoder answers clicks"
    if some("image_encoder.trunk."):
        return "it holds SAM 2, which sam3rt does not export"
    if some("image_encoder.blocks."):
        return "it holds SAM 1, which sam3rt does not export"
    if some(DECODER, _MULTIPLEX_DECODER):
        return (
            "it holds SAM 3's tracker without its image encoder "
            "(a live tracker must be built with its backbone)"
        )
    if some("vision_encoder.", "tracker_model.", "detector_model.", "tracker_neck."):
        return "it holds transformers' names: pass the folder with its config.json"
    if any(LORA.search(name) for name in names):
        return "it holds LoRA adapters: merge them into the model first, and export that"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"it holds neither SAM 3's nor MobileSAM's tensors; the first are {shown}"


def _plain_names(state: Iterable[str]) -> dict[str, str]:
    """Each name without wrappers and aliases, by the name as it stands."""
    return {name: _replace_prefix(_unwrapped(name), _ALIASES) for name in state}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _replace_prefix(name: str, aliases: Iterable[tuple[str, str]]) -> str:
    for old, new in aliases:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _join_rotary_tables(tensors: dict[str, Tensor]) -> None:
    """Turn ``freqs_cis_real`` and ``freqs_cis_imag`` into ``freqs_cis``, in place."""
    halves = [name for name in tensors if name.endswith(("freqs_cis_real", "freqs_cis_imag"))]
    for base in {name[: -len("_real")] for name in halves}:
        real, imaginary = (tensors.pop(base + part, None) for part in ("_real", "_imag"))
        if real is None or imaginary is None or real.shape != imaginary.shape:
            raise CheckpointError(f"{base}_real and {base}_imag do not make one rotary table")
        tensors[base] = torch.complex(real, imaginary)
