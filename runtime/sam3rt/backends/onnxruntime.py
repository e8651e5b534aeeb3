"""The ONNX Runtime backend: CPU, or CUDA where onnxruntime-gpu finds a device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..accuracy.select import Recipe
from ..accuracy.verdicts import Subject
from ..bundle import Bundle, GraphSpec
from ..bundle.contract import EXPORT_ID, LoadedTensor, check_graph, graph_source, load_graph
from ..errors import BackendError, BundleError
from ..features import Features
from ..prompts import PackedPrompts, decoder_inputs
from .base import Backend, Offer

_LOG = logging.getLogger(__name__)

_FP32, _TF32 = "fp32", "tf32"
_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class OrtFeatures(Features):
    """Feature maps held by ONNX Runtime.

    Attributes:
        values: one ``OrtValue`` per map.
    """

    values: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return sum(value.tensor_size_in_bytes() for value in self.values)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return str(self.values[0].device_name())

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""
        return tuple(np.array(value.numpy()) for value in self.values)


def offer(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
    map_weights: bool = False,
) -> Offer:
    """What ONNX Runtime can do here: FP32; on CUDA also TF32, where the gate allows it.

    Args:
        bundle: an opened bundle.
        device: ``"auto"`` takes CUDA where it works and the CPU otherwise; ``"cpu"``,
            ``"cuda"`` or ``"cuda:N"`` insist.
        threads: threads per operator on the CPU; ``None`` leaves it to ONNX Runtime.
        precision: ``"auto"``, ``"fp32"`` or, on CUDA, ``"tf32"``.
        map_weights: see :func:`sam3rt.load_model`.

    Raises:
        BackendError: the device or the precision is not to be had here.
    """
    kind, number = _choose_device(device)
    recipes = [Recipe(_FP32, _FP32)]
    gpu = _gpu(number) if kind == "cuda" else None
    if gpu is not None:
        recipes.insert(0, Recipe(_TF32, _TF32, Subject("onnxruntime", ort.__version__, gpu, _TF32)))
    wanted = tuple(r for r in recipes if precision in ("auto", r.name))
    if not wanted:
        raise BackendError(
            f"precision {precision!r} was asked for; the onnxruntime backend offers "
            f"{', '.join(r.name for r in recipes)} on {kind}"
        )

    def open_recipe(recipe: Recipe) -> OnnxRuntimeBackend:
        where = "cpu" if kind == "cpu" else f"cuda:{number}"
        return OnnxRuntimeBackend(
            bundle, where, recipe.name, threads=threads, map_weights=map_weights
        )

    return Offer(wanted, open_recipe)


class OnnxRuntimeBackend(Backend):
    """Runs a bundle's graphs in two ONNX Runtime sessions, created at first use.

    Args:
        bundle: an opened bundle.
        device: ``"cpu"`` or ``"cuda:N"``.
        precision: ``"fp32"``; on CUDA also ``"tf32"``, which rounds the factors of matrix products.
        threads: threads per operator on the CPU; ``None`` leaves it to ONNX Runtime.
        map_weights: see :func:`sam3rt.load_model`.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        precision: str = _FP32,
        *,
        threads: int | None = None,
        map_weights: bool = False,
    ) -> None:
        super().__init__(bundle, device, precision)
        self._threads = threads
        self._map_weights = map_weights
        self._kind, _, number = device.partition(":")
        self._device_id = int(number or 0)
        self._feature_names = [spec.name for spec in bundle.manifest.encoder.outputs]
        # Two threads may ask for a session at once; it must be made once.
        self._lock = threading.Lock()
        _LOG.info("ONNX Runtime %s on %s", ort.__version__, self.device)

    def close(self) -> None:
        """Let go of both sessions; calls under way keep theirs to their end."""
        super().close()
        with self._lock:
            for name in ("_encoder_session", "_decoder_session"):
                self.__dict__.pop(name, None)

    def prepare(self) -> None:
        """Load both graphs now."""
        self.check_process()
        self._encoder()
        self._decoder()

    def versions(self) -> dict[str, str]:
        """Version of ONNX Runtime."""
        return {"onnxruntime": ort.__version__}

    def _encode(self, pixels: NDArray[np.float32]) -> OrtFeatures:
        session = self._encoder()
        binding = session.io_binding()
        binding.bind_cpu_input(self.bundle.manifest.encoder.inputs[0].name, pixels)
        for name in self._feature_names:
            binding.bind_output(name, self._kind, self._device_id)
        self._run(session, binding, "encoder")
        return OrtFeatures(tuple(binding.get_outputs()))

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        own = self._own(features, OrtFeatures)
        session = self._decoder()
        binding = session.io_binding()
        for name, value in zip(self._feature_names, own.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        # The binding does not keep arrays alive; this local does until the run is over.
        inputs = decoder_inputs(prompts, self._no_mask)
        for name, array in inputs:
            binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._run(session, binding, "decoder")
        return list(binding.copy_outputs_to_cpu())

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> OrtFeatures:
        """Bring feature maps to the device."""
        return OrtFeatures(
            tuple(
                ort.OrtValue.ortvalue_from_numpy(
                    np.array(array, np.float32, order="C"), self._kind, self._device_id
                )
                for array in maps
            )
        )

    def _run(self, session: Any, binding: Any, graph: str) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises classes of its own for each status
            raise BackendError(f"ONNX Runtime failed in the {graph}: {error}") from error

    def _encoder(self) -> Any:
        with self._lock:
            return self._encoder_session

    def _decoder(self) -> Any:
        with self._lock:
            return self._decoder_session

    @cached_property
    def _encoder_session(self) -> Any:
        # A memory pattern plans all of a run's buffers as one block, from the second run on and
        # beside those of the first: 10 GB in place of 6 GB for the published SAM 3.
        return self.create_session(self.bundle.manifest.encoder, memory_pattern=False)

    @cached_property
    def _decoder_session(self) -> Any:
        return self.create_session(self.bundle.manifest.decoder, memory_pattern=True)

    def create_session(self, graph: GraphSpec, *, memory_pattern: bool) -> Any:
        """Check and load one graph. Backends that make their graphs themselves replace this.

        Raises:
            BackendError: ONNX Runtime cannot load it, or not on the device that was asked for.
            BundleError: the files are not what the manifest says, or not those of a bundle.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = memory_pattern
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._kind == "cuda":
            # Unless told otherwise, the provider computes in TF32.
            cuda = {"device_id": self._device_id, "use_tf32": int(self.precision == _TF32)}
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        source: str | bytes
        if self._map_weights:
            source = graph_source(self.bundle, graph)
        else:
            loaded = load_graph(self.bundle, graph)
            source, weights = loaded.model, loaded.initializers()
            # Not ..._from_files_in_memory, which Python has only since ONNX Runtime 1.24.
            options.add_external_initializers(
                list(weights), [ort.OrtValue.ortvalue_from_numpy(w) for w in weights.values()]
            )
        try:
            session = ort.InferenceSession(source, options, providers=providers)
        except BundleError:
            raise
        except Exception as error:  # see _run
            raise BackendError(f"ONNX Runtime cannot load {graph.model.file}: {error}") from error
        self._check(session, graph)
        return session

    def _check(self, session: Any, graph: GraphSpec) -> None:
        """Compare a session with what the manifest promises."""
        inputs, outputs = (
            [LoadedTensor(a.name, _ORT_TYPES.get(a.type, a.type), a.shape) for a in arguments]
            for arguments in (session.get_inputs(), session.get_outputs())
        )
        metadata = session.get_modelmeta().custom_metadata_map
        check_graph(self.bundle, graph, metadata.get(EXPORT_ID, ""), inputs, outputs)
        if self._kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError(
                "CUDA was asked for, but ONNX Runtime could not use it; check the driver and "
                "that CUDA and cuDNN match this onnxruntime-gpu"
            )


def providers() -> list[str]:
    """The execution providers that this ONNX Runtime was built with, for bug reports."""
    return list(ort.get_available_providers())


def _choose_device(device: str) -> tuple[str, int]:
    """Kind and number of the device to use; ``create_backend`` has checked how it is written."""
    if device == "cpu":
        return "cpu", 0
    usable = "CUDAExecutionProvider" in ort.get_available_providers() and _cuda_answers()
    if device == "auto":
        return ("cuda", 0) if usable else ("cpu", 0)
    if not usable:
        raise BackendError(
            f"device {device!r} was asked for, but CUDA is not usable here: it needs an NVIDIA "
            "driver and pip install 'sam3rt[gpu]' (without the plain onnxruntime beside it)"
        )
    return "cuda", int(device.partition(":")[2] or 0)


def _cuda_answers() -> bool:
    """Whether a value can be placed on the first CUDA device.

    onnxruntime-gpu lists its CUDA provider even where there is no driver.
    """
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # whatever the provider's libraries raise means "no"
        _LOG.info("CUDA is not usable: %s", error)
        return False
    return True


def _gpu(number: int) -> str | None:
    """A GPU and its driver, in words that tell two kinds apart; ``None`` if the driver is silent.

    A verdict on an unknown GPU could not be remembered, so none is asked for.
    """
    from .tensorrt.driver import probe

    try:
        device = probe(number)
    except BackendError as error:
        _LOG.info("tf32 is not offered: %s", error)
        return None
    return f"{device.gpu.name}, {device.gpu.compute_capability}, driver {device.driver_version}"
