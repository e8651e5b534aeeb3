"""LoRA adapters of PEFT, merged into the weights they were trained on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, ModelError, tensors_of
from .state_dict import plain_names, ready

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's file has no adapter's name in its keys; a state dict saved by hand does ("default").
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
# Ways to start that leave the base weights as they are; after others, such as PiSSA, adding to the
# original is wrong.
_STARTS = ("true", "false", "none", "gaussian", "orthogonal")


class _Config(Struct):
    """What matters of PEFT's ``adapter_config.json``, which holds much more."""

    lora_alpha: float
    alpha_pattern: dict[str, float] | None = None
    peft_type: str | None = "LORA"
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False
    init_lora_weights: bool | str | None = True


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
        alpha: ``lora_alpha``; needed where there is no such file, and wins over the one in it.

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
    if alpha is not None:
        given = _Config(alpha)
        config = given if config is None else msgspec.structs.replace(config, lora_alpha=alpha)
    if config is None:
        raise CheckpointError(
            f"lora: there is no {_CONFIG} beside {file}: pass its lora_alpha (--lora-alpha)"
        )
    pairs, whole = _pairs(file, {n.removeprefix(_PREFIX): t for n, t in tensors.items()})
    if not pairs:
        raise CheckpointError(
            f"lora: {file} holds no pair of PEFT's lora_A and lora_B; other layouts must be "
            "converted first"
        )
    return Adapter(
        file,
        pairs,
        whole,
        alpha=config.lora_alpha,
        alphas=config.alpha_pattern or {},
        rank_stabilized=bool(config.use_rslora),
    )


def _read_config(path: Path) -> _Config | None:
    if not path.is_file():
        return None
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"lora: {path} is no configuration of a LoRA: {error}") from error
    started = str(config.init_lora_weights).lower()
    patterns = [name for name in config.alpha_pattern or () if not re.fullmatch(r"[\w.]+", name)]
    for what, found in {
        f"of type {config.peft_type}": config.peft_type != "LORA",
        "of DoRA": config.use_dora,
        "with transposed factors (fan_in_fan_out)": config.fan_in_fan_out,
        f"that may have changed its base weights (init_lora_weights {started!r})": (
            started not in _STARTS
        ),
        f"whose alpha_pattern has regular expressions ({patterns})": patterns,
    }.items():
        if found:
            raise CheckpointError(
                f"lora: {path.parent} is an adapter {what}, which cannot be added to the weights; "
                "merge it by PEFT: model.merge_and_unload()"
            )
    return config


def _pairs(
    file: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    whole = {}
    adapters = set()
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match:
            adapters.add(match["adapter"])
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif "lora_" in name:
            raise CheckpointError(f"lora: {file}: {name!r} is no factor of a linear layer in PEFT")
        else:
            whole[name] = tensor
    if len(adapters) > 1:
        names = ", ".join(sorted(repr(name) for name in adapters))
        raise CheckpointError(f"lora: {file} holds several adapters: {names}; pass one")
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
    given: list[tuple[str, Tensor | tuple[Tensor, Tensor]]] = [
        *((f"{module}.weight", pair) for module, pair in adapter.pairs.items()),
        *adapter.whole.items(),
    ]
    plain = plain_names(name for name, _ in given)
    absent = [name for name, _ in given if plain[name] not in originals]
    if absent:
        raise CheckpointError(
            f"lora: {adapter.path}: {len(absent)} of {len(given)} parameters are not in the "
            f"checkpoint, such as {absent[0]!r}: it was trained on another model or other names"
        )
    twice = [name for name, count in Counter(plain[name] for name, _ in given).items() if count > 1]
    if twice:
        raise CheckpointError(f"lora: {adapter.path} changes {twice[0]!r} more than once")
    changed: dict[str, Tensor] = {}
    elsewhere = []
    for name, change in given:
        original = originals[plain[name]]
        if not plain[name].startswith(exported):
            elsewhere.append(name)
            continue
        weight = ready(original, state[original])
        with tensors_of(f"lora: {adapter.path}"):
            if isinstance(change, Tensor):
                changed[original] = _replaced(name, weight, change)
            else:
                changed[original] = _added(name, weight, change, adapter)
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
        raise ModelError(f"{name!r} is {tuple(new.shape)}, the checkpoint's {tuple(old.shape)}")
    return ready(name, new)


def _added(name: str, weight: Tensor, pair: tuple[Tensor, Tensor], adapter: Adapter) -> Tensor:
    """``W + scale B A``, of a linear layer or of a convolution whose B is pointwise."""
    a, b = (ready(name, factor).double() for factor in pair)
    fits = (
        a.ndim == b.ndim == weight.ndim >= 2
        and 0 < a.shape[0] == b.shape[1]
        and b.shape[0] == weight.shape[0]
        and a.shape[1:] == weight.shape[1:]
        and b[0, 0].numel() == 1
    )
    if not fits:
        raise ModelError(
            f"factors {tuple(b.shape)} and {tuple(a.shape)} of {name!r} do not fit its "
            f"{tuple(weight.shape)}"
        )
    delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    scale = adapter.scale(name.removesuffix(".weight"), a.shape[0])
    return ready(name, torch.add(weight.double(), delta, alpha=scale))
