"""The benchmark: its arithmetic on known input, and whole runs of a bundle of a few nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import onnx
import PIL.Image
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper
from tests.conftest import ROOT
from tests.support.helpers import tiny_bundle, wrapped
from tests.support.runnable_bundle import runnable_bundle

from sam3rt import BackendError, InvalidInputError, SegmentationModel, load_model, open_bundle
from sam3rt.bundle import Bundle, FileEntry, GraphSpec, TensorSpec
from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli import main
from sam3rt_bench import PARTS, ceilings, cli, plots, runner, timing
from sam3rt_bench.agreement import compare_masks, pick_reference
from sam3rt_bench.candidates import (
    Candidate,
    Choice,
    Settings,
    default_choices,
    load_candidate,
    parse_choice,
)
from sam3rt_bench.ceilings import best
from sam3rt_bench.compare import compare_results, lost_agreement, same_conditions
from sam3rt_bench.document import (
    AgreementRow,
    CallRow,
    Ceiling,
    Curve,
    Result,
    StageRow,
    Times,
    json_schema,
    read_result,
    write_result,
)
from sam3rt_bench.graph_cost import GraphCost, graph_cost
from sam3rt_bench.limits import stage_limits
from sam3rt_bench.markdown import summary
from sam3rt_bench.runner import Plan, run_benchmark
from sam3rt_bench.scene import draw_scene, requests
from sam3rt_bench.starts import measure_start
from sam3rt_bench.timing import Effort, alternate, summarize

PAUSE = timing._PAUSE


@pytest.fixture(scope="module", autouse=True)
def hurry() -> Iterator[None]:
    """Take what serves the precision of figures only, and that nobody looks at, out of whole runs.

    These are the pauses between calls, and collecting the garbage before each table, which takes
    long where other tests have left many objects.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_PAUSE", 0.0)
        yield
    gc.unfreeze()


# --- timing ---------------------------------------------------------------------------------------


