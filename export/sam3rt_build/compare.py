"""Two ways of running one bundle, side by side: whole, or layer by layer.

Whole models are compared as the gate compares them, with the first in place of the parity record.
Layers go through polygraphy's comparator: the same nodes of both graphs are marked as outputs and
run on the same inputs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt.accuracy.gate import GATE_LIMITS, Verdict, judge
from sam3rt.accuracy.metrics import cosine
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import rerecord, verify
from sam3rt.backends import BACKENDS
from sam3rt.backends.create import create_backend
from sam3rt.backends.options import BackendOptions
from sam3rt.backends.tensorrt.sidecar import BackendName
from sam3rt.bundle import Bundle
from sam3rt.errors import InvalidInputError
from sam3rt.geometry import preprocess
from sam3rt.model import SegmentationModel
from sam3rt.prompts import decoder_inputs

from .builder_process import EngineRequest, build_engine
from .engine_builder import BuildOptions, graph_profile
from .graph_files import load_graph, mark_layers, save_graph
from .recipes import SIMULATED_RECIPES, Recipe, recipe_named
from .simulated import SimulatedBackend, simulate
from .typed_graph import Role, apply_recipe

SIMULATED = "simulated"
_TENSORRT = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        backend: a backend's name, or ``"simulated"``.
        precision: its precision or recipe, or ``"auto"``.
    """

    backend: str
    precision: str

    @property
    def name(self) -> str:
        """As it was written."""
        return self.backend if self.precision == "auto" else f"{self.backend}:{self.precision}"


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer's values are apart.

    Attributes:
        layer: the node's name, or an output's.
        shape: of its values.
        cosine: cosine similarity; NaN where either holds a NaN.
        error: largest absolute difference.
        largest: largest absolute value on the first side.
    """

    layer: str
    shape: tuple[int, ...]
    cosine: float
    error: float
    largest: float


def parse_side(text: str) -> Side:
    """Read ``BACKEND`` or ``BACKEND:PRECISION``.

    Raises:
        InvalidInputError: there is no such backend, or a simulation of no known recipe.
    """
    backend, _, precision = text.partition(":")
    known = (*sorted(BACKENDS), SIMULATED)
    if backend not in known:
        raise InvalidInputError("side", repr(text), "one of " + ", ".join(known))
    recipes = tuple(recipe.name for recipe in SIMULATED_RECIPES)
    if backend == SIMULATED and precision not in recipes:
        raise InvalidInputError("side", repr(text), "simulated: with one of " + ", ".join(recipes))
    return Side(backend, precision or "auto")


def open_side(bundle: Bundle, side: Side) -> SegmentationModel:
    """The model that runs as a side says.

    Raises:
        BackendError: the backend cannot be used here.
    """
    if side.backend == SIMULATED:
        recipe = recipe_named(side.precision)
        return SegmentationModel(bundle, SimulatedBackend(bundle, recipe, recipe))
    return SegmentationModel(
        bundle, create_backend(side.backend, bundle, BackendOptions(precision=side.precision))
    )


def compare_models(bundle: Bundle, first: Side, second: Side) -> Verdict:
    """Hold the second side's outputs to the first's, on the inputs of the parity record.

    Raises:
        BackendError: a backend cannot be used here.
    """
    manifest = bundle.manifest
    expected = rerecord(open_side(bundle, first).backend, manifest, load_record(bundle))
    return judge(verify(open_side(bundle, second).backend, manifest, expected, GATE_LIMITS))


def compare_layers(
    bundle: Bundle, role: Role, first: Side, second: Side, pattern: str
) -> Iterator[LayerDifference]:
    """Compare inner values of one graph on the first input of the parity record.

    Args:
        bundle: an opened bundle.
        role: which graph.
        first: ``onnxruntime`` or ``simulated:RECIPE``, or a TensorRT backend with a recipe, for
            which an engine that yields the layers is built on the GPU.
        second: likewise.
        pattern: regular expression searched for in node names.

    Yields:
        One difference per layer that both sides yield, in graph order, and then per output.

    Raises:
        InvalidInputError: a side has no layers to show.
        BuildError: no node matches, or an engine cannot be built.
    """
    sides = (first, second)
    flavours = {side.backend for side in sides if side.backend in _TENSORRT}
    if len(flavours) > 1:
        raise InvalidInputError("side", "both TensorRT flavours", "one of them in a process")
    if flavours:
        # Polygraphy reads this once, when it is imported.
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int("tensorrt-rtx" in flavours))
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    with (
        G_LOGGER.verbosity(G_LOGGER.WARNING),
        tempfile.TemporaryDirectory(prefix="sam3rt-compare-") as folder,
    ):
        runners: list[Any] = []
        names: tuple[str, ...] = ()
        for index, side in enumerate(sides):
            subfolder = Path(folder) / str(index)
            subfolder.mkdir()
            runner, names = _runner(bundle, role, side, pattern, subfolder)
            runners.append(runner)
        inputs = _inputs(bundle, role)
        results = Comparator.run(runners, data_loader=[inputs])
        a, b = (results[runner.name][0] for runner in runners)
        outputs = [spec.name for spec in getattr(bundle.manifest, role).outputs]
        for name in (*names, *outputs):
            if name in a and name in b:
                yield _difference(name, np.asarray(a[name]), np.asarray(b[name]))


def _runner(
    bundle: Bundle, role: Role, side: Side, pattern: str, folder: Path
) -> tuple[Any, tuple[str, ...]]:
    """A polygraphy runner of one side's graph with its layers marked, and their names."""
    model = load_graph(bundle, role)
    names = mark_layers(model, pattern)
    path = folder / f"{role}.onnx"
    recipe = _recipe(side)
    if side.backend in _TENSORRT:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        apply_recipe(model, recipe, recipe.features_dtype)
        save_graph(model, path)
        engine = folder / f"{role}.engine"
        backend: BackendName = "tensorrt-rtx" if side.backend == "tensorrt-rtx" else "tensorrt"
        build_engine(
            EngineRequest(
                str(path),
                str(engine),
                backend,
                graph_profile(bundle, role, BuildOptions()),
                tf32=recipe.tf32,
            )
        )
        return TrtRunner(EngineFromBytes(BytesFromPath(str(engine))), name=side.name), names
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    if side.backend == SIMULATED:
        simulate(model, recipe, recipe.features_dtype)
    save_graph(model, path)
    return OnnxrtRunner(SessionFromOnnx(str(path)), name=f"{side.name} ({folder.name})"), names


