"""Embeddings in C++: files that both runtimes write and read alike, or refuse alike."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cpp_driver import Build, Step, as_prompts
from tests.support.golden_calls import Golden
from tests.unit.runtime import test_embedding
from tests.unit.runtime.test_embedding import (
    FINGERPRINT,
    FORGERIES,
    NOT_FILES,
    PLACE,
    SPECS,
    forge,
    random_maps,
)

import sam3rt
from sam3rt.embedding import read_embedding, write_embedding

CLICK = {"point_coords": [[30, 25]], "point_labels": [1]}


def read_step(path: Path, fingerprint: str = FINGERPRINT) -> Step:
    """Read a file with SPECS, in the driver."""
    specs = [[spec.name, list(spec.shape[1:])] for spec in SPECS]
    return {"op": "read_embedding", "path": path, "fingerprint": fingerprint, "specs": specs}


def refused_by_both(build: Build, paths: list[Path]) -> None:
    for path, result in zip(paths, build.run([read_step(path) for path in paths]), strict=True):
        with pytest.raises(sam3rt.EmbeddingError):
            read_embedding(path, FINGERPRINT, SPECS)
        assert str(path) in result.refusal("EmbeddingError")


def test_files_are_the_same_byte_for_byte(cpp_build: Build, tmp_path: Path) -> None:
    maps = random_maps()
    first = next(iter(maps.values())).reshape(-1)
    first[:4] = [np.nan, -np.inf, -0.0, 1e-40]
    write_embedding(tmp_path / "python", maps, PLACE, FINGERPRINT)
    place = {"original_size": PLACE.original_size, "input_size": PLACE.input_size}
    written, read = cpp_build.run(
        [
            {
                "op": "write_embedding",
                "path": tmp_path / "cpp",
                "names": list(maps),
                "maps": list(maps.values()),
                "fingerprint": FINGERPRINT,
                **place,
            },
            read_step(tmp_path / "python"),
        ]
    )
    assert written.error is None
    assert (tmp_path / "cpp").read_bytes() == (tmp_path / "python").read_bytes()
    assert read.value == [list(PLACE.original_size), list(PLACE.input_size)]
    for number, array in enumerate(maps.values()):
        found = read.arrays[str(number)]
        np.testing.assert_array_equal(found.view(np.uint32), array.view(np.uint32))


def test_embeddings_travel_both_ways(cpp_build: Build, golden: Golden, tmp_path: Path) -> None:
    """What one runtime encodes and saves, the other loads, and predicts the same from."""
    model = sam3rt.load_model(golden.bundle, backend="onnxruntime", device="cpu")
    name, image = next(iter(golden.images.items()))
    model.encode(image).save(tmp_path / "python")
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": golden.bundle},
            {
                "op": "load_embedding",
                "model": "m",
                "embedding": "loaded",
                "path": tmp_path / "python",
            },
            {"op": "encoder_loaded", "model": "m"},
            {"op": "decode", "model": "m", "embedding": "loaded", "prompts": as_prompts(CLICK)},
            {"op": "maps", "embedding": "loaded"},
            {"op": "save_embedding", "embedding": "loaded", "path": tmp_path / "again"},
            {"op": "encoder_loaded", "model": "m"},
            {"op": "encode", "model": "m", "embedding": "own", "image": image},
            {"op": "encoder_loaded", "model": "m"},
            {"op": "save_embedding", "embedding": "own", "path": tmp_path / "cpp"},
            {"op": "decode", "model": "m", "embedding": "own", "prompts": as_prompts(CLICK)},
        ]
    )
    assert not [result.error for result in results if result.error]
    assert (tmp_path / "again").read_bytes() == (tmp_path / "python").read_bytes()
    # The encoder was not needed until an image came.
    assert [results[i].value for i in (2, 6, 8)] == [False, False, True]
    assert results[1].value["original_size"] == list(image.shape[:2])
    assert results[1].value["names"] == list(golden.features[name])
    assert results[1].value["nbytes"] == sum(a.nbytes for a in golden.features[name].values())
    for index, array in enumerate(golden.features[name].values()):
        np.testing.assert_array_equal(results[4].arrays[str(index)], array)
    loaded = model.load_embedding(tmp_path / "cpp")
    decoded = model.decode(loaded, sam3rt.Prompts(**CLICK))
    for result in (results[3], results[10]):
        np.testing.assert_allclose(
            result.arrays["low_res"], decoded.low_res_masks, atol=1e-4, rtol=0
        )
        np.testing.assert_allclose(result.arrays["iou"], decoded.iou_predictions, atol=1e-5, rtol=0)
        if decoded.object_score_logits is not None:
            np.testing.assert_allclose(
                result.arrays["object_score"], decoded.object_score_logits, atol=1e-4, rtol=0
            )


def test_other_models_embedding(
    cpp_build: Build, sam3_golden: Golden, mobile_sam_golden: Golden, tmp_path: Path
) -> None:
    image = sam3_golden.images["2"]
    path = tmp_path / "image.embedding"
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "sam3", "path": sam3_golden.bundle},
            {"op": "load_model", "model": "mobile", "path": mobile_sam_golden.bundle},
            {"op": "encode", "model": "mobile", "embedding": "e", "image": image},
            {"op": "save_embedding", "embedding": "e", "path": path},
            {"op": "load_embedding", "model": "sam3", "embedding": "x", "path": path},
            {"op": "decode", "model": "sam3", "embedding": "e", "prompts": as_prompts(CLICK)},
            {"op": "save_embedding", "embedding": "e", "path": tmp_path / "none" / "e"},
        ]
    )
    assert "another model" in results[4].refusal("EmbeddingError")
    assert "encode the image again" in results[5].refusal("EmbeddingError")
    results[6].refusal("OSError")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.embedding"]


def test_geometry_of_another_resize_rule(
    cpp_build: Build, sam3_golden: Golden, tmp_path: Path
) -> None:
    maps = sam3_golden.features["2"]
    manifest = sam3rt.open_bundle(sam3_golden.bundle).manifest
    from sam3rt.geometry import ImageGeometry

    wrong = ImageGeometry((48, 64), (720, 1008))
    write_embedding(tmp_path / "wrong", maps, wrong, manifest.fingerprint)
    result = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": sam3_golden.bundle},
            {"op": "load_embedding", "model": "m", "embedding": "e", "path": tmp_path / "wrong"},
        ]
    )[1]
    assert "geometry" in result.refusal("EmbeddingError")


def test_forged_headers(cpp_build: Build, tmp_path: Path) -> None:
    forge(tmp_path / "unchanged")
    assert cpp_build.one(**read_step(tmp_path / "unchanged")).error is None
    paths = []
    for number, change in enumerate(FORGERIES.values()):
        paths.append(tmp_path / f"forged{number}")
        forge(paths[-1], change)
    assert len(paths) > 50
    refused_by_both(cpp_build, paths)


def test_other_fingerprint(cpp_build: Build, tmp_path: Path) -> None:
    forge(tmp_path / "a")
    message = cpp_build.one(**read_step(tmp_path / "a", "f" * 64)).refusal("EmbeddingError")
    assert "encode the image again" in message


def test_what_is_no_embedding(cpp_build: Build, tmp_path: Path) -> None:
    paths = []
    for number, make in enumerate(NOT_FILES.values()):
        paths.append(tmp_path / f"not{number}")
        make(paths[-1])
    for number, header in enumerate(test_embedding.JSON_HEADERS):
        paths.append(tmp_path / f"header{number}")
        paths[-1].write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 700)
    refused_by_both(cpp_build, paths)


def test_damaged_files(cpp_build: Build, tmp_path: Path) -> None:
    forge(tmp_path / "valid")
    content = (tmp_path / "valid").read_bytes()
    rng = np.random.default_rng(3)
    damaged: list[bytes] = [content[:length] for length in range(0, len(content), 13)]
    damaged += [test_embedding.flip(content, bit) for bit in range(0, len(content) * 8, 29)]
    damaged += [content + b"\0", content + content, b"\0" * 8 + content]
    for length in (0, 1, 1 << 16, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        damaged.append(struct.pack("<Q", length) + content[8:])
    for _ in range(100):
        start, end = sorted(rng.integers(0, len(content), 2).tolist())
        other = content[:start] + rng.bytes(int(rng.integers(0, 200))) + content[end:]
        damaged += [other] if other != content else []
    paths = []
    for number, text in enumerate(damaged):
        paths.append(tmp_path / f"damaged{number}")
        paths[-1].write_bytes(text)
    refused_by_both(cpp_build, paths)


def test_header_that_reaches_into_blank_data(cpp_build: Build, tmp_path: Path) -> None:
    maps = random_maps()
    next(iter(maps.values())).reshape(-1)[:2] = np.frombuffer(b" " * 8, np.float32)
    write_embedding(tmp_path / "valid", maps, PLACE, FINGERPRINT)
    content = (tmp_path / "valid").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    paths = []
    for other in (length + 4, length + 8, length - 1):
        paths.append(tmp_path / str(other))
        paths[-1].write_bytes(struct.pack("<Q", other) + content[8:])
    refused_by_both(cpp_build, paths)


def test_failed_write_leaves_the_old_file(
    cpp_build: Build, mobile_sam_golden: Golden, tmp_path: Path
) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "taken").mkdir()  # a folder in the file's place: the last step fails
    steps: list[dict[str, Any]] = [
        {"op": "load_model", "model": "m", "path": mobile_sam_golden.bundle},
        {"op": "encode", "model": "m", "embedding": "e", "image": image},
        {"op": "save_embedding", "embedding": "e", "path": folder / "taken"},
    ]
    cpp_build.run(steps)[2].refusal("OSError")
    assert [path.name for path in folder.iterdir()] == ["taken"]