def test_summary_of_known_durations() -> None:
    times = summarize([i / 1000 for i in range(1, 102)])
    assert times.count == 101
    assert times.median_ms == times.mean_ms == 51
    assert (times.p95_ms, times.p99_ms) == (96, 100)
    assert (times.min_ms, times.max_ms) == (1, 101)
    assert times.spread == pytest.approx(50 / 51, rel=1e-4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves when a test moves it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    return now


def test_calls_take_turns_and_each_follows_every_other(clock: list[float]) -> None:
    order = ""

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            nonlocal order
            order += name
            clock[0] += seconds

        return run

    calls = {"a": call("a", 0.001), "b": call("b", 0.002), "c": call("c", 0.003)}
    times = alternate(calls, Effort(repetitions=20, seconds=60, warm_up=2))
    assert order.startswith("abcabc")
    rounds = [order[at : at + 3] for at in range(6, len(order), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    followed = {names[at : at + 2] for names in rounds for at in (0, 1)}
    assert followed == {"ab", "ac", "ba", "bc", "ca", "cb"}
    assert [times[n].count for n in "abc"] == [20, 20, 20]
    assert [times[n].median_ms for n in "abc"] == [1, 2, 3]
    repeated = order
    order = ""
    alternate(calls, Effort(repetitions=20, seconds=60, warm_up=2))
    assert order == repeated


def test_calls_rest_between_one_another_outside_their_times(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "sleep", sleep)
    monkeypatch.setattr(timing, "_PAUSE", PAUSE)
    times = alternate(dict.fromkeys("ab", lambda: None), Effort(3, 60, 0))
    assert len(slept) == 6
    assert min(slept) > 0.01
    assert times["a"].max_ms == 0
    alternate({"a": lambda: None}, Effort(3, 60, 0))
    assert slept[6:] == [0.0] * 3


def test_slow_calls_are_repeated_three_times_whatever_the_time(clock: list[float]) -> None:
    counts = {"a": 0}

    def slow() -> None:
        counts["a"] += 1
        clock[0] += 30

    times = alternate({"a": slow}, Effort(repetitions=50, seconds=60, warm_up=5))
    assert counts["a"] == 1 + 3  # one to warm up: a round of a second or more is warm
    assert times["a"].count == 3
    times = alternate({"a": slow}, Effort(repetitions=50, seconds=100, warm_up=5))
    assert times["a"].count == 4


@pytest.mark.parametrize(
    ("seconds", "repetitions", "said"),
    [
        (1, 20, []),
        (2, 20, ["  about 38 s more"]),
        (30, 20, ["  about 60 s more"]),
        (90, 20, ["  about 3 min more"]),
        (90, 1, []),
    ],
)
def test_a_long_wait_is_announced_after_the_first_round(
    clock: list[float], seconds: float, repetitions: int, said: list[str]
) -> None:
    def slow() -> None:
        clock[0] += seconds

    heard: list[str] = []
    alternate({"a": slow}, Effort(repetitions, seconds=60, warm_up=1), heard.append)
    assert heard == said
    assert clock[0] >= seconds * (repetitions if repetitions == 1 else 3)


# --- counting -------------------------------------------------------------------------------------


def bundle_with(folder: Path, graph: onnx.GraphProto, specs: list[TensorSpec]) -> Bundle:
    tiny_bundle(folder)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, folder / "counted.onnx")
    entry = FileEntry("counted.onnx", "0" * 64, 0)
    outputs = (TensorSpec("y", "float32", ("n", 5)),)
    spec = GraphSpec(entry, (), 18, len(graph.node), tuple(specs), outputs)
    bundle = open_bundle(folder)
    return Bundle(folder, msgspec.structs.replace(bundle.manifest, decoder=spec))


def test_operations_and_bytes_of_a_known_graph(tmp_path: Path) -> None:
    """A product whose size goes through a computed shape, a Gemm and two convolutions."""
    weights = {
        "w": (4, 6),
        "g": (5, 6),
        "c": (8, 2, 3, 3),  # two groups
        "t": (8, 3, 2, 2),
    }
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Concat", ["rows", "four"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["product"]),
        helper.make_node("Gemm", ["product", "g"], ["y"], transB=1),
        helper.make_node("Conv", ["image", "c"], ["deep"], group=2, pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["deep", "t"], ["wide"], strides=[2, 2]),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, np.zeros(math.prod(shape)))
        for name, shape in weights.items()
    ]
    constants += [
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("four", TensorProto.INT64, [1], [4]),
    ]
    graph = helper.make_graph(
        nodes,
        "counted",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 2]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 10, 10]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5]),
            helper.make_tensor_value_info("wide", TensorProto.FLOAT, [1, 3, 20, 20]),
        ],
        constants,
    )
    specs = [
        TensorSpec("x", "float32", ("n", 2, 2)),
        TensorSpec("image", "float32", (1, 4, 10, 10)),
    ]
    bundle = bundle_with(tmp_path / "b", graph, specs)
    cost = graph_cost(bundle, bundle.manifest.decoder, {"n": 7})
    product, gemm = 2 * 7 * 4 * 6, 2 * 7 * 6 * 5
    conv, transposed = 2 * 100 * 8 * 2 * 9, 2 * 100 * 8 * 3 * 4
    assert cost.operations == product + gemm + conv + transposed
    assert cost.weight_bytes == 4 * sum(math.prod(s) for s in weights.values()) + 16
    assert cost.input_bytes == 4 * (7 * 4 + 400)
    assert cost.output_bytes == 4 * 7 * 5


def test_cost_of_the_real_graphs(small_bundle: Path) -> None:
    for path in (small_bundle, default_bundle_path()):
        bundle = open_bundle(path, check_files=False)
        manifest = bundle.manifest
        sizes = {"batch": 1, "num_objects": 1, "num_points": 2, "num_masks": 1, "num_images": 1}
        encoder = graph_cost(bundle, manifest.encoder, sizes)
        one = graph_cost(bundle, manifest.decoder, sizes)
        eight = graph_cost(bundle, manifest.decoder, sizes | {"num_objects": 8})
        two = graph_cost(bundle, manifest.encoder, sizes | {"batch": 2})
        assert two.operations == 2 * encoder.operations
        assert two.weight_bytes == encoder.weight_bytes
        assert one.operations < eight.operations <= 8 * one.operations
        stored = manifest.encoder.model.bytes + sum(e.bytes for e in manifest.encoder.external_data)
        assert 0.95 * stored < encoder.weight_bytes < stored
    # MobileSAM's encoder: 38 GMAC, as its authors count (arXiv 2306.14289 says about 40 GFLOPs).
    assert 70e9 < encoder.operations < 85e9


