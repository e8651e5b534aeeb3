"""What is fuzzed: everything that reads bytes or values somebody else made.

A target takes bytes and does with them what the runtime does with a file or an argument. Only the
documented exceptions may come out of the runtime, so anything a target raises is a finding. Where a
format holds a digest, 64 zeros in the bytes are replaced by the one that fits: otherwise nothing
behind the check of the digest would ever be reached.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import PIL.Image

from sam3rt import geometry
from sam3rt.accuracy import verdicts
from sam3rt.accuracy.record import ParityRecord
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.sidecar import (
    EngineShapes,
    EngineSidecar,
    read_sidecar,
    write_sidecar,
)
from sam3rt.bundle import (
    MANIFEST,
    NO_FINGERPRINT,
    Bundle,
    FileEntry,
    PromptSpec,
    TensorSpec,
    open_bundle,
    parse_manifest,
)
from sam3rt.bundle.onnx_locations import check_tensor_locations
from sam3rt.embedding import read_embedding, write_embedding
from sam3rt.errors import BundleError, EmbeddingError, ImageError, PromptError
from sam3rt.geometry import ImageGeometry
from sam3rt.image_files import read_image
from sam3rt.prompts import Prompts, pack

Target = Callable[[bytes], None]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "engines" / "mobile_sam"
_ZEROS = NO_FINGERPRINT.encode()
_PLACE = ImageGeometry((40, 60), (1008, 1008))
_SPECS = (TensorSpec("image_embeddings.0", "float32", ("batch", 2, 3, 2)),)
_PROMPTS = PromptSpec("before_points", "always", (4, 4))
_BESIDE = (FileEntry("weights.data", "0" * 64, 1000),)
_SUBJECT = verdicts.Subject("openvino", "1", "a processor", "bf16")


@lru_cache(maxsize=1)
def _folder() -> Path:
    """A folder for the files of one process, in memory where the system has a place for that."""
    memory = Path("/dev/shm")
    holder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    _HELD.append(holder)
    return Path(holder.name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def manifest(data: bytes) -> None:
    """``bundle.json``."""
    for raw in (data, data.replace(_ZEROS, hashlib.sha256(data).hexdigest().encode(), 1)):
        with contextlib.suppress(BundleError):
            parse_manifest(raw)


def sidecar(data: bytes) -> None:
    """The JSON file beside an engine."""
    _file("encoder.engine.json", data)
    with contextlib.suppress(BundleError):
        read_sidecar(_folder() / "encoder.engine")


def embedding(data: bytes) -> None:
    """An embedding file."""
    # The digest is over header and data, without the eight bytes before them.
    fitting = data.replace(_ZEROS, hashlib.sha256(data[8:]).hexdigest().encode(), 1)
    for raw in (data, fitting):
        path = _file("a.embedding", raw)
        with contextlib.suppress(EmbeddingError):
            read_embedding(path, "f" * 64, _SPECS)


def onnx(data: bytes) -> None:
    """The walk over an ``.onnx`` file."""
    with contextlib.suppress(BundleError):
        check_tensor_locations(data, "encoder.onnx", _BESIDE)


def onnx_differential(data: bytes) -> None:
    """The walk against protocol buffers' own parser: what it accepts, both read alike."""
    from google.protobuf.message import DecodeError
    from onnx import load_model_from_string

    try:
        said = check_tensor_locations(data, "encoder.onnx", _BESIDE)
        graph = load_model_from_string(data).graph
    except (BundleError, DecodeError):
        return
    holders = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute)]
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in holders
        if tensor.external_data or tensor.data_location
    ]
    found = [(place["location"], int(place.get("offset", 0))) for place in places]
    if found != [(tensor.location, tensor.offset) for tensor in said]:
        raise AssertionError(f"the walk saw {said}, protocol buffers {found}")
    if any(location != _BESIDE[0].file for location, _ in found):
        raise AssertionError(f"data lie in {found}")
    if graph.sparse_initializer or any(
        a.g.node or a.graphs for n in graph.node for a in n.attribute
    ):
        raise AssertionError("a subgraph or a sparse tensor was let through")


