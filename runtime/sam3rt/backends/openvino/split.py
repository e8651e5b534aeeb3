"""Cuts a graph in two: what some of its inputs decide by themselves, and the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openvino as ov
from openvino import opset13


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
