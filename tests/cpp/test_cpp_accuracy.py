"""The C++ runtime's accuracy gate beyond the vectors: the same figures as Python's, damage noticed.

Choosing engines by it is tested in test_cpp_engines.py.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from tests.support.cpp_driver import Build, Step
from tests.support.helpers import examples, flip, relist
from tests.support.records import ChangedRunner, read_record, recorded_bundle, write_record
from tests.support.vectors import load

import sam3rt
from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.metrics import Measurement
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.accuracy.verdicts import StoredVerdict, Subject, load_verdict, save_verdict
from sam3rt.bundle import Bundle, open_bundle


@pytest.fixture(scope="module", params=["sam3", "mobile_sam"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a few nodes, with and without object scores."""
    return recorded_bundle(tmp_path_factory.mktemp("recorded") / "bundle", request.param)


def with_model(path: Path, *steps: str, check_files: bool = True) -> list[Step]:
    return [
        {"op": "load_model", "model": "m", "path": path, "threads": 1, "check_files": check_files},
        *({"op": step, "model": "m"} for step in steps),
    ]


def same_measurements(found: list[Any], expected: list[Measurement]) -> None:
    """Assert that two runtimes compared the same and found the same."""
    names = [[m.case, m.output, m.metric, m.at_least, m.passed] for m in expected]
    assert [[*m[:3], *m[5:]] for m in found] == names
    figures = [[float(m[3]), float(m[4])] for m in found]
    wanted = [[m.value, m.limit] for m in expected]
    np.testing.assert_allclose(figures, wanted, rtol=1e-5, atol=2e-6)


# --- verify and health ----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [True, False])
def test_figures_are_pythons_whatever_is_wrong(
    cpp_build: Build, recorded: Bundle, gate: bool
) -> None:
    has_score = recorded.manifest.model_type == "sam3"
    changes: list[Any] = [
        case["changes"]
        for case in load("records")["answers"]
        if has_score or all("object" not in change["output"] for change in case["changes"])
    ]
    changes += [
        [{"output": "single_pred_masks", "scale": 1e30}],
        [{"output": "pred_masks", "at": 1, "value": "inf"}],
        [{"output": "iou_scores", "scale": 1e30}, {"output": "image_embeddings.0", "scale": 2}],
    ]
    steps: list[Step] = [
        {"op": "judge", "path": recorded.path, "changes": changed, "gate": gate}
        for changed in changes
    ]
    backend = sam3rt.load_model(recorded.path, backend="onnxruntime", device="cpu").backend
    limits = GATE_LIMITS if gate else recorded.manifest.parity.limits
    for changed, found in zip(changes, cpp_build.run(steps), strict=True):
        runner = ChangedRunner(backend, recorded, changed)
        verdict = judge(verify(runner, recorded.manifest, load_record(recorded), limits))
        same_measurements(found.value["report"]["measurements"], list(verdict.measurements))
        stored = StoredVerdict.of(verdict)
        assert found.value["verdict"]["passed"] == stored.passed
        assert found.value["verdict"]["encoder_failed"] == stored.encoder_failed
        assert found.value["verdict"]["explanation"] == stored.explanation
        assert found.value["verdict"]["figures"].keys() == stored.figures.keys()


def test_scores_that_are_log_odds(cpp_build: Build, tmp_path: Path) -> None:
    """As SAM 3.1 predicts them: the limits are of IoUs."""
    bundle = recorded_bundle(tmp_path / "bundle")
    arrays, description = read_record(bundle.path / "parity.npz")
    write_record(bundle.path, arrays, description | {"iou_unit": "log_odds"})
    bundle = open_bundle(bundle.path)
    huge = [{"output": "iou_scores", "at": at, "value": 200.0 * at - 100} for at in (0, 1)]
    infinite = [{"output": "iou_scores", "at": 0, "value": value} for value in ("inf", "-inf")]
    backend = sam3rt.load_model(bundle.path, backend="onnxruntime", device="cpu").backend
    for changes in (huge, *([change] for change in infinite)):
        found = cpp_build.one(op="judge", path=bundle.path, changes=changes).value["report"]
        runner = ChangedRunner(backend, bundle, changes)
        expected = list(verify(runner, bundle.manifest, load_record(bundle), GATE_LIMITS))
        same_measurements(found["measurements"], expected)
        errors = [m.value for m in expected if m.output == "predicted IoU"]
        assert all(error <= 1 for error in errors) == (changes is huge)


