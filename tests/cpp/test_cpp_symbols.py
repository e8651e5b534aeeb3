"""What the shared library shows is what is written down: nothing goes, or comes, unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.cpp_driver import ROOT, shown_symbols

# One name a line, as `nm -DC --defined-only` writes them, sorted. What goes from it, or changes,
# breaks programs: of the C interface never, of the C++ interface with the second number of the
# version only.
LIST = Path(__file__).with_name("symbols.txt")


def test_symbols_are_those_that_are_listed(cpp_builds: Path) -> None:
    shown = shown_symbols(cpp_builds / "install" / "lib" / "libsam3rt.so")
    listed = LIST.read_text().splitlines()
    assert listed == sorted(set(listed))
    assert sorted(shown - set(listed)) == [], f"to be added to {LIST.name}"
    assert sorted(set(listed) - shown) == [], "programs that use these no longer start"


def test_the_c_interface_is_the_header(cpp_builds: Path) -> None:
    header = (ROOT / "runtime" / "cpp" / "include" / "sam3rt.h").read_text()
    declared = set(re.findall(r"^SAM3RT_API [^(]*?(sam3rt_\w+)\(", header, re.MULTILINE))
    listed = {line for line in LIST.read_text().splitlines() if line.startswith("sam3rt_")}
    assert declared == listed
