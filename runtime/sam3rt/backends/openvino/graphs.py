"""Compiled graphs, and the decoder as three of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ...bundle.contract import HAS_MASKS, MASKS, LoadedGraph
from ...features import Features
from .split import split

# Images whose share of the decoder's work is kept: about 32 MB each for SAM 3, on top of their
# features. Calls on more images in turn compute it anew.
KEPT_IMAGES = 4


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
        self._lock = threading.Lock()
        # The one used last comes last.
        self._kept: WeakKeyDictionary[Features, dict[str, Any]] = WeakKeyDictionary()

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
        values = {**prompts, **self._of_image(features, tensors, prompts, not has_mask)}
        with ExitStack() as stack:
            if self._dense is not None and has_mask:
                graph, names = self._dense
                request = stack.enter_context(graph.results(values))
                values.update((name, request.get_tensor(name)) for name in names)
            request = stack.enter_context(self._points.results(values))
            return [np.array(request.get_tensor(name).data) for name in outputs]

    def _of_image(
        self,
        features: Features,
        tensors: Sequence[Any],
        prompts: Mapping[str, Any],
        with_dense: bool,
    ) -> dict[str, Any]:
        """The feature maps and what follows from them, and from no mask prompt if there is none."""
        with self._lock:
            found = dict(self._kept.pop(features, {}))
        if not found:
            found = dict(zip(self._maps, tensors, strict=True))
            if self._image is not None:
                found |= _copies(*self._image, found)
        if with_dense and self._dense is not None and self._dense[1][0] not in found:
            found |= _copies(*self._dense, {**prompts, **found})
        with self._lock:
            self._kept[features] = found
            while len(self._kept) > KEPT_IMAGES:
                self._kept.pop(next(iter(self._kept)), None)
        return found


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
