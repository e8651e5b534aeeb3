"""A whole benchmark, part by part."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam3rt import __version__
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, VerificationError
from sam3rt.machine import memory_gb, package_versions, processor_name, usable_cores
from sam3rt.predictor import SAM3InteractiveImagePredictor

from .agreement import compare_masks, pick_reference
from .candidates import PYTORCH, Candidate, Choice, Settings, load_candidate
from .ceilings import measure_ceilings
from .curves import CurveMaker, threads_curve
from .document import FORMAT, FORMAT_VERSION, Machine, Model, Result
from .limits import stage_limits
from .stages import Progress, time_calls, time_stages
from .starts import measure_start
from .timing import Effort

PARTS = ("stages", "calls", "curves", "starts", "limits")
_START_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        bundle: the model.
        choices: the candidates; those that cannot be used here are left out and named.
        settings: what they share.
        parts: of :data:`PARTS`.
        image: uint8 [H, W, 3].
        effort: how often.
        quick: fewer points on curves.
        command: what was typed, for the record.
        note: what a reader must know about the model.
    """

    bundle: Bundle
    choices: tuple[Choice, ...]
    settings: Settings
    parts: tuple[str, ...]
    image: NDArray[np.uint8]
    effort: Effort
    quick: bool
    command: str
    note: str


@dataclass
class _Parts:
    stages: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    agreement: list[Any] = field(default_factory=list)
    curves: list[Any] = field(default_factory=list)
    starts: list[Any] = field(default_factory=list)
    ceilings: list[Any] = field(default_factory=list)
    limits: list[Any] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_benchmark(plan: Plan, progress: Progress) -> Result:
    """Measure what the plan says.

    Raises:
        BackendError: no candidate can be used here.
    """
    parts = _Parts()
    load_average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    if "starts" in plan.parts:
        # Before anything else takes memory.
        _measure_starts(plan, parts, progress)
    candidates = _load(plan, parts, progress)
    if "stages" in plan.parts or "limits" in plan.parts:
        parts.stages = time_stages(candidates, plan.image, plan.effort, progress)
    if "calls" in plan.parts:
        predictors = {c.name: SAM3InteractiveImagePredictor(c.model) for c in candidates}
        parts.calls = time_calls(candidates, predictors, plan.image, plan.effort, progress)
        reference = pick_reference(candidates)
        if reference is None:
            parts.skipped.append("agreement: no candidate computes in FP32")
        else:
            progress(f"masks against {reference.name}")
            parts.agreement = compare_masks(candidates, reference, plan.image)
    if "curves" in plan.parts:
        _measure_curves(plan, candidates, parts, progress)
    if "limits" in plan.parts:
        _measure_limits(plan, candidates, parts, progress)
    return Result(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        quick=plan.quick,
        revision=source_revision(),
        machine=describe_machine(candidates, load_average),
        versions={"sam3rt": __version__} | package_versions(),
        model=_describe_model(plan),
        image=(plan.image.shape[0], plan.image.shape[1]),
        candidates=tuple(c.info() for c in candidates),
        stages=tuple(parts.stages),
        calls=tuple(parts.calls),
        agreement=tuple(parts.agreement),
        curves=tuple(parts.curves),
        starts=tuple(parts.starts),
        ceilings=tuple(parts.ceilings),
        limits=tuple(parts.limits),
        skipped=tuple(parts.skipped),
    )


def _load(plan: Plan, parts: _Parts, progress: Progress) -> list[Candidate]:
    candidates: list[Candidate] = []
    for choice in plan.choices:
        progress(f"loading {choice.name}")
        try:
            candidate = load_candidate(plan.bundle, choice, plan.settings)
            candidate.model.backend.prepare()
        except (BackendError, VerificationError) as error:
            parts.skipped.append(f"{choice.name}: {error}")
            continue
        if any(c.name == candidate.name for c in candidates):
            parts.skipped.append(f"{choice.name}: is {candidate.name} here")
            continue
        candidates.append(candidate)
    if not candidates:
        raise BackendError("no candidate can be used here: " + "; ".join(parts.skipped))
    return candidates


def _measure_starts(plan: Plan, parts: _Parts, progress: Progress) -> None:
    for choice in plan.choices:
        progress(f"fresh process: {choice.name}")
        size = (plan.image.shape[0], plan.image.shape[1])
        try:
            row = measure_start(plan.bundle.path, choice, plan.settings, size, _START_TIMEOUT)
            if all(row.candidate != other.candidate for other in parts.starts):
                parts.starts.append(row)
        except BackendError as error:
            parts.skipped.append(f"start of {choice.name}: {error}")


def _measure_curves(
    plan: Plan, candidates: list[Candidate], parts: _Parts, progress: Progress
) -> None:
    for candidate in candidates:
        if candidate.model.backend.name == PYTORCH:
            continue  # what it is compared in are the calls, side by side
        maker = CurveMaker(candidate, plan.image, plan.effort, plan.quick, progress)
        parts.curves += maker.curves()
        if candidate.model.device != "cpu":
            continue

        def load(threads: int, choice: Choice = candidate.choice) -> Candidate:
            settings = Settings(plan.settings.device, threads, plan.settings.checkpoint)
            return load_candidate(plan.bundle, choice, settings)

        parts.curves.append(
            threads_curve(
                load,
                candidate.name,
                plan.image,
                maker.embedding,
                plan.effort,
                plan.quick,
                progress,
            )
        )


def _measure_limits(
    plan: Plan, candidates: list[Candidate], parts: _Parts, progress: Progress
) -> None:
    progress("ceilings of this machine")
    with_pytorch = any(c.model.backend.name == PYTORCH for c in candidates)
    for device in sorted({c.model.device for c in candidates}):
        parts.ceilings += measure_ceilings(plan.settings.threads, device, with_pytorch)
    try:
        parts.limits = stage_limits(
            plan.bundle,
            (plan.image.shape[0], plan.image.shape[1]),
            candidates,
            parts.stages,
            parts.ceilings,
        )
    except BackendError as error:
        parts.skipped.append(f"limits: {error}")


def describe_machine(candidates: list[Candidate], load_average: float | None) -> Machine:
    """The machine, and the accelerators the candidates use."""
    devices = {c.model.device for c in candidates} - {"cpu"}
    names = [getattr(c.model.backend, "device_name", None) for c in candidates]
    return Machine(
        processor=processor_name(),
        cores=usable_cores(),
        memory_gb=memory_gb(),
        load_average=load_average,
        accelerators=tuple(sorted({str(n) for n in names if n} or devices)),
        platform=platform.platform(),
        python=platform.python_version(),
    )


def source_revision() -> str:
    """The git revision this file lies in, ``"+changes"`` where it was edited, or nothing."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""


def _describe_model(plan: Plan) -> Model:
    manifest = plan.bundle.manifest
    return Model(
        name=manifest.name,
        model_type=manifest.model_type,
        fingerprint=manifest.fingerprint,
        weights=manifest.weights,
        source=f"{manifest.source.kind}: {manifest.source.reference}",
        note=plan.note,
    )
