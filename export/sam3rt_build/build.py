"""Build a bundle's engines, prove them, and put them where the runtime looks for them."""

from __future__ import annotations

import functools
import importlib
import logging
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from sam3rt.accuracy.run import Runner
from sam3rt.accuracy.select import Recipe as Candidate
from sam3rt.accuracy.select import select
from sam3rt.accuracy.verdicts import StoredVerdict, Subject, load_verdict
from sam3rt.backends.table import entry
from sam3rt.backends.tensorrt.driver import Device, probe
from sam3rt.backends.tensorrt.engines import (
    EngineFile,
    EngineSet,
    EngineTarget,
    pair_name,
    subject_of,
)
from sam3rt.backends.tensorrt.offer import TensorRtBackend, open_platform
from sam3rt.backends.tensorrt.sidecar import CAPABILITY, BackendName, write_sidecar
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, InvalidInputError, VerificationError

from .builder_process import build_engine
from .engine_builder import BuildOptions, EngineBuilder, Make
from .engines_folder import exclusive
from .errors import BuildError
from .plan_evidence import load_evidence
from .recipes import RECIPES, Recipe
from .typed_graph import FeaturesType, Role

_LOG = logging.getLogger(__name__)

Say = Callable[[str], None]
OpenPair = Callable[[Bundle, EngineSet], Runner]

__all__ = ["BuildOptions", "build_bundle"]

ROLES: tuple[Role, ...] = ("encoder", "decoder")
# Ahead of time nothing can be proved, so what is built besides the fastest is what the target
# falls back to when that fails its gate there.
_AHEAD_OF_TIME = ("fp16", "tf32")


def build_bundle(
    bundle: Bundle,
    options: BuildOptions,
    say: Say = _LOG.info,
    *,
    make: Make = build_engine,
    open_pair: OpenPair | None = None,
    device: Device | None = None,
) -> tuple[EngineFile, ...]:
    """Build, prove and publish the engines of one bundle.

    On a GPU: the fastest pair of recipes that passes the gate on the bundle's parity record.
    Ahead of time: one pair per recipe, unproven; the runtime proves them where they first load.

    Args:
        bundle: an opened bundle.
        options: what to build.
        say: told what happens, in words.
        make: builds one engine.
        open_pair: loads a pair, for the gate to run; by default in the TensorRT backend.
        device: the GPU at hand; by default the driver is asked.

    Returns:
        The engines that may serve: encoders and decoders.

    Raises:
        InvalidInputError: an option makes no sense.
        BundleError: its engines lie elsewhere, behind a link, where the runtime would not look.
        BackendError: TensorRT, the driver or the GPU is missing.
        BuildError: a build failed, no recipe passes the gate, or another build is at work.
        OSError: the bundle's folder cannot be written to.
    """
    recipes = _check(options)
    trt = _import(options.backend)
    _check_capabilities(trt, options.targets)
    device = None if options.targets else device or _device(options)
    with (
        exclusive(bundle),
        EngineBuilder(bundle, options, device, trt.__version__, make) as builder,
    ):
        if device is None:
            engines = _ahead_of_time(builder, recipes, say)
        else:
            gpu = device.gpu
            target = EngineTarget(gpu, options.backend, trt.__version__, device.driver_version)
            open_pair = open_pair or functools.partial(_open_here, device=device)
            engines = _on_this_gpu(_Pairs(builder, target, open_pair, say), recipes, say)
        return engines


def _ahead_of_time(
    builder: EngineBuilder, recipes: tuple[Recipe, ...], say: Say
) -> tuple[EngineFile, ...]:
    """One unproven pair per recipe that can be built."""
    targets = ", ".join(builder.options.targets)
    built: list[EngineFile] = []
    failures: list[str] = []
    for recipe in recipes:
        pair: list[EngineFile] = []
        try:
            for role in ROLES:
                say(f"building the {role} in {recipe.name} for {targets}")
                pair.append(builder.build(role, recipe, recipe.features_dtype))
                say(_built(pair[-1]))
        except BuildError as error:
            failures.append(f"{recipe.name}: {error}")
            say(failures[-1])
        else:
            built += map(builder.place, pair)
    if not built:
        raise BuildError("no precision can be built:\n" + "\n".join(failures))
    say("nothing was run: the engines are unproven until they first load on their target")
    return tuple(sorted(built, key=lambda engine: engine.sidecar.role != "encoder"))


