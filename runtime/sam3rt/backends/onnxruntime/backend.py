"""Two sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ...bundle import Bundle, GraphSpec
from ...bundle.contract import HAS_MASKS, MASKS
from ...errors import BackendError
from ...features import Features
from ...prompts import PackedPrompts, decoder_inputs
from ..base import Backend
from ..kept import Kept, Once
from .sessions import SessionParts, open_parts, open_session
from .typed import Graphs


@dataclass(frozen=True, eq=False)
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

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""
        return tuple(np.array(value.numpy(), np.float32) for value in self.values)


class OnnxRuntimeBackend(Backend):
    """Runs a bundle's graphs in two ONNX Runtime sessions on the CPU, created at first use.

    Args:
        bundle: an opened bundle.
        graphs: what is run, and in what; by default the bundle's own graphs in FP32.
        threads: threads per operator; ``None`` leaves it to ONNX Runtime.
        map_weights: see :func:`sam3rt.load_model`.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        graphs: Graphs | None = None,
        *,
        threads: int | None = None,
        map_weights: bool = False,
    ) -> None:
        self._graphs = graphs or Graphs(bundle)
        super().__init__(bundle, "cpu", self._graphs.precision)
        self._threads = threads
        self._map_weights = map_weights
        self._features = self._graphs.bundle.manifest.encoder.outputs
        self._of_no_mask: Kept[dict[str, Any]] = Kept()
        self._encoder: Once[Any] = Once()
        self._decoder: Once[Any] = Once()

    def close(self) -> None:
        """Let go of both sessions; calls under way keep theirs to their end."""
        super().close()
        self._encoder.close()
        self._decoder.close()
        self._of_no_mask = Kept()

    def prepare(self) -> None:
        """Load both graphs now."""
        self.check_process()
        self._encoder.get(self._load_encoder)
        self._decoder.get(self._load_decoder)

    def versions(self) -> dict[str, str]:
        """Version of ONNX Runtime."""
        return {"onnxruntime": ort.__version__}

    def _encode(self, pixels: NDArray[np.float32]) -> OrtFeatures:
        given = {self.bundle.manifest.encoder.inputs[0].name: pixels}
        names = [spec.name for spec in self._features]
        session = self._encoder.get(self._load_encoder)
        binding = self._run("encoder", session, {}, given, names)
        return OrtFeatures(tuple(binding.get_outputs()))

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        own = self._own(features, OrtFeatures)
        maps = {s.name: value for s, value in zip(self._features, own.values, strict=True)}
        given = dict(decoder_inputs(prompts, self._no_mask))
        decoder = self._decoder.get(self._load_decoder)
        if not isinstance(decoder, SessionParts):
            return self._decoded(decoder, maps, given, outputs)
        masks = {name: given.pop(name) for name in (MASKS, HAS_MASKS)}

        def first() -> dict[str, Any]:
            binding = self._run("decoder", decoder.first, maps, masks, decoder.cut)
            return dict(zip(decoder.cut, binding.get_outputs(), strict=True))

        cut = self._of_no_mask.get(own, first) if prompts.masks is None else first()
        return self._decoded(decoder.rest, cut, given, outputs)

    def _decoded(
        self,
        session: Any,
        values: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
    ) -> list[NDArray[np.float32]]:
        binding = self._run("decoder", session, values, arrays, outputs)
        return list(binding.copy_outputs_to_cpu())

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> OrtFeatures:
        """Bring feature maps into ONNX Runtime's memory."""
        self.check_process()
        return OrtFeatures(
            tuple(
                ort.OrtValue.ortvalue_from_numpy(np.array(array, spec.dtype, order="C"))
                for spec, array in zip(self._features, maps, strict=True)
            )
        )

    def _run(
        self,
        graph: str,
        session: Any,
        values: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
    ) -> Any:
        """Run a session on values of its own and on arrays of the host.

        Returns:
            The binding that holds the outputs.
        """
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        # The binding does not keep arrays alive; the caller does until the run is over.
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises classes of its own for each status
            raise BackendError(f"ONNX Runtime failed in the {graph}: {error}") from error
        return binding

    def _load_encoder(self) -> Any:
        # A memory pattern plans all of a run's buffers as one block, from the second run on and
        # beside those of the first: 10 GB in place of 6 GB for the published SAM 3.
        return self.create_session(self._graphs.bundle.manifest.encoder, memory_pattern=False)

    def _load_decoder(self) -> Any:
        graph = self._graphs.bundle.manifest.decoder
        return self.create_parts(graph) or self.create_session(graph, memory_pattern=True)

    def create_parts(self, graph: GraphSpec) -> SessionParts | None:
        """Check and load the decoder, cut behind what an image and a mask prompt decide.

        Backends that make their graphs themselves replace this.

        Returns:
            ``None`` where it is to be loaded as a whole.

        Raises:
            BackendError, BundleError: see :meth:`create_session`.
        """
        inputs = [*(spec.name for spec in self._features), MASKS, HAS_MASKS]
        return open_parts(self._graphs, graph, inputs, threads=self._threads)

    def create_session(self, graph: GraphSpec, *, memory_pattern: bool) -> Any:
        """Check and load one graph. Backends that make their graphs themselves replace this.

        Raises:
            BackendError: ONNX Runtime cannot load it.
            BundleError: the files are not what the manifest says, or not those of a bundle.
        """
        return open_session(
            self._graphs,
            graph,
            threads=self._threads,
            map_weights=self._map_weights,
            memory_pattern=memory_pattern,
        )
