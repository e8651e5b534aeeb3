"""Parity records: archives that lie, a small bundle with a record of its own, changed answers."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.support.helpers import noise, relist

from sam3rt import load_model
from sam3rt.accuracy.record import ParityCase, ParityRecord
from sam3rt.accuracy.run import Runner, encode, run_case
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.features import Features
from sam3rt.geometry import ImageGeometry
from sam3rt.prompts import PackedPrompts

Arrays = dict[str, NDArray[Any]]
Change = dict[str, Any]


def npy(shape: str, dtype: str = "<f4", data: bytes = b"", version: int = 1) -> bytes:
    """An array file that says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content, compresslevel=1)
    return stream.getvalue()


def lie_about_size(content: bytes, size: int) -> bytes:
    """Change the unpacked size in the archive's directory."""
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


BOMBS: dict[str, Callable[[], bytes]] = {
    "a header that claims terabytes": lambda: zipped({"a.npy": npy("(1099511627776,)")}),
    "a header that claims terabytes, version 2": lambda: zipped(
        {"a.npy": npy("(1099511627776,)", version=2)}
    ),
    "a product beyond 64 bits": lambda: zipped(
        {"a.npy": npy("(4294967296, 4294967296, 4294967296)")}
    ),
    "a negative side": lambda: zipped({"a.npy": npy("(-1,)")}),
    "many of nothing": lambda: zipped({"a.npy": npy("(1099511627776,)", "<U0")}),
    "one huge text": lambda: zipped({"a.npy": npy("()", "<U536870911")}),
    "objects": lambda: zipped({"a.npy": npy("(1,)", "|O", b"\x80\x04N.")}),
    "a structure": lambda: zipped({"a.npy": npy("(1,)", "V8", b"\0" * 8)}),
    "zeros": lambda: zipped({"a.npy": npy("(67108864,)") + bytes(1 << 28)}),
    "zeros in many arrays": lambda: zipped(
        {f"{i}.npy": npy("(33554432,)", "|u1", bytes(1 << 25)) for i in range(9)}
    ),
    "many arrays": lambda: zipped({f"{i}.npy": b"" for i in range(5000)}),
    "a size that is a lie": lambda: lie_about_size(zipped({"a.npy": npy("(9,)") + bytes(36)}), 5),
    "another compression": lambda: zipped({"a.npy": npy("()", data=bytes(4))}, zipfile.ZIP_BZIP2),
    "an array twice": lambda: zipped(
        {"a.npy": npy("()", data=bytes(4)), "a": npy("()", data=bytes(4))}
    ),
    "a literal that is nested": lambda: zipped({"a.npy": npy("(" * 5000 + ")" * 5000)}),
    "a long header": lambda: zipped({"a.npy": npy("(" + "1," * 30_000 + ")")}),
}


def recorded_bundle(folder: Path, model_type: str = "sam3") -> Bundle:
    """A bundle of a few nodes, as ``runnable_bundle`` makes it, with a record of its own."""
    from tests.support.runnable_bundle import runnable_bundle  # needs the package onnx

    bundle = runnable_bundle(folder, model_type)
    runner = load_model(folder, backend="onnxruntime", device="cpu", check_files=False).backend
    rng = np.random.default_rng(3)

    def prompts(objects: int, points: int, masks: int) -> PackedPrompts:
        return PackedPrompts(
            rng.uniform(0, 8, (objects, points, 2)).astype(np.float32),
            rng.integers(0, 2, (objects, points)),
            rng.standard_normal((masks, 8, 8)).astype(np.float32) if masks else None,
        )

    cases = [
        ParityCase("click", 0, prompts(1, 2, 0)),
        ParityCase("objects", 1, prompts(3, 1, 0)),
        ParityCase("mask", 1, prompts(2, 2, 1)),
        ParityCase("masks", 0, prompts(2, 2, 2)),
    ]
    images = [noise(6, 9), noise(8, 5)]
    features = [encode(runner, bundle.manifest, image) for image in images]
    answers = [(c, run_case(runner, bundle.manifest, features[c.image], c)) for c in cases]
    ParityRecord.build(images, [f.numpy() for f in features], answers).save(folder / "parity.npz")
    relist(folder)
    return open_bundle(folder)


def read_record(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a record, and its description."""
    with np.load(path) as archive:
        arrays = dict(archive)
    return arrays, json.loads(str(arrays.pop("description")))


def write_record(bundle: Path, arrays: Arrays, description: Any) -> None:
    """Give a bundle another record, and vouch for it."""
    text: Any = {"description": np.array(json.dumps(description))}
    np.savez_compressed(bundle / "parity.npz", **(arrays | text))
    relist(bundle)


# --- answers that are changed ---------------------------------------------------------------------


@dataclass
class _Changed:
    """Feature maps that are not what the decoder gets."""

    inner: Features
    maps: tuple[NDArray[np.float32], ...]

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        return self.maps


class ChangedRunner:
    """A runner that says something else than it computes.

    Args:
        inner: what computes.
        bundle: what it runs.
        changes: an output's name, and ``scale``, or ``at`` (an index of all values) and ``value``.
    """

    def __init__(self, inner: Runner, bundle: Bundle, changes: Sequence[Change]) -> None:
        self._inner = inner
        self._maps = [spec.name for spec in bundle.manifest.encoder.outputs]
        self._changes = changes

    def encode_image(self, image: NDArray[np.uint8], geometry: ImageGeometry) -> Any:
        """Feature maps of uint8 [H, W, 3]."""
        features = self._inner.encode_image(image, geometry)
        maps = zip(self._maps, features.numpy(), strict=True)
        return _Changed(features, tuple(self._changed(name, array) for name, array in maps))

    def decode(
        self, features: Any, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """The named decoder outputs, float32 [1, P, ...] each."""
        found = self._inner.decode(features.inner, prompts, outputs)
        return [self._changed(name, array) for name, array in zip(outputs, found, strict=True)]

    def _changed(self, name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
        array = array.copy()
        for change in self._changes:
            if change["output"] == name and "scale" in change:
                array *= np.float32(change["scale"])
            elif change["output"] == name:
                array.flat[change["at"]] = float(change["value"])
        return array
