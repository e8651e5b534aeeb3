"""A whole benchmark, part by part. What is measured is handed over after each part."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

import sam3rt
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, VerificationError
from sam3rt.machine import memory_gb, package_versions, processor_name, usable_cores
from sam3rt.predictor import SAM3InteractiveImagePredictor

from . import PARTS
from .agreement import compare_masks, pick_reference
from .candidates import PYTORCH, Candidate, Choice, Settings, load_candidate
from .ceilings import measure_ceilings
from .curves import CurveMaker, threads_curve
from .document import CallRow, Machine, Model, Result
from .limits import stage_limits
from .scene import click
from .stages import Progress, time_calls, time_stages
from .starts import measure_start
from .timing import Effort, summarize, timed

# With a budget, what says most comes first.
_QUICK_ORDER = ("calls", "stages", "limits", "starts", "curves")
_START_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        bundle: the model.
        choices: the candidates; those that cannot be used here are left out and named.
        settings: what they share.
        parts: of :data:`sam3rt_bench.PARTS`.
        image: uint8 [H, W, 3].
        effort: how often.
        budget: seconds for everything; what would take longer is left out and named. ``None`` sets
            no limit.
        command: what was typed, for the record.
        note: what a reader must know about the model.
    """

    bundle: Bundle
    choices: tuple[Choice, ...]
    settings: Settings
    parts: tuple[str, ...]
    image: NDArray[np.uint8]
    effort: Effort
    budget: float | None
    command: str
    note: str

    @property
    def quick(self) -> bool:
        """Whether this is a look rather than a report."""
        return self.budget is not None


@dataclass(frozen=True)
class _First:
    """Seconds of one candidate's first steps, from which the rest is planned."""

    load: float
    encode: float
    click: float


