"""The result of a benchmark: what is in it, as a file, and as a JSON schema.

Durations are in milliseconds. Where something was not measured, its list is empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from sam3rt.bundle.files import atomic_write
from sam3rt.errors import InvalidInputError


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the document: its fields are the schema."""


class Times(_Part, frozen=True):
    """Durations of repeated calls.

    Attributes:
        count: how many.
        median_ms: the middle one.
        mean_ms: their mean.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        min_ms: the shortest.
        max_ms: the longest.
        spread: interquartile range over the median.
    """

    count: int
    median_ms: float
    mean_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    spread: float


class Machine(_Part, frozen=True):
    """Where it ran.

    Attributes:
        processor: its name.
        cores: logical cores this process may use.
        memory_gb: physical memory, 10^9 bytes.
        load_average: processes that wanted to run in the minute before, where the system says.
        accelerators: names of GPUs that a candidate used.
        platform: operating system.
        python: version.
    """

    processor: str
    cores: int
    memory_gb: float | None
    load_average: float | None
    accelerators: tuple[str, ...]
    platform: str
    python: str


class Model(_Part, frozen=True):
    """What was run.

    Attributes:
        name: the bundle's name.
        model_type: family.
        fingerprint: of the bundle.
        weights: type they are stored in.
        source: where they came from.
        note: what else a reader must know, such as that the weights are synthetic.
    """

    name: str
    model_type: str
    fingerprint: str
    weights: str
    source: str
    note: str


class CandidateInfo(_Part, frozen=True):
    """One way of running the model.

    Attributes:
        name: as in the other tables.
        backend: what runs it.
        device: where.
        precision: what it computes in.
        threads: CPU threads asked for; ``None`` left it to the backend.
        versions: of its libraries.
    """

    name: str
    backend: str
    device: str
    precision: str
    threads: int | None
    versions: dict[str, str]


class StageRow(_Part, frozen=True):
    """One stage of one candidate.

    Attributes:
        candidate: its name, or ``"host"`` for stages that all share.
        stage: the stage's name.
        clock: monotonic clock of the host, or events of the device.
        times: durations.
    """

    candidate: str
    stage: str
    clock: Literal["host", "device"]
    times: Times


class CallRow(_Part, frozen=True):
    """One end-to-end call of one candidate, NumPy in to NumPy out.

    Attributes:
        candidate: its name.
        call: what was called.
        times: durations; the candidates of one call took turns.
    """

    candidate: str
    call: str
    times: Times


class AgreementRow(_Part, frozen=True):
    """How far a candidate's masks are from FP32's, over all prompts of the side-by-side part.

    A figure of 0 is also that of outputs that are not numbers.

    Attributes:
        candidate: its name.
        reference: the candidate it is compared with.
        feature_cosine: least cosine similarity of a feature map.
        masks: how many multi-mask masks were compared.
        mean_iou: mean IoU of those.
        least_iou: least IoU of those.
        single_masks: how many single masks.
        single_least_iou: least IoU of those; one that chose another of the masks counts in full.
    """

    candidate: str
    reference: str
    feature_cosine: float
    masks: int
    mean_iou: float
    least_iou: float
    single_masks: int
    single_least_iou: float


class CurvePoint(_Part, frozen=True):
    """One point of a curve.

    Attributes:
        x: where, in the curve's unit.
        label: how to write it.
        times: durations.
        per_second: how many of the curve's calls were done each second, all callers together.
    """

    x: float
    label: str
    times: Times
    per_second: float


class Curve(_Part, frozen=True):
    """How a call's duration depends on something.

    Attributes:
        candidate: its name.
        name: of the curve.
        unit: of its x axis.
        call: what was timed.
        points: along the axis.
    """

    candidate: str
    name: str
    unit: str
    call: str
    points: tuple[CurvePoint, ...]


class StartRow(_Part, frozen=True):
    """A fresh process of one candidate.

    Attributes:
        candidate: its name.
        load_ms: opening the bundle and loading or compiling both graphs, imports included.
        first_encode_ms: the first image.
        steady_encode_ms: a later one.
        first_predict_ms: the first click.
        steady_predict_ms: a later one.
        peak_host_mb: most resident memory of the process, 10^6 bytes, mapped files included.
        peak_device_mb: most device memory, where the backend says.
    """

    candidate: str
    load_ms: float
    first_encode_ms: float
    steady_encode_ms: float
    first_predict_ms: float
    steady_predict_ms: float
    peak_host_mb: float | None
    peak_device_mb: float | None


class Ceiling(_Part, frozen=True):
    """The best this machine was seen to do.

    Attributes:
        what: ``"matrix product"`` or ``"copy"``.
        element: type of its operands, such as ``"fp32"``.
        device: where.
        by: the library that reached it.
        per_second: floating-point operations, or bytes read plus bytes written.
    """

    what: Literal["matrix product", "copy"]
    element: str
    device: str
    by: str
    per_second: float


class LimitRow(_Part, frozen=True):
    """A stage against the ceilings.

    Attributes:
        candidate: its name.
        stage: the stage.
        operations: floating-point operations of its matrix products and convolutions.
        least_bytes: weights, inputs and outputs, each moved once.
        element: type whose matrix-product ceiling applies.
        limit_ms: the longer of operations and bytes at their ceilings.
        measured_ms: median.
        ratio: measured over limit; 1 is the limit.
    """

    candidate: str
    stage: str
    operations: float
    least_bytes: float
    element: str
    limit_ms: float
    measured_ms: float
    ratio: float


class Result(_Part, frozen=True):
    """A whole benchmark.

    Attributes:
        format: always ``"sam3rt-bench"``.
        format_version: 1.
        created: ISO 8601, UTC.
        command: what was typed.
        quick: few repetitions: for a look, not for a report.
        revision: git revision of the source, with ``"+changes"`` where it was edited; empty where
            it is not a checkout.
        machine: where it ran.
        versions: of the packages in use.
        model: what was run.
        image: (height, width) of the image.
        candidates: what was compared.
        stages: stages timed apart.
        calls: end-to-end calls, side by side.
        agreement: masks against FP32.
        curves: how durations depend on things.
        starts: fresh processes.
        ceilings: of the machine.
        limits: distance to them.
        skipped: what was not measured, and why.
    """

    format: Literal["sam3rt-bench"]
    format_version: Literal[1]
    created: str
    command: str
    quick: bool
    revision: str
    machine: Machine
    versions: dict[str, str]
    model: Model
    image: tuple[int, int]
    candidates: tuple[CandidateInfo, ...]
    stages: tuple[StageRow, ...]
    calls: tuple[CallRow, ...]
    agreement: tuple[AgreementRow, ...]
    curves: tuple[Curve, ...]
    starts: tuple[StartRow, ...]
    ceilings: tuple[Ceiling, ...]
    limits: tuple[LimitRow, ...]
    skipped: tuple[str, ...]


def write_result(path: Path, result: Result) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def read_result(path: Path) -> Result:
    """Read a result and check it.

    Raises:
        InvalidInputError: it is not one.
        OSError: the file cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            str(path), str(error), "a result of sam3rt bench, as JSON"
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a result."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Result of sam3rt bench",
        **msgspec.json.schema(Result),
    }
