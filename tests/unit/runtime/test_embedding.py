"""Tests of `sam3rt.embedding`: files that come back bit for bit, or are refused.

Single forgeries, on which all runtimes agree, are in ``tests/conformance/embeddings.json``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.support.helpers import examples, flip, noise
from tests.support.vectors import VECTORS

from sam3rt import (
    EmbeddingError,
    ImageEmbedding,
    InvalidInputError,
    Prompts,
    SAM3InteractiveImagePredictor,
    SegmentationModel,
    load_model,
)
from sam3rt.bundle import TensorSpec
from sam3rt.embedding import read_embedding, write_embedding
from sam3rt.geometry import ImageGeometry

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
Maps = dict[str, NDArray[np.float32]]

SPECS = (
    TensorSpec("image_embeddings.0", "float32", ("batch", 4, 6, 5)),
    TensorSpec("image_embeddings.1", "float32", ("batch", 8, 3, 2)),
)
FINGERPRINT = hashlib.sha256(b"a bundle").hexdigest()
OTHER = hashlib.sha256(b"another bundle").hexdigest()
PLACE = ImageGeometry((480, 640), (1008, 1008))
CLICK = Prompts(point_coords=[[30, 25]], point_labels=[1])


def random_maps(seed: int = 0) -> Maps:
    """Feature maps that fit SPECS."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.normal(size=(1, *spec.shape[1:])).astype(np.float32)  # type: ignore[arg-type]
        for spec in SPECS
    }


def read(path: Path) -> tuple[list[NDArray[np.float32]], ImageGeometry]:
    return read_embedding(path, FINGERPRINT, SPECS)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid embedding file for SPECS."""
    path = tmp_path_factory.mktemp("valid") / "a.emb"
    write_embedding(path, random_maps(), PLACE, FINGERPRINT)
    return path.read_bytes()


def forge(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda header: None,
    data: bytes | None = None,
) -> None:
    """Write a file with a changed header whose digest fits again."""
    maps = random_maps()
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "sam3rt-embedding-1",
            "fingerprint": FINGERPRINT,
            "original_size": "480 640",
            "input_size": "1008 1008",
            "sha256": "0" * 64,
        }
    }
    offset = 0
    for name, array in maps.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    change(header)
    body = b"".join(a.tobytes() for a in maps.values()) if data is None else data
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text + body).hexdigest()
    text = text.replace(b"0" * 64, digest.encode(), 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def plain_safetensors(path: Path) -> tuple[dict[str, str], Maps]:
    """A reader of the safetensors layout that knows nothing of this package."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    maps = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "F32"
        maps[name] = np.frombuffer(raw[start:end], "<f4").reshape(entry["shape"])
    return metadata, maps


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@contextlib.contextmanager
def less_memory_than(limit: int) -> Iterator[None]:
    """Assert that the block never holds this many bytes more than at its start."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


# --- round trips ----------------------------------------------------------------------------------


@given(
    first=hnp.arrays(np.float32, (1, 4, 6, 5), elements=FINITE),
    second=hnp.arrays(np.float32, (1, 8, 3, 2), elements=FINITE),
    size=st.tuples(st.integers(1, 16_000), st.integers(1, 16_000)),
)
@examples(40)
def test_any_numbers_survive_the_file(
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    size: tuple[int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Denormals and negative zeros included."""
    path = tmp_path_factory.mktemp("bits") / "a.emb"
    maps = dict(zip((spec.name for spec in SPECS), (first, second), strict=True))
    place = ImageGeometry(size, (1008, 1008))
    write_embedding(path, maps, place, FINGERPRINT)
    loaded, loaded_place = read(path)
    assert loaded_place == place
    for actual, expected in zip(loaded, maps.values(), strict=True):
        same_bits(actual, expected)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_maps_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.emb"
    maps = random_maps()
    maps["image_embeddings.1"].reshape(-1)[-1] = value
    forge(path, data=b"".join(array.tobytes() for array in maps.values()))
    with pytest.raises(EmbeddingError, match=r"a\.emb.*image_embeddings\.1 holds NaN"):
        read(path)
    with pytest.raises(EmbeddingError, match="holds NaN"):
        write_embedding(tmp_path / "b.emb", maps, PLACE, FINGERPRINT)
    assert not (tmp_path / "b.emb").exists()