def _on_this_gpu(pairs: _Pairs, recipes: tuple[Recipe, ...], say: Say) -> tuple[EngineFile, ...]:
    """The fastest pair that passes the gate, proven."""
    candidates = {
        Candidate(
            pair_name(encoder.name, decoder.name),
            encoder.name,
            functools.partial(pairs.subject, encoder, decoder),
        ): (encoder, decoder)
        for encoder in recipes
        for decoder in recipes
    }
    opened: list[tuple[Recipe, Recipe]] = []

    def open_candidate(candidate: Candidate) -> Runner:
        opened.append(candidates[candidate])
        return pairs.open(*opened[-1])

    def on_verdict(candidate: Candidate, verdict: StoredVerdict) -> None:
        pairs.refuse(*candidates[candidate], verdict)

    try:
        select(pairs.bundle, tuple(candidates), open_candidate, say=say, on_verdict=on_verdict)
        return pairs.accept(*opened[-1])
    except (BackendError, VerificationError) as error:
        raise BuildError(f"no precision passes the gate on this machine: {error}") from error


class _Pairs:
    """Pairs of engines for one GPU, each engine built when it is first asked for.

    Args:
        builder: builds single engines.
        target: the GPU, and the TensorRT that builds.
        open_pair: loads a pair.
        say: told what is built.
    """

    def __init__(
        self, builder: EngineBuilder, target: EngineTarget, open_pair: OpenPair, say: Say
    ) -> None:
        self.bundle = builder.bundle
        self._builder = builder
        self._target = target
        self._open_pair = open_pair
        self._say = say
        # By the path they have: a decoder built anew for other feature maps takes that of the old.
        self._built: dict[tuple[Role, str], EngineFile] = {}
        self._problems: dict[tuple[Role, str, FeaturesType], str] = {}

    def subject(self, encoder: Recipe, decoder: Recipe) -> Subject:
        """What a verdict on a pair is about."""
        return subject_of(self._pair(encoder, decoder), self._target)

    def open(self, encoder: Recipe, decoder: Recipe) -> Runner:
        """Load a pair."""
        return self._open_pair(self.bundle, self._pair(encoder, decoder))

    def refuse(self, encoder: Recipe, decoder: Recipe, verdict: StoredVerdict) -> None:
        """After a failed verdict, leave it on record with the engine at fault, and remove that."""
        if verdict.encoder_failed:
            self._builder.refuse(self._built.pop(("encoder", encoder.name)), verdict.figures)
        elif not verdict.passed:
            self._builder.refuse(self._built.pop(("decoder", decoder.name)), verdict.figures)

    def accept(self, encoder: Recipe, decoder: Recipe) -> tuple[EngineFile, EngineFile]:
        """Leave on record that a pair passed, and keep it."""
        pair = self._pair(encoder, decoder)
        verdict = load_verdict(self.bundle, subject_of(pair, self._target))
        if verdict is None:
            raise BuildError("the verdict on the engines is gone: somebody cleared the cache")
        made = self._proven(pair.encoder, verdict)
        decoder_made = self._proven(pair.decoder, verdict, made.sidecar.engine.sha256)
        return self._builder.place(made), self._builder.place(decoder_made)

    def _proven(
        self, engine: EngineFile, verdict: StoredVerdict, paired_with: str | None = None
    ) -> EngineFile:
        """Say so in its sidecar, for people and tools: runtimes go by their own verdicts."""
        sidecar = msgspec.structs.replace(
            engine.sidecar,
            gpu=self._target.gpu,
            driver_version=self._target.driver_version,
            parity=verdict.figures,
            state="proven",
            paired_with=paired_with,
        )
        write_sidecar(engine.path, sidecar)
        return EngineFile(engine.path, sidecar)

    def _pair(self, encoder: Recipe, decoder: Recipe) -> EngineSet:
        features = encoder.features_dtype
        return EngineSet(
            self._engine("encoder", encoder, features), self._engine("decoder", decoder, features)
        )

    def _engine(self, role: Role, recipe: Recipe, features: FeaturesType) -> EngineFile:
        """Build an engine, unless it is there or is known to fail."""
        key, full_key = (role, recipe.name), (role, recipe.name, features)
        if full_key in self._problems:
            raise BuildError(self._problems[full_key])
        built = self._built.get(key)
        if built is None or built.sidecar.features_dtype != features:
            self._say(f"building the {role} in {recipe.name}")
            try:
                built = self._builder.build(role, recipe, features)
            except BuildError as error:
                self._problems[full_key] = f"the {role} cannot be built: {error}"
                raise BuildError(self._problems[full_key]) from error
            self._built[key] = built
            self._say(_built(built))
        return built


