"""Libraries that report to their makers do not, where sam3rt is what imports them.

Both keep an identifier of the machine in the home folder before they send anything, so an empty one
shows that they do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Where one of these is set, the libraries take it for a test of their own makers and stay silent.
_SILENCED_BY = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "ORT_DISABLE_TELEMETRY")
_LOAD = "import sam3rt; sam3rt.load_model({bundle!r}, backend={backend!r}, device='cpu').warm_up()"
_INFO = "from sam3rt.backends.table import entry; assert entry({backend!r}).problem() is None"


def run(code: str, home: Path, **variables: str) -> str:
    """What a process with a home folder of its own prints."""
    kept = {name: text for name, text in os.environ.items() if name not in _SILENCED_BY}
    cache = {"XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | cache | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def files(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("code", [_LOAD, _INFO], ids=["load", "info"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_nothing_is_reported(backend: str, code: str, tiny_sam3: Path, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    run(code.format(bundle=str(tiny_sam3), backend=backend), tmp_path)
    assert [name for name in files(tmp_path) if not name.startswith("cache/sam3rt/")] == []


def test_a_build_reports_nothing(tmp_path: Path) -> None:
    run("import sam3rt_build.simulated", tmp_path)
    assert files(tmp_path) == []


def test_the_callers_own_choice_stays(tmp_path: Path) -> None:
    say = "import os, sam3rt.backends; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(say, tmp_path).strip() == "1"
    assert run(say, tmp_path, ORT_DISABLE_TELEMETRY="0").strip() == "0"
    own = """
import sys, types
own = sys.modules["openvino_telemetry"] = types.ModuleType("openvino_telemetry")
from sam3rt.backends.telemetry import unreported_openvino
with unreported_openvino():
    print(sys.modules["openvino_telemetry"] is own)
print(sys.modules["openvino_telemetry"] is own)
"""
    assert run(own, tmp_path).split() == ["True", "True"]


def test_the_package_that_reports_can_be_imported_afterwards() -> None:
    pytest.importorskip("openvino_telemetry")
    from sam3rt.backends.telemetry import unreported_openvino

    kept = sys.modules.pop("openvino_telemetry")
    try:
        with unreported_openvino(), pytest.raises(ImportError):
            import openvino_telemetry
        import openvino_telemetry  # noqa: F401
    finally:
        sys.modules["openvino_telemetry"] = kept
