"""Lock files, the bill of materials, and what they are held to."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.conftest import ROOT

from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.files import sha256_file

REQUIREMENTS = ROOT / "requirements"
LOCKS = ("cpu.lock", "test.lock")
_ENTRY = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[^\s;]+)(?: ; [^\\]+)?"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)"
)


class Entry(NamedTuple):
    version: str
    hashes: frozenset[str]


def locked(name: str) -> dict[str, Entry]:
    """The packages of a lock file; fails on any line that is not a pinned, hashed package."""
    packages = {}
    for block in re.split(r"\n(?=\S)", (REQUIREMENTS / name).read_text().rstrip("\n")):
        match = _ENTRY.fullmatch(block)
        assert match, f"{name}: {block.splitlines()[0]} is not pinned by version and hash"
        hashes = frozenset(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))
        packages[match["name"]] = Entry(match["version"], hashes)
    return packages


def constraints() -> dict[str, str]:
    pairs = re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return {re.sub(r"[_.]", "-", name).lower(): version for name, version in pairs}


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_what_the_constraints_pin(name: str) -> None:
    pinned = constraints()
    shared = {package: entry for package, entry in locked(name).items() if package in pinned}
    assert len(shared) > 3
    for package, entry in shared.items():
        assert entry.version.partition("+")[0] == pinned[package], package


def test_every_pinned_package_is_in_the_test_lock() -> None:
    assert set(constraints()) <= set(locked("test.lock"))


def test_the_runtime_is_locked_as_it_is_tested() -> None:
    tested = locked("test.lock")
    for package, entry in locked("cpu.lock").items():
        assert tested[package].version == entry.version
        assert tested[package].hashes & entry.hashes


def test_the_runtime_brings_no_torch() -> None:
    assert set(locked("cpu.lock")) == {
        "flatbuffers",
        "msgspec",
        "numpy",
        "onnxruntime",
        "packaging",
        "pillow",
        "protobuf",
        "safetensors",
    }


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.lock")), ids=lambda path: path.name)
def test_locks_name_no_place(path: Path) -> None:
    """Where files come from is the installer's choice; the hashes say which they are."""
    text = path.read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.M)


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    """The parsed bill of materials."""
    parsed: dict[str, Any] = json.loads((REQUIREMENTS / "sam3rt.cdx.json").read_text())
    return parsed


def of_type(bill: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [component for component in bill["components"] if component["type"] == kind]


def test_the_bill_lists_what_the_lock_does(bill: dict[str, Any]) -> None:
    assert bill["bomFormat"] == "CycloneDX"
    listed = {
        component["name"]: Entry(
            component["version"], frozenset(entry["content"] for entry in component["hashes"])
        )
        for component in of_type(bill, "library")
    }
    assert listed == locked("cpu.lock")
    for component in of_type(bill, "library"):
        assert component["licenses"]
        assert component["purl"] == f"pkg:pypi/{component['name']}@{component['version']}"


def test_the_bill_lists_the_bundled_model(bill: dict[str, Any]) -> None:
    (model,) = of_type(bill, "machine-learning-model")
    folder = default_bundle_path()
    assert model["version"] == json.loads((folder / "bundle.json").read_text())["fingerprint"]
    listed = {entry["name"]: entry["hashes"][0]["content"] for entry in model["components"]}
    assert {"encoder.onnx", "decoder.onnx", "parity.npz", "LICENSE"} == set(listed)
    assert listed == {name: sha256_file(folder / name) for name in listed}


def test_the_bill_is_of_this_version(bill: dict[str, Any]) -> None:
    import sam3rt

    assert bill["metadata"]["component"]["name"] == "sam3rt"
    assert bill["metadata"]["component"]["version"] == sam3rt.__version__


# --- what may run code ----------------------------------------------------------------------------

# Each of these executes what a file holds, or can be made to.
_EXECUTING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
_EXECUTING_CALLS = {"eval", "exec", "compile", "__import__"}


def executed(tree: ast.AST) -> list[str]:
    """What in a module's source could execute data."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in _EXECUTING_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in _EXECUTING_CALLS or called == "os.system":
                found.append(called)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell") == "True":
                found.append(ast.unparse(node))
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_what_executes_data_is_noticed(source: str) -> None:
    assert executed(ast.parse(source))


def test_nothing_in_the_runtime_executes_data() -> None:
    paths = sorted((ROOT / "runtime" / "sam3rt").rglob("*.py"))
    assert len(paths) > 30
    assert {str(p): executed(ast.parse(p.read_text())) for p in paths} == {
        str(p): [] for p in paths
    }


def test_checkpoints_are_read_without_executing_them() -> None:
    """``torch.load`` is called with ``weights_only=True`` wherever it is called."""
    calls = [
        node
        for path in (ROOT / "export").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert keywords.get("weights_only") == "True"
