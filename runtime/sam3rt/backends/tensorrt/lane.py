"""A lane: a stream, contexts and buffers, all that one thread needs to run the engines."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import HAS_MASKS, LABELS, MASKS, PADDING_LABEL, POINTS
from ...errors import BackendError
from ...geometry import ImageGeometry
from ...prompts import PackedPrompts
from .cuda import Cuda
from .imaging import DeviceImaging, LaneImaging, unpacked
from .memory import Block, GrowingBuffer, Layout, Memory, PinnedBuffer
from .network import THRESHOLD, Network
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

    def record(self) -> bool:
        """Make the graph, once. The stream must be idle and a run behind it.

        Returns:
            Whether this was the first run.
        """
        if self._tried:
            return False
        self._tried = True
        try:
            self._graph = self._capture()
        except BackendError as error:
            _LOG.info("runs without a CUDA graph: %s", str(error))
            return True
        self._memory.give_back_after(self, self._cuda.destroy_graph, self._graph)
        return True

    def _capture(self) -> int:
        self._context.check_capturable(self._stream)
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
        pinned: PinnedBuffer,
        masks: Layout,
        outputs: Layout,
        replay: Replay,
    ) -> None:
        self.shape = shape
        self.inputs = inputs
        self.prompt = {name: slot.view(pinned.array) for name, slot in inputs.slots.items()}
        self.masks = masks
        self.outputs = outputs
        self.replay = replay


class Lane:
    """A stream, contexts and fixed buffers. Serves one call at a time, to its end.

    Every method returns, or raises, with the stream idle.

    Args:
        network: the engines.
        cuda: the GPU.
        memory: its memory.
        imaging: pre- and postprocessing on the device.
        encodes: whether it has room for the encoder as well.

    Attributes:
        encodes: whether it can encode.

    Raises:
        BackendError: there is not enough device memory.
    """

    def __init__(
        self,
        network: Network,
        cuda: Cuda,
        memory: Memory,
        imaging: DeviceImaging,
        encodes: bool,
    ) -> None:
        self.encodes = encodes
        self._held: weakref.ref[Block] | None = None
        self._network = network
        self._cuda = cuda
        self._memory = memory
        self._stream = cuda.create_stream()
        memory.give_back_after(self, cuda.destroy_stream, self._stream)
        engines = [network.decoder, *imaging.engines(encodes)]
        if encodes:
            engines.append(network.encoder)
        # One after the other on one stream: the engines of a lane share working memory.
        self._scratch = memory.allocate(max(1, *(engine.scratch_bytes for engine in engines)))
        self._imaging = LaneImaging(imaging, self._scratch, self._stream)
        largest = network.largest
        self._features = memory.allocate(network.features.nbytes)
        self._inputs = memory.allocate(network.inputs(largest).nbytes)
        self._pinned_inputs = memory.allocate_pinned(network.inputs(largest).nbytes)
        self._masks = memory.allocate(network.masks(largest).nbytes)
        self._pinned_masks = GrowingBuffer(memory)
        self._outputs = memory.allocate(network.outputs(largest).nbytes)
        self._pinned_outputs = GrowingBuffer(memory)
        self._runs: OrderedDict[ShapeClass, DecoderRun] = OrderedDict()
        if encodes:
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
        with self._idle_on_error():
            self._cuda.upload(self._pixels.address, host, self._stream)
            return self._encode()

    def encode_image(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> Block:
        """Resize and normalize uint8 [H, W, 3] on the device, then run the encoder."""
        with self._idle_on_error():
            self._imaging.queue_preprocess(image, geometry, self._pixels.address)
            return self._encode()

    def pixels(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> NDArray[np.float32]:
        """What :meth:`encode_image` would encode, float32 [1, 3, H, W]."""
        result = np.empty(self._network.pixels_shape, self._network.pixels.dtype)
        with self._idle_on_error():
            self._imaging.queue_preprocess(image, geometry, self._pixels.address)
            self._cuda.download(result, self._pixels.address, self._stream)
            self._cuda.synchronize(self._stream)
        return result.astype(np.float32)

    def decode(
        self,
        features: Block,
        prompts: PackedPrompts,
        names: Sequence[str],
    ) -> list[NDArray[np.float32]]:
        """Run the decoder.

        Args:
            features: the feature maps' block, from any lane.
            prompts: at most as many objects and points as the engine takes.
            names: the outputs wanted.

        Returns:
            The outputs, float32, in the order of the names.
        """
        return self._decode(features, prompts, names, None, 0.0)[0]

    def decode_masks(
        self,
        features: Block,
        prompts: PackedPrompts,
        names: Sequence[str],
        geometry: ImageGeometry,
        threshold: float,
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
        """Run the decoder, and upsample and threshold its first output, the mask logits.

        Returns:
            What :meth:`decode` returns, and masks, uint8 [P, C, H, W] of 0 and 1.
        """
        outputs, packed = self._decode(features, prompts, names, geometry, threshold)
        return outputs, unpacked(packed, outputs[0].shape[2], geometry)

    def _decode(
        self,
        features: Block,
        prompts: PackedPrompts,
        names: Sequence[str],
        geometry: ImageGeometry | None,
        threshold: float,
    ) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
        """Run the decoder, and the upsampling where the image's geometry is given.

        Returns:
            The outputs, and pinned memory with the masks; see :meth:`LaneImaging.queue_upsampling`.
        """
        objects, points = prompts.labels.shape
        own_masks = prompts.masks is not None and len(prompts.masks) > 1
        shape = classify(objects, points, own_masks, self._network.limits)
        with self._idle_on_error():
            run = self._run(shape)
            self._bring(features)
            self._send(run, prompts, threshold)
            run.replay.queue()
            start, end = run.outputs.span(names)
            host = self._pinned_outputs.pinned(end - start)
            self._cuda.download(host, self._outputs.address + start, self._stream)
            packed = np.empty((0, 0), np.uint8)
            if geometry is not None:
                slot = run.outputs.slots[names[0]]
                packed = self._imaging.queue_upsampling(
                    self._outputs.address + slot.offset,
                    objects,
                    slot.shape[2],
                    geometry,
                    self._inputs.address + run.inputs.slots[THRESHOLD].offset,
                )
            self._cuda.synchronize(self._stream)
            if run.replay.record():
                self._network.keep_kernels(shape)
        slots = [run.outputs.slots[name] for name in names]
        # The pinned buffer is the next call's: what leaves is a copy.
        outputs = [slot.view(host, start)[:, :objects].astype(np.float32) for slot in slots]
        return outputs, packed

    def upsample(
        self, logits: NDArray[np.float32], geometry: ImageGeometry, threshold: float
    ) -> NDArray[np.uint8]:
        """Upsample and threshold float32 [P, C, h, w] to uint8 [P, C, H, W] of 0 and 1."""
        with self._idle_on_error():
            packed = self._imaging.queue_host_upsampling(logits, geometry, threshold)
            self._cuda.synchronize(self._stream)
        return unpacked(packed, logits.shape[1], geometry)

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Block:
        """Bring feature maps, float32 [1, C, h, w] each, to a block of their own."""
        layout = self._network.features
        host = np.zeros(layout.nbytes, np.uint8)
        for slot, array in zip(layout.slots.values(), maps, strict=True):
            slot.view(host)[...] = array
        block = self._memory.allocate_reusable(layout.nbytes)
        with self._idle_on_error():
            self._cuda.upload(block.address, host, self._stream)
            self._cuda.synchronize(self._stream)
        return block

    def download(self, host: NDArray[np.uint8], block: Block) -> None:
        """Fill host memory with the beginning of a block."""
        with self._idle_on_error():
            self._cuda.download(host, block.address, self._stream)
            self._cuda.synchronize(self._stream)

    @contextmanager
    def _idle_on_error(self) -> Iterator[None]:
        """On any error, wait for the stream, so that nothing still uses the caller's memory."""
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
        if self._encoder.record():
            self._network.keep_kernels(None)
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
        packed = self._pinned_inputs.array[: run.inputs.nbytes]
        views = run.prompt
        views[POINTS][...] = 0
        views[POINTS][0, :objects, :points] = prompts.points
        views[LABELS][...] = PADDING_LABEL
        views[LABELS][0, :objects, :points] = prompts.labels
        views[HAS_MASKS][...] = prompts.masks is not None
        views[THRESHOLD][...] = threshold
        self._cuda.upload(self._inputs.address, packed, self._stream)
        if prompts.masks is not None:
            host = self._pinned_masks.pinned(run.masks.nbytes)
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
        context.set_scratch(self._scratch.address, self._scratch.nbytes)
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
        return DecoderRun(shape, inputs, self._pinned_inputs, masks, outputs, replay)

    def _make_encoder(self) -> Replay:
        network = self._network
        context = network.encoder.context()
        context.set_scratch(self._scratch.address, self._scratch.nbytes)
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
