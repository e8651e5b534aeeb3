"""Compiled graphs, and the decoder as three of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13

from ...bundle.contract import HAS_MASKS, MASKS, LoadedGraph
from ...features import Features
from ..kept import Kept


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


def split(model: Any, inputs: Iterable[str], prefix: str) -> tuple[Any | None, Any]:
    """Cut a graph behind the last operators that read nothing but some inputs and constants.

    Args:
        model: an ``openvino.Model`` that nothing else uses; it is taken apart.
        inputs: names of those inputs; there may be others.
        prefix: what the names of the values at the cut begin with.

    Returns:
        A model from those inputs to the values at the cut, and one from these values, by the same
        names, and all inputs that operators behind the cut read, to the results. Where no operator
        reads those inputs alone, ``None`` and the model as it was.
    """
    names = set(inputs)
    # Kept, so that Python's wrappers of the nodes stay the same objects.
    nodes = model.get_ordered_ops()
    parameters = model.get_parameters()
    given = {n.get_name(): n for n in parameters if names & n.output(0).get_names()}
    early, constant = set(given), set[str]()
    for node in nodes:
        read = {i.get_source_output().get_node().get_name() for i in node.inputs()}
        if node.get_type_name() == "Constant" or (read and read <= constant):
            constant.add(node.get_name())
        elif read and read <= early | constant and not _is_late(node):
            early.add(node.get_name())

    if len(early) == len(given):
        return None, model
    cut: list[Any] = []
    behind = [p for p in parameters if p.get_name() not in given]
    for node in (node for node in nodes if node.get_name() in early):
        for output in node.outputs():
            targets = output.get_target_inputs()
            late = [t for t in targets if t.get_node().get_name() not in early]
            if not late:
                continue
            stand_in = opset13.parameter(output.get_partial_shape(), output.get_element_type())
            behind.append(stand_in)
            if node.get_name() in given:
                stand_in.output(0).set_names(output.get_names())
            else:
                stand_in.output(0).set_names({f"{prefix}.{len(cut)}"})
                cut.append(output)
            for target in late:
                target.replace_source_output(stand_in.output(0))
    used = [parameter for parameter in given.values() if parameter.output(0).get_target_inputs()]
    first = ov.Model(cut, used)
    for index, result in enumerate(first.outputs):
        result.set_names({f"{prefix}.{index}"})
    return first, ov.Model(model.get_results(), behind)


def _is_late(node: Any) -> bool:
    """Whether an operator stays behind the cut anyway: the end, and what a matmul does itself."""
    kind = node.get_type_name()
    return kind == "Result" or (
        kind == "Transpose"
        and all(
            target.get_node().get_type_name() == "MatMul"
            for target in node.output(0).get_target_inputs()
        )
    )
