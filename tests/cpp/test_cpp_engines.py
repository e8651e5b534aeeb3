"""Which TensorRT engines the C++ runtime uses, beyond the vectors: links, wrappers, verdicts.

Nothing here runs an engine: that needs a GPU. Where engines are to be judged, the bundle's own
graphs on the CPU stand in for them, with outputs that a test may change.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_driver import Build, Result, Step, prove_engines, with_wrapper
from tests.support.cpp_machine import Machine
from tests.support.records import recorded_bundle
from tests.support.vectors import add_engine, load

from sam3rt.accuracy.verdicts import StoredVerdict, load_verdict
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.engines import EngineTarget, candidates, subject_of
from sam3rt.bundle import open_bundle

FP16 = "nvidia-l4-sm89-tensorrt-10.3.0-fp16"
FP32 = "nvidia-l4-sm89-tensorrt-10.3.0-fp32"


class Engines:
    """A bundle to put engines into.

    Args:
        folder: where to make it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = recorded_bundle(folder).path

    def add(self, name: str, role: str, **changes: Any) -> Path:
        """Add an engine with a sidecar that fits, but for the changes."""
        patch = [
            {"op": "replace", "path": f"/{field}", "value": value}
            for field, value in changes.items()
        ]
        return with_wrapper(add_engine(self.path, name, role, patch))

    def pair(self, name: str, **changes: Any) -> None:
        """Add an encoder and a decoder that says it was proven with it."""
        self.add(name, "encoder", **changes)
        self.add(name, "decoder", **changes)

    def prove(self, passed: bool = True) -> list[Path]:
        """Remember a verdict on every pair, as the Python runtime does; the files of verdicts."""
        return prove_engines(self.path, load("engines")["machine"], passed=passed)

    def verdicts(self) -> dict[tuple[str, str], StoredVerdict | None]:
        """What the Python runtime knows of each pair."""
        bundle = open_bundle(self.path, check_files=False)
        machine = load("engines")["machine"]
        target = EngineTarget(**{**machine, "gpu": Gpu(*machine["gpu"])})
        return {
            (pair.encoder.path.parent.name, pair.decoder.path.parent.name): load_verdict(
                bundle, subject_of(pair, target)
            )
            for pair in candidates(bundle, target)
        }

    def step(self, engine_folder: Path | str = "", backend: str = "", **stand_ins: Any) -> Step:
        """Choose for the machine of the vectors. What is not proven cannot be opened, unless
        ``otherwise``, or ``engines`` by "ENCODER DECODER", says how its outputs are changed."""
        machine = load("engines")["machine"]
        return {
            "op": "choose_engines",
            "path": self.path,
            "backend": backend or machine["backend"],
            "gpu": machine["gpu"][0],
            "compute_capability": machine["gpu"][1],
            "driver_version": machine["driver_version"],
            "engine_folder": engine_folder,
            "otherwise": "fails",
            **stand_ins,
        }

    def choose(
        self, build: Build, engine_folder: Path | str = "", backend: str = "", **stand_ins: Any
    ) -> Result:
        """Let the C++ runtime choose."""
        return build.run([self.step(engine_folder, backend, **stand_ins)])[0]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engines:
    """A bundle without engines, and no verdict on any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Engines(tmp_path / "bundle")


def test_the_only_pair_is_chosen(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16, features_dtype="float16")
    engines.prove()
    folder = engines.path / "engines" / FP16
    assert engines.choose(cpp_build).value == {
        "encoder": str(folder / "encoder_ctx.onnx"),
        "decoder": str(folder / "decoder_ctx.onnx"),
        "features_dtype": "float16",
        "precision": "fp16",
        "opened": [],
    }


def test_no_engines(cpp_build: Build, engines: Engines) -> None:
    message = engines.choose(cpp_build).refusal("BackendError")
    assert f"sam3rt build {engines.path} --backend tensorrt" in message
    engines.pair(FP16)
    message = engines.choose(cpp_build, backend="tensorrt-rtx").refusal("BackendError")
    assert "--backend tensorrt-rtx" in message


def test_what_a_sidecar_says_proves_nothing(cpp_build: Build, engines: Engines) -> None:
    """The verdicts of this machine's user count, and whoever made a bundle cannot write them."""
    engines.pair(FP16)
    message = engines.choose(cpp_build).refusal("BackendError")
    assert f"not {FP16}: no memory" in message
    # One that nobody has run anywhere, from an ahead-of-time build.
    engines.pair(FP16, state="unproven", gpu=None, targets=["8.9"])
    assert "no memory" in engines.choose(cpp_build).refusal("BackendError")
    engines.prove()
    assert engines.choose(cpp_build).error is None


