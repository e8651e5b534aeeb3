"""Single engines of a bundle: typed, built, and put where the runtime looks for them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from sam3rt.backends.table import ENGINES
from sam3rt.backends.tensorrt.driver import Device
from sam3rt.backends.tensorrt.engines import EngineFile
from sam3rt.backends.tensorrt.sidecar import (
    BackendName,
    EngineShapes,
    EngineSidecar,
    sidecar_path,
    write_sidecar,
)
from sam3rt.bundle import Bundle, TensorSpec, file_entry
from sam3rt.bundle.contract import EXPORT_ID, FINGERPRINT

from .builder_process import EngineRequest, Sizes
from .engines_folder import folder_name
from .ep_context import wrapper_path, write_wrapper
from .errors import BuildError
from .graph_files import load_graph, save_graph
from .plan_evidence import PlanEvidence, check_promise, evidence_path, read_engine, write_evidence
from .recipes import Recipe
from .typed_graph import FeaturesType, Role, apply_recipe

Make = Callable[[EngineRequest], None]
# Least, typical and greatest shape of each input with a dynamic axis.
Profile = dict[str, tuple[Sizes, Sizes, Sizes]]

# The runtime pads one click to this many points.
_CLICK_POINTS = 4


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        backend: the TensorRT flavour.
        precision: ``"auto"``, or the recipes to try, in the order of the ladder.
        targets: compute capabilities such as ``"8.9"`` to build for ahead of time, without a GPU
            (tensorrt-rtx only); empty builds for the GPU at hand and proves it there.
        max_objects: objects in one decoder call; more are run in parts. In the published decoder
            an object's largest layer (288 x 288 x 32 values) takes 10.6 MB in FP32, and every
            concurrent caller has room for a few such layers of all objects.
        max_points: points per object, padding and box corners included.
        max_batch: images in one encoder call. The encoder's working memory grows with it.
        workspace: memory the builder may try layers with, bytes; ``None`` for all there is.
        device: number of the GPU to build on.
    """

    backend: BackendName = "tensorrt"
    precision: Literal["auto"] | tuple[str, ...] = "auto"
    targets: tuple[str, ...] = ()
    max_objects: int = 16
    max_points: int = 32
    max_batch: int = 1
    workspace: int | None = None
    device: int = 0


