"""A backend that computes in FP32 on the CPU and rounds as a precision recipe would.

It shows what a recipe costs in accuracy, and nothing about any GPU: kernels are what goes wrong
there, and only the gate on the target sees them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from sam3rt.backends.onnxruntime import OnnxRuntimeBackend
from sam3rt.bundle import Bundle, GraphSpec, file_entry

from .recipes import Recipe
from .typed_graph import FeaturesType, Role, load_graph, save_graph, simulate


class SimulatedBackend(OnnxRuntimeBackend):
    """Runs a bundle as two recipes would compute it on hardware without faults.

    Args:
        bundle: an opened bundle.
        encoder: recipe of the encoder; it also decides the type of the feature maps.
        decoder: recipe of the decoder.
        threads: CPU threads per operator.

    Raises:
        RecipeError: a recipe does not fit its graph.
    """

    name = "simulated"

    def __init__(
        self, bundle: Bundle, encoder: Recipe, decoder: Recipe, *, threads: int | None = None
    ) -> None:
        # Lives as long as the backend: sessions are created at first use, from these files.
        self._folder = tempfile.TemporaryDirectory(prefix="sam3rt-simulated-")
        folder = Path(self._folder.name)
        features = encoder.features_dtype
        manifest = msgspec.structs.replace(
            bundle.manifest,
            encoder=_simulated(bundle, "encoder", encoder, features, folder),
            decoder=_simulated(bundle, "decoder", decoder, features, folder),
        )
        precision = f"{encoder.name}+{decoder.name}"
        super().__init__(Bundle(folder, manifest), "cpu", precision, threads=threads)


def _simulated(
    bundle: Bundle, role: Role, recipe: Recipe, features: FeaturesType, folder: Path
) -> GraphSpec:
    """Write one simulated graph and describe it as the manifest does."""
    model = load_graph(bundle, role)
    simulate(model, recipe, features)
    path = folder / f"{role}.onnx"
    external = save_graph(model, path)
    spec: GraphSpec = getattr(bundle.manifest, role)
    return msgspec.structs.replace(
        spec, model=file_entry(path), external_data=tuple(file_entry(part) for part in external)
    )
