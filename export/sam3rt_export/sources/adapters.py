"""LoRA adapters of PEFT, merged into the weights they were trained on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from .state_dict import plain_names, ready

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's file has no adapter's name in its keys; a state dict saved by hand does ("default").
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)??(?:\.weight)?")
# These start from base weights that the adapter changed, so that adding to the original is wrong.
_REBASED = ("pissa", "olora", "corda", "loftq", "eva")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Attributes:
        path: its file.
        pairs: the two factors A [r, in, ...] and B [out, r, ...] by the module they are for.
        whole: parameters that were trained whole, by name.
        alpha: numerator of the scale, for modules not in ``alphas``.
        alphas: numerators by the end of a module's name.
        rank_stabilized: whether the scale is alpha / sqrt(r) instead of alpha / r.
    """

    path: Path
    pairs: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]
    alpha: float
    alphas: dict[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False

    def scale(self, module: str, rank: int) -> float:
        """The factor of ``B A`` for a module."""
        own = [a for end, a in self.alphas.items() if f".{module}".endswith(f".{end}")]
        alpha = own[0] if own else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter(path: Path, alpha: float | None = None) -> Adapter:
    """Read an adapter: a ``.safetensors`` file or PEFT's folder.

    Args:
        path: the file or folder. ``adapter_config.json`` is looked for beside the weights.
        alpha: ``lora_alpha``; needed where there is no such file, and wins over it.

    Raises:
        CheckpointError: it cannot be read, or is of a kind that cannot be merged exactly.
    """
    file = path / _WEIGHTS if path.is_dir() else path
    config = _read_config(file.with_name(_CONFIG))
    if file.suffix != ".safetensors" or not file.is_file():
        raise CheckpointError(f"lora: {path} is no .safetensors file and no folder with {_WEIGHTS}")
    try:
        tensors = load_file(file)
    except Exception as error:  # whatever the reader raises for a malformed file
        raise CheckpointError(f"lora: {file} cannot be read: {error}") from error
    if config is None and alpha is None:
        raise CheckpointError(
            f"lora: there is no {_CONFIG} beside {file}: pass its lora_alpha (--lora-alpha)"
        )
    config = config or {}
    pairs, whole = _pairs(file, {n.removeprefix(_PREFIX): t for n, t in tensors.items()})
    if not pairs:
        raise CheckpointError(f"lora: {file} holds no pair of lora_A and lora_B")
    return Adapter(
        file,
        pairs,
        whole,
        alpha=float(config["lora_alpha"]) if alpha is None else alpha,
        alphas={} if alpha is not None else _alphas(file, config),
        rank_stabilized=bool(config.get("use_rslora")),
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
        float(config["lora_alpha"])
    except Exception as error:
        raise CheckpointError(f"lora: {path} is no configuration of a LoRA: {error!r}") from error
    started = str(config.get("init_lora_weights", "")).lower()
    for what, found in {
        f"of type {config.get('peft_type')}": config.get("peft_type", "LORA") != "LORA",
        "of DoRA": config.get("use_dora"),
        "with transposed factors (fan_in_fan_out)": config.get("fan_in_fan_out"),
        f"that changed its base weights (init_lora_weights {started!r})": started.startswith(
            _REBASED
        ),
    }.items():
        if found:
            raise CheckpointError(
                f"lora: {path.parent} is an adapter {what}, which cannot be added to the weights; "
                "merge it by PEFT: model.merge_and_unload()"
            )
    parsed: dict[str, Any] = config
    return parsed


def _alphas(file: Path, config: Mapping[str, Any]) -> dict[str, float]:
    alphas = config.get("alpha_pattern") or {}
    for name in alphas:
        if not re.fullmatch(r"[\w.]+", name):
            raise CheckpointError(
                f"lora: {file}: alpha_pattern {name!r} is a regular expression; merge it by PEFT: "
                "model.merge_and_unload()"
            )
    return {name: float(alpha) for name, alpha in alphas.items()}


def _pairs(
    file: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif "lora_" in name:
            raise CheckpointError(f"lora: {file}: {name!r} is no factor of a linear layer")
        else:
            whole[name] = tensor
    for module, pair in factors.items():
        if len(pair) != 2:
            raise CheckpointError(f"lora: {file}: {module!r} has lora_{''.join(pair)} alone")
    return {module: (pair["A"], pair["B"]) for module, pair in factors.items()}, whole


def adapted(
    state: Mapping[str, Tensor], adapter: Adapter, exported: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The parameters that an adapter changes, with the change made.

    Args:
        state: the model's parameters, under any of the names that are read.
        adapter: the adapter, in the names of the model that it was trained on.
        exported: what the plain names of the parts that are exported start with.

    Returns:
        FP32 tensors by their names in ``state``, and notes for the user.

    Raises:
        CheckpointError: it is for a parameter that the model does not have or that has another
            shape, or for none that is exported.
    """
    originals = {plain: original for original, plain in plain_names(state).items()}
    given = {f"{module}.weight": pair for module, pair in adapter.pairs.items()} | adapter.whole
    plain = plain_names(given)
    absent = [name for name in given if plain[name] not in originals]
    if absent:
        raise CheckpointError(
            f"lora: {adapter.path}: {len(absent)} of {len(given)} parameters are not in the "
            f"checkpoint, such as {absent[0]!r}: it was trained on another model or other names"
        )
    changed: dict[str, Tensor] = {}
    elsewhere = []
    for name, change in given.items():
        original = originals[plain[name]]
        if not plain[name].startswith(exported):
            elsewhere.append(name)
        elif isinstance(change, Tensor):
            changed[original] = _replaced(name, state[original], change)
        else:
            scale = adapter.scale(name.removesuffix(".weight"), change[0].shape[0])
            changed[original] = _added(name, ready(name, state[original]), change, scale)
    if not changed:
        raise CheckpointError(
            f"lora: {adapter.path} changes nothing that is exported, only parts such as "
            f"{elsewhere[0]!r}"
        )
    notes = [f"LoRA: {adapter.path.name} merged into {len(changed)} parameters"]
    if elsewhere:
        notes.append(
            f"LoRA: {len(elsewhere)} parameters in parts that are not exported stay as they are, "
            f"such as {elsewhere[0]}"
        )
    return changed, tuple(notes)


def _replaced(name: str, old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape:
        raise CheckpointError(
            f"lora: {name!r} is {tuple(new.shape)}, the checkpoint's {tuple(old.shape)}"
        )
    return ready(name, new)


def _added(name: str, weight: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """``W + scale B A``, of a linear layer or of a convolution whose B is pointwise."""
    a, b = (ready(name, factor).double() for factor in pair)
    fits = (
        a.ndim == b.ndim == weight.ndim >= 2
        and a.shape[0] == b.shape[1]
        and b.shape[0] == weight.shape[0]
        and a.shape[1:] == weight.shape[1:]
        and b[0, 0].numel() == 1
    )
    if not fits:
        raise CheckpointError(
            f"lora: factors {tuple(b.shape)} and {tuple(a.shape)} of {name!r} do not fit its "
            f"{tuple(weight.shape)}"
        )
    delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return torch.add(weight.double(), delta, alpha=scale).float()
