"""One engine build in a process of its own, through polygraphy's loaders.

Polygraphy decides between TensorRT and TensorRT for RTX once per process, by an environment
variable. A build also takes gigabytes, and a builder that crashes takes its process with it: both
are over when this one ends.

Run as ``python -m sam3rt_build.builder_process REQUEST.json``; the log goes to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sam3rt.backends.table import entry
from sam3rt.backends.tensorrt.sidecar import BackendName
from sam3rt.bundle.files import atomic_write

from .errors import BuildError

# Lines of the builder's log that an error message quotes.
_QUOTED_LINES = 12

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        graph: the typed ONNX file. It is parsed from its path, so that weights beside it are
            found.
        engine: the engine file to write.
        backend: which TensorRT builds it.
        profile: least, typical and greatest shape of each input with a dynamic axis. The engine
            is tuned for the typical one.
        targets: compute capabilities to build for ahead of time; empty for the GPU at hand.
        tf32: whether FP32 matmuls may use TF32.
        workspace: memory the builder may try layers with, bytes; ``None`` for all there is.
        timing_cache: file of measured layer times to reuse and extend, or ``None``.
        device: number of the GPU to build on among those visible; ``None`` for the first.
    """

    graph: str
    engine: str
    backend: BackendName
    profile: dict[str, tuple[Sizes, Sizes, Sizes]]
    targets: tuple[str, ...] = ()
    tf32: bool = False
    workspace: int | None = None
    timing_cache: str | None = None
    device: int | None = None


def build_engine(request: EngineRequest) -> None:
    """Build one engine in a new process.

    Raises:
        BuildError: the build failed or crashed; the message quotes the end of its log.
    """
    document = Path(request.engine + ".request.json")
    document.write_text(json.dumps(asdict(request)))
    environment = dict(os.environ)
    environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if request.backend == "tensorrt-rtx" else "0"
    # What this process can import, that one must: also where sam3rt is not installed.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # Polygraphy logs to standard output, errors go to the other: kept in order.
    environment["PYTHONUNBUFFERED"] = "1"
    if request.device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _only(request.device, environment)
    command = [sys.executable, "-m", "sam3rt_build.builder_process", str(document)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    finally:
        document.unlink(missing_ok=True)
    if done.returncode:
        log = "\n".join(done.stdout.strip().splitlines()[-_QUOTED_LINES:])
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise BuildError(
            f"{request.backend}: the build of {Path(request.graph).name} {how}:\n{log}"
        )


def _only(device: int, environment: Mapping[str, str]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a process that is to see one of the GPUs visible here."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return str(device) if visible is None else visible.split(",")[device].strip()


def main(arguments: Sequence[str]) -> int:
    """Build what a request file asks for; the last lines of the log say what went wrong."""
    document = json.loads(Path(arguments[0]).read_text())
    document["profile"] = {
        name: tuple(tuple(shape) for shape in shapes)
        for name, shapes in document["profile"].items()
    }
    try:
        _build(EngineRequest(**document))
    except Exception as error:  # a traceback would push out the lines in which TensorRT says why
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _build(request: EngineRequest) -> None:
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

    trt = importlib.import_module(entry(request.backend).modules[0])
    # TensorRT 11 has no other networks and no flag for them.
    flag = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    network = NetworkFromOnnxPath(request.graph, strongly_typed=flag)
    engine = EngineBytesFromNetwork(
        network, config=_config(request), save_timing_cache=request.timing_cache
    )()
    with atomic_write(Path(request.engine)) as stream:
        stream.write(memoryview(engine))


def _config(request: EngineRequest) -> Callable[[Any, Any], Any]:
    """A polygraphy configuration with what it does not set for both flavours."""
    from polygraphy.backend.trt import CreateConfig, Profile

    trt = importlib.import_module(entry(request.backend).modules[0])
    profile = Profile()
    for name, (least, typical, greatest) in request.profile.items():
        profile.add(name, min=least, opt=typical, max=greatest)
    cache = request.timing_cache
    options: dict[str, Any] = {
        "profiles": [profile],
        "load_timing_cache": cache if cache and Path(cache).is_file() else None,
    }
    if request.workspace is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request.workspace}
    creator: Callable[[Any, Any], Any]
    if request.backend == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        if request.targets:
            capabilities = [tuple(map(int, target.split("."))) for target in request.targets]
            creator = CreateConfigRTX(compute_capabilities=capabilities, **options)
        else:
            creator = CreateConfigRTX(use_gpu=True, **options)
    else:
        creator = CreateConfig(**options)

    def configure(builder: Any, network: Any) -> Any:
        config = creator(builder, network)
        # So that the engine says what it computes with: see plan_evidence.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # On by default in TensorRT, off by default in polygraphy: said either way.
        switch = config.set_flag if request.tf32 else config.clear_flag
        switch(trt.BuilderFlag.TF32)
        if request.backend == "tensorrt-rtx":
            # Memory that TensorRT for RTX allocates itself keeps a run from being recorded.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    return configure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