# What fits each pair's outputs to what it is to be judged as.
WRONG: dict[str, Any] = {
    "passes": [],
    "encoder": [{"output": "image_embeddings.0", "scale": 2}],
    "decoder": [{"output": "pred_masks", "scale": -1}],
    "cannot be opened": "fails",
}


@pytest.mark.parametrize(
    ("first", "opened", "chosen"),
    [
        ("passes", ["a a"], ("a", "a")),
        ("encoder", ["a a", "b a"], ("b", "a")),
        ("decoder", ["a a", "a b"], ("a", "b")),
        ("cannot be opened", ["a a", "a b"], ("a", "b")),
    ],
)
def test_engines_that_nobody_has_judged_are_judged_and_remembered(
    cpp_build: Build,
    engines: Engines,
    first: str,
    opened: list[str],
    chosen: tuple[str, str],
) -> None:
    engines.pair("a")
    engines.pair("b", recipe="fp32")
    stand_ins = {"engines": {"a a": WRONG[first]}, "otherwise": []}
    before, after = cpp_build.run([engines.step(**stand_ins)] * 2)
    for result in (before, after):
        found = tuple(Path(result.value[role]).parent.name for role in ("encoder", "decoder"))
        assert found == chosen
        assert (
            result.value["precision"]
            == {"aa": "fp16", "ba": "fp32+fp16", "ab": "fp16+fp32"}["".join(chosen)]
        )
    assert before.value["opened"] == opened
    # What could not be opened has no verdict, and is tried again.
    assert after.value["opened"] == (["a a"] if first == "cannot be opened" else [])
    # Another process, and Python, go by the same verdicts.
    assert (
        engines.choose(cpp_build, otherwise="fails").value["precision"] == before.value["precision"]
    )
    verdicts = {result: known for result, known in engines.verdicts().items() if known}
    assert verdicts.keys() == {tuple(pair.split()) for pair in opened} - (
        {("a", "a")} if first == "cannot be opened" else set()
    )
    assert [known.passed for known in verdicts.values()].count(True) == 1
    if first in ("encoder", "decoder"):
        assert not verdicts["a", "a"].passed
        assert verdicts["a", "a"].encoder_failed == (first == "encoder")
        assert "allowed" in verdicts["a", "a"].explanation


def test_when_none_passes_all_are_named(cpp_build: Build, engines: Engines) -> None:
    engines.pair("a")
    engines.pair("b", recipe="fp32")
    message = engines.choose(cpp_build, otherwise=WRONG["decoder"]).refusal("BackendError")
    for name in ("a", "a with the decoder of b", "b with the decoder of a", "b"):
        assert f"not {name}: fails the gate on this machine: click " in message
    assert f"sam3rt build {engines.path}" in message


def test_a_damaged_record_is_not_the_engines_fault(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16)
    (engines.path / "parity.npz").write_bytes(b"damaged")
    engines.choose(cpp_build, otherwise=[]).refusal("BundleError", "parity.npz")
    engines.prove()  # and what is proven needs none
    assert engines.choose(cpp_build).error is None


def test_a_verdict_that_cannot_be_kept_is_remembered_by_the_process(
    cpp_build: Build, engines: Engines, tmp_path: Path
) -> None:
    engines.pair(FP16)
    (tmp_path / "cache").write_text("no folder")
    step = engines.step(otherwise=[])
    log: list[Step] = [{"op": "log", "level": 1}, step, step, {"op": "log_lines"}]
    _, first, second, lines = cpp_build.run(log)
    assert (first.value["opened"], second.value["opened"]) == ([f"{FP16} {FP16}"], [])
    assert any("cannot be kept" in text for _, text in lines.value)
    # One line, so that a service that starts for the first time does not seem to hang.
    assert sum("once on this machine" in text for _, text in lines.value) == 1


