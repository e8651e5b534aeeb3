"""Tests of `sam3rt.machine`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import ROOT

from sam3rt import machine

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
stepping\t: 8
flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile
bugs\t\t: spectre_v1

processor\t: 1
cpu family\t: 6
model name\t: another
flags\t\t: fpu amx_fp16
"""
# Cores of ARM's (Cortex-A78AE, Neoverse N1 and V2) and of Ampere's. JetPack's kernel calls every
# model by the same name; that of a server says none.
ORIN = (ROOT / "tests" / "aarch64" / "cpuinfo_orin.txt").read_text()
SERVER = ORIN.replace("model name\t: ARMv8 Processor rev 1 (v8l)\n", "")
ARM_MACHINES = {
    "Jetson Orin": (ORIN, "ARMv8 Processor rev 1 (v8l), implementer 0x41 part 0xd42 variant 0x0"),
    "Neoverse N1": (
        SERVER.replace("0xd42", "0xd0c"),
        "aarch64, implementer 0x41 part 0xd0c variant 0x0",
    ),
    "Grace": (SERVER.replace("0xd42", "0xd4f"), "aarch64, implementer 0x41 part 0xd4f variant 0x0"),
    "AmpereOne": (
        SERVER.replace("0x41", "0xc0").replace("0xd42", "0xac3"),
        "aarch64, implementer 0xc0 part 0xac3 variant 0x0",
    ),
}


@pytest.fixture(autouse=True)
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file to write what Linux says of the processor to."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", path)
    machine.processor_name.cache_clear()
    yield path
    machine.processor_name.cache_clear()


def test_the_name_tells_models_apart(cpuinfo: Path) -> None:
    cpuinfo.write_text(XEON)
    assert machine.processor_name() == (
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, family 6 model 143 stepping 8"
    )


@pytest.mark.parametrize("name", ARM_MACHINES)
def test_arm_machines(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Linux on ARM tells models apart by numbers, and lists extensions as ``Features``."""
    text, expected = ARM_MACHINES[name]
    cpuinfo.write_text(text)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert machine.processor_name() == expected
    assert machine.processor_has("asimddp")
    assert not machine.processor_has("amx_bf16")


def test_without_the_file_python_is_asked() -> None:
    assert machine.processor_name() == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("amx_bf16", True), ("fpu", True), ("amx", False), ("amx_fp16", False), ("", False)],
)
def test_extensions_are_whole_words_of_the_first_processor(
    cpuinfo: Path, flag: str, expected: bool
) -> None:
    cpuinfo.write_text(XEON)
    assert machine.processor_has(flag) is expected


def test_a_system_that_does_not_say_has_no_extension(cpuinfo: Path) -> None:
    assert not machine.processor_has("amx_bf16")
    cpuinfo.write_text("processor\t: 0\n")
    assert not machine.processor_has("amx_bf16")
