"""ONNX Runtime's sessions in lanes on a GPU, as TensorRT's engines run there.

Memory, pre- and postprocessing on the device, embeddings for other libraries and the number of
calls at a time are what they are with TensorRT; see :class:`..tensorrt.backend.LaneBackend`. Only
what runs between two addresses differs: a session whose inputs and outputs are bound to them.

ONNX Runtime ties a stream to a session (``user_compute_stream``), while every lane has one of its
own and lanes share the sessions. So a run first waits for its lane's stream, and returns when
ONNX Runtime's own stream is done. That costs some ten microseconds, and needs no order between
streams to be kept. For the same reason a lane cannot record a run in its own CUDA graph; ONNX
Runtime records one itself for each set of sizes and addresses.
"""

from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import onnxruntime as ort

from ...bundle import Bundle, GraphSpec
from ...errors import BackendError
from ..options import GpuOptions
from ..tensorrt.backend import LaneBackend, allow_imaging
from ..tensorrt.cuda import Cuda
from ..tensorrt.driver import Device
from ..tensorrt.network import NamedAxes, Network
from ..tensorrt.trt import Tensor
from .sessions import ORT_TYPES, cuda_options, open_session
from .typed import Graphs

_LOG = logging.getLogger(__name__)

# A session takes any size; these bound what a lane keeps ready. More objects run in parts.
_MOST = {"num_objects": 16, "num_masks": 16, "num_images": 16, "num_points": 4096}
# No graph is recorded in runs of this number.
_NOT_RECORDED = -1
# Graphs of a session. It keeps them to its end: contexts beyond so many run without one.
_MOST_GRAPHS = 128


