"""State dicts as people hold them, brought to the names, parts and types that an export reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint_keys import (
    DECODER,
    LORA,
    NECK,
    NO_MEMORY,
    PROMPT,
    SAM2_NECK,
    SAM2_TRUNK,
    STUDENT,
    TRUNK,
    unknown_names,
    unknown_tensors,
)
from ..errors import CheckpointError, ModelError, tensors_of

Family = Literal["sam3", "sam3.1", "sam2", "mobile_sam"]

ACCEPTED = (
    "accepted are Meta's sam3.pt, sam3.1_multiplex.pt or sam2.1_hiera_*.pt, EfficientSAM3's merged "
    "files and MobileSAM's mobile_sam.pt (pickled or as safetensors), a transformers folder or hub "
    "id, and live models of these"
)

# Components that DistributedDataParallel and torch.compile put into names.
_WRAPPERS = frozenset(["module", "_orig_mod"])
# Names inside the reference's image model and tracker, and older internal ones.
_ALIASES = (
    ("inst_interactive_predictor.model.", "tracker."),
    ("sam3_model.", "detector."),
    ("sam2_predictor.", "tracker."),
    ("backbone.vision_backbone.", "detector.backbone.vision_backbone."),
    ("student_trunk.", STUDENT),
    ("sam_prompt_encoder.", PROMPT),
    ("sam_mask_decoder.", DECODER),
    ("no_mem_embed", NO_MEMORY),
)
# An EfficientSAM3 encoder as its training saves it: nothing but the encoder.
_RAW_STUDENT = "backbone.model."
_RAW_ALIASES = ((_RAW_STUDENT, STUDENT + _RAW_STUDENT), ("head.", STUDENT + "head."))
# SAM 3.1's parts for clicks. Its tracker.model.sam_mask_decoder is another one, for propagation.
_MULTIPLEX_NECK = "detector.backbone.vision_backbone.interactive_convs."
_MULTIPLEX_DECODER = "tracker.model.interactive_sam_mask_decoder."
_MULTIPLEX = (
    (_MULTIPLEX_NECK, NECK),
    ("tracker.model.interactive_sam_prompt_encoder.", PROMPT),
    (_MULTIPLEX_DECODER, DECODER),
    ("tracker.model.interactivity_no_mem_embed", NO_MEMORY),
)
# SAM 2's decoder numbers the two layers that SAM 3's names.
_SAM2_MLP = re.compile(
    rf"({re.escape(DECODER)}transformer\.layers\.\d+\.mlp)\.layers\.([01])(\.\w+)"
)
_MOBILE_SAM = "image_encoder.patch_embed.seq."
# What a second copy of a model, such as averaged weights below "ema.", has somewhere in its names.
_COPY = re.compile(r"(vision_backbone|image_encoder)\.trunk\.")
# Below these, every tensor counts.
_READ = (TRUNK, NECK, SAM2_TRUNK, SAM2_NECK, PROMPT, DECODER)


@dataclass(frozen=True)
class InteractiveParts:
    """The parts of a SAM 3, 3.1, 2 or EfficientSAM3 that the interactive predictor has.

    Attributes:
        tensors: in canonical naming; detached, dense and finite on the CPU, FP32 or (rotary
            tables) complex64.
        multiplex: whether they are SAM 3.1's.
        stored: the floating point types in which they were stored, such as ``"bfloat16"``.
        notes: what a user should know of the choice.
    """

    tensors: dict[str, Tensor]
    multiplex: bool
    stored: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def student(self) -> bool:
        """Whether the encoder is EfficientSAM3's."""
        return any(name.startswith(STUDENT) for name in self.tensors)

    @property
    def has_head(self) -> bool:
        """Whether there is a decoder that answers clicks."""
        return any(name.startswith(DECODER) for name in self.tensors)


def family_of(state: Iterable[str]) -> Family | None:
    """The model of which a state dict with these names has the image encoder, or ``None``."""
    names = set(plain_names(state).values())
    if any(name.startswith(_MOBILE_SAM) for name in names):
        return "mobile_sam"
    if any(name.startswith(SAM2_TRUNK) for name in names):
        return "sam2"
    if not any(name.startswith(TRUNK) for name in names):
        return None
    return "sam3.1" if _is_multiplex(names) else "sam3"


