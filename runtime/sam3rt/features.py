"""Feature maps wherever a backend keeps them, offered to other libraries without a copy.

Two protocols: DLPack (``torch.from_dlpack``, ``cupy.from_dlpack``, ``numpy.from_dlpack`` for the
CPU) and, for CUDA, Numba's ``__cuda_array_interface__`` version 3. The structures are those of
DLPack's ``dlpack.h``, version 0.8, which every consumer reads.
"""

from __future__ import annotations

import abc
import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU, CUDA = 1, 2
# DLDataTypeCode.
_CODES = {"i": 0, "u": 1, "f": 2}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = (
    ("dl_tensor", _Tensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_NAME = b"dltensor"
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(
    ("PyCapsule_New", _api)
)
# The destructor gets a capsule that is being destroyed, so it must not take a reference to it.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _api)
)
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)

# What consumers hold, by the number in manager_ctx: the structure itself and the memory's owner.
_held: dict[int, tuple[Any, ...]] = {}
_numbers = itertools.count(1)


def _delete(managed: Any) -> None:
    _held.pop(managed.contents.manager_ctx, None)


def _drop(capsule: int) -> None:
    # A consumer renames the capsule and calls the deleter itself when it is done.
    if _is_valid(capsule, _NAME):
        managed = _ManagedTensor.from_address(_get_pointer(capsule, _NAME))
        _held.pop(managed.manager_ctx, None)


# C code keeps calling these: they must live as long as the process.
_deleter, _destructor = _Deleter(_delete), _Destructor(_drop)


class DeviceArray:
    """A contiguous array on a device. It is part of an embedding: read it, do not write to it.

    All work that fills it is done before it can be got hold of, so that a consumer's stream need
    not wait for anything.

    Args:
        address: where it begins.
        shape: sizes.
        dtype: element type.
        device: DLPack's (device type, number): (1, 0) for the CPU, (2, N) for CUDA.
        owner: what keeps the memory; kept for as long as any consumer uses the array.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: tuple[int, int],
        owner: object,
    ) -> None:
        self._address = address
        self.shape = shape
        self.dtype = dtype
        self._device = device
        self._owner = owner

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule.

        Raises:
            BufferError: a copy, or another device, is asked for.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("sam3rt exports its memory as it is: no copy, no other device")
        sides = (ctypes.c_int64 * len(self.shape))(*self.shape)
        number = next(_numbers)
        managed = _ManagedTensor()
        tensor = managed.dl_tensor
        tensor.data = self._address
        tensor.device = _Device(*self._device)
        tensor.ndim = len(self.shape)
        tensor.dtype = _DataType(_CODES[self.dtype.kind], self.dtype.itemsize * 8, 1)
        tensor.shape = ctypes.cast(sides, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = None  # contiguous
        tensor.byte_offset = 0
        managed.manager_ctx = number
        managed.deleter = _deleter
        _held[number] = (managed, sides, self)
        return _new_capsule(ctypes.addressof(managed), _NAME, _destructor)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._device[0] != CUDA:
            raise AttributeError("__cuda_array_interface__ is for arrays on a CUDA device")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            # PyTorch refuses arrays that say they are read-only.
            "data": (self._address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }


def of_host(array: NDArray[Any]) -> DeviceArray:
    """A contiguous host array as a :class:`DeviceArray`, without a copy."""
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, (CPU, 0), array)


class Features(abc.ABC):
    """One image's feature maps, wherever the backend keeps them."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Memory they take, bytes."""

    @abc.abstractmethod
    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies in host memory, float32 [1, C, h, w] each, finest map first."""

    @property
    def device(self) -> str:
        """Where they lie, such as ``"cpu"`` or ``"cuda:0"``."""
        return "cpu"

    def arrays(self) -> tuple[DeviceArray, ...]:
        """The maps for other libraries, [1, C, h, w] each, finest map first.

        Copies in host memory, unless the backend can offer its own.
        """
        return tuple(of_host(array) for array in self.numpy())


@dataclass(frozen=True, eq=False)
class HostFeatures(Features):
    """Feature maps of no backend, in host memory: what came out of bytes.

    Attributes:
        maps: float32 [1, C, h, w] each, finest map first.
    """

    maps: tuple[NDArray[np.float32], ...]

    @property
    def nbytes(self) -> int:
        """Memory they take, bytes."""
        return sum(array.nbytes for array in self.maps)

    def numpy(self) -> tuple[NDArray[np.float32], ...]:
        """Copies, float32 [1, C, h, w] each, finest map first."""
        return tuple(array.copy() for array in self.maps)
