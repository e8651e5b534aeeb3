"""Every way in which this machine's GPU can run a model, each loaded once.

``SAM3RT_FAKE_GPU=1`` runs these tests on the fake GPU instead: it shows that the tests themselves
are in order, and nothing about any GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.support.fake_cuda import FakeCuda
from tests.support.tensorrt_helpers import DRIVER, GPU

from sam3rt import BackendError, GpuOptions, SegmentationModel, load_model, open_bundle
from sam3rt.accuracy.gate import judge, limits_for
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.backends.onnxruntime.typed import TYPED_ORDER, Graphs, find_typed
from sam3rt.backends.tensorrt.cuda import Cuda
from sam3rt.backends.tensorrt.driver import Device, probe, probe_all

FAKE = os.environ.get("SAM3RT_FAKE_GPU") == "1"
FOLDER = Path(__file__).parent
# A library, and for ONNX Runtime the recipe and whether runs are recorded as CUDA graphs.
WAYS = (
    "stand-in",
    *(
        f"onnxruntime {recipe}{graphs}"
        for recipe in (*TYPED_ORDER, "tf32", "fp32")
        for graphs in ("", " without graphs")
    ),
    "tensorrt",
    "tensorrt-rtx",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in item.path.parents]
    reason = ""
    if own and not FAKE:
        try:
            probe_all()
        except BackendError as error:
            reason = f"there is no GPU to test: {error}"
    for item in own:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


class Card(NamedTuple):
    """A GPU."""

    cuda: Cuda
    device: Device
    used: Callable[[], int]


@pytest.fixture(scope="session")
def card() -> Card:
    """The first GPU."""
    if FAKE:
        fake = FakeCuda()
        return Card(fake, Device(0, GPU, fake.total, DRIVER, (13, 0)), lambda: fake.used)
    cuda = Cuda(0)

    def used() -> int:
        from cuda.bindings import runtime

        with cuda.active():
            status, free, total = runtime.cudaMemGetInfo()
        assert int(status) == 0
        return int(total) - int(free)

    return Card(cuda, probe(0), used)


@pytest.fixture(scope="session")
def consumer() -> Any:
    """A library that takes device memory by DLPack."""
    if FAKE:
        import numpy

        return numpy
    torch = pytest.importorskip("torch", reason="embeddings are handed to PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    return torch


@pytest.fixture(scope="session")
def typed_bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden data's small SAM 3 with graphs for ONNX Runtime."""
    from sam3rt_build.ort_graphs import build_typed_graphs

    path = tmp_path_factory.mktemp("gpu") / "sam3_small"
    shutil.copytree(small_bundle, path)
    build_typed_graphs(open_bundle(path), TYPED_ORDER)
    return path


@pytest.fixture(scope="module", params=WAYS)
def model(
    request: pytest.FixtureRequest, card: Card, typed_bundle: Path
) -> Iterator[SegmentationModel]:
    """The small SAM 3, in one way after another; what is not installed is skipped."""
    name, _, rest = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if name == "stand-in":
            found = _stand_in(typed_bundle, card)
        elif name == "onnxruntime":
            recipe, _, without = rest.partition(" ")
            found = _onnxruntime(typed_bundle, card, recipe, not without, patch)
        else:
            found = _tensorrt(typed_bundle, name)
        yield found
        found.close()


def _stand_in(path: Path, card: Card) -> SegmentationModel:
    torch = pytest.importorskip("torch", reason="PyTorch stands in for TensorRT")
    if not FAKE and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    from tests.support.torch_lanes import StandInBackend

    bundle = open_bundle(path)
    return SegmentationModel(bundle, StandInBackend(bundle, card.cuda, card.device))


def _onnxruntime(
    path: Path, card: Card, recipe: str, records: bool, patch: pytest.MonkeyPatch
) -> SegmentationModel:
    ort = pytest.importorskip("onnxruntime")
    if FAKE:
        from tests.support.fake_onnxruntime import FakeProvider

        assert isinstance(card.cuda, FakeCuda)
        if recipe == "bf16":
            pytest.skip("ONNX Runtime on the CPU has no BF16")
        FakeProvider(card.cuda).install(patch)
    elif "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA: pip install onnxruntime-gpu")
    from sam3rt.backends.onnxruntime.lanes import OnnxRuntimeLanes

    bundle = open_bundle(path)
    known = {graphs.precision: graphs for graphs in find_typed(bundle)}
    known |= {"tf32": Graphs(bundle, "tf32", tf32=True), "fp32": Graphs(bundle)}
    backend = OnnxRuntimeLanes(bundle, known[recipe], card.device, GpuOptions(), records=records)
    return SegmentationModel(bundle, backend)


def _tensorrt(path: Path, name: str) -> SegmentationModel:
    if FAKE or importlib.util.find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed")
    from sam3rt_build.build import BuildOptions, build_bundle
    from sam3rt_build.errors import BuildError

    try:
        build_bundle(open_bundle(path), BuildOptions(backend=name))  # type: ignore[arg-type]
    except BuildError as error:
        if "no precision passes" in str(error):
            raise
        pytest.skip(f"{name} cannot build here: {error}")
    return load_model(path, backend=name)


def passes_the_gate(model: SegmentationModel) -> str:
    """How a model fails its gate, or nothing."""
    manifest = model.manifest
    limits = limits_for(manifest, model.backend.precision)
    verdict = judge(verify(model.backend, manifest, load_record(model.bundle), limits))
    return "" if verdict.passed else verdict.explain()
