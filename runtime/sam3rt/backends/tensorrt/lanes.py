"""Lanes: what one thread needs to run the engines, and the pool that threads take them from."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import PADDING_LABEL
from ...errors import BackendError
from ...prompts import PackedPrompts
from .cuda.api import Cuda
from .imaging import DeviceImaging, DeviceMatrices
from .memory import Block, Layout, Memory, Staging, aligned
from .network import HAS_MASKS, LABELS, MASKS, POINTS, THRESHOLD, Network
from .shapes import ShapeClass, classify
from .trt import Context, contiguous

_LOG = logging.getLogger(__name__)

# Shape classes whose contexts a lane keeps. Each holds a little device memory of TensorRT's own;
# an interactive service uses three or four.
_KEPT_CLASSES = 12


class Replay:
    """A context with shapes and addresses set for good, recorded as a CUDA graph when it has run.

    TensorRT wants a run before the recording, and a context of its own for each recording.

    Args:
        context: the context.
        cuda: the GPU.
        memory: gives the graph back.
        stream: the lane's stream.
    """

    def __init__(self, context: Context, cuda: Cuda, memory: Memory, stream: int) -> None:
        self._context = context
        self._cuda = cuda
        self._memory = memory
        self._stream = stream
        self._graph: int | None = None
        self._tried = False

    def queue(self) -> None:
        """Queue one run."""
        if self._graph is None:
            self._context.enqueue(self._stream)
        else:
            self._cuda.launch(self._graph, self._stream)

    def record(self) -> None:
        """Make the graph, once. The stream must be idle and a run behind it."""
        if self._tried:
            return
        self._tried = True
        try:
            self._graph = self._capture()
        except BackendError as error:
            _LOG.info("runs without a CUDA graph: %s", str(error))
            return
        self._memory.give_back_after(self, self._cuda.destroy_graph, self._graph)

    def _capture(self) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            self._context.enqueue(self._stream)
        except BackendError:
            with contextlib.suppress(BackendError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)


class DecoderRun:
    """The decoder for one shape class on one lane.

    Attributes:
        shape: the class.
        inputs: layout of the prompt block.
        prompt: the prompt block's tensors in the lane's pinned memory.
        masks: layout of the mask prompt block.
        outputs: layout of the output block.
        replay: what runs it.
    """

    def __init__(
        self,
        shape: ShapeClass,
        inputs: Layout,
        staging: NDArray[np.uint8],
        masks: Layout,
        outputs: Layout,
        replay: Replay,
    ) -> None:
        self.shape = shape
        self.inputs = inputs
        self.prompt = {name: slot.view(staging) for name, slot in inputs.slots.items()}
        self.masks = masks
        self.outputs = outputs
        self.replay = replay


class Growing:
    """Device and pinned memory that is replaced when more is needed."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._block: Block | None = None
        self._staging: Staging | None = None

    def block(self, nbytes: int) -> Block:
        """Device memory of at least that size. The stream must be idle if it is larger."""
        if self._block is None or self._block.nbytes < nbytes:
            self._block = None
            self._block = self._memory.allocate(nbytes)
        return self._block

    def staging(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory of that size."""
        if self._staging is None or len(self._staging.array) < nbytes:
            self._staging = None
            self._staging = self._memory.staging(nbytes)
        return self._staging.array[:nbytes]


class Lane:
    """A stream, contexts and fixed buffers. Serves one call at a time, to its end.

    Every method returns, or raises, with the stream idle.

    Args:
        network: the engines.
        cuda: the GPU.
        memory: its memory.
        imaging: pre- and postprocessing on the device.
        wide: whether it can encode as well.

    Attributes:
        wide: whether it can encode as well.

    Raises:
        BackendError: there is not enough device memory.
    """

    def __init__(
        self,
        network: Network,
        cuda: Cuda,
        memory: Memory,
        imaging: DeviceImaging,
        wide: bool,
    ) -> None:
        self.wide = wide
        self._held: weakref.ref[Block] | None = None
        self._network = network
        self._cuda = cuda
        self._memory = memory
        self._imaging = imaging
        self._stream = cuda.create_stream()
        memory.give_back_after(self, cuda.destroy_stream, self._stream)
        engines = [network.decoder, *imaging.engines(wide)]
        if wide:
            engines.append(network.encoder)
        # One after the other on one stream: the engines of a lane share working memory.
        self._scratch_bytes = max(1, *(engine.scratch_bytes for engine in engines))
        self._scratch = memory.allocate(self._scratch_bytes)
        largest = network.largest
        self._features = memory.allocate(network.features.nbytes)
        self._inputs = memory.allocate(network.inputs(largest).nbytes)
        self._input_staging = memory.staging(network.inputs(largest).nbytes)
        self._masks = memory.allocate(network.masks(largest).nbytes)
        self._mask_staging = Growing(memory)
        self._outputs = memory.allocate(network.outputs(largest).nbytes)
        self._output_staging = Growing(memory)
        self._upsampled = Growing(memory)
        self._uploads = Growing(memory)
        self._runs: OrderedDict[ShapeClass, DecoderRun] = OrderedDict()
        self._preprocess: Context | None = None
        self._postprocess: Context | None = None
        if wide:
            pixels = network.pixels.nbytes(network.pixels_shape)
            self._pixels = memory.allocate(pixels)
            self._encoder = self._make_encoder()

    def encode(self, pixels: NDArray[np.float32]) -> Block:
        """Run the encoder on float32 [1, 3, H, W] of the encoder's size."""
        host = contiguous(pixels, self._network.pixels.dtype)
        if host.shape != self._network.pixels_shape:
            raise BackendError(
                f"the encoder takes pixels of shape {self._network.pixels_shape}, got {host.shape}"
            )
        with self._settled():
            self._cuda.upload(self._pixels.address, host, self._stream)
            return self._encode()

    def encode_image(self, image: NDArray[np.uint8], matrices: DeviceMatrices) -> Block:
        """Resize and normalize uint8 [H, W, 3] on the device, then run the encoder."""
        image = np.ascontiguousarray(image)
        with self._settled():
            self._queue_preprocess(image, matrices)
            return self._encode()

    def pixels(self, image: NDArray[np.uint8], matrices: DeviceMatrices) -> NDArray[np.float32]:
        """What :meth:`encode_image` would encode, float32 [1, 3, H, W]."""
        image = np.ascontiguousarray(image)
        result = np.empty(self._network.pixels_shape, self._network.pixels.dtype)
        with self._settled():
            self._queue_preprocess(image, matrices)
            self._cuda.download(result, self._pixels.address, self._stream)
            self._cuda.synchronize(self._stream)
        return result.astype(np.float32)

    def decode(
        self,
        features: Block,
        prompts: PackedPrompts,
        names: Sequence[str],
        upsampling: tuple[DeviceMatrices, float] | None = None,
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8] | None]:
        """Run the decoder.

        Args:
            features: the feature maps' block, from any lane.
            prompts: at most as many objects and points as the engine takes.
            names: the outputs wanted; the first is the mask logits.
            upsampling: matrices and threshold, to have masks of the image's size as well.

        Returns:
            The outputs, float32, in the order of the names; masks, uint8 [P, C, H, W] of 0 and
            1, or ``None``.
        """
        objects, points = prompts.labels.shape
        own_masks = prompts.masks is not None and len(prompts.masks) > 1
        shape = classify(objects, points, own_masks, self._network.limits)
        threshold = 0.0 if upsampling is None else upsampling[1]
        with self._settled():
            run = self._run(shape)
            self._bring(features)
            self._send(run, prompts, threshold)
            run.replay.queue()
            start, end = run.outputs.span(names)
            host = self._output_staging.staging(end - start)
            self._cuda.download(host, self._outputs.address + start, self._stream)
            packed = None
            if upsampling is not None:
                slot = run.outputs.slots[names[0]]
                packed = self._queue_upsampling(
                    self._outputs.address + slot.offset,
                    objects,
                    slot.shape[2],
                    upsampling[0],
                    self._inputs.address + run.inputs.slots[THRESHOLD].offset,
                )
            self._cuda.synchronize(self._stream)
            run.replay.record()
        slots = [run.outputs.slots[name] for name in names]
        # The staging buffer is the next call's: what leaves is a copy.
        outputs = [slot.view(host, start)[:, :objects].astype(np.float32) for slot in slots]
        if packed is None or upsampling is None:
            return outputs, None
        return outputs, _unpacked(packed, outputs[0].shape[2], upsampling[0].target)

    def upsample(
        self, logits: NDArray[np.float32], matrices: DeviceMatrices, threshold: float
    ) -> NDArray[np.uint8]:
        """Upsample and threshold float32 [P, C, h, w] to uint8 [P, C, H, W] of 0 and 1."""
        objects, count = logits.shape[:2]
        each = logits[0].nbytes
        layout = Layout(
            [
                (THRESHOLD, (1,), np.dtype(np.float32)),
                ("logits", (objects, aligned(each) // 4), np.dtype(np.float32)),
            ]
        )
        with self._settled():
            staging = self._mask_staging.staging(layout.nbytes)
            layout.slots[THRESHOLD].view(staging)[:] = threshold
            layout.slots["logits"].view(staging)[:, : each // 4] = logits.reshape(objects, -1)
            block = self._uploads.block(layout.nbytes)
            self._cuda.upload(block.address, staging, self._stream)
            packed = self._queue_upsampling(
                block.address + layout.slots["logits"].offset,
                objects,
                count,
                matrices,
                block.address + layout.slots[THRESHOLD].offset,
                aligned(each),
            )
            self._cuda.synchronize(self._stream)
        return _unpacked(packed, count, matrices.target)

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Block:
        """Bring feature maps, float32 [1, C, h, w] each, to a block of their own."""
        layout = self._network.features
        host = np.zeros(layout.nbytes, np.uint8)
        for slot, array in zip(layout.slots.values(), maps, strict=True):
            slot.view(host)[...] = array
        block = self._memory.allocate_reusable(layout.nbytes)
        self._fill(block, host)
        return block

    def upload_block(self, host: NDArray[np.uint8]) -> Block:
        """Bring host memory to a device block of its own."""
        block = self._memory.allocate(host.nbytes)
        self._fill(block, host)
        return block

    def _fill(self, block: Block, host: NDArray[np.uint8]) -> None:
        with self._settled():
            self._cuda.upload(block.address, host, self._stream)
            self._cuda.synchronize(self._stream)

    def download(self, host: NDArray[np.uint8], block: Block) -> None:
        """Fill host memory with the beginning of a block."""
        with self._settled():
            self._cuda.download(host, block.address, self._stream)
            self._cuda.synchronize(self._stream)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Whatever happens, nothing is left running that uses the caller's memory."""
        try:
            yield
        except BaseException:
            self._held = None
            with contextlib.suppress(BackendError):
                self._cuda.synchronize(self._stream)
            raise

    def _encode(self) -> Block:
        nbytes = self._network.features.nbytes
        block = self._memory.allocate_reusable(nbytes)
        self._encoder.queue()
        self._cuda.copy(block.address, self._features.address, nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        self._held = weakref.ref(block)
        self._encoder.record()
        return block

    def holds(self, features: Block) -> bool:
        """Whether its fixed buffers hold these feature maps."""
        return self._held is not None and self._held() is features

    def _bring(self, features: Block) -> None:
        """Copy feature maps to the fixed buffers, unless they are there."""
        if self.holds(features):
            return
        self._cuda.copy(
            self._features.address, features.address, self._network.features.nbytes, self._stream
        )
        self._held = weakref.ref(features)

    def _send(self, run: DecoderRun, prompts: PackedPrompts, threshold: float) -> None:
        """Upload prompts, padded to their class."""
        objects, points = prompts.labels.shape
        staging = self._input_staging.array[: run.inputs.nbytes]
        views = run.prompt
        views[POINTS][...] = 0
        views[POINTS][0, :objects, :points] = prompts.points
        views[LABELS][...] = PADDING_LABEL
        views[LABELS][0, :objects, :points] = prompts.labels
        views[HAS_MASKS][...] = prompts.masks is not None
        views[THRESHOLD][...] = threshold
        self._cuda.upload(self._inputs.address, staging, self._stream)
        if prompts.masks is not None:
            host = self._mask_staging.staging(run.masks.nbytes)
            view = run.masks.slots[MASKS].view(host)
            view[0, : len(prompts.masks)] = prompts.masks
            view[0, len(prompts.masks) :] = 0
            self._cuda.upload(self._masks.address, host, self._stream)

    def _run(self, shape: ShapeClass) -> DecoderRun:
        run = self._runs.get(shape)
        if run is None:
            while len(self._runs) >= _KEPT_CLASSES:
                self._runs.popitem(last=False)
            run = self._runs[shape] = self._make_run(shape)
        self._runs.move_to_end(shape)
        return run

    def _make_run(self, shape: ShapeClass) -> DecoderRun:
        network = self._network
        inputs, masks, outputs = (
            network.inputs(shape),
            network.masks(shape),
            network.outputs(shape),
        )
        context = network.decoder.context()
        context.set_scratch(self._scratch.address, self._scratch_bytes)
        for layout, block in (
            (network.features, self._features),
            (inputs, self._inputs),
            (masks, self._masks),
            (outputs, self._outputs),
        ):
            for name, slot in layout.slots.items():
                if name == THRESHOLD:
                    continue
                if network.decoder.tensors[name].is_input:
                    context.set_shape(name, slot.shape)
                context.set_address(name, block.address + slot.offset)
        for name, slot in outputs.slots.items():
            if context.shape(name) != slot.shape:
                raise BackendError(
                    f"the decoder engine makes {name} of shape {context.shape(name)}, expected "
                    f"{slot.shape}: build it again"
                )
        replay = Replay(context, self._cuda, self._memory, self._stream)
        return DecoderRun(shape, inputs, self._input_staging.array, masks, outputs, replay)

    def _make_encoder(self) -> Replay:
        network = self._network
        context = network.encoder.context()
        context.set_scratch(self._scratch.address, self._scratch_bytes)
        context.set_shape(network.pixels.name, network.pixels_shape)
        context.set_address(network.pixels.name, self._pixels.address)
        for name, slot in network.features.slots.items():
            context.set_address(name, self._features.address + slot.offset)
            if context.shape(name) != slot.shape:
                raise BackendError(
                    f"the encoder engine makes {name} of shape {context.shape(name)}, expected "
                    f"{slot.shape}: build it again"
                )
        return Replay(context, self._cuda, self._memory, self._stream)

    def _queue_preprocess(self, image: NDArray[np.uint8], matrices: DeviceMatrices) -> None:
        if self._preprocess is None:
            self._preprocess = self._imaging.preprocess_context()
            self._preprocess.set_scratch(self._scratch.address, self._scratch_bytes)
        block = self._uploads.block(image.nbytes)
        self._cuda.upload(block.address, image, self._stream)
        self._imaging.queue_preprocess(
            self._preprocess,
            block.address,
            image.shape,
            matrices,
            self._pixels.address,
            self._stream,
        )

    def _queue_upsampling(
        self,
        logits: int,
        objects: int,
        count: int,
        matrices: DeviceMatrices,
        threshold: int,
        stride: int | None = None,
    ) -> NDArray[np.uint8]:
        """Queue the upsampling of each object's masks and the download of all of them.

        Returns:
            Pinned memory, uint8 [P, each object's masks and padding], that is filled when the
            stream is idle.
        """
        if self._postprocess is None:
            self._postprocess = self._imaging.postprocess_context()
            self._postprocess.set_scratch(self._scratch.address, self._scratch_bytes)
        h, w = self._imaging.low_res_size
        height, width = matrices.target
        each = count * height * width
        out_stride = aligned(each)
        block = self._upsampled.block(objects * out_stride)
        for index in range(objects):
            self._imaging.queue_postprocess(
                self._postprocess,
                logits + index * (count * h * w * 4 if stride is None else stride),
                count,
                matrices,
                threshold,
                block.address + index * out_stride,
                self._stream,
            )
        host = self._upsampled.staging(objects * out_stride)
        self._cuda.download(host, block.address, self._stream)
        return host.reshape(objects, out_stride)


def _unpacked(packed: NDArray[np.uint8], count: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A copy of masks without the padding between objects, uint8 [P, C, H, W]."""
    each = count * size[0] * size[1]
    return np.array(packed[:, :each]).reshape(len(packed), count, *size)


class LanePool:
    """Lanes for many threads: one wide lane, and narrow ones as threads come to need them.

    Args:
        make: makes a lane, wide or not.
        limit: lanes at most.
        cuda: the GPU.
        memory: its memory.

    Raises:
        BackendError: there is not enough device memory for the wide lane.
    """

    def __init__(
        self, make: Callable[[bool], Lane], limit: int, cuda: Cuda, memory: Memory
    ) -> None:
        self._make = make
        self._cuda = cuda
        self._memory = memory
        self._limit = limit
        self._changed = threading.Condition()
        # The one used last stands last.
        self._free = [make(True)]
        self._count = 1

    @contextmanager
    def lane(self, *, wide: bool = False, holding: Block | None = None) -> Iterator[Lane]:
        """A lane for this thread alone; waits until there is one.

        Args:
            wide: it has to encode.
            holding: feature maps that are best in its buffers already.
        """
        # CUDA's current device is each thread's own.
        self._cuda.activate()
        self._memory.collect()
        lane = self._take(wide, holding)
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify_all()

    def _take(self, wide: bool, holding: Block | None) -> Lane:
        while True:
            with self._changed:
                lane = self._best(wide, holding)
                while lane is None and (wide or self._count >= self._limit):
                    self._changed.wait()
                    lane = self._best(wide, holding)
                if lane is not None:
                    self._free.remove(lane)
                    return lane
                self._count += 1
            try:
                return self._make(False)
            except BackendError as error:
                with self._changed:
                    self._count -= 1
                    self._limit = self._count
                    self._changed.notify_all()
                # As text: who keeps the record must not keep, by its traceback, what was allocated.
                _LOG.warning("no more than %d calls at a time: %s", self._count, str(error))

    def _best(self, wide: bool, holding: Block | None) -> Lane | None:
        """A free lane: the one that holds the maps, else a narrow one unused for long."""
        usable = [lane for lane in self._free if lane.wide or not wide]
        if holding is not None:
            for lane in usable:
                if lane.holds(holding):
                    return lane
        return min(usable, key=lambda lane: lane.wide, default=None)
