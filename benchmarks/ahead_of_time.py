"""What an ahead-of-time build takes, and what its engines say that they compute with.

    python -m benchmarks.ahead_of_time BUNDLE [--target 8.9 ...] [--output FILE]

Builds with TensorRT for RTX, without a GPU, into the bundle's own folder, as
``sam3rt build BUNDLE --backend tensorrt-rtx --target 8.9`` does.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

from benchmarks.report import conditions, publish

from sam3rt.bundle import open_bundle
from sam3rt_build.build import BuildOptions, build_bundle
from sam3rt_build.plan_evidence import load_evidence


def main() -> None:
    """Build and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--precision", action="append", default=[])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    targets = tuple(options.target) or ("8.9",)
    engines = build_bundle(
        bundle,
        BuildOptions(
            backend="tensorrt-rtx", targets=targets, precision=tuple(options.precision) or "auto"
        ),
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    publish(
        {
            "what": "engines built ahead of time, without a GPU; none was run",
            **conditions(),
            "bundle": bundle.manifest.name,
            "image_size": bundle.manifest.image.size,
            "tensorrt_rtx": engines[0].sidecar.tensorrt_version,
            "targets": targets,
            "builder_peak_mb": round(peak / 1024),
            "engines": [
                {
                    "role": engine.sidecar.role,
                    "recipe": engine.sidecar.recipe,
                    "megabytes": round(engine.sidecar.engine.bytes / 1e6, 1),
                    "seconds": round(engine.sidecar.build_seconds, 1),
                    "plan": _plan(engine.path),
                }
                for engine in engines
            ],
        },
        options.output,
    )


def _plan(engine: Path) -> str:
    evidence = load_evidence(engine)
    return "unknown" if evidence is None else evidence.summary()


if __name__ == "__main__":
    main()