def parity(data: bytes) -> None:
    """A parity record: the archive itself, then its description and one array in a sound one."""
    length = int.from_bytes(data[:2], "big")
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(rebuilt, "w") as archive:
        archive.writestr("description.npy", _text_array(data[2 : 2 + length]))
        archive.writestr("image_0.npy", data[2 + length :])
        for name in ("features_0_0", "a/points", "a/labels", "a/logits", "a/masks", "a/iou"):
            archive.writestr(f"{name}.npy", _text_array(b"x"))
    for raw in (data, rebuilt.getvalue()):
        with contextlib.suppress(BundleError):
            ParityRecord.load(_file("parity.npz", raw))


def _text_array(content: bytes) -> bytes:
    """An array file that holds one text."""
    stream = io.BytesIO()
    np.save(stream, np.array(content.decode(errors="replace")))
    return stream.getvalue()


def verdict(data: bytes) -> None:
    """A remembered verdict: one that cannot be used is as good as none."""
    bundle = _bundle()
    key = verdicts._key(bundle, _SUBJECT)
    for raw in (data, data.replace(b'"KEY"', json.dumps(key).encode(), 1)):
        path = _file(f"verdicts/{verdicts._file_name(key)}", raw)
        with mock.patch.object(verdicts, "verdict_folder", return_value=path.parent):
            verdicts.load_verdict(bundle, _SUBJECT)


def image(data: bytes) -> None:
    """An image file through the command line's reader."""
    path = _file("image", data)
    # A hundred bytes may rightly claim as many pixels as are allowed, which is memory, no fault.
    with (
        mock.patch.object(geometry, "MAX_PIXELS", 1 << 20),
        contextlib.suppress(ImageError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        array = read_image(path)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise AssertionError(f"read {array.dtype} {array.shape}")


def prompts(data: bytes) -> None:
    """Prompts of any type, shape and value; what is taken has the decoder's form."""
    values = _Values(data)
    given = Prompts(values.any(), values.any(), values.any(), values.any(), values.flag())
    with contextlib.suppress(PromptError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = pack(given, _PROMPTS, _PLACE)
        if packed.points.dtype != np.float32 or not np.isfinite(packed.points).all():
            raise AssertionError("points are not finite float32 numbers")
        if packed.labels.dtype != np.int64 or packed.labels.shape != packed.points.shape[:-1]:
            raise AssertionError("labels do not fit the points")
        if not np.isin(packed.labels, (-1, 0, 1, 2, 3)).all():
            raise AssertionError("a label is none")


TARGETS: dict[str, Target] = {
    "manifest": manifest,
    "sidecar": sidecar,
    "embedding": embedding,
    "onnx": onnx,
    "onnx_differential": onnx_differential,
    "parity": parity,
    "verdict": verdict,
    "image": image,
    "prompts": prompts,
}


# Targets whose bytes are JSON, which changed bytes seldom stay.
JSON_TARGETS = frozenset(["manifest", "sidecar", "verdict"])
_ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, ""),
    *("x", "..", "/", "a/b", "../a", "\0", "\ud800", "0" * 64, "a" * 5000, [], [[]], {}, {"": 0}),
)


def change_json(data: bytes, seed: int) -> bytes | None:
    """The JSON with one value replaced, removed, doubled or renamed; ``None`` where it is none."""
    rng = random.Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            todo += [value[key] for key in keys]
    if not places:
        return None
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 1:
        holder[rng.choice(("extra", "", key + "_"))] = holder[key]
    elif kind == 2:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at]) if at in other or isinstance(other, list) else 0
    else:
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):
        return None


