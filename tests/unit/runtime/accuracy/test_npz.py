"""Tests of `sam3rt.accuracy.npz`: what NumPy writes is read, and bombs are refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.support.helpers import examples
from tests.support.records import BOMBS

from sam3rt import BundleError
from sam3rt.accuracy import npz as _npz
from sam3rt.accuracy.npz import read_arrays
from sam3rt.accuracy.record import ParityRecord
from sam3rt.bundle.default import default_bundle_path

PLAIN = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_, np.dtype("<U5")]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


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