class _Benchmark:
    """One run of a plan."""

    def __init__(self, plan: Plan, progress: Progress, keep: Callable[[Result], None]) -> None:
        self._plan = plan
        self._progress = progress
        self._keep = keep
        self._begin = time.perf_counter()
        self._load_average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        self._size = (plan.image.shape[0], plan.image.shape[1])
        self._candidates: list[Candidate] = []
        self._unusable: set[str] = set()
        self._firsts: dict[str, _First] = {}
        self.result = _empty_result(plan, self._load_average)

    def run(self) -> None:
        plan = self._plan
        wanted = set(plan.parts) | ({"stages"} if "limits" in plan.parts else set())
        todo = [part for part in (_QUICK_ORDER if plan.quick else PARTS) if part in wanted]
        while todo:
            if todo[0] != "starts" and not self._candidates:
                self._load()
                self._add(todo)
            part = todo.pop(0)
            needed = self._estimate(part)
            if needed > self._left():
                self._skip(f"{part}: takes about {needed:.0f} s; {self._left():.0f} s are left")
            else:
                getattr(self, f"_{part}")()
            self._add(todo)

    def _left(self) -> float:
        if self._plan.budget is None:
            return float("inf")
        return max(0.0, self._plan.budget - (time.perf_counter() - self._begin))

    def _skip(self, line: str) -> None:
        self.result = replace(self.result, skipped=(*self.result.skipped, line))

    def _add(self, todo: list[str]) -> None:
        """Hand over what there is; until the next part is done, what is missing is named in it."""
        missing = tuple(f"{part}: the run was stopped before" for part in todo)
        self._keep(replace(self.result, skipped=(*self.result.skipped, *missing)))

    def _estimate(self, part: str) -> float:
        """About how many seconds a part takes at least."""
        names = [n for n in self._firsts if part != "curves" or not n.startswith(PYTORCH)]
        firsts = [self._firsts[name] for name in names]
        load = sum(first.load for first in firsts)
        encode = sum(first.encode for first in firsts)
        one = sum(first.click for first in firsts)
        effort = self._plan.effort
        images, clicks = effort.seconds_for(encode), effort.seconds_for(one)
        seconds = {
            # An image and five kinds of prompt in turn; then the masks are compared.
            "calls": images + 8 * clicks + encode + 9 * one,
            # Encode, decode, two copies, and five stages of the host.
            "stages": images + clicks + 2 * effort.seconds,
            "starts": load + 2 * encode + 6 * one + 2 * len(firsts),
            # Counting operations, and products and copies of three libraries.
            "limits": 15.0,
            # Six images, sixty clicks, and tables of about one click's time.
            "curves": 6 * encode + 60 * one + 2 * load + 20 * clicks,
        }
        return seconds[part]

    def _load(self) -> None:
        """Load the candidates, and time the first image and click of each."""
        for choice in self._plan.choices:
            loaded = {f"{c.choice.backend}:{c.model.backend.precision}" for c in self._candidates}
            if choice.name in loaded:
                continue
            spent = max((first.load + first.encode for first in self._firsts.values()), default=0)
            if spent > self._left() / 2:
                self._skip(f"{choice.name}: not loaded, {self._left():.0f} s are left")
                continue
            self._progress(f"loading {choice.name}")
            try:
                load, candidate = timed(partial(self._loaded, choice))
            except (BackendError, VerificationError) as error:
                self._unusable.add(choice.name)
                self._skip(f"{choice.name}: {error}")
                continue
            if any(c.name == candidate.name for c in self._candidates):
                self._skip(f"{choice.name}: is {candidate.name} here")
                continue
            self._candidates.append(candidate)
            if self._plan.quick:
                self._firsts[candidate.name] = self._first(candidate, load)
        if not self._candidates:
            raise BackendError("no candidate can be used here: " + "; ".join(self.result.skipped))
        self.result = replace(
            self.result,
            candidates=tuple(c.info() for c in self._candidates),
            machine=describe_machine(self._candidates, self._load_average),
        )

    def _loaded(self, choice: Choice) -> Candidate:
        candidate = load_candidate(self._plan.bundle, choice, self._plan.settings)
        candidate.model.backend.prepare()
        return candidate

    def _first(self, candidate: Candidate, load: float) -> _First:
        """Time the first image and click, which count as calls until better ones are measured."""
        request = click(self._size)
        self._progress(f"first calls: {candidate.name}")
        predictor = SAM3InteractiveImagePredictor(candidate.model)
        encode, _ = timed(lambda: predictor.set_image(self._plan.image))
        one, _ = timed(lambda: predictor.predict(**request.arguments()))
        rows = (
            CallRow(candidate.name, "set_image", summarize([encode])),
            CallRow(candidate.name, f"predict: {request.name}", summarize([one])),
        )
        self.result = replace(self.result, calls=(*self.result.calls, *rows))
        return _First(load, encode, one)

    def _calls(self) -> None:
        plan = self._plan
        predictors = {c.name: SAM3InteractiveImagePredictor(c.model) for c in self._candidates}
        rows = time_calls(self._candidates, predictors, plan.image, plan.effort, self._progress)
        self.result = replace(self.result, calls=tuple(rows))
        reference = pick_reference(self._candidates)
        if reference is None:
            self._skip("agreement: no candidate computes in FP32")
            return
        self._progress(f"masks against {reference.name}")
        rows_of_masks = compare_masks(self._candidates, reference, plan.image)
        self.result = replace(self.result, agreement=tuple(rows_of_masks))

    def _stages(self) -> None:
        rows = time_stages(self._candidates, self._plan.image, self._plan.effort, self._progress)
        self.result = replace(self.result, stages=tuple(rows))

    def _limits(self) -> None:
        if not self.result.stages:
            self._skip("limits: no stage was timed")
            return
        self._progress("ceilings of this machine")
        with_pytorch = any(c.model.backend.name == PYTORCH for c in self._candidates)
        threads = self._plan.settings.threads
        ceilings = []
        for device in sorted({c.model.device for c in self._candidates}):
            for ceiling in measure_ceilings(threads, device, with_pytorch):
                ceilings.append(ceiling)
                if not self._left():  # a busy machine takes longer than what was planned with
                    break
        self.result = replace(self.result, ceilings=tuple(ceilings))
        try:
            rows = stage_limits(
                self._plan.bundle,
                self._size,
                self._candidates,
                list(self.result.stages),
                ceilings,
            )
        except BackendError as error:
            self._skip(f"limits: {error}")
            return
        self.result = replace(self.result, limits=tuple(rows))

    def _starts(self) -> None:
        plan = self._plan
        for choice in plan.choices:
            if choice.name in self._unusable:
                continue
            self._progress(f"fresh process: {choice.name}")
            timeout = min(_START_TIMEOUT, max(self._left(), 1.0))
            try:
                row = measure_start(plan.bundle, choice, plan.settings, self._size, timeout)
            except BackendError as error:
                self._skip(f"start of {choice.name}: {error}")
                continue
            if all(row.candidate != other.candidate for other in self.result.starts):
                self.result = replace(self.result, starts=(*self.result.starts, row))

    def _curves(self) -> None:
        plan = self._plan
        for candidate in self._candidates:
            if candidate.model.backend.name == PYTORCH:
                continue  # what it is compared in are the calls, side by side
            maker = CurveMaker(candidate, plan.image, plan.effort, plan.quick, self._progress)
            for curve in maker.curves():
                self.result = replace(self.result, curves=(*self.result.curves, curve))
                self._add(["the other curves"])
                if self._left() <= 0:
                    self._skip(f"the other curves: {plan.budget:.0f} s are over")
                    return
            if candidate.model.device != "cpu":
                continue

            def load(threads: int, choice: Choice = candidate.choice) -> Candidate:
                settings = Settings(plan.settings.device, threads, plan.settings.checkpoint)
                return load_candidate(plan.bundle, choice, settings)

            curve = threads_curve(
                load,
                candidate.name,
                plan.image,
                maker.embedding,
                plan.effort,
                plan.quick,
                self._progress,
            )
            self.result = replace(self.result, curves=(*self.result.curves, curve))


