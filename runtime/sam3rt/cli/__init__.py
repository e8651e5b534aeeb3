"""The command line: ``sam3rt segment | export | build | verify | compare | models | info``."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where something failed, 2 where the arguments are wrong, 130 where
        the user interrupted it, 141 where nobody reads its output any more. SIGTERM ends the
        process with 143, once what was half written is removed.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A path that the terminal's encoding cannot express is shown escaped, not refused.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            # Imported here: loading NumPy takes a moment, in which an interrupt is to be quiet.
            from .commands import run

            with _end_on_sigterm():
                return run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes again when it exits: into nothing, so that it does not complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _open_closed_streams() -> None:
    """Let a standard stream that was closed when the process started be an empty one.

    Python has None in its place. And a file that is opened later would get the stream's number, to
    which libraries write their messages.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that temporary files are removed, for the block."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
