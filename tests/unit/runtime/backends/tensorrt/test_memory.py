"""Device memory: what calls take, what they give back, limits, and the end of a model."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.fake_cuda import FakeCuda
from tests.support.helpers import examples
from tests.support.tensorrt_helpers import MAX_OBJECTS, MAX_POINTS, Rig, make_rig

from sam3rt import (
    BackendError,
    GpuOptions,
    ImageEmbedding,
    InvalidInputError,
    Prompts,
    StateError,
    load_model,
)
from sam3rt.backends.tensorrt.backend import allow_imaging
from sam3rt.backends.tensorrt.buffers import GrowingBuffer
from sam3rt.backends.tensorrt.lane import Replay
from sam3rt.backends.tensorrt.memory import Layout, Memory, aligned

PROMPTS = Prompts([[225, 150]], [1])


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = make_rig(tiny_sam3, tmp_path, monkeypatch)
    rig.build()
    return rig


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        raise error

    return call


class Recordable:
    """A context that may be recorded, and does nothing else here."""

    def check_capturable(self, stream: int) -> None:
        pass


def many(objects: int) -> Prompts:
    rng = np.random.default_rng(objects)
    return Prompts(rng.uniform(0, 300, (objects, 3, 2)), np.ones((objects, 3)))


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["f2", "f4", "i8", "u1"]))))
@examples(60)
def test_tensors_lie_apart_and_aligned(tensors: list[tuple[int, str]]) -> None:
    layout = Layout((str(i), (n,), np.dtype(t)) for i, (n, t) in enumerate(tensors))
    end = 0
    for slot in layout.slots.values():
        assert slot.offset >= end
        assert slot.offset % 256 == 0
        end = slot.offset + slot.nbytes
    assert layout.nbytes == end


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_aligned(nbytes: int, expected: int) -> None:
    assert aligned(nbytes) == expected


def test_a_buffer_grows_at_once_and_shrinks_when_it_has_long_been_too_large() -> None:
    cuda = FakeCuda()
    with cuda.active():
        buffer = GrowingBuffer(Memory(cuda))
        sizes = [buffer.block(n).nbytes for n in (100, 50, 300, 200)]
        assert sizes == [100, 100, 300, 300]
        sizes = [buffer.block(120).nbytes for _ in range(130)]
        assert sizes[0] == 300
        assert sizes[-1] == 120
        # More than half of it is used now and then: it stays.
        kept = {buffer.block(120 if i % 30 else 70).nbytes for i in range(200)}
        assert kept == {120}
        pinned = [len(buffer.pinned(n)) for n in (10, 500, *[20] * 130)]
        assert pinned[1] == 500
        assert cuda.live["pinned"] <= 3


def test_what_a_buffer_could_not_get_is_not_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(total=1 << 20)
    with cuda.active():
        buffer = GrowingBuffer(Memory(cuda))
        buffer.block(100)
        with pytest.raises(BackendError, match="out of device memory"):
            buffer.block(1 << 21)
        assert buffer.block(100).nbytes == 100
        with monkeypatch.context() as short:
            short.setattr(cuda, "allocate_host", raises(BackendError("no more can be pinned")))
            with pytest.raises(BackendError, match="no more can be pinned"):
                buffer.pinned(1 << 21)
        assert len(buffer.pinned(100)) == 100
        assert sum(array.nbytes for array in cuda._pinned.values()) == 100


def test_a_recording_that_is_interrupted_ends() -> None:
    cuda = FakeCuda()
    with cuda.active():
        stream = cuda.create_stream()

        def work() -> None:
            if cuda.is_capturing(stream):
                raise KeyboardInterrupt

        replay = Replay(work, Recordable(), Memory(cuda), stream, 0)
        replay.queue()
        with pytest.raises(KeyboardInterrupt):
            replay.record()
        assert not cuda.is_capturing(stream)
        assert cuda.live["graphs"] == 0


def test_lent_memory_is_the_callers_until_the_last_array_over_it_is_gone() -> None:
    cuda = FakeCuda()
    memory = Memory(cuda)
    with cuda.active():
        first = memory.lend(1000)
        assert first is not None
        first[:] = 7
        view = first.reshape(10, 100)[3:].view(np.bool_)
        address = first.ctypes.data
        del first
        gc.collect()
        second = memory.lend(1000)
        assert second is not None
        assert second.ctypes.data != address
        second[:] = 9
        assert view.tobytes() == bytes([7]) * 700
        del view
        third = memory.lend(2000)
        assert third is not None
        assert third.ctypes.data == address
        assert cuda.live["pinned"] == 2


def test_no_more_than_a_limit_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3rt.backends.tensorrt.memory._MOST_LENT", 4 << 20)
    cuda = FakeCuda()
    memory = Memory(cuda)
    with cuda.active():
        held = [memory.lend(1 << 20) for _ in range(4)]
        assert all(array is not None for array in held)
        assert memory.lend(1) is None
        held.clear()
        # Another size: what is spare makes room for it.
        large = memory.lend(3 << 20)
        assert large is not None
        assert cuda.live["pinned"] == 1


def test_results_that_are_dropped_together_are_lent_again() -> None:
    cuda = FakeCuda()
    memory = Memory(cuda)
    with cuda.active():
        held = [memory.lend(size << 20) for size in (7, 1) for _ in range(16)]
        pinned = cuda.live["pinned"]
        held.clear()
        held += [memory.lend(size << 20) for size in (1, 7) for _ in range(16)]
        assert all(array is not None for array in held)
        assert cuda.live["pinned"] == pinned == 32


def test_masks_beyond_what_may_be_lent_are_the_same(
    rig: Rig, chelsea: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def masks(most: int, dtype: type) -> NDArray[np.uint8]:
        monkeypatch.setattr("sam3rt.backends.tensorrt.memory._MOST_LENT", most)
        model = rig.model()
        allow_imaging(model.backend)
        # More than the backend makes at once.
        monkeypatch.setattr("sam3rt.backends.tensorrt.runs._MOST_MASKS", 2 * 3 * 300 * 451)
        found = [
            model.segment(model.encode(chelsea), many(5), dtype=dtype, max_hole_area=4)[1]
            for _ in range(2)
        ]
        # A later call does not write into what an earlier one gave.
        assert np.array_equal(*found)
        model.close()
        return found[0]

    lent, copied = masks(64 << 20, np.uint8), masks(0, np.uint8)
    assert lent.any()
    assert np.array_equal(lent, copied)
    assert masks(64 << 20, np.bool_).dtype == np.bool_
    assert np.array_equal(masks(64 << 20, np.float32), copied.astype(np.float32))


def test_spare_blocks_are_kept_for_few_sizes() -> None:
    cuda = FakeCuda()
    memory = Memory(cuda)
    with cuda.active():
        for size in range(1000, 1020):
            memory.allocate_reusable(size)
        memory.collect()
        assert cuda.live["blocks"] == 3
        memory.close()
    assert cuda.used == 0


def test_scratch_is_for_the_shapes_in_use(rig: Rig, chelsea: NDArray[np.uint8]) -> None:
    model = rig.model(lanes=1)
    embedding = model.encode(chelsea)
    expected = model.decode(embedding, many(2)).low_res_masks
    before = rig.cuda.used
    model.decode(embedding, PROMPTS)
    assert rig.cuda.used == before
    more = many(MAX_OBJECTS)
    model.decode(embedding, Prompts(more.point_coords, more.point_labels, mask_input=None))
    rng = np.random.default_rng(0)
    size = model.manifest.prompts.mask_size
    own = rng.normal(0, 8, (MAX_OBJECTS, 1, *size)).astype(np.float32)
    model.decode(embedding, Prompts(more.point_coords, more.point_labels, mask_input=own))
    # What was recorded before the memory moved is recorded anew, and right.
    for _ in range(2):
        np.testing.assert_array_equal(model.decode(embedding, many(2)).low_res_masks, expected)
    model.encode(chelsea)


def test_a_limit_on_memory_holds(rig: Rig, chelsea: NDArray[np.uint8]) -> None:
    free = rig.model(lanes=1)
    embedding = free.encode(chelsea)
    free.decode(embedding, PROMPTS)
    needed = rig.cuda.used
    nbytes = embedding.nbytes
    del free, embedding
    gc.collect()
    model = rig.model(lanes=1, memory=needed + nbytes)
    kept = [model.encode(chelsea), model.encode(chelsea)]
    model.decode(kept[0], PROMPTS)
    with pytest.raises(BackendError, match=r"out of device memory: .* are free of its limit"):
        model.encode(chelsea)
    kept.pop()
    kept.append(model.encode(chelsea))
    assert rig.cuda.used <= needed + nbytes


@pytest.mark.parametrize(
    "options", [{"lanes": 0}, {"lanes": True}, {"memory": -1}, {"lanes": 1.5}, {"blocking": "no"}]
)
def test_numbers_that_make_no_sense(options: dict[str, int]) -> None:
    (name,) = options
    with pytest.raises(InvalidInputError, match=rf"gpu\.{name}: got .*, expected"):
        GpuOptions(**options)


def test_options_reach_the_backend(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(flavour: str, gpu: object, *, blocking: bool) -> object:
        asked.append(blocking)
        return rig.platform

    monkeypatch.setattr("sam3rt.backends.tensorrt.offer.open_platform", opened)
    options = GpuOptions(lanes=2, blocking=True)
    model = load_model(rig.bundle.path, backend="tensorrt", gpu=options, check_files=False)
    model.warm_up()
    assert rig.cuda.live["streams"] == 2
    assert asked == [True]
    # Others pay no heed to them.
    load_model(rig.bundle.path, backend="onnxruntime", gpu=options, check_files=False).close()


def test_a_warm_up_records_the_usual_classes_on_every_lane(
    rig: Rig, chelsea: NDArray[np.uint8]
) -> None:
    model = rig.model(lanes=3)
    model.warm_up()
    assert rig.cuda.live["streams"] == 3
    # One or four objects, and 4, 8 or 16 points, on each lane, and the encoder on one.
    assert rig.cuda.live["graphs"] == 3 * 2 * 3 + 1
    embedding = model.encode(chelsea)
    rig.cuda.log.clear()

    def decode(objects: int) -> None:
        model.decode(embedding, many(objects))

    with rig.cuda.no_allocation(), ThreadPoolExecutor(3) as pool:
        list(pool.map(decode, [1, 2, 3, 4] * 3))
    assert rig.cuda.count("enqueue") == 0
    points = Prompts(np.zeros((MAX_POINTS - 1, 2)), np.ones(MAX_POINTS - 1))
    model.decode(embedding, points)
    assert rig.cuda.count("enqueue") == 0


def test_a_warm_up_with_little_memory_makes_fewer_lanes(
    rig: Rig, caplog: pytest.LogCaptureFixture, chelsea: NDArray[np.uint8]
) -> None:
    model = rig.model(lanes=4)
    model.backend.prepare()
    each = rig.cuda.used // 4
    del model
    gc.collect()
    for lanes in (2, 1):
        rig.cuda.total = 2 * each * lanes - each // 2
        model = rig.model(lanes=4)
        model.warm_up()
        assert 1 <= rig.cuda.live["streams"] < 4
        assert "calls at a time: out of device memory" in caplog.text
        model.decode(model.encode(chelsea), many(MAX_OBJECTS))
        del model
        gc.collect()
        assert rig.cuda.used == 0


def test_where_memory_is_short_idle_lanes_are_given_up(
    rig: Rig, chelsea: NDArray[np.uint8]
) -> None:
    model = rig.model(lanes=4)
    model.backend.prepare()
    assert rig.cuda.live["streams"] == 4
    rig.cuda.total = rig.cuda.used + 1000
    kept = [model.encode(chelsea) for _ in range(3)]
    assert rig.cuda.live["streams"] < 4
    expected = model.decode(kept[0], PROMPTS).low_res_masks
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model.decode(kept[1], PROMPTS), range(8)):
            np.testing.assert_array_equal(found.low_res_masks, expected)


def test_a_closed_model_gives_everything_back(rig: Rig, chelsea: NDArray[np.uint8]) -> None:
    model = rig.model()
    allow_imaging(model.backend)
    embedding = model.encode(chelsea)
    expected = embedding.numpy()
    with model.backend._pool.lane() as lane:
        engine = weakref.ref(lane._network.encoder)
    del lane
    model.segment(embedding, PROMPTS, max_hole_area=4)
    model.close()
    model.close()
    calls = [
        partial(model.encode, chelsea),
        partial(model.segment, embedding, PROMPTS),
        partial(model.decode, embedding, PROMPTS),
        model.warm_up,
    ]
    for call in calls:
        with pytest.raises(StateError, match="the model is closed"):
            call()
    assert not model.health().healthy
    assert "StateError: the model is closed" in model.health().problem
    gc.collect()
    assert engine() is None
    # What an embedding holds stays, and is given back with it.
    assert rig.cuda.live == {"blocks": 1, "pinned": 0, "streams": 0, "graphs": 0, "modules": 0}
    assert len(expected) == 3
    del embedding, model, calls, call
    gc.collect()
    assert rig.cuda.used == 0


def test_what_outlives_a_closed_model_is_given_back_at_once(
    rig: Rig, chelsea: NDArray[np.uint8]
) -> None:
    model = rig.model()
    allow_imaging(model.backend)
    embedding = model.encode(chelsea)
    decoded, masks = model.segment(embedding, PROMPTS, dtype=np.uint8)
    model.close()
    assert {k for k, count in rig.cuda.live.items() if count} == {"blocks", "pinned"}
    del embedding, decoded, masks
    assert not any(rig.cuda.live.values())


def test_objects_that_die_while_memory_is_given_back_are_given_back_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    free = cuda.free

    def collecting(address: int) -> None:
        # As if Python collected garbage just then.
        blocks[:1] = []
        free(address)

    monkeypatch.setattr(cuda, "free", collecting)
    memory = Memory(cuda)
    with cuda.active():
        blocks = [memory.allocate_reusable(1000 + n) for n in range(3)]
    memory.close()
    blocks[:1] = []
    assert blocks == []
    assert cuda.used == 0


def test_closing_waits_for_the_calls_under_way(rig: Rig) -> None:
    model = rig.model()
    inside, order = threading.Event(), []

    def call() -> None:
        with model.backend._pool.lane():
            inside.set()
            time.sleep(0.2)
            order.append("call")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(call)
        inside.wait()
        model.close()
        order.append("closed")
        done.result()
    assert order == ["call", "closed"]


def test_whoever_closes_a_model_second_waits_as_well(rig: Rig) -> None:
    model = rig.model()
    with ThreadPoolExecutor(2) as pool:
        with model.backend._pool.lane():
            closing = [pool.submit(model.close) for _ in range(2)]
            time.sleep(0.1)
            assert not any(call.done() for call in closing)
        for call in closing:
            call.result(30)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_lane_that_nothing_made_is_not_waited_for(
    error: type[BaseException], rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rig.model(lanes=2)
    lanes = model.backend._pool
    with lanes.lane():
        monkeypatch.setattr(lanes, "_make", raises(error()))
        with pytest.raises(error), lanes.lane():
            pass
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_models_of_other_backends_close_too(
    backend: str, tiny_sam3: Path, chelsea: NDArray[np.uint8]
) -> None:
    model = load_model(tiny_sam3, backend=backend, device="cpu")
    embedding = model.encode(chelsea)
    model.close()
    with pytest.raises(StateError, match="the model is closed"):
        model.encode(chelsea)
    with pytest.raises(StateError, match="the model is closed"):
        model.decode(embedding, PROMPTS)
    with pytest.raises(StateError, match="the model is closed"):
        model.upload(ImageEmbedding.from_bytes(embedding.to_bytes()))
    # A call that began before must not load a graph that nobody gives back.
    pixels = np.zeros((1, 3, *model.manifest.image.size), np.float32)
    with pytest.raises(StateError, match="the model is closed"):
        model.backend._encode(pixels)
    assert not model.backend._encoder.is_made
    assert not model.backend._decoder.is_made
