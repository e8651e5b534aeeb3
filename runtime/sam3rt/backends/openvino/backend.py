"""The OpenVINO backend: CPUs, in FP32, or in BF16 where the CPU has it and the gate allows it."""

from __future__ import annotations

import io
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager

from ...accuracy.select import Recipe
from ...accuracy.verdicts import Subject, load_verdict
from ...bundle import Bundle, GraphSpec
from ...bundle.contract import (
    EXPORT_ID,
    LoadedTensor,
    check_graph,
    graph_source,
    load_graph,
)
from ...errors import BackendError, BundleError
from ...features import Features
from ...machine import processor_has, processor_name
from ...prompts import PackedPrompts, decoder_inputs
from ..base import Backend, Offer, UnfitError
from ..kept import Once
from ..options import BackendOptions
from .bf16 import FIRST_BLOCKS, FRAGILE, TOKENS, matmuls_in_bf16
from .graphs import CompiledGraph, Decoder
from .hidden_layers import split_hidden_layers
from .layouts import rearrange_decoder

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

# Must outlive every model that it has read.
_FRONT_ENDS = FrontEndManager()
# OpenVINO's names of element types.
_TYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}
# What of the encoder and of the decoder stays FP32 in each recipe, fastest first; ``None`` for all
# of it. In the others matmuls are BF16. What an encoder's blocks add up and its normalizations stay
# FP32, as in PyTorch's autocast. OpenVINO's own BF16, which rounds those too, is little faster.
_RECIPES: dict[str, tuple[re.Pattern[str] | None, re.Pattern[str] | None]] = {
    "bf16": (FRAGILE, TOKENS),
    "bf16-encoder": (FRAGILE, None),
    "bf16-mixed": (FIRST_BLOCKS, None),
    "fp32": (None, None),
}
# Part of what a verdict is about: counts up when a recipe comes to mean something else.
_RECIPES_REVISION = 5
# Channels of a hidden layer that are computed at a time where the processor has tiles: the fastest
# of what was tried (benchmarks/NOTES.md). Without tiles, parts are no faster.
_PART_WIDTH = 576
_FULL = "fp32"
_REDUCED = tuple(name for name in _RECIPES if name != _FULL)
_UNPROVEN = "-unproven"
_OFFERED = ("auto", *_RECIPES, *(name + _UNPROVEN for name in _REDUCED))
# Models that fail the gate in BF16 on every processor tried (benchmarks/NOTES.md): "auto" does not
# try them again.
_KNOWN_TO_FAIL = frozenset({"mobile_sam"})


def offer(bundle: Bundle, options: BackendOptions) -> Offer:
    """What OpenVINO can do here.

    There are four recipes: ``"bf16"``; ``"bf16-encoder"``, whose decoder computes in FP32;
    ``"bf16-mixed"``, whose encoder also computes its first blocks and its neck in FP32; and
    ``"fp32"``. Sums over blocks, normalizations and, in the decoder, everything but what runs over
    the image are FP32 in each of them. The first three need the gate's approval.

    Args:
        bundle: an opened bundle.
        options: the precision ``"auto"`` offers all recipes where the CPU has BF16; a recipe's name
            insists on it; with ``"-unproven"`` after it, such as ``"bf16-unproven"``, it does
            without the gate, for those who have compared by other means.

    Raises:
        BackendError: the device or the precision is not to be had here.
    """
    device, precision = options.device, options.precision
    if device not in ("auto", "cpu"):
        raise BackendError(f"device {device!r} was asked for; the openvino backend runs on the CPU")
    if precision not in _OFFERED:
        raise BackendError(
            f"precision {precision!r} was asked for; the openvino backend offers "
            f"{', '.join(_OFFERED)}"
        )
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if (mode := os.environ.get(name, "")).lower() not in ("", "strict"):
            # On processors with tiles oneDNN then computes what is FP32 in BF16, unproven.
            raise UnfitError(f"{name}={mode} lets OpenVINO round what is FP32: unset it")
    has_bf16 = _has_bf16(ov.Core())
    if precision not in ("auto", _FULL) and not has_bf16:
        raise BackendError(f"precision {precision!r} was asked for; this CPU has no BF16")
    names: tuple[str, ...] = (precision.removesuffix(_UNPROVEN),)
    if precision == "auto":
        hopeless = not has_bf16 or bundle.manifest.model_type in _KNOWN_TO_FAIL
        names = (_FULL,) if hopeless else tuple(_RECIPES)
    proof_needed = not precision.endswith(_UNPROVEN)
    if not proof_needed:
        _LOG.warning("computing in %s without proof: results may be wrong unnoticed", names[0])
    recipes = tuple(
        Recipe(name, _encoder_of(name), _subject(name) if proof_needed and name != _FULL else None)
        for name in names
    )

    def open_recipe(recipe: Recipe) -> OpenVinoBackend:
        return OpenVinoBackend(
            bundle, recipe.name, threads=options.threads, map_weights=options.map_weights
        )

    return Offer(recipes, open_recipe)


