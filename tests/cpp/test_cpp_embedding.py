"""Embeddings in C++ beyond the vectors: files that both runtimes write, and other models' files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from tests.support import vectors as stored
from tests.support.cpp_driver import Build, Step, as_prompts
from tests.support.helpers import noise

import sam3rt
from sam3rt.bundle import TensorSpec
from sam3rt.embedding import read_embedding, write_embedding
from sam3rt.geometry import ImageGeometry, geometry

CLICK = {"point_coords": [[30, 25]], "point_labels": [1]}


def test_written_files(cpp_build: Build, tmp_path: Path) -> None:
    """Any bits survive: what C++ writes, Python reads, and the other way round."""
    vectors = stored.load("embeddings")
    maps = stored.embedding_maps(vectors)
    fingerprint = vectors["fingerprint"]
    next(iter(maps.values())).reshape(-1)[:4] = [-3e38, 3e38, -0.0, 1e-40]
    image = ImageGeometry(tuple(vectors["original_size"]), tuple(vectors["input_size"]))
    write_embedding(tmp_path / "python", maps, image, fingerprint)
    written, read = cpp_build.run(
        [
            {
                "op": "write_embedding",
                "path": tmp_path / "cpp",
                "names": list(maps),
                "maps": list(maps.values()),
                "fingerprint": fingerprint,
                "original_size": image.original_size,
                "input_size": image.input_size,
            },
            {
                "op": "read_embedding",
                "path": tmp_path / "python",
                "fingerprint": fingerprint,
                "specs": [*vectors["maps"].items()],
            },
        ]
    )
    assert written.error is None
    assert read.value == [list(image.original_size), list(image.input_size)]
    specs = [TensorSpec(name, "float32", ("batch", *s)) for name, s in vectors["maps"].items()]
    found, geometry = read_embedding(tmp_path / "cpp", fingerprint, specs)
    assert geometry == image
    for number, expected in enumerate(maps.values()):
        for array in (found[number], read.arrays[str(number)]):
            np.testing.assert_array_equal(array.view(np.uint32), expected.view(np.uint32))


def test_embeddings_travel_both_ways(
    cpp_build: Build, model: sam3rt.SegmentationModel, tmp_path: Path
) -> None:
    """What one runtime encodes and saves, the other loads, and predicts the same from."""
    image = noise(50, 70)
    embedding = model.encode(image)
    maps = embedding.numpy()
    embedding.save(tmp_path / "python")
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": model.bundle.path},
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
    assert results[1].value["names"] == list(maps)
    assert results[1].value["nbytes"] == sum(a.nbytes for a in maps.values())
    for index, array in enumerate(maps.values()):
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
    cpp_build: Build, tiny_sam3: Path, toy_model: sam3rt.SegmentationModel, tmp_path: Path
) -> None:
    image = noise(48, 64)
    path = tmp_path / "image.embedding"
    # A folder in a file's place: the last step of a write fails.
    (tmp_path / "taken").mkdir()
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "sam3", "path": tiny_sam3},
            {"op": "load_model", "model": "mobile", "path": toy_model.bundle.path},
            {"op": "encode", "model": "mobile", "embedding": "e", "image": image},
            {"op": "save_embedding", "embedding": "e", "path": path},
            {"op": "load_embedding", "model": "sam3", "embedding": "x", "path": path},
            {"op": "decode", "model": "sam3", "embedding": "e", "prompts": as_prompts(CLICK)},
            {"op": "save_embedding", "embedding": "e", "path": tmp_path / "none" / "e"},
            {"op": "save_embedding", "embedding": "e", "path": tmp_path / "taken"},
        ]
    )
    assert "another model" in results[4].refusal("EmbeddingError")
    assert "encode the image again" in results[5].refusal("EmbeddingError")
    for result, taken in zip(results[6:], ("none/e", "taken"), strict=True):
        # Of the file that was to be written, and not of one that nobody knows of.
        message = result.refusal("OSError")
        assert message.endswith(f": {tmp_path / taken}") or f"{tmp_path / taken}:" in message
        assert ".tmp" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.embedding", "taken"]


def test_geometry_of_another_resize_rule(
    cpp_build: Build, tiny_model: sam3rt.SegmentationModel, tmp_path: Path
) -> None:
    maps = tiny_model.encode(noise(48, 64)).numpy()
    wrong = ImageGeometry((48, 64), (720, 1008))
    write_embedding(tmp_path / "wrong", maps, wrong, tiny_model.manifest.fingerprint)
    result = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": tiny_model.bundle.path},
            {"op": "load_embedding", "model": "m", "embedding": "e", "path": tmp_path / "wrong"},
        ]
    )[1]
    assert "geometry" in result.refusal("EmbeddingError")


def test_header_that_reaches_into_blank_data(cpp_build: Build, tmp_path: Path) -> None:
    """The digest covers header and data but not where one ends."""
    vectors = stored.load("embeddings")
    maps = stored.embedding_maps(vectors)
    next(iter(maps.values())).reshape(-1)[:2] = np.frombuffer(b" " * 8, np.float32)
    image = ImageGeometry(tuple(vectors["original_size"]), tuple(vectors["input_size"]))
    write_embedding(tmp_path / "valid", maps, image, vectors["fingerprint"])
    content = (tmp_path / "valid").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    step = {
        "op": "read_embedding",
        "fingerprint": vectors["fingerprint"],
        "specs": [*vectors["maps"].items()],
    }
    steps: list[Step] = [{**step, "path": tmp_path / "valid"}]
    for other in (length + 4, length + 8, length - 1):
        (tmp_path / str(other)).write_bytes(struct.pack("<Q", other) + content[8:])
        steps.append({**step, "path": tmp_path / str(other)})
    valid, *forged = cpp_build.run(steps)
    assert valid.error is None
    for result in forged:
        result.refusal("EmbeddingError")


@pytest.mark.parametrize("huge", [slice(None), slice(1)], ids=["all", "finest"])
def test_values_that_are_not_finite(
    cpp_build: Build, tiny_model: sam3rt.SegmentationModel, tmp_path: Path, huge: slice
) -> None:
    """Maps of huge values give values that are no numbers: no call returns masks made of them.

    The finest map is in no score.
    """
    manifest = tiny_model.manifest
    names = [spec.name for spec in manifest.encoder.outputs]
    forged = {
        spec.name: np.full(
            (1, *spec.shape[1:]),  # type: ignore[arg-type]
            3e38 if spec.name in names[huge] else 0.1,
            np.float32,
        )
        for spec in manifest.encoder.outputs
    }
    inside = geometry(manifest.image, (300, 451))
    write_embedding(tmp_path / "forged", forged, inside, manifest.fingerprint)
    results = cpp_build.run(
        [
            {"op": "load_model", "model": "m", "path": tiny_model.bundle.path},
            {"op": "load_embedding", "model": "m", "embedding": "e", "path": tmp_path / "forged"},
            {"op": "decode", "model": "m", "embedding": "e", "prompts": as_prompts(CLICK)},
        ]
    )
    assert results[1].error is None
    assert "not finite" in results[2].refusal("BackendError")
