"""Bundles whose files lie in memory: what a folder gives, with the same checks, and no copies."""

from __future__ import annotations

import ctypes
from ctypes import byref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support.c_library import Library, ModelOptions, image, memory_files
from tests.support.cpp_driver import Build, Step, as_prompts
from tests.support.helpers import external_weights, flip, noise, relist
from tests.support.records import recorded_bundle

CLICK: dict[str, Any] = {"point_coords": [[4, 4]], "point_labels": [1]}
PICTURE = noise(9, 9)


def bundle_with_weights(folder: Path, megabytes: int = 0) -> Path:
    """A bundle whose decoder's weights lie beside it, with some that nothing reads."""
    whole = recorded_bundle(folder / "whole").path
    model = onnx.load(whole / "decoder.onnx")
    unread = np.random.default_rng(0).random(megabytes << 18, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(unread, "unread"))
    onnx.save(model, whole / "decoder.onnx")
    path = external_weights(folder / "beside", whole).path
    relist(path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_weights(tmp_path_factory.mktemp("memory") / "bundle")


def files_of(bundle: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(bundle.iterdir()) if path.is_file()}


def from_memory(files: dict[str, Path | None], **options: Any) -> Step:
    listed = [[name, path] for name, path in files.items()]
    return {"op": "load_from_memory", "model": "m", "files": listed, **options}


USE: list[Step] = [
    {"op": "encode", "model": "m", "embedding": "e", "image": PICTURE},
    {"op": "decode", "model": "m", "embedding": "e", "prompts": as_prompts(CLICK)},
    {"op": "verify", "model": "m"},
    {"op": "health", "model": "m"},
]


def test_a_model_from_memory_is_that_of_the_folder(cpp_build: Build, bundle: Path) -> None:
    folder = cpp_build.run([{"op": "load_model", "model": "m", "path": bundle}, *USE])
    held: Step = {"op": "lent"}
    prepare: Step = {"op": "prepare", "model": "m"}
    load = from_memory({**files_of(bundle), "notes.txt": bundle / "bundle.json"})
    memory = cpp_build.run([load, held, prepare, held, *USE])
    assert memory[0].value == {**folder[0].value, "path": ""}
    # What was read is let go of; the graphs' files once they are loaded.
    assert memory[1].value == ["decoder.data", "decoder.onnx", "encoder.onnx"]
    assert memory[3].value == []
    for name in ("low_res", "iou"):
        np.testing.assert_array_equal(memory[5].arrays[name], folder[2].arrays[name])
    assert memory[6].value == folder[3].value
    assert memory[6].value["passed"]
    assert memory[7].value["healthy"]
    assert memory[7].value["fingerprint"] == folder[4].value["fingerprint"]


@pytest.mark.parametrize("name", ["bundle.json", "encoder.onnx", "decoder.data", "parity.npz"])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_every_file_is_checked(
    cpp_build: Build, bundle: Path, tmp_path: Path, name: str, how: str
) -> None:
    files: dict[str, Path | None] = {**files_of(bundle)}
    content = (bundle / name).read_bytes()
    if how == "missing":
        del files[name]
    else:
        files[name] = tmp_path / name
        changed = content[:-1] if how == "cut" else flip(content, len(content) // 2)
        (tmp_path / name).write_bytes(changed)
    cpp_build.one(**from_memory(files)).refusal("BundleError", name)
    if name == "bundle.json":
        return
    # Without that check, what is loaded is hashed nevertheless, and the record where it is read.
    step = {"encoder.onnx": USE[0], "decoder.data": {"op": "prepare", "model": "m"}}.get(
        name, USE[2]
    )
    loaded, used = cpp_build.run([from_memory(files, check_files=False), step])
    assert loaded.error is None
    used.refusal("BundleError", name)


def test_a_failed_load_can_be_tried_again(cpp_build: Build, bundle: Path, tmp_path: Path) -> None:
    """What could not be loaded is not let go of."""
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")
    files: dict[str, Path | None] = {**files_of(bundle), "decoder.onnx": tmp_path / "decoder.onnx"}
    prepare: Step = {"op": "prepare", "model": "m"}
    load = from_memory(files, check_files=False)
    results = cpp_build.run([load, prepare, {"op": "lent"}, prepare])
    for index in (1, 3):
        results[index].refusal("BundleError", "decoder.onnx")
    assert results[2].value == ["decoder.data", "decoder.onnx"]


def test_calls_that_make_no_sense(cpp_build: Build, bundle: Path) -> None:
    files = files_of(bundle)
    first = next(iter(files.items()))
    twice = {**from_memory(files), "files": [[*first], *([name, p] for name, p in files.items())]}
    assert "twice" in cpp_build.one(**twice).refusal("InvalidInputError", "files")
    cpp_build.one(**from_memory({**files, "bundle.json": None})).refusal(
        "InvalidInputError", "files"
    )
    cpp_build.one(**from_memory(files, map_weights=True)).refusal(
        "InvalidInputError", "map_weights"
    )
    cpp_build.one(**from_memory({})).refusal("BundleError", "bundle.json")
    assert "expected " + "0" * 64 in cpp_build.one(
        **from_memory(files, expected_fingerprint="0" * 64)
    ).refusal("BundleError")
    # Engines lie in a folder; "auto" does without.
    assert "in memory" in cpp_build.one(**from_memory(files, device="tensorrt")).refusal(
        "BackendError"
    )
    assert cpp_build.one(**from_memory(files, device="auto")).error is None


def test_weights_are_not_copied_by_the_library(cpp_builds: Path, tmp_path: Path) -> None:
    """ONNX Runtime has its own copy, and while it loads another one."""
    size = 64
    path = bundle_with_weights(tmp_path / "bundle", size)
    build = Build(cpp_builds / "release", tmp_path)
    memory: Step = {"op": "memory"}
    steps: list[Step] = [
        memory,
        from_memory(files_of(path)),
        memory,
        {"op": "prepare", "model": "m"},
        memory,
    ]
    before, _, given, _, loaded = (result.value for result in build.run(steps))
    found = {
        "loaded": given["now"] - before["now"],
        "while it was loaded": given["peak"] - before["now"],
        "while the graphs were": loaded["peak"] - given["now"],
        "in the end": loaded["now"] - before["now"],
    }
    # The files are read by the driver. Where the library copied them, there would be one more.
    copies = {"loaded": 1, "while it was loaded": 1, "while the graphs were": 2, "in the end": 1}
    for when, taken in found.items():
        assert taken < (copies[when] + 0.75) * size * 2**20, found


def test_in_c(library: Library, bundle: Path) -> None:
    """The content need not live longer than it takes to load the graphs."""
    folder = library.load(bundle)
    contents = {name: path.read_bytes() for name, path in files_of(bundle).items()}
    files, kept = memory_files(contents)
    options = ModelOptions(ctypes.sizeof(ModelOptions), device=b"cpu")
    count = ctypes.c_size_t(len(files))
    model = library.make("model_load_from_memory", files, count, byref(options))
    library.call("model_prepare", model)
    for buffer in kept:
        ctypes.memset(buffer, 0xFF, ctypes.sizeof(buffer))
    assert library.c.sam3rt_model_path(model) == b""
    found = []
    for loaded in (folder, model):
        predictor = library.predictor(loaded)
        library.call("predictor_set_image", predictor, byref(image(PICTURE)))
        found.append(library.predict(predictor, CLICK))
        library.c.sam3rt_predictor_free(predictor)
        library.c.sam3rt_model_free(loaded)
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