def known_recipes(bundle: Bundle) -> dict[str, str]:
    """What this machine remembers of each recipe for a bundle, in words."""
    core = ov.Core()
    said = {}
    for recipe in _REDUCED:
        verdict = load_verdict(bundle, _subject(recipe))
        if not _has_bf16(core):
            said[recipe] = "this CPU has no BF16"
        elif verdict is None:
            said[recipe] = "not compared yet"
        else:
            said[recipe] = f"{'passed' if verdict.passed else 'failed'}: {verdict.explanation}"
    return said | {_FULL: "needs no proof"}


def _encoder_of(recipe: str) -> str:
    """What identifies a recipe's encoder: two of them share one."""
    exact = _RECIPES[recipe][0]
    return _FULL if exact is None else exact.pattern


def _subject(recipe: str) -> Subject:
    version = f"{ov.__version__}, recipes {_RECIPES_REVISION}{' in parts' if _has_tiles() else ''}"
    return Subject(OpenVinoBackend.name, version, processor_name(), recipe)


def _has_bf16(core: Any) -> bool:
    """Whether this CPU multiplies in BF16; OpenVINO lists it only where it does."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _has_tiles() -> bool:
    """Whether BF16 matmuls run on tiles (AMX), which OpenVINO's Python interface does not tell."""
    return processor_has("amx_bf16")


@dataclass(frozen=True, eq=False)
class OpenVinoFeatures(Features):
    """Feature maps held by OpenVINO.

    Attributes:
        tensors: one float32 ``openvino.Tensor`` per map.
    """

    tensors: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return sum(tensor.get_byte_size() for tensor in self.tensors)

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""
        return tuple(np.array(tensor.data) for tensor in self.tensors)