class EngineBuilder:
    """Builds single engines of one bundle by one set of options, in a temporary folder.

    A context manager: the folder is gone when it is left, with every engine that was not placed.

    Args:
        bundle: an opened bundle.
        options: what to build.
        device: the GPU to build on; ``None`` ahead of time.
        version: of TensorRT, in full.
        make: builds one engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BuildOptions,
        device: Device | None,
        version: str,
        make: Make,
    ) -> None:
        self.bundle = bundle
        self.options = options
        self._device = device
        self._version = version
        self._make = make
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> EngineBuilder:
        # In the bundle: what is finished is moved into place, which must not cross file systems.
        self._folder = tempfile.TemporaryDirectory(
            prefix=".build-", dir=self.bundle.path / ENGINES, ignore_cleanup_errors=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def build(self, role: Role, recipe: Recipe, features: FeaturesType) -> EngineFile:
        """Type the graph and build the engine, unproven, in the builder's own folder.

        Raises:
            RecipeError, BuildError: it cannot be built, or does not compute as its recipe promises.
        """
        if self._folder is None:
            raise RuntimeError("the builder is not entered")
        model = load_graph(self.bundle, role)
        apply_recipe(model, recipe, features)
        graph = Path(self._folder.name) / f"{role}.onnx"
        save_graph(model, graph)
        del model
        built = self._make_engine(
            role, graph, graph_profile(self.bundle, role, self.options), recipe, features
        )
        write_wrapper(
            built.path,
            self.options.backend,
            self._specs(role, "inputs", features),
            self._specs(role, "outputs", features),
            {
                EXPORT_ID: self.bundle.manifest.export_id,
                FINGERPRINT: self.bundle.manifest.fingerprint,
            },
            None if built.sidecar.gpu is None else built.sidecar.gpu.compute_capability,
        )
        return built

    def _make_engine(
        self,
        role: Role,
        graph: Path,
        profile: Profile,
        recipe: Recipe,
        features: FeaturesType,
    ) -> EngineFile:
        finished = graph.with_suffix(".engine")
        started = time.monotonic()
        self._make(
            EngineRequest(
                str(graph),
                str(finished),
                self.options.backend,
                profile,
                self.options.targets,
                recipe.tf32,
                self.options.workspace,
                self._timing_cache(),
                None if self._device is None else self._device.index,
            )
        )
        seconds = time.monotonic() - started
        if not finished.is_file() or not finished.stat().st_size:
            raise BuildError(f"the build of the {role} in {recipe.name} left no engine")
        evidence = read_engine(finished)
        if evidence is not None:
            check_promise(recipe, evidence)
        return self._describe(role, recipe, features, finished, seconds, evidence)

    def place(self, engine: EngineFile) -> EngineFile:
        """Move a finished engine, with what is known of it, to where the runtime looks for it.

        Until then, an engine of an earlier build stays there and serves.
        """
        path = self._place_of(engine)
        path.parent.mkdir(exist_ok=True)
        # Old files about an engine beside a new one would be a contradiction, an engine without
        # them is merely unknown: so they go first, and the sidecar comes last.
        beside = (evidence_path, wrapper_path, sidecar_path)
        for of in beside:
            of(path).unlink(missing_ok=True)
        engine.path.replace(path)
        for of in beside:
            if of(engine.path).exists():
                of(engine.path).replace(of(path))
        return EngineFile(path, engine.sidecar)

    def refuse(self, engine: EngineFile, figures: dict[str, float]) -> None:
        """Leave on record what failed, and remove the engine itself: it can be gigabytes."""
        path = self._place_of(engine)
        if not path.exists():  # one of an earlier build may have passed
            path.parent.mkdir(exist_ok=True)
            refused = msgspec.structs.replace(engine.sidecar, state="refused", parity=figures)
            write_sidecar(path, refused)
        engine.path.unlink()

    def _place_of(self, engine: EngineFile) -> Path:
        return self.bundle.path / ENGINES / engine.path.parent.name / engine.path.name

    def _describe(
        self,
        role: Role,
        recipe: Recipe,
        features: FeaturesType,
        finished: Path,
        seconds: float,
        evidence: PlanEvidence | None,
    ) -> EngineFile:
        gpu = None if self._device is None else self._device.gpu
        folder = folder_name(
            gpu, self.options.targets, self.options.backend, self._version, recipe.name
        )
        path = finished.parent / folder / f"{role}.engine"
        path.parent.mkdir(exist_ok=True)
        entry = msgspec.structs.replace(file_entry(finished), file=path.name)
        sidecar = EngineSidecar(
            role=role,
            backend=self.options.backend,
            engine=entry,
            bundle_fingerprint=self.bundle.manifest.fingerprint,
            gpu=gpu,
            targets=self.options.targets,
            tensorrt_version=self._version,
            driver_version=None if self._device is None else self._device.driver_version,
            recipe=recipe.name,
            features_dtype=features,
            shapes=EngineShapes(
                self.options.max_objects,
                self.options.max_points,
                self.options.max_batch,
            ),
            state="unproven",
            parity={},
            paired_with=None,
            build_seconds=round(seconds, 3),
        )
        finished.replace(path)
        evidence_path(path).unlink(missing_ok=True)  # of a decoder for other feature maps
        if evidence is not None:
            write_evidence(path, evidence)
        write_sidecar(path, sidecar)
        return EngineFile(path, sidecar)

    def _specs(
        self, role: Role, side: Literal["inputs", "outputs"], features: FeaturesType
    ) -> tuple[TensorSpec, ...]:
        """The engine's inputs or outputs: the graph's, with feature maps of their type."""
        maps = {spec.name for spec in self.bundle.manifest.encoder.outputs}
        specs: tuple[TensorSpec, ...] = getattr(getattr(self.bundle.manifest, role), side)
        return tuple(
            msgspec.structs.replace(spec, dtype=features) if spec.name in maps else spec
            for spec in specs
        )

    def _timing_cache(self) -> str | None:
        """Where this GPU's measured layer times are kept; none ahead of time, when none are."""
        if self._device is None:
            return None
        name = folder_name(self._device.gpu, (), self.options.backend, self._version, "timing")
        return str(self.bundle.path / ENGINES / f"{name}.cache")


def graph_profile(bundle: Bundle, role: Role, options: BuildOptions) -> Profile:
    """Least, typical and greatest shape of each input of a graph that has a dynamic axis."""
    axes = {
        "batch": (1, 1, options.max_batch),
        "num_objects": (1, 1, options.max_objects),
        "num_points": (1, min(_CLICK_POINTS, options.max_points), options.max_points),
        "num_masks": (1, 1, options.max_objects),
        "num_images": (1, 1, options.max_objects),
    }
    profile: Profile = {}
    for spec in getattr(bundle.manifest, role).inputs:
        if all(isinstance(side, int) for side in spec.shape):
            continue
        least, typical, greatest = (
            tuple(side if isinstance(side, int) else axes[side][i] for side in spec.shape)
            for i in range(3)
        )
        profile[spec.name] = (least, typical, greatest)
    return profile
