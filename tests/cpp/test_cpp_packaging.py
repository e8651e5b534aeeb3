"""The installed C++ library as other projects meet it: CMake, pkg-config, symbols, components."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.support.cpp_driver import ROOT, shown_symbols

import sam3rt

MAIN = """
#include <sam3rt.h>
#include <stdio.h>
int main(void) { return printf("%s\\n", sam3rt_version()) < 0; }
"""
PLUGIN = """
#include <sam3rt.h>
const char* plugin_version(void);
const char* plugin_version(void) { return sam3rt_version(); }
"""
C_PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(app LANGUAGES C)
find_package(sam3rt REQUIRED COMPONENTS static)
add_executable(with_shared main.c)
target_link_libraries(with_shared PRIVATE sam3rt::sam3rt)
add_executable(with_static main.c)
target_link_libraries(with_static PRIVATE sam3rt::static)
add_library(plugin SHARED plugin.c)
target_link_libraries(plugin PRIVATE sam3rt::static)
"""


def output(*command: Any, **options: Any) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_project_in_c(cpp_builds: Path, tmp_path: Path) -> None:
    """Without a C++ compiler, with both libraries, and as a part of a library of its own."""
    for name, text in (
        ("main.c", MAIN),
        ("plugin.c", PLUGIN),
        ("CMakeLists.txt", C_PROJECT),
    ):
        (tmp_path / name).write_text(text)
    build = tmp_path / "build"
    install, dependencies = cpp_builds / "install", cpp_builds / "dependencies"
    where = [f"-DCMAKE_PREFIX_PATH={install}", f"-DONNXRUNTIME_ROOT={dependencies}"]
    output("cmake", "-S", tmp_path, "-B", build, *where)
    output("cmake", "--build", build)
    for program in ("with_shared", "with_static"):
        assert output(build / program) == sam3rt.__version__ + "\n"
    # Not even weak symbols, which the plugin of another host could be bound to.
    assert shown_symbols(build / "libplugin.so") == {"plugin_version"}


def test_pkg_config(cpp_builds: Path, tmp_path: Path) -> None:
    """Where it was installed to, as docs/cpp.md does it, and not where it was configured for."""
    install, dependencies = tmp_path / "elsewhere", cpp_builds / "dependencies"
    output("cmake", "--install", cpp_builds / "release", "--prefix", install)
    environment = {**os.environ, "PKG_CONFIG_PATH": str(install / "lib" / "pkgconfig")}

    def flags(*options: str) -> list[str]:
        return output("pkg-config", *options, "sam3rt", env=environment).split()

    assert flags("--modversion") == [sam3rt.__version__]
    places = [flag[2:] for flag in flags("--cflags", "--libs") if flag[:2] in ("-I", "-L")]
    assert [Path(place).resolve() for place in places] == [install / "include", install / "lib"]
    (tmp_path / "main.c").write_text(MAIN)
    compiled = ["cc", tmp_path / "main.c", "-o", tmp_path / "app"]
    output(*compiled, *flags("--cflags", "--libs"), f"-Wl,-rpath,{install / 'lib'}")
    assert output(tmp_path / "app") == sam3rt.__version__ + "\n"
    # The linker takes the shared library where it finds both.
    static = [str(install / "lib" / "libsam3rt.a"), f"-L{dependencies / 'lib'}"]
    rest = [flag for flag in flags("--libs", "--static") if flag != "-lsam3rt"]
    runtime = f"-Wl,-rpath,{dependencies / 'lib'}"
    output(*compiled, *flags("--cflags"), *static, *rest, runtime)
    assert output(tmp_path / "app") == sam3rt.__version__ + "\n"


def test_root_of_onnx_runtime_is_the_one_that_is_named(cpp_builds: Path, tmp_path: Path) -> None:
    """Whatever lies in other folders that CMake searches."""
    module = ROOT / "runtime" / "cpp" / "cmake"
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(app NONE)\n"
        f'list(PREPEND CMAKE_MODULE_PATH "{module}")\nset(CMAKE_FIND_LIBRARY_SUFFIXES .so)\n'
        "find_package(OnnxRuntime REQUIRED)\n"
        'message(STATUS "found ${OnnxRuntime_INCLUDE_DIR} ${OnnxRuntime_LIBRARY}")\n'
    )
    roots = [tmp_path / name for name in ("prefix", "first", "second")]
    for root in roots:
        for folder, name in (("include", "onnxruntime_cxx_api.h"), ("lib", "libonnxruntime.so")):
            (root / folder).mkdir(parents=True)
            (root / folder / name).touch()
        (root / "include" / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 21\n")

    def found(*options: str, **environment: str) -> str:
        command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", *options]
        text = output(*command, env={**os.environ, **environment})
        line = re.search(r"-- found (\S+) (\S+)", text)
        assert line is not None
        assert Path(line[1]).parent == Path(line[2]).parent.parent
        return Path(line[1]).parent.name

    assert found(f"-DCMAKE_PREFIX_PATH={roots[0]}") == "prefix"
    assert found(f"-DONNXRUNTIME_ROOT={roots[1]}") == "first"
    assert found(f"-DONNXRUNTIME_ROOT={roots[2]}") == "second"
    assert found("-UONNXRUNTIME_ROOT", ONNXRUNTIME_ROOT=str(roots[1])) == "first"


def test_components_and_names(cpp_builds: Path, tmp_path: Path) -> None:
    """What runs a program is apart from what builds one; the soname says which versions fit."""
    release = ".".join(sam3rt.__version__.split(".")[:2])
    for component in ("runtime", "development"):
        options = ["--component", component, "--prefix", tmp_path / component]
        output("cmake", "--install", cpp_builds / "release", *options)
    files = {
        component: {path.name for path in (tmp_path / component).rglob("*") if not path.is_dir()}
        for component in ("runtime", "development")
    }
    shared = f"libsam3rt.so.{release}"
    assert files["runtime"] == {shared, f"libsam3rt.so.{sam3rt.__version__}", "LICENSE"}
    wanted = {"libsam3rt.so", "libsam3rt.a", "sam3rt.h", "sam3rt.hpp", "sam3rt.pc"}
    assert wanted < files["development"]
    assert not files["runtime"] & files["development"]
    header = output("readelf", "-d", tmp_path / "runtime" / "lib" / shared)
    assert f"soname: [{shared}]" in header


@pytest.mark.slow
def test_cross_build_for_arm(cpp_builds: Path, tmp_path: Path) -> None:
    """With Debian's cross compiler, where it is installed, and a library that stands in."""
    import shutil

    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs g++-aarch64-linux-gnu")
    root = tmp_path / "onnxruntime"
    shutil.copytree(cpp_builds / "dependencies" / "include", root / "include")
    (root / "lib").mkdir()
    stub = "const void* OrtGetApiBase(void); const void* OrtGetApiBase(void) { return 0; }"
    library = root / "lib" / "libonnxruntime.so"
    command = ["aarch64-linux-gnu-gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
    output(*command, input=stub)
    options = [
        f"-DONNXRUNTIME_ROOT={root}",
        f"-DCMAKE_PREFIX_PATH={cpp_builds / 'dependencies'}",
        "-DSAM3RT_OPENSSL=OFF",
        "-DCMAKE_CXX_FLAGS=-O0",
    ]
    source = ROOT / "runtime" / "cpp"
    output("cmake", "--preset", "aarch64", "-S", source, "-B", tmp_path / "build", *options)
    output("cmake", "--build", tmp_path / "build", "--target", "sam3rt_shared", "-j2")
    assert "AArch64" in output("readelf", "-h", tmp_path / "build" / "libsam3rt.so")
