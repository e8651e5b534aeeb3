"""LoRA adapters: merged by name and scale, or refused; never left out silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.export_helpers import TRUNK, tiny_tensors
from torch import Tensor

from sam3rt_export.errors import CheckpointError
from sam3rt_export.references.transformers_sam3 import build_tracker_model
from sam3rt_export.sources import SourceOptions, open_source
from sam3rt_export.sources.adapters import Adapter, adapted, read_adapter
from sam3rt_export.sources.sam3_architecture import read_architecture

PREFIX = "base_model.model."
QKV = TRUNK + "blocks.1.attn.qkv"
# The same as the model's user names it, within the package's image model.
QKV_OF_IMAGE_MODEL = QKV.removeprefix("detector.")
EXPORTED = ("detector.backbone.vision_backbone.", "tracker.")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A tiny SAM 3."""
    return tiny_tensors()


def factors(module: str = QKV, rank: int = 2) -> dict[str, Tensor]:
    """A pair for a layer of 16 to 48 channels, as PEFT saves it."""
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, 16, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(48, rank, generator=generator),
    }


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(pair: dict[str, Tensor]) -> Tensor:
    a, b = pair.values()
    return (b.double() @ a.double()).float()


@pytest.mark.parametrize("module", [QKV, QKV_OF_IMAGE_MODEL])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_adapter_is_added_with_its_scale(
    tensors: dict[str, Tensor], module: str, as_file: bool, tmp_path: Path
) -> None:
    pair = factors(module)
    write(tmp_path, pair, {"peft_type": "LORA", "r": 2, "lora_alpha": 5})
    path = tmp_path / "adapter_model.safetensors" if as_file else tmp_path
    changed, notes = adapted(tensors, read_adapter(path), EXPORTED)
    assert changed.keys() == {QKV + ".weight"}
    expected = tensors[QKV + ".weight"] + 5 / 2 * product(pair)
    torch.testing.assert_close(changed[QKV + ".weight"], expected)
    assert notes == ("LoRA: adapter_model.safetensors merged into 1 parameters",)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.qkv": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"tn.qkv": 2}}, 2.0),  # the end of a name, not a part
    ],
)
def test_scales(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, factors(rank=4), config))
    assert adapter.scale(QKV, 4) == pytest.approx(scale)


def test_without_a_configuration_alpha_must_be_given(tmp_path: Path) -> None:
    write(tmp_path, factors(), None)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*--lora-alpha"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path, 6.0).scale(QKV, 2) == 3.0


def test_an_alpha_that_is_given_takes_the_place_of_the_common_one_alone(tmp_path: Path) -> None:
    config = {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"attn.qkv": 2}}
    adapter = read_adapter(write(tmp_path, factors(), config), 6.0)
    assert (adapter.scale(QKV, 4), adapter.scale("mlp.fc1", 4)) == (1.0, 3.0)


def test_a_pointwise_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, generator=generator)
    a = torch.randn(2, 5, 3, 3, generator=generator)
    b = torch.randn(6, 2, 1, 1, generator=generator)
    adapter = Adapter(Path("x"), {"c": (a, b)}, {}, alpha=2.0)
    changed, _ = adapted({"c.weight": weight}, adapter, ("c",))
    x = torch.randn(1, 5, 4, 4, generator=generator)
    conv = torch.nn.functional.conv2d
    expected = conv(x, weight) + conv(conv(x, a), b)
    torch.testing.assert_close(conv(x, changed["c.weight"]), expected, atol=1e-4, rtol=1e-4)