def interactive_parts(
    state: Mapping[str, Tensor], what: str, tracker: InteractiveParts | None = None
) -> InteractiveParts:
    """The tensors of a SAM 3, 3.1, 2 or EfficientSAM3 that the interactive predictor has.

    Args:
        state: tensors under any of the names that this module knows.
        what: the checkpoint, for messages.
        tracker: the model whose neck and decoder complete one that has none.

    Raises:
        CheckpointError: the interactive parts are missing, or there and given once more; a tensor
            of theirs has a name that is not known, so that leaving it out would export another
            model; two tensors share a name; or a tensor's values cannot be used.
    """
    plain = plain_names(state)
    has_head = any(name.startswith((DECODER, _MULTIPLEX_DECODER)) for name in plain.values())
    if not has_head and (tracker is None or family_of(state) is None):
        raise CheckpointError(f"{what}: {describe_names(state)}; {ACCEPTED}")
    if tracker is not None and has_head:
        raise CheckpointError(
            f"tracker: {what} has a decoder for clicks of its own; a second file completes only "
            "checkpoints without one"
        )
    with tensors_of(what):
        own = _known_parts(state, plain)
    if tracker is None:
        return own
    has_neck = any(name.startswith(NECK) for name in own.tensors)
    if has_neck and own.multiplex != tracker.multiplex:
        versions = ["SAM 3.1's" if parts.multiplex else "SAM 3's" for parts in (own, tracker)]
        raise CheckpointError(
            f"tracker: its decoder for clicks is {versions[1]}, the neck in {what} {versions[0]}"
        )
    others = {
        name: tensor
        for name, tensor in tracker.tensors.items()
        if not (has_neck and name.startswith(NECK))
    }
    twice = sorted(own.tensors.keys() & others.keys())
    if twice:
        raise CheckpointError(
            f"tracker: {what} has {twice[0]!r} of its own, but not the whole decoder for clicks"
        )
    return InteractiveParts(
        tensors=own.tensors | others,
        multiplex=tracker.multiplex,
        stored=own.stored | tracker.stored,
        notes=(*own.notes, *_merge_notes(own, has_neck)),
    )


def tracker_parts(state: Mapping[str, Tensor], what: str) -> InteractiveParts:
    """Neck, prompt encoder and decoder of a model, to complete one that has none.

    Raises:
        CheckpointError: as :func:`interactive_parts`.
    """
    plain = plain_names(state)
    if not any(name.startswith((DECODER, _MULTIPLEX_DECODER)) for name in plain.values()):
        raise CheckpointError(
            f"tracker: {what}: {describe_names(state)}; expected a checkpoint with the decoder "
            "for clicks, such as sam3.pt"
        )
    rest = {original: name for original, name in plain.items() if not name.startswith(TRUNK)}
    with tensors_of(what):
        return _known_parts(state, rest)


def _merge_notes(own: InteractiveParts, has_neck: bool) -> list[str]:
    taken = "the decoder for clicks" if has_neck else "the decoder for clicks and its neck"
    notes = [f"{taken}: from the tracker's file"]
    if own.student and not has_neck:
        notes.append("this neck was never trained on this encoder's features: try what it is worth")
    return notes


def _known_parts(state: Mapping[str, Tensor], plain: Mapping[str, str]) -> InteractiveParts:
    """Choose, check and convert what belongs to the parts that are exported."""
    multiplex = _is_multiplex(plain.values())
    aliases = _MULTIPLEX if multiplex else ()
    is_sam2 = any(name.startswith(SAM2_TRUNK) for name in plain.values())
    sources: dict[str, str] = {}
    for original, name in plain.items():
        renamed = _replace_prefix(name, aliases)
        if is_sam2:
            renamed = _SAM2_MLP.sub(lambda m: f"{m[1]}.lin{int(m[2]) + 1}{m[3]}", renamed)
        if not (renamed.startswith(_READ) or renamed == NO_MEMORY):
            if LORA.search(original) and not name.startswith(("detector.", "tracker.")):
                raise unknown_tensors([original])
            if _COPY.search(name):
                raise ModelError(
                    f"{original!r} is of a second model beside the first; save the one to export "
                    "by itself"
                )
        elif renamed.endswith("num_batches_tracked"):
            continue  # counts, which training alone reads
        elif renamed in sources:
            raise ModelError(f"both {sources[renamed]!r} and {original!r} are {renamed!r}")
        else:
            sources[renamed] = original
    notes: tuple[str, ...] = ()
    if any(name.startswith(STUDENT) for name in sources):
        teacher = [n for n in sources if n.startswith(TRUNK) and not n.startswith(STUDENT)]
        if teacher:
            notes = ("of the two image encoders in the file, EfficientSAM3's: SAM 3's is left out",)
        for name in teacher:
            del sources[name]
    unknown = unknown_names(name for name in sources if not name.startswith(STUDENT))
    if unknown:
        raise unknown_tensors(sources[name] for name in unknown)
    tensors = {name: ready(original, state[original]) for name, original in sources.items()}
    _join_rotary_tables(tensors)
    return InteractiveParts(tensors, multiplex, stored_types(state, sources.values()), notes)


