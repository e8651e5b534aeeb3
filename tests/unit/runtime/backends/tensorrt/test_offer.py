"""Which engines serve: fit, proof at first load, refusal by rule, and what the errors say."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import cpu_kernels
from tests.support.fake_tensorrt import Perturbation
from tests.support.tensorrt_helpers import Rig, make_rig

import sam3rt
from sam3rt.backends.create import create_backend
from sam3rt.backends.options import BackendOptions
from sam3rt.backends.tensorrt.driver import probe
from sam3rt.backends.tensorrt.offer import TensorRtBackend
from sam3rt.backends.tensorrt.sidecar import write_sidecar
from sam3rt.bundle import Bundle, file_entry
from sam3rt.cli import main
from sam3rt.errors import BackendError, InvalidInputError, VerificationError

Outputs = dict[str, NDArray[Any]]


@pytest.fixture
def rig(tiny_sam3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return make_rig(tiny_sam3, tmp_path, monkeypatch)


def opened(bundle: Bundle, **options: Any) -> TensorRtBackend:
    backend = create_backend("tensorrt", bundle, BackendOptions(**options))
    assert isinstance(backend, TensorRtBackend)
    return backend


def forbid_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3rt.accuracy.select.verify", lambda *_: pytest.fail("proved again"))


def with_cosine(cosine: float) -> Perturbation:
    """Noise that leaves features with about the given cosine to the right ones."""

    def perturb(outputs: Outputs) -> None:
        rng = np.random.default_rng(1)
        for name, array in outputs.items():
            if name.startswith("image_embeddings"):
                noise = rng.normal(0, array.std(), array.shape).astype(np.float32)
                ratio = np.sqrt(1 / cosine**2 - 1)
                array += noise * (ratio * np.linalg.norm(array) / np.linalg.norm(noise))

    return perturb


def one_nan(outputs: Outputs) -> None:
    for array in outputs.values():
        array.flat[array.size // 2] = np.nan


# What else fails the gate stands in accuracy/test_select.py.
FAILURES: dict[str, tuple[Perturbation, str]] = {
    "cosine 0.9": (with_cosine(0.9), "encoder"),
    "NaN features": (one_nan, "encoder"),
    "NaN logits": (one_nan, "decoder"),
}


def test_a_set_is_proved_once_on_this_machine(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.build("fp16", state="unproven")
    backend = opened(rig.bundle)
    assert (backend.name, backend.device, backend.precision) == ("tensorrt", "cuda:0", "fp16")
    forbid_proofs(monkeypatch)
    assert opened(rig.bundle).precision == "fp16"


def test_a_load_writes_nothing_into_a_bundle(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever rebuilds engines meanwhile would be written over."""
    rig.perturbations["wrong"] = with_cosine(0.5)
    rig.engine("encoder", "fp16", state="unproven", perturbation="wrong")
    rig.build("fp32", state="unproven", gpu=None, targets=("8.6", "8.9"))

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in rig.bundle.path.rglob("*") if p.is_file()}

    before = content()
    assert opened(rig.bundle).precision == "fp32"
    assert content() == before
    # In a copy of the bundle from before, too, it need not be proved again.
    forbid_proofs(monkeypatch)
    assert opened(rig.bundle).precision == "fp32"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_wrong_engine_is_refused_and_the_next_one_used(failure: str, rig: Rig) -> None:
    perturb, role = FAILURES[failure]
    rig.perturbations["wrong"] = perturb
    rig.engine(role, "fp16", state="unproven", perturbation="wrong")
    rig.build("fp32", state="unproven")
    backend = opened(rig.bundle)
    assert backend.precision == "fp32"
    # Nothing of the refused one is left on the GPU.
    assert rig.cuda.live["streams"] == 1


def test_nothing_wrong_is_ever_served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.perturbations["wrong"] = with_cosine(0.5)
    rig.build("fp16", state="unproven", perturbation="wrong")
    with pytest.raises(VerificationError, match=r"cosine 0\.[45]"):
        opened(rig.bundle)
    # It stays refused, without another run.
    forbid_proofs(monkeypatch)
    with pytest.raises(VerificationError, match=r"cosine 0\.[45]"):
        opened(rig.bundle)
    # Whatever sidecars say.
    rig.build("fp16", state="proven", perturbation="wrong")
    with pytest.raises(VerificationError, match=r"fails the gate .*cosine 0\.[45]"):
        sam3rt.load_model(rig.bundle.path, backend="tensorrt", check_files=False)