class _Values:
    """Draws values of every kind from bytes."""

    _DTYPES = ("f4", "f8", "f2", "i8", "i4", "u1", "u8", "?", "c8", "U2", "S3", "M8[s]", "O")
    _SHAPES = (
        (),
        (0,),
        (1,),
        (2,),
        (4,),
        (1, 2),
        (2, 2),
        (0, 2),
        (1, 2, 2),
        (2, 1, 2),
        (0, 1, 2),
        (2, 4),
        (1, 4),
        (1, 4, 4),
        (2, 1, 4, 4),
        (1, 1, 4, 4),
        (1, 1, 1, 1, 1),
    )

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def flag(self) -> bool:
        return bool(self._byte() & 1)

    def any(self) -> Any:
        """``None``, an array in one of many layouts, nested lists, or something else."""
        kind = self._byte() % 8
        if kind == 0:
            return None
        if kind == 1:
            return (3, "text", b"bytes", [[1], [1, 2]], {"a": 1}, object(), 1 << 70, ..., [None])[
                self._byte() % 9
            ]
        array = self._array()
        if kind == 2:
            return array.tolist()
        if kind == 3:
            return array[..., ::-1] if array.ndim else array
        if kind == 4:
            return np.asfortranarray(array)
        if kind == 5:
            array.flags.writeable = False
        return array

    def _array(self) -> Any:
        dtype = np.dtype(self._DTYPES[self._byte() % len(self._DTYPES)])
        shape = self._SHAPES[self._byte() % len(self._SHAPES)]
        count = int(np.prod(shape))
        if dtype.kind == "O":
            return np.array([self._byte()] * count, object).reshape(shape)
        if dtype.kind == "?" or not self._byte() % 2:
            # Small whole numbers: a label or a coordinate now and then.
            small = np.array([self._byte() % 7 - 1 for _ in range(count)], np.int8)
            with contextlib.suppress(ValueError, TypeError):
                return small.astype(dtype).reshape(shape)
        raw = bytes(self._byte() for _ in range(count * dtype.itemsize))
        if dtype.kind == "U":  # any four bytes are not a character
            return np.array(["1"] * count, dtype).reshape(shape)
        return np.frombuffer(raw, dtype).reshape(shape).copy() if raw else np.empty(shape, dtype)

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0


# --- where to start -------------------------------------------------------------------------------


def seeds(name: str) -> Iterator[bytes]:
    """Valid inputs of a target, which a fuzzer changes."""
    made: Iterator[bytes] = _SEEDS[name]()
    return made


def _manifests() -> Iterator[bytes]:
    text = (MODEL / MANIFEST).read_text()
    document = json.loads(text)
    yield text.encode()
    yield text.replace(document["fingerprint"], NO_FINGERPRINT, 1).encode()
    yield json.dumps({**document, "fingerprint": NO_FINGERPRINT}, separators=(",", ":")).encode()
    # A small one, so that a change hits something that matters.
    small = {**document, "fingerprint": NO_FINGERPRINT, "producer": {}}
    for role in ("encoder", "decoder"):
        graph = {**document[role], "inputs": [], "outputs": []}
        small[role] = graph
    yield json.dumps(small).encode()


def _sidecars() -> Iterator[bytes]:
    gpu = Gpu("NVIDIA L4", "8.9")
    made = EngineSidecar(
        role="encoder",
        backend="tensorrt",
        engine=FileEntry("encoder.engine", "a" * 64, 100),
        bundle_fingerprint="b" * 64,
        gpu=gpu,
        targets=(),
        tensorrt_version="10.3.0",
        driver_version="550.54",
        recipe="fp16",
        features_dtype="float16",
        shapes=EngineShapes(64, 32, 1),
        state="proven",
        parity={"masks mean IoU": 0.999},
        paired_with=None,
        build_seconds=12.0,
    )
    path = _folder() / "encoder.engine"
    ahead = msgspec.structs.replace(made, gpu=None, targets=("8.9", "12.0"), state="unproven")
    for one in (made, ahead):
        write_sidecar(path, one)
        yield path.with_name(path.name + ".json").read_bytes()


def _embeddings() -> Iterator[bytes]:
    path = _folder() / "seed.embedding"
    maps = {"image_embeddings.0": np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)}
    write_embedding(path, maps, _PLACE, "f" * 64)
    whole = path.read_bytes()
    yield whole
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["sha256"] = NO_FINGERPRINT
    text = json.dumps(header).encode()
    yield struct.pack("<Q", len(text)) + text + whole[8 + length :]