@pytest.mark.parametrize(
    ("graph", "weights", "blamed"),
    [
        ("encoder", "filters", "features 0"),
        ("decoder", "pred_masks.weight", "logits"),
        ("decoder", "single_iou_scores.weight", "predicted IoU"),
    ],
)
def test_changed_weights_fail(
    cpp_build: Build, tmp_path: Path, graph: str, weights: str, blamed: str
) -> None:
    """Whoever changes a bundle can vouch for the new files, but not make the record fit."""
    path = recorded_bundle(tmp_path / "bundle").path
    model = onnx.load(path / f"{graph}.onnx")
    (tensor,) = (t for t in model.graph.initializer if t.name == weights)
    tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), weights))
    onnx.save(model, path / f"{graph}.onnx")

    # As long as nobody vouches for it, it is not even loaded.
    _, verified, healthy = cpp_build.run(with_model(path, "verify", "health", check_files=False))
    verified.refusal("BundleError", f"{graph}.onnx")
    assert not healthy.value["healthy"]
    assert f"{graph}.onnx" in healthy.value["problem"]

    relist(path)
    _, verified, healthy = cpp_build.run(with_model(path, "verify", "health"))
    assert not verified.value["passed"]
    assert f" {blamed}: " in verified.value["explanation"]
    assert not healthy.value["healthy"]
    assert f" {blamed}: " in healthy.value["problem"]
    assert healthy.value["encode_seconds"] > 0


def test_a_damaged_record(cpp_build: Build, tmp_path: Path) -> None:
    path = recorded_bundle(tmp_path / "bundle").path
    record = path / "parity.npz"
    record.write_bytes(flip(record.read_bytes(), 300))
    _, verified, healthy = cpp_build.run(with_model(path, "verify", "health", check_files=False))
    verified.refusal("BundleError", "parity.npz")
    assert healthy.value["problem"].startswith("parity.npz: ")
    content = record.read_bytes()
    (tmp_path / "outside").write_bytes(flip(content, 300))
    record.unlink()
    record.symlink_to(tmp_path / "outside")
    _, verified = cpp_build.run(with_model(path, "verify", check_files=False))
    assert "link" in verified.refusal("BundleError", "parity.npz")


def test_verify_that_takes_too_long(cpp_build: Build, recorded: Bundle) -> None:
    steps = with_model(recorded.path, "verify")
    steps[1]["deadline"] = 0
    cpp_build.run(steps)[1].refusal("CancelledError")


# --- archives -------------------------------------------------------------------------------------


def test_arrays_are_read_as_numpy_wrote_them(cpp_build: Build, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "bytes": rng.integers(0, 256, (3, 4, 5), np.uint8),
        "labels/deep": rng.integers(-(1 << 62), 1 << 62, (2, 7)),
        "floats": np.array([np.nan, -np.inf, 1e-40, -0.0], np.float32),
        "none": np.zeros((3, 0, 2), np.float32),
        "scalar": np.array(2.5, np.float32),
        "columns": np.asfortranarray(rng.standard_normal((2, 3, 4)).astype(np.float32)),
        "text": np.array('{"a": "\u00e4\u2603\U0001f600"}'),
        "empty text": np.array(""),
        "many axes": np.ones((1,) * 32, np.uint8),
        "large": np.arange(300_000, dtype=np.float32),
    }
    steps: list[Step] = []
    for number, write in enumerate((np.savez, np.savez_compressed)):
        path = tmp_path / f"{number}.npz"
        write(path, **arrays)
        steps.append({"op": "read_npz", "path": path})
    for found in cpp_build.run(steps):
        assert found.error is None, found.error
        assert [name for name, _ in found.value] == sorted(arrays)
        for number, (name, text) in enumerate(found.value):
            if text is not None:
                assert text == str(arrays[name])
                continue
            array = found.arrays[str(number)]
            assert array.dtype == arrays[name].dtype
            np.testing.assert_array_equal(array, arrays[name], name)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", "|b1", "<i4", "<U2", "<c8"])
def test_arrays_of_other_types_are_refused(cpp_build: Build, tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 2), dtype))
    found = cpp_build.one(op="read_npz", path=tmp_path / "a.npz")
    assert "a is of type" in found.refusal("BundleError", "a.npz")


def test_no_damage_goes_unnoticed(cpp_build: Build, tmp_path: Path) -> None:
    """Whatever bit is changed, an archive is refused or holds the same arrays."""
    arrays = {"a": np.arange(40, dtype=np.float32), "text": np.array("{}")}
    steps: list[Step] = []
    for write in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        write(stream, **arrays)
        content = stream.getvalue()
        for bit in range(0, 8 * len(content), 7):
            path = tmp_path / f"{len(steps)}.npz"
            path.write_bytes(flip(content, bit))
            steps.append({"op": "read_npz", "path": path})
    kept = 0
    for found in cpp_build.run(steps):
        if found.error is not None:
            found.refusal("BundleError", "a.npz")
        elif [name for name, _ in found.value] == ["a", "text"]:  # another name is no damage
            kept += 1
            np.testing.assert_array_equal(found.arrays["0"], arrays["a"])
            assert found.value[1][1] == "{}"
    assert 0 < kept < len(steps) // 2


KINDS = (
    b"",
    b"a" * 100_000,
    bytes(range(256)) * 300,
    np.random.default_rng(0).integers(0, 256, 70_000, np.uint8).tobytes(),
    np.random.default_rng(1).standard_normal(9_000).astype(np.float32).tobytes(),
    json.dumps(load("records")).encode(),
)


