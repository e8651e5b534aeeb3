"""Where the weights of a graph lie, in C++: nothing outside of the bundle is ever opened."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tests.support import vectors as stored
from tests.support.cpp_driver import Build
from tests.support.helpers import flip, relist

from sam3rt.bundle.default import default_bundle_path

IN_NONBLOCK, IN_OPEN = os.O_NONBLOCK, 0x20


class OpenWatch:
    """Tells whether anybody opens a file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(IN_NONBLOCK)
        assert libc.inotify_add_watch(self._descriptor, bytes(path), IN_OPEN) >= 0

    def opened(self) -> bool:
        """Whether the file was opened since this was last asked."""
        try:
            return bool(os.read(self._descriptor, 1 << 16))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)


def moved_weight(location: str, offset: int = 0) -> Callable[[onnx.ModelProto], bytes]:
    """Let the first large weight lie somewhere else."""

    def change(model: onnx.ModelProto) -> bytes:
        weight = next(w for w in model.graph.initializer if len(w.raw_data) > 64)
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            weight.external_data.add(key=key, value=str(value))
        return model.SerializeToString()

    return change


def overlong_tag(location: str) -> Callable[[onnx.ModelProto], bytes]:
    """The same, under a field number whose upper bits protocol buffers drop."""

    def change(model: onnx.ModelProto) -> bytes:
        moved_weight(location)(model)
        weight = next(w for w in model.graph.initializer if w.external_data)
        content = weight.SerializeToString()
        model.graph.initializer.remove(weight)
        model.graph.ClearField("doc_string")
        hidden = b"\xaa\x80\x80\x80\x10" + varint(len(content)) + content
        graph = model.graph.SerializeToString() + hidden
        model.ClearField("graph")
        # ONNX Runtime reads the tag's lower 32 bits, which are those of an initializer.
        return model.SerializeToString() + b"\x3a" + varint(len(graph)) + graph

    return change


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def hostile(folder: Path, change: Callable[[onnx.ModelProto], bytes]) -> Path:
    """The bundled model with a changed decoder and a manifest that vouches for it."""
    bundle = folder / "hostile"
    shutil.copytree(default_bundle_path(), bundle, ignore=shutil.ignore_patterns("verdicts"))
    changed = change(onnx.load(bundle / "decoder.onnx"))
    (bundle / "decoder.onnx").write_bytes(changed)
    relist(bundle)
    return bundle


def prepare_steps(bundle: Path) -> list[dict[str, object]]:
    return [{"op": "load_model", "model": "m", "path": bundle}, {"op": "prepare", "model": "m"}]


@pytest.mark.parametrize("attack", [moved_weight, overlong_tag])
def test_absolute_location_is_never_opened(
    cpp_build: Build, tmp_path: Path, attack: Callable[[str], Callable[[onnx.ModelProto], bytes]]
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 10_000_000)
    bundle = hostile(tmp_path, attack(str(secret)))
    watch = OpenWatch(secret)
    try:
        load, prepare = cpp_build.run(prepare_steps(bundle))
        assert load.error is None
        prepare.refusal("BundleError", "decoder.onnx")
        assert not watch.opened()
        secret.open("rb").close()
        assert watch.opened()
    finally:
        watch.close()


def test_graph_that_reads_memory(cpp_build: Build, tmp_path: Path) -> None:
    """ONNX Runtime itself would read this process's memory at the address."""
    change = moved_weight("*/_ORT_MEM_ADDR_/*", ctypes.addressof(ctypes.create_string_buffer(64)))
    _, prepare = cpp_build.run(prepare_steps(hostile(tmp_path, change)))
    assert "data lie in" in prepare.refusal("BundleError", "decoder.onnx")


def test_link_out_of_the_bundle(cpp_build: Build, tmp_path: Path) -> None:
    """Noticed when a graph is loaded, where nobody looked at the files before."""
    path = tmp_path / "linked"
    shutil.copytree(default_bundle_path(), path)
    (path / "decoder.onnx").rename(tmp_path / "outside")
    (path / "decoder.onnx").symlink_to(tmp_path / "outside")
    load, prepare = prepare_steps(path)
    steps = [{**load, "check_files": False}, prepare]
    assert "link" in cpp_build.run(steps)[-1].refusal("BundleError", "decoder.onnx")


def test_damaged_files_do_no_harm(cpp_build: Build, tmp_path: Path) -> None:
    """Whatever is accepted or refused, nothing is read beyond the file."""
    vectors = stored.load("onnx_files")
    rng = np.random.default_rng(2)
    contents = [rng.bytes(40) for _ in range(100)]
    for case in vectors["accepted"]:
        whole = bytes.fromhex(case["hex"])
        contents += [whole[:length] for length in range(len(whole))]
        contents += [flip(whole, bit) for bit in range(0, len(whole) * 8, 3)]
    steps = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        beside = [*vectors["beside"].items()]
        steps.append({"op": "onnx_locations", "path": path, "beside": beside})
    refused = [result for result in cpp_build.run(steps) if result.error]
    for result in refused:
        result.refusal("BundleError", "m.onnx")
    assert len(refused) > len(contents) / 2
