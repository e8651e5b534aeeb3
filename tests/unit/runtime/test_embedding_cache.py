"""The embedding cache: bounded, least recently used first out, pinned entries stay, files too."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples, noise
from tests.support.runnable_bundle import runnable_bundle

from sam3rt import ImageEmbedding, InvalidInputError, SegmentationModel, StateError, load_model
from sam3rt.embedding_cache import CacheFullError, EmbeddingCache


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SegmentationModel:
    bundle = runnable_bundle(tmp_path_factory.mktemp("bundles") / "toy")
    return load_model(bundle.path, backend="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def embed(model: SegmentationModel) -> Callable[[int], ImageEmbedding]:
    made = {seed: model.encode(noise(8, 8, seed)) for seed in range(8)}
    return made.__getitem__


@pytest.fixture(scope="module")
def size(embed: Callable[[int], ImageEmbedding]) -> int:
    return embed(0).nbytes


def refused(*arguments: object, **options: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def held(cache: EmbeddingCache, key: str) -> ImageEmbedding | None:
    with cache.use(key) as embedding:
        return embedding


def test_what_was_used_longest_ago_makes_room(
    model: SegmentationModel, embed: Callable[[int], ImageEmbedding], size: int
) -> None:
    cache = EmbeddingCache(model, 2 * size)
    cache.add("a", embed(0))
    cache.add("b", embed(1))
    assert held(cache, "a") is embed(0)
    cache.add("c", embed(2))
    assert held(cache, "b") is None
    assert held(cache, "a") is embed(0)
    assert held(cache, "c") is embed(2)
    found = cache.statistics()
    assert (found.entries, found.bytes, found.evictions) == (2, 2 * size, 1)
    assert (found.hits, found.misses) == (3, 1)


def test_what_is_in_use_stays(
    model: SegmentationModel, embed: Callable[[int], ImageEmbedding], size: int
) -> None:
    cache = EmbeddingCache(model, 2 * size)
    cache.add("a", embed(0))
    cache.add("b", embed(1))
    with cache.use("a") as first:
        cache.add("c", embed(2))  # b leaves, although a is older
        assert first is embed(0)
        with cache.use("c"), pytest.raises(CacheFullError):
            cache.add("d", embed(3))
    assert held(cache, "a") is embed(0)
    assert cache.statistics().bytes == 2 * size
    cache.add("d", embed(3))
    assert held(cache, "d") is embed(3)


def test_a_key_stands_for_one_image(
    model: SegmentationModel, embed: Callable[[int], ImageEmbedding], size: int
) -> None:
    cache = EmbeddingCache(model, 2 * size)
    cache.add("a", embed(0))
    cache.add("a", embed(1))
    assert held(cache, "a") is embed(0)
    assert cache.statistics().bytes == size
    assert cache.discard("a")
    assert not cache.discard("a")
    assert cache.statistics().bytes == 0


def test_an_embedding_larger_than_the_cache_is_refused(
    model: SegmentationModel, embed: Callable[[int], ImageEmbedding], size: int
) -> None:
    cache = EmbeddingCache(model, size - 1)
    with pytest.raises(StateError, match=f"{size} bytes"):
        cache.add("a", embed(0))


@pytest.mark.parametrize("name", ["max_bytes", "max_folder_bytes"])
def test_bounds_are_positive(model: SegmentationModel, name: str) -> None:
    for wrong in (0, "1 GB", float("nan")):
        with pytest.raises(InvalidInputError, match=f"^{name}: "):
            EmbeddingCache(model, **({"max_bytes": 1} | {name: wrong}))


def test_the_folder_keeps_what_had_to_leave(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
) -> None:
    cache = EmbeddingCache(model, size, tmp_path)
    cache.add("a", embed(0))
    cache.add("../b", embed(1))
    for key, seed in (("a", 0), ("../b", 1)):
        found = held(cache, key)
        assert found is not None
        for array, expected in zip(
            found.numpy().values(), embed(seed).numpy().values(), strict=True
        ):
            np.testing.assert_array_equal(array, expected)
    found = cache.statistics()
    assert (found.loads, found.hits, found.entries) == (2, 0, 1)
    # Another process, or this one after a restart.
    other = EmbeddingCache(model, size, tmp_path)
    assert held(other, "a") is not None
    assert cache.discard("a")
    assert held(EmbeddingCache(model, size, tmp_path), "a") is None
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [
        tmp_path / model.manifest.fingerprint[:32]
    ]


def test_the_folder_is_bounded(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
) -> None:
    cache = EmbeddingCache(model, 8 * size, tmp_path)
    cache.add("0", embed(0))
    (file,) = tmp_path.rglob("*.safetensors")
    cache = EmbeddingCache(model, size, tmp_path, max_folder_bytes=2 * file.stat().st_size)
    os.utime(file, (1, 1))
    cache.add("1", embed(1))
    for other in set(tmp_path.rglob("*.safetensors")) - {file}:
        os.utime(other, (2, 2))
    assert held(cache, "0") is not None  # which makes it the newest
    cache.add("2", embed(2))
    assert file.exists()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_a_miss(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
    damage: str,
) -> None:
    EmbeddingCache(model, size, tmp_path).add("a", embed(0))
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + b"\xff")
    cache = EmbeddingCache(model, size, tmp_path)
    assert held(cache, "a") is None
    assert cache.statistics().folder_errors == 1
    assert not file.exists()
    cache.add("a", embed(0))
    assert file.read_bytes() == content


def test_a_file_that_cannot_be_read_now_stays(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too many files may be open, or a share may be away for a moment."""
    EmbeddingCache(model, size, tmp_path).add("a", embed(0))
    cache = EmbeddingCache(model, size, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        assert held(cache, "a") is None
    assert cache.statistics().folder_errors == 1
    assert held(cache, "a") is not None


def test_files_of_another_user_are_used(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    EmbeddingCache(model, size, tmp_path).add("a", embed(0))
    cache = EmbeddingCache(model, size, tmp_path)
    monkeypatch.setattr("sam3rt.embedding_cache.os.utime", refused)
    assert held(cache, "a") is not None
    assert cache.statistics().folder_errors == 0


def test_a_folder_that_cannot_be_written_loses_nothing(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
) -> None:
    cache = EmbeddingCache(model, size, tmp_path)
    (folder,) = tmp_path.iterdir()
    folder.rmdir()
    folder.write_text("not a folder")
    cache.add("a", embed(0))
    assert held(cache, "a") is embed(0)
    assert cache.statistics().folder_errors == 1


def test_several_threads_load_a_file_once(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    tmp_path: Path,
) -> None:
    EmbeddingCache(model, size, tmp_path).add("a", embed(0))
    cache = EmbeddingCache(model, size, tmp_path)
    start = threading.Barrier(8)
    seen = []

    def use() -> None:
        start.wait()
        seen.append(held(cache, "a"))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len({id(one) for one in seen}) == 1
    assert cache.statistics().loads == 1


@examples(100)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "use", "discard", "pin", "unpin"]), st.integers(0, 7)),
        max_size=40,
    ),
    room=st.integers(1, 4),
)
def test_it_is_what_a_plain_list_would_be(
    model: SegmentationModel,
    embed: Callable[[int], ImageEmbedding],
    size: int,
    steps: list[tuple[str, int]],
    room: int,
) -> None:
    cache = EmbeddingCache(model, room * size)
    order: list[int] = []  # least recently used first
    pinned: list[tuple[int, object]] = []
    for step, key in steps:
        if step == "add":
            loose = [k for k in order if k not in {p for p, _ in pinned}]
            if key not in order and len(order) == room and not loose:
                with pytest.raises(CacheFullError):
                    cache.add(str(key), embed(key))
                continue
            cache.add(str(key), embed(key))
            if key in order:
                order.remove(key)
            elif len(order) == room:
                order.remove(loose[0])
            order.append(key)
        elif step == "discard":
            if key in {p for p, _ in pinned}:
                continue
            assert cache.discard(str(key)) == (key in order)
            order = [k for k in order if k != key]
        elif step == "unpin" and pinned:
            pinned.pop(0)[1].__exit__(None, None, None)  # type: ignore[attr-defined]
        elif step in ("use", "pin"):
            block = cache.use(str(key))
            found = block.__enter__()
            assert (found is not None) == (key in order)
            if key in order:
                order.remove(key)
                order.append(key)
            if step == "pin" and found is not None:
                pinned.append((key, block))
            else:
                block.__exit__(None, None, None)
        assert cache.statistics().bytes == len(order) * size
    assert [k for k in range(8) if held(cache, str(k)) is not None] == sorted(order)
