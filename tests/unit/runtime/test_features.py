"""Arrays handed to other libraries: NumPy and PyTorch read them in place and let go of them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from sam3rt import SegmentationModel
from sam3rt import features as device_array
from sam3rt.features import CPU, CUDA, DeviceArray, of_host


class Owner:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def owned(dtype: str = "float16") -> tuple[DeviceArray, weakref.ref[Owner], np.ndarray]:
    array = np.arange(120).reshape(1, 2, 6, 10).astype(dtype)
    owner = Owner(array)
    exported = DeviceArray(array.ctypes.data, array.shape, array.dtype, (CPU, 0), owner)
    return exported, weakref.ref(owner), array


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8", "int32"])
def test_numpy_reads_the_memory_in_place(dtype: str) -> None:
    exported, _, array = owned(dtype)
    view = np.from_dlpack(exported)
    assert (view.dtype, view.shape) == (array.dtype, array.shape)
    assert view.ctypes.data == array.ctypes.data
    np.testing.assert_array_equal(view, array)
    assert exported.nbytes == array.nbytes


def test_memory_lives_as_long_as_its_last_consumer() -> None:
    exported, owner, _ = owned()
    first, second = np.from_dlpack(exported), np.from_dlpack(exported)
    del exported
    gc.collect()
    assert owner() is not None
    del first
    gc.collect()
    assert owner() is not None
    np.testing.assert_array_equal(second.ravel()[:3], [0, 1, 2])
    del second
    gc.collect()
    assert owner() is None
    assert not device_array._held


def test_a_capsule_that_nobody_takes_is_let_go_of() -> None:
    exported, owner, _ = owned()
    capsule = exported.__dlpack__()
    del exported
    gc.collect()
    assert owner() is not None
    del capsule
    gc.collect()
    assert owner() is None


def test_pytorch_reads_it_too() -> None:
    torch = pytest.importorskip("torch")
    exported, owner, array = owned("float32")
    tensor = torch.from_dlpack(exported)
    assert tensor.shape == array.shape
    assert tensor.data_ptr() == array.ctypes.data
    del exported, tensor
    gc.collect()
    assert owner() is None


def test_no_copy_and_no_other_device() -> None:
    exported, _, _ = owned()
    assert exported.__dlpack_device__() == (CPU, 0)
    with pytest.raises(BufferError):
        exported.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        exported.__dlpack__(dl_device=(CUDA, 0))
    exported.__dlpack__(copy=False, dl_device=(CPU, 0), max_version=(1, 0))


def test_the_cuda_interface_is_for_cuda() -> None:
    host = of_host(np.zeros((2, 3), np.float32))
    assert not hasattr(host, "__cuda_array_interface__")
    device = DeviceArray(0x7F00, (2, 3), np.dtype(np.float16), (CUDA, 1), None)
    assert device.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (0x7F00, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    assert device.__dlpack_device__() == (CUDA, 1)


def test_an_embedding_is_its_coarsest_map(model: SegmentationModel, tmp_path: Path) -> None:
    embedding = model.encode(np.zeros((20, 30, 3), np.uint8))
    maps = embedding.numpy()
    arrays = embedding.arrays()
    assert list(arrays) == list(maps)
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.from_dlpack(array), maps[name])
    np.testing.assert_array_equal(np.from_dlpack(embedding), maps[embedding.names[-1]])
    assert embedding.__dlpack_device__() == (CPU, 0)
    assert not hasattr(embedding, "__cuda_array_interface__")