class OnnxRuntimeLanes(LaneBackend):
    """Runs two sessions in lanes on a GPU.

    Args:
        bundle: the bundle.
        graphs: what is run.
        device: what the driver says of the GPU.
        gpu: how to use it.
        max_images: images in one run of the encoder, at most.
        records: whether runs are recorded as CUDA graphs, where ONNX Runtime can.

    Raises:
        BackendError: cuda-python is missing, ONNX Runtime cannot load a graph, or there is not
            enough device memory.
        BundleError: a file is missing or was changed, or the parity record is damaged.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Graphs,
        device: Device,
        gpu: GpuOptions,
        *,
        max_images: int = 1,
        records: bool = True,
    ) -> None:
        self._driver = device.driver_version
        cuda, manifest = Cuda(device.index, blocking=gpu.blocking), graphs.bundle.manifest
        with cuda.active():
            encoder, decoder = (
                _open(graphs, graph, cuda, max_images, records)
                for graph in (manifest.encoder, manifest.decoder)
            )
            network = Network(bundle, encoder, decoder)
        self._pixels_shape = network.pixels_shape(1)
        super().__init__(bundle, "onnxruntime", graphs.precision, network, cuda, device, gpu)
        allow_imaging(self)

    def prepare(self) -> None:
        """Make every lane and record the usual runs, for this thread's calls and for others'."""
        super().prepare()
        with ThreadPoolExecutor(1) as other:
            other.submit(super().prepare).result()
            other.submit(self.encode, np.zeros(self._pixels_shape, np.float32)).result()

    def versions(self) -> dict[str, str]:
        """Versions of ONNX Runtime and the driver."""
        return {"onnxruntime": ort.__version__, "driver": self._driver}


def _open(
    graphs: Graphs, graph: GraphSpec, cuda: Cuda, max_images: int, records: bool
) -> SessionEngine:
    """Load a graph, to be recorded if ONNX Runtime allows it.

    It refuses where it would leave a part of the graph to the CPU.
    """
    if records:
        try:
            session = open_session(
                graphs, graph, cuda_options(cuda.index, graphs, graph, records=True)
            )
            return SessionEngine(session, cuda, max_images, True)
        except BackendError as error:
            _LOG.info("%s runs without a CUDA graph: %s", graph.model.file, str(error))
    session = open_session(graphs, graph, cuda_options(cuda.index, graphs, graph))
    return SessionEngine(session, cuda, max_images, False)


class SessionEngine:
    """A session, as lanes run it.

    Args:
        session: ONNX Runtime's own object.
        cuda: the GPU.
        max_images: images in one run, at most.
        records: whether the session records CUDA graphs.

    Attributes:
        tensors: what it reads and writes, by name.
        session: the same.
        cuda: the same.
    """

    def __init__(self, session: Any, cuda: Cuda, max_images: int, records: bool) -> None:
        self.session = session
        self.cuda = cuda
        self.axes = {
            argument.name: tuple(argument.shape)
            for argument in (*session.get_inputs(), *session.get_outputs())
        }
        most = {"batch": max_images} | _MOST
        self.tensors = {
            argument.name: Tensor.of_axes(
                argument.name, _type_of(argument), is_input, self.axes[argument.name], most
            )
            for arguments, is_input in (
                (session.get_inputs(), True),
                (session.get_outputs(), False),
            )
            for argument in arguments
        }
        # With CUDA graphs, ONNX Runtime allows one run at a time, and keeps what a thread has
        # recorded for that thread, with handles of their own memory, to the session's end. So two
        # threads run it: the one that loads it, which waits for no other, and one for all others.
        self._turn = threading.Lock()
        self._loader = threading.local()
        self._loader.is_here = True
        self._thread = ThreadPoolExecutor(1, "sam3rt-onnxruntime")
        recorded = range(1, _MOST_GRAPHS + 1) if records else ()
        self._numbers = itertools.chain(recorded, itertools.repeat(_NOT_RECORDED))

    def context(self) -> SessionContext:
        """A way of running it at one set of sizes and addresses."""
        return SessionContext(self, next(self._numbers))

    def run(self, binding: Any, number: int) -> None:
        """Run to the end. Calls from several threads take turns.

        Args:
            binding: where inputs and outputs lie.
            number: of the CUDA graph that is recorded at first and replayed later. A number
                belongs to one binding: ONNX Runtime does not check that.
        """
        if hasattr(self._loader, "is_here"):
            self._run(binding, number)
            return
        call = self._thread.submit(self._run, binding, number)
        try:
            call.result()
        except BaseException:
            # Whoever is interrupted must not use the buffers before the run's end.
            wait([call])
            raise

    def _run(self, binding: Any, number: int) -> None:
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        with self._turn, self.cuda.active():
            self.session.run_with_iobinding(binding, options)


class SessionContext(NamedAxes):
    """One set of sizes and addresses of a session. It is run by one thread at a time."""

    def __init__(self, engine: SessionEngine, number: int) -> None:
        super().__init__(engine.axes)
        self._engine = engine
        self._number = number
        self._binding: Any = None

    def check_capturable(self, stream: int) -> None:
        """Refuse to be recorded.

        Raises:
            BackendError: always.
        """
        raise BackendError("ONNX Runtime records its own CUDA graphs")

    def enqueue(self, stream: int) -> None:
        """Wait for what is queued on a stream, and run to the end.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        if self._binding is None:
            self._binding = self._bind()
        engine = self._engine
        engine.cuda.synchronize(stream)
        try:
            engine.run(self._binding, self._number)
        except Exception as error:  # ONNX Runtime raises classes of its own for each status
            if self._number == _NOT_RECORDED:
                raise BackendError(f"ONNX Runtime failed: {error}") from error
            _LOG.info("runs without a CUDA graph: %s", error)
            self._number = _NOT_RECORDED
            self.enqueue(stream)

    def _bind(self) -> Any:
        engine = self._engine
        binding = engine.session.io_binding()
        for name, tensor in engine.tensors.items():
            bind = binding.bind_input if tensor.is_input else binding.bind_output
            where = ("cuda", engine.cuda.index)
            bind(name, *where, tensor.dtype.type, self.shape(name), self.addresses[name])
        return binding


def _type_of(argument: Any) -> np.dtype[Any]:
    known = ORT_TYPES.get(argument.type)
    if known is None:
        raise BackendError(f"tensor {argument.name} has type {argument.type}: build it again")
    return np.dtype(known)
