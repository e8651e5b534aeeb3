"""A lane: a stream, contexts and buffers, all that one thread needs to run the engines."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...bundle.contract import HAS_MASKS, LABELS, MASKS, PADDING_LABEL, POINTS
from ...errors import BackendError
from ...geometry import ImageGeometry
from ...masks import MaskOptions
from ...prompts import PackedPrompts
from .buffers import GrowingBuffer, Workspace
from .imaging import MASKING, DeviceImaging, Masking
from .memory import Block, Layout, Memory
from .network import JOB, Context, Network, set_addresses
from .runs import Part, ShapeClass, classify, join

_LOG = logging.getLogger(__name__)

# Shape classes whose contexts a lane keeps. Each holds a little device memory of TensorRT's own.
# A warm-up makes nine; the others are for calls in which each object has a mask prompt, or an image
# of its own.
_KEPT_CLASSES = 24


class Replay:
    """Queues the same work again and again.

    TensorRT wants a run before the recording, and a context of its own for each recording.

    Args:
        work: queues it; it runs the context and whatever stands around it.
        context: the context, with shapes and addresses set for good.
        memory: gives the graph back.
        stream: the lane's stream.
        generation: of the lane's workspace that the addresses belong to.

    Attributes:
        generation: the same.
    """

    def __init__(
        self,
        work: Callable[[], None],
        context: Context,
        memory: Memory,
        stream: int,
        generation: int,
    ) -> None:
        self._work = work
        self._context = context
        self._cuda = memory.cuda
        self._memory = memory
        self._stream = stream
        self.generation = generation
        self._graph: int | None = None
        self._tried = False

    def queue(self) -> None:
        """Queue one run."""
        if self._graph is None:
            self._work()
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
            if self._cuda.lost is not None:
                raise
            _LOG.info("runs without a CUDA graph: %s", str(error))
            return True
        self._memory.give_back_after(self, self._cuda.destroy_graph, self._graph)
        return True

    def _capture(self) -> int:
        self._context.check_capturable(self._stream)
        self._cuda.begin_capture(self._stream)
        try:
            self._work()
        except BaseException:
            with contextlib.suppress(BackendError):
                self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
            raise
        return self._cuda.end_capture(self._stream)


class DecoderRun(NamedTuple):
    """The decoder for one shape class on one lane.

    Attributes:
        prompt: the prompt block's tensors in the lane's pinned memory.
        masks: layout of the mask prompt block.
        outputs: layout of the output block.
        maps: layout of the feature maps of all images.
        replay: uploads the prompt, runs the decoder and makes masks as the prompt block says.
    """

    prompt: dict[str, NDArray[Any]]
    masks: Layout
    outputs: Layout
    maps: Layout
    replay: Replay


class Lane:
    """A stream, contexts and buffers for the decoder. Serves one call at a time, to its end.

    Every method returns, or raises, with the stream idle. Memory is taken for the shapes in use.

    Args:
        network: the engines.
        memory: of the GPU.
        imaging: pre- and postprocessing on the device.

    Attributes:
        encodes: whether it is an encoder lane, too.
        masking: makes masks.
        is_given_up: whether its pool has no more use for it.

    Raises:
        BackendError: there is not enough device memory.
    """

    encodes = False

    def __init__(self, network: Network, memory: Memory, imaging: DeviceImaging) -> None:
        self.is_given_up = False
        self._held: weakref.ref[Block] | None = None
        self._network = network
        self._cuda = memory.cuda
        self._memory = memory
        self._imaging = imaging
        self._stream = self._cuda.create_stream()
        memory.give_back_after(self, self._cuda.destroy_stream, self._stream)
        # One after the other on one stream: the engines of a lane share working memory.
        self._workspace = Workspace(memory)
        self._features = memory.allocate(network.features.nbytes)
        self._inputs = memory.allocate(network.inputs(network.largest).nbytes)
        self._pinned_inputs = memory.allocate_pinned(self._inputs.nbytes)
        self._staging = GrowingBuffer(memory)
        self._results = GrowingBuffer(memory)
        self.masking = Masking(memory, imaging, self._stream)
        self._runs: OrderedDict[ShapeClass, DecoderRun] = OrderedDict()

    def decode(self, parts: Sequence[Part], names: Sequence[str]) -> None:
        """Run the decoder, and make masks of its first output where a part wants them.

        Args:
            parts: at most as many objects and points as the engine takes. All want masks, or none.
            names: the outputs wanted; the first is the mask logits.
        """
        features = [part.block for part in parts for _ in range(part.objects)]
        if all(block is features[0] for block in features):
            features = features[:1]
        prompts = join([part.prompts for part in parts])
        pictures = [part.picture for part in parts if part.picture is not None]
        objects, points = prompts.labels.shape
        own_masks = prompts.masks is not None and len(prompts.masks) > 1
        own_images = len(features) > 1
        shape = classify(objects, points, own_masks, self._network.limits, own_images=own_images)
        with self._idle_on_error():
            run = self._run(shape)
            outputs_at = self._workspace["outputs"].address
            logits = outputs_at + run.outputs.slots[names[0]].offset
            run.prompt[JOB][...] = 0
            made: list[int] = []
            if len(pictures) == 1:
                made = self.masking.fill(run.prompt[JOB], logits, pictures)
            self._bring(features, run)
            self._send(run, prompts)
            run.replay.queue()
            if len(pictures) > 1:
                made = self.masking.queue(logits, pictures)
            copies = self._fetch(parts, names, run)
            self.masking.bring(made, pictures)
            if run.replay.record():
                self._network.keep_kernels(shape)
        for result, host in copies:
            result[...] = host

    def make_masks(
        self, logits: NDArray[np.float32], where: ImageGeometry, options: MaskOptions
    ) -> NDArray[np.uint8]:
        """What :meth:`decode` would make of float32 [P, C, h, w]: uint8 [P, C, H, W]."""
        picture = self.masking.room(logits.shape[:2], where, options)
        with self._idle_on_error():
            host = self._staging.pinned(logits.nbytes)
            block = self._staging.block(len(host))
            host.view(np.float32)[...] = logits.ravel()
            self._cuda.upload(block.address, host, self._stream)
            self.masking.bring(self.masking.queue(block.address, [picture]), [picture])
        return picture.masks

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Block:
        """Bring feature maps, float32 [1, C, h, w] each, to a block of their own."""
        layout = self._network.features
        with self._idle_on_error():
            host = self._staging.pinned(layout.nbytes)
            for slot, array in zip(layout.slots.values(), maps, strict=True):
                slot.view(host)[...] = array
            return self._upload(host, layout.nbytes)

    def upload_image(self, image: NDArray[np.uint8]) -> Block:
        """Bring uint8 [H, W, 3] to a block of its own."""
        with self._idle_on_error():
            # In steps of a megabyte, so that images of similar sizes share spare blocks.
            room = -(-image.nbytes >> 20) << 20
            # CUDA brings it by pinned memory of its own, faster than that could be done here.
            return self._upload(np.ascontiguousarray(image), room)

    def download(self, host: NDArray[np.uint8], block: Block) -> None:
        """Fill host memory with the beginning of a block."""
        with self._idle_on_error():
            pinned = self._results.pinned(host.nbytes)
            self._cuda.download(pinned, block.address, self._stream)
            self._cuda.synchronize(self._stream)
            host[...] = pinned

    def warm_up(self, shapes: Sequence[ShapeClass], names: Sequence[str]) -> None:
        """Run the decoder for each class and record it, the largest class first."""
        self._held = None
        for shape in sorted(shapes, reverse=True):
            prompts = PackedPrompts(
                np.zeros((shape.objects, shape.points, 2), np.float32),
                np.full((shape.objects, shape.points), PADDING_LABEL, np.int64),
                None,
            )
            self.decode([Part(self._features, prompts, [])], names)

    def holds(self, features: Block) -> bool:
        """Whether its fixed buffers hold these feature maps."""
        return self._held is not None and self._held() is features

    @contextmanager
    def _idle_on_error(self) -> Iterator[None]:
        """On any error, wait for the stream, so that nothing still uses a buffer.

        Raises:
            DeviceLostError: the GPU is gone for good, whatever the error was.
        """
        try:
            yield
        except BaseException as error:
            self._held = None
            with contextlib.suppress(BackendError):
                self._cuda.synchronize(self._stream)
            if self._cuda.lost is not None and isinstance(error, BackendError):
                raise self._cuda.lost_error() from error
            raise

    def _upload(self, host: NDArray[Any], room: int) -> Block:
        block = self._memory.allocate_reusable(room)
        self._cuda.upload(block.address, host, self._stream)
        self._cuda.synchronize(self._stream)
        return block

    def _fetch(
        self, parts: Sequence[Part], names: Sequence[str], run: DecoderRun
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Queue the outputs' way to the host.

        Returns:
            What is left to copy once the stream is idle: to where, and from where.
        """
        outputs_at, slots = self._workspace["outputs"].address, run.outputs.slots
        fetched = names[1:] if all(part.is_pinned for part in parts) else names
        start, end = run.outputs.span(fetched) if fetched else (0, 0)
        host = self._results.pinned(end - start)
        if fetched:
            self._cuda.download(host, outputs_at + start, self._stream)
        copies, at = [], 0
        for part in parts:
            # A warm-up has no use for results.
            for name, result in zip(names, part.results, strict=False):
                slot = slots[name]
                if name == names[0] and part.is_pinned:
                    first = slot.offset + at * (slot.nbytes // slot.shape[1])
                    self._cuda.download(result, outputs_at + first, self._stream)
                else:
                    copies.append((result, slot.view(host, start)[:, at : at + part.objects]))
            at += part.objects
        return copies

    def _bring(self, features: Sequence[Block], run: DecoderRun) -> None:
        """Copy feature maps to the buffers that the run reads, unless they are there."""
        network, stream = self._network, self._stream
        if len(features) > 1:
            images = self._workspace["images"].address
            for name, slot in run.maps.slots.items():
                one = network.features.slots[name]
                for index, block in enumerate(features):
                    target = images + slot.offset + index * one.nbytes
                    self._cuda.copy(target, block.address + one.offset, one.nbytes, stream)
            return
        (block,) = features
        if self.holds(block) or block is self._features:
            return
        self._cuda.copy(self._features.address, block.address, network.features.nbytes, stream)
        self._held = weakref.ref(block)

    def _send(self, run: DecoderRun, prompts: PackedPrompts) -> None:
        """Fill in prompts, padded to their class, and queue the upload of their masks."""
        objects, points = prompts.labels.shape
        views = run.prompt
        views[POINTS][...] = 0
        views[POINTS][0, :objects, :points] = prompts.points
        views[LABELS][...] = PADDING_LABEL
        views[LABELS][0, :objects, :points] = prompts.labels
        views[HAS_MASKS][...] = prompts.masks is not None
        if prompts.masks is not None:
            host = self._staging.pinned(run.masks.nbytes)
            view = run.masks.slots[MASKS].view(host)
            view[0, : len(prompts.masks)] = prompts.masks
            view[0, len(prompts.masks) :] = 0
            self._cuda.upload(self._workspace["masks"].address, host, self._stream)

    def _run(self, shape: ShapeClass) -> DecoderRun:
        run = self._runs.pop(shape, None)
        if run is None or run.replay.generation != self._workspace.generation:
            while len(self._runs) >= _KEPT_CLASSES:
                self._runs.popitem(last=False)
            run = self._make_run(shape)
        # The one used last stands last.
        self._runs[shape] = run
        return run

    def _make_run(self, shape: ShapeClass) -> DecoderRun:
        network, workspace, stream = self._network, self._workspace, self._stream
        inputs, masks, outputs = network.inputs(shape), network.masks(shape), network.outputs(shape)
        context = network.decoder.context()
        maps = network.batch(shape.images)
        for layout in (maps, inputs, masks):
            for name, slot in layout.slots.items():
                if name != JOB:
                    context.set_shape(name, slot.shape)
        workspace.fit(
            scratch=context.scratch_bytes(),
            masks=masks.nbytes,
            outputs=outputs.nbytes,
            images=maps.nbytes if shape.images > 1 else 0,
        )
        context.set_scratch(workspace["scratch"].address, workspace["scratch"].nbytes)
        images = workspace["images"] if shape.images > 1 else self._features
        set_addresses(context, maps, images)
        set_addresses(context, inputs, self._inputs)
        set_addresses(context, masks, workspace["masks"])
        set_addresses(context, outputs, workspace["outputs"], "decoder")
        cuda, imaging, target = self._cuda, self._imaging, self._inputs.address
        packed = self._pinned_inputs[: inputs.nbytes]
        prompt = {name: slot.view(packed) for name, slot in inputs.slots.items()}
        job = target + inputs.slots[JOB].offset

        def work() -> None:
            cuda.upload(target, packed, stream)
            context.enqueue(stream)
            if imaging.available:
                imaging.queue(MASKING, job, stream)

        replay = Replay(work, context, self._memory, stream, workspace.generation)
        return DecoderRun(prompt, masks, outputs, maps, replay)
