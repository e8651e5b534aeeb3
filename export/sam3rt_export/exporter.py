"""From a checkpoint to a bundle that has been compared with the checkpoint's own model."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import sam3rt
from sam3rt.accuracy.metrics import Measurement
from sam3rt.accuracy.record import ExpectedCase, ParityRecord
from sam3rt.accuracy.run import rerecord, verify
from sam3rt.backends.table import ENGINES
from sam3rt.bundle import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NO_FINGERPRINT,
    Bundle,
    Manifest,
    ParityLimits,
    ParitySpec,
    SourceSpec,
    file_entry,
    open_bundle,
    write_manifest,
)
from sam3rt.errors import InvalidInputError, Sam3rtError
from sam3rt.geometry import preprocess, to_rgb
from sam3rt.loading import load_model

from . import contracts
from .errors import ExportError, SelfCheckError
from .parity_inputs import cases_for, default_images
from .source import ExportSource
from .sources import SourceOptions, open_source
from .stable_prompts import SHIFTS, most_decided
from .tracing import Weights, trace_to_file
from .transaction import commit, new_folder, recover

_LOG = logging.getLogger(__name__)

Progress = Callable[[str], None]

_LICENSE = "LICENSE"
_RECORD = "parity.npz"
# The names of what lies in a bundle, engines that were built for it included.
_OF_A_BUNDLE = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(_RECORD)}|{_LICENSE}|{ENGINES}|(en|de)coder\.[\w.]+"
)

# FP32 graphs differ from PyTorch by summation order alone: measured 2e-5 (features) and 6e-5
# (logits) of the largest value at full size. FP16-stored weights are each off by 2^-11.
LIMITS = {
    "float32": ParityLimits(
        feature_error=5e-4,
        feature_cosine=0.999999,
        logit_error=1e-3,
        iou_error=1e-3,
        mask_iou=0.998,
    ),
    "float16": ParityLimits(
        feature_error=2e-2, feature_cosine=0.9999, logit_error=2e-2, iou_error=5e-3, mask_iou=0.99
    ),
}


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        name: name of the bundle; the source's own by default.
        weights: type weights are stored in. Computation is FP32 either way.
        parity_images: uint8 [H, W, 3] images for the parity record; drawn ones by default.
        license: overrides the source's licence name.
        license_path: text of the licence, copied into the bundle.
        overwrite: replace an existing bundle.
        source: how to read the checkpoint.
    """

    name: str | None = None
    weights: Weights = "float32"
    parity_images: Sequence[NDArray[np.uint8]] = ()
    license: str | None = None
    license_path: Path | None = None
    overwrite: bool = False
    source: SourceOptions = field(default_factory=SourceOptions)


