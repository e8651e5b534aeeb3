"""Stand-in engines: ONNX graphs that PyTorch runs on the raw addresses and the stream of a lane.

On a real GPU everything of the lanes is real but the engines: memory, streams, recorded graphs,
kernels and embeddings for other libraries. On the fake one a run is queued like any other work.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tests.support.fake_cuda import FakeCuda, Operation, Region
from tests.support.torch_graph import TorchGraph
from torch import Tensor

from sam3rt import GpuOptions
from sam3rt.backends.tensorrt.backend import LaneBackend, allow_imaging
from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import Device
from sam3rt.backends.tensorrt.network import NamedAxes, Network
from sam3rt.backends.tensorrt.trt import Tensor as EngineTensor
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError

_MOST = {"batch": 2, "num_objects": 16, "num_masks": 16, "num_images": 16, "num_points": 256}


class _Raw:
    """Device memory, as PyTorch takes it without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


class TorchEngine:
    """A graph, as lanes run it."""

    def __init__(self, model: ir.Model | Path, cuda: Cuda) -> None:
        self.cuda = cuda
        self.is_fake = isinstance(cuda, FakeCuda)
        self.graph = TorchGraph(model, "cpu" if self.is_fake else f"cuda:{cuda.index}")
        self.axes = {
            name: tuple(s if isinstance(s, int) else str(s.value) for s in value.shape or ())
            for name, value in itertools.chain(
                self.graph.inputs.items(), self.graph.outputs.items()
            )
        }
        self.tensors = {
            name: EngineTensor.of_axes(name, value.dtype.numpy(), is_input, self.axes[name], _MOST)
            for values, is_input in ((self.graph.inputs, True), (self.graph.outputs, False))
            for name, value in values.items()
            if value.dtype is not None
        }

    def context(self) -> TorchContext:
        return TorchContext(self)


class TorchContext(NamedAxes):
    """One set of sizes and addresses."""

    def __init__(self, engine: TorchEngine) -> None:
        super().__init__(engine.axes)
        self._engine = engine
        # Working memory of its own, which a recorded graph keeps using.
        self._pool = None if engine.is_fake else torch.cuda.MemPool()

    def check_capturable(self, stream: int) -> None:
        pass

    def enqueue(self, stream: int) -> None:
        views = {name: self._view(name) for name in self._engine.tensors}
        if isinstance(self._engine.cuda, FakeCuda):
            regions = tuple(
                Region(self.addresses[n], t.nbytes(self.shape(n)), not t.is_input)
                for n, t in self._engine.tensors.items()
            )
            work = Operation("enqueue", regions, lambda: self._run(views), keep=views)
            self._engine.cuda.queue(stream, work, 0)
            return
        index = self._engine.cuda.index
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(
                    torch.cuda.stream(torch.cuda.ExternalStream(stream, device=index))
                )
                stack.enter_context(torch.cuda.use_mem_pool(self._pool, index))
                self._run(views)
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed: {error}") from error

    def _run(self, views: dict[str, Tensor]) -> None:
        for name, tensor in self._engine.graph.run(views).items():
            views[name].copy_(tensor)

    def _view(self, name: str) -> Tensor:
        engine = self._engine
        shape, dtype = self.shape(name), engine.tensors[name].dtype
        if isinstance(engine.cuda, FakeCuda):
            raw = engine.cuda.view(self.addresses[name], engine.tensors[name].nbytes(shape))
            return torch.from_numpy(raw.view(dtype).reshape(shape))
        raw_memory = _Raw(self.addresses[name], shape, dtype)
        return torch.as_tensor(raw_memory, device=f"cuda:{engine.cuda.index}")


class StandInBackend(LaneBackend):
    """A bundle's graphs in lanes, run by PyTorch.

    Args:
        bundle: the bundle.
        cuda: the GPU, or the fake one.
        device: what the driver says of it.
        graphs: encoder and decoder, typed or not; by default the bundle's own.
        options: of :class:`sam3rt.GpuOptions`.
    """

    def __init__(
        self,
        bundle: Bundle,
        cuda: Cuda,
        device: Device,
        graphs: tuple[ir.Model | Path, ir.Model | Path] | None = None,
        **options: Any,
    ) -> None:
        # PyTorch's convolutions are in TF32 unless told otherwise.
        torch.backends.cudnn.allow_tf32 = False
        manifest = bundle.manifest
        own = (bundle.file(manifest.encoder.model), bundle.file(manifest.decoder.model))
        with cuda.active():
            encoder, decoder = (TorchEngine(graph, cuda) for graph in graphs or own)
            network = Network(bundle, encoder, decoder)
        super().__init__(bundle, "stand-in", "fp32", network, cuda, device, GpuOptions(**options))
        allow_imaging(self)

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}
