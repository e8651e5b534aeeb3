"""Tests of `sam3rt.accuracy.npz`: what NumPy writes is read, and bombs are refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.support.helpers import examples

from sam3rt import BundleError
from sam3rt.accuracy import npz as _npz
from sam3rt.accuracy.npz import read_arrays
from sam3rt.accuracy.record import ParityRecord
from sam3rt.bundle.default import default_bundle_path

PLAIN = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.dtype("<U5")]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


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


@given(arrays=st.dictionaries(st.from_regex(r"[a-z]{1,9}", fullmatch=True), PLAIN, max_size=4))
@examples(50)
def test_what_numpy_writes_is_read(
    arrays: dict[str, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    for write in (np.savez, np.savez_compressed):
        write(path, **{name: np.array(array, order="F") for name, array in arrays.items()})
        found = read_arrays(path)
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
            assert found[name].flags.writeable


def test_the_bundled_record_is_read_as_numpy_reads_it() -> None:
    path = default_bundle_path() / "parity.npz"
    with np.load(path, allow_pickle=False) as archive:
        expected = dict(archive)
    found = read_arrays(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


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


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(name: str, tmp_path: Path) -> None:
    path = tmp_path / "parity.npz"
    path.write_bytes(BOMBS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=r"parity\.npz"):
            ParityRecord.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_more_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(1000, np.uint8))
    assert len(read_arrays(path)["a"]) == 1000
    monkeypatch.setattr(_npz, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000"):
        read_arrays(path)