def _recipe(side: Side) -> Recipe:
    if side.backend == "onnxruntime":
        return recipe_named("fp32")
    if side.backend not in (*_TENSORRT, SIMULATED) or side.precision == "auto":
        raise InvalidInputError(
            "side", repr(side.name), "onnxruntime, simulated:RECIPE or tensorrt:RECIPE for layers"
        )
    return recipe_named(side.precision)


def _inputs(bundle: Bundle, role: Role) -> dict[str, NDArray[Any]]:
    """The graph's inputs for the record's first image and, for a decoder, its first case."""
    manifest, record = bundle.manifest, load_record(bundle)
    pixels, _ = preprocess(manifest.image, record.images()[0])
    if role == "encoder":
        return {manifest.encoder.inputs[0].name: pixels}
    model = open_side(bundle, Side("onnxruntime", "auto"))
    case = record.cases()[0]
    maps = model.encode(record.images()[case.image]).numpy()
    no_mask = np.zeros((1, 1, *manifest.prompts.mask_size), np.float32)
    return maps | dict(decoder_inputs(case.prompts, no_mask))


def _difference(name: str, a: NDArray[Any], b: NDArray[Any]) -> LayerDifference:
    x, y = a.astype(np.float32), b.astype(np.float32)
    # Two layers of zeros have no angle between them, and no difference.
    similarity = 1.0 if np.array_equal(x, y) else cosine(x, y)
    return LayerDifference(
        name, a.shape, similarity, float(np.abs(x - y).max(initial=0.0)), float(np.abs(x).max())
    )