def test_limits_take_the_slower_of_compute_and_memory(default_model: SegmentationModel) -> None:
    candidate = Candidate(Choice("onnxruntime", "fp32"), default_model, None)
    times = summarize([0.5, 0.5, 0.5])
    stages = [
        StageRow(candidate.name, "encode", "host", times),
        StageRow("host", "preprocess", "host", times),
        StageRow("host", "pack prompts", "host", times),
    ]
    fast = Ceiling("matrix product", "fp32", "cpu", "b", 1e12)
    known = [
        Ceiling("matrix product", "fp32", "cpu", "a", 1e9),
        fast,
        Ceiling("matrix product", "bf16", "cpu", "c", 1e15),
        Ceiling("copy", "", "cpu", "a", 1e10),
    ]
    assert best(known, "matrix product", "fp32", "cpu") is fast
    assert best(known, "matrix product", "fp32", "cuda:0") is None
    rows = stage_limits(default_model.bundle, (100, 200), [candidate], stages, known)
    assert [row.stage for row in rows] == ["encode", "preprocess"]
    assert rows[0].limit_ms == pytest.approx(rows[0].operations / 1e9, rel=1e-3)
    assert rows[0].ratio == pytest.approx(500 / rows[0].limit_ms, rel=1e-3)
    assert rows[1].least_bytes == 3 * 100 * 200 + 4 * 3 * 1024 * 1024
    assert rows[1].limit_ms == pytest.approx(rows[1].least_bytes / 1e7, rel=1e-3)
    starved = [*known[:3], Ceiling("copy", "", "cpu", "a", 1e6)]
    (row, _) = stage_limits(default_model.bundle, (100, 200), [candidate], stages, starved)
    assert row.limit_ms == pytest.approx(row.least_bytes / 1e3, rel=1e-3)
    assert GraphCost(1, 2, 3, 4).least_bytes == 9


# --- candidates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "torch", ":fp32", "pytorch:fp8", "onnxruntime fp32"])
def test_unknown_candidates_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_choice(text)
    assert caught.value.argument == "candidate"


def test_candidates_as_written() -> None:
    assert parse_choice("openvino") == Choice("openvino", "auto")
    assert parse_choice("openvino:fp32").name == "openvino:fp32"
    assert parse_choice("pytorch") == Choice("pytorch", "fp32")
    assert Choice("pytorch", "bf16") in default_choices(with_pytorch=True)
    # Masks are compared with FP32's, which a GPU's fastest recipe is not.
    assert Choice("onnxruntime", "fp32") in default_choices(with_pytorch=False)
    assert not any(c.backend == "pytorch" for c in default_choices(with_pytorch=False))


def test_pytorch_needs_a_checkpoint(toy: Bundle) -> None:
    with pytest.raises(BackendError, match="--checkpoint"):
        load_candidate(toy, Choice("pytorch", "fp32"), Settings("cpu", None, None))


# --- agreement ------------------------------------------------------------------------------------


def test_wrong_masks_are_seen(toy: Bundle) -> None:
    model = load_model(toy.path, backend="onnxruntime", device="cpu")

    def invert(outputs: dict[str, np.ndarray]) -> None:
        for name in outputs:
            if name.startswith("pred_masks"):
                outputs[name] *= -1

    right = Candidate(Choice("onnxruntime", "fp32"), model, None)
    wrong = Candidate(Choice("onnxruntime", "other"), wrapped(model, on_decode=invert), None)
    image = draw_scene(120, 160)
    rows = compare_masks([right, wrong], right, image)
    assert (rows[0].mean_iou, rows[0].least_iou, rows[0].single_least_iou) == (1, 1, 1)
    assert rows[0].feature_cosine == pytest.approx(1)
    assert rows[1].mean_iou < 0.1
    assert rows[1].single_least_iou == 1
    # Five requests, of which the last has four objects.
    assert (rows[0].masks, rows[0].single_masks) == (3 * 8, 8)
    assert pick_reference([wrong, right]) is wrong  # both say fp32; nothing else tells them apart
    assert len(requests((120, 160))) == 5


