"""What is compared: this runtime's backends, and PyTorch where the export's extra is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sam3rt.backends import BACKENDS
from sam3rt.backends.create import create_backend
from sam3rt.backends.options import BackendOptions
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, InvalidInputError
from sam3rt.model import SegmentationModel

from .document import CandidateInfo

PYTORCH = "pytorch"
PYTORCH_PRECISIONS = ("fp32", "bf16", "compile-fp32", "compile-bf16")


@dataclass(frozen=True)
class Choice:
    """Which way of running the model.

    Attributes:
        backend: a backend's name, or ``"pytorch"``.
        precision: as the backend takes it.
    """

    backend: str
    precision: str

    @property
    def name(self) -> str:
        """How it is written, such as ``"openvino:fp32"``."""
        return f"{self.backend}:{self.precision}"


@dataclass(frozen=True)
class Candidate:
    """A loaded one.

    Attributes:
        choice: what was asked for.
        model: the bundle on it.
        threads: as asked for.
    """

    choice: Choice
    model: SegmentationModel
    threads: int | None

    @property
    def name(self) -> str:
        """Backend and what it computes in, such as ``"openvino:fp32"``; a GPU is named too."""
        backend = self.model.backend
        device = "" if backend.device == "cpu" else f"@{backend.device}"
        return f"{backend.name}:{backend.precision}{device}"

    def info(self) -> CandidateInfo:
        """Its description."""
        backend = self.model.backend
        return CandidateInfo(
            self.name,
            backend.name,
            backend.device,
            backend.precision,
            self.threads,
            backend.versions(),
        )


@dataclass(frozen=True)
class Settings:
    """What all candidates of a run share.

    Attributes:
        device: as :func:`sam3rt.load_model` takes it.
        threads: likewise.
        checkpoint: the PyTorch model the bundle was exported from, or ``None``.
    """

    device: str
    threads: int | None
    checkpoint: Path | None


def parse_choice(text: str) -> Choice:
    """Read ``BACKEND`` or ``BACKEND:PRECISION``.

    Raises:
        InvalidInputError: there is no such backend.
    """
    backend, _, precision = text.partition(":")
    if backend not in (*BACKENDS, PYTORCH):
        raise InvalidInputError(
            "candidate", repr(text), f"BACKEND[:PRECISION] with {', '.join([*BACKENDS, PYTORCH])}"
        )
    if backend == PYTORCH:
        precision = precision or "fp32"
        if precision not in PYTORCH_PRECISIONS:
            raise InvalidInputError(
                "candidate", repr(text), f"pytorch with {', '.join(PYTORCH_PRECISIONS)}"
            )
    return Choice(backend, precision or "auto")


def default_choices(with_pytorch: bool) -> list[Choice]:
    """What is compared unless something is asked for; what is not installed is left out later.

    On a GPU nothing but what is asked for computes in FP32, which the others are compared with.
    """
    choices = [Choice(name, "auto") for name in BACKENDS]
    choices += [Choice(name, "fp32") for name in ("onnxruntime", "openvino") if name in BACKENDS]
    if with_pytorch:
        choices += [Choice(PYTORCH, p) for p in ("fp32", "bf16", "compile-bf16")]
    return choices


def load_candidate(bundle: Bundle, choice: Choice, settings: Settings) -> Candidate:
    """Load one candidate; its graphs are loaded at first use.

    Raises:
        BackendError: it cannot be used here; the message says why.
    """
    if choice.backend != PYTORCH:
        options = BackendOptions(settings.device, settings.threads, choice.precision)
        backend = create_backend(choice.backend, bundle, options)
        return Candidate(choice, SegmentationModel(bundle, backend), settings.threads)
    if settings.checkpoint is None:
        raise BackendError("PyTorch needs --checkpoint, the model the bundle was exported from")
    try:
        from .pytorch_backend import PyTorchBackend
    except ImportError as error:
        raise BackendError(
            f"PyTorch needs the export's extra: pip install 'sam3rt[export]' ({error})"
        ) from error
    backend = PyTorchBackend(
        bundle,
        settings.checkpoint,
        precision=choice.precision,
        device=settings.device,
        threads=settings.threads,
    )
    return Candidate(choice, SegmentationModel(bundle, backend), settings.threads)
