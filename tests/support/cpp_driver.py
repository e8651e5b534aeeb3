"""Runs the C++ test programs of one build and exchanges arrays with them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sam3rt.accuracy.verdicts import StoredVerdict, save_verdict
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.engines import EngineSet, EngineTarget, find_engines, subject_of
from sam3rt.bundle import open_bundle

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ROOT / "runtime" / "cpp" / "sanitizers"
# What runs programs that were built for another processor, such as QEMU with its options.
EMULATOR = shlex.split(os.environ.get("SAM3RT_CPP_EMULATOR", ""))
Step = dict[str, Any]
# For tests of what computes: as users build it, then with sanitizers.
EACH_BUILD = pytest.mark.parametrize("cpp_build", ["release", "address"], indirect=True)


@dataclass(frozen=True)
class Result:
    """What one step returned or threw.

    Attributes:
        value: the parsed JSON it returned.
        arrays: the arrays it returned, by name.
        error: class, message and subject of what it threw, or ``None``.
    """

    value: Any
    arrays: dict[str, NDArray[Any]]
    error: dict[str, str] | None

    def refusal(self, kind: str, subject: str | None = None) -> str:
        """Assert that the step threw ``kind``, about ``subject``; return the message."""
        assert self.error is not None, f"nothing was thrown; returned {self.value}"
        assert self.error["class"] == kind, self.error
        if subject is not None:
            assert self.error["subject"] == subject, self.error
        return self.error["message"]


class Build:
    """One build of the C++ runtime.

    Args:
        path: its build folder.
        folder: where arrays that are exchanged lie.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._folder = folder
        self._count = 0

    def program(
        self, name: str, *arguments: Any, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the build; a sanitizer's report makes its exit status non-zero."""
        return subprocess.run(
            [*EMULATOR, self.path / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=20_000 if EMULATOR else 300,
            env={
                **os.environ,
                "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
                "LSAN_OPTIONS": f"suppressions={SANITIZERS / 'lsan.supp'}:print_suppressions=0",
                # ONNX Runtime unlocks mutexes at exit whose locking the suppressions hide.
                "TSAN_OPTIONS": f"suppressions={SANITIZERS / 'tsan.supp'}:print_suppressions=0:"
                "report_mutex_bugs=0",
                **(env or {}),
            },
        )

    def run(self, steps: list[Step], env: dict[str, str] | None = None) -> list[Result]:
        """Run steps in one process. Arrays among their arguments travel as files."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        sent = 0

        def store(value: Any) -> Any:
            nonlocal sent
            if isinstance(value, np.ndarray):
                sent += 1
                path = folder / f"argument{sent}.npy"
                np.save(path, np.asarray(value, order="C"))
                return str(path)
            if isinstance(value, Path):
                return str(value)
            if isinstance(value, dict):
                return {name: store(entry) for name, entry in value.items()}
            if isinstance(value, list | tuple):
                return [store(entry) for entry in value]
            return value

        document = [
            {"out": str(folder / f"result{number}"), **store(step)}
            for number, step in enumerate(steps)
        ]
        (folder / "steps.json").write_text(json.dumps(document))
        done = self.program("tests/driver", folder / "steps.json", folder / "results.json", env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
        answers = json.loads((folder / "results.json").read_text())
        assert len(answers) == len(steps)
        return [
            Result(
                answer.get("ok"),
                {
                    path.name.removeprefix(f"result{number}.").removesuffix(".npy"): np.load(path)
                    for path in folder.glob(f"result{number}.*.npy")
                },
                answer.get("error"),
            )
            for number, answer in enumerate(answers)
        ]

    def one(self, **step: Any) -> Result:
        """Run a single step."""
        return self.run([step])[0]


def shown_symbols(library: Path) -> set[str]:
    """The names that a shared library shows, as `nm -DC --defined-only` writes them."""
    listing = subprocess.run(
        ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    # Constructors and destructors are there several times under one name.
    return {line.split(" ", 2)[2] for line in listing.splitlines()}


def with_wrapper(engine: Path) -> Path:
    """Give an engine the wrapper that `sam3rt build` writes beside it."""
    from sam3rt_build.ep_context import write_wrapper  # needs the package onnx

    write_wrapper(engine, "tensorrt", (), (), {}, "8.9")
    return engine


def prove_engines(bundle: Path, machine: dict[str, Any], passed: bool = True) -> list[Path]:
    """Remember a verdict on every pair of a bundle's engines; the files of the verdicts."""
    opened = open_bundle(bundle, check_files=False)
    target = EngineTarget(**{**machine, "gpu": Gpu(*machine["gpu"])})
    explanation = "all is well" if passed else "all masks are empty"
    verdict = StoredVerdict(passed, explanation, {})
    engines = find_engines(opened)
    saved = [
        save_verdict(opened, subject_of(EngineSet(encoder, decoder), target), verdict)
        for encoder in engines
        for decoder in engines
        if (encoder.sidecar.role, decoder.sidecar.role) == ("encoder", "decoder")
    ]
    return [path for path in saved if path is not None]


def as_prompts(arguments: dict[str, Any]) -> Step:
    """A Python call's prompt arguments as the driver takes them."""
    types = {"point_labels": np.int64, "point_counts": np.int64}
    known = ("point_coords", "point_labels", "point_counts", "box", "mask_input")
    return {
        name: np.asarray(value, types.get(name, np.float32))
        for name, value in arguments.items()
        if name in known and value is not None
    } | {name: value for name, value in arguments.items() if name == "normalize_coords"}
