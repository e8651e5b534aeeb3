"""Build a bundle's engines, prove them, and put them where the runtime looks for them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import onnx

from sam3rt.accuracy.gate import Verdict
from sam3rt.backends.tensorrt.cuda.driver import Device, probe
from sam3rt.backends.tensorrt.engines import (
    EngineFile,
    EngineSet,
    EngineShapes,
    EngineSidecar,
    engine_path,
    folder_name,
    sidecar_path,
    write_sidecar,
)
from sam3rt.backends.tensorrt.engines.selection import ENGINES
from sam3rt.backends.tensorrt.engines.sidecar import CAPABILITY, BackendName
from sam3rt.backends.tensorrt.engines.sidecar import Role as EngineRole
from sam3rt.bundle import Bundle, TensorSpec, file_entry, is_inside
from sam3rt.bundle.contract import EXPORT_ID, FINGERPRINT
from sam3rt.bundle.files import remove_temporaries
from sam3rt.errors import BackendError, BundleError, InvalidInputError

from .builder_process import MODULES, EngineRequest, Sizes, build_engine
from .ep_context import wrapper_path, write_wrapper
from .errors import BuildError
from .imaging_graphs import (
    postprocess_graph,
    postprocess_shapes,
    preprocess_graph,
    preprocess_shapes,
)
from .ladder import Trial, climb_down, trial_of
from .recipes import RECIPES, Recipe, recipe_named
from .typed_graph import FeaturesType, Role, apply_recipe, load_graph, save_graph

_LOG = logging.getLogger(__name__)

Say = Callable[[str], None]
Make = Callable[[EngineRequest], None]
Prove = Callable[[Bundle, EngineSet], Verdict]
# Least, typical and greatest shape of each input with a dynamic axis.
Profile = dict[str, tuple[Sizes, Sizes, Sizes]]

ROLES: tuple[Role, ...] = ("encoder", "decoder")
# The runtime pads one click to this many points.
_CLICK_POINTS = 4
# Ahead of time nothing can be proved, so what is built besides the fastest is what the target
# falls back to when that fails its gate there.
_AHEAD_OF_TIME = ("fp16", "tf32")
_LOCK = ".lock"
_EXTRA = {
    "tensorrt": "pip install 'sam3rt[gpu]', or use JetPack's own TensorRT on a Jetson",
    "tensorrt-rtx": "pip install 'sam3rt[rtx]'",
}


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        backend: the TensorRT flavour.
        precision: ``"auto"``, or the recipes to try, in the order of the ladder.
        targets: compute capabilities such as ``"8.9"`` to build for ahead of time, without a GPU
            (tensorrt-rtx only); empty builds for the GPU at hand and proves it there.
        max_objects: objects in one decoder call; more are run in parts. In the published decoder
            an object's largest layer (288 x 288 x 32 values) takes 10.6 MB in FP32, and every
            concurrent caller has room for a few such layers of all objects.
        max_points: points per object, padding and box corners included.
        max_images: images in one encoder call.
        max_side: height and width of images that are resized, and masks that are upsampled, on
            the GPU, pixels; the host does it for larger ones. Its square costs 12 bytes each of
            device memory.
        workspace: memory the builder may try layers with, bytes; ``None`` for all there is.
        device: number of the GPU to build on.
    """

    backend: BackendName = "tensorrt"
    precision: Literal["auto"] | tuple[str, ...] = "auto"
    targets: tuple[str, ...] = ()
    max_objects: int = 16
    max_points: int = 32
    max_images: int = 1
    max_side: int = 4096
    workspace: int | None = None
    device: int = 0


def build_bundle(
    bundle: Bundle,
    options: BuildOptions,
    say: Say = _LOG.info,
    *,
    make: Make = build_engine,
    prove: Prove | None = None,
    device: Device | None = None,
) -> tuple[EngineFile, ...]:
    """Build, prove and publish the engines of one bundle.

    On a GPU: the fastest pair of recipes that passes the gate on the bundle's parity record.
    Ahead of time: one pair per recipe, unproven; the runtime proves them where they first load,
    as it does with the engines for resizing and upsampling.

    Args:
        bundle: an opened bundle.
        options: what to build.
        say: told what happens, in words.
        make: builds one engine.
        prove: runs the gate on a pair; by default in the TensorRT backend.
        device: the GPU at hand; by default the driver is asked.

    Returns:
        The engines that may serve: encoders, decoders, what stands around them.

    Raises:
        InvalidInputError: an option makes no sense.
        BundleError: its engines lie elsewhere, behind a link, where the runtime would not look.
        BackendError: TensorRT, the driver or the GPU is missing.
        BuildError: a build failed, no recipe passes the gate, or another build is at work.
        OSError: the bundle's folder cannot be written to.
    """
    recipes = _check(options)
    _check_place(bundle)
    version = _version(options.backend)
    if options.targets:
        device = None
    elif device is None:
        device = _device(options)
    with (
        _exclusive(bundle.path / ENGINES),
        _Workshop(bundle, options, device, version, make) as shop,
    ):
        if device is None:
            engines = _ahead_of_time(shop, recipes, say)
        else:
            prove = prove or functools.partial(_prove_here, device=device)
            engines = _on_this_gpu(shop, recipes, say, prove)
        say("building the preprocessing and the postprocessing")
        return (*engines, *shop.build_imaging())