def _check(options: BuildOptions) -> tuple[Recipe, ...]:
    """Hold the options to the rules, and name the recipes to try."""
    flavours = typing.get_args(BackendName)
    if options.backend not in flavours:
        raise InvalidInputError("backend", repr(options.backend), " or ".join(flavours))
    bounds = {"max_objects": 1, "max_points": 1, "max_batch": 1, "device": 0}
    for name, least in bounds.items():
        value = getattr(options, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInputError(name, repr(value), f"a whole number of at least {least}")
    if options.workspace is not None and options.workspace < 1:
        raise InvalidInputError("workspace", repr(options.workspace), "a positive number of bytes")
    if options.targets and options.backend != "tensorrt-rtx":
        raise InvalidInputError(
            "targets",
            ", ".join(options.targets),
            'none, as the backend "tensorrt" builds on its own GPU only; "tensorrt-rtx" builds '
            "ahead of time",
        )
    for target in options.targets:
        if not CAPABILITY.fullmatch(target):
            raise InvalidInputError("targets", repr(target), "a compute capability such as 8.9")
    known = tuple(recipe.name for recipe in RECIPES)
    wanted = options.precision
    if wanted == "auto":
        wanted = _AHEAD_OF_TIME if options.targets else known
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InvalidInputError(
            "precision", ", ".join(unknown) or "nothing", "auto or some of " + ", ".join(known)
        )
    return tuple(recipe for recipe in RECIPES if recipe.name in wanted)


def _check_capabilities(trt: Any, targets: tuple[str, ...]) -> None:
    """Refuse targets that this TensorRT for RTX does not build for.

    Raises:
        InvalidInputError: naming those that it does.
    """
    if not targets:
        return
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    known = [f"{name[:-1]}.{name[-1]}" for name in names]
    unknown = [target for target in targets if target not in known]
    if unknown:
        expected = f"some of {', '.join(known)}, for which {trt.__name__} {trt.__version__} builds"
        raise InvalidInputError("targets", ", ".join(unknown), expected)


def _import(backend: BackendName) -> Any:
    known = entry(backend)
    try:
        return importlib.import_module(known.modules[0])
    except ImportError as error:
        raise BackendError(f"{backend} is not installed ({error}): {known.hint}") from error


def _device(options: BuildOptions) -> Device:
    try:
        return probe(options.device)
    except BackendError as error:
        raise BackendError(
            f"engines are built and proved on the GPU they are for: {error}. Without one, "
            "--backend tensorrt-rtx --target 8.9 (say) builds ahead of time"
        ) from error


def _open_here(bundle: Bundle, engines: EngineSet, device: Device) -> TensorRtBackend:
    """The backend that will serve."""
    platform = open_platform(engines.encoder.sidecar.backend, device)
    return TensorRtBackend(bundle, engines, platform)


def _built(engine: EngineFile) -> str:
    sidecar = engine.sidecar
    evidence = load_evidence(engine.path)
    plan = "what it computes with is unknown" if evidence is None else evidence.summary()
    return f"built the {sidecar.role} in {sidecar.recipe} in {sidecar.build_seconds:.0f} s: {plan}"
