"""The command line: ``sam3rt segment | export | build | verify | compare | models | info``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where something failed, 2 where the arguments are wrong, 130 where
        the user interrupted it, 141 where nobody reads its output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        # A path that the terminal's encoding cannot express is shown escaped, not refused.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            # Imported here: loading NumPy takes a moment, in which an interrupt is to be quiet.
            from .commands import run

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
