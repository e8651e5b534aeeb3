"""Checks that hold any runtime to the vectors of ``tests/conformance``.

The vectors are data: what goes in, and what comes out or which error is raised, by its class and
the argument or file that it names. What the message says is each runtime's own.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tests.support.helpers import flip, relist, sign, tiny_bundle
from tests.support.records import BOMBS, read_record, recorded_bundle, write_record
from tests.support.vectors import (
    DTYPES,
    ROOT,
    VECTORS,
    Document,
    add_engine,
    as_array,
    as_prompts,
    embedding_file,
    embedding_maps,
    load,
    patched,
)


@dataclass(frozen=True)
class Refusal:
    """An error that a runtime raised.

    Attributes:
        kind: its class.
        subject: the argument or file that it names, or an empty text.
    """

    kind: str
    subject: str


class Runtime(Protocol):
    """A runtime under test. Each method returns one entry per case: a value or a refusal.

    Attributes:
        name: ``"python"`` or ``"cpp"``.
        warned: of each case that ``pack`` packed last, whether it said that something is odd.
    """

    name: str
    warned: list[bool]

    def pack(self, cases: Sequence[Document]) -> list[dict[str, NDArray[Any]] | Refusal]:
        """Pack prompts. A case has ``prompts``, as arrays, the ``rules`` and the ``size``."""

    def input_sizes(self, cases: Sequence[Document]) -> list[list[int] | Refusal]:
        """The part of the encoder's input that images fill."""

    def parse_manifests(self, texts: Sequence[bytes]) -> list[Any]:
        """Parse the content of ``bundle.json``."""

    def open_bundles(self, folders: Sequence[Path]) -> list[Any]:
        """Open bundles and hash their files."""

    def prepare(self, folders: Sequence[Path]) -> list[Any]:
        """Load bundles without hashing their files, then both graphs."""

    def check_onnx(self, contents: Sequence[bytes], beside: dict[str, int]) -> list[Any]:
        """Check ONNX files called ``m.onnx``."""

    def choose_engines(self, bundles: Sequence[Path], machine: Document) -> list[Any]:
        """The folder of the encoder that a machine uses, for each bundle."""

    def read_embeddings(self, paths: Sequence[Path], vectors: Document) -> list[Any]:
        """Read embeddings of the model that the vectors describe: maps and both sizes."""

    def load_records(self, folders: Sequence[Path]) -> list[Any]:
        """Read the parity records of bundles."""

    def judge(self, bundle: Path, changes: Sequence[Sequence[Document]]) -> list[Any]:
        """What the gate says of a bundle's outputs after changes.

        For each: whether they pass, whether the encoder is to blame, and what is off.
        """

    def call(self, bundle: Path, steps: Sequence[Document]) -> list[Any]:
        """Call a predictor's methods in turn; the shape of the masks of each prediction."""


def same(found: Sequence[Any], expected: Sequence[Any], names: Sequence[str]) -> None:
    """Assert that every case has the outcome it should have."""
    assert len(found) == len(expected) == len(names) > 0
    wrong = [
        f"{name}: {str(actual)[:200]}, expected {wanted}"
        for name, actual, wanted in zip(names, found, expected, strict=True)
        if type(actual) is not type(wanted) or actual != wanted
    ]
    assert not wrong, "\n".join(wrong)


def refused(found: Sequence[Any], kind: str, subject: str, names: Sequence[str]) -> None:
    """Assert that every case raised one error."""
    same(found, [Refusal(kind, subject)] * len(names), names)


# --- prompts and images ---------------------------------------------------------------------------


def check_packed_prompts(runtime: Runtime, folder: Path) -> None:
    vectors = load("prompts")
    cases = [
        {
            "prompts": as_prompts(case["prompts"]),
            "size": case["size"],
            "rules": vectors["rules"][case["rules"]],
        }
        for case in vectors["packed"]
    ]
    results = runtime.pack(cases)
    expected = [case.get("warns", False) for case in vectors["packed"]]
    same(runtime.warned, expected, [case["name"] for case in vectors["packed"]])
    for case, found in zip(vectors["packed"], results, strict=True):
        assert not isinstance(found, Refusal), (case["name"], found)
        assert found.keys() == case["packed"].keys(), case["name"]
        for name, value in case["packed"].items():
            expected = as_array(value, DTYPES.get(name, np.float32))
            np.testing.assert_array_equal(found[name], expected, case["name"], strict=True)


