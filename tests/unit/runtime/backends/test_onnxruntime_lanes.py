"""Tests of `sam3rt.backends.onnxruntime.lanes` and `.typed`, on a fake GPU with real sessions."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.fake_onnxruntime import FakeProvider
from tests.support.helpers import noise, one_image_form

from sam3rt import BackendError, GpuOptions, Prompts, SegmentationModel, load_model, open_bundle
from sam3rt.accuracy.verdicts import Subject
from sam3rt.backends.onnxruntime import recipes
from sam3rt.backends.onnxruntime.backend import OnnxRuntimeBackend
from sam3rt.backends.onnxruntime.lanes import OnnxRuntimeLanes, SessionEngine
from sam3rt.backends.onnxruntime.recipes import offer
from sam3rt.backends.onnxruntime.typed import SIDECAR, find_typed, typed_folder
from sam3rt.backends.options import BackendOptions
from sam3rt.errors import VerificationError
from sam3rt.masks import MaskOptions
from sam3rt_build.ort_graphs import build_typed_graphs

CLICK = Prompts(point_coords=[[4.0, 4.0]], point_labels=[1])
BOXES = Prompts(box=[[1, 1, 9, 6], [2, 0, 5, 5], [0, 0, 11, 8], [3, 3, 8, 8], [1, 2, 3, 4]])


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeProvider:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = FakeProvider()
    found.install(monkeypatch)
    return found


@pytest.fixture
def built(tiny_copy: Path) -> Path:
    build_typed_graphs(open_bundle(tiny_copy), ["fp16", "fp16-activations"])
    return tiny_copy


def load(bundle: Path, **options: Any) -> SegmentationModel:
    return load_model(bundle, backend="onnxruntime", device="cuda", **options)


def lanes_of(model: SegmentationModel) -> OnnxRuntimeLanes:
    assert isinstance(model.backend, OnnxRuntimeLanes)
    return model.backend


# --- what runs ------------------------------------------------------------------------


def test_lanes_compute_what_sessions_on_the_cpu_do(
    provider: FakeProvider, tiny_copy: Path, tiny_model: SegmentationModel
) -> None:
    model = load(tiny_copy, precision="fp32")
    assert (model.backend.name, model.device) == ("onnxruntime", "cuda:0")
    assert set(model.backend.versions()) == {"onnxruntime", "driver"}
    for image in (noise(9, 12), noise(30, 20, 1)):
        here, there = model.encode(image), tiny_model.encode(image)
        for a, b in zip(here.features.numpy(), there.features.numpy(), strict=True):
            assert np.abs(a - b).max() < 1e-4
        for prompts in (CLICK, BOXES):
            a, masks = model.segment(here, prompts, max_hole_area=4)
            b, expected = tiny_model.segment(there, prompts, max_hole_area=4)
            assert np.abs(a.low_res_masks - b.low_res_masks).max() < 1e-3
            assert (masks != expected).mean() < 1e-3
    assert lanes_of(model).imaging.postprocess_allowed
    assert model.health().healthy


def test_a_batch_is_one_image_at_a_time(provider: FakeProvider, tiny_copy: Path) -> None:
    model = load(tiny_copy, precision="fp32")
    images = [noise(9, 12, seed) for seed in range(3)]
    together = model.encode_batch(images)
    for image, embedding in zip(images, together, strict=True):
        alone = model.encode(image).features.numpy()
        for a, b in zip(alone, embedding.features.numpy(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", ["each object its image", "one image"])
def test_several_images_are_answered_as_each_alone(
    provider: FakeProvider,
    tiny_copy: Path,
    tiny_model: SegmentationModel,
    tmp_path: Path,
    form: str,
) -> None:
    path = tiny_copy if form != "one image" else one_image_form(tmp_path / "old", tiny_copy).path
    model = load(path, precision="fp32")
    assert model.backend.joins_images == (form != "one image")
    images = [noise(9, 12, seed) for seed in range(3)]
    asked = [CLICK, BOXES, CLICK]
    options = MaskOptions(max_hole_area=4)
    found = model.segment_batch(model.encode_batch(images), asked, True, options)
    for image, prompts, (decoded, masks) in zip(images, asked, found, strict=True):
        a, expected = tiny_model.segment(tiny_model.encode(image), prompts, max_hole_area=4)
        assert np.abs(decoded.low_res_masks - a.low_res_masks).max() < 1e-3
        assert (masks != expected).mean() < 1e-3


def test_typed_graphs_take_several_images(provider: FakeProvider, built: Path) -> None:
    model = load(built, precision="fp16")
    assert model.backend.joins_images
    embeddings = model.encode_batch([noise(9, 12, seed) for seed in range(2)])
    found = model.segment_batch(embeddings, [CLICK, CLICK])
    for embedding, (decoded, _) in zip(embeddings, found, strict=True):
        alone = model.decode(embedding, CLICK).low_res_masks
        np.testing.assert_allclose(decoded.low_res_masks, alone, rtol=0, atol=0.02)


def test_an_interrupted_call_waits_for_its_run(
    provider: FakeProvider, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on in a thread of its own, and writes to the lane's buffers until its end."""
    model = load(tiny_copy, precision="fp32", gpu=GpuOptions(lanes=1))
    embedding = model.encode(noise(9, 12))
    ended = threading.Event()
    run = SessionEngine._run

    def slowly(*given: Any) -> None:
        time.sleep(0.2)
        run(*given)
        ended.set()

    def interrupted(future: Future[None], timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    found: list[BaseException] = []

    def call() -> None:
        try:
            model.decode(embedding, CLICK)
        except KeyboardInterrupt as error:
            found.append(error)
            assert ended.is_set()

    with monkeypatch.context() as broken:
        broken.setattr(SessionEngine, "_run", slowly)
        broken.setattr(Future, "result", interrupted)
        # This thread loaded the model, and runs its sessions itself.
        other = threading.Thread(target=call)
        other.start()
        other.join()
    assert [type(error) for error in found] == [KeyboardInterrupt]
    assert ended.is_set()
    model.decode(embedding, CLICK)


def test_a_session_is_run_by_its_loader_and_one_thread_for_all_others(
    provider: FakeProvider,
    tiny_copy: Path,
    tiny_model: SegmentationModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fake provider refuses a third thread; the loader's calls wait for no other thread."""
    model = load(tiny_copy, precision="fp32", gpu=GpuOptions(lanes=1))
    image = noise(9, 12)
    expected = tiny_model.decode(tiny_model.encode(image), CLICK).low_res_masks

    def call() -> None:
        found = model.decode(model.encode(image), CLICK).low_res_masks
        assert np.abs(found - expected).max() < 1e-3

    # Buffers reach their size here, so that no address changes afterwards.
    model.encode(image)
    model.warm_up()
    provider.recordings.clear()
    for _ in range(3):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call).result()
    assert not provider.recordings, "the warm-up is for both"
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", lambda *given: pytest.fail("another thread"))
        call()


def test_embeddings_are_offered_where_they_lie(provider: FakeProvider, built: Path) -> None:
    embedding = load(built, precision="fp16").encode(noise(9, 12))
    arrays = embedding.features.arrays()
    assert {array.dtype.name for array in arrays} == {"float16"}
    for array, copy in zip(arrays, embedding.features.numpy(), strict=True):
        np.testing.assert_array_equal(np.from_dlpack(array).astype(np.float32), copy)


def test_eight_threads_get_their_own_answers(
    provider: FakeProvider, tiny_copy: Path, tiny_model: SegmentationModel
) -> None:
    model = load(tiny_copy, precision="fp32", gpu=GpuOptions(lanes=3))
    images = [noise(9, 12, seed) for seed in range(8)]

    def work(index: int) -> float:
        decoded = model.decode(model.encode(images[index]), CLICK)
        expected = tiny_model.decode(tiny_model.encode(images[index]), CLICK)
        return float(np.abs(decoded.low_res_masks - expected.low_res_masks).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, list(range(8)) * 2)) < 1e-3


