"""From a bundle's folder or name to a model."""

from __future__ import annotations

import os

from .arguments import flag
from .backends.create import create_backend
from .backends.options import BackendOptions, GpuOptions
from .bundle import open_bundle
from .bundle.default import default_bundle_path
from .bundle.names import find_bundle
from .errors import BundleError, InvalidInputError
from .model import SegmentationModel


def load_model(
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
    map_weights: bool = False,
    gpu: GpuOptions | None = None,
    check_files: bool = True,
    expected_fingerprint: str | None = None,
) -> SegmentationModel:
    """Load a model from a bundle folder.

    FP32 graphs are loaded into the backend at first use, or by :meth:`SegmentationModel.warm_up`.
    What computes in less is loaded at once and, the first time on this machine, compared with the
    bundle's parity record, which can take a minute; the verdict is kept in the user's cache folder.

    Args:
        bundle: the folder, or the name of one in ``engines`` of the working folder, in the folder
            that ``SAM3RT_HOME`` names or in ``sam3rt`` in the user's data folder, or ``None`` for
            the bundled MobileSAM. ``sam3rt models`` lists the names.
        backend: ``"auto"`` or one of :data:`sam3rt.backends.BACKENDS`.
        device: ``"auto"`` (CUDA where it works, else the CPU), ``"cpu"``, ``"cuda"``,
            ``"cuda:N"``.
        threads: CPU threads per operator; ``None`` leaves it to the backend.
        precision: ``"auto"`` (what the backend does best and has proved here), or one it offers,
            such as ``"fp32"``.
        map_weights: let the backend map a bundle's weights from their file, which saves up to
            their size in memory. By default they are read into this process's own memory while
            they are hashed: a mapped file that is changed later changes results, and one that is
            cut ends the process.
        gpu: how the TensorRT backends use the GPU: calls at a time, memory, waiting. Others pay
            no heed to it.
        check_files: hash every file against the manifest first.
        expected_fingerprint: refuse any bundle but the one with this fingerprint.

    Raises:
        InvalidInputError: an argument makes no sense.
        BundleError: the bundle is missing, damaged, mixed, too new or not the expected one.
        BackendError: the backend or the device cannot be used here.
        VerificationError: the precision asked for fails the gate on this machine.
    """
    if bundle is not None and not isinstance(bundle, str | os.PathLike):
        raise InvalidInputError("bundle", type(bundle).__name__, "a path or None")
    own_gpu = GpuOptions() if gpu is None else gpu
    options = BackendOptions(device, threads, precision, map_weights, own_gpu)
    path = default_bundle_path() if bundle is None else find_bundle(bundle)
    opened = open_bundle(path, check_files=flag("check_files", check_files))
    if expected_fingerprint is not None and opened.manifest.fingerprint != expected_fingerprint:
        raise BundleError(
            f"{path} has fingerprint {opened.manifest.fingerprint}, expected {expected_fingerprint}"
        )
    return SegmentationModel(opened, create_backend(backend, opened, options))