def _is_multiplex(names: Iterable[str]) -> bool:
    return any(name.startswith((_MULTIPLEX_DECODER, _MULTIPLEX_NECK)) for name in names)


def stored_types(state: Mapping[str, Tensor], names: Iterable[str]) -> frozenset[str]:
    """The floating point types of some of a state dict's tensors, such as ``"bfloat16"``."""
    types = {state[name].dtype for name in names}
    return frozenset(str(t).removeprefix("torch.") for t in types if t.is_floating_point)


def mobile_sam_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileSAM's tensors under its own names, as :attr:`InteractiveParts.tensors` are.

    Its batch normalizations count their batches in whole numbers, which stay as they are.
    """
    tensors = {name: state[original] for original, name in plain_names(state).items()}
    return {
        name: tensor if name.endswith("num_batches_tracked") else ready(name, tensor)
        for name, tensor in tensors.items()
    }


def ready(name: str, tensor: Tensor, *, copy: bool = True) -> Tensor:
    """A tensor detached and on the CPU, FP32 or complex64.

    It is a copy, because files are mapped, and reading one that was cut meanwhile would end the
    process. Without ``copy`` it may be the tensor itself.

    Raises:
        ModelError: it is not dense, not floating point, has no data, or holds what is not finite in
            FP32.
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
        dtype = torch.complex64 if tensor.is_complex() else torch.float32
        tensor = tensor.detach().to("cpu", dtype, copy=copy)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {name!r} holds NaN, infinity or what is beyond FP32")
        return tensor
    raise ModelError(f"tensor {name!r} is {kind}, expected dense floating point weights")


def describe_names(names: Iterable[str]) -> str:
    """What a state dict without the parts of an interactive model seems to be."""
    names = list(names)
    plain = list(plain_names(names).values())

    def some(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in plain)

    if not names:
        return "it holds no tensors"
    if some(TRUNK):
        if some("tracker.model.sam_mask_decoder."):
            return "it holds SAM 3.1's decoder for propagation, and not the one for clicks"
        holds = "EfficientSAM3's image encoder" if some(STUDENT) else "SAM 3's detector"
        return (
            f"it holds {holds} without the tracker, whose decoder answers clicks; take that from "
            "the checkpoint it was trained from: --tracker sam3.pt"
        )
    if some(SAM2_TRUNK):
        return "it holds SAM 2's image encoder without its mask decoder"
    if some("image_encoder.blocks."):
        return "it holds SAM 1, which sam3rt does not export"
    if some(DECODER, _MULTIPLEX_DECODER):
        return (
            "it holds SAM 3's tracker without its image encoder "
            "(a live tracker must be built with its backbone)"
        )
    if some("vision_encoder.", "tracker_model.", "detector_model.", "tracker_neck."):
        return "it holds transformers' names: pass the folder with its config.json"
    prefix, _, _ = names[0].partition(".")
    inner = [name.removeprefix(prefix + ".") for name in names if name.startswith(prefix + ".")]
    if family_of(inner) is not None:
        return (
            f"its tensors stand below {prefix!r}; save the state dict of the model itself, or "
            "remove that from the names"
        )
    if any(LORA.search(name) for name in names):
        return "it holds LoRA adapters: pass the model they are for, and these by --lora"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"it holds neither SAM 3's, SAM 2's nor MobileSAM's tensors; the first are {shown}"


def plain_names(state: Iterable[str]) -> dict[str, str]:
    """Each name without wrappers and aliases, by the name as it stands."""
    unwrapped = {name: _unwrapped(name) for name in state}
    raw = any(name.startswith(_RAW_STUDENT) for name in unwrapped.values())
    aliases = (*_ALIASES, *_RAW_ALIASES) if raw else _ALIASES
    return {name: _replace_prefix(plain, aliases) for name, plain in unwrapped.items()}


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
            raise ModelError(f"{base}_real and {base}_imag do not make one rotary table")
        tensors[base] = torch.complex(real, imaginary)