def export_bundle(
    checkpoint: Any,
    output: str | os.PathLike[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model to a bundle folder, which appears whole or not at all.

    Args:
        checkpoint: see :func:`sam3rt_export.sources.open_source`.
        output: the bundle folder to make.
        options: how; the defaults suit SAM 3.
        progress: called with a line at each stage.

    Returns:
        The finished bundle.

    Raises:
        ExportError: the checkpoint, the output or a graph will not do, or the graphs do not
            reproduce the model; nothing is written then.
        InvalidInputError: an argument is none that can be used.
    """
    options = options or ExportOptions()
    say = _timed(progress)
    if options.weights not in LIMITS:
        raise ExportError(f"weights: got {options.weights!r}, expected one of {', '.join(LIMITS)}")
    for argument, text in (("name", options.name), ("license", options.license)):
        if text is not None and (not text or not text.isprintable()):
            raise InvalidInputError(argument, repr(text), "a text of one line")
    images = [to_rgb(image, "parity_images") for image in options.parity_images]
    if not all(np.ptp(image, axis=(0, 1)).any() for image in images):
        expected = "images of more than one colour, which show what a graph does wrong"
        raise InvalidInputError("parity_images", "an image of one colour", expected)
    target = _target(output)
    recover(target)
    _check_target(target, options.overwrite)
    with _writing(target) as folder:
        record = _write_files(checkpoint, folder, replace(options, parity_images=images), say)
        # PyTorch's copies of the weights are gone by now, except for a model that was passed in.
        _free_memory()
        say("comparing the graphs in ONNX Runtime with PyTorch")
        self_check(folder, record, LIMITS[options.weights])
        if options.weights == "float16":
            _expect_stored_weights(folder, record)
        _check_target(target, options.overwrite)  # minutes have passed
        commit(folder, target, replace=options.overwrite)
    say(f"wrote {target}")
    return open_bundle(target, check_files=False)


def _write_files(
    checkpoint: Any, folder: Path, options: ExportOptions, say: Progress
) -> ParityRecord:
    """Write every file of the bundle into an empty folder.

    Returns:
        The parity record.
    """
    if options.license_path is not None:
        try:
            shutil.copyfile(options.license_path, folder / _LICENSE)
        except OSError as error:
            raise ExportError(f"license_path: cannot be read: {error}") from error
    say("reading the checkpoint")
    source = open_source(checkpoint, options.source)
    for note in source.notes:
        say(note)
    height, width = source.image.size
    count = sum(p.numel() for part in (source.encoder, source.decoder) for p in part.parameters())
    say(
        f"{source.name}, from {source.origin} ({source.kind}): {count / 1e6:.1f} million "
        f"parameters, input of {width}x{height} pixels"
    )
    images = list(options.parity_images) or default_images()
    record = _run_reference(source, images, say)
    record.save(folder / _RECORD)
    export_id = _export_id(source, options)
    say("tracing the encoder")
    encoder = trace_to_file(
        contracts.encoder_request(source, options.weights, export_id), folder / "encoder.onnx"
    )
    say(f"traced the encoder: {encoder.nodes} nodes")
    _free_memory()
    say("tracing the decoder")
    decoder = trace_to_file(
        contracts.decoder_request(source, options.weights, export_id), folder / "decoder.onnx"
    )
    say(f"traced the decoder: {decoder.nodes} nodes")
    for graph in (encoder, decoder):
        onnx.checker.check_model(str(folder / graph.model.file))
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        fingerprint=NO_FINGERPRINT,
        export_id=export_id,
        name=options.name or source.name,
        model_type=source.model_type,
        weights=options.weights,
        source=_source_spec(source, folder, options),
        image=source.image,
        prompts=source.prompts,
        masks=source.masks,
        encoder=encoder,
        decoder=decoder,
        parity=ParitySpec(file_entry(folder / _RECORD), LIMITS[options.weights]),
        producer={
            "sam3rt": sam3rt.__version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            **source.versions,
        },
    )
    write_manifest(folder, manifest)
    return record


def self_check(folder: Path, record: ParityRecord, limits: ParityLimits) -> list[Measurement]:
    """Run a finished bundle in ONNX Runtime and hold every output to the reference's.

    Returns:
        All measurements.

    Raises:
        SelfCheckError: listing what differs by how much.
    """
    model = load_model(folder, backend="onnxruntime", device="cpu", check_files=False)
    measurements = list(verify(model.backend, model.manifest, record, limits))
    wrong = [m for m in measurements if not m.passed]
    if wrong:
        lines = "\n".join(
            f"  {m.subject}: {m.metric} {m.value:.3g}, allowed {m.limit:.3g}" for m in wrong
        )
        raise SelfCheckError(f"the exported graphs do not reproduce the model:\n{lines}")
    for m in measurements:
        _LOG.info("%s: %s %.3g (limit %.3g)", m.subject, m.metric, m.value, m.limit)
    return measurements


def _expect_stored_weights(folder: Path, record: ParityRecord) -> None:
    """Let the record expect what the rounded weights give in FP32, now that they are checked.

    The record exists to find errors that a machine or an engine adds. Held to the unrounded model,
    the rounding of the weights would use up almost the whole tolerance.
    """
    bundle = open_bundle(folder, check_files=False)
    model = load_model(folder, backend="onnxruntime", device="cpu", check_files=False)
    rerecord(model.backend, model.manifest, record).save(folder / _RECORD)
    parity = ParitySpec(file_entry(folder / _RECORD), LIMITS["float32"])
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, parity=parity))


def _run_reference(
    source: ExportSource, images: list[NDArray[np.uint8]], say: Progress
) -> ParityRecord:
    """The reference outputs for the parity inputs."""
    features = []
    for index, image in enumerate(images):
        say(f"running the PyTorch model on parity image {index + 1} of {len(images)}")
        pixels, _ = preprocess(source.image, image)
        features.append(source.reference.encode(torch.from_numpy(pixels)))
    expected = []
    say("choosing prompts on which the model is not undecided")
    variants = [cases_for(images, source.image, source.prompts, shift) for shift in SHIFTS]
    for candidates in zip(*variants, strict=True):
        maps = features[candidates[0].image]
        case = most_decided(source.decoder, maps, candidates)
        prompts = case.prompts
        masks = None if prompts.masks is None else torch.from_numpy(prompts.masks)
        said = source.reference.decode(
            maps, torch.from_numpy(prompts.points), torch.from_numpy(prompts.labels), masks
        )
        score = None if said.object_score is None else said.object_score.numpy()
        expected.append((case, ExpectedCase(said.logits.numpy(), said.iou.numpy(), score)))
    arrays = [tuple(level.numpy() for level in levels) for levels in features]
    log_odds = source.decoder.architecture.predicts_log_odds
    return ParityRecord.build(images, arrays, expected, log_odds=log_odds)


def _export_id(source: ExportSource, options: ExportOptions) -> str:
    """A digest of the weights and everything else that shapes the graphs.

    Two exports of the same model by the same software share it, and their graphs fit together.
    """
    digest = hashlib.sha256()
    versions = (sam3rt.__version__, torch.__version__, onnx.__version__, options.weights)
    rules = (source.model_type, source.image, source.prompts, source.decoder.architecture)
    digest.update(repr((*rules, versions)).encode())
    for module in (source.encoder, source.decoder):
        digest.update(repr(module).encode())  # names sizes that are no tensors, such as epsilons
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()


def _source_spec(source: ExportSource, folder: Path, options: ExportOptions) -> SourceSpec:
    return SourceSpec(
        kind=source.kind,
        reference=source.origin,
        sha256=source.sha256,
        license=options.license or source.license,
        license_file=None if options.license_path is None else file_entry(folder / _LICENSE),
        weights=source.stored,
        notes=source.notes,
    )


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """:func:`sam3rt_export.transaction.new_folder`, with every error as one of ours."""
    try:
        with new_folder(target) as folder:
            yield folder
    except Sam3rtError:
        raise
    except OSError as error:
        raise ExportError(f"output: {target} cannot be written: {error}") from error
    except Exception as error:  # whatever PyTorch, ONNX and their helpers raise
        raise ExportError(f"the export failed: {type(error).__name__}: {error}") from error


def _target(output: str | os.PathLike[str]) -> Path:
    """The folder to make. A link stays, and the folder it points to is replaced."""
    text = os.fspath(output)
    if not text or "\0" in text:
        raise InvalidInputError("output", repr(text), "the path of a folder")
    try:
        target = Path(text).resolve()
        str(target).encode()
    except UnicodeEncodeError as error:
        raise ExportError(
            f"output: {target} or the locale is not UTF-8, and ONNX's libraries write no other "
            "path: use another name, or set LC_ALL=C.UTF-8"
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise ExportError(f"output: {text} cannot be found: {error}") from error
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to write over anything but a bundle, and over that unless asked to."""
    if not target.exists():
        return
    if not overwrite:
        raise ExportError(f"output: {target} exists; remove it, or give --overwrite")
    found = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else None
    if found is None or (found and MANIFEST not in found):
        raise ExportError(f"output: {target} is not a bundle, and is not overwritten")
    others = [name for name in found if not _OF_A_BUNDLE.fullmatch(name)]
    if others:
        raise ExportError(
            f"output: {target} is not overwritten: it holds {others[0]!r}, which is not a bundle's"
        )


def _free_memory() -> None:
    """Collect garbage, and let the C library return free memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself. The weights of a ViT have that size, so
    gigabytes would stay allocated during the next stage.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _timed(progress: Progress | None) -> Progress:
    """Progress lines with the seconds since the start."""
    start = time.monotonic()

    def say(text: str) -> None:
        _LOG.info(text)
        if progress is not None:
            progress(f"[{time.monotonic() - start:6.1f} s] {text}")

    return say
