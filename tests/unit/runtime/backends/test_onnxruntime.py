"""Tests of `sam3rt.backends.onnxruntime` and of the choice of a backend."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise, tiny_bundle

from sam3rt import (
    BackendError,
    ImageEmbedding,
    InvalidInputError,
    Prompts,
    SegmentationModel,
    load_model,
    open_bundle,
)
from sam3rt.backends.kept import KEPT_IMAGES
from sam3rt.backends.onnxruntime import recipes
from sam3rt.backends.onnxruntime.backend import OnnxRuntimeBackend
from sam3rt.backends.onnxruntime.sessions import cuda_options, open_session
from sam3rt.backends.onnxruntime.typed import Graphs
from sam3rt.bundle.onnx_split import split_onnx
from sam3rt.prompts import PackedPrompts, pack

CLICK = Prompts(point_coords=[[30, 25]], point_labels=[1])
HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A bundle that opens but whose graphs are not loaded."""
    tiny_bundle(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sessions made during the test, in order."""
    made: list[Any] = []
    original = ort.InferenceSession

    def spy(*arguments: Any, **options: Any) -> Any:
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(ort, "InferenceSession", spy)
    return made


@pytest.fixture(scope="module")
def embedding(tiny_model: SegmentationModel) -> ImageEmbedding:
    """An image of 50 x 70 pixels, encoded."""
    return tiny_model.encode(noise(50, 70))


@pytest.fixture(scope="module")
def click(tiny_model: SegmentationModel, embedding: ImageEmbedding) -> PackedPrompts:
    """One click, packed."""
    return pack(CLICK, tiny_model.manifest.prompts, embedding.geometry)


def close(actual: NDArray[np.float32], expected: NDArray[np.float32], limit: float) -> None:
    """Assert that the largest difference is within a share of the largest value."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


# --- choosing a backend ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nonsense", "", "ONNXRuntime", "torch", None, 5])
def test_unknown_backend_is_refused(tiny: Path, name: Any) -> None:
    with pytest.raises(InvalidInputError, match="onnxruntime") as caught:
        load_model(tiny, backend=name)
    assert caught.value.argument == "backend"


def test_backend_describes_itself(tiny: Path) -> None:
    backend = load_model(tiny, backend="onnxruntime", device="cpu").backend
    assert backend.name == "onnxruntime"
    assert backend.device == "cpu"
    assert backend.versions() == {"onnxruntime": ort.__version__}


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that finds what this one finds; return what it prints."""
    prelude = f"import sys; sys.path[:] = {sys.path!r}; "
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_sam3rt_imports_no_backend_and_no_torch() -> None:
    heavy = {"torch", "onnxruntime", "openvino", "tensorrt", "onnx", "transformers", "cv2", "scipy"}
    assert run_python(f"import sam3rt; print({heavy} & set(sys.modules))").strip() == "set()"


def test_missing_onnxruntime_says_what_to_install(tiny: Path) -> None:
    said = run_python(
        "sys.modules.update(onnxruntime=None, openvino=None)\n"
        "import sam3rt\n"
        "for name in ('onnxruntime', 'auto'):\n"
        f"    try: sam3rt.load_model({str(tiny)!r}, backend=name)\n"
        "    except sam3rt.BackendError as error: print(str(error).replace('\\n', ' '))\n"
    )
    assert ["sam3rt[cpu]" in line for line in said.splitlines()] == [True, True]


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:1234", "cpu\n", "cpu:0", None, 0, b"cpu", ["cpu"]],
    ids=repr,
)
def test_nonsense_devices_are_refused(tiny: Path, device: Any) -> None:
    with pytest.raises(InvalidInputError, match="cuda:N") as caught:
        load_model(tiny, device=device)
    assert caught.value.argument == "device"


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_cuda_says_what_to_install(tiny: Path, backend: str, device: str) -> None:
    with pytest.raises(BackendError, match=r"sam3rt\[gpu\]") as caught:
        load_model(tiny, backend=backend, device=device)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_auto_without_cuda_is_the_cpu(tiny: Path) -> None:
    assert load_model(tiny).device == "cpu"


@pytest.mark.parametrize(
    ("listed", "answers", "python", "problem"),
    [
        (True, True, True, ""),
        (True, True, False, "pip install cuda-python"),
        (True, False, True, "CUDA is not usable"),
        (False, True, True, "CUDA is not usable"),
    ],
)
def test_cuda_must_be_listed_and_answer(
    monkeypatch: pytest.MonkeyPatch, listed: bool, answers: bool, python: bool, problem: str
) -> None:
    """onnxruntime-gpu lists CUDA even where there is no driver."""
    providers = ["CUDAExecutionProvider"] * listed + ["CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(recipes, "_cuda_answers", lambda: answers)
    monkeypatch.setattr(recipes, "_has_cuda_python", lambda: python)
    monkeypatch.setattr(recipes, "probe", lambda number: f"GPU {number}")
    assert recipes._choose_gpu("cpu") is None
    assert recipes._choose_gpu("auto") == (None if problem else "GPU 0")
    for device, number in (("cuda", 0), ("cuda:3", 3)):
        if problem:
            with pytest.raises(BackendError, match=problem):
                recipes._choose_gpu(device)
        else:
            assert recipes._choose_gpu(device) == f"GPU {number}"  # type: ignore[comparison-overlap]


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_session_that_falls_back_to_the_cpu_is_refused(tiny_sam3: Path) -> None:
    """Asked for CUDA, ONNX Runtime may return a session without it."""
    graphs = Graphs(open_bundle(tiny_sam3))
    graph = graphs.bundle.manifest.decoder
    with pytest.raises(BackendError, match=r"CUDA|cuda"):
        open_session(graphs, graph, cuda_options(0, graphs, graph))


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threads", [0, -1, True, False, 1.0, 2.5, "2", [1], float("nan")], ids=repr
)
def test_nonsense_threads_are_refused(tiny: Path, threads: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_model(tiny, device="cpu", threads=threads)
    assert caught.value.argument == "threads"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_reach_the_sessions(tiny_sam3: Path, sessions: list[Any], threads: int) -> None:
    load_model(tiny_sam3, device="cpu", threads=threads, check_files=False).backend.prepare()
    assert [s.get_session_options().intra_op_num_threads for s in sessions] == [threads] * 3


# --- sessions -------------------------------------------------------------------------------------


def test_graphs_are_loaded_when_they_are_needed(
    tiny_sam3: Path, embedding: ImageEmbedding, tmp_path: Path, sessions: list[Any]
) -> None:
    embedding.save(tmp_path / "a.emb")
    model = load_model(tiny_sam3, device="cpu", check_files=False)
    assert not sessions
    loaded = model.load_embedding(tmp_path / "a.emb")
    assert not sessions
    model.decode(loaded, CLICK)
    model.decode(loaded, CLICK)
    assert len(sessions) == 2  # the decoder alone, in its two parts
    model.encode(noise(5, 5))
    assert len(sessions) == 3


def test_prepare_loads_both_graphs_once(tiny_sam3: Path, sessions: list[Any]) -> None:
    model = load_model(tiny_sam3, device="cpu", check_files=False)
    model.backend.prepare()
    assert [s.get_inputs()[0].name for s in sessions] == [
        "pixel_values",
        "image_embeddings.0",
        "input_points",
    ]
    model.backend.prepare()
    model.warm_up()
    assert len(sessions) == 3


def test_first_use_from_eight_threads_loads_each_graph_once(
    tiny_sam3: Path, embedding: ImageEmbedding, sessions: list[Any]
) -> None:
    model = load_model(tiny_sam3, device="cpu", check_files=False)
    maps = list(embedding.numpy().values())
    mine = ImageEmbedding(
        model.backend.upload(maps), embedding.geometry, embedding.fingerprint, embedding.names
    )
    barrier = threading.Barrier(8)

    def work(index: int) -> Any:
        barrier.wait()
        if index % 4 == 0:
            model.backend.prepare()
        return model.decode(mine, CLICK).low_res_masks

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len(sessions) == 3
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_parts_of_the_decoder_give_what_the_whole_gives(
    tiny_model: SegmentationModel,
    embedding: ImageEmbedding,
    masks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = np.linspace(-9, 9, 256 * masks).reshape(masks, 1, 16, 16) if masks else None
    prompts = Prompts(box=[[1, 2, 6, 7], [0, 0, 3, 3]], mask_input=given)
    monkeypatch.setattr(OnnxRuntimeBackend, "create_parts", lambda self, graph: None)
    whole = load_model(tiny_model.bundle.path, backend="onnxruntime", device="cpu")
    maps = whole.backend.upload(list(embedding.numpy().values()))
    theirs = ImageEmbedding(maps, embedding.geometry, embedding.fingerprint, embedding.names)
    expected = whole.decode(theirs, prompts)
    for _ in range(2):
        found = tiny_model.decode(embedding, prompts)
        close(found.low_res_masks, expected.low_res_masks, 1e-5)
        close(found.iou_predictions, expected.iou_predictions, 1e-5)


def test_a_decoder_whose_parts_cannot_be_loaded_is_loaded_whole(
    tiny_model: SegmentationModel, embedding: ImageEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(content: bytes, inputs: Any) -> Any:
        parts = split_onnx(content, inputs)
        assert parts is not None
        return parts._replace(rest=parts.rest[:-1])

    monkeypatch.setattr("sam3rt.backends.onnxruntime.sessions.split_onnx", damaged)
    whole = load_model(tiny_model.bundle.path, backend="onnxruntime", device="cpu")
    maps = whole.backend.upload(list(embedding.numpy().values()))
    theirs = ImageEmbedding(maps, embedding.geometry, embedding.fingerprint, embedding.names)
    found, expected = whole.decode(theirs, CLICK), tiny_model.decode(embedding, CLICK)
    close(found.low_res_masks, expected.low_res_masks, 1e-5)


def test_what_an_image_decides_is_computed_once(
    tiny_sam3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_sam3, backend="onnxruntime", device="cpu")
    runs: list[str] = []
    run = OnnxRuntimeBackend._run

    def counting(self: Any, graph: str, session: Any, *arguments: Any) -> Any:
        runs.append(session.get_inputs()[0].name)
        return run(self, graph, session, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "_run", counting)
    embeddings = [model.encode(noise(50, 70, seed)) for seed in range(KEPT_IMAGES + 1)]
    mask = np.zeros((1, 16, 16))
    for embedding in embeddings:
        model.decode(embedding, CLICK)
        model.decode(embedding, CLICK)
    assert runs.count("image_embeddings.0") == KEPT_IMAGES + 1
    model.decode(embeddings[-1], Prompts([[5, 3]], [1], mask_input=mask))
    assert runs.count("image_embeddings.0") == KEPT_IMAGES + 2
    kept = model.backend._of_no_mask  # type: ignore[attr-defined]
    assert len(kept) == KEPT_IMAGES
    del embeddings, embedding
    gc.collect()
    assert len(kept) == 0


# --- inputs and outputs ---------------------------------------------------------------------------


def test_only_the_requested_outputs_come_back(
    tiny_model: SegmentationModel, embedding: ImageEmbedding, click: PackedPrompts
) -> None:
    backend, features = tiny_model.backend, embedding.features
    names = [spec.name for spec in tiny_model.manifest.decoder.outputs]
    everything = backend.decode(features, click, names)
    assert len(everything) == len(names) == 5
    for name, array in zip(names, everything, strict=True):
        (alone,) = backend.decode(features, click, [name])
        np.testing.assert_array_equal(alone, array)
    backwards = backend.decode(features, click, names[::-1])
    for array, expected in zip(backwards[::-1], everything, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_what_is_not_asked_for_is_not_copied(
    tiny_model: SegmentationModel, embedding: ImageEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    original = tiny_model.backend.decode

    def spy(features: Any, prompts: Any, outputs: Any) -> Any:
        asked.append(tuple(outputs))
        return original(features, prompts, outputs)

    monkeypatch.setattr(tiny_model.backend, "decode", spy)
    tiny_model.decode(embedding, CLICK, multimask_output=True)
    tiny_model.decode(embedding, CLICK, multimask_output=False)
    assert asked == [
        ("pred_masks", "iou_scores", "object_score_logits"),
        ("single_pred_masks", "single_iou_scores", "object_score_logits"),
    ]


def test_content_of_an_absent_mask_prompt_does_not_matter(
    tiny_model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    """An absent mask is not a mask of zeros."""
    without = tiny_model.decode(embedding, CLICK).low_res_masks
    zeros = Prompts(CLICK.point_coords, CLICK.point_labels, mask_input=np.zeros((1, 16, 16)))
    assert np.abs(tiny_model.decode(embedding, zeros).low_res_masks - without).max() > 1e-2