class OpenVinoBackend(Backend):
    """Runs a bundle's graphs with OpenVINO's CPU plugin, compiled at first use.

    Feature maps and outputs are float32 in every recipe.

    Args:
        bundle: an opened bundle.
        recipe: see :func:`offer`; nothing is proved here.
        threads: CPU threads; ``None`` leaves it to OpenVINO.
        map_weights: see :func:`sam3rt.load_model`.
    """

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        recipe: str,
        *,
        threads: int | None = None,
        map_weights: bool = False,
    ) -> None:
        super().__init__(bundle, "cpu", recipe)
        self._map_weights = map_weights
        self._core = ov.Core()
        self._threads = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._encoder: Once[CompiledGraph] = Once()
        self._decoder: Once[Decoder] = Once()

    def close(self) -> None:
        """Let go of both compiled graphs; calls under way keep theirs to their end."""
        super().close()
        self._encoder.close()
        self._decoder.close()

    def prepare(self) -> None:
        """Compile both graphs now."""
        self.check_process()
        self._encoder.get(self._load_encoder)
        self._decoder.get(self._load_decoder)

    def versions(self) -> dict[str, str]:
        """Version of OpenVINO."""
        return {"openvino": ov.__version__}

    def _encode(self, pixels: NDArray[np.float32]) -> OpenVinoFeatures:
        specs = self.bundle.manifest.encoder.outputs
        encoder = self._encoder.get(self._load_encoder)
        with encoder.request() as request, _failures("encoder"):
            request.set_input_tensor(0, ov.Tensor(np.ascontiguousarray(pixels)))
            # Fresh tensors, which the graph writes to directly and the features then own.
            tensors = tuple(ov.Tensor(ov.Type.f32, ov.Shape([1, *s.shape[1:]])) for s in specs)
            for index, tensor in enumerate(tensors):
                request.set_output_tensor(index, tensor)
            request.infer()
        return OpenVinoFeatures(tensors)

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        own = self._own(features, OpenVinoFeatures)
        given = {name: ov.Tensor(array) for name, array in decoder_inputs(prompts, self._no_mask)}
        decoder, has_mask = self._decoder.get(self._load_decoder), prompts.masks is not None
        with _failures("decoder"):
            return decoder.run(own, own.tensors, given, outputs, has_mask=has_mask)

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> OpenVinoFeatures:
        """Copy feature maps into OpenVINO's memory."""
        self.check_process()
        tensors = tuple(ov.Tensor(ov.Type.f32, ov.Shape(array.shape)) for array in maps)
        for tensor, array in zip(tensors, maps, strict=True):
            tensor.data[...] = array
        return OpenVinoFeatures(tensors)

    def _load_encoder(self) -> CompiledGraph:
        manifest, exact = self.bundle.manifest, _RECIPES[self.precision][0]

        def make(model: Any, load: Callable[[Any], CompiledGraph]) -> CompiledGraph:
            # Images come one by one; with sizes fixed, memory is planned once.
            shape = model.inputs[0].get_partial_shape()
            shape[0] = 1
            model.reshape(shape)
            if exact is not None:
                if _has_tiles():
                    split_hidden_layers(model, _PART_WIDTH, exact)
                matmuls_in_bf16(model, exact)
            return load(model)

        return self._load(manifest.encoder, exact, make)

    def _load_decoder(self) -> Decoder:
        manifest, exact = self.bundle.manifest, _RECIPES[self.precision][1]
        maps = manifest.encoder.outputs

        def make(model: Any, load: Callable[[Any], CompiledGraph]) -> Decoder:
            rearrange_decoder(model)
            if exact is not None:
                matmuls_in_bf16(model, exact, math.prod(map(int, maps[-1].shape[2:])))
            return Decoder(model, [spec.name for spec in maps], load)

        return self._load(manifest.decoder, exact, make)

    def _load(
        self,
        graph: GraphSpec,
        exact: re.Pattern[str] | None,
        make: Callable[[Any, Callable[[Any], CompiledGraph]], T],
    ) -> T:
        """Read and check a graph, and let ``make`` change it and compile it or its parts."""
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            # Without a hint, OpenVINO computes in the types that stand in the graph.
            "INFERENCE_PRECISION_HINT": "f32" if exact is None else "dynamic",
            # Kernels are kept for every shape ever seen, without end, unless told otherwise.
            "CPU_RUNTIME_CACHE_CAPACITY": 0,
            **self._threads,
        }
        loaded = None if self._map_weights else load_graph(self.bundle, graph)
        try:
            source = graph_source(self.bundle, graph) if loaded is None else loaded.with_addresses()
            model = _read_onnx(source)
            self._check(model, graph)
            return make(
                model,
                lambda part: CompiledGraph(self._core.compile_model(part, "CPU", options), loaded),
            )
        except BundleError:
            raise
        except Exception as error:  # OpenVINO raises RuntimeError and classes of its own
            raise BackendError(f"OpenVINO cannot load {graph.model.file}: {error}") from error

    def _check(self, model: Any, graph: GraphSpec) -> None:
        path = ["framework", EXPORT_ID]
        export_id = str(model.get_rt_info(path).value) if model.has_rt_info(path) else ""
        check_graph(
            self.bundle,
            graph,
            export_id,
            [_loaded(port) for port in model.inputs],
            [_loaded(port) for port in model.outputs],
        )


@contextmanager
def _failures(graph: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OpenVINO raises RuntimeError and classes of its own
        raise BackendError(f"OpenVINO failed in the {graph}: {error}") from error


def _read_onnx(source: str | bytes) -> Any:
    """An ONNX graph from its path or content, as an ``openvino.Model``.

    ``Core.read_model`` would look at the content and take any format for it that it knows.
    """
    frontend = _FRONT_ENDS.load_by_framework("onnx")
    return frontend.convert(
        frontend.load(source if isinstance(source, str) else io.BytesIO(source))
    )


def _loaded(port: Any) -> LoadedTensor:
    kind = port.get_element_type().get_type_name()
    shape = [side.get_length() if side.is_static else None for side in port.get_partial_shape()]
    return LoadedTensor(port.get_any_name(), _TYPES.get(kind, kind), shape)
