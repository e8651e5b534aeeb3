"""From ``build_bundle`` to a served mask, over stand-ins for CUDA and TensorRT.

The stand-in for TensorRT executes the bundle's ONNX graphs, so what is proved and served here are
real masks; the build, the gate, the sidecars, the choice and the backend are the real ones.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tests.support import build_helpers  # noqa: F401  (puts the helpers of the runtime tests on the path)
from tests.support.fake_tensorrt import engine_content
from tests.support.helpers import noise
from tests.support.tensorrt_helpers import Rig, make_rig

import sam3rt
from sam3rt.backends.tensorrt.engines import find_engines
from sam3rt.backends.tensorrt.offer import TensorRtBackend
from sam3rt_build import build as build_module
from sam3rt_build.build import BuildOptions, build_bundle
from sam3rt_build.builder_process import EngineRequest


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A SAM 3 of 8x8 pixels on a fake GPU."""
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    monkeypatch.setattr(build_module, "open_platform", lambda flavour, device: rig.platform)
    # Of TensorRT, a build asks its version before it hands over to another process.
    monkeypatch.setattr(build_module, "_import", lambda backend: rig.trt)
    return rig


class Maker:
    """Builds stand-in engines; those of the named recipes compute something else."""

    def __init__(self, rig: Rig, folder: Path, broken: set[str]) -> None:
        self._rig, self._folder, self._broken = rig, folder, broken
        self.recipes: list[tuple[str, str]] = []

    def __call__(self, request: EngineRequest) -> None:
        typed = onnx.load(request.graph, load_external_data=False)
        role = Path(request.graph).stem
        recipe = {p.key: p.value for p in typed.metadata_props}.get("sam3rt.recipe", "fp32")
        self.recipes.append((role, recipe))
        if role in ("encoder", "decoder"):
            graph = self._rig.source / f"{role}.onnx"
        else:  # the request's own is gone when the build is over
            graph = self._folder / f"{role}.onnx"
            shutil.copy(request.graph, graph)
        maps = [v for v in (*typed.graph.input, *typed.graph.output) if "embeddings" in v.name]
        narrow = bool(maps) and maps[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
        axes = {
            "num_objects": 4,
            "num_masks": 4,
            "num_images": 4,
            "num_points": 16,
            "height": 2048,
            "width": 2048,
            "masks": 3,
        }
        content = engine_content(
            graph,
            axes,
            features="float16" if narrow else "float32",
            labels="int64",
            perturbation=f"broken {role}" if recipe in self._broken else "",
        )
        Path(request.engine).write_bytes(content)


def swap_channels(outputs: dict[str, NDArray[Any]]) -> None:
    for array in outputs.values():
        array[...] = array[:, ::-1].copy()


def forbid_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3rt.accuracy.select.verify", lambda *_: pytest.fail("proved again"))


OPTIONS = BuildOptions(max_objects=4, max_points=16)


def test_what_is_built_and_proved_is_what_serves(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig.perturbations["broken encoder"] = swap_channels
    rig.perturbations["broken decoder"] = lambda outputs: None
    maker = Maker(rig, tmp_path, broken={"fp16"})
    said: list[str] = []
    engines = build_bundle(rig.bundle, OPTIONS, said.append, make=maker, device=rig.platform.device)

    states = {e.sidecar.role: (e.sidecar.recipe, e.sidecar.state) for e in engines}
    assert states["encoder"] == ("fp16-activations", "proven")
    assert states["decoder"] == ("fp16", "proven")
    assert any(line.startswith("not fp16: ") and "cosine" in line for line in said)
    by_role = {engine.sidecar.role: engine.sidecar for engine in engines}
    assert by_role["decoder"].paired_with == by_role["encoder"].engine.sha256
    assert by_role["encoder"].parity["features 0 cosine"] > 0.999

    forbid_proofs(monkeypatch)
    model = sam3rt.load_model(rig.bundle.path, backend="tensorrt", check_files=False)
    assert model.backend.precision == "fp16-activations+fp16"
    # The build's own verdict serves, and what stands around the network was compared at loading.
    assert isinstance(model.backend, TensorRtBackend)
    assert model.backend.imaging.preprocess_allowed
    assert model.backend.imaging.postprocess_allowed
    outcomes = []
    for each in (model, sam3rt.load_model(rig.source, backend="onnxruntime")):
        predictor = sam3rt.SAM3InteractiveImagePredictor(each, mask_dtype=bool)
        predictor.set_image(noise(30, 45))
        outcomes.append(predictor.predict(np.array([[22, 15]]), np.array([1])))
    (masks, scores, _), (expected_masks, expected_scores, _) = outcomes
    both, either = (masks & expected_masks).sum(), (masks | expected_masks).sum()
    assert both / either > 0.995  # feature maps pass between the engines in FP16
    np.testing.assert_allclose(scores, expected_scores, atol=0.01)


def test_where_nothing_passes_nothing_is_served(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_nan(outputs: dict[str, NDArray[Any]]) -> None:
        outputs["pred_masks"].flat[7] = np.nan

    rig.perturbations["broken decoder"] = one_nan
    rig.perturbations["broken encoder"] = lambda outputs: None
    options = dataclasses.replace(OPTIONS, precision=("fp16", "fp32"))
    maker = Maker(rig, tmp_path, broken={"fp16", "fp32"})
    with pytest.raises(build_module.BuildError, match="nan"):
        build_bundle(rig.bundle, options, make=maker, device=rig.platform.device)
    assert find_engines(rig.bundle) == ()
    with pytest.raises(sam3rt.BackendError, match="sam3rt build"):
        sam3rt.load_model(rig.bundle.path, backend="tensorrt", check_files=False)
