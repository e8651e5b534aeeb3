"""Reading ``.npz`` files that somebody else may have made.

NumPy's own reader allocates what an array's header asks for before it looks at how much data there
is. This one takes plain arrays only, holds every size to what the file can hold, and to a limit.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

# A record of the published SAM 3 holds 4 MB in 85 arrays.
MAX_BYTES = 1 << 28
_MAX_ARRAYS = 4096
_KINDS = "biufU"
_STORED_OR_DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an ``.npz`` file, by name without the suffix.

    Raises:
        OSError: the file cannot be read.
        Exception: it is damaged, too large, or holds something else than plain arrays; the zip
            and NumPy libraries raise classes of their own.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_ARRAYS:
            raise ValueError(f"holds {len(members)} arrays, at most {_MAX_ARRAYS} are read")
        total = sum(member.file_size for member in members)
        if total > MAX_BYTES:
            raise ValueError(f"holds {total} bytes, at most {MAX_BYTES} are read")
        arrays: dict[str, NDArray[Any]] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if member.compress_type not in _STORED_OR_DEFLATED:
                raise ValueError(f"{name} is compressed in a way that NumPy does not use")
            if name in arrays:
                raise ValueError(f"holds {name} twice")
            with archive.open(member) as stream:
                # The directory's size may be a lie; no more than it says is unpacked.
                content = stream.read(member.file_size)
            arrays[name] = _array(name, content)
        return arrays


def _array(name: str, content: bytes) -> NDArray[Any]:
    """Parse the content of an ``.npy`` file.

    Raises:
        ValueError: it is damaged, or not a plain array of numbers or text.
    """
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name} is of type {dtype}")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name} has shape {shape}")
    data = memoryview(content)[stream.tell() :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has shape {shape} of {dtype} but {len(data)} bytes")
    array: NDArray[Any] = np.frombuffer(data, dtype).copy() if len(data) else np.empty(0, dtype)
    if fortran_order:
        return array.reshape(shape[::-1]).transpose()
    return array.reshape(shape)
