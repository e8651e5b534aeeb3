"""Who may import whom, held by the sources' syntax trees.

Imports inside functions count. Those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "sam3rt": ROOT / "runtime",
    "sam3rt_export": ROOT / "export",
    "sam3rt_build": ROOT / "export",
    "sam3rt_bench": ROOT / "benchmarks",
    "sam3rt_serve": ROOT / "runtime",
}
# Each package, and the others of this project that it may import.
USES = {
    "sam3rt": set[str](),
    "sam3rt_export": {"sam3rt"},
    "sam3rt_build": {"sam3rt"},
    "sam3rt_bench": {"sam3rt", "sam3rt_export", "sam3rt_build"},
    "sam3rt_serve": {"sam3rt"},
}
# The runtime from the bottom up: a module imports from its own layer and from lower ones.
LAYERS = (
    {"_version", "arguments", "errors", "machine"},
    {"bundle"},
    {"geometry", "image_files", "prompts", "object_prompts", "masks", "features", "overlay"},
    {"accuracy"},
    {"backends"},
    {"embedding", "embedding_cache", "model", "results"},
    {"automatic", "loading", "predictor"},
    {"cli", "__main__"},
)
# All that the runtime imports from elsewhere, and where: everywhere, or in one room.
BASE_LIBRARIES = {"msgspec", "numpy", "PIL", "safetensors"}
OPTIONAL_LIBRARIES = {
    "onnxruntime": "sam3rt.backends.onnxruntime",
    "openvino": "sam3rt.backends.openvino",
    "shtab": "sam3rt.cli",
    "supervision": "sam3rt.results",
    "tensorrt": "sam3rt.backends.tensorrt",
    "tensorrt_rtx": "sam3rt.backends.tensorrt",
    "cuda": "sam3rt.backends.tensorrt",
}
MOST_LINES = 400


class Import(NamedTuple):
    """One imported name: ``module`` alone, or ``name`` from it."""

    line: int
    module: str
    name: str = ""


def imports_of(tree: ast.AST, package: str) -> Iterator[Import]:
    """Everything a module imports, relative names made absolute.

    Args:
        tree: the module, or a part of it.
        package: what ``from . import`` starts at.
    """
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        for node in tree.orelse:
            yield from imports_of(node, package)
        return
    if isinstance(tree, ast.Import):
        for alias in tree.names:
            yield Import(tree.lineno, alias.name)
    elif isinstance(tree, ast.ImportFrom):
        module = tree.module or ""
        if tree.level:
            start = package.split(".")
            start = start[: len(start) - tree.level + 1]
            module = ".".join([*start, module] if module else start)
        for alias in tree.names:
            yield Import(tree.lineno, module, alias.name)
    elif isinstance(tree, ast.Call) and ast.unparse(tree.func).endswith("import_module"):
        argument = tree.args[0]
        if isinstance(argument, ast.Constant):
            yield Import(tree.lineno, str(argument.value))
    for node in ast.iter_child_nodes(tree):
        yield from imports_of(node, package)


class Module(NamedTuple):
    """One source file of a package."""

    name: str
    path: Path
    text: str
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        """Name of the folder that it lies in, or is."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@cache
def modules() -> dict[str, Module]:
    """All modules of all packages by name."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            if path.parent.name == "_pyinstaller":
                continue  # run by PyInstaller, never by sam3rt
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            module = Module(name, path, path.read_text(), ())
            imports = imports_of(ast.parse(module.text), module.package)
            found[name] = module._replace(imports=tuple(imports))
    return found


def target(used: Import) -> str:
    """The module that an import means: the name itself where that is a module."""
    full = f"{used.module}.{used.name}" if used.name else used.module
    return full if full in modules() else used.module


def top(name: str) -> str:
    return name.partition(".")[0]


def hold(rule: Iterator[tuple[Path, int, str]]) -> None:
    """Fail with all that a rule finds: path, line and what is wrong there."""
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path, line, what in rule]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def all_imports(package: str = "") -> Iterator[tuple[Module, Import]]:
    for module in modules().values():
        if not package or top(module.name) == package:
            for used in module.imports:
                yield module, used


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b
from . import c
from ..d import e
from . import *
if TYPE_CHECKING:
    import unseen
else:
    import f
def function():
    from g import h
    importlib.import_module("i.j")
"""
    found = {(used.module, used.name) for used in imports_of(ast.parse(source), "p.q")}
    assert found == {
        *(("a.b", ""), ("p.q", "c"), ("p.d", "e"), ("p.q", "*"), ("f", "")),
        *(("g", "h"), ("i.j", "")),
    }


def test_packages_use_one_another_in_one_direction() -> None:
    def rule() -> Iterator[tuple[Path, int, str]]:
        for module, used in all_imports():
            own, other = top(module.name), top(used.module)
            if other in PACKAGES and other != own and other not in USES[own]:
                yield module.path, used.line, f"{own} imports {other}"

    hold(rule())