# --- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graphs take no time."""
    return runnable_bundle(tmp_path_factory.mktemp("bench") / "toy")


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image."""
    path = tmp_path_factory.mktemp("bench") / "scene.png"
    PIL.Image.fromarray(draw_scene(96, 128)).save(path)
    return path


@pytest.fixture(scope="module")
def run_folder(
    toy: Bundle, scene_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A whole run; its folder, and what it said at the end."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    arguments = ["--candidate", "onnxruntime", "--candidate", "onnxruntime:fp32"]
    arguments += ["--candidate", "openvino:fp32"]
    arguments += ["--image", str(scene_file), "--repetitions", "1", "--seconds", "1", "--quick"]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        # Whatever else this machine does meanwhile, nothing is to be left out.
        patch.setattr(cli, "_QUICK_SECONDS", 1e6)
        patch.setattr(ceilings, "_SIDE", 128)
        patch.setattr(ceilings, "_COPY_BYTES", 1 << 20)
        assert main(["bench", str(toy.path), *arguments, "--output", str(folder)]) == 0
    return folder, said.getvalue()


@pytest.fixture(scope="module")
def result(run_folder: tuple[Path, str]) -> Result:
    """Its result."""
    return read_result(run_folder[0] / "bench.json")


def test_a_run_measures_every_part(result: Result) -> None:
    names = ["onnxruntime:fp32", "openvino:fp32"]
    assert [c.name for c in result.candidates] == names
    stages = {(row.candidate, row.stage) for row in result.stages}
    for stage in ("decode image", "preprocess", "pack prompts", "fill holes, one mask"):
        assert ("host", stage) in stages
    for name in names:
        for stage in ("encode", "decode", "upload features", "download features"):
            assert (name, stage) in stages
    calls = {row.call for row in result.calls}
    assert "set_image" in calls
    assert len(calls) == 6
    assert [row.mean_iou for row in result.agreement] == pytest.approx([1, 1])
    assert {row.reference for row in result.agreement} == {"onnxruntime:fp32"}
    curves = {curve.name for curve in result.curves if curve.candidate == names[1]}
    assert curves == {
        "objects per call",
        "points per object",
        "prompts per image",
        "image size",
        "images per batch",
        "concurrent callers",
        "embedding files",
        "threads",
    }
    assert [row.candidate for row in result.starts] == names
    for row in result.starts:
        assert row.load_ms > 0
        assert row.peak_host_mb is not None
        assert 30 < row.peak_host_mb < 5000
    assert {c.what for c in result.ceilings} == {"matrix product", "copy"}
    assert {(r.candidate, r.stage) for r in result.limits} >= {(n, "encode") for n in names}
    assert result.skipped == ()
    assert result.image == (96, 128)
    assert str(Path.home()) not in result.command


def test_a_run_writes_tables_and_pictures(run_folder: tuple[Path, str]) -> None:
    folder, said = run_folder
    text = (folder / "bench.md").read_text()
    assert "| set_image |" in text
    assert "| mean mask IoU against onnxruntime:fp32 | " in text
    assert "sam3rt bench toy --candidate onnxruntime" in text
    for name in ("calls", "curves", "limits"):
        with PIL.Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors() or range(99)) > 20
    names = {"bench.json", "bench.md", "calls.png", "curves.png", "limits.png"}
    assert {path.name for path in folder.iterdir()} == names
    tables, _, summary = said.partition("=== Summary ===")
    assert text in tables
    lines = summary.strip().splitlines()
    assert 4 <= len(lines) <= 9
    assert max(map(len, lines)) <= 120
    for name in ("onnxruntime:fp32", "openvino:fp32"):
        assert re.search(rf"\n{name}  +[\d.]+ ms  +[\d.]+ ms  .*  1\.0000\n", summary)
    assert f"written to {folder}: bench.md" in summary


def test_a_summary_without_anything_in_fp32(result: Result) -> None:
    said = summary(replace(result, agreement=()), 1.0)
    assert "mask IoU:" not in said
    assert re.search(r"\nopenvino:fp32  .* -\n", said)


def test_two_runs_do_not_share_a_folder(
    toy: Bundle,
    scene_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--candidate", "onnxruntime", "--only", "calls"]
    command = ["bench", str(toy.path), *arguments, "--image", str(scene_file)]
    command += ["--output", str(tmp_path)]

    def second(*_: Any, **__: Any) -> None:
        assert main(command) == 1
        raise BackendError("no candidate can be used here")

    monkeypatch.setattr("sam3rt_bench.runner.run_benchmark", second)
    assert main(command) == 1
    assert f"got {tmp_path}, which holds bench.json, expected another" in capsys.readouterr().err
    # A run without a result is in nobody's way.
    assert not list(tmp_path.iterdir())


def stop_in(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be stopped by Ctrl-C within one part."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sam3rt_bench.runner.{part}", stop)


def test_a_run_that_is_stopped_leaves_what_it_had(
    toy: Bundle,
    scene_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_in("time_stages", monkeypatch)
    arguments = ["--candidate", "onnxruntime", "--only", "calls,stages"]
    arguments += ["--image", str(scene_file), "--repetitions", "3", "--seconds", "1"]
    assert main(["bench", str(toy.path), *arguments, "--output", str(tmp_path)]) == 130
    assert f"what was measured is in {tmp_path}" in capsys.readouterr().err
    left = read_result(tmp_path / "bench.json")
    assert len(left.calls) == 6
    assert left.agreement
    assert left.stages == ()
    assert left.skipped == ("stages: the run was stopped before",)
    assert "| set_image |" in (tmp_path / "bench.md").read_text()


def plan_for(toy: Bundle, budget: float | None, *parts: str) -> Plan:
    return Plan(
        bundle=toy,
        choices=(Choice("onnxruntime", "fp32"), Choice("openvino", "fp32")),
        settings=Settings("cpu", 1, None),
        parts=parts or PARTS,
        image=draw_scene(48, 64),
        effort=Effort(repetitions=1, seconds=0.2, warm_up=0, fewest=1),
        budget=budget,
        command="",
        note="",
    )


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every candidate's encoder take so long."""
    original = SegmentationModel.encode

    def encode(self: SegmentationModel, image: Any) -> Any:
        time.sleep(seconds)
        return original(self, image)

    monkeypatch.setattr(SegmentationModel, "encode", encode)