def test_a_file_of_the_first_release_is_written_again_byte_for_byte() -> None:
    old = (VECTORS / "version1.embedding").read_bytes()
    assert ImageEmbedding.from_bytes(old).to_bytes() == old


def test_strided_maps_are_written_in_order(tmp_path: Path) -> None:
    maps = random_maps()
    views = {name: np.asfortranarray(array) for name, array in maps.items()}
    write_embedding(tmp_path / "a.emb", views, PLACE, FINGERPRINT)
    for actual, expected in zip(read(tmp_path / "a.emb")[0], maps.values(), strict=True):
        same_bits(actual, expected)


def test_forged_file_without_changes_is_read(tmp_path: Path) -> None:
    """Otherwise every refusal of a forged file below would be one of the forging."""
    forge(tmp_path / "a.emb")
    for actual, expected in zip(read(tmp_path / "a.emb")[0], random_maps().values(), strict=True):
        same_bits(actual, expected)


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.emb"
    write_embedding(path, random_maps(), PLACE, FINGERPRINT)
    metadata, maps = plain_safetensors(path)
    assert metadata["fingerprint"] == FINGERPRINT
    assert metadata["original_size"] == "480 640"
    assert metadata["input_size"] == "1008 1008"
    assert list(maps) == [spec.name for spec in SPECS]
    for name, array in random_maps().items():
        same_bits(maps[name], array)
    raw = path.read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0  # the data are aligned
    blank = raw[8:].replace(metadata["sha256"].encode(), b"0" * 64, 1)
    assert hashlib.sha256(blank).hexdigest() == metadata["sha256"]


@pytest.fixture(scope="module")
def embedding(model: SegmentationModel) -> ImageEmbedding:
    """An image of 50 x 70 pixels, encoded."""
    return model.encode(noise(50, 70))


@pytest.fixture
def saved(embedding: ImageEmbedding, tmp_path: Path) -> Path:
    """The embedding's file."""
    embedding.save(tmp_path / "image.emb")
    return tmp_path / "image.emb"


def test_saved_embedding_is_the_same_and_predicts_the_same(
    model: SegmentationModel, embedding: ImageEmbedding, saved: Path
) -> None:
    loaded = model.load_embedding(str(saved))
    saved.unlink()
    assert loaded.geometry == embedding.geometry
    assert loaded.original_size == embedding.original_size == (50, 70)
    assert loaded.fingerprint == embedding.fingerprint == model.manifest.fingerprint
    assert loaded.names == embedding.names
    assert loaded.nbytes == embedding.nbytes == sum(a.nbytes for a in loaded.numpy().values())
    for name, array in embedding.numpy().items():
        same_bits(loaded.numpy()[name], array)
    for multimask in (True, False):
        actual = model.decode(loaded, CLICK, multimask)
        expected = model.decode(embedding, CLICK, multimask)
        same_bits(actual.low_res_masks, expected.low_res_masks)
        same_bits(actual.iou_predictions, expected.iou_predictions)


def test_predictor_with_a_loaded_embedding(
    model: SegmentationModel, embedding: ImageEmbedding, saved: Path
) -> None:
    results = []
    for value in (embedding, model.load_embedding(saved)):
        predictor = SAM3InteractiveImagePredictor(model)
        predictor.set_embedding(value)
        results.append(predictor.predict([[30, 25]], [1], return_logits=True))
    assert results[0][0].shape == (3, 50, 70)
    for first, second in zip(*results, strict=True):
        same_bits(first, second)


