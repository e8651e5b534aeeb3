"""Tests of `tests.support.torch_graph`: it computes what ONNX Runtime does, in any type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from tests.support.build_helpers import first_cases
from tests.support.torch_graph import TorchGraph, TorchRunner

from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt_build.fused_graph import fuse
from sam3rt_build.graph_files import load_graph
from sam3rt_build.ort_graphs import TYPED_RECIPES, typed_graph
from sam3rt_build.recipes import recipe_named
from sam3rt_build.typed_graph import Role, apply_recipe


@pytest.mark.parametrize("fused", [False, True])
def test_the_small_model_passes_its_own_limits(tiny_sam3: Path, fused: bool) -> None:
    bundle = open_bundle(tiny_sam3)
    models = [load_graph(bundle, role) for role in ("encoder", "decoder")]  # type: ignore[arg-type]
    if fused:
        for model in models:
            fuse(model)
    runner = TorchRunner(bundle, *(TorchGraph(model) for model in models))
    verdict = judge(
        verify(runner, bundle.manifest, load_record(bundle), bundle.manifest.parity.limits)
    )
    assert verdict.passed, verdict.explain()


def test_the_bundled_model_runs_too() -> None:
    bundle = open_bundle(default_bundle_path(), check_files=False)
    graphs = (TorchGraph(bundle.path / f"{role}.onnx") for role in ("encoder", "decoder"))
    record = first_cases(load_record(bundle), "click", "box_click", "nothing")
    runner = TorchRunner(bundle, *graphs)
    verdict = judge(verify(runner, bundle.manifest, record, bundle.manifest.parity.limits))
    assert verdict.passed, verdict.explain()


@pytest.mark.parametrize("name", TYPED_RECIPES)
def test_typed_graphs_for_onnx_runtime_pass_the_gate(tiny_sam3: Path, name: str) -> None:
    """In the types that they state, which the CPU of ONNX Runtime would not keep."""
    bundle = open_bundle(tiny_sam3)
    roles: tuple[Role, Role] = ("encoder", "decoder")
    graphs = (TorchGraph(typed_graph(bundle, role, name)[0]) for role in roles)
    runner = TorchRunner(bundle, *graphs)
    # Masks of this model have 256 pixels, a few of which BF16 turns over.
    limits = GATE_LIMITS if name != "bf16" else structs.replace(GATE_LIMITS, mask_iou=0.98)
    verdict = judge(verify(runner, bundle.manifest, load_record(bundle), limits))
    assert verdict.passed, verdict.explain()


def test_plain_attention_is_the_fused_one(tiny_sam3: Path) -> None:
    bundle = open_bundle(tiny_sam3)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = []
    for plain in (False, True):
        model = load_graph(bundle, "encoder")
        fuse(model)
        maps.append(TorchGraph(model, plain_attention=plain).run({"pixel_values": pixels}))
    for name, expected in maps[0].items():
        assert np.abs((maps[1][name] - expected).numpy()).max() < 1e-5


def test_a_watcher_sees_every_node(tiny_sam3: Path) -> None:
    model = load_graph(open_bundle(tiny_sam3), "encoder")
    apply_recipe(model, recipe_named("fp16"), "float16")
    seen = []
    graph = TorchGraph(model, watch=lambda node, given, made: seen.append(made[0].dtype))
    graph.run({"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert len(seen) == len(tuple(model.graph))
    assert {torch.float16, torch.float32} <= set(seen)