def test_a_verdict_that_failed(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP16)
    engines.prove(passed=False)
    # It is not tried again.
    message = engines.choose(cpp_build, otherwise=[]).refusal("BackendError")
    assert "all masks are empty" in message
    assert f"sam3rt build {engines.path}" in message
    engines.pair(FP16, state="refused")
    engines.prove()
    assert "sam3rt build" in engines.choose(cpp_build).refusal("BackendError")
    engines.pair(FP16, state="refused", driver_version="549.0")
    engines.prove()
    assert engines.choose(cpp_build).error is None


@pytest.mark.parametrize(
    "change", ["driver", "gpu", "version", "sam3rt", "precision", "files", "fingerprint", "limits"]
)
def test_a_verdict_on_something_else(cpp_build: Build, engines: Engines, change: str) -> None:
    """A verdict's name is a hash of what it is about, which stands in it too."""
    engines.pair(FP16)
    (path,) = engines.prove()
    document = json.loads(path.read_text())
    old = document["key"]
    new = copy.deepcopy(old)
    if change == "limits":
        new["limits"]["mask_iou"] = 0.5
    elif change in ("driver", "gpu"):
        words = {"driver": ("550.1", "550.2"), "gpu": ("L4", "L40")}[change]
        new["processor"] = old["processor"].replace(*words)
    else:
        new[change] = "1" + old[change]
    path.write_text(json.dumps({**document, "key": new}))
    assert "no memory" in engines.choose(cpp_build).refusal("BackendError")
    path.write_text(json.dumps(document))
    assert engines.choose(cpp_build).error is None


def test_a_verdict_that_cannot_be_read(cpp_build: Build, engines: Engines, tmp_path: Path) -> None:
    engines.pair(FP16)
    (path,) = engines.prove()
    text = path.read_text()
    changed = json.loads(text)
    for damaged in (
        "",
        "[]",
        text[:-9],
        json.dumps({**changed, "passed": 1}),
        json.dumps({**changed, "figures": [1]}),
        json.dumps({k: v for k, v in changed.items() if k != "encoder_failed"}),
        json.dumps({**changed, "format": "sam3rt-verdict-1"}),
        " " * (1 << 20) + text,
    ):
        path.write_text(damaged)
        assert "no memory" in engines.choose(cpp_build).refusal("BackendError")
    path.unlink()
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(tmp_path / "verdict"),
    ):
        (tmp_path / "verdict").write_text(text)
        make()
        assert "no memory" in engines.choose(cpp_build).refusal("BackendError")
        path.unlink()


def test_the_fastest_proven_pair(cpp_build: Build, engines: Engines) -> None:
    engines.pair(FP32, recipe="fp32")
    engines.pair("a-recipe-nobody-knows", recipe="int3")
    engines.prove()
    assert FP32 in engines.choose(cpp_build).value["encoder"]
    engines.pair(FP16)
    assert FP32 in engines.choose(cpp_build).value["encoder"]  # the other is not proven
    engines.prove()
    assert FP16 in engines.choose(cpp_build).value["encoder"]
    folder = engines.path / "engines" / FP32
    for name in (FP32, folder):
        chosen = engines.choose(cpp_build, name)
        assert chosen.value["encoder"] == str(folder / "encoder_ctx.onnx")
        assert chosen.value["decoder"] == str(folder / "decoder_ctx.onnx")
    for wrong in ("nowhere", engines.path):
        assert FP16 in engines.choose(cpp_build, wrong).refusal("BackendError")


def test_encoder_and_decoder_of_two_folders(cpp_build: Build, engines: Engines) -> None:
    engines.add(FP16, "encoder")
    engines.add(FP32, "decoder", recipe="fp32")
    engines.prove()
    for folder in ("", FP16, FP32):
        chosen = engines.choose(cpp_build, folder).value
        assert FP16 in chosen["encoder"]
        assert FP32 in chosen["decoder"]


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_changed_engine(cpp_build: Build, engines: Engines, role: str) -> None:
    engines.pair(FP16)
    engines.prove()
    engine = engines.path / "engines" / FP16 / f"{role}.engine"
    content = engine.read_bytes()
    for damaged in (content[:-1], content[:-1] + b"x"):
        engine.write_bytes(damaged)
        engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")
    engine.unlink()
    engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")
    (engines.path / "outside").write_bytes(content)
    engine.symlink_to(engines.path / "outside")
    assert "link" in engines.choose(cpp_build).refusal("BundleError", f"{role}.engine")


