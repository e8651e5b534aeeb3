"""Which of a bundle's engines fit this machine, and in which order to try them.

Engines lie in ``BUNDLE/engines/<GPU>-sm<cc>-<backend>-<version>-<recipe>/<role>.engine``. Folder
names are for people; what counts stands in the sidecars.

A set is an encoder and a decoder of the same bundle that agree on the type of the feature maps.
They may be of different recipes: the encoder decides how accurate the features are, and a decoder
costs little in any precision. Sets come fastest first: all decoders for the fastest encoder, then
those for the next. A sidecar that says "proven" is not believed: this machine's verdicts count. One
that says "refused" is, for the GPU and the driver where it was found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...accuracy.select import Recipe
from ...accuracy.verdicts import Subject
from ...bundle import Bundle, is_inside
from ...errors import BundleError
from ..base import UnfitError
from ..table import ENGINES
from .driver import Gpu, processor
from .sidecar import BackendName, EngineSidecar, read_sidecar, sidecar_path

_LOG = logging.getLogger(__name__)

# Fastest first. A recipe that is not listed, as engines of older builds have, comes last.
RECIPE_ORDER: tuple[str, ...] = (
    "fp16",
    "fp16-activations",
    "fp16-attention-tf32",
    "tf32",
    "fp32",
)


@dataclass(frozen=True)
class EngineTarget:
    """What an engine has to fit.

    Attributes:
        gpu: the GPU it is to run on.
        backend: the TensorRT flavour that is to load it.
        tensorrt_version: of that flavour, in full.
        driver_version: of the GPU's driver.
    """

    gpu: Gpu
    backend: BackendName
    tensorrt_version: str
    driver_version: str


@dataclass(frozen=True)
class EngineFile:
    """An engine and its sidecar.

    Attributes:
        path: the engine file.
        sidecar: what is on record about it.
    """

    path: Path
    sidecar: EngineSidecar


@dataclass(frozen=True)
class EngineSet:
    """Engines that can serve together.

    Attributes:
        encoder: image encoder.
        decoder: prompt decoder.
    """

    encoder: EngineFile
    decoder: EngineFile

    @property
    def precision(self) -> str:
        """The recipe, or ``"ENCODER+DECODER"`` where the two differ."""
        encoder, decoder = self.encoder.sidecar.recipe, self.decoder.sidecar.recipe
        return pair_name(encoder, decoder)


def pair_name(encoder: str, decoder: str) -> str:
    """What to call an encoder's and a decoder's recipe together."""
    return encoder if encoder == decoder else f"{encoder}+{decoder}"


def subject_of(engines: EngineSet, target: EngineTarget) -> Subject:
    """What a verdict on a set of engines is about."""
    return Subject(
        target.backend,
        target.tensorrt_version,
        processor(target.gpu, target.driver_version),
        engines.precision,
        f"{engines.encoder.sidecar.engine.sha256} {engines.decoder.sidecar.engine.sha256}",
    )


def recipe_of(engines: EngineSet, target: EngineTarget) -> Recipe:
    """A set of engines as one way to run its bundle. Whatever it computes in, it needs proof."""
    encoder = engines.encoder.sidecar.engine.sha256
    return Recipe(engines.precision, encoder, subject_of(engines, target))


def find_engines(bundle: Bundle) -> tuple[EngineFile, ...]:
    """Every engine of a bundle whose sidecar can be read, by path.

    What has no sidecar, or a damaged one, is left out with a warning: nothing is known about it.
    So is what lies elsewhere, behind a link. A build's own folder, whose name begins with a dot,
    holds nothing that is finished.
    """
    found = []
    for path in sorted((bundle.path / ENGINES).glob("[!.]*/*.engine")):
        try:
            _check_location(path, bundle.path)
            found.append(EngineFile(path, read_sidecar(path)))
        except BundleError as error:
            _LOG.warning("%s is passed over: %s", path, error)
    return tuple(found)


def _check_location(engine: Path, folder: Path) -> None:
    for path in (engine, sidecar_path(engine)):
        try:
            inside = is_inside(path, folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
            raise BundleError(f"cannot be read: {error}", path.name) from error
        if not inside:
            raise BundleError("leaves the bundle through a link", path.name)


def candidates(
    bundle: Bundle,
    target: EngineTarget,
    precision: str = "auto",
    engines: Iterable[EngineFile] | None = None,
) -> tuple[EngineSet, ...]:
    """The sets that fit this machine, in the order in which to try them.

    Hashes are not compared here: whoever loads an engine hashes what it loads.

    Args:
        bundle: the bundle they must belong to.
        target: what they must fit.
        precision: ``"auto"``, the recipe both engines must be of, or ``"ENCODER+DECODER"``.
        engines: to choose from; by default those of the bundle.

    Raises:
        UnfitError: nothing fits; the message says which field differs, with both values, and
            which command builds what fits.
    """
    found = find_engines(bundle) if engines is None else tuple(engines)
    fingerprint = bundle.manifest.fingerprint
    recipes = {"encoder": precision, "decoder": precision}
    if "+" in precision:
        recipes["encoder"], _, recipes["decoder"] = precision.partition("+")
    fitting: dict[str, list[EngineFile]] = {}
    for role, wanted in recipes.items():
        of_role = [engine for engine in found if engine.sidecar.role == role]
        fitting[role] = sorted(
            (e for e in of_role if not _differences(e, fingerprint, target, wanted)),
            key=lambda e: (_rank(e.sidecar.recipe), e.path),
        )
        if not fitting[role]:
            raise UnfitError(_explain(role, of_role, bundle, target, wanted))
    sets = [
        EngineSet(encoder, decoder)
        for encoder in fitting["encoder"]
        for decoder in fitting["decoder"]
        if encoder.sidecar.features_dtype == decoder.sidecar.features_dtype
    ]
    if not sets:
        types = {
            role: sorted({e.sidecar.features_dtype for e in fitting[role]}) for role in recipes
        }
        raise UnfitError(
            f"no {target.backend} encoder and decoder of {bundle.path} fit each other: "
            f"features_dtype is {types['encoder']} for encoders and {types['decoder']} for "
            f"decoders; build both: {_command(bundle, target, precision)}"
        )
    return tuple(sets)


def _differences(
    engine: EngineFile, fingerprint: str, target: EngineTarget, recipe: str
) -> tuple[str, ...]:
    """What keeps an engine from serving here, each with both values; empty where it fits."""
    sidecar = engine.sidecar
    differences = []

    def compare(field: str, built: object, here: object) -> None:
        if built != here:
            differences.append(f"{field} is {built}, here it is {here}")

    compare("backend", sidecar.backend, target.backend)
    if sidecar.bundle_fingerprint != fingerprint:
        differences.append(
            f"bundle_fingerprint is {sidecar.bundle_fingerprint[:16]}..., this bundle's is "
            f"{fingerprint[:16]}..."
        )
    if sidecar.targets:
        if target.gpu.compute_capability not in sidecar.targets:
            differences.append(
                f"targets are {', '.join(sidecar.targets)}, the compute capability here is "
                f"{target.gpu.compute_capability}"
            )
    elif sidecar.gpu is not None:
        compare("gpu.name", sidecar.gpu.name, target.gpu.name)
        compare(
            "gpu.compute_capability",
            sidecar.gpu.compute_capability,
            target.gpu.compute_capability,
        )
    compare("tensorrt_version", sidecar.tensorrt_version, target.tensorrt_version)
    if recipe not in ("auto", sidecar.recipe):
        differences.append(f"recipe is {sidecar.recipe}, {recipe} was asked for")
    here = (target.gpu, target.driver_version)
    if sidecar.state == "refused" and (sidecar.gpu, sidecar.driver_version) == here:
        differences.append("state is refused: it failed the gate on this kind of GPU")
    try:
        length = engine.path.stat().st_size
    except OSError:
        differences.append(f"engine.bytes is {sidecar.engine.bytes}, the file cannot be read")
    else:
        compare("engine.bytes", sidecar.engine.bytes, length)
    return tuple(differences)


def _explain(
    role: str, engines: Sequence[EngineFile], bundle: Bundle, target: EngineTarget, recipe: str
) -> str:
    """Why no engine of a role fits: for the nearest one, every field that differs."""
    command = _command(bundle, target, recipe)
    if not engines:
        return (
            f"{bundle.path} has no {target.backend} {role} engine; "
            f"build one on this machine: {command}"
        )
    nearest = min(
        engines,
        key=lambda e: len(_differences(e, bundle.manifest.fingerprint, target, recipe)),
    )
    differences = "; ".join(_differences(nearest, bundle.manifest.fingerprint, target, recipe))
    where = (
        nearest.path.relative_to(bundle.path)
        if nearest.path.is_relative_to(bundle.path)
        else nearest.path
    )
    return (
        f"none of {len(engines)} {role} engines of {bundle.path} fits this target. The nearest, "
        f"{where}: {differences}. Build one that does: {command}"
    )


def _command(bundle: Bundle, target: EngineTarget, precision: str) -> str:
    # A build makes both engines by one recipe, or by what the gate allows.
    recipe = "" if precision == "auto" or "+" in precision else f" --precision {precision}"
    return f"sam3rt build {bundle.path} --backend {target.backend}{recipe}"


def _rank(recipe: str) -> int:
    return RECIPE_ORDER.index(recipe) if recipe in RECIPE_ORDER else len(RECIPE_ORDER)
