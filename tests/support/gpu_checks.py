"""Checks of a GPU and of a model on it, for tests, for `make test-gpu` and for the evidence script.

Each raises AssertionError where something is wrong, and returns figures where there are any. All of
them run on the fake GPU, too, except what needs a library that computes on a real one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt import Prompts, SegmentationModel
from sam3rt.backends.tensorrt.backend import LaneBackend
from sam3rt.backends.tensorrt.cuda import Cuda, OutOfDeviceMemoryError
from sam3rt.backends.tensorrt.memory import Memory
from sam3rt.errors import BackendError
from sam3rt.features import DeviceArray
from sam3rt.geometry import geometry, preprocess
from sam3rt.masks import MaskOptions, finish

Figures = dict[str, Any]
# 1080p, in bytes of RGB.
_PICTURE = 3 * 1080 * 1920


def check_copies(cuda: Cuda) -> Figures:
    """Host to device, within the device, and back; with pinned and with other memory."""
    figures: Figures = {}
    with cuda.active():
        stream = cuda.create_stream()
        one, two = cuda.allocate(_PICTURE), cuda.allocate(_PICTURE)
        pinned = cuda.allocate_host(_PICTURE)
        plain = np.random.default_rng(0).integers(0, 256, _PICTURE, dtype=np.uint8)
        assert one % 256 == two % 256 == 0
        for name, host in (("pinned", pinned), ("pageable", plain)):
            host[:] = plain

            def upload(host: NDArray[np.uint8] = host) -> None:
                cuda.upload(one, host, stream)
                cuda.synchronize(stream)

            def download(host: NDArray[np.uint8] = host) -> None:
                cuda.download(host, two, stream)
                cuda.synchronize(stream)

            figures[f"upload of 1080p, {name}, ms"] = milliseconds(upload)
            cuda.copy(two, one, _PICTURE, stream)
            cuda.synchronize(stream)
            figures[f"download of 1080p, {name}, ms"] = milliseconds(download)
            assert np.array_equal(host, plain)
        figures["synchronize, ms"] = milliseconds(lambda: cuda.synchronize(stream))
        for address in (one, two):
            cuda.free(address)
        cuda.free_host(pinned.ctypes.data)
        cuda.destroy_stream(stream)
    return figures


def check_capture(cuda: Cuda) -> Figures:
    """A recorded graph reads what is in its buffers when it is launched."""
    with cuda.active():
        stream = cuda.create_stream()
        one, two = cuda.allocate(1024), cuda.allocate(1024)
        given, found = cuda.allocate_host(1024), cuda.allocate_host(1024)
        given[:] = 1
        cuda.begin_capture(stream)
        cuda.upload(one, given, stream)
        cuda.copy(two, one, 1024, stream)
        cuda.download(found, two, stream)
        graph = cuda.end_capture(stream)
        for value in (2, 3):
            given[:] = value
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            assert (found == value).all()

        def launch() -> None:
            cuda.launch(graph, stream)
            cuda.synchronize(stream)

        took = milliseconds(launch)
        cuda.destroy_graph(graph)
        _give_back(cuda, stream, (one, two), (given, found))
    return {"launch of three copies, ms": took}


def check_failed_capture(cuda: Cuda) -> Figures:
    """What cannot be recorded is an error, after which the stream works as before."""
    said = ""
    with cuda.active():
        stream = cuda.create_stream()
        address, host = cuda.allocate(1024), cuda.allocate_host(1024)
        cuda.begin_capture(stream)
        try:
            cuda.synchronize(stream)
        except (BackendError, AssertionError) as error:
            said = str(error)
        assert said, "a stream was synchronized while it recorded"
        try:
            cuda.destroy_graph(cuda.end_capture(stream))
        except BackendError as error:
            said += f"; {error}"
        host[:] = 7
        cuda.upload(address, host, stream)
        host_back = cuda.allocate_host(1024)
        cuda.download(host_back, address, stream)
        cuda.synchronize(stream)
        assert (host_back == 7).all()
        _give_back(cuda, stream, (address,), (host, host_back))
    return {"said": said}


def check_out_of_memory(cuda: Cuda) -> Figures:
    """Too large an allocation is an error of its own, and the next one succeeds."""
    said = ""
    with cuda.active():
        try:
            cuda.allocate(1 << 48)
        except OutOfDeviceMemoryError as error:
            said = str(error)
        assert "out of device memory" in said
        cuda.free(cuda.allocate(1 << 20))
    return {"said": said}


def check_dlpack(cuda: Cuda, library: Any) -> Figures:
    """Device memory is read by another library where it lies.

    Args:
        cuda: the GPU.
        library: with ``from_dlpack``: NumPy for the fake GPU, else PyTorch or CuPy.
    """
    expected = np.arange(4096, dtype=np.float32)
    memory = Memory(cuda)
    with cuda.active():
        stream = cuda.create_stream()
        block = memory.allocate_reusable(expected.nbytes)
        cuda.upload(block.address, expected, stream)
        cuda.synchronize(stream)
        block.mark_exported()
        array = DeviceArray(block.address, (64, 64), expected.dtype, cuda.dlpack_device, block)
        taken = library.from_dlpack(array)
        assert tuple(taken.shape) == (64, 64)
        assert float(taken.sum()) == float(expected.sum())
        del array, block, taken
        gc.collect()
        memory.collect()
        cuda.destroy_stream(stream)
    return {"library": f"{library.__name__} {library.__version__}"}


def check_slow_consumer(model: SegmentationModel, library: Any) -> Figures:
    """An embedding's memory is not used again while another library's kernels still read it.

    Args:
        model: on a real GPU.
        library: PyTorch or CuPy.
    """
    image = picture(120, 160)
    embedding = model.encode(image)
    expected = float(embedding.features.numpy()[-1].max())
    taken = library.from_dlpack(embedding.features.arrays()[-1])
    begun = time.perf_counter()
    # Products of zeros keep the library's stream busy for long after they are queued, and only
    # then is the memory read.
    row = taken.reshape(-1)[:4096] * 0
    busy = row[:, None] * row[None, :]
    for _ in range(200):
        busy = busy @ busy
    largest = taken.max() + busy.max()
    queued = time.perf_counter() - begun
    del taken, embedding, row, busy
    gc.collect()
    # Overwrites the memory, if it was given back too early.
    for seed in range(6):
        model.encode(picture(120, 160, seed + 1))
    found = float(largest)
    took = time.perf_counter() - begun
    assert found == expected, (found, expected)
    return {"queued, ms": round(1e3 * queued, 1), "done, ms": round(1e3 * took, 1)}


def check_kernels(backend: LaneBackend) -> Figures:
    """Resizing and making masks on the device against the host, over sizes."""
    if not backend.imaging_fits:
        return {"kernels": "are not there"}
    manifest = backend.bundle.manifest
    figures: Figures = {
        "largest error of a pixel": 0.0,
        "largest share of differing mask pixels": 0.0,
    }
    low = manifest.masks.low_res_size
    rng = np.random.default_rng(0)
    # Smooth, so that few pixels are within rounding of the threshold.
    coarse = rng.standard_normal((2, manifest.masks.multimask, 9, 9), np.float32) * 8
    y, x = (np.linspace(0, 8, n) for n in low)
    rows = coarse[:, :, np.floor(y).astype(int)]
    logits = np.ascontiguousarray(rows[..., np.floor(x).astype(int)] + rng.random(low) * 0.5)
    logits = logits.astype(np.float32)
    for size in ((1080, 1920), (1, 1), (37, 501), (720, 405), (64, 64)):
        image = picture(*size)
        where = geometry(manifest.image, size)
        if backend.imaging.preprocess_fits(where):
            expected, _ = preprocess(manifest.image, image)
            error = float(np.abs(backend.pixels(image, where) - expected).max())
            key = "largest error of a pixel"
            figures[key] = max(figures[key], error)
        for options in (
            MaskOptions(dtype=np.uint8),
            MaskOptions(0.5, 30.0, 20.0, dtype=np.uint8),
        ):
            host = finish(logits, where, manifest.image, manifest.masks, options)
            found = backend.make_masks(logits, where, options)
            key = "largest share of differing mask pixels"
            figures[key] = max(figures[key], float((host != found).mean()))
    assert figures["largest error of a pixel"] < 1e-3, figures
    assert figures["largest share of differing mask pixels"] < 1e-3, figures
    return figures


def check_threads(model: SegmentationModel, threads: int = 8, rounds: int = 2) -> Figures:
    """Many threads at once get what each gets alone."""
    images = [picture(90 + seed, 120, seed) for seed in range(threads)]
    prompts = [
        Prompts(point_coords=[[20.0 + 5 * seed, 40.0]], point_labels=[1]) for seed in range(threads)
    ]
    alone = [
        model.segment(model.encode(image), prompt)
        for image, prompt in zip(images, prompts, strict=True)
    ]

    def work(index: int) -> tuple[float, float]:
        decoded, masks = model.segment(model.encode(images[index]), prompts[index])
        error = np.abs(decoded.low_res_masks - alone[index][0].low_res_masks).max()
        return float(error), float((masks != alone[index][1]).mean())

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, list(range(threads)) * rounds))
    figures = {
        "largest error of a logit": max(error for error, _ in found),
        "largest share of differing mask pixels": max(share for _, share in found),
    }
    scale = max(1.0, *(float(np.abs(d.low_res_masks).max()) for d, _ in alone))
    assert figures["largest error of a logit"] <= 1e-2 * scale, figures
    return figures


def check_leaks(
    model: SegmentationModel,
    used: Callable[[], int],
    rounds: int = 30,
    *,
    in_new_threads: bool = False,
) -> Figures:
    """Device memory does not grow with calls.

    Args:
        model: on a GPU.
        used: bytes of device memory in use.
        rounds: calls between the first reading and the last; every five there is another.
        in_new_threads: whether each call is made in a thread of its own.
    """
    click = Prompts(point_coords=[[20.0, 40.0]], point_labels=[1])

    def call(seed: int) -> None:
        model.segment(model.encode(picture(90, 120, seed)), click)

    def work(count: int) -> None:
        for index in range(count):
            if in_new_threads:
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(call, index % 3).result()
            else:
                call(index % 3)
        gc.collect()

    work(5)
    readings = [used()]
    for done in range(0, rounds, 5):
        work(min(5, rounds - done))
        readings.append(used())
    grown = readings[-1] - readings[0]
    steps = ", ".join(f"{(after - readings[0]) / 1e6:.0f}" for after in readings[1:])
    assert grown <= 64 << 20, f"{rounds} calls took {grown} bytes; by and by, in MB: {steps}"
    return {"grown, bytes": grown}


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours with some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x * (3 + c) / width + seed) * np.cos(y * (2 + c) / height) for c in range(3)]
    smooth = 128 + 100 * np.stack(waves, -1)
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    result: NDArray[np.uint8] = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    return result


def milliseconds(call: Callable[[], Any], count: int = 20) -> float:
    """The median time of a call that waits for its own end."""
    taken = []
    for _ in range(count + 2):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return float(f"{1e3 * float(np.median(taken[2:])):.4g}")


def _give_back(cuda: Cuda, stream: int, blocks: Any, pinned: Any) -> None:
    for address in blocks:
        cuda.free(address)
    for array in pinned:
        cuda.free_host(array.ctypes.data)
    cuda.destroy_stream(stream)


CUDA_CHECKS = (check_copies, check_capture, check_failed_capture, check_out_of_memory)