def test_predictor_wants_an_embedding(tiny_model: SegmentationModel) -> None:
    predictor = SAM3InteractiveImagePredictor(tiny_model)
    for wrong in (None, "image.emb", noise(5, 5)):
        with pytest.raises(InvalidInputError) as caught:
            predictor.set_embedding(wrong)  # type: ignore[arg-type]
        assert caught.value.argument == "embedding"


def test_embedding_is_a_value(model: SegmentationModel, embedding: ImageEmbedding) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        embedding.fingerprint = OTHER  # type: ignore[misc]
    before = model.decode(embedding, CLICK)
    for array in embedding.numpy().values():
        array[:] = 7
    same_bits(model.decode(embedding, CLICK).low_res_masks, before.low_res_masks)


def test_bytes_are_the_files_content(
    model: SegmentationModel, embedding: ImageEmbedding, saved: Path
) -> None:
    content = embedding.to_bytes()
    assert content == saved.read_bytes() == embedding.to_bytes()
    for form in (content, bytearray(content), memoryview(content)):
        again = ImageEmbedding.from_bytes(form)
        assert again.to_bytes() == content
        assert (again.names, again.geometry) == (embedding.names, embedding.geometry)
        assert again.nbytes == embedding.nbytes
    expected = model.decode(embedding, CLICK).low_res_masks
    same_bits(model.decode(again, CLICK).low_res_masks, expected)
    on_device = model.upload(again)
    assert type(on_device.features) is type(embedding.features)
    assert model.upload(on_device) is on_device
    assert model.upload(embedding) is embedding
    same_bits(model.segment(again, CLICK)[0].low_res_masks, expected)


@pytest.mark.parametrize("wrong", [None, "text", 3, [1, 2]])
def test_what_is_no_bytes_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ImageEmbedding.from_bytes(wrong)
    assert caught.value.argument == "content"


def test_damaged_bytes_are_refused(content: bytes) -> None:
    for damaged in (b"", content[:-1], content + b"x", content[:8], flip(content, 8000)):
        with pytest.raises(EmbeddingError):
            ImageEmbedding.from_bytes(damaged)


def test_bytes_of_other_maps_are_refused(model: SegmentationModel, content: bytes) -> None:
    """The fingerprint may be right all the same: it is not a secret."""
    embedding = ImageEmbedding.from_bytes(content)
    with pytest.raises(EmbeddingError, match="encode the image again"):
        model.decode(embedding, CLICK)
    forged = dataclasses.replace(embedding, fingerprint=model.manifest.fingerprint)
    with pytest.raises(EmbeddingError, match="holds the feature maps"):
        model.decode(forged, CLICK)
    with pytest.raises(EmbeddingError, match="holds the feature maps"):
        SAM3InteractiveImagePredictor(model).set_embedding(forged)


def test_a_geometry_of_bytes_is_the_models(tiny_model: SegmentationModel) -> None:
    embedding = tiny_model.encode(noise(50, 70))
    wrong = dataclasses.replace(embedding, geometry=ImageGeometry((50, 70), (720, 1008)))
    with pytest.raises(EmbeddingError, match="geometry"):
        tiny_model.decode(ImageEmbedding.from_bytes(wrong.to_bytes()), CLICK)


def test_a_pickled_embedding_serves_in_another_process(
    default_model: SegmentationModel,
) -> None:
    embedding = default_model.encode(noise(50, 70))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(embedding, protocol))
        assert again.to_bytes() == embedding.to_bytes()
    assert copy.deepcopy(embedding).to_bytes() == embedding.to_bytes()
    expected = SAM3InteractiveImagePredictor(default_model)
    expected.set_embedding(embedding)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        masks, scores, _ = pool.submit(click_in_another_process, embedding).result(timeout=120)
    wanted = expected.predict([[30, 25]], [1])
    np.testing.assert_array_equal(masks, wanted[0])
    same_bits(scores, wanted[1])


