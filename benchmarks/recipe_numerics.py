"""What each precision recipe costs in accuracy, rounded on the CPU as hardware would.

    python -m benchmarks.recipe_numerics BUNDLE [--recipe NAME ...] [--output FILE]

Runs the bundle's parity record, encoder and decoder in the same recipe, on graphs that compute in
FP32 and round every value the recipe narrows. It shows what a recipe loses by itself; what a GPU's
kernels add, only the gate on that GPU shows. The last recipe adds up in FP16 what the builder may,
where no one asks for more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.report import conditions, publish

from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.model import SegmentationModel
from sam3rt_build.recipes import SIMULATED_RECIPES, Recipe
from sam3rt_build.simulated import SimulatedBackend


def measure(bundle: Bundle, recipe: Recipe) -> dict[str, Any]:
    """The gate's verdict on one recipe, with the worst figure of each metric."""
    started = time.monotonic()
    model = SegmentationModel(bundle, SimulatedBackend(bundle, recipe, recipe))
    verdict = judge(verify(model.backend, bundle.manifest, load_record(bundle), GATE_LIMITS))
    return {
        "recipe": recipe.name,
        "passed": verdict.passed,
        "explanation": verdict.explain(),
        "worst": {name: float(f"{m.value:.4g}") for name, m in verdict.worst().items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    names = [recipe.name for recipe in SIMULATED_RECIPES]
    parser.add_argument("--recipe", action="append", choices=names, default=[])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    chosen = [recipe for recipe in SIMULATED_RECIPES if recipe.name in (options.recipe or names)]
    publish(
        {
            "what": "worst figures over the parity record, simulated on the CPU",
            **conditions("onnxruntime"),
            "bundle": bundle.manifest.name,
            "image_size": bundle.manifest.image.size,
            "recipes": [measure(bundle, recipe) for recipe in chosen],
        },
        options.output,
    )


if __name__ == "__main__":
    main()