def check_refused_prompts(runtime: Runtime, folder: Path) -> None:
    vectors = load("prompts")
    for rules in vectors["rules"].values():
        cases = [
            {"prompts": as_prompts(case["prompts"]), "size": [480, 640], "rules": rules}
            for case in vectors["refused"]
        ]
        same(
            runtime.pack(cases),
            [Refusal(*case["error"]) for case in vectors["refused"]],
            [case["name"] for case in vectors["refused"]],
        )


def check_images(runtime: Runtime, folder: Path) -> None:
    vectors = load("images")
    accepted = [
        {"size": case["size"], "rules": vectors["rules"][case["rules"]]}
        for case in vectors["accepted"]
    ]
    same(
        runtime.input_sizes(accepted),
        [case["input_size"] for case in vectors["accepted"]],
        [str(case) for case in accepted],
    )
    for rules in vectors["rules"].values():
        cases = [{"size": size, "rules": rules} for size in vectors["refused"]]
        found = runtime.input_sizes(cases)
        refused(found, "ImageError", "image", [str(case["size"]) for case in cases])


# --- bundles --------------------------------------------------------------------------------------

_PROBES: dict[str, Any] = {
    "null": None,
    "boolean": True,
    "whole number": 7,
    "number": 1.5,
    "text": "text",
    "list": [1],
    "object": {"file": "x"},
}


def _wrong_types(base: Document, types: dict[str, str]) -> Iterator[tuple[str, Document]]:
    """Every value of a type that must not stand where it stands."""
    for path, text in types.items():
        allowed = set(text.split(" or "))
        if "number" in allowed:
            allowed.add("whole number")
        for kind, value in _PROBES.items():
            if kind not in allowed:
                change = {"op": "replace", "path": path, "value": value}
                yield f"{path}: {kind}", patched(base, [change])


def check_manifests(runtime: Runtime, folder: Path) -> None:
    vectors = load("manifests")
    base = json.loads((ROOT / vectors["base"]).read_text())
    accepted = {case["name"]: sign(patched(base, case["patch"])) for case in vectors["accepted"]}
    for name, found in zip(accepted, runtime.parse_manifests([*accepted.values()]), strict=True):
        assert not isinstance(found, Refusal), (name, found)

    texts = {repr(text): text.encode() for text in vectors["refused_texts"]}
    for case in vectors["refused"]:
        document = patched(base, case["patch"])
        signed = case.get("signed", True)
        texts[case["name"]] = sign(document) if signed else json.dumps(document).encode()
    for name, document in _wrong_types(base, vectors["types"]):
        texts[name] = sign(document)
    for path, text in vectors["types"].items():
        if text == "object":
            unknown = [{"op": "add", "path": f"{path}/surprise", "value": 1}]
            texts[f"unknown field in {path}"] = sign(patched(base, unknown))
        if path not in vectors["optional"] and not path.rpartition("/")[2].isdigit():
            texts[f"without {path}"] = sign(patched(base, [{"op": "remove", "path": path}]))
    assert len(texts) > 500
    found = runtime.parse_manifests([*texts.values()])
    refused(found, "BundleError", "bundle.json", [*texts])


