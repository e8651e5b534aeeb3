"""What several of the runtime's test files share. Imports neither PyTorch nor a backend."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sam3rt import SegmentationModel
from sam3rt.backends.base import Backend
from sam3rt.bundle import (
    FORMAT,
    FORMAT_VERSION,
    NO_FINGERPRINT,
    Bundle,
    GraphSpec,
    ImageSpec,
    Manifest,
    MaskSpec,
    ParityLimits,
    ParitySpec,
    PromptSpec,
    SourceSpec,
    TensorSpec,
    file_entry,
    open_bundle,
    write_manifest,
)
from sam3rt.bundle.contract import is_feature_name
from sam3rt.bundle.default import default_bundle_path
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden"

SAM3_IMAGE = ImageSpec((1008, 1008), "stretch", "float32", (127.5,) * 3, (127.5,) * 3)
MOBILE_IMAGE = ImageSpec(
    (1024, 1024), "longest_side", "uint8", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
)
SAM3_PROMPTS = PromptSpec("before_points", "always", (288, 288))
MOBILE_PROMPTS = PromptSpec("after_points", "without_box", (256, 256))
SAM3_MASKS = MaskSpec(3, (288, 288), 32.0, "direct", 256.0)
MOBILE_MASKS = MaskSpec(3, (256, 256), None, "unpad", 0.0)


def examples(count: int) -> settings:
    """Settings for a property with ``count`` examples, of which the quick profile tries a quarter.

    The profiles in ``tests/conftest.py`` differ in ``max_examples``; 100 is the measure.
    """
    return settings(max_examples=max(5, count * settings().max_examples // 100))


def label(value: object) -> str:
    """A value as the id of a test: its ``repr`` without addresses, which no workers share."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def photo(name: str) -> NDArray[np.uint8]:
    """A test photograph, uint8 [H, W, 3]."""
    with PIL.Image.open(TESTS / "photos" / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A random image, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def any_masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    """Masks of any size and density, empty and full ones among them."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    mask: NDArray[np.bool_] = rng.random((height, width)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return mask


def tiny_bundle(folder: Path, seed: int = 0) -> Manifest:
    """Make a bundle whose files hold a few random bytes: for everything but running it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in ("encoder.onnx", "encoder.data", "decoder.onnx", "parity.npz", "LICENSE"):
        (folder / name).write_bytes(rng.bytes(64))
    entry = {path.name: file_entry(path) for path in folder.iterdir()}
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, 1008, 1008))
    features = TensorSpec("image_embeddings.0", "float32", ("batch", 256, 72, 72))
    points = TensorSpec("input_points", "float32", (1, "num_objects", "num_points", 2))
    masks = TensorSpec("pred_masks", "float32", (1, "num_objects", 3, 288, 288))
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        fingerprint=NO_FINGERPRINT,
        export_id=hashlib.sha256(bytes([seed])).hexdigest(),
        name="tiny ☃",
        model_type="sam3",
        weights="float32",
        source=SourceSpec("test", "nowhere", "", "MIT", entry["LICENSE"]),
        image=SAM3_IMAGE,
        prompts=SAM3_PROMPTS,
        masks=SAM3_MASKS,
        encoder=GraphSpec(
            entry["encoder.onnx"], (entry["encoder.data"],), 18, 7, (pixels,), (features,)
        ),
        decoder=GraphSpec(entry["decoder.onnx"], (), 18, 9, (features, points), (masks,)),
        parity=ParitySpec(entry["parity.npz"], ParityLimits(5e-4, 0.999999, 1e-3, 1e-3, 0.998)),
        producer={"sam3rt": "0", "test": "1"},
    )
    return write_manifest(folder, manifest)


def read_document(folder: Path) -> dict[str, Any]:
    """The parsed ``bundle.json`` of a folder."""
    parsed: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    return parsed


def sign(document: dict[str, Any]) -> bytes:
    """A manifest's bytes with the fingerprint that the format asks for, whatever it holds."""
    blank = copy.deepcopy(document)
    blank["fingerprint"] = "0" * 64
    text = json.dumps(blank)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply a change to a folder's manifest and make its fingerprint fit again."""
    document = read_document(folder)
    change(document)
    (folder / "bundle.json").write_bytes(sign(document))


def relist(folder: Path) -> None:
    """Make a folder's manifest vouch for the files as they are now."""

    def refresh(value: Any) -> None:
        if isinstance(value, dict) and set(value) == {"file", "sha256", "bytes"}:
            value.update(msgspec.structs.asdict(file_entry(folder / value["file"])))
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                refresh(inner)

    edit_manifest(folder, refresh)


def external_weights(folder: Path, source: Path | None = None) -> Bundle:
    """A bundle, or the bundled model, with its decoder's large weights in a file beside it."""
    import onnx  # not in every environment that runs the tests of the runtime

    shutil.copytree(source or default_bundle_path(), folder)
    onnx.save(
        onnx.load(folder / "decoder.onnx"),
        folder / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.data",
        size_threshold=1024,
    )
    document = read_document(folder)
    document["decoder"]["external_data"] = [{"file": "decoder.data", "sha256": "", "bytes": 0}]
    (folder / "bundle.json").write_bytes(sign(document))
    relist(folder)
    return open_bundle(folder)


def one_image_form(folder: Path, source: Path) -> Bundle:
    """A bundle as earlier versions wrote it: its decoder takes the maps of one image alone."""
    import onnx

    shutil.copytree(source, folder)
    decoder = onnx.load(folder / "decoder.onnx")
    for value in decoder.graph.input:
        if is_feature_name(value.name):
            value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(decoder, folder / "decoder.onnx")
    document = read_document(folder)
    for entry in document["decoder"]["inputs"]:
        if is_feature_name(entry["name"]):
            entry["shape"][0] = 1
    (folder / "bundle.json").write_bytes(sign(document))
    relist(folder)
    return open_bundle(folder)


def flip(content: bytes, bit: int) -> bytes:
    """The content with one bit inverted."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class WrappedBackend(Backend):
    """A backend whose features and outputs are changed on the way.

    Args:
        inner: the backend that does the work.
        on_encode: changes the feature maps.
        on_decode: changes the decoder's outputs, given by name.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        on_encode: Callable[[list[NDArray[np.float32]]], list[NDArray[np.float32]]] | None = None,
        on_decode: Callable[[dict[str, NDArray[np.float32]]], object] | None = None,
    ) -> None:
        super().__init__(inner.bundle, inner.device, inner.precision)
        self.name = inner.name
        self._inner = inner
        self._on_encode = on_encode
        self._on_decode = on_decode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def upload(self, maps: Sequence[NDArray[np.float32]]) -> Features:
        return self._inner.upload(maps)

    def prepare(self) -> None:
        self._inner.prepare()

    def versions(self) -> dict[str, str]:
        return self._inner.versions()

    def _encode(self, pixels: NDArray[np.float32]) -> Features:
        features = self._inner.encode(pixels)
        if self._on_encode is None:
            return features
        return self._inner.upload(self._on_encode(list(features.numpy())))

    def _decode(
        self, features: Features, prompts: PackedPrompts, outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        found = self._inner.decode(features, prompts, outputs)
        if self._on_decode is None:
            return found
        named = {name: array.copy() for name, array in zip(outputs, found, strict=True)}
        self._on_decode(named)
        return [named[name] for name in outputs]


def wrapped(model: SegmentationModel, **changes: Any) -> SegmentationModel:
    """The model over a :class:`WrappedBackend`."""
    return SegmentationModel(model.bundle, WrappedBackend(model.backend, **changes))