def deflated(content: bytes, level: int, strategy: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(content) + packer.flush()


def inflated(build: Build, folder: Path, packed: list[tuple[bytes, int]]) -> list[bytes | None]:
    """What the C++ runtime unpacks, or ``None`` where it refuses."""
    steps: list[Step] = []
    for number, (content, size) in enumerate(packed):
        path = folder / f"packed{number}"
        path.write_bytes(content)
        steps.append({"op": "inflate", "path": path, "size": size})
    return [found.arrays["bytes"].tobytes() if found.value else None for found in build.run(steps)]


def test_whatever_zlib_packs_is_unpacked(cpp_build: Build, tmp_path: Path) -> None:
    """Stored, fixed and dynamic blocks, near and far matches."""
    strategies = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED)
    contents = [(kind, level, s) for kind in KINDS for level in (0, 1, 6, 9) for s in strategies]
    packed = [(deflated(*entry), len(entry[0])) for entry in contents]
    assert inflated(cpp_build, tmp_path, packed) == [content for content, _, _ in contents]
    wrong = [(data, size + by) for data, size in packed for by in (-1, 1) if size + by >= 0]
    wrong += [(data + b"\0", size) for data, size in packed]
    assert inflated(cpp_build, tmp_path, wrong) == [None] * len(wrong)


@given(content=st.binary(max_size=300), repeats=st.integers(1, 40), data=st.data())
@examples(20)
def test_damaged_blocks_are_unpacked_as_by_zlib_or_refused(
    cpp_build: Build,
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    repeats: int,
    data: st.DataObject,
) -> None:
    content *= repeats
    whole = deflated(content, data.draw(st.sampled_from([0, 1, 9])), zlib.Z_DEFAULT_STRATEGY)
    cut = [whole[:size] for size in range(0, len(whole), 1 + len(whole) // 20)]
    bits = data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=20, max_size=20))
    damaged = cut + [flip(whole, bit) for bit in bits]

    def by_zlib(packed: bytes) -> bytes | None:
        unpacker = zlib.decompressobj(-15)
        try:
            found = unpacker.decompress(packed) + unpacker.flush()
        except zlib.error:
            return None
        whole = unpacker.eof and not unpacker.unused_data
        return found if whole and len(found) == len(content) else None

    folder = tmp_path_factory.mktemp("damaged")
    found = inflated(cpp_build, folder, [(packed, len(content)) for packed in damaged])
    assert found == [by_zlib(packed) for packed in damaged]


# --- verdicts -------------------------------------------------------------------------------------


def test_verdicts_travel_both_ways(
    cpp_build: Build, recorded: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fields = {
        "backend": "tensorrt",
        "version": "10.3.0",
        "processor": 'NVIDIA "\u2603" L4, 8.9',
        "precision": "fp16+fp32",
        "files": "a b",
    }
    subject: Step = {"fingerprint": recorded.manifest.fingerprint, **fields}
    figures = {"masks mean IoU": 0.1 + 0.2, "features 0 cosine": math.nan, "logits error": 1e300}
    verdict = StoredVerdict(False, 'n\u00f6 "mask"\n', figures, True)
    saved: Step = {
        "op": "save_verdict",
        "passed": verdict.passed,
        "explanation": verdict.explanation,
        "encoder_failed": verdict.encoder_failed,
        "figures": {name: "nan" if math.isnan(v) else v for name, v in figures.items()},
        **subject,
    }
    assert load_verdict(recorded, Subject(**fields)) is None
    assert cpp_build.one(op="load_verdict", **subject).value is None
    path = save_verdict(recorded, Subject(**fields), verdict)
    assert path is not None
    by_python = json.loads(path.read_text())
    read = cpp_build.one(op="load_verdict", **subject).value
    assert read == {
        "passed": False,
        "explanation": verdict.explanation,
        "encoder_failed": True,
        "figures": saved["figures"],
    }
    path.unlink()
    assert cpp_build.run([saved])[0].error is None
    assert json.loads(path.read_text()) == by_python  # under the same name
    found = load_verdict(recorded, Subject(**fields))
    assert found is not None
    assert math.isnan(found.figures.pop("features 0 cosine"))
    numbers = {name: figure for name, figure in figures.items() if not math.isnan(figure)}
    assert found == StoredVerdict(False, verdict.explanation, numbers, True)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    # Variables that choose kernels make it another verdict, for both.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ':4096:2 "\u00e4"')
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert load_verdict(recorded, Subject(**fields)) is None
    assert cpp_build.one(op="load_verdict", **subject).value is None
    other = save_verdict(recorded, Subject(**fields), verdict)
    assert other is not None
    assert other != path
    assert cpp_build.one(op="load_verdict", **subject).value == read
    document = json.loads(other.read_text())
    other.unlink()
    assert cpp_build.run([saved])[0].error is None
    assert json.loads(other.read_text()) == document
    document["key"]["environment"]["NVIDIA_TF32_OVERRIDE"] = "0"
    other.write_text(json.dumps(document))
    assert cpp_build.one(op="load_verdict", **subject).value is None
