"""What the benchmark scripts share: naming the machine and publishing a result."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def publish(document: dict[str, Any], output: Path | None) -> None:
    """Print a result as JSON, and write it to a file if one is named."""
    text = json.dumps(document, indent=2) + "\n"
    print(text, end="")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