def test_the_runtime_names_no_other_package() -> None:
    others = re.compile("|".join(rf"\b{name}\b" for name in PACKAGES if name != "sam3rt"))

    def rule() -> Iterator[tuple[Path, int, str]]:
        for module in modules().values():
            if top(module.name) == "sam3rt":
                for number, line in enumerate(module.text.splitlines(), 1):
                    if match := others.search(line):
                        yield module.path, number, f"names {match[0]}"

    hold(rule())


def test_every_room_of_the_runtime_has_its_layer() -> None:
    rooms = {name.split(".")[1] for name in modules() if name.startswith("sam3rt.")}
    assert rooms == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(rooms)


def test_the_runtime_imports_downwards() -> None:
    height = {room: number for number, layer in enumerate(LAYERS) for room in layer}

    def rule() -> Iterator[tuple[Path, int, str]]:
        for module, used in all_imports("sam3rt"):
            name = target(used)
            if module.name == "sam3rt" or top(name) != "sam3rt":
                continue
            own = module.name.split(".")[1]
            if name == "sam3rt":
                # Of the package itself, only the command line uses what it exports.
                if height[own] < height["cli"]:
                    yield module.path, used.line, "imports from sam3rt itself"
            elif height[name.split(".")[1]] > height[own]:
                yield module.path, used.line, f"{own} imports {name}"

    hold(rule())


def test_the_runtime_imports_libraries_only_where_they_belong() -> None:
    def rule() -> Iterator[tuple[Path, int, str]]:
        for module, used in all_imports("sam3rt"):
            library = top(used.module)
            if library in {"sam3rt", *sys.stdlib_module_names, *BASE_LIBRARIES}:
                continue
            home = OPTIONAL_LIBRARIES.get(library)
            if home is None or not f"{module.name}.".startswith(f"{home}."):
                yield module.path, used.line, f"imports {library}"

    hold(rule())


def test_there_are_no_circles() -> None:
    graph = {
        name: {target(used) for used in module.imports} & set(modules()) - {name}
        for name, module in modules().items()
    }
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    if circle:
        pytest.fail(" imports ".join(reversed(circle)), pytrace=False)


def test_underscore_names_stay_in_their_package() -> None:
    def rule() -> Iterator[tuple[Path, int, str]]:
        for module, used in all_imports():
            for name in (*used.module.split("."), used.name):
                if not name.startswith("_") or name.startswith("__"):
                    continue
                full = f"{used.module}.{used.name}"
                home = full[: full.index(f".{name}")]
                if home in modules() and not f"{module.name}.".startswith(
                    f"{modules()[home].package}."
                ):
                    yield module.path, used.line, f"imports {full}"

    hold(rule())


def test_long_modules_say_why() -> None:
    def rule() -> Iterator[tuple[Path, int, str]]:
        for module in modules().values():
            length = len(module.text.splitlines())
            if length > MOST_LINES:
                docstring = ast.get_docstring(ast.parse(module.text)) or ""
                if not re.search(r"\blines\b", docstring):
                    yield module.path, length, "is long, and its docstring does not say why"

    hold(rule())


def scripts(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """All Python files of folders, parsed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def edits_of_search_path(tree: ast.AST) -> Iterator[int]:
    """Lines that change ``sys.path``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            changed = [node.func] if ast.unparse(node.func).startswith("sys.path.") else []
        else:
            changed = [*getattr(node, "targets", ()), getattr(node, "target", None)]
        if any(isinstance(n, ast.expr) and ast.unparse(n).startswith("sys.path") for n in changed):
            yield getattr(node, "lineno", 0)


@pytest.mark.parametrize("edit", ["sys.path.insert(0, x)", "sys.path[:0] = [x]", "sys.path += [x]"])
def test_edits_of_the_search_path_are_found(edit: str) -> None:
    assert list(edits_of_search_path(ast.parse(edit))) == [1]


def test_nobody_edits_the_search_path() -> None:
    hold(
        (path, line, "edits sys.path")
        for path, tree in scripts("tests", "benchmarks", "runtime", "export")
        for line in edits_of_search_path(tree)
    )


def test_nobody_imports_a_test_module() -> None:
    """What tests and scripts share lies in ``tests/support``."""
    hold(
        (path, used.line, f"imports {used.module}.{used.name}")
        for path, tree in scripts("tests", "benchmarks")
        for used in imports_of(tree, "")
        if top(used.module) == "tests"
        and any(part.startswith("test_") for part in (*used.module.split("."), used.name))
    )


def test_pytest_looks_into_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    """By default it passes over folders called ``build``, as if they held what was built."""
    passed_over = pytestconfig.getini("norecursedirs")
    for path in (ROOT / "tests").rglob("test_*.py"):
        for folder in path.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch(folder, pattern) for pattern in passed_over), path