def _onnx_files() -> Iterator[bytes]:
    """Small files by hand: the package ``onnx`` may not be there where this is fuzzed."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def model(*parts: bytes) -> bytes:
        operator_set = field(8, b"\x10\x12")
        return b"\x08\x08" + field(7, b"".join(parts)) + operator_set

    place = field(13, field(1, b"location") + field(2, b"weights.data"))
    place += field(13, field(1, b"offset") + field(2, b"16"))
    place += field(13, field(1, b"length") + field(2, b"16"))
    beside = b"\x08\x04\x10\x01" + field(8, b"w") + place + b"\x70\x01"
    inside = b"\x08\x01\x10\x01" + field(8, b"v") + field(9, b"\0\0\0\0")
    add = field(1, field(1, b"w") + field(1, b"v") + field(2, b"y") + field(4, b"Add"))
    attribute = field(5, field(1, b"value") + field(5, inside) + b"\xa0\x01\x04")
    constant = field(1, field(2, b"c") + field(4, b"Constant") + attribute)
    yield model(field(5, beside))
    yield model(add, field(5, inside), field(5, beside))
    yield model(constant, field(2, b"main"))
    # As the first, its initializer behind a tag of more than 32 bits.
    yield model(b"\xaa\x80\x80\x80\x10" + field(5, beside)[1:])
    # What is refused: a subgraph, a sparse initializer, a function.
    yield model(field(1, field(4, b"If") + field(5, field(6, field(5, beside)))))
    yield model(field(15, field(1, beside)))
    yield model() + b"\xca\x01" + field(7, b"")[1:]


def _records() -> Iterator[bytes]:
    description = {"version": 1, "images": 1, "levels": 1, "cases": [{"name": "a", "image": 0}]}
    text = json.dumps(description).encode()
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 2, 3), np.uint8))
    yield len(text).to_bytes(2, "big") + text + stream.getvalue()
    whole = io.BytesIO()
    np.savez_compressed(whole, description=np.array(text.decode()), image_0=np.zeros(3))
    yield whole.getvalue()


def _verdicts() -> Iterator[bytes]:
    stored = verdicts.StoredVerdict(True, "fine", {"masks mean IoU": 0.99, "x": float("nan")})
    with mock.patch.object(verdicts, "verdict_folder", return_value=_folder() / "seeds"):
        path = verdicts.save_verdict(_bundle(), _SUBJECT, stored)
    if path is None:
        raise OSError("no verdict could be written")
    document = json.loads(path.read_bytes())
    yield json.dumps(document).encode()
    yield json.dumps({**document, "key": "KEY"}).encode()


@lru_cache(maxsize=1)
def _bundle() -> Bundle:
    (_folder() / MANIFEST).write_bytes((MODEL / MANIFEST).read_bytes())
    return open_bundle(_folder(), check_files=False)


def _images() -> Iterator[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for form, options in (
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("PPM", {}),
        ("ICO", {}),
        ("TGA", {}),
        ("PCX", {}),
        ("SGI", {}),
        ("DDS", {}),
    ):
        stream = io.BytesIO()
        picture.save(stream, form, **options)
        yield stream.getvalue()
    for mode in ("1", "LA", "P", "RGBA", "I;16", "F"):
        stream = io.BytesIO()
        picture.convert("L").convert(mode if mode != "I;16" else "I").save(stream, "TIFF")
        yield stream.getvalue()


def _prompt_bytes() -> Iterator[bytes]:
    # Kind, type, shape, small values or raw bytes, the values; see _Values.
    click = bytes([6, 0, 5, 0, 3, 4])
    label = bytes([6, 3, 2, 0, 2])
    box = bytes([6, 1, 4, 0, 1, 1, 5, 5])
    mask = bytes([6, 0, 13, 0, *range(16)])
    nothing = bytes([0])
    for parts in (
        (click, label, nothing, nothing),
        (nothing, nothing, box, nothing),
        (click, label, box, mask),
        (bytes([2, *click[1:]]), bytes([3, *label[1:]]), bytes([5, *box[1:]]), nothing),
    ):
        yield b"".join(parts) + b"\1"


_SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "manifest": _manifests,
    "sidecar": _sidecars,
    "embedding": _embeddings,
    "onnx": _onnx_files,
    "onnx_differential": _onnx_files,
    "parity": _records,
    "verdict": _verdicts,
    "image": _images,
    "prompts": _prompt_bytes,
}