def test_a_budget_is_kept_by_leaving_out_and_saying_so(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 2.0)
    begin = time.monotonic()
    result = run_benchmark(plan_for(toy, 9.0), lambda _: None, lambda _: None)
    # The last part may take a little longer than estimated.
    assert time.monotonic() - begin < 30
    assert result.quick
    # First calls are results too, where there is no time for better ones.
    assert {row.times.count for row in result.calls} == {1}
    assert {row.call for row in result.calls} == {"set_image", "predict: one click"}
    assert result.curves == result.limits == ()
    for part in ("calls", "limits", "curves"):
        assert any(line.startswith(f"{part}: takes about") for line in result.skipped), part


def test_candidates_that_would_take_the_time_of_all_are_not_loaded(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 3.0)
    result = run_benchmark(plan_for(toy, 5.0, "calls"), lambda _: None, lambda _: None)
    assert [c.name for c in result.candidates] == ["onnxruntime:fp32"]
    assert any(line.startswith("openvino:fp32: not loaded") for line in result.skipped)


def test_what_cannot_be_loaded_is_said_once_and_gets_no_process(toy: Bundle) -> None:
    choices = (Choice("onnxruntime", "fp32"), Choice("pytorch", "fp32"))
    plan = dataclasses.replace(plan_for(toy, 100.0, "calls", "starts"), choices=choices)
    said: list[str] = []
    result = run_benchmark(plan, said.append, lambda _: None)
    assert [line for line in said if line.startswith("fresh")] == [
        "fresh process: onnxruntime:fp32"
    ]
    assert [row.candidate for row in result.starts] == ["onnxruntime:fp32"]
    assert len([line for line in result.skipped if "pytorch" in line]) == 1