def test_a_pair_that_was_never_proved_together_is_proved(rig: Rig) -> None:
    first = rig.build("fp16")
    rig.engine("encoder", "fp32")
    first["encoder"].path.unlink()
    backend = opened(rig.bundle)
    assert backend.precision == "fp32+fp16"


def test_a_decoder_is_not_blamed_for_what_the_encoder_lacks(rig: Rig) -> None:
    """Features just within the limits may be too far off for a decoder that is right."""

    def outlier(outputs: Outputs) -> None:
        for name, array in outputs.items():
            if name.startswith("image_embeddings"):
                # Within the cosine's limit, and below the subsampling of the parity record.
                array[:, 1::4] += 0.6 * np.abs(array).max()

    rig.perturbations["outlier"] = outlier
    rig.engine("encoder", "fp16", state="unproven", perturbation="outlier")
    rig.engine("decoder", "fp16", state="unproven")
    rig.engine("encoder", "fp32", state="unproven")
    backend = opened(rig.bundle)
    assert backend.precision == "fp32+fp16"


def test_a_changed_engine_file_is_passed_over(rig: Rig) -> None:
    engines = rig.build("fp16")
    rig.build("fp32")
    path = engines["encoder"].path
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    assert opened(rig.bundle).engines.encoder.sidecar.recipe == "fp32"
    with pytest.raises(BackendError, match=r"engine\.sha256 is .* in the sidecar.*build it again"):
        opened(rig.bundle, precision="fp16")


