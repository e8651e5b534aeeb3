"""One image's embedding, as a value that can be kept, shared, saved and loaded.

Files are safetensors files. Their metadata name the bundle's fingerprint and the image's geometry,
and hold a SHA-256 over the header (with that digest zeroed) and the data, so that any change to a
file is noticed. Reading one needs no pickle, and files of another size than the model's feature
maps need are not read at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .arguments import file_path
from .bundle import TensorSpec
from .bundle.files import atomic_write
from .errors import EmbeddingError, InvalidInputError
from .features import DeviceArray, Features, HostFeatures
from .geometry import ImageGeometry

_FORMAT = "sam3rt-embedding-1"
_NO_DIGEST = "0" * 64
_MAX_HEADER = 1 << 16
# Eight bytes say how long the header is.
_HEADER_START = 8

Maps = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, repr=False)
class ImageEmbedding:
    """An image's feature maps on the device that made them, and where the image lies in them.

    Values of this class are immutable and may be shared between threads.

    An embedding is itself an array to other libraries, by DLPack and, on a GPU,
    ``__cuda_array_interface__``: that of its coarsest map. :meth:`arrays` gives every map. What
    they get is the embedding's own memory where that is on a GPU, and is not to be written to.
    ``numpy.asarray`` gives a host copy of the coarsest map.

    Embeddings can be pickled, as :meth:`to_bytes`: what comes back lies in host memory, and a model
    of the same bundle brings it to its device at every call. :meth:`SegmentationModel.upload` does
    so once.

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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """A host copy of the coarsest map, [1, C, h, w]."""
        if copy is False:
            raise ValueError("an embedding as a NumPy array is always a copy")
        return self.features.numpy()[-1].astype(dtype or np.float32, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return self._coarsest().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._coarsest().__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._coarsest().__cuda_array_interface__

    def _coarsest(self) -> DeviceArray:
        return self.arrays()[self.names[-1]]

    def __repr__(self) -> str:
        height, width = self.original_size
        return (
            f"<ImageEmbedding of an image of {width} x {height} pixels: {len(self.names)} feature "
            f"maps, {self.nbytes / 1e6:.1f} MB, {self.features.device}, "
            f"bundle {self.fingerprint[:16]}...>"
        )

    def save(self, path: str | Path) -> None:
        """Write the embedding to a file, whole or not at all.

        Raises:
            EmbeddingError: a feature map holds NaN or an infinity.
            OSError: the file cannot be written.
        """
        write_embedding(file_path("path", path), self.numpy(), self.geometry, self.fingerprint)

    def to_bytes(self) -> bytes:
        """The content of the file that :meth:`save` writes.

        Raises:
            EmbeddingError: a feature map holds NaN or an infinity.
        """
        return encode_embedding(self.numpy(), self.geometry, self.fingerprint)

    @classmethod
    def from_bytes(cls, content: bytes) -> ImageEmbedding:
        """An embedding in host memory, from what :meth:`to_bytes` gave or :meth:`save` wrote.

        A model of the same bundle takes it like its own.

        Raises:
            InvalidInputError: it is not bytes.
            EmbeddingError: it is damaged or not an embedding.
        """
        if not isinstance(content, bytes | bytearray | memoryview):
            raise InvalidInputError("content", type(content).__qualname__, "bytes")
        maps, where, fingerprint = _decode(bytes(content), "content")
        # The library gives them in any order; levels are numbered from the finest.
        names = tuple(sorted(maps))
        return cls(HostFeatures(tuple(maps[n] for n in names)), where, fingerprint, names)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageEmbedding.from_bytes, (self.to_bytes(),)


class _Metadata(Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    fingerprint: str
    original_size: str
    input_size: str
    sha256: str


def write_embedding(path: Path, maps: Maps, geometry: ImageGeometry, fingerprint: str) -> None:
    """Write what :func:`encode_embedding` gives, whole or not at all.

    Raises:
        EmbeddingError: a map holds NaN or an infinity.
        OSError: the file cannot be written.
    """
    content = encode_embedding(maps, geometry, fingerprint)
    with atomic_write(path) as stream:
        stream.write(content)


def encode_embedding(maps: Maps, geometry: ImageGeometry, fingerprint: str) -> bytes:
    """The content of a file in the layout described above.

    Args:
        maps: float32 arrays by name, finest first.
        geometry: the image's geometry.
        fingerprint: of the bundle that made them.

    Raises:
        EmbeddingError: a map holds NaN or an infinity.
    """
    from safetensors.numpy import save

    _check_finite(maps, "the embedding")
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "original_size": "{} {}".format(*geometry.original_size),
        "input_size": "{} {}".format(*geometry.input_size),
        "sha256": _NO_DIGEST,
    }
    blobs = {name: np.ascontiguousarray(array, "<f4") for name, array in maps.items()}
    content = bytearray(save(blobs, metadata))
    # The library writes metadata in another order each time. Equal embeddings are equal bytes.
    start, end = _HEADER_START, _header_end(content)
    header = json.loads(content[start:end]) | {"__metadata__": metadata}
    content[start:end] = json.dumps(header, separators=(",", ":")).encode().ljust(end - start)
    digest = hashlib.sha256(memoryview(content)[start:]).hexdigest().encode()
    at = content.index(b'"sha256":"' + _NO_DIGEST.encode()) + len(b'"sha256":"')
    content[at : at + len(digest)] = digest
    return bytes(content)


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
        EmbeddingError: the file is missing, cut, changed, too large, of another format or another
            model, or a map holds NaN or an infinity.
    """
    data_bytes = sum(4 * math.prod(shape) for shape in _shapes(specs).values())
    most = data_bytes + _MAX_HEADER + _HEADER_START
    try:
        if path.is_dir():
            raise EmbeddingError(f"{path}: is a folder, and no embedding file")
        size = path.stat().st_size
        if not data_bytes < size <= most:
            raise EmbeddingError(
                f"{path}: has {size} bytes, an embedding of this model about {data_bytes}: "
                "it is cut or belongs to another model"
            )
        with path.open("rb") as stream:
            content = stream.read(most)
    except OSError as error:
        raise EmbeddingError(f"{path}: cannot be read: {error}") from error
    maps, where, maker = _decode(content, str(path))
    check_maker(maker, fingerprint, str(path))
    check_maps(maps, specs, str(path))
    return [maps[spec.name] for spec in specs], where


def check_maker(maker: str, fingerprint: str, subject: str) -> None:
    """Refuse an embedding of another bundle.

    Args:
        maker: fingerprint of the bundle that made it.
        fingerprint: of the bundle that is to use it.
        subject: what to call the embedding in error messages.

    Raises:
        EmbeddingError: the two differ.
    """
    if maker != fingerprint:
        raise EmbeddingError(
            f"{subject}: made by the bundle {maker[:16]}..., this model is {fingerprint[:16]}...; "
            "encode the image again"
        )


def check_maps(maps: Maps, specs: Sequence[TensorSpec], subject: str) -> None:
    """Compare feature maps with a model's encoder outputs.

    Raises:
        EmbeddingError: they have other names or shapes.
    """
    found = {name: array.shape for name, array in maps.items()}
    wanted = _shapes(specs)
    if found != wanted:
        raise EmbeddingError(f"{subject}: holds the feature maps {found}, expected {wanted}")


def _decode(content: bytes, subject: str) -> tuple[Maps, ImageGeometry, str]:
    """Feature maps, geometry and fingerprint in a file's content.

    Raises:
        EmbeddingError: it is not an embedding file, or was changed.
    """
    from safetensors.numpy import load

    damaged = f"{subject}: is damaged or not a sam3rt embedding"
    start, end = _HEADER_START, _header_end(content)
    if not start < end <= min(len(content), start + _MAX_HEADER):
        raise EmbeddingError(damaged)
    try:
        entries = msgspec.json.decode(content[start:end], type=dict[str, dict[str, Any]])
        metadata = msgspec.convert(entries.pop("__metadata__", None), _Metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EmbeddingError(f"{damaged}: {error}") from error
    if metadata.format != _FORMAT:
        raise EmbeddingError(f"{subject}: has format {metadata.format!r}, expected {_FORMAT!r}")
    # The library lets further fields pass.
    if any(set(entry) != {"dtype", "shape", "data_offsets"} for entry in entries.values()):
        raise EmbeddingError(damaged)
    if not re.fullmatch("[0-9a-f]{64}", metadata.sha256):
        raise EmbeddingError(damaged)
    header = content[start:end].replace(metadata.sha256.encode(), _NO_DIGEST.encode(), 1)
    digest = hashlib.sha256(header)
    digest.update(memoryview(content)[end:])
    if digest.hexdigest() != metadata.sha256:
        raise EmbeddingError(f"{damaged}: its SHA-256 is another")
    try:
        maps = load(content)
    except Exception as error:  # the library's own classes, and KeyError for types NumPy lacks
        raise EmbeddingError(f"{damaged}: {error}") from error
    try:
        where = ImageGeometry(_size(metadata.original_size), _size(metadata.input_size))
    except ValueError as error:  # an ImageError too, for sizes beyond those that are taken
        raise EmbeddingError(f"{subject}: {error}") from error
    if any(array.dtype != np.float32 for array in maps.values()):
        raise EmbeddingError(f"{subject}: holds feature maps that are not float32")
    _check_finite(maps, subject)
    return maps, where, metadata.fingerprint


def _header_end(content: bytes | bytearray) -> int:
    """Where the header ends by what a file says."""
    return _HEADER_START + int.from_bytes(content[:_HEADER_START], "little")


def _check_finite(maps: Maps, subject: str) -> None:
    for name, array in maps.items():
        if not np.isfinite(array).all():
            raise EmbeddingError(f"{subject}: the feature map {name} holds NaN or an infinity")


def _shapes(specs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Shapes of one image's feature maps by name; their first axis is the images'."""
    return {spec.name: (1, *(int(side) for side in spec.shape[1:])) for spec in specs}


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,9}) ([1-9][0-9]{0,9})", text)
    size = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if not 0 < max(size) < 1 << 31:
        raise ValueError(f"has an image size of {text[:40]!r}")
    return size
