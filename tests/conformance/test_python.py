"""The Python runtime against the vectors, on which every runtime must agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import conformance
from tests.support.conformance import Refusal
from tests.support.records import ChangedRunner
from tests.support.vectors import Document, as_image, as_prompts

import sam3rt
from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.accuracy.verdicts import StoredVerdict
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.engines import EngineTarget, candidates
from sam3rt.bundle import FileEntry, ImageSpec, PromptSpec, TensorSpec, parse_manifest
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.embedding import read_embedding
from sam3rt.geometry import geometry, to_rgb
from sam3rt.prompts import Prompts, pack


def outcome(action: Callable[[], Any]) -> Any:
    """What a function returns, or which error it raises."""
    try:
        return action()
    except sam3rt.Sam3rtError as error:
        subject = getattr(error, "argument", None) or getattr(error, "file", None) or ""
        public = next(kind for kind in type(error).__mro__ if kind.__module__ == "sam3rt.errors")
        return Refusal(public.__name__, subject)


def image_spec(rules: Document) -> ImageSpec:
    return ImageSpec(tuple(rules["input"]), rules["resize"], "float32", (0.0,) * 3, (1.0,) * 3)


def as_ragged(prompts: Document) -> Document:
    """Prompts with a list of each object's points in place of one array and their numbers."""
    counts = prompts.get("point_counts")
    if counts is None:
        return prompts
    ends = np.cumsum(counts)[:-1]
    split = {name: np.split(prompts[name], ends) for name in ("point_coords", "point_labels")}
    return {k: v for k, v in prompts.items() if k != "point_counts"} | split


class PythonRuntime:
    """The package ``sam3rt``."""

    name = "python"

    def __init__(self) -> None:
        self.warned: list[bool] = []

    def pack(self, cases: Sequence[Document]) -> list[dict[str, NDArray[Any]] | Refusal]:
        self.warned = []

        def packed(case: Document) -> dict[str, NDArray[Any]]:
            rules = case["rules"]
            spec = PromptSpec(
                rules["box_position"], rules["padding_point"], tuple(rules["mask_size"])
            )
            inside = geometry(image_spec(rules), tuple(case["size"]))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", sam3rt.PromptWarning)
                result = pack(Prompts(**as_ragged(case["prompts"])), spec, inside)
            self.warned.append(bool(caught))
            found: dict[str, NDArray[Any]] = {"points": result.points, "labels": result.labels}
            return found if result.masks is None else {**found, "masks": result.masks}

        return [outcome(lambda case=case: packed(case)) for case in cases]

    def input_sizes(self, cases: Sequence[Document]) -> list[list[int] | Refusal]:
        def input_size(case: Document) -> list[int]:
            # A view of one pixel: it takes no memory.
            image = to_rgb(np.broadcast_to(np.zeros(3, np.uint8), (*case["size"], 3)))
            return list(geometry(image_spec(case["rules"]), image.shape[:2]).input_size)

        return [outcome(lambda case=case: input_size(case)) for case in cases]

    def parse_manifests(self, texts: Sequence[bytes]) -> list[Any]:
        return [outcome(lambda text=text: parse_manifest(text)) for text in texts]

    def open_bundles(self, folders: Sequence[Path]) -> list[Any]:
        return [outcome(lambda path=path: sam3rt.open_bundle(path)) for path in folders]

    def prepare(self, folders: Sequence[Path]) -> list[Any]:
        def prepared(path: Path) -> None:
            options: Any = {"backend": "onnxruntime", "device": "cpu", "check_files": False}
            sam3rt.load_model(path, **options).backend.prepare()

        return [outcome(lambda path=path: prepared(path)) for path in folders]

    def check_onnx(self, contents: Sequence[bytes], beside: dict[str, int]) -> list[Any]:
        entries = [FileEntry(name, "0" * 64, size) for name, size in beside.items()]

        def check(content: bytes) -> None:
            check_tensor_locations(content, "m.onnx", entries)

        return [outcome(lambda content=content: check(content)) for content in contents]

    def choose_engines(self, bundles: Sequence[Path], machine: Document) -> list[Any]:
        target = EngineTarget(**{**machine, "gpu": Gpu(*machine["gpu"])})

        def chosen(path: Path) -> str:
            bundle = sam3rt.open_bundle(path, check_files=False)
            return candidates(bundle, target)[0].encoder.path.parent.name

        return [outcome(lambda path=path: chosen(path)) for path in bundles]

    def load_records(self, folders: Sequence[Path]) -> list[Any]:
        def read(path: Path) -> None:
            load_record(sam3rt.open_bundle(path, check_files=False))

        return [outcome(lambda path=path: read(path)) for path in folders]

    def judge(self, bundle: Path, changes: Sequence[Sequence[Document]]) -> list[Any]:
        opened = sam3rt.open_bundle(bundle)
        backend = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu").backend
        record = load_record(opened)
        found = []
        for changed in changes:
            runner = ChangedRunner(backend, opened, changed)
            verdict = judge(verify(runner, opened.manifest, record, GATE_LIMITS))
            wrong = sorted(f"{m.subject} {m.metric}" for m in verdict.failures)
            found.append((verdict.passed, StoredVerdict.of(verdict).encoder_failed, wrong))
        return found

    def read_embeddings(self, paths: Sequence[Path], vectors: Document) -> list[Any]:
        specs = [
            TensorSpec(name, "float32", ("batch", *shape))
            for name, shape in vectors["maps"].items()
        ]

        def read(path: Path) -> tuple[Any, ...]:
            maps, inside = read_embedding(path, vectors["fingerprint"], specs)
            return maps, inside.original_size, inside.input_size

        return [outcome(lambda path=path: read(path)) for path in paths]

    def call(self, bundle: Path, steps: Sequence[Document]) -> list[Any]:
        model = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")
        predictor = sam3rt.SAM3InteractiveImagePredictor(model)

        def step_result(step: Document) -> Any:
            nonlocal predictor
            options = {
                name: float(value) if isinstance(value, str) else value
                for name, value in step.items()
                if name not in ("call", "error", "masks", "image", "images", "prompts")
            }
            if step["call"] == "predictor":
                predictor = sam3rt.SAM3InteractiveImagePredictor(model, **options)
            elif step["call"] == "set_image":
                predictor.set_image(as_image(step["image"]))
            elif step["call"] == "set_image_batch":
                predictor.set_image_batch([as_image(size) for size in step["images"]])
            elif step["call"] == "reset":
                predictor.reset_predictor()
            elif step["call"] == "predict":
                prompts = as_prompts(step.get("prompts", {}))
                return list(predictor.predict(**prompts, **options)[0].shape)
            else:
                prompts = [as_prompts(entry) for entry in step["prompts"]]
                names = {name for entry in prompts for name in entry}
                lists = {f"{n}_batch": [entry.get(n) for entry in prompts] for n in names}
                found = predictor.predict_batch(**lists, **options)[0]
                return [list(masks.shape) for masks in found]
            return None

        return [outcome(lambda step=step: step_result(step)) for step in steps]


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_python_agrees(check: Callable[..., None], tmp_path: Path) -> None:
    check(PythonRuntime(), tmp_path)
