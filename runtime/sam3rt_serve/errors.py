"""What a service refuses, by class. No refusal harms another request."""

from __future__ import annotations

from sam3rt.errors import Sam3rtError


class UnknownImageError(Sam3rtError):
    """No image is stored under this id: never was, was deleted, or had to make room."""


class TooLargeError(Sam3rtError):
    """A request is larger than the service's limits."""


class BusyError(Sam3rtError):
    """As much is waiting as may wait. Trying again later helps."""


class DeadlineError(Sam3rtError):
    """The answer did not come within the time that a request has."""
