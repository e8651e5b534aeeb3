"""Compiled graphs, and the decoder as three of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ...bundle.contract import HAS_MASKS, MASKS, LoadedGraph
from ...features import Features
from ..kept import Kept
from .split import split


class CompiledGraph:
    """A compiled graph and the requests to run it that are not in use.

    A request holds the tensors of its last run; each run replaces all its inputs.

    Args:
        compiled: an ``openvino.CompiledModel``.
        loaded: whose memory it may use.
    """

    def __init__(self, compiled: Any, loaded: LoadedGraph | None) -> None:
        self._compiled = compiled
        self._loaded = loaded
        self._idle: deque[Any] = deque()
        self._names = [port.get_names() for port in compiled.inputs]

    @contextmanager
    def request(self) -> Iterator[Any]:
        """A request of the caller's own for the length of the block; dropped if it raises."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        yield request
        self._idle.append(request)

    @contextmanager
    def results(self, values: Mapping[str, Any]) -> Iterator[Any]:
        """Run once; the request that holds the results is the caller's for the length of the block.

        Args:
            values: a tensor for each input, by name; there may be others.
        """
        with self.request() as request:
            for index, names in enumerate(self._names):
                (name,) = names & values.keys()
                request.set_input_tensor(index, values[name])
            request.infer()
            yield request


class Decoder:
    """The decoder, cut where prompts come in: what an image decides is computed once for all calls.

    One part reads the feature maps alone: they are brought into the order in which the decoder
    works on them. One reads its results and the mask prompt. Where there is none, its results
    belong to the image as well. The last reads points and whatever the others found.

    Args:
        model: the decoder, an ``openvino.Model`` that nothing else uses.
        maps: names of the feature maps.
        load: compiles a part.
    """

    def __init__(
        self, model: Any, maps: Sequence[str], load: Callable[[Any], CompiledGraph]
    ) -> None:
        image, model = split(model, maps, "image")
        cut = [] if image is None else _names(image)
        dense, model = split(model, [*maps, *cut, MASKS, HAS_MASKS], "dense")
        self._maps = tuple(maps)
        self._image = None if image is None else (load(image), cut)
        self._dense = None if dense is None else (load(dense), _names(dense))
        self._points = load(model)
        self._of_image: Kept[dict[str, Any]] = Kept()
        self._of_no_mask: Kept[dict[str, Any]] = Kept()

    def run(
        self,
        features: Features,
        tensors: Sequence[Any],
        prompts: Mapping[str, Any],
        outputs: Sequence[str],
        *,
        has_mask: bool,
    ) -> list[NDArray[np.float32]]:
        """Compute outputs.

        Args:
            features: whose results are kept, for as long as they live.
            tensors: their maps.
            prompts: the other inputs, by name.
            outputs: names.
            has_mask: whether there is a mask prompt.

        Returns:
            Copies, in the order asked for.
        """
        values = {**prompts, **dict(zip(self._maps, tensors, strict=True))}
        if self._image is not None:
            image = self._image
            values |= self._of_image.get(features, lambda: _copies(*image, values))
        with ExitStack() as stack:
            if self._dense is not None and not has_mask:
                dense = self._dense
                values |= self._of_no_mask.get(features, lambda: _copies(*dense, values))
            elif self._dense is not None:
                graph, names = self._dense
                request = stack.enter_context(graph.results(values))
                values |= {name: request.get_tensor(name) for name in names}
            request = stack.enter_context(self._points.results(values))
            return [np.array(request.get_tensor(name).data) for name in outputs]


def _names(model: Any) -> list[str]:
    return [port.get_any_name() for port in model.outputs]


def _copies(
    graph: CompiledGraph, names: Sequence[str], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What a graph computes, in memory of its own."""
    copies = {}
    with graph.results(values) as request:
        for name in names:
            tensor = request.get_tensor(name)
            copies[name] = ov.Tensor(tensor.get_element_type(), tensor.get_shape())
            tensor.copy_to(copies[name])
    return copies
