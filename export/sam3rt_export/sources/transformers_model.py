"""SAM 3 and SAM 2 as transformers keeps them: a folder, a hub id or a live model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, Sam2Config
from transformers.models.auto.image_processing_auto import get_image_processor_config

from ..checkpoint_keys import (
    LORA,
    from_transformers,
    unknown_tensors,
    unknown_transformers_names,
)
from ..errors import CheckpointError, ModelError, tensors_of
from ..graphs.sam3_encoder import Sam3Architecture
from ..references.transformers_sam2 import Sam2Model, build_sam2_model
from ..references.transformers_sam3 import Sam3TrackerModel, build_tracker_model
from ..source import ExportSource
from . import sam2
from .adapters import Adapter, adapted
from .sam3 import sam3_source, size_notes
from .sam3_architecture import check_architecture, resized
from .state_dict import ready

# transformers reads the first, and writes the second beside it where a model has grown.
_EITHER = ("model.safetensors", "model.safetensors.index.json")
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
    if all((Path(name) / file).is_file() for file in _EITHER):
        raise CheckpointError(f"{name}: holds both {' and '.join(_EITHER)}; remove the older one")
    try:
        family, config = _family(name)
        model, report = family.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers, its libraries and the network raise
        raise CheckpointError(
            f"{name}: cannot be loaded by transformers: {type(error).__name__}: {error}"
        ) from error
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # transformers maps files, too: see `ready`
    # transformers would run on with random values in their place.
    missing, wrong = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    unknown = [k for k in report["unexpected_keys"] if k.startswith(_MODULES) or LORA.search(k)]
    notes: tuple[str, ...] = ()
    with tensors_of(name):
        if unknown:
            raise unknown_tensors(unknown)
        if missing:
            raise ModelError(f"{len(missing)} parameters are missing, the first is {missing[0]!r}")
        if wrong:
            key, found, expected = wrong[0]
            raise ModelError(f"tensor {key!r} is {tuple(found)}, expected {tuple(expected)}")
        if adapter is not None:
            changed, notes = adapted(model.state_dict(), adapter, _MODULES)
            model.load_state_dict(changed, strict=False)
        source = open_tracker_model(model, image_size)
        _check_normalization(get_image_processor_config(name), source)
    # Not the whole path of a folder: manifests travel.
    origin = Path(name).name if Path(name).exists() else name
    notes = (*notes, *source.notes)
    return dataclasses.replace(source, kind="transformers", origin=origin, notes=notes)


def _family(name: str) -> tuple[Any, Any]:
    """The class to load a folder or hub id as, and the configuration, or ``None`` for its own.

    SAM 2's folders name its video model; what of that one an image goes through is a Sam2Model.

    Raises:
        CheckpointError: it is another model, whose loading would take long and say little.
    """
    stored, _ = PreTrainedConfig.get_config_dict(name)
    kind = stored.get("model_type") if isinstance(stored, dict) else None
    if str(kind).startswith("sam3"):
        return Sam3TrackerModel, None
    if kind not in ("sam2", "sam2_video"):
        raise CheckpointError(
            f"{name}: config.json has the model_type {kind!r}, expected one of SAM 3's or SAM 2's"
        )
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    return Sam2Model, Sam2Config(**{part: stored[part] for part in parts if part in stored})


def _check_normalization(processor: dict[str, Any], source: ExportSource) -> None:
    """Refuse a model whose pixels are normalized in another way than its family's.

    Raises:
        ModelError: naming the field of its image processor.
    """
    mean, std = ([value / 255.0 for value in v] for v in (source.image.mean, source.image.std))
    for name, expected in (
        ("image_mean", mean),
        ("image_std", std),
        ("rescale_factor", 1 / 255),
        ("do_normalize", True),
        ("do_rescale", True),
    ):
        found = processor.get(name)
        if found is not None and not np.allclose(found, expected, rtol=1e-3):
            raise ModelError(f"the image processor's {name} is {found}, expected {expected}")


def open_tracker_model(model: Any, image_size: int | None = None) -> ExportSource:
    """Prepare a live ``Sam3TrackerModel`` or ``Sam2Model``.

    Its configuration, epsilons included, is taken as it is, but for the image size if that is
    given.

    Raises:
        ModelError: it has a shape that sam3rt cannot express, parameters of adapters, or values
            that cannot be used.
    """
    state = model.state_dict()
    unknown = unknown_transformers_names(state)
    if unknown:
        raise unknown_tensors(unknown)
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise ModelError(f"tensor {empty!r} has no data (it is on the meta device)")
    plain = not model.training and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in model.parameters()
    )
    if not plain:
        # The caller's model stays as it is.
        model = copy.deepcopy(model).float().cpu().eval()
    state = {name: ready(name, tensor, copy=False) for name, tensor in model.state_dict().items()}
    tensors = from_transformers(state)
    if isinstance(model, Sam2Model):
        hiera = sam2.architecture_of(model.config)
        enlarged = sam2.resized(hiera, image_size)
        if enlarged != hiera:
            model = build_sam2_model(enlarged, tensors)
        notes = size_notes(enlarged.image_size, hiera.image_size)
        return sam2.sam2_source(enlarged, tensors, model, notes=notes)
    trained = _architecture(model.config)
    architecture = resized(trained, image_size)
    if architecture != trained:
        sigmoid_iou = model.mask_decoder.iou_prediction_head.sigmoid_output
        model = build_tracker_model(architecture, tensors, sigmoid_iou=sigmoid_iou)
    notes = size_notes(architecture.image_size, trained.image_size)
    return sam3_source(architecture, tensors, model, notes=notes)


def _architecture(config: Any) -> Sam3Architecture:
    vit = config.vision_config.backbone_config
    decoder, prompt = config.mask_decoder_config, config.prompt_encoder_config
    for what, value in (("image_size", vit.image_size), ("patch_size", vit.patch_size)):
        if not isinstance(value, int):
            raise ModelError(f"{what} is {value}, expected one number: inputs are square")
    activations = {part.hidden_act for part in (vit, decoder, prompt)}
    if activations != {"gelu"} or decoder.num_multimask_outputs != 3:
        raise ModelError("only GELU activations and three mask outputs are supported")
    if prompt.layer_norm_eps != 1e-6:
        raise ModelError(
            f"the prompt encoder's layer_norm_eps is {prompt.layer_norm_eps}, not 1e-6"
        )
    stability = (
        decoder.dynamic_multimask_via_stability,
        decoder.dynamic_multimask_stability_delta,
        decoder.dynamic_multimask_stability_thresh,
    )
    if stability != (True, 0.05, 0.98):
        raise ModelError(f"stability selection is {stability}, SAM 3 has (True, 0.05, 0.98)")
    if vit.layer_scale_init_value is not None:
        raise ModelError("layer scale is not supported; SAM 3's tracker has none")
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