def test_a_changed_engine_beside_a_whole_pair(cpp_build: Build, engines: Engines) -> None:
    engines.pair("a")
    engines.pair("b", recipe="fp32")
    engines.prove()
    (engines.path / "engines" / "a" / "encoder.engine").write_bytes(b"changed")
    assert engines.choose(cpp_build).value["precision"] == "fp32+fp16"
    (engines.path / "engines" / "b" / "encoder.engine").unlink()
    message = engines.choose(cpp_build).refusal("BackendError")
    assert message.count("encoder.engine: ") == 4


@pytest.mark.parametrize("linked", ["engines", f"engines/{FP16}", "engines/{}/encoder.engine.json"])
def test_engines_behind_a_link_that_leaves_the_bundle_are_passed_over(
    cpp_build: Build, engines: Engines, tmp_path: Path, linked: str
) -> None:
    engines.pair(FP16)
    engines.prove()
    assert FP16 in engines.choose(cpp_build).value["encoder"]
    inside = engines.path / linked.format(FP16)
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "sam3rt build" in engines.choose(cpp_build).refusal("BackendError")


def test_engines_behind_a_link_inside_the_bundle_are_used(
    cpp_build: Build, engines: Engines
) -> None:
    engines.pair(FP16)
    engines.prove()
    folder = engines.path / "engines" / FP16
    folder.rename(engines.path / "kept")
    folder.symlink_to(engines.path / "kept")
    assert FP16 in engines.choose(cpp_build).value["encoder"]


def test_wrapper_that_is_none(cpp_build: Build, engines: Engines) -> None:
    """ONNX Runtime would run whatever a wrapper holds or names."""
    import onnx
    from onnx import helper

    engines.pair(FP16)
    engines.prove()
    wrapper = engines.path / "engines" / FP16 / "decoder_ctx.onnx"
    content = wrapper.read_bytes()
    model = onnx.load(wrapper)

    def changed(name: str, value: Any) -> bytes:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        attributes = copied.graph.node[0].attribute
        kept = [a for a in attributes if a.name != name]
        del attributes[:]
        attributes.extend(kept)
        if value is not None:
            attributes.append(helper.make_attribute(name, value))
        return copied.SerializeToString()

    def with_graph(change: Callable[[Any], object]) -> bytes:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        change(copied.graph)
        return copied.SerializeToString()

    weights = onnx.TensorProto(name="w", data_type=1, dims=[1], float_data=[1])
    for bad in (
        b"",
        b"wrapper",
        content[:-1],
        changed("embed_mode", 1),
        changed("embed_mode", None),
        changed("ep_cache_context", "/tmp/other.engine"),
        changed("ep_cache_context", "../other.engine"),
        changed("ep_cache_context", "encoder.engine"),
        changed("ep_cache_context", None),
        with_graph(lambda graph: graph.node.append(graph.node[0])),
        with_graph(lambda graph: graph.node[0].attribute.append(graph.node[0].attribute[0])),
        with_graph(lambda graph: graph.initializer.append(weights)),
        with_graph(lambda graph: setattr(graph.node[0], "op_type", "Identity")),
        with_graph(lambda graph: setattr(graph.node[0], "domain", "other")),
    ):
        wrapper.write_bytes(bad)
        engines.choose(cpp_build).refusal("BundleError", "decoder_ctx.onnx")
    wrapper.write_bytes(content)
    assert engines.choose(cpp_build).error is None
    wrapper.unlink()
    engines.choose(cpp_build).refusal("BundleError", "decoder_ctx.onnx")
    wrapper.symlink_to("encoder_ctx.onnx")
    engines.choose(cpp_build).refusal("BundleError", "decoder_ctx.onnx")


# --- the driver -----------------------------------------------------------------------------------

_NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) {
    strncpy(text, "550.54.15", size);
    return 0;
}
"""


def test_gpu_and_driver(machine: Machine, tmp_path: Path) -> None:
    """As a verdict's processor names them; NVML, where there is one, knows the driver's version."""
    steps: list[Step] = [{"op": "query_gpu", "number": number} for number in (0, 1)]
    for driver in ("CUDA 12.4", "550.54.15"):
        found, missing = machine.run(*steps)
        assert found.value == [*load("engines")["machine"]["gpu"], driver]
        assert "GPU 1" in missing.refusal("BackendError")
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libnvidia-ml.so.1"]
        subprocess.run(command, input=_NVML, text=True, check=True)
        machine.environment["LD_LIBRARY_PATH"] += f":{tmp_path}"
