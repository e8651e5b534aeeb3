"""Exceptions of the runtime. All derive from :class:`Sam3rtError`."""

from __future__ import annotations

from typing import Any


class Sam3rtError(Exception):
    """Base class of everything sam3rt raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own calls the class with the message alone. A pool of processes that cannot read
        # an error waits for it for ever.
        return _made_of, (type(self), self.args), self.__dict__


def _made_of(kind: type[Sam3rtError], said: tuple[Any, ...]) -> Sam3rtError:
    return kind.__new__(kind, *said)


class InvalidInputError(Sam3rtError, ValueError):
    """An argument has the wrong type, shape, dtype or values.

    Attributes:
        argument: the name of the offending argument.
    """

    def __init__(self, argument: str, got: str, expected: str) -> None:
        super().__init__(f"{argument}: got {got}, expected {expected}")
        self.argument = argument

    def rename(self, argument: str) -> None:
        """Name the argument as the caller of a further function knows it."""
        self.args = (argument + str(self).removeprefix(self.argument),)
        self.argument = argument


class ImageError(InvalidInputError):
    """An image is not one the predictor takes."""


class PromptError(InvalidInputError):
    """A point, box, mask or label is not one the predictor takes."""


class PromptWarning(UserWarning):
    """A prompt is legal and hardly meant: there is none at all, or it lies far off the image."""


class StateError(Sam3rtError, RuntimeError):
    """A method was called in a state that does not allow it, such as predict before set_image."""


class StateWarning(UserWarning):
    """A predictor answers for an image that another thread set after the caller set one."""


class BundleError(Sam3rtError):
    """A bundle is missing, damaged, tampered with, mixed or from a newer format.

    Attributes:
        file: the name of the file at fault, or an empty string.
    """

    def __init__(self, message: str, file: str = "") -> None:
        super().__init__(f"{file}: {message}" if file else message)
        self.file = file


class EmbeddingError(Sam3rtError):
    """An embedding file or object is damaged or belongs to another model."""


class BackendError(Sam3rtError, RuntimeError):
    """A backend is not installed, not usable on this machine, or failed."""


class DeviceLostError(BackendError):
    """A GPU failed so that this process cannot use it any more: every later call fails as well."""


class VerificationError(Sam3rtError):
    """A model's outputs differ from its parity record by more than is allowed."""
