"""SAM 2 checkpoints and transformers folders: what opens, as what, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden.sam2 import synthetic
from tests.support.export_helpers import (
    canonical_tensors,
    register,
    relative,
    sam2_state,
)
from torch import Tensor, nn

from sam3rt_export.checkpoint_keys import from_transformers, to_transformers
from sam3rt_export.errors import CheckpointError
from sam3rt_export.graphs.hiera import HieraArchitecture
from sam3rt_export.references.transformers_sam2 import Sam2Model, build_sam2_model
from sam3rt_export.source import ExportSource
from sam3rt_export.sources import SourceOptions, open_source, sam2
from sam3rt_export.sources.state_dict import family_of

TINY = HieraArchitecture(
    image_size=64,
    depths=(1, 1, 2, 1),
    widths=(8, 16, 32, 64),
    heads=(1, 2, 4, 8),
    windows=(4, 2, 6, 2),
    global_blocks=(3,),
)
SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model counts as published: shapes alone say too little of any other."""
    monkeypatch.setitem(sam2.PUBLISHED, (TINY.depths, TINY.widths[0]), ("mini", TINY))


@pytest.fixture(scope="module")
def state() -> Tensors:
    """A tiny SAM 2.1 as its checkpoint holds it."""
    return sam2_state(TINY)


@pytest.fixture
def checkpoint(state: Tensors, tmp_path: Path) -> Path:
    path = tmp_path / "sam2.1_hiera_mini.pt"
    torch.save({"model": state}, path)
    return path


def model_of(state: Tensors) -> Any:
    """A transformers model that shares no tensor, as transformers itself makes one."""
    tensors = canonical_tensors({n: t.clone() for n, t in state.items()}, "tiny")
    model = build_sam2_model(TINY, tensors)
    positions = model.shared_image_embedding
    positions.positional_embedding = positions.positional_embedding.clone()
    return model


@torch.no_grad()
def differences(one: ExportSource, other: ExportSource) -> float:
    seeded = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 64, 64, generator=seeded)
    points = 64 * torch.rand(1, 2, 3, 2, generator=seeded)
    labels = torch.tensor([[[1, 0, -1], [2, 3, 1]]])
    masks = torch.randn(1, 1, 16, 16, generator=seeded)
    found = []
    for source in (one, other):
        maps = source.encoder(pixels)
        found.append((*maps, *source.decoder(maps, points, labels, masks, torch.ones(1))))
    return max(relative(a, b) for a, b in zip(*found, strict=True))


# --- what opens -----------------------------------------------------------------------------------