def click_in_another_process(embedding: ImageEmbedding) -> Any:
    predictor = SAM3InteractiveImagePredictor(load_model(backend="onnxruntime", device="cpu"))
    predictor.set_embedding(embedding)
    return predictor.predict([[30, 25]], [1])


def test_an_embedding_as_a_numpy_array_is_its_coarsest_map(embedding: ImageEmbedding) -> None:
    """It was an object array without axes."""
    coarsest = embedding.numpy()[embedding.names[-1]]
    array = np.asarray(embedding)
    same_bits(array, coarsest)
    array[:] = 7
    same_bits(np.array(embedding), coarsest)
    same_bits(np.from_dlpack(embedding), coarsest)
    assert np.asarray(embedding, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="always a copy"):
        embedding.__array__(copy=False)


def test_an_embedding_says_what_it_is(embedding: ImageEmbedding) -> None:
    text = repr(embedding)
    for part in ("70 x 50", " MB", "cpu", embedding.fingerprint[:16]):
        assert part in text
    assert len(text) < 200


def test_map_shapes_are_those_of_the_manifest(
    model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    outputs = model.manifest.encoder.outputs
    assert [(n, a.shape[1:]) for n, a in embedding.numpy().items()] == [
        (spec.name, spec.shape[1:]) for spec in outputs
    ]


# --- other models ---------------------------------------------------------------------------------


def test_other_models_file_is_refused(
    tiny_model: SegmentationModel,
    toy_model: SegmentationModel,
    embedding: ImageEmbedding,
    saved: Path,
) -> None:
    own = embedding.fingerprint == tiny_model.manifest.fingerprint
    with pytest.raises(EmbeddingError, match=r"another model|encode the image again"):
        (toy_model if own else tiny_model).load_embedding(saved)


def test_other_models_embedding_is_refused(
    tiny_model: SegmentationModel, toy_model: SegmentationModel, embedding: ImageEmbedding
) -> None:
    own = embedding.fingerprint == tiny_model.manifest.fingerprint
    other = toy_model if own else tiny_model
    with pytest.raises(EmbeddingError, match="encode the image again"):
        other.decode(embedding, CLICK)


def test_the_same_bundle_loaded_again_takes_the_embedding(
    model: SegmentationModel, embedding: ImageEmbedding, saved: Path
) -> None:
    again = load_model(model.bundle.path, device="cpu")
    expected = model.decode(embedding, CLICK).low_res_masks
    same_bits(again.decode(embedding, CLICK).low_res_masks, expected)
    same_bits(again.decode(again.load_embedding(saved), CLICK).low_res_masks, expected)


def test_geometry_of_another_resize_rule_is_refused(
    tiny_model: SegmentationModel, tmp_path: Path
) -> None:
    embedding = tiny_model.encode(noise(50, 70))
    path = tmp_path / "a.emb"
    wrong = ImageGeometry((50, 70), (720, 1008))
    write_embedding(path, embedding.numpy(), wrong, embedding.fingerprint)
    with pytest.raises(EmbeddingError, match="geometry"):
        tiny_model.load_embedding(path)


# --- damage ---------------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emb"
    for bit in range(len(content) * 8):
        path.write_bytes(flip(content, bit))
        with pytest.raises(EmbeddingError):
            read(path)


def test_file_cut_anywhere_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.emb"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(EmbeddingError):
            read(path)


@pytest.mark.parametrize("count", [1, 8, 4096, 1 << 17])
def test_longer_file_is_refused(content: bytes, tmp_path: Path, count: int) -> None:
    for longer in (content + b"\0" * count, b"\0" * count + content, content + content):
        (tmp_path / "a.emb").write_bytes(longer)
        with pytest.raises(EmbeddingError):
            read(tmp_path / "a.emb")


@given(data=st.data())
@examples(150)
def test_any_damage_is_refused(
    content: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 200)))
    damaged = content[:start] + data.draw(st.binary(max_size=200)) + content[end:]
    if damaged == content:
        return
    path = tmp_path_factory.mktemp("damage") / "a.emb"
    path.write_bytes(damaged)
    with pytest.raises(EmbeddingError):
        read(path)


