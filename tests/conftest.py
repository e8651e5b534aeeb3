"""Fixtures shared by all tests. What needs PyTorch is imported only where it is used."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Tests run side by side, one process a core. What they compute is small: more threads would only
# wait for each other. Read by NumPy, PyTorch and child processes, so set before any is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

import sam3rt
from sam3rt.backends import create
from sam3rt.bundle.default import default_bundle_path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
PHOTOS = ROOT / "tests" / "photos"

from tests.golden.sam2 import synthetic as sam2_synthetic  # noqa: E402
from tests.golden.sam3 import synthetic  # noqa: E402
from tests.support import disk_cache  # noqa: E402
from tests.support.helpers import photo  # noqa: E402

# `make test-full` asks for the second one with --hypothesis-profile. Fixtures that only hold data
# may be shared by all examples of a property.
_COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("quick", _COMMON, max_examples=25)
settings.register_profile("full", _COMMON, max_examples=200)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Give ONNX Runtime's sessions one thread unless a test asks for more."""
    import onnxruntime

    class SessionOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", SessionOptions)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own: verdicts of this machine are neither used nor made."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def auto_order() -> Iterator[tuple[tuple[str, str], ...]]:
    """Let ``auto`` pass over OpenVINO: golden limits hold for FP32, and it may choose BF16.

    Tests of OpenVINO ask for it by name, or put this order back.
    """
    original = create.AUTO_ORDER
    with pytest.MonkeyPatch.context() as patch:
        order = tuple(entry for entry in original if entry[0] != "openvino")
        patch.setattr(create, "AUTO_ORDER", order)
        yield original


def _export(
    name: str,
    tensors: Callable[[], dict[str, Any]],
    *data: Path,
    images: int = 1,
    meanwhile: Callable[[], object] = lambda: None,
) -> Path:
    """A folder with a checkpoint and its bundle, both called ``name``, made once for many runs.

    ``progress.json`` in it holds the lines that the export told of its progress.

    Args:
        name: what the folder, the checkpoint and the bundle are called.
        tensors: gives the checkpoint.
        data: files that it is made from, beside those of the small SAM 3.
        images: how many images the parity record holds; each is run in full resolution.
        meanwhile: what to do while another process makes the export.
    """

    def make(folder: Path) -> None:
        import torch
        from tests.support import export_helpers

        from sam3rt_export import ExportOptions, export_bundle

        checkpoint, told = folder / f"{name}.pt", []
        torch.save({key: torch.as_tensor(array) for key, array in tensors().items()}, checkpoint)
        options = ExportOptions(parity_images=export_helpers.parity_images(images))
        export_bundle(checkpoint, folder / name, options, told.append)
        (folder / "progress.json").write_text(json.dumps(told))

    sources = ("runtime/sam3rt", "export/sam3rt_export", "tests/golden/sam3")
    helpers = ROOT / "tests" / "support" / "export_helpers.py"
    own = [synthetic.FOLDER / name for name in ("keys.tsv", "freqs_cis.npz", "cases.json")]
    libraries = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch")
    files = [*disk_cache.python_files(*sources), helpers, *own, *data]
    return _made_once(name, make, files, libraries, meanwhile)


def _made_once(
    name: str,
    make: Callable[[Path], None],
    files: list[Path],
    libraries: tuple[str, ...],
    meanwhile: Callable[[], object] = lambda: None,
) -> Path:
    """A folder of an export, made once for many runs while files and libraries stay the same.

    Where PyTorch is not installed, ``SAM3RT_TEST_EXPORTS`` names the folder into which another
    environment made it.
    """
    given = os.environ.get("SAM3RT_TEST_EXPORTS")
    if given:
        return Path(given) / name
    return disk_cache.cached_folder(name, disk_cache.key_of(files, libraries), make, meanwhile)


def _if_needed(request: pytest.FixtureRequest, name: str) -> Callable[[], object]:
    """Makes another fixture, where a test of this run is going to ask for it."""

    def make() -> None:
        if any(name in getattr(item, "fixturenames", ()) for item in request.session.items):
            request.getfixturevalue(name)

    return make


