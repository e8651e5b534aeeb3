"""What the scripts share: their command lines, saying how a result came about, publishing it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import sam3rt
from sam3rt.machine import processor_name, usable_cores


def script_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the first line of a script's documentation, and ``--output``."""
    parser = argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="for the result, as JSON")
    return parser


def resident_mb(process: int | str = "self") -> float:
    """Resident memory of a process, 10^6 bytes; Linux alone says."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def conditions(*packages: str) -> dict[str, Any]:
    """The command, the machine and the versions behind a result.

    Args:
        packages: distributions whose versions matter, beside Python's and sam3rt's.
    """
    versions = {"python": platform.python_version(), "sam3rt": sam3rt.__version__}
    return {
        "command": _command(),
        "machine": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "platform": platform.platform(),
        },
        "versions": versions | {name: importlib.metadata.version(name) for name in packages},
    }


def publish(document: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is named."""
    text = json.dumps(document, indent=2) + "\n"
    print(text, end="")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def _command() -> str:
    """The command, with files by their names alone: folders say nothing on another machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).name, *words])