def test_header_that_reaches_into_blank_data_is_refused(tmp_path: Path) -> None:
    # The digest covers header and data but not where one ends. JSON ignores blanks at its end, so
    # with data that begin with blanks the header may be read eight bytes longer.
    maps = random_maps()
    first = next(iter(maps.values()))
    first.reshape(-1)[:2] = np.frombuffer(b" " * 8, np.float32)
    path = tmp_path / "a.emb"
    write_embedding(path, maps, PLACE, FINGERPRINT)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    read(path)
    for other in (length + 4, length + 8, length - 1):
        path.write_bytes(struct.pack("<Q", other) + content[8:])
        with pytest.raises(EmbeddingError):
            read(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 16, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_header_length_is_not_trusted(content: bytes, tmp_path: Path, length: int) -> None:
    (tmp_path / "a.emb").write_bytes(struct.pack("<Q", length) + content[8:])
    with less_memory_than(1 << 20), pytest.raises(EmbeddingError):
        read(tmp_path / "a.emb")


TERABYTE = 1 << 40
FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    # These two are here for what they must not take.
    "shape of a terabyte": lambda h: h["image_embeddings.0"].update(shape=[1, TERABYTE, 6, 5]),
    "offset of a terabyte": lambda h: h["image_embeddings.1"].update(
        data_offsets=[480, 480 + TERABYTE]
    ),
    # int() itself refuses more than 4300 digits, with ValueError.
    "size of 5000 digits": lambda h: h["__metadata__"].update(original_size="9" * 5000 + " 1"),
    "digest that is not UTF-8": lambda h: h["__metadata__"].update(sha256="\ud800" * 64),
    "fingerprint that is not UTF-8": lambda h: h["__metadata__"].update(fingerprint="\ud800"),
    "deep nesting": lambda h: h.update(deep=json.loads("[" * 500 + "]" * 500)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_header_with_a_fitting_digest_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.emb"
    forge(path, FORGERIES[name])
    with less_memory_than(1 << 20), pytest.raises(EmbeddingError) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [b"\xff" * 8, b"[" * 60_000], ids=lambda h: repr(h[:10]))
def test_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.emb"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 700)
    with pytest.raises(EmbeddingError, match=r"a\.emb"):
        read(path)


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "link to itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "zeros": lambda path: path.write_bytes(bytes(1200)),
    "ones": lambda path: path.write_bytes(b"\xff" * 1200),
    "npz": lambda path: np.savez(path.open("wb"), **random_maps()),  # type: ignore[arg-type]
    "far too large": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_embedding_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.emb"
    NOT_FILES[kind](path)
    with pytest.raises(EmbeddingError, match=r"a\.emb"):
        read(path)


def test_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(random_maps(), tmp_path / "a.emb")
    with pytest.raises(EmbeddingError):
        read(tmp_path / "a.emb")


# --- many embeddings, many threads ----------------------------------------------------------------


def test_hundreds_of_embeddings_are_held(tiny_model: SegmentationModel, tmp_path: Path) -> None:
    images = [noise(40, 60, seed) for seed in range(3)]
    expected = []
    for index, image in enumerate(images):
        embedding = tiny_model.encode(image)
        embedding.save(tmp_path / f"{index}.emb")
        expected.append(tiny_model.decode(embedding, CLICK).low_res_masks)
    assert not np.array_equal(expected[0], expected[1])
    held = [tiny_model.load_embedding(tmp_path / f"{i % 3}.emb") for i in range(201)]
    assert len({id(e.features) for e in held}) == 201
    for index in (200, 0, 100, 1, 199, 2):
        masks = tiny_model.decode(held[index], CLICK).low_res_masks
        same_bits(masks, expected[index % 3])