def _check_place(bundle: Bundle) -> None:
    try:
        inside = is_inside(bundle.path / ENGINES, bundle.path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise BundleError(f"cannot be read: {error}", ENGINES) from error
    if not inside:
        raise BundleError("is a link that leaves the bundle", ENGINES)


def _ahead_of_time(
    shop: _Workshop, recipes: tuple[Recipe, ...], say: Say
) -> tuple[EngineFile, ...]:
    """One unproven pair per recipe that can be built."""
    built: list[EngineFile] = []
    failures: list[str] = []
    for recipe in recipes:
        pair: list[EngineFile] = []
        try:
            for role in ROLES:
                say(f"building the {role} in {recipe.name} for {', '.join(shop.options.targets)}")
                pair.append(shop.build(role, recipe, recipe.features_dtype))
                say(_size(pair[-1]))
        except BuildError as error:
            failures.append(f"{recipe.name}: {error}")
            say(failures[-1])
            for alone in pair:
                shop.discard(alone)
        else:
            built += pair
    if not built:
        raise BuildError("no precision can be built:\n" + "\n".join(failures))
    say("nothing was run: the engines are unproven until they first load on their target")
    return tuple(sorted(built, key=lambda engine: engine.sidecar.role != "encoder"))


def _on_this_gpu(
    shop: _Workshop, recipes: tuple[Recipe, ...], say: Say, prove: Prove
) -> tuple[EngineFile, ...]:
    """The fastest pair that passes the gate, proven; whatever else was built is removed."""
    # By the place they have: a decoder built anew for other feature maps takes that of the old.
    built: dict[tuple[Role, str], EngineFile] = {}
    figures: dict[str, float] = {}

    def engine(role: Role, recipe: Recipe, features: FeaturesType) -> EngineFile:
        key = (role, recipe.name)
        if key not in built or built[key].sidecar.features_dtype != features:
            say(f"building the {role} in {recipe.name}")
            built[key] = shop.build(role, recipe, features)
            say(_size(built[key]))
        return built[key]

    def attempt(encoder: Recipe, decoder: Recipe) -> Trial:
        features = encoder.features_dtype
        keys: tuple[tuple[Role, Recipe], ...] = (("encoder", encoder), ("decoder", decoder))
        pair: list[EngineFile] = []
        for role, recipe in keys:
            try:
                pair.append(engine(role, recipe, features))
            except BuildError as error:
                return Trial(role, f"the {role} cannot be built: {error}")
        verdict = prove(shop.bundle, EngineSet(pair[0], pair[1], None, None, proven=False))
        figures.clear()
        figures.update((name, m.value) for name, m in verdict.worst().items())
        trial = trial_of(verdict)
        if trial.failed is not None:
            recipe = encoder if trial.failed == "encoder" else decoder
            shop.refuse(built.pop((trial.failed, recipe.name)), dict(figures))
        return trial

    chosen: list[EngineFile] = []
    try:
        first, second = climb_down(recipes, attempt, say)
        encoder = built.pop(("encoder", first.name))
        decoder = built.pop(("decoder", second.name))
        chosen.append(shop.accept(encoder, figures, None))
        chosen.append(shop.accept(decoder, figures, encoder.sidecar.engine.sha256))
    finally:
        for left_over in built.values():
            shop.discard(left_over)
    return tuple(chosen)


class _Workshop:
    """Builds single engines of one bundle by one set of options, in a folder of its own.

    A context manager: the folder is gone when it is left.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BuildOptions,
        device: Device | None,
        version: str,
        make: Make,
    ) -> None:
        self.bundle = bundle
        self.options = options
        self._device = device
        self._version = version
        self._make = make
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _Workshop:
        # In the bundle: what is finished is moved into place, which must not cross file systems.
        self._folder = tempfile.TemporaryDirectory(
            prefix=".build-", dir=self.bundle.path / ENGINES, ignore_cleanup_errors=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def build(self, role: Role, recipe: Recipe, features: FeaturesType) -> EngineFile:
        """Type the graph, build the engine and publish it as unproven.

        Raises:
            RecipeError, BuildError: it cannot be built.
        """
        if self._folder is None:
            raise RuntimeError("the workshop is closed")
        model = load_graph(self.bundle, role)
        apply_recipe(model, recipe, features)
        graph = Path(self._folder.name) / f"{role}.onnx"
        save_graph(model, graph)
        del model
        built = self._make_engine(
            role, graph, graph_profile(self.bundle, role, self.options), recipe, features
        )
        write_wrapper(
            built.path,
            self.options.backend,
            self._specs(role, "inputs", features),
            self._specs(role, "outputs", features),
            {
                EXPORT_ID: self.bundle.manifest.export_id,
                FINGERPRINT: self.bundle.manifest.fingerprint,
            },
            None if built.sidecar.gpu is None else built.sidecar.gpu.compute_capability,
        )
        return built

    def build_imaging(self) -> tuple[EngineFile, ...]:
        """The engines that stand around the network, in FP32, unproven.

        Raises:
            BuildError: one cannot be built.
        """
        if self._folder is None:
            raise RuntimeError("the workshop is closed")
        manifest, side = self.bundle.manifest, self.options.max_side
        exact = recipe_named("fp32")
        built = []
        parts: tuple[tuple[EngineRole, onnx.ModelProto, Profile], ...] = (
            ("preprocess", preprocess_graph(manifest), preprocess_shapes(manifest, side)),
            ("postprocess", postprocess_graph(manifest), postprocess_shapes(manifest, side)),
        )
        for role, model, profile in parts:
            graph = Path(self._folder.name) / f"{role}.onnx"
            graph.write_bytes(model.SerializeToString())
            built.append(self._make_engine(role, graph, profile, exact, "float32"))
        return tuple(built)

    def _make_engine(
        self,
        role: EngineRole,
        graph: Path,
        profile: Profile,
        recipe: Recipe,
        features: FeaturesType,
    ) -> EngineFile:
        staged = graph.with_suffix(".engine")
        started = time.monotonic()
        self._make(
            EngineRequest(
                str(graph),
                str(staged),
                self.options.backend,
                profile,
                self.options.targets,
                recipe.tf32,
                self.options.workspace,
                self._timing_cache(),
            )
        )
        seconds = time.monotonic() - started
        if not staged.is_file() or not staged.stat().st_size:
            raise BuildError(f"the build of the {role} in {recipe.name} left no engine")
        return self._publish(role, recipe, features, staged, seconds)

    def accept(
        self, engine: EngineFile, figures: dict[str, float], paired_with: str | None
    ) -> EngineFile:
        """Mark an engine proven on this GPU."""
        sidecar = msgspec.structs.replace(
            engine.sidecar, state="proven", parity=figures, paired_with=paired_with
        )
        write_sidecar(engine.path, sidecar)
        return EngineFile(engine.path, sidecar)

    def refuse(self, engine: EngineFile, figures: dict[str, float]) -> None:
        """Leave on record that an engine failed, and remove it: it can be gigabytes."""
        write_sidecar(
            engine.path, msgspec.structs.replace(engine.sidecar, state="refused", parity=figures)
        )
        self._remove(engine)

    def discard(self, engine: EngineFile) -> None:
        """Remove an engine that is not needed and was not at fault."""
        sidecar_path(engine.path).unlink(missing_ok=True)
        self._remove(engine)
        with contextlib.suppress(OSError):  # not empty
            engine.path.parent.rmdir()

    def _remove(self, engine: EngineFile) -> None:
        wrapper_path(engine.path).unlink(missing_ok=True)
        engine.path.unlink(missing_ok=True)

    def _publish(
        self, role: EngineRole, recipe: Recipe, features: FeaturesType, staged: Path, seconds: float
    ) -> EngineFile:
        gpu = None if self._device is None else self._device.gpu
        folder = folder_name(
            gpu, self.options.targets, self.options.backend, self._version, recipe.name
        )
        path = engine_path(self.bundle.path, folder, role)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = msgspec.structs.replace(file_entry(staged), file=path.name)
        sidecar = EngineSidecar(
            role=role,
            backend=self.options.backend,
            engine=entry,
            bundle_fingerprint=self.bundle.manifest.fingerprint,
            gpu=gpu,
            targets=self.options.targets,
            tensorrt_version=self._version,
            driver_version=None if self._device is None else self._device.driver_version,
            recipe=recipe.name,
            features_dtype=features,
            shapes=EngineShapes(
                self.options.max_objects,
                self.options.max_points,
                self.options.max_images,
                self.options.max_side,
            ),
            state="unproven",
            parity={},
            paired_with=None,
            build_seconds=round(seconds, 3),
        )
        # An old sidecar or wrapper beside a new engine would be a contradiction, an engine without
        # one is merely unknown: so they go first, and the sidecar comes last.
        sidecar_path(path).unlink(missing_ok=True)
        wrapper_path(path).unlink(missing_ok=True)
        staged.replace(path)
        try:
            write_sidecar(path, sidecar)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return EngineFile(path, sidecar)

    def _specs(
        self, role: Role, side: Literal["inputs", "outputs"], features: FeaturesType
    ) -> tuple[TensorSpec, ...]:
        """The engine's inputs or outputs: the graph's, with feature maps of their type."""
        maps = {spec.name for spec in self.bundle.manifest.encoder.outputs}
        specs: tuple[TensorSpec, ...] = getattr(getattr(self.bundle.manifest, role), side)
        return tuple(
            msgspec.structs.replace(spec, dtype=features) if spec.name in maps else spec
            for spec in specs
        )

    def _timing_cache(self) -> str | None:
        """Where this GPU's measured layer times are kept; none ahead of time, when none are."""
        if self._device is None:
            return None
        name = folder_name(self._device.gpu, (), self.options.backend, self._version, "timing")
        return str(self.bundle.path / ENGINES / f"{name}.cache")


def graph_profile(bundle: Bundle, role: Role, options: BuildOptions) -> Profile:
    """Least, typical and greatest shape of each input of a graph that has a dynamic axis."""
    axes = {
        "batch": (1, 1, options.max_images),
        "num_objects": (1, 1, options.max_objects),
        "num_points": (1, min(_CLICK_POINTS, options.max_points), options.max_points),
        "num_masks": (1, 1, options.max_objects),
    }
    profile: Profile = {}
    for spec in getattr(bundle.manifest, role).inputs:
        if all(isinstance(side, int) for side in spec.shape):
            continue
        least, typical, greatest = (
            tuple(side if isinstance(side, int) else axes[side][i] for side in spec.shape)
            for i in range(3)
        )
        profile[spec.name] = (least, typical, greatest)
    return profile


def _check(options: BuildOptions) -> tuple[Recipe, ...]:
    """Hold the options to the rules, and name the recipes to try."""
    if options.backend not in MODULES:
        raise InvalidInputError("backend", repr(options.backend), " or ".join(MODULES))
    bounds = {"max_objects": 1, "max_points": 1, "max_images": 1, "max_side": 64, "device": 0}
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


def _version(backend: BackendName) -> str:
    try:
        module = importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise BackendError(f"{backend} is not installed ({error}): {_EXTRA[backend]}") from error
    version: str = module.__version__
    return version


def _device(options: BuildOptions) -> Device:
    try:
        return probe(options.device)
    except BackendError as error:
        raise BackendError(
            f"engines are built and proved on the GPU they are for: {error}. Without one, "
            "--backend tensorrt-rtx --target 8.9 (say) builds ahead of time"
        ) from error


def _prove_here(bundle: Bundle, engines: EngineSet, device: Device) -> Verdict:
    """Run the gate in the backend that will serve."""
    from sam3rt.backends.tensorrt import TensorRtBackend, open_platform, prove

    platform = open_platform(engines.encoder.sidecar.backend, device)
    return prove(bundle, TensorRtBackend(bundle, engines, platform))


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one build at a time into a bundle. The lock ends with its process, however that ends.

    Raises:
        BuildError: another build is at work.
    """
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another build is at work in {folder}") from error
        _clear(folder)
        yield


def _clear(folder: Path) -> None:
    """Remove what a build left that was killed; the folder of engines is locked.

    A runtime that is just writing what it found of an engine, without the lock, would say that it
    could not, and find it again next time.
    """
    for place in [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]:
        if place.name.startswith(".build-"):
            shutil.rmtree(place, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # somebody else's; nothing reads them
                remove_temporaries(place)


def _size(engine: EngineFile) -> str:
    sidecar = engine.sidecar
    return (
        f"built the {sidecar.role} in {sidecar.recipe}: {sidecar.engine.bytes / 1e6:.1f} MB in "
        f"{sidecar.build_seconds:.0f} s"
    )
