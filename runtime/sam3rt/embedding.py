"""One image's embedding, as a value that can be kept, shared, saved and loaded.

Files use the safetensors layout: eight bytes of header length (little-endian), a JSON header,
then the raw tensors. Its ``__metadata__`` names the bundle's fingerprint and the image's
geometry, and holds a SHA-256 over the header (with that digest zeroed) and the data, so that any
change to a file is noticed. Reading one needs no pickle and allocates nothing on trust: the sizes
in the header must account for every byte of the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import TensorSpec
from .bundle.files import atomic_write
from .errors import EmbeddingError, ImageError
from .features import DeviceArray, Features
from .geometry import ImageGeometry

_FORMAT = "sam3rt-embedding-1"
_NO_DIGEST = "0" * 64
_MAX_HEADER = 1 << 16
_ALIGNMENT = 8


@dataclass(frozen=True)
class ImageEmbedding:
    """An image's feature maps on the device that made them, and where the image lies in them.

    Values of this class are immutable and may be shared between threads.

    An embedding is itself an array to other libraries, by DLPack and, on a GPU,
    ``__cuda_array_interface__``: that of its coarsest map. :meth:`arrays` gives every map. What
    they get is the embedding's own memory where that is on a GPU, and is not to be written to.

    Attributes:
        features: the maps, in the backend's own form.
        geometry: original size and the part of the encoder's input it fills.
        fingerprint: of the bundle that made it; other bundles refuse it.
        names: the maps' tensor names, finest first.
    """

    features: Features
    geometry: ImageGeometry
    fingerprint: str
    names: tuple[str, ...]

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the image, pixels."""
        return self.geometry.original_size

    @property
    def nbytes(self) -> int:
        """Memory the feature maps take, bytes."""
        return self.features.nbytes

    def numpy(self) -> dict[str, NDArray[np.float32]]:
        """Host copies of the feature maps by name, float32 [1, C, h, w] each, finest first."""
        return dict(zip(self.names, self.features.numpy(), strict=True))

    def arrays(self) -> dict[str, DeviceArray]:
        """The feature maps by name as DLPack arrays, [1, C, h, w] each, finest first.

        On a GPU they are the embedding's own memory, in the type it has there (float16 or
        float32); on the CPU float32 copies.
        """
        return dict(zip(self.names, self.features.arrays(), strict=True))

    def __dlpack__(self, **options: Any) -> Any:
        return self._coarsest().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._coarsest().__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._coarsest().__cuda_array_interface__

    def _coarsest(self) -> DeviceArray:
        return self.arrays()[self.names[-1]]

    def save(self, path: str | Path) -> None:
        """Write the embedding to a file, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        write_embedding(Path(path), self.numpy(), self.geometry, self.fingerprint)


def write_embedding(
    path: Path, maps: dict[str, NDArray[np.float32]], place: ImageGeometry, fingerprint: str
) -> None:
    """Write feature maps in the layout described above.

    Args:
        path: file to write.
        maps: float32 arrays by name.
        place: the image's geometry.
        fingerprint: of the bundle that made them.

    Raises:
        OSError: the file cannot be written.
    """
    blobs = [np.ascontiguousarray(array, "<f4") for array in maps.values()]
    header: dict[str, Any] = {
        "__metadata__": {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "original_size": "{} {}".format(*place.original_size),
            "input_size": "{} {}".format(*place.input_size),
            "sha256": _NO_DIGEST,
        }
    }
    offset = 0
    for name, blob in zip(maps, blobs, strict=True):
        header[name] = {
            "dtype": "F32",
            "shape": list(blob.shape),
            "data_offsets": [offset, offset + blob.nbytes],
        }
        offset += blob.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256(text)
    for blob in blobs:
        digest.update(blob.data)
    text = text.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1)
    with atomic_write(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            stream.write(blob.data)


def read_embedding(
    path: Path, fingerprint: str, specs: Sequence[TensorSpec]
) -> tuple[list[NDArray[np.float32]], ImageGeometry]:
    """Read an embedding file and check it.

    Args:
        path: file to read.
        fingerprint: of the bundle that will use it.
        specs: the encoder outputs the maps must match.

    Returns:
        The maps in the order of ``specs``, float32 [1, C, h, w] each, and the geometry.

    Raises:
        EmbeddingError: the file is missing, cut, changed, of another format or another model.
    """
    expected = [(spec.name, (1, *(int(side) for side in spec.shape[1:]))) for spec in specs]
    data_bytes = sum(4 * int(np.prod(shape)) for _, shape in expected)
    try:
        size = path.stat().st_size
        if not data_bytes < size <= data_bytes + _MAX_HEADER + 8:
            raise EmbeddingError(
                f"{path}: has {size} bytes, an embedding of this model about {data_bytes}: "
                "it is cut or belongs to another model"
            )
        content = path.read_bytes()
    except OSError as error:
        raise EmbeddingError(f"{path}: cannot be read: {error}") from error
    header, metadata, data = _parse(path, content)
    if metadata["fingerprint"] != fingerprint:
        raise EmbeddingError(
            f"{path}: made by the bundle {metadata['fingerprint'][:16]}..., "
            f"this model is {fingerprint[:16]}...; encode the image again"
        )
    try:
        place = ImageGeometry(
            _size(path, metadata["original_size"]), _size(path, metadata["input_size"])
        )
    except ImageError as error:
        raise EmbeddingError(f"{path}: {error}") from error
    if len(data) != data_bytes or len(header) != len(expected):
        raise EmbeddingError(f"{path}: does not hold exactly this model's feature maps")
    maps = []
    offset = 0
    for name, shape in expected:
        nbytes = 4 * int(np.prod(shape))
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        if header.get(name) != entry:
            raise EmbeddingError(f"{path}: tensor {name} is {header.get(name)}, expected {entry}")
        maps.append(np.frombuffer(data, "<f4", nbytes // 4, offset).reshape(shape))
        offset += nbytes
    return maps, place


def _parse(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, str], memoryview]:
    """Split a file into tensor entries, metadata and data, after checking its digest."""
    damaged = EmbeddingError(f"{path}: is damaged or not a sam3rt embedding")
    if len(content) < 8:
        raise damaged
    (length,) = struct.unpack_from("<Q", content)
    if not 2 <= length <= min(_MAX_HEADER, len(content) - 8):
        raise damaged
    text = content[8 : 8 + length]
    data = memoryview(content)[8 + length :]
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        wanted = {"format", "fingerprint", "original_size", "input_size", "sha256"}
        if set(metadata) != wanted or not all(isinstance(v, str) for v in metadata.values()):
            raise damaged
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise damaged from error
    if not re.fullmatch("[0-9a-f]{64}", metadata["sha256"]):
        raise damaged
    if metadata["format"] != _FORMAT:
        raise EmbeddingError(f"{path}: has format {metadata['format']!r}, expected {_FORMAT!r}")
    digest = hashlib.sha256(text.replace(metadata["sha256"].encode(), _NO_DIGEST.encode(), 1))
    digest.update(data)
    if digest.hexdigest() != metadata["sha256"]:
        raise damaged
    return header, metadata, data


def _size(path: Path, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,9}) ([1-9][0-9]{0,9})", text)
    size = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if not 0 < max(size) < 1 << 31:
        raise EmbeddingError(f"{path}: has an image size of {text[:40]!r}")
    return size
