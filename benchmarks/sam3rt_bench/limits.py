"""Stages against what the machine can do at most."""

from __future__ import annotations

from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError

from .candidates import Candidate
from .ceilings import best
from .document import Ceiling, LimitRow, StageRow
from .graph_cost import GraphCost, graph_cost
from .stages import HOST

# One click and its padding.
_ONE_CLICK = {"batch": 1, "num_objects": 1, "num_points": 2, "num_masks": 1, "num_images": 1}


def stage_limits(
    bundle: Bundle,
    size: tuple[int, int],
    candidates: list[Candidate],
    stages: list[StageRow],
    ceilings: list[Ceiling],
) -> list[LimitRow]:
    """Every stage whose work can be counted, against the ceilings.

    Args:
        bundle: the model.
        size: (height, width) of the image.
        candidates: what was timed.
        stages: how long the stages took.
        ceilings: of the machine.

    Raises:
        BackendError: the graphs cannot be counted.
    """
    manifest = bundle.manifest
    costs = {
        "encode": graph_cost(bundle, manifest.encoder, _ONE_CLICK),
        "decode": graph_cost(bundle, manifest.decoder, _ONE_CLICK),
    } | _host_costs(bundle, size)
    by_name = {c.name: c.model.backend for c in candidates}
    rows = []
    for row in stages:
        cost = costs.get(row.stage)
        if cost is None or row.clock != "host":
            continue
        backend = None if row.candidate == HOST else by_name[row.candidate]
        device = "cpu" if backend is None else backend.device
        element = "fp32" if backend is None else _element(backend.precision, row.stage)
        product = best(ceilings, "matrix product", element, device)
        copy = best(ceilings, "copy", "", device)
        if copy is None or (cost.operations and product is None):
            continue
        compute = cost.operations / product.per_second if product is not None else 0.0
        limit = 1e3 * max(compute, cost.least_bytes / copy.per_second)
        rows.append(
            LimitRow(
                candidate=row.candidate,
                stage=row.stage,
                operations=cost.operations,
                least_bytes=cost.least_bytes,
                element=element,
                limit_ms=float(f"{limit:.4g}"),
                measured_ms=row.times.median_ms,
                ratio=float(f"{row.times.median_ms / limit:.4g}"),
            )
        )
    if not rows:
        raise BackendError("no ceiling was measured for the devices in use")
    return rows


def _element(precision: str, stage: str) -> str:
    """The type of a stage's matrix products by the name of a precision."""
    if stage == "decode" and precision in ("bf16-encoder", "bf16-mixed"):
        return "fp32"
    return next((e for e in ("bf16", "fp16") if e in precision), "fp32")


def _host_costs(bundle: Bundle, size: tuple[int, int]) -> dict[str, GraphCost]:
    """What the NumPy and Pillow stages must read and write."""
    height, width = size
    inputs = 4 * 3 * bundle.manifest.image.size[0] * bundle.manifest.image.size[1]
    low = 4 * bundle.manifest.masks.low_res_size[0] * bundle.manifest.masks.low_res_size[1]
    return {
        "preprocess": GraphCost(0, 0, 3 * height * width, inputs),
        "fill holes, one mask": GraphCost(0, 0, low, low),
        "upsample and threshold, one mask": GraphCost(0, 0, low, 4 * height * width),
    }