def test_ceilings_end_with_the_time(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer for them than was planned."""
    found: list[Ceiling] = []

    def ceilings_of_a_busy_machine(*_: Any) -> Iterator[Ceiling]:
        while True:
            found.append(Ceiling("matrix product", "fp32", "cpu", "numpy", 1e9))
            yield found[-1]

    monkeypatch.setattr(runner, "measure_ceilings", ceilings_of_a_busy_machine)
    left = lambda _: max(0.0, 99.0 - 50.0 * len(found))  # noqa: E731
    monkeypatch.setattr(runner._Benchmark, "_left", left)
    result = run_benchmark(plan_for(toy, 99.0, "limits"), lambda _: None, lambda _: None)
    assert result.ceilings == tuple(found[:2])
    assert len(found) == 2


def test_what_was_measured_is_handed_over_after_each_part(toy: Bundle) -> None:
    seen: list[Result] = []
    run_benchmark(plan_for(toy, None, "calls", "stages"), lambda _: None, seen.append)
    assert [(len(r.calls), len(r.stages) > 0, len(r.skipped)) for r in seen] == [
        (0, False, 2),
        (12, False, 1),
        (12, True, 0),
    ]


def test_a_slower_candidate_is_not_cut_off(result: Result) -> None:
    """The first candidate drawn must not decide how high an axis reaches."""
    curve = next(c for c in result.curves if c.name == "points per object")

    def slower(factor: float) -> Curve:
        points = tuple(
            replace(p, times=replace(p.times, median_ms=factor * p.times.median_ms))
            for p in curve.points
        )
        return replace(curve, candidate=f"{factor} times", points=points)

    figure = plots._draw_curves(replace(result, curves=(curve, slower(10), slower(100))))
    axis = figure.axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    lowest, highest = axis.get_ylim()
    assert lowest < min(p.times.median_ms for p in curve.points)
    assert highest > 100 * max(p.times.median_ms for p in curve.points)


def test_the_schema_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_a_result_fits_the_schema_and_changes_to_it_do_not(result: Result) -> None:
    document = json.loads(msgspec.json.encode(result))
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(document)
    for change in (
        {"format_version": "1"},
        {"image": [1, 2, 3]},
        {"more": 1},
        {"stages": [{}]},
        {"machine": None},
    ):
        assert not validator.is_valid(document | change), change
    del document["calls"]
    assert not validator.is_valid(document)


def test_every_committed_result_fits_the_schema() -> None:
    files = sorted((ROOT / "benchmarks" / "results").rglob("bench*.json"))
    assert len(files) >= 4
    for path in files:
        assert read_result(path).quick is False, path
        jsonschema.validate(json.loads(path.read_text()), json_schema())


def test_a_result_is_read_back(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path / "again.json", result)
    assert read_result(tmp_path / "again.json") == result


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": "sam3rt-bench", "format_version": 99}', b"\xff"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"x\.json"):
        read_result(path)
    assert main(["bench", "--compare", str(path), str(path)]) == 1


# --- comparing results ----------------------------------------------------------------------------


def with_median(result: Result, call: str, factor: float, spread: float = 0.0) -> Result:
    """The result with one call's median changed, and the spread of all calls set."""

    def changed(row: CallRow) -> CallRow:
        scale = factor if row.call == call else 1.0
        times: Times = replace(row.times, median_ms=row.times.median_ms * scale, spread=spread)
        return replace(row, times=times)

    return replace(result, calls=tuple(map(changed, result.calls)))


def test_regressions_are_found(result: Result, tmp_path: Path, capsys: Any) -> None:
    steady = with_median(result, "set_image", 1.0)
    slower = with_median(result, "set_image", 1.3)
    assert not any(c.is_slower or c.is_faster for c in compare_results(steady, steady, 0.1))
    found = [c.what for c in compare_results(steady, slower, 0.1) if c.is_slower]
    assert found == ["onnxruntime:fp32: set_image", "openvino:fp32: set_image"]
    assert sum(c.is_faster for c in compare_results(slower, steady, 0.1)) == 2
    assert not any(c.is_slower for c in compare_results(steady, slower, 0.35))
    # What varies by more than it changed says nothing.
    noisy = with_median(result, "set_image", 1.3, spread=0.4)
    assert not any(c.is_slower for c in compare_results(steady, noisy, 0.1))
    for name, value in (("a", steady), ("b", slower)):
        write_result(tmp_path / f"{name}.json", value)
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert main(["bench", "--compare", paths[0], paths[0]]) == 0
    assert main(["bench", "--compare", *paths]) == 1
    assert "2 slower" in capsys.readouterr().out
    assert main(["bench", "--compare", *paths[::-1]]) == 0
    assert "not in the second" not in capsys.readouterr().out
    write_result(tmp_path / "b.json", replace(steady, calls=steady.calls[1:]))
    assert main(["bench", "--compare", *paths]) == 0
    assert "onnxruntime:fp32: set_image: not in the second" in capsys.readouterr().out


def test_worse_masks_and_other_machines_are_found(
    result: Result, tmp_path: Path, capsys: Any
) -> None:
    def worse(row: AgreementRow) -> AgreementRow:
        return replace(row, mean_iou=row.mean_iou - 0.01)

    other = replace(
        result,
        agreement=tuple(map(worse, result.agreement)),
        machine=replace(result.machine, cores=999),
    )
    assert len(lost_agreement(result, other)) == 2
    assert lost_agreement(other, result) == []
    assert same_conditions(result, result) == []
    assert "cores" in same_conditions(result, other)[0]
    for name, value in (("a", result), ("b", other)):
        write_result(tmp_path / f"{name}.json", value)
    assert main(["bench", "--compare", *(str(tmp_path / f"{n}.json") for n in "ab")]) == 1
    assert "not the same cores" in capsys.readouterr().out


# --- the command line -----------------------------------------------------------------------------


def test_nonsense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "stages,everything"]) == 1
    assert "everything" in capsys.readouterr().err
    assert main(["bench", "--candidate", "tensorflow"]) == 1
    assert main(["bench", "--candidate", "openvino", "--candidate", "openvino"]) == 1
    assert main(["bench", str(tmp_path / "nothing")]) == 1
    capsys.readouterr()
    assert main(["bench", "--checkpoint", str(tmp_path / "nothing.pt")]) == 1
    assert "nothing.pt, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-0.1", "x"])