def test_parameters_that_were_trained_whole_replace_the_old_ones(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    bias = torch.full((48,), 3.0)
    given = factors() | {f"{PREFIX}{QKV}.bias": bias}
    changed, _ = adapted(tensors, read_adapter(write(tmp_path, given, None), alpha=1.0), EXPORTED)
    assert torch.equal(changed[QKV + ".bias"], bias)


def test_what_is_not_exported_is_said(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    other = "detector.transformer.encoder.layers.0.linear1"
    state = tensors | {other + ".weight": torch.zeros(48, 16)}
    adapter = read_adapter(write(tmp_path, factors() | factors(other), None), alpha=1.0)
    changed, notes = adapted(state, adapter, EXPORTED)
    assert changed.keys() == {QKV + ".weight"}
    assert other in notes[1]
    only = Adapter(Path("x"), {other: adapter.pairs[other]}, {}, alpha=1.0)
    with pytest.raises(CheckpointError, match="changes nothing that is exported"):
        adapted(state, only, EXPORTED)


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "another model": (factors("model.layers.0.q_proj"), r"not in the checkpoint.*q_proj"),
    "one factor": (dict([next(iter(factors().items()))]), "lora_A alone"),
    "DoRA": (
        factors() | {f"{PREFIX}{QKV}.lora_magnitude_vector": torch.ones(48)},
        "lora_magnitude_vector.*no factor",
    ),
    "an embedding": ({f"{PREFIX}x.lora_embedding_A": torch.ones(2, 2)}, "lora_embedding_A"),
    "another width": (
        {n: torch.cat([t, t], dim=1) if "lora_A" in n else t for n, t in factors().items()},
        "do not fit its",
    ),
    "another rank": (
        {n: t[:1] if "lora_A" in n else t for n, t in factors().items()},
        "do not fit its",
    ),
    "no pair": ({f"{PREFIX}{QKV}.bias": torch.zeros(48)}, "no pair"),
    "kohya": (
        {f"lora_unet_{QKV.replace('.', '_')}.lora_down.weight": torch.zeros(2, 16)},
        "no factor of a linear layer in PEFT",
    ),
    "diffusers": ({f"{QKV}.lora.down.weight": torch.zeros(2, 16)}, "other layouts"),
    "no rank": (
        {n: t[:0] if "lora_A" in n else t[:, :0] for n, t in factors().items()},
        "do not fit its",
    ),
    "two adapters": (
        {
            name.replace(".weight", f".{adapter}.weight"): tensor
            for adapter in ("one", "two")
            for name, tensor in factors().items()
        },
        "several adapters: 'one', 'two'",
    ),
    "a factor with a bias": (
        factors() | {f"{PREFIX}{QKV}.lora_B.bias": torch.ones(48)},
        r"lora_B\.bias.*no factor",
    ),
    "one layer by two names": (factors() | factors(QKV_OF_IMAGE_MODEL), "more than once"),
    "a weight and its change": (
        factors() | {f"{PREFIX}{QKV}.weight": torch.ones(48, 16)},
        "more than once",
    ),
    "NaN": ({n: t * float("nan") for n, t in factors().items()}, "NaN"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_merged_is_refused_by_name(
    tensors: dict[str, Tensor], given: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"^lora: .*{message}"):
        adapted(tensors, read_adapter(write(tmp_path, given, None), alpha=1.0), EXPORTED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no configuration of a LoRA"),
        ({"lora_alpha": "x"}, "no configuration of a LoRA"),
        ({"lora_alpha": 1, "peft_type": "LOHA"}, "of type LOHA.*merge it by PEFT"),
        ({"lora_alpha": 1, "use_dora": True}, "DoRA.*merge it by PEFT"),
        ({"lora_alpha": 1, "fan_in_fan_out": True}, "transposed"),
        ({"lora_alpha": 1, "init_lora_weights": "pissa_niter_4"}, "have changed its base weights"),
        ({"lora_alpha": 1, "init_lora_weights": "of tomorrow"}, "have changed its base weights"),
        ({"lora_alpha": 1, "alpha_pattern": {"a.*b": 2}}, "regular expression"),
        ({"lora_alpha": 1, "alpha_pattern": ["qkv"]}, "no configuration of a LoRA.*alpha_pattern"),
        ({"lora_alpha": 1, "alpha_pattern": {"qkv": float("nan")}}, "no configuration of a LoRA"),
        ({"lora_alpha": float("inf")}, "no configuration of a LoRA"),
        ({"lora_alpha": True}, "no configuration of a LoRA.*lora_alpha"),
        ({"lora_alpha": 1, "use_rslora": "false"}, "no configuration of a LoRA.*use_rslora"),
    ],
)
def test_configurations_that_cannot_be_merged(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_adapter(write(tmp_path, factors(), config))


@pytest.mark.parametrize("name", ["adapter_model.bin", "missing.safetensors"])
def test_only_safetensors_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        read_adapter(tmp_path / name, alpha=1.0)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path / "x.safetensors", alpha=1.0)


def test_a_checkpoint_file_and_an_adapter(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """The whole way: what is exported is what PEFT would have merged."""
    torch.save(tensors, tmp_path / "sam3.pt")
    pair = factors()
    write(tmp_path, pair, {"lora_alpha": 4})
    source = open_source(tmp_path / "sam3.pt", SourceOptions(lora=tmp_path))
    merged = tensors | {QKV + ".weight": tensors[QKV + ".weight"] + 2 * product(pair)}
    torch.save(merged, tmp_path / "merged.pt")
    expected = open_source(tmp_path / "merged.pt").encoder.state_dict()
    found = source.encoder.state_dict()
    assert all(torch.allclose(found[name], t, atol=1e-6) for name, t in expected.items())
    assert source.notes[0].startswith("LoRA: adapter_model.safetensors merged")


def test_a_transformers_folder_and_an_adapter(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    model = build_tracker_model(read_architecture(tensors), tensors)
    positions = model.shared_image_embedding
    positions.positional_embedding = positions.positional_embedding.clone()
    model.save_pretrained(tmp_path / "model")
    name = "vision_encoder.backbone.layers.1.attention.v_proj"
    pair = {n: t[:16] if "lora_B" in n else t for n, t in factors(name).items()}
    save_file(pair, tmp_path / "adapter.safetensors")
    options = SourceOptions(lora=tmp_path / "adapter.safetensors", lora_alpha=2.0)
    source, plain = open_source(tmp_path / "model", options), open_source(tmp_path / "model")
    before, after = plain.encoder.state_dict(), source.encoder.state_dict()
    changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed == {"blocks.1.attention.v.matrix"}
    (key,) = changed
    torch.testing.assert_close(after[key], before[key] + product(pair).T)
