"""Options of a model that go to ONNX Runtime: its providers, threads and memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.c_library import Library, ModelOptions, Option, Sam3rtError
from tests.support.cpp_driver import Build, Result, Step, as_prompts
from tests.support.helpers import noise
from tests.support.runnable_bundle import runnable_bundle

from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path

CLICK: Step = as_prompts({"point_coords": [[4, 4]], "point_labels": [1]})
MANY: Step = as_prompts({"box": [[1, 1, 6, 7]] * 20})
PREPARE: Step = {"op": "prepare", "model": "m"}
ENCODE: Step = {"op": "encode", "model": "m", "embedding": "e", "image": noise(9, 9)}
DECODE: Step = {"op": "decode", "model": "m", "embedding": "e"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable_bundle(tmp_path_factory.mktemp("toy") / "bundle").path


def used(build: Build, bundle: Path, options: dict[str, Any], *more: Step) -> list[Result]:
    """What a model with options answers to one click and to many boxes, then further steps."""
    load = {"op": "load_model", "model": "m", "path": bundle, **options}
    return build.run(
        [load, ENCODE, {**DECODE, "prompts": CLICK}, {**DECODE, "prompts": MANY}, *more]
    )


def same(found: list[Result], expected: list[Result]) -> None:
    for ours, theirs in zip(found[2:4], expected[2:4], strict=True):
        assert ours.error is None, ours.error
        for name in ("low_res", "iou"):
            np.testing.assert_array_equal(ours.arrays[name], theirs.arrays[name])


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        ({"provider_options": {"gpu_mem_limit": "1"}}, "provider_options"),
        ({"provider_options": {"gpu_mem_limit": "1"}, "device": "auto"}, "provider_options"),
        ({"provider_options": {"device_id": "1"}, "device": "cuda"}, "provider_options"),
        ({"provider_options": {"use_tf32": "1"}, "device": "cuda:1"}, "provider_options"),
        ({"thread_affinities": "1"}, "thread_affinities"),
        ({"thread_affinities": "1;2", "threads": 2}, "thread_affinities"),
        ({"thread_affinities": "1", "threads": 3}, "thread_affinities"),
        ({"spin_between_runs": True}, "spin_between_runs"),
        ({"threads": -1}, "threads"),
    ],
)
def test_options_that_make_no_sense(
    cpp_build: Build, bundle: Path, options: dict[str, Any], subject: str
) -> None:
    step = {"op": "load_model", "model": "m", "path": bundle, **options}
    cpp_build.one(**step).refusal("InvalidInputError", subject)


def test_threads_run_where_they_are_told_to(cpp_build: Build, bundle: Path) -> None:
    processor = max(os.sched_getaffinity(0))
    places: Step = {"op": "affinities"}
    # ONNX Runtime counts processors from 1.
    told = {"threads": 2, "thread_affinities": str(processor + 1)}
    plain = used(cpp_build, bundle, {"threads": 2}, places)
    found = used(cpp_build, bundle, told, places)
    same(found, plain)
    assert plain[4].value.count(str(processor)) == 0
    assert str(processor) in found[4].value
    load = {"op": "load_model", "model": "m", "path": bundle, "threads": 2}
    wrong = cpp_build.run([{**load, "thread_affinities": "first"}, PREPARE])
    assert "only digits" in wrong[1].refusal("BackendError")


def test_threads_may_look_out_for_work_between_runs(
    cpp_builds: Path, bundle: Path, tmp_path: Path
) -> None:
    build = Build(cpp_builds / "release", tmp_path)
    rest = {"op": "rest_after_decode", "model": "m", "embedding": "e", "prompts": CLICK}
    quiet, busy = (
        used(build, bundle, {"threads": 2, "spin_between_runs": spin}, rest)[4]
        for spin in (False, True)
    )
    assert quiet.value < 0.5 * busy.value, (quiet.value, busy.value)


def test_memory_is_given_back_without_an_arena(
    cpp_builds: Path, bundle: Path, tmp_path: Path
) -> None:
    """Where malloc gives it back; and chunks of many objects do not ask for an arena to shrink."""
    build = Build(cpp_builds / "release", tmp_path)
    click = {**DECODE, "prompts": CLICK}
    load: Step = {"op": "load_model", "model": "m", "path": default_bundle_path(), "threads": 1}
    found = {}
    for arena in (True, False):
        steps = [{**load, "memory_arena": arena, "check_files": False}, ENCODE, click, click]
        results = build.run([*steps, {"op": "memory"}], env={"MALLOC_MMAP_THRESHOLD_": "65536"})
        found[arena] = results[4].value["now"]
    assert found[False] < found[True] - 5 * 2**20, found
    plain, without = (used(build, bundle, {"memory_arena": arena}) for arena in (True, False))
    same(without, plain)


def test_memory_of_the_hosts_allocator(cpp_build: Build, bundle: Path) -> None:
    host: Step = {"op": "set_environment"}
    count: Step = {"op": "host_allocations"}
    load = {"op": "load_model", "path": bundle}
    steps = [ENCODE, {**DECODE, "prompts": CLICK}, {**DECODE, "prompts": MANY}, count]
    own = cpp_build.run([host, {**load, "model": "m"}, *steps])
    hosts = cpp_build.run([host, {**load, "model": "m", "environment_allocators": True}, *steps])
    same(hosts[1:], own[1:])
    assert own[5].value == 0
    assert hosts[5].value > 0


def test_number_of_shared_threads(cpp_build: Build, bundle: Path) -> None:
    threads: Step = {"op": "threads"}
    few: Step = {"op": "set_shared_threads", "threads": 1}
    load = {"op": "load_model", "model": "m", "path": bundle}
    counts = [
        cpp_build.run([{**few, "threads": number}, load, PREPARE, threads])[3].value
        for number in (1, 4)
    ]
    # The calling thread is one of them.
    assert counts[1] == counts[0] + 3
    zero, _, _, late = cpp_build.run([{**few, "threads": 0}, load, PREPARE, few])
    zero.refusal("InvalidInputError", "threads")
    late.refusal("StateError")


# --- a provider -----------------------------------------------------------------------------------


@pytest.fixture
def provider(cpp_builds: Path, tmp_path: Path) -> tuple[Build, dict[str, str], Path]:
    """A build whose CUDA provider computes on the CPU; the file is what it was given."""
    given = tmp_path / "options.txt"
    preload = cpp_builds / "release" / "tests" / "stand_in_cuda_provider.so"
    environment = {"LD_PRELOAD": str(preload), "SAM3RT_PROVIDER_OPTIONS": str(given)}
    return Build(cpp_builds / "release", tmp_path), environment, given


def test_options_reach_the_provider(
    provider: tuple[Build, dict[str, str], Path], bundle: Path
) -> None:
    build, environment, given = provider
    options = {"gpu_mem_limit": "1000000", "arena_extend_strategy": "kSameAsRequested"}
    load = {"op": "load_model", "model": "m", "path": bundle}
    gpu = {**load, "device": "cuda:3", "provider_options": options}
    steps = [ENCODE, {**DECODE, "prompts": CLICK}, {**DECODE, "prompts": MANY}]
    found = build.run([gpu, *steps], env=environment)
    assert found[0].value["device"] == "cuda:3"
    same(found, build.run([load, *steps]))
    lines = [
        dict(pair.split("=") for pair in line.split()) for line in given.read_text().split("\n")
    ]
    own = {"device_id": "3", "use_tf32": "0"}
    # Two graphs; what only copies has no options of the model.
    assert lines.count({**own, **options}) == 2
    assert [line for line in lines if line and line != {**own, **options}] == [own] * (
        len(lines) - 3
    )


def test_no_input_of_a_provider_is_empty(
    provider: tuple[Build, dict[str, str], Path], tiny_sam3: Path
) -> None:
    """A point that does not count takes the place of none."""
    build, environment, _ = provider
    load = {"op": "load_model", "model": "m", "path": tiny_sam3}
    height, width = open_bundle(tiny_sam3).manifest.prompts.mask_size
    masks = noise(9 * height, width).reshape(9, 1, height, width, 3)[..., 0] / 64.0 - 2
    given: list[Step] = [{}, {"mask_input": masks[0]}, {"mask_input": masks}]
    steps = [ENCODE, *({**DECODE, "prompts": as_prompts(each)} for each in given)]
    found = build.run([{**load, "device": "cuda"}, *steps], env=environment)
    expected = build.run([load, *steps])
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert ours.error is None, ours.error
        for name in ("low_res", "iou"):
            np.testing.assert_allclose(ours.arrays[name], theirs.arrays[name], atol=1e-4)


def test_options_that_a_provider_refuses(
    provider: tuple[Build, dict[str, str], Path], bundle: Path
) -> None:
    build, environment, _ = provider
    load = {"op": "load_model", "model": "m", "path": bundle, "device": "cuda"}
    results = build.run([{**load, "provider_options": {"unknown": "1"}}, PREPARE], env=environment)
    assert "unknown provider option" in results[1].refusal("BackendError")


# --- in C -----------------------------------------------------------------------------------------


def test_options_in_c(library: Library, bundle: Path) -> None:
    loaded = library.load(bundle, threads=2, thread_affinities=b"1", no_memory_arena=1)
    library.call("model_warm_up", loaded)
    library.c.sam3rt_model_free(loaded)
    one = Option(b"gpu_mem_limit", b"1")
    for options, subject in (
        ({"threads": 3, "thread_affinities": b"1"}, "thread_affinities"),
        ({"spin_between_runs": 1}, "spin_between_runs"),
        ({"provider_option_count": 1}, "provider_options"),
        ({"options": [one], "device": b"cpu"}, "provider_options"),
        ({"options": [one, one], "device": b"cuda"}, "provider_options"),
        ({"options": [Option(b"device_id", b"1")], "device": b"cuda"}, "provider_options"),
        ({"options": [Option(b"gpu_mem_limit", None)], "device": b"cuda"}, "provider_options"),
    ):
        given: list[Option] = options.pop("options", [])
        array = (Option * len(given))(*given)
        if given:
            options.update(
                provider_options=ctypes.addressof(array), provider_option_count=len(given)
            )
        with pytest.raises(Sam3rtError) as caught:
            library.load(bundle, **options)
        assert (caught.value.status, caught.value.subject) == ("INVALID_INPUT", subject)
    # The pool is in use.
    with pytest.raises(Sam3rtError) as caught:
        library.call("set_shared_threads", 2)
    assert caught.value.status == "STATE_ERROR"


def test_an_older_callers_options_end_before_them(library: Library, bundle: Path) -> None:
    older = ModelOptions(ModelOptions.provider_options.offset, device=b"cpu", spin_between_runs=1)
    loaded = library.make("model_load", str(bundle).encode(), ctypes.byref(older))
    library.c.sam3rt_model_free(loaded)
