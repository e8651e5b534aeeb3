"""What this machine is, in words that tell two kinds of machine apart."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The processor's name; on Linux with family, model and stepping where it has them.

    A virtual machine's processor may be called "AMD EPYC" and no more.
    """
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    first = text.split("\n\n", 1)[0]
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }
    name = fields.get("model name") or platform.machine()
    numbers = [
        f"{label} {fields[field]}"
        for label, field in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        if field in fields
    ]
    return ", ".join([name, " ".join(numbers)]) if numbers else name
