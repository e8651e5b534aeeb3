"""A bundle with fake engines beside it, and the platform that runs them."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_tensorrt import Perturbation, engine_content, make_module

import sam3rt
from sam3rt import GpuOptions
from sam3rt.backends.table import ENGINES
from sam3rt.backends.tensorrt.driver import Device, Gpu
from sam3rt.backends.tensorrt.engines import EngineFile, candidates
from sam3rt.backends.tensorrt.offer import Platform, TensorRtBackend
from sam3rt.backends.tensorrt.sidecar import (
    BackendName,
    EngineShapes,
    EngineSidecar,
    write_sidecar,
)
from sam3rt.backends.tensorrt.trt import Library
from sam3rt.bundle import Bundle, FileEntry, open_bundle

GPU = Gpu("NVIDIA Fake 9000", "8.9")
DRIVER = "580.65"
VERSION = "10.16.0"
MAX_OBJECTS, MAX_POINTS = 4, 16
# Of an engine that is nowhere.
SIDECAR = EngineSidecar(
    role="decoder",
    backend="tensorrt",
    engine=FileEntry("decoder.engine", "ab" * 32, 123456),
    bundle_fingerprint="cd" * 32,
    gpu=Gpu("NVIDIA GeForce RTX 4090", "8.9"),
    targets=(),
    tensorrt_version="10.16.0.72",
    driver_version="580.65.06",
    recipe="fp16-attention-fp32",
    features_dtype="float16",
    shapes=EngineShapes(16, 32, 1),
    state="proven",
    parity={"features 0 cosine": 0.99998, "masks least IoU": 0.9991},
    paired_with="ef" * 32,
    build_seconds=61.5,
)


def copy_bundle(source: Path, target: Path) -> Path:
    """A bundle of its own for engines to be put into; files are linked where that is possible."""

    def link(origin: str, copy: str) -> None:
        try:
            os.link(origin, copy)
        except OSError:
            shutil.copy2(origin, copy)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns("engines"))
    return target


@dataclass
class Rig:
    """A bundle, a fake GPU and a fake TensorRT."""

    source: Path
    bundle: Bundle
    cuda: FakeCuda
    platform: Platform
    trt: types.ModuleType
    perturbations: dict[str, Perturbation] = field(default_factory=dict)

    @property
    def flavour(self) -> BackendName:
        return self.platform.library.flavour

    def build(self, recipe: str = "fp32", **changes: Any) -> dict[str, EngineFile]:
        """Put an encoder and a decoder engine into the bundle."""
        encoder = self.engine("encoder", recipe, **changes)
        decoder = self.engine(
            "decoder", recipe, paired_with=encoder.sidecar.engine.sha256, **changes
        )
        return {"encoder": encoder, "decoder": decoder}

    def engine(
        self,
        role: str,
        recipe: str = "fp32",
        *,
        perturbation: str = "",
        features: str = "float32",
        labels: str = "int64",
        state: str = "proven",
        paired_with: str | None = None,
        user_memory: bool = True,
        max_objects: int = MAX_OBJECTS,
        max_points: int = MAX_POINTS,
        max_batch: int = 1,
        **changes: Any,
    ) -> EngineFile:
        """Put one engine into the bundle."""
        manifest = self.bundle.manifest
        axes = {
            "num_objects": max_objects,
            "num_masks": max_objects,
            "num_images": max_objects,
            "num_points": max_points,
            "batch": max_batch if role == "encoder" else 1,
        }
        path = self.bundle.path / ENGINES / f"{self.flavour}-{recipe}" / f"{role}.engine"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Where all rigs have it, so that one session serves them.
        graph = self.source / getattr(manifest, role).model.file
        content = engine_content(
            graph,
            axes,
            features=features,
            labels=labels,
            perturbation=perturbation,
            user_memory=user_memory,
        )
        path.write_bytes(content)
        fields: dict[str, Any] = {
            "role": role,
            "backend": self.flavour,
            "engine": FileEntry(path.name, hashlib.sha256(content).hexdigest(), len(content)),
            "bundle_fingerprint": manifest.fingerprint,
            "gpu": GPU,
            "targets": (),
            "tensorrt_version": VERSION,
            "driver_version": DRIVER,
            "recipe": recipe,
            "features_dtype": features,
            "shapes": EngineShapes(max_objects, max_points, max_batch),
            "state": state,
            "parity": {},
            "paired_with": paired_with if role == "decoder" else None,
            "build_seconds": 1.0,
        }
        sidecar = EngineSidecar(**(fields | changes))
        write_sidecar(path, sidecar)
        return EngineFile(path, sidecar)

    def load(self, **options: Any) -> TensorRtBackend:
        """The backend over the first fitting set, without proof."""
        engines = candidates(self.bundle, self.platform.target)[0]
        return TensorRtBackend(self.bundle, engines, self.platform, GpuOptions(**options))

    def model(self, **options: Any) -> sam3rt.SegmentationModel:
        return sam3rt.SegmentationModel(self.bundle, self.load(**options))


def make_rig(bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Rig:
    """A rig over a copy of a bundle."""
    cuda = FakeCuda(**{k: options.pop(k) for k in ("total", "seed") if k in options})
    perturbations: dict[str, Perturbation] = {}
    flavour: BackendName = "tensorrt-rtx" if options.get("rtx") else "tensorrt"
    module = make_module(cuda, VERSION, perturbations, **options)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    copied = open_bundle(copy_bundle(bundle, folder / bundle.name), check_files=False)
    device = Device(0, GPU, cuda.total, DRIVER, (13, 0))
    rig = Rig(bundle, copied, cuda, Platform(device, cuda, Library(flavour)), module, perturbations)
    monkeypatch.setattr("sam3rt.backends.tensorrt.offer.probe", lambda index=0: device)
    monkeypatch.setattr(
        "sam3rt.backends.tensorrt.offer.open_platform", lambda flavour, gpu, blocking: rig.platform
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return rig