def test_a_tolerance_that_lets_everything_pass_is_none(
    tolerance: str, result: Result, tmp_path: Path
) -> None:
    write_result(tmp_path / "a.json", result)
    command = ["bench", "--compare", *[str(tmp_path / "a.json")] * 2, "--tolerance", tolerance]
    if tolerance == "-0.1":
        assert main(command) == 1
    else:
        with pytest.raises(SystemExit):
            main(command)


def test_earlier_results_are_replaced_only_if_asked(
    toy: Bundle, scene_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(toy.path), "--candidate", "onnxruntime", "--only", "stages"]
    command += ["--image", str(scene_file), "--repetitions", "1", "--output", str(tmp_path)]
    (tmp_path / "bench.json").write_text("hours of work")
    (tmp_path / "curves.png").write_text("of that run")
    (tmp_path / "mine.png").write_text("mine")
    assert main(command) == 1
    assert "holds bench.json" in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == "hours of work"
    assert main([*command, "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "mine.png"}


def test_a_start_of_a_model_that_was_replaced_meanwhile_does_not_count(toy: Bundle) -> None:
    manifest = replace(toy.manifest, fingerprint="0" * 64)
    with pytest.raises(BackendError, match="is another model now"):
        measure_start(
            Bundle(toy.path, manifest),
            Choice("onnxruntime", "fp32"),
            Settings("cpu", 1, None),
            (8, 8),
            timeout=120,
        )


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "tiny")
    with pytest.raises(BackendError, match=r"onnxruntime:fp32 failed .*encoder\.onnx"):
        measure_start(
            open_bundle(tmp_path / "tiny"),
            Choice("onnxruntime", "fp32"),
            Settings("cpu", 1, None),
            (8, 8),
            timeout=120,
        )


def test_what_cannot_be_used_is_named_and_left_out(
    toy: Bundle, scene_file: Path, tmp_path: Path
) -> None:
    arguments = ["--candidate", "onnxruntime", "--candidate", "pytorch", "--only", "stages"]
    arguments += ["--image", str(scene_file), "--repetitions", "1", "--seconds", "1"]
    assert main(["bench", str(toy.path), *arguments, "--output", str(tmp_path)]) == 0
    result = read_result(tmp_path / "bench.json")
    assert [c.name for c in result.candidates] == ["onnxruntime:fp32"]
    assert any("pytorch:fp32" in line and "--checkpoint" in line for line in result.skipped)
    assert result.calls == result.curves == result.starts == ()