def test_closing_gives_everything_back(provider: FakeProvider, tiny_copy: Path) -> None:
    model = load(tiny_copy, precision="fp32")
    embedding = model.encode(noise(9, 12))
    model.close()
    del model
    assert provider.cuda.live["streams"] == 0
    assert provider.cuda.live["graphs"] == 0
    del embedding


# --- CUDA graphs ----------------------------------------------------------------------


def test_each_set_of_sizes_and_addresses_has_a_graph_of_its_own(
    provider: FakeProvider, tiny_copy: Path
) -> None:
    model = load(tiny_copy, precision="fp32")
    assert [options["enable_cuda_graph"] for options in provider.asked] == [1, 1]
    embedding = model.encode(noise(9, 12))
    assert provider.runs == ["1"]
    # Buffers reach their size here, so that no address changes afterwards.
    model.backend.prepare()
    provider.runs.clear()
    for prompts in (CLICK, BOXES, CLICK):
        model.decode(embedding, prompts)
    click, boxes, again = provider.runs
    assert click == again != boxes
    assert "-1" not in provider.runs
    # The lane's own recording is refused: there is one graph already.
    assert provider.cuda.live["graphs"] == 0


def test_where_graphs_are_refused_it_runs_without(
    provider: FakeProvider, tiny_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider.records = False
    with caplog.at_level(logging.INFO):
        model = load(tiny_copy, precision="fp32")
    assert "without a CUDA graph" in caplog.text
    model.decode(model.encode(noise(9, 12)), CLICK)
    assert set(provider.runs) == {"-1"}


def test_a_recording_that_fails_is_not_tried_again(provider: FakeProvider, tiny_copy: Path) -> None:
    model = load(tiny_copy, precision="fp32")
    provider.breaks["1"] = RuntimeError("operation not permitted when stream is capturing")
    model.encode(noise(9, 12))
    model.encode(noise(9, 12))
    assert provider.runs == ["1", "-1", "-1"]


def test_a_failure_is_an_error_of_the_backend(provider: FakeProvider, tiny_copy: Path) -> None:
    provider.records = False
    model = load(tiny_copy, precision="fp32")
    provider.breaks["-1"] = RuntimeError("CUDA failure 2: out of memory")
    with pytest.raises(BackendError, match="out of memory"):
        model.encode(noise(9, 12))
    model.encode(noise(9, 12))


def test_graphs_that_no_context_needs_any_more_do_not_pile_up(
    provider: FakeProvider, tiny_copy: Path
) -> None:
    """ONNX Runtime keeps each to the session's end."""
    model = load(tiny_copy, precision="fp32")
    with model.backend._pool.lane() as lane:
        decoder = lane._network.decoder
    numbers = [decoder.context()._number for _ in range(1000)]
    assert len(set(numbers)) == 129
    assert numbers[-1] == -1


# --- recipes --------------------------------------------------------------------------


def test_what_is_offered_follows_what_was_built(provider: FakeProvider, built: Path) -> None:
    offered = offer(open_bundle(built), BackendOptions(device="cuda")).recipes
    assert [recipe.name for recipe in offered] == ["fp16-activations", "fp16", "tf32", "fp32"]
    subjects = [recipe.subject for recipe in offered]
    assert subjects[-1] is None
    files = [subject.files for subject in subjects if isinstance(subject, Subject)]
    assert len(set(files)) == 3
    assert files[-1] == ""


@pytest.mark.parametrize("change", [{"tf32": True}, {"narrow": ["encoder.onnx", "decoder.onnx"]}])
def test_a_verdict_is_also_about_where_tf32_is_allowed(
    provider: FakeProvider, built: Path, change: dict[str, Any]
) -> None:
    """The same files compute otherwise where their sidecar says so."""
    bundle = open_bundle(built)
    options = BackendOptions(device="cuda", precision="fp16")
    (before,) = offer(bundle, options).recipes
    path = typed_folder(built, "fp16") / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (after,) = offer(bundle, options).recipes
    assert before.subject != after.subject


def test_bf16_is_offered_by_name_only(provider: FakeProvider, tiny_copy: Path) -> None:
    opened = open_bundle(tiny_copy)
    build_typed_graphs(opened, ["bf16"])
    found = offer(opened, BackendOptions(device="cuda")).recipes
    assert [recipe.name for recipe in found] == ["tf32", "fp32"]
    found = offer(opened, BackendOptions(device="cuda", precision="bf16")).recipes
    assert [recipe.name for recipe in found] == ["bf16"]


def test_the_fastest_that_passes_serves(provider: FakeProvider, built: Path) -> None:
    model = load(built)
    assert model.backend.precision == "fp16-activations"
    encoder, decoder = provider.asked[:2]
    # The encoder leaves no product in FP32, and its convolutions need the tensor cores.
    assert (encoder["use_tf32"], decoder["use_tf32"]) == (1, 0)
    assert encoder["enable_skip_layer_norm_strict_mode"] == 1
    provider.asked.clear()
    assert load(built).backend.precision == "fp16-activations"


def test_graphs_that_compute_something_else_are_refused(
    provider: FakeProvider, built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The gate, not the name, decides: here a decoder of another type between the two."""
    folder = typed_folder(built, "fp16-activations")
    document = json.loads((folder / SIDECAR).read_text())
    (folder / "encoder.onnx").write_bytes((folder / "encoder.onnx").read_bytes()[:-1])
    (folder / SIDECAR).write_text(json.dumps(document))
    with caplog.at_level(logging.INFO):
        assert load(built).backend.precision == "fp16"
    assert "not fp16-activations" in caplog.text


def test_a_recipe_that_fails_the_gate_does_not_serve(
    provider: FakeProvider, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntimeLanes.decode

    def wrong(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        return [-array for array in found] if self.precision.startswith("fp16") else found

    monkeypatch.setattr(OnnxRuntimeLanes, "decode", wrong)
    with pytest.raises(VerificationError, match="fp16 fails the gate"):
        load(built, precision="fp16")
    assert load(built).backend.precision == "tf32"


SOURCE = """
int %(name)sGetProperty(int which, int *value) { *value = 7 + which; return which > %(last)d; }
"""


def test_an_update_of_cublas_or_cudnn_asks_for_another_proof(
    provider: FakeProvider, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is asked through its C API, if it is loaded. One that does not say is left out."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    for name, last in (("cublas", 2), ("cudnn", 1)):
        source, library = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        source.write_text(SOURCE % {"name": name, "last": last})
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)

    def load(file: str, mode: int) -> Any:
        if not file.startswith(("libcublas.so.13", "libcudnn.so.9")):
            raise OSError(file)
        assert mode & os.RTLD_NOLOAD
        return ctypes.CDLL(str(tmp_path / file[3:].replace(".13", "").replace(".9", "")))

    assert recipes.math_libraries(load) == ["cublas 7.8.9"]
    assert recipes.math_libraries() == [] or Path("/dev/nvidiactl").exists()
    subjects = []
    for versions in ([], ["cudnn 9.1.0"], ["cudnn 9.2.0"]):
        monkeypatch.setattr(recipes, "math_libraries", lambda versions=versions: versions)
        offered = offer(open_bundle(tiny_copy), BackendOptions(device="cuda", precision="tf32"))
        subjects.append(offered.recipes[0].subject)
    assert len(set(subjects)) == 3


def test_what_was_not_built_says_how_to(provider: FakeProvider, tiny_copy: Path) -> None:
    with pytest.raises(
        BackendError, match=r"sam3rt build .* --backend onnxruntime --precision bf16"
    ):
        load(tiny_copy, precision="bf16")
    with pytest.raises(BackendError, match="offers tf32, fp32 on cuda") as caught:
        load(tiny_copy, precision="nonsense")
    assert "build" not in str(caught.value)


def test_cuda_computes_in_tf32_only_where_the_gate_has_let_it(
    provider: FakeProvider, tiny_copy: Path
) -> None:
    """The provider's own default is TF32, which would be called FP32 here."""
    offered = offer(open_bundle(tiny_copy), BackendOptions(device="cuda")).recipes
    assert [(r.name, r.subject is not None) for r in offered] == [("tf32", True), ("fp32", False)]
    for precision, allowed in (("tf32", 1), ("fp32", 0)):
        provider.asked.clear()
        load(tiny_copy, precision=precision)
        assert [options["use_tf32"] for options in provider.asked] == [allowed] * 2


def test_typed_features_come_back_in_fp32(built: Path, tiny_model: SegmentationModel) -> None:
    """The plain backend over typed graphs; on the CPU, which computes them in FP32."""
    graphs = next(found for found in find_typed(open_bundle(built)) if found.precision == "fp16")
    bundle = open_bundle(built)
    model = SegmentationModel(bundle, OnnxRuntimeBackend(bundle, graphs))
    embedding = model.encode(noise(9, 12))
    maps = embedding.features.numpy()
    assert {array.dtype.name for array in maps} == {"float32"}
    expected = tiny_model.encode(noise(9, 12)).features.numpy()
    assert max(np.abs(a - b).max() for a, b in zip(maps, expected, strict=True)) < 0.05
    again = model.backend.upload(maps)
    assert again.nbytes == embedding.features.nbytes
    model.decode(embedding, CLICK)


def test_typed_graphs_are_hashed_even_if_weights_may_be_mapped(built: Path) -> None:
    """Nothing else hashes them, and a verdict on them is about their hashes."""
    bundle = open_bundle(built)
    graphs = next(found for found in find_typed(bundle) if found.precision == "fp16")
    OnnxRuntimeBackend(bundle, graphs, map_weights=True).prepare()


# --- what lies beside the engines -----------------------------------------------------


def test_damaged_sidecars_are_left_out(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = open_bundle(built)
    path = typed_folder(built, "fp16") / SIDECAR
    good = json.loads(path.read_text())
    for change in (
        {"format_version": 2},
        {"bundle_fingerprint": "0" * 64},
        {"recipe": "bf16"},
        {"encoder": []},
        {"features_dtype": "float64"},
        {"unknown": 1},
    ):
        path.write_text(json.dumps(good | change))
        caplog.clear()
        assert [graphs.precision for graphs in find_typed(bundle)] == ["fp16-activations"], change
        assert "left out" in caplog.text
    path.write_text("{")
    assert len(find_typed(bundle)) == 1
    path.unlink()
    assert len(find_typed(bundle)) == 1


def test_a_link_out_of_the_bundle_is_left_out(built: Path, tmp_path: Path) -> None:
    folder = typed_folder(built, "fp16")
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert [graphs.precision for graphs in find_typed(open_bundle(built))] == ["fp16-activations"]