def test_a_file(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    assert (source.model_type, source.name) == ("sam2", "sam2.1_hiera_mini")
    assert (source.kind, source.origin) == ("sam2.1_hiera_mini.pt", "sam2.1_hiera_mini.pt")
    assert len(source.sha256) == 64
    assert source.license == "Apache-2.0"
    assert source.image.size == (64, 64)
    assert (source.image.resize, source.image.resize_dtype) == ("stretch", "float32")
    assert source.image.mean == pytest.approx((123.675, 116.28, 103.53))
    assert source.image.std == pytest.approx((58.395, 57.12, 57.375))
    prompts = source.prompts
    assert (prompts.box_position, prompts.padding_point) == ("before_points", "always")
    assert prompts.mask_size == source.masks.low_res_size == (16, 16)
    assert (source.masks.multimask, source.masks.low_res_limit) == (3, 32.0)
    assert (source.masks.upsampling, source.masks.max_hole_area) == ("direct", 0.0)
    assert source.feature_shapes == [(4, 16, 16), (8, 8, 8), (32, 4, 4)]
    assert not source.decoder.architecture.predicts_log_odds


def test_sam_2_is_told_from_sam_2_1(state: Tensors, tmp_path: Path) -> None:
    """They go through an image alike; the parts for video differ."""
    older = {n: t for n, t in state.items() if not n.startswith(("no_obj_embed", "obj_ptr_tpos"))}
    torch.save({"model": older}, tmp_path / "sam2_hiera_mini.pt")
    source = open_source(tmp_path / "sam2_hiera_mini.pt")
    assert (source.name, source.kind) == ("sam2_hiera_mini", "sam2_hiera_mini.pt")


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod."])
def test_other_forms_of_a_file(wrap: str, state: Tensors, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({wrap + name: t.half() for name, t in state.items()}, tmp_path / "half.safetensors")
    halved = {name: tensor.half().float() for name, tensor in state.items()}
    torch.save(halved, checkpoint)
    opened = open_source(tmp_path / "half.safetensors")
    assert differences(opened, open_source(checkpoint)) == 0.0


def test_parts_for_video_may_be_anything(state: Tensors, tmp_path: Path) -> None:
    more = {name: torch.ones(2) for name in ("memory_attention.norm.weight", "maskmem_tpos_enc")}
    torch.save(state | more, tmp_path / "a.pt")
    assert open_source(tmp_path / "a.pt").model_type == "sam2"


def test_live_models(state: Tensors, checkpoint: Path) -> None:
    from_file = open_source(checkpoint)
    root = nn.Module()
    for name, tensor in state.items():
        register(root, name, tensor)
    source = open_source(root)
    assert (source.kind, source.name) == ("live model", "sam2.1_hiera_mini")
    assert differences(source, from_file) == 0.0
    source = open_source(model_of(state))
    assert (source.kind, source.name) == ("Sam2Model", "sam2_hiera_mini")
    assert differences(source, from_file) == 0.0


@pytest.mark.parametrize("model_type", ["sam2", "sam2_video"])
def test_a_transformers_folder(
    model_type: str,
    state: Tensors,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hub repositories of SAM 2.1 name its video model, and hold that one's tensors too."""
    model = model_of(state)
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if model_type == "sam2_video":
        from transformers import Sam2VideoConfig

        Sam2VideoConfig(
            **{part: config[part] for part in config if part.endswith("_config")}
        ).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    source = open_source(folder)
    assert (source.kind, source.origin, source.model_type) == ("transformers", "folder", "sam2")
    assert differences(source, open_source(checkpoint)) < 1e-6
    assert not [r for r in caplog.records if "sam2_video" in r.message], "it says what is no news"
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert differences(source, open_source(checkpoint)) < 1e-6, "it reads from the file"


@pytest.mark.parametrize("form", ["file", "live"])
@torch.no_grad()
def test_another_input_size(form: str, state: Tensors, checkpoint: Path) -> None:
    given = checkpoint if form == "file" else model_of(state)
    source = open_source(given, SourceOptions(image_size=128))
    assert source.image.size == (128, 128)
    assert source.prompts.mask_size == source.masks.low_res_size == (32, 32)
    assert source.notes == ("input of 128 pixels instead of 64: accuracy was never measured",)
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pairs = zip(source.encoder(pixels), source.reference.encode(pixels), strict=True)
    assert max(relative(a, b) for a, b in pairs) < 1e-5


@pytest.mark.parametrize("size", [100, 0, -64])
def test_sizes_that_do_not_fit_the_windows(size: int, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=f"image_size is {size}, expected a multiple of 32"):
        open_source(checkpoint, SourceOptions(image_size=size))


def test_a_live_model_of_the_package_says_its_size(state: Tensors) -> None:
    root = nn.Module()
    for name, tensor in state.items():
        register(root, name, tensor)
    root.image_size = 128  # type: ignore[assignment]
    assert open_source(root).image.size == (128, 128)


def test_a_lora_adapter(state: Tensors, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = "image_encoder.trunk.blocks.2.attn.qkv"
    rows, columns = state[f"{module}.weight"].shape
    seeded = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, columns, generator=seeded), torch.randn(rows, 2, generator=seeded)
    pair = {f"base_model.model.{module}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
    save_file(pair, tmp_path / "lora.safetensors")
    options = SourceOptions(lora=tmp_path / "lora.safetensors", lora_alpha=4.0)
    merged = state | {f"{module}.weight": state[f"{module}.weight"] + 2.0 * b @ a}
    torch.save(merged, tmp_path / "merged.pt")
    # Not nearer than FP32's rounding: the two add up in other orders.
    assert differences(open_source(checkpoint, options), open_source(tmp_path / "merged.pt")) < 1e-4
    assert differences(open_source(checkpoint, options), open_source(checkpoint)) > 1e-2


def test_a_tracker_is_for_others(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="tracker: SAM 2, which has a decoder of its own"):
        open_source(checkpoint, SourceOptions(tracker=checkpoint))


def test_names_there_and_back_again(state: Tensors) -> None:
    tensors = canonical_tensors(state, "tiny")
    model = build_sam2_model(TINY, tensors)
    renamed = to_transformers(tensors)
    report = Sam2Model(model.config).load_state_dict(renamed, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    back = from_transformers(model.state_dict())
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes(size: str) -> None:
    depths, width, grid = synthetic.FULL_SIZES[size]
    named = synthetic.shapes_of(depths, width, grid, 8)
    tensors = {name: torch.empty(1).expand(shape) for name, shape in named.items()}
    assert family_of(tensors) == "sam2"
    found = sam2.read_architecture(tensors)
    assert found == sam2.PUBLISHED[depths, width][1]
    assert (found.grid, found.widths[-1]) == (64, 8 * width)
    blocks = sum(depths)
    assert all(block < blocks - depths[-1] for block in found.global_blocks)


# --- what is refused ------------------------------------------------------------------------------


def drop(prefix: str) -> Callable[[Tensors], None]:
    def change(state: Tensors) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]

    return change


def put(name: str, *shape: int) -> Callable[[Tensors], None]:
    def change(state: Tensors) -> None:
        state[name] = torch.zeros(shape)

    return change


REFUSED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no decoder": (drop("sam_mask_decoder."), "SAM 2's image encoder without its mask decoder"),
    "no prompt encoder": (drop("sam_prompt_encoder."), "missing"),
    "no neck": (drop("image_encoder.neck."), "missing"),
    "no no_mem_embed": (drop("no_mem_embed"), "missing"),
    "one tensor less": (drop("image_encoder.trunk.blocks.2.attn.proj.bias"), "missing"),
    "one block less": (drop("image_encoder.trunk.blocks.3."), "not numbered"),
    "the last block less": (drop("image_encoder.trunk.blocks.4."), r"\[1, 1, 2\] blocks"),
    "one block more": (
        put("image_encoder.trunk.blocks.5.norm2.weight", 64),
        r"\[1, 1, 2, 2\] blocks of widths \[8, 16, 32, 64\] is no published SAM 2.*tiny",
    ),
    "an adapter": (put("image_encoder.trunk.blocks.0.adapter.weight", 4, 4), "1 unknown tensor"),
    "an object score of one layer": (drop("sam_mask_decoder.pred_obj_score_head.layers.2"), "miss"),
    "another patch": (
        put("image_encoder.trunk.patch_embed.proj.weight", 8, 4, 7, 7),
        "expected",
    ),
    "a narrower neck": (
        put("image_encoder.neck.convs.0.conv.weight", 16, 64, 1, 1),
        "expected",
    ),
    "not finite": (lambda state: state["no_mem_embed"].fill_(torch.nan), "NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_near_misses_are_refused_by_name(case: str, state: Tensors, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    broken = {name: tensor.clone() for name, tensor in state.items()}
    change(broken)
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        open_source(tmp_path / "broken.pt")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_config", "fpn_top_down_levels", [1, 2, 3]),
        ("vision_config", "fpn_kernel_size", 3),
        ("vision_config", "num_feature_levels", 2),
        ("mask_decoder_config", "dynamic_multimask_via_stability", False),
        ("mask_decoder_config", "dynamic_multimask_stability_thresh", 0.9),
        ("mask_decoder_config", "num_attention_heads", 4),
        ("mask_decoder_config", "hidden_act", "relu"),
        ("prompt_encoder_config", "image_size", 128),
        ("prompt_encoder_config", "hidden_act", "relu"),
        ("prompt_encoder_config", "layer_norm_eps", 1e-5),
        ("backbone_config", "query_stride", [2, 1]),
        ("backbone_config", "num_query_pool_stages", 2),
        ("backbone_config", "hidden_act", "relu"),
        ("backbone_config", "patch_stride", [8, 8]),
    ],
)
def test_a_configuration_that_cannot_be_expressed(
    part: str, key: str, value: Any, state: Tensors
) -> None:
    config = model_of(state).config
    holder = config.vision_config.backbone_config if part == "backbone_config" else None
    setattr(holder or getattr(config, part), key, value)
    with pytest.raises(CheckpointError, match=re.escape(key.removeprefix("prompt_encoder_"))):
        sam2.architecture_of(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("window_size_per_stage", [4, 3, 6, 2], "even"),
        ("window_size_per_stage", [5, 2, 6, 2], "image_size"),
        ("num_attention_heads_per_stage", [3, 2, 4, 8], "heads"),
        ("blocks_per_stage", [1, 1, 2], "stages"),
        ("global_attention_blocks", [2], "global"),
    ],
)
def test_sizes_that_do_not_fit_together(key: str, value: Any, message: str, state: Tensors) -> None:
    config = model_of(state).config
    setattr(config.vision_config.backbone_config, key, value)
    with pytest.raises(CheckpointError, match=message):
        sam2.architecture_of(config)