def test_an_engine_that_tensorrt_cannot_read_is_passed_over(rig: Rig) -> None:
    engines = rig.build("fp16")
    path = engines["encoder"].path
    path.write_bytes(b"not an engine")
    entry = file_entry(path)
    write_sidecar(path, msgspec.structs.replace(engines["encoder"].sidecar, engine=entry))
    with pytest.raises(BackendError, match=r"cannot load .*wrong magic number; build it again"):
        opened(rig.bundle)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tensorrt_version", "10.3.0", r"tensorrt_version is 10\.3\.0, here it is 10\.16\.0"),
        ("backend", "tensorrt-rtx", r"no tensorrt engines"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(
    field: str, value: Any, message: str, rig: Rig
) -> None:
    rig.build(**{field: value})
    with pytest.raises(BackendError, match=message) as caught:
        opened(rig.bundle)
    assert f"sam3rt build {rig.bundle.path} --backend tensorrt" in str(caught.value)


def test_a_gpu_without_enough_memory(rig: Rig) -> None:
    rig.build()
    rig.cuda.total = 5000
    with pytest.raises(BackendError, match=r"out of device memory: .*GiB were asked for"):
        opened(rig.bundle)
    # The exception's traceback is a cycle, whose objects are finalized in any order.
    gc.collect()
    assert rig.cuda.used == 0


def test_there_is_no_tensorrt_on_the_cpu(rig: Rig) -> None:
    rig.build()
    with pytest.raises(InvalidInputError, match="device"):
        create_backend("tensorrt", rig.bundle, BackendOptions(device="cpu"))


def test_engines_without_a_driver_are_refused_before_anything_is_loaded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real on this machine: there is no driver."""

    def no_driver(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    rig.build()
    module = "sam3rt.backends.tensorrt.offer"
    monkeypatch.setattr(f"{module}.probe", lambda index=0: probe(index, no_driver))
    monkeypatch.setattr(f"{module}.open_platform", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        opened(rig.bundle)


def test_auto_takes_a_proven_set_and_says_so(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.build("fp16")
    model = sam3rt.load_model(rig.bundle.path, check_files=False)
    assert model.backend.name == "tensorrt"
    assert "chose tensorrt on cuda:0" in caplog.text


def test_auto_falls_to_the_next_backend_and_says_why(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.perturbations["wrong"] = with_cosine(0.5)
    rig.build("fp16", state="unproven", perturbation="wrong")
    # It is a warning, that of engines which do not serve: neither INFO nor every backend that is
    # not installed.
    model = sam3rt.load_model(rig.bundle.path, check_files=False)
    assert model.backend.name not in ("tensorrt", "tensorrt-rtx")
    assert "not tensorrt on cuda: fp16 fails the gate on this machine" in caplog.text
    assert "tensorrt-rtx" not in caplog.text
    caplog.clear()
    rig.build("fp16", tensorrt_version="10.3.0")
    sam3rt.load_model(rig.bundle.path, check_files=False)
    assert "not tensorrt on cuda: none of 1 encoder engines" in caplog.text


def test_a_faster_recipe_that_does_not_serve_is_said_aloud_once(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.perturbations["wrong"] = with_cosine(0.5)
    rig.build("fp16", state="unproven", perturbation="wrong")
    rig.build("fp32", state="unproven")
    assert opened(rig.bundle).precision == "fp32+fp16"
    assert "tensorrt: not fp16: fp16 fails the gate" in caplog.text
    caplog.clear()
    assert opened(rig.bundle).precision == "fp32+fp16"
    assert not caplog.records


def test_precision_insists(rig: Rig) -> None:
    rig.build("fp16")
    rig.build("fp32")
    assert opened(rig.bundle).precision == "fp16"
    assert opened(rig.bundle, precision="fp32").precision == "fp32"
    assert opened(rig.bundle, precision="fp16+fp32").precision == "fp16+fp32"
    with pytest.raises(
        BackendError, match=r"recipe is fp\d+, tf32 was asked for.*--precision tf32"
    ):
        opened(rig.bundle, precision="tf32")


@pytest.mark.parametrize(
    ("kernel", "message", "left"),
    [
        (
            "resize_image",
            "resizing images is left to the host: image 0 pixels: error",
            (False, True),
        ),
        (
            "make_masks",
            "making masks is left to the host: image 0 above 0.0",
            (True, False),
        ),
        (
            "clean_logits",
            "making masks is left to the host: image 0 above 1.5",
            (True, False),
        ),
    ],
)
def test_wrong_kernels_are_left_to_the_host(
    kernel: str,
    message: str,
    left: tuple[bool, bool],
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig.build()
    right = cpu_kernels.run

    def wrong(name: str, job: int) -> None:
        if name != kernel:
            right(name, job)

    monkeypatch.setattr(cpu_kernels, "run", wrong)
    imaging = opened(rig.bundle).imaging
    assert (imaging.preprocess_allowed, imaging.postprocess_allowed) == left
    assert message in caplog.text


def test_without_a_compiler_the_host_does_what_surrounds_the_network(
    rig: Rig, caplog: pytest.LogCaptureFixture, chelsea: NDArray[np.uint8]
) -> None:
    rig.build()
    rig.cuda.compiles = False
    backend = opened(rig.bundle)
    assert not backend.imaging.preprocess_allowed
    assert not backend.imaging.postprocess_allowed
    assert "resized on the host: cuda-python has no NVRTC" in caplog.text
    model = sam3rt.SegmentationModel(rig.bundle, backend)
    prompts = sam3rt.Prompts([[225, 150]], [1])
    for _ in range(2):
        _, masks = model.segment(model.encode(chelsea), prompts, max_hole_area=8)
        assert masks.shape == (1, 3, *chelsea.shape[:2])
    assert rig.cuda.count("kernel") == 0


@pytest.mark.parametrize(("role", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_an_engine_of_another_graph_is_refused(role: str, other: str, rig: Rig) -> None:
    engines = rig.build()
    engines[role].path.write_bytes(engines[other].path.read_bytes())
    entry = file_entry(engines[role].path)
    write_sidecar(
        engines[role].path,
        msgspec.structs.replace(engines[role].sidecar, engine=entry, state="unproven"),
    )
    with pytest.raises(BackendError, match=f"the {role} engine has inputs .*: build it again"):
        opened(rig.bundle)


def test_info_lists_gpus_and_engines(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.build("fp16", state="unproven")
    monkeypatch.setattr("sam3rt.cli.info.probe_all", lambda: (rig.platform.device,))
    assert main(["info", str(rig.bundle.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpus"][0].startswith("NVIDIA Fake 9000 (compute capability 8.9, 4.3 GB")
    assert [entry.split("/")[-1].split(",")[0] for entry in document["engines"]] == [
        "decoder.engine (unproven",
        "encoder.engine (unproven",
    ]
