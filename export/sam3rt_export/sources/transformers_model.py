"""SAM 3 and SAM 2 as transformers keeps them: a folder, a hub id or a live model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, Sam2Config

from ..checkpoint_keys import (
    LORA,
    from_transformers,
    unknown_tensors,
    unknown_transformers_names,
)
from ..errors import CheckpointError
from ..graphs.sam3_encoder import Sam3Architecture
from ..references.transformers_sam2 import Sam2Model, build_sam2_model
from ..references.transformers_sam3 import Sam3TrackerModel, build_tracker_model
from ..source import ExportSource
from . import sam2
from .adapters import Adapter, adapted
from .sam3 import sam3_source, size_notes
from .sam3_architecture import check_architecture, resized
from .state_dict import ready

# Modules of either model. What else a folder holds belongs to other models of SAM 3's and SAM 2's.
_MODULES = ("vision_encoder.", "prompt_encoder.", "mask_decoder.", "shared_image_embedding.")


def is_tracker_model(model: nn.Module) -> bool:
    """Whether a module is a ``Sam3TrackerModel`` or a ``Sam2Model``."""
    return isinstance(model, Sam3TrackerModel | Sam2Model)


def open_pretrained(
    name: str, adapter: Adapter | None = None, image_size: int | None = None
) -> ExportSource:
    """Load a folder or hub id. Only safetensors files are read.

    Args:
        name: the folder or hub id.
        adapter: LoRA adapter to merge.
        image_size: side of the input, pixels; by default the configuration's.

    Raises:
        CheckpointError: it cannot be loaded, parameters are missing from it, or there are others
            among them, so that leaving those out would export another model.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{name}: holds LoRA adapters; pass the model that they are for, and this by --lora"
        )
    try:
        family, config = _family(name)
        model, report = family.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers, its libraries and the network raise
        raise CheckpointError(
            f"{name}: cannot be loaded by transformers: {type(error).__name__}: {error}"
        ) from error
    unknown = [k for k in report["unexpected_keys"] if k.startswith(_MODULES) or LORA.search(k)]
    if unknown:
        raise unknown_tensors(name, unknown)
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would run on with random values in their place.
        raise CheckpointError(
            f"{name}: {len(missing)} parameters are missing, the first is {missing[0]!r}"
        )
    notes: tuple[str, ...] = ()
    if adapter is not None:
        changed, notes = adapted(model.state_dict(), adapter, _MODULES)
        model.load_state_dict(changed, strict=False)
    # Not the whole path of a folder: manifests travel.
    origin = Path(name).name if Path(name).exists() else name
    return open_tracker_model(
        model, kind="transformers", origin=origin, image_size=image_size, notes=notes
    )


def _family(name: str) -> tuple[Any, Any]:
    """The class to load a folder or hub id as, and the configuration, or ``None`` for its own.

    SAM 2's folders name its video model; what of that one an image goes through is a Sam2Model.
    """
    stored, _ = PreTrainedConfig.get_config_dict(name)
    if stored.get("model_type") not in ("sam2", "sam2_video"):
        return Sam3TrackerModel, None
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return Sam2Model, Sam2Config(**{part: stored[part] for part in parts if part in stored})


def open_tracker_model(
    model: Any,
    *,
    kind: str | None = None,
    origin: str = "live model",
    image_size: int | None = None,
    notes: tuple[str, ...] = (),
) -> ExportSource:
    """Prepare a live ``Sam3TrackerModel`` or ``Sam2Model``.

    Its configuration, epsilons included, is taken as it is, but for the image size if that is
    given.

    Raises:
        CheckpointError: it has a shape that sam3rt cannot express, parameters of adapters, or
            values that cannot be used.
    """
    state = model.state_dict()
    unknown = unknown_transformers_names(state)
    if unknown:
        raise unknown_tensors(origin, unknown)
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise CheckpointError(f"{origin}: tensor {empty!r} has no data (it is on the meta device)")
    plain = not model.training and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in model.parameters()
    )
    if not plain:
        # The caller's model stays as it is.
        model = copy.deepcopy(model).float().cpu().eval()
    state = {name: ready(name, tensor) for name, tensor in model.state_dict().items()}
    tensors = from_transformers(state)
    kind = kind or type(model).__name__
    if isinstance(model, Sam2Model):
        hiera = sam2.architecture_of(model.config)
        enlarged = sam2.resized(hiera, image_size)
        if enlarged != hiera:
            model = build_sam2_model(enlarged, tensors)
        notes = (*notes, *sam2.size_notes(enlarged.image_size, hiera.image_size))
        return sam2.sam2_source(enlarged, tensors, model, kind=kind, origin=origin, notes=notes)
    trained = _architecture(model.config)
    architecture = resized(trained, image_size)
    if architecture != trained:
        model = build_tracker_model(architecture, tensors)
    notes = (*notes, *size_notes(architecture.image_size, trained.image_size))
    return sam3_source(architecture, tensors, model, kind=kind, origin=origin, notes=notes)


def _architecture(config: Any) -> Sam3Architecture:
    vit = config.vision_config.backbone_config
    decoder, prompt = config.mask_decoder_config, config.prompt_encoder_config
    for what, value in (("image_size", vit.image_size), ("patch_size", vit.patch_size)):
        if not isinstance(value, int):
            raise CheckpointError(f"{what} is {value}, expected one number: inputs are square")
    if vit.hidden_act != "gelu" or decoder.num_multimask_outputs != 3:
        raise CheckpointError("only GELU activations and three mask outputs are supported")
    stability = (
        decoder.dynamic_multimask_via_stability,
        decoder.dynamic_multimask_stability_delta,
        decoder.dynamic_multimask_stability_thresh,
    )
    if stability != (True, 0.05, 0.98):
        raise CheckpointError(f"stability selection is {stability}, SAM 3 has (True, 0.05, 0.98)")
    if vit.layer_scale_init_value is not None:
        raise CheckpointError("layer scale is not supported; SAM 3's tracker has none")
    architecture = Sam3Architecture(
        image_size=vit.image_size,
        patch_size=vit.patch_size,
        embed_dim=vit.hidden_size,
        depth=vit.num_hidden_layers,
        num_heads=vit.num_attention_heads,
        mlp_dim=vit.intermediate_size,
        window=vit.window_size,
        global_blocks=tuple(vit.global_attn_indexes),
        pretrain_grid=vit.pretrain_image_size // vit.patch_size,
        fpn_dim=config.vision_config.fpn_hidden_size,
        decoder_mlp_dim=decoder.mlp_dim,
        decoder_heads=decoder.num_attention_heads,
        mask_channels=prompt.mask_input_channels,
        rope_theta=vit.rope_parameters["rope_theta"],
        layer_norm_eps=vit.layer_norm_eps,
    )
    check_architecture(architecture)
    return architecture