def run_benchmark(plan: Plan, progress: Progress, keep: Callable[[Result], None]) -> Result:
    """Measure what the plan says.

    Args:
        plan: what to measure.
        progress: told what is measured.
        keep: given what there is after each part, so that a run that is stopped leaves something.

    Raises:
        BackendError: no candidate can be used here.
    """
    benchmark = _Benchmark(plan, progress, keep)
    benchmark.run()
    return benchmark.result


def _empty_result(plan: Plan, load_average: float | None) -> Result:
    manifest = plan.bundle.manifest
    return Result(
        format="sam3rt-bench",
        format_version=1,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        quick=plan.quick,
        revision=source_revision(),
        machine=describe_machine([], load_average),
        versions={"sam3rt": sam3rt.__version__} | package_versions(),
        model=Model(
            name=manifest.name,
            model_type=manifest.model_type,
            fingerprint=manifest.fingerprint,
            weights=manifest.weights,
            source=f"{manifest.source.kind}: {manifest.source.reference}",
            note=plan.note,
        ),
        image=(plan.image.shape[0], plan.image.shape[1]),
        candidates=(),
        stages=(),
        calls=(),
        agreement=(),
        curves=(),
        starts=(),
        ceilings=(),
        limits=(),
        skipped=(),
    )


def describe_machine(candidates: list[Candidate], load_average: float | None) -> Machine:
    """The machine, and the devices other than the CPU that candidates use."""
    return Machine(
        processor=processor_name(),
        cores=usable_cores(),
        memory_gb=memory_gb(),
        load_average=load_average,
        accelerators=tuple(sorted({c.model.device for c in candidates} - {"cpu"})),
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