def _copied(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a kept bundle, for engines may come to lie in it."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("bundles") / bundle.name))


@pytest.fixture(scope="session")
def export_once() -> Callable[..., Path]:
    """Exports a model once for many runs; see :func:`_export`."""
    return _export


@pytest.fixture(scope="session")
def small_export(request: pytest.FixtureRequest) -> Path:
    """Checkpoint and bundle of the golden data's small SAM 3."""
    meanwhile = _if_needed(request, "small_sam2_export")
    return _export("sam3_small", synthetic.checkpoint, meanwhile=meanwhile)


@pytest.fixture(scope="session")
def small_checkpoint(small_export: Path) -> Path:
    """The golden data's small SAM 3 as a file in ``sam3.pt``'s format."""
    return small_export / "sam3_small.pt"


@pytest.fixture(scope="session")
def small_bundle(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small SAM 3 as a bundle."""
    return _copied(small_export / "sam3_small", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_export(request: pytest.FixtureRequest) -> Path:
    """Checkpoint and bundle of a SAM 3 of 8x8 pixels."""

    def tensors() -> dict[str, Any]:
        from tests.support.export_helpers import tiny_tensors

        return dict(tiny_tensors())

    meanwhile = _if_needed(request, "small_export")
    return _export("sam3_tiny", tensors, images=2, meanwhile=meanwhile)


@pytest.fixture(scope="session")
def tiny_sam3(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SAM 3 of 8x8 pixels as a bundle, which runs in no time."""
    return _copied(tiny_export / "sam3_tiny", tmp_path_factory)


@pytest.fixture
def tiny_copy(tiny_sam3: Path, tmp_path: Path) -> Path:
    """A copy of the SAM 3 of 8x8 pixels, to be changed."""
    return Path(shutil.copytree(tiny_sam3, tmp_path / "copy"))


@pytest.fixture(scope="session")
def small_sam2(small_sam2_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden data's small SAM 2.1 as a bundle."""
    return _copied(small_sam2_export / "sam2_small", tmp_path_factory)


@pytest.fixture(scope="session")
def small_sam2_export() -> Path:
    """The folder of that bundle, exported once for many runs."""

    def make(folder: Path) -> None:
        from tests.support.export_helpers import parity_images, small_sam2_model

        from sam3rt_export import ExportOptions, export_bundle

        options = ExportOptions(parity_images=parity_images(1))
        export_bundle(small_sam2_model(), folder / "sam2_small", options)

    sources = ("runtime/sam3rt", "export/sam3rt_export", "tests/golden/sam2")
    helpers = ROOT / "tests" / "support" / "export_helpers.py"
    data = [sam2_synthetic.FOLDER / name for name in ("keys.tsv", "cases.json")]
    libraries = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")
    files = [*disk_cache.python_files(*sources), helpers, *data]
    return _made_once("sam2_small", make, files, libraries)


@pytest.fixture(scope="session")
def exports(
    small_export: Path,
    tiny_export: Path,
    small_sam2_export: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The bundles that only PyTorch can make, for environments without it."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "sam3_small").symlink_to(small_export)
    (folder / "sam3_tiny").symlink_to(tiny_export)
    (folder / "sam2_small").symlink_to(small_sam2_export)
    return folder


@pytest.fixture(scope="session")
def small_model(small_bundle: Path) -> sam3rt.SegmentationModel:
    """The small SAM 3 in the runtime, on the CPU."""
    return sam3rt.load_model(small_bundle, device="cpu")


@pytest.fixture(scope="session")
def default_model() -> sam3rt.SegmentationModel:
    """The bundled MobileSAM, on the CPU."""
    return sam3rt.load_model(device="cpu")


def _on_onnxruntime(bundle: Path) -> sam3rt.SegmentationModel:
    return sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")


@pytest.fixture(scope="session")
def tiny_model(tiny_sam3: Path) -> sam3rt.SegmentationModel:
    """The SAM 3 of 8x8 pixels, on the CPU."""
    return _on_onnxruntime(tiny_sam3)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> sam3rt.SegmentationModel:
    """A few nodes on 8x8 pixels with MobileSAM's rules, on the CPU."""
    from tests.support.runnable_bundle import runnable_bundle

    bundle = runnable_bundle(tmp_path_factory.mktemp("bundles") / "toy", "mobile_sam")
    return _on_onnxruntime(bundle.path)


@pytest.fixture(params=["small", "default"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """The small SAM 3's bundle, then the bundled MobileSAM's."""
    path: Path = (
        request.getfixturevalue("small_bundle")
        if request.param == "small"
        else default_bundle_path()
    )
    return path


@pytest.fixture(scope="module", params=["tiny_model", "toy_model"])
def model(request: pytest.FixtureRequest) -> sam3rt.SegmentationModel:
    """The rules of SAM 3 and of MobileSAM in turn, on models that run in no time."""
    chosen: sam3rt.SegmentationModel = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="session")
def golden_images() -> dict[int, NDArray[np.uint8]]:
    """The golden data's images by number, checked against their hashes."""
    return _drawn(synthetic.cases()["images"])


@pytest.fixture(scope="session")
def sam2_images() -> dict[int, NDArray[np.uint8]]:
    """Those of SAM 2's golden data."""
    return _drawn(sam2_synthetic.cases()["images"])


@pytest.fixture(scope="session")
def sam3_embeddings(
    small_model: sam3rt.SegmentationModel, golden_images: dict[int, NDArray[np.uint8]]
) -> dict[int, sam3rt.ImageEmbedding]:
    """One per golden image of SAM 3; image 1 goes in as a PIL image, as in the reference."""
    return {
        number: small_model.encode(PIL.Image.fromarray(image) if number == 1 else image)
        for number, image in golden_images.items()
    }


@pytest.fixture(scope="session")
def mobile_embeddings(default_model: sam3rt.SegmentationModel) -> dict[str, sam3rt.ImageEmbedding]:
    """One for each photograph, by the bundled MobileSAM."""
    names = [path.stem for path in sorted(PHOTOS.glob("*.png"))]
    return {name: default_model.encode(photo(name)) for name in names}


def _drawn(entries: dict[str, Any]) -> dict[int, NDArray[np.uint8]]:
    images = {}
    for number, entry in entries.items():
        array = synthetic.image(entry["seed"], entry["height"], entry["width"])
        assert hashlib.sha256(array.tobytes()).hexdigest() == entry["sha256"]
        images[int(number)] = array
    return images


@pytest.fixture(scope="session")
def chelsea() -> NDArray[np.uint8]:
    """A photograph of a cat, 300 x 451 pixels."""
    return photo("chelsea")


def pytest_collection_finish() -> None:
    """Take what was imported and collected out of the garbage collector's sight.

    There are millions of such objects, and they stay: walking through them again and again would
    take a good part of the time of tests that make many objects.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of the C++ runtime where it has not been built for them."""
    if os.environ.get("SAM3RT_CPP_BUILDS"):
        return
    reason = "the C++ runtime is tested by `make test-cpp`, which builds it first"
    for item in items:
        if ROOT / "tests" / "cpp" in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cpp_builds() -> Path:
    """The folder of the C++ runtime's builds, which ``make test-cpp`` names.

    What is missing in it is an error.
    """
    return Path(os.environ["SAM3RT_CPP_BUILDS"]).resolve()


@pytest.fixture(scope="session")
def library(cpp_builds: Path) -> Any:
    """The shared C++ library, loaded into this process for its C interface."""
    from tests.support.c_library import Library

    return Library(cpp_builds)


@pytest.fixture(scope="session")
def cpp_build(
    request: pytest.FixtureRequest, cpp_builds: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The C++ runtime with AddressSanitizer and UBSan, or the build that a test names: what
    computes is tested as users build it too, see ``EACH_BUILD``. An emulator has that one alone."""
    from tests.support.cpp_driver import EMULATOR, Build

    name = getattr(request, "param", "release" if EMULATOR else "address")
    return Build(cpp_builds / name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def sam3_golden(
    cpp_builds: Path, small_bundle: Path, golden_images: dict[int, NDArray[np.uint8]]
) -> Any:
    """SAM 3's golden cases as calls, with the Python runtime's results."""
    from tests.support import golden_calls

    return golden_calls.sam3_golden(_on_onnxruntime(small_bundle), golden_images)


@pytest.fixture(scope="session")
def sam2_golden(
    cpp_builds: Path, small_sam2: Path, sam2_images: dict[int, NDArray[np.uint8]]
) -> Any:
    """SAM 2's golden cases as calls, with the Python runtime's results."""
    from tests.support import golden_calls

    return golden_calls.sam2_golden(_on_onnxruntime(small_sam2), sam2_images)


@pytest.fixture(scope="session")
def mobile_sam_golden(cpp_builds: Path) -> Any:
    """MobileSAM's golden cases as calls, with the Python runtime's results."""
    from tests.support import golden_calls

    photos = {path.stem: photo(path.stem) for path in sorted(PHOTOS.glob("*.png"))}
    return golden_calls.mobile_sam_golden(_on_onnxruntime(default_bundle_path()), photos)


@pytest.fixture(scope="session", params=["sam3_golden", "sam2_golden", "mobile_sam_golden"])
def golden(request: pytest.FixtureRequest) -> Any:
    """All sets of golden calls in turn."""
    return request.getfixturevalue(request.param)
