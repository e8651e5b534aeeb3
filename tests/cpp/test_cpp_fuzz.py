"""The libFuzzer targets of the C++ runtime, for a few seconds each, from sound files as seeds."""

from __future__ import annotations

import io
import os
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from tests.support.cpp_driver import SANITIZERS
from tests.support.helpers import noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt

SECONDS = 5
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["bundle", "embedding", "onnx", "record", "c_api"])
def test_nothing_that_comes_from_outside_breaks_it(
    cpp_builds: Path, tmp_path: Path, target: str
) -> None:
    program = cpp_builds / "fuzz" / "tests" / "fuzz" / f"fuzz_{target}"
    if not program.exists():
        pytest.skip("built by runtime/cpp/tools/build_fuzzers.sh, with clang")
    bundle = runnable_bundle(tmp_path / "bundle").path
    model = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")
    embedding = model.encode(noise(10, 14)).to_bytes()
    # A fingerprint that the target expects, and a digest that it fills in.
    fingerprint = model.manifest.fingerprint.encode()
    start = embedding.index(b'"sha256":"') + len(b'"sha256":"')
    unsigned = embedding[:start] + b"0" * 64 + embedding[start + 64 :]
    pixels, record, array = noise(10, 14), io.BytesIO(), io.BytesIO()
    np.savez_compressed(record, image_0=pixels, description=np.array("{}"))
    np.save(array, pixels.astype(np.float32))
    seeds = {
        "bundle": [(bundle / "bundle.json").read_bytes()],
        "embedding": [unsigned.replace(fingerprint, b"a" * 64)],
        "onnx": [(bundle / f"{name}.onnx").read_bytes() for name in ("encoder", "decoder")],
        "record": [
            bytes([0]) + zlib.compress(pixels.tobytes(), wbits=-15),
            bytes([1]) + record.getvalue(),
            bytes([2]) + array.getvalue(),
        ],
        "c_api": [bytes([1]) + embedding, bytes([2, 1, 2, 1, 2, 1, 2]) * 40, bytes([0, 9, 9]) * 50],
    }
    corpus, artifacts = tmp_path / "corpus", tmp_path / "artifacts"
    for folder in (corpus, artifacts):
        folder.mkdir()
    for number, seed in enumerate(seeds[target]):
        (corpus / str(number)).write_bytes(seed)
    done = subprocess.run(
        [
            program,
            corpus,
            f"-artifact_prefix={artifacts}/",
            f"-max_total_time={SECONDS}",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "SAM3RT_FUZZ_BUNDLE": str(bundle),
            "LSAN_OPTIONS": f"suppressions={SANITIZERS / 'lsan.supp'}:print_suppressions=0",
        },
    )
    assert done.returncode == 0, done.stderr[-6000:]
    # The seeds were read, and others made of them.
    assert len(list(corpus.iterdir())) > len(seeds[target])
