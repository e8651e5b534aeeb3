"""The C++ runtime against the vectors, on which every runtime must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import conformance
from tests.support.conformance import Refusal
from tests.support.cpp_driver import Build, Result, Step, prove_engines, with_wrapper
from tests.support.vectors import Document, as_image, as_prompts


def outcome(result: Result, value: Any = None) -> Any:
    """What a step returned, or which error it threw."""
    if result.error is not None:
        return Refusal(result.error["class"], result.error["subject"])
    return value


class CppRuntime:
    """One build of ``runtime/cpp``.

    Args:
        build: the build.
        folder: where files that are exchanged lie.
    """

    name = "cpp"

    def __init__(self, build: Build, folder: Path) -> None:
        self._build = build
        self._folder = folder
        self._files = 0
        self.warned: list[bool] = []

    def _stored(self, content: bytes) -> Path:
        self._files += 1
        path = self._folder / f"content{self._files}"
        path.write_bytes(content)
        return path

    def pack(self, cases: Sequence[Document]) -> list[dict[str, NDArray[Any]] | Refusal]:
        sizes = self.input_sizes(cases)
        steps = []
        for case, input_size in zip(cases, sizes, strict=True):
            rules = {name: case["rules"][name] for name in ("box_position", "padding_point")}
            steps.append(
                {
                    "op": "pack",
                    **rules,
                    "mask_size": case["rules"]["mask_size"],
                    "original_size": case["size"],
                    "input_size": input_size,
                    "prompts": case["prompts"],
                }
            )
        results = self._build.run(steps)
        self.warned = [bool(result.value) for result in results if result.error is None]
        return [outcome(result, result.arrays) for result in results]

    def input_sizes(self, cases: Sequence[Document]) -> list[list[int] | Refusal]:
        steps: list[Step] = [
            {
                "op": "image_geometry",
                "size": case["size"],
                "resize": case["rules"]["resize"],
                "input": case["rules"]["input"],
            }
            for case in cases
        ]
        return [outcome(result, result.value) for result in self._build.run(steps)]

    def parse_manifests(self, texts: Sequence[bytes]) -> list[Any]:
        steps = [{"op": "parse_manifest", "path": self._stored(text)} for text in texts]
        return [outcome(result) for result in self._build.run(steps)]

    def open_bundles(self, folders: Sequence[Path]) -> list[Any]:
        steps = [{"op": "open_bundle", "path": path} for path in folders]
        return [outcome(result) for result in self._build.run(steps)]

    def prepare(self, folders: Sequence[Path]) -> list[Any]:
        steps: list[Step] = []
        for path in folders:
            steps += [
                {"op": "load_model", "model": "m", "path": path, "check_files": False},
                {"op": "prepare", "model": "m"},
            ]
        results = self._build.run(steps)
        assert not [result.error for result in results[::2] if result.error]
        return [outcome(result) for result in results[1::2]]

    def check_onnx(self, contents: Sequence[bytes], beside: dict[str, int]) -> list[Any]:
        steps = [
            {"op": "onnx_locations", "path": self._stored(content), "beside": [*beside.items()]}
            for content in contents
        ]
        return [outcome(result) for result in self._build.run(steps)]

    def choose_engines(self, bundles: Sequence[Path], machine: Document) -> list[Any]:
        step = {
            "op": "choose_engines",
            "backend": machine["backend"],
            "gpu": machine["gpu"][0],
            "compute_capability": machine["gpu"][1],
            "driver_version": machine["driver_version"],
            # TensorRT refuses engines of another version than its own, which only it knows.
            "otherwise": "fails",
        }
        # What fits is the question here, so all that Python would try is proven.
        cache = {"XDG_CACHE_HOME": str(self._folder / "cache")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", cache["XDG_CACHE_HOME"])
            for path in bundles:
                for engine in path.glob("engines/*/*.engine"):
                    with_wrapper(engine)
                prove_engines(path, machine)
        results = self._build.run([{**step, "path": path} for path in bundles], env=cache)
        return [outcome(r, r.value and Path(r.value["encoder"]).parent.name) for r in results]

    def load_records(self, folders: Sequence[Path]) -> list[Any]:
        results = self._build.run([{"op": "load_record", "path": path} for path in folders])
        return [outcome(result) for result in results]

    def judge(self, bundle: Path, changes: Sequence[Sequence[Document]]) -> list[Any]:
        steps = [{"op": "judge", "path": bundle, "changes": changed} for changed in changes]
        found = []
        for result in self._build.run(steps):
            verdict, report = result.value["verdict"], result.value["report"]
            wrong = sorted(" ".join(m[:3]) for m in report["measurements"] if not m[-1])
            found.append((verdict["passed"], verdict["encoder_failed"], wrong))
        return found

    def read_embeddings(self, paths: Sequence[Path], vectors: Document) -> list[Any]:
        specs = [*vectors["maps"].items()]
        step = {"op": "read_embedding", "fingerprint": vectors["fingerprint"], "specs": specs}
        results = self._build.run([{**step, "path": path} for path in paths])
        return [
            outcome(r, r.value and ([r.arrays[str(i)] for i in range(len(specs))], *r.value))
            for r in results
        ]

    def call(self, bundle: Path, steps: Sequence[Document]) -> list[Any]:
        given: list[Step] = [
            {"op": "load_model", "model": "m", "path": bundle},
            {"op": "predictor", "model": "m", "predictor": "p"},
        ]
        for step in steps:
            options = {k: v for k, v in step.items() if k not in ("call", "error", "masks")}
            if "image" in options:
                options["image"] = as_image(options["image"])
            if "images" in options:
                options["images"] = [as_image(size) for size in options["images"]]
            prompts = options.get("prompts", {})
            if isinstance(prompts, list):
                options["prompts"] = [as_prompts(entry) for entry in prompts]
            else:
                options["prompts"] = as_prompts(prompts)
            given.append({"op": step["call"], "model": "m", "predictor": "p", **options})
        found = []
        for step, result in zip(steps, self._build.run(given)[2:], strict=True):
            value: Any = None
            if step["call"] == "predict_batch":
                count = len(step["prompts"])
                value = [
                    list(result.arrays.get(f"{i}.masks", np.empty(0)).shape) for i in range(count)
                ]
            elif step["call"] == "predict" and result.error is None:
                value = list(result.arrays["masks"].shape)
            found.append(outcome(result, value))
        return found


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_cpp_agrees(cpp_build: Build, check: Callable[..., None], tmp_path: Path) -> None:
    check(CppRuntime(cpp_build, tmp_path), tmp_path)