def _damage(path: Path, kind: str, outside: Path) -> None:
    """Change a file of a bundle in one of the ways that the vectors name."""
    content = path.read_bytes()
    path.unlink()
    changes: dict[str, Callable[[], object]] = {
        "a byte shorter": lambda: path.write_bytes(content[:-1]),
        "cut in half": lambda: path.write_bytes(content[: len(content) // 2]),
        "empty": lambda: path.write_bytes(b""),
        "a byte longer": lambda: path.write_bytes(content + b"\0"),
        "first bit flipped": lambda: path.write_bytes(flip(content, 0)),
        "last bit flipped": lambda: path.write_bytes(flip(content, 8 * len(content) - 1)),
        "missing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a dangling link": lambda: path.symlink_to("nothing"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link outside": lambda: (outside.write_bytes(content), path.symlink_to(outside)),
    }
    changes[kind]()


def check_bundle_files(runtime: Runtime, folder: Path) -> None:
    vectors = load("bundle_files")
    cases = [(kind, file) for kind in vectors["damages"] for file in vectors["files"]]
    cases += [(kind, "bundle.json") for kind in vectors["damages_of_the_manifest"]]
    folders = []
    for number, (kind, file) in enumerate(cases):
        folders.append(folder / f"damaged{number}")
        tiny_bundle(folders[-1])
        _damage(folders[-1] / file, kind, folder / f"outside{number}")
    names = [f"{file}: {kind}" for kind, file in cases]
    expected = [Refusal("BundleError", file) for _, file in cases]
    same(runtime.open_bundles(folders), expected, names)


def check_signatures(runtime: Runtime, folder: Path) -> None:
    vectors = load("signatures")
    base_path = (ROOT / vectors["base"]).parent
    base = json.loads((ROOT / vectors["base"]).read_text())
    folders = []
    for number, case in enumerate(vectors["refused"]):
        folders.append(folder / f"signature{number}")
        folders[-1].mkdir()
        for path in base_path.iterdir():
            if path.is_file():
                os.link(path, folders[-1] / path.name)
        (folders[-1] / "bundle.json").unlink()
        (folders[-1] / "bundle.json").write_bytes(sign(patched(base, case["patch"])))
    same(
        runtime.prepare(folders),
        [Refusal("BundleError", case["file"]) for case in vectors["refused"]],
        [case["name"] for case in vectors["refused"]],
    )


def check_onnx_files(runtime: Runtime, folder: Path) -> None:
    vectors = load("onnx_files")
    for kind in ("accepted", "refused"):
        cases = vectors[kind]
        contents = [bytes.fromhex(case["hex"]) for case in cases]
        found = runtime.check_onnx(contents, vectors["beside"])
        wanted = None if kind == "accepted" else Refusal("BundleError", "m.onnx")
        same(found, [wanted] * len(cases), [case["name"] for case in cases])


def check_engines(runtime: Runtime, folder: Path) -> None:
    vectors = load("engines")
    bundles = []
    # A runtime reads the record before it tries engines that are not proven.
    base = recorded_bundle(folder / "base").path
    for number, case in enumerate(vectors["cases"]):
        bundles.append(folder / f"bundle{number}")
        shutil.copytree(base, bundles[-1])
        for entry in case["engines"]:
            for role in entry.get("roles", ("encoder", "decoder")):
                patch = entry.get(role, entry.get("patch", ()))
                add_engine(bundles[-1], entry["folder"], role, patch)
    same(
        runtime.choose_engines(bundles, vectors["machine"]),
        [case.get("chosen") or Refusal(*case["error"]) for case in vectors["cases"]],
        [case["name"] for case in vectors["cases"]],
    )


# --- the gate -------------------------------------------------------------------------------------


def check_judgements(runtime: Runtime, folder: Path) -> None:
    cases = load("records")["answers"]
    bundle = recorded_bundle(folder / "bundle").path
    same(
        runtime.judge(bundle, [case["changes"] for case in cases]),
        [(case["passed"], case["encoder_failed"], sorted(case["wrong"])) for case in cases],
        [case["name"] for case in cases],
    )


def check_records(runtime: Runtime, folder: Path) -> None:
    vectors = load("records")
    whole = recorded_bundle(folder / "whole").path
    folders: dict[str, Path] = {}

    def copy(name: str) -> Path:
        folders[name] = folder / f"record{len(folders)}"
        folders[name].mkdir()
        for path in whole.iterdir():
            os.link(path, folders[name] / path.name)
        for name_of_file in ("parity.npz", "bundle.json"):
            path = folders[name] / name_of_file
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        return folders[name]

    for case in vectors["descriptions"]:
        arrays, description = read_record(whole / "parity.npz")
        write_record(copy(case["name"]), arrays, patched(description, case["patch"]))
    for case in vectors["arrays"]:
        arrays, description = read_record(whole / "parity.npz")
        new = case["replaced_by"]
        if new is None:
            del arrays[case["array"]]
        else:
            value = float(new.get("value", 0))
            arrays[case["array"]] = np.full(new["shape"], value, new.get("dtype", "float32"))
        write_record(copy(case["name"]), arrays, description)
    content = (whole / "parity.npz").read_bytes()
    files = {name: bomb() for name, bomb in BOMBS.items()}
    files |= {"empty": b"", "a text": b"PK"}
    files |= {f"cut to {size} bytes": content[:size] for size in range(0, len(content), 97)}
    for name, damaged in files.items():
        path = copy(name)
        (path / "parity.npz").write_bytes(damaged)
        relist(path)
    path = copy("changed after it was listed")
    (path / "parity.npz").write_bytes(flip(content, 100))
    assert runtime.load_records([whole]) == [None]
    refused(runtime.load_records([*folders.values()]), "BundleError", "parity.npz", [*folders])


# --- embeddings -----------------------------------------------------------------------------------


def check_embeddings(runtime: Runtime, folder: Path) -> None:
    vectors = load("embeddings")
    whole = VECTORS / "version1.embedding"
    content = whole.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["sha256"] = "0" * 64
    data = content[8 + length :]
    rebuilt = folder / "rebuilt"
    rebuilt.write_bytes(embedding_file(header, data))

    for found in runtime.read_embeddings([whole, rebuilt], vectors):
        assert not isinstance(found, Refusal), found
        maps, original_size, input_size = found
        assert [list(original_size), list(input_size)] == [[480, 640], [1008, 1008]]
        for array, expected in zip(maps, embedding_maps(vectors).values(), strict=True):
            np.testing.assert_array_equal(array, expected, strict=True)

    files = {
        case["name"]: embedding_file(patched(header, case["patch"]), data)
        for case in vectors["headers"]
    }
    for case in vectors["data"]:
        start = bytes.fromhex(case.get("start", ""))
        changed = start + (data * 2)[len(start) : case["size"]]
        files[f"data: {case['name']}"] = embedding_file(header, changed)
    for text in vectors["header_texts"]:
        files[f"header {text}"] = struct.pack("<Q", len(text)) + text.encode() + data
    for case in vectors["files"]:
        files[f"file: {case['name']}"] = bytes.fromhex(case["hex"])
    files |= {f"cut to {size} bytes": content[:size] for size in range(0, len(content), 13)}
    files |= {f"bit {bit} flipped": flip(content, bit) for bit in range(0, 8 * len(content), 29)}
    paths = [folder / f"forged{number}" for number in range(len(files))]
    for path, forged in zip(paths, files.values(), strict=True):
        path.write_bytes(forged)
    paths += [folder / "not there", folder / "link", folder / "pipe", folder]
    paths[-3].symlink_to("nowhere")
    os.mkfifo(paths[-2])
    names = [*files, "missing", "dangling link", "pipe", "folder"]
    refused(runtime.read_embeddings(paths, vectors), "EmbeddingError", "", names)


# --- calls ----------------------------------------------------------------------------------------


def check_calls(runtime: Runtime, folder: Path) -> None:
    vectors = load("calls")
    for case in vectors["cases"]:
        found = runtime.call(ROOT / vectors["bundle"], case["steps"])
        expected = []
        for step in case["steps"]:
            kind, subject = step.get("error", (None, ""))
            if isinstance(subject, dict):
                subject = subject[runtime.name]
            expected.append(step.get("masks") if kind is None else Refusal(kind, subject))
        same(found, expected, [f"{case['name']}: {i}" for i in range(len(expected))])


CHECKS: tuple[Callable[[Runtime, Path], None], ...] = (
    check_packed_prompts,
    check_refused_prompts,
    check_images,
    check_manifests,
    check_bundle_files,
    check_signatures,
    check_onnx_files,
    check_engines,
    check_judgements,
    check_records,
    check_embeddings,
    check_calls,
)
