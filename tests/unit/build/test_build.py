"""Builds of whole bundles with engines and verdicts made up: what is published and what is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto
from tests.support.build_helpers import toy_bundle
from tests.support.stand_in_builds import (
    DEVICE,
    FEATURES_OFF,
    FINE,
    GPU,
    MASKS_OFF,
    RTX,
    Maker,
    Prover,
    check_consistent,
    run,
    stand_in_gate,
)

from sam3rt.accuracy.gate import Verdict
from sam3rt.accuracy.verdicts import load_verdict
from sam3rt.backends.table import ENGINES
from sam3rt.backends.tensorrt.driver import Device, Gpu
from sam3rt.backends.tensorrt.engines import (
    EngineFile,
    EngineSet,
    EngineTarget,
    candidates,
    find_engines,
    subject_of,
)
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, BundleError, InvalidInputError
from sam3rt_build import build, engine_builder
from sam3rt_build.build import BuildOptions, build_bundle
from sam3rt_build.builder_process import EngineRequest
from sam3rt_build.engine_builder import graph_profile
from sam3rt_build.engines_folder import folder_name
from sam3rt_build.ep_context import wrapper_path
from sam3rt_build.errors import BuildError
from sam3rt_build.recipes import RECIPES

# Of the ladder; its features are FP16, as those of the first.
SECOND = RECIPES[1].name


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return toy_bundle(tmp_path / "toy")


def files(bundle: Bundle) -> dict[str, list[str]]:
    """What lies in the bundle's folder of engines, by folder; the lock is not counted."""
    found: dict[str, list[str]] = {}
    for path in sorted((bundle.path / ENGINES).rglob("*")):
        if path.is_dir():
            found.setdefault(path.name, [])
        elif path.name != ".lock":
            found.setdefault(path.parent.name, []).append(path.name)
    return found


def by_path(engines: Iterable[EngineFile]) -> list[EngineFile]:
    return sorted(engines, key=lambda engine: engine.path)


@pytest.fixture(autouse=True)
def gate(toy: Bundle) -> Iterator[None]:
    with stand_in_gate(toy.path.parent / "cache"):
        yield


@pytest.fixture(autouse=True)
def everything_is_consistent(toy: Bundle) -> Iterator[None]:
    yield
    if (toy.path / ENGINES).is_dir():
        check_consistent(toy)


# --- on a GPU -------------------------------------------------------------------------------------


def test_the_fastest_recipe_that_passes_is_proven_and_on_record(toy: Bundle) -> None:
    make, prove = Maker(), Prover()
    encoder, decoder = run(toy, make, prove)
    assert make.made == ["encoder fp16", "decoder fp16"]
    assert prove.seen == [("fp16", "fp16")]
    for engine, role in ((encoder, "encoder"), (decoder, "decoder")):
        sidecar = engine.sidecar
        assert (sidecar.role, sidecar.recipe, sidecar.state) == (role, "fp16", "proven")
        assert sidecar.features_dtype == "float16"
        assert sidecar.gpu == GPU
        assert sidecar.targets == ()
        assert sidecar.driver_version == "580.65"
        assert sidecar.bundle_fingerprint == toy.manifest.fingerprint
        assert sidecar.parity == {"features 0 cosine": 0.9999, "masks cosine": 0.9995}
        assert msgspec.structs.astuple(sidecar.shapes) == (
            BuildOptions.max_objects,
            BuildOptions.max_points,
            BuildOptions.max_batch,
        )
        assert sidecar.build_seconds >= 0
        assert sidecar.engine.file == f"{role}.engine"
        assert wrapper_path(engine.path).is_file()
        assert engine.path.parent.name.startswith("nvidia-test-4090-sm89-tensorrt-rtx-")
    assert encoder.sidecar.paired_with is None
    assert decoder.sidecar.paired_with == encoder.sidecar.engine.sha256
    assert list(find_engines(toy)) == by_path([encoder, decoder])
    target = EngineTarget(GPU, RTX, encoder.sidecar.tensorrt_version, "580.65")
    (fitting,) = candidates(toy, target)
    assert (fitting.encoder, fitting.decoder) == (encoder, decoder)
    # What the gate said is known to the runtime.
    verdict = load_verdict(toy, subject_of(fitting, target))
    assert verdict is not None
    assert verdict.passed
    assert verdict.figures == encoder.sidecar.parity


def test_what_is_asked_of_the_builder(toy: Bundle) -> None:
    make = Maker()
    run(toy, make, precision=("tf32",), max_objects=7, max_points=9, max_batch=4, workspace=5 << 20)
    encoder, decoder = make.requests
    assert {r.backend for r in make.requests} == {RTX}
    assert {r.workspace for r in make.requests} == {5 << 20}
    assert [r.tf32 for r in make.requests] == [True, True]
    assert {r.targets for r in make.requests} == {()}
    assert {r.device for r in make.requests} == {DEVICE.index}
    caches = {r.timing_cache for r in make.requests}
    assert len(caches) == 1
    assert Path(str(caches.pop())).parent == toy.path / ENGINES
    side = (3, 1008, 1008)
    assert encoder.profile == {"pixel_values": ((1, *side), (1, *side), (4, *side))}
    assert decoder.profile == {
        "image_embeddings.0": ((1, 8, 72, 72), (1, 8, 72, 72), (7, 8, 72, 72)),
        "input_points": ((1, 1, 1, 2), (1, 1, 4, 2), (1, 7, 9, 2)),
    }


def test_a_profile_is_never_tuned_for_more_than_its_greatest(toy: Bundle) -> None:
    profile = graph_profile(toy, "decoder", BuildOptions(max_points=2, max_objects=64))
    assert profile["input_points"] == ((1, 1, 1, 2), (1, 1, 2, 2), (1, 64, 2, 2))


def test_refused_engines_are_removed_and_their_record_is_left(toy: Bundle) -> None:
    prove = Prover(**{"fp16__any": FEATURES_OFF, f"{SECOND}__fp16": MASKS_OFF})
    encoder, decoder, *_ = run(toy, prove=prove, precision=("fp16", SECOND, "fp32"))
    assert prove.seen == [("fp16", "fp16"), (SECOND, "fp16"), (SECOND, SECOND)]
    assert (encoder.sidecar.recipe, decoder.sidecar.recipe) == (SECOND, SECOND)
    assert decoder.sidecar.paired_with == encoder.sidecar.engine.sha256
    (folder,) = (f for f in (toy.path / ENGINES).iterdir() if f.name.endswith("-fp16"))
    assert files(toy)[folder.name] == ["decoder.engine.json", "encoder.engine.json"]
    document = json.loads((folder / "encoder.engine.json").read_text())
    assert document["state"] == "refused"
    assert document["parity"]["features 0 cosine"] == 0.04
    document = json.loads((folder / "decoder.engine.json").read_text())
    assert document["state"] == "refused"
    assert document["parity"]["masks cosine"] is None


def test_what_was_built_on_the_way_and_is_not_at_fault_is_removed(toy: Bundle) -> None:
    """The FP16 encoder is never blamed by itself here: no decoder is good enough on it."""
    prove = Prover(fp16__any=MASKS_OFF)
    encoder, decoder, *_ = run(toy, prove=prove, precision=("fp16", "fp32"))
    assert (encoder.sidecar.recipe, decoder.sidecar.recipe) == ("fp32", "fp16")
    folders = files(toy)
    (fp16,) = (name for name in folders if name.endswith("-fp16"))
    assert folders[fp16] == ["decoder.engine", "decoder.engine.json", "decoder_ctx.onnx"]
    (fp32,) = (name for name in folders if name.endswith("-fp32"))
    assert "encoder.engine" in folders[fp32]
    assert "decoder.engine" not in folders[fp32]


def test_a_decoder_rebuilt_for_other_features_is_not_thrown_away(toy: Bundle) -> None:
    """The FP16 decoder for FP16 maps and the one for FP32 maps have one place between them."""
    make, prove = Maker(), Prover(fp16__any=FEATURES_OFF)
    encoder, decoder, *_ = run(toy, make, prove, precision=("fp16", "fp32"))
    assert make.made[:4] == ["encoder fp16", "decoder fp16", "encoder fp32", "decoder fp16"]
    assert (encoder.sidecar.recipe, decoder.sidecar.recipe) == ("fp32", "fp16")
    assert decoder.sidecar.features_dtype == "float32"
    assert decoder.path.read_bytes() == b"decoder fp16 float32 4"
    assert decoder in find_engines(toy)
    assert wrapper_path(decoder.path).is_file()
    inputs = onnx.load(wrapper_path(decoder.path)).graph.input
    assert inputs[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_none_passes(toy: Bundle) -> None:
    make = Maker()
    with pytest.raises(BuildError, match="no precision passes the gate") as caught:
        run(toy, make, Prover(any__any=MASKS_OFF), precision=("fp16", "tf32"))
    message = str(caught.value)
    for pair in ("fp16", "fp16+tf32", "tf32+fp16", "tf32"):
        assert f"not {pair}: " in message
    assert "masks: cosine nan, at least 0.999 allowed" in message
    assert not list((toy.path / ENGINES).rglob("*.engine"))
    assert find_engines(toy) == ()


def test_what_cannot_be_built_is_passed_over(toy: Bundle) -> None:
    make = Maker()
    make.fails = lambda what: BuildError("no kernel") if what == "encoder fp16" else None
    said: list[str] = []
    encoder, decoder, *_ = build_bundle(
        toy,
        BuildOptions(backend=RTX),
        said.append,
        make=make,
        open_pair=Prover(),
        device=DEVICE,
    )
    assert (encoder.sidecar.recipe, decoder.sidecar.recipe) == (SECOND, "fp16")
    assert "not fp16: the encoder cannot be built: no kernel" in said
    assert make.made.count("encoder fp16") == 1


def test_an_engine_is_not_built_twice(toy: Bundle) -> None:
    make = Maker()
    run(
        toy,
        make,
        Prover(**{"fp16__any": FEATURES_OFF, f"{SECOND}__any": FEATURES_OFF}),
        precision=("fp16", SECOND, "fp16-attention-tf32"),
    )
    assert make.made[:4] == [
        "encoder fp16",
        "decoder fp16",
        f"encoder {SECOND}",
        "encoder fp16-attention-tf32",
    ]


def test_a_builder_that_leaves_nothing_has_failed(toy: Bundle) -> None:
    def nothing(request: EngineRequest) -> None:
        Path(request.engine).write_bytes(b"")

    with pytest.raises(BuildError, match="the build of the encoder in fp32 left no engine"):
        build_bundle(
            toy,
            BuildOptions(backend=RTX, precision=("fp32",)),
            lambda _: None,
            make=nothing,
            open_pair=Prover(),
            device=DEVICE,
        )
    assert find_engines(toy) == ()


@pytest.mark.parametrize("when", ["encoder fp16", "decoder fp16"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left"), MemoryError()]
)
def test_an_interrupted_build_leaves_nothing_half_done(
    toy: Bundle, when: str, error: BaseException
) -> None:
    make = Maker()
    make.fails = lambda what: error if what == when else None
    with pytest.raises(type(error)):
        run(toy, make)
    assert find_engines(toy) == ()


def test_a_gate_that_breaks_leaves_nothing(toy: Bundle) -> None:
    def broken(bundle: Bundle, engines: EngineSet) -> Verdict:
        raise BackendError("out of device memory")

    with pytest.raises(BuildError, match="not fp16: out of device memory"):
        build_bundle(toy, BuildOptions(backend=RTX), make=Maker(), open_pair=broken, device=DEVICE)
    assert find_engines(toy) == ()


def test_engines_serve_on_where_a_second_build_comes_to_nothing(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped, its disk is full, or no precision of it passes."""
    engines = by_path(run(toy))
    before = files(toy)

    def full(engine: Path, sidecar: Any) -> None:
        raise OSError(28, "No space left on device")

    stopped = Maker()
    stopped.fails = lambda what: KeyboardInterrupt() if what == "decoder fp16" else None
    with pytest.raises(KeyboardInterrupt):
        run(toy, stopped)
    others = Maker()
    others.made.append("something else, so that these engines are judged by themselves")
    with pytest.raises(BuildError, match="no precision passes the gate"):
        run(toy, others, Prover(any__any=FEATURES_OFF), precision=("fp16",))
    monkeypatch.setattr(engine_builder, "write_sidecar", full)
    with pytest.raises(OSError, match="No space left"):
        run(toy)
    assert files(toy) == before
    assert list(find_engines(toy)) == engines


def test_a_second_build_waits_for_no_one(toy: Bundle) -> None:
    inside, leave = threading.Event(), threading.Event()

    class Waiting(Maker):
        def __call__(self, request: EngineRequest) -> None:
            inside.set()
            assert leave.wait(30)
            super().__call__(request)

    built: list[tuple[Any, ...]] = []
    first = threading.Thread(target=lambda: built.append(run(toy, Waiting(), precision=("fp32",))))
    first.start()
    assert inside.wait(30)
    try:
        with pytest.raises(BuildError, match="another build is at work in"):
            run(toy)
    finally:
        leave.set()
        first.join()
    assert len(built[0]) == 2
    run(toy)  # the lock is free again


def test_the_folder_of_a_killed_build_is_removed_by_the_next(toy: Bundle) -> None:
    lines = (
        "import os, sys",
        "from sam3rt.bundle import open_bundle",
        "from sam3rt_build.build import BuildOptions, build_bundle",
        "options = BuildOptions(backend='tensorrt-rtx', targets=('8.9',))",
        "kill = lambda request: os.kill(os.getpid(), 9)",
        "build_bundle(open_bundle(sys.argv[1]), options, make=kill)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines), str(toy.path)], check=False)
    assert done.returncode == -9
    (left,) = (toy.path / ENGINES).glob(".build-*")
    assert list(left.iterdir())
    run(toy, precision=("fp32",))
    assert not left.exists()


def test_a_half_written_file_of_a_killed_build_is_removed_by_the_next(toy: Bundle) -> None:
    folder = toy.path / ENGINES / "of-a-refused-one"
    folder.mkdir(parents=True)
    left, mine = folder / f".{'0' * 32}.tmp", folder / ".notes.tmp"
    left.write_text("half")
    mine.write_text("not a name that a build gives")
    run(toy, precision=("fp32",))
    assert not left.exists()
    assert mine.exists()
    mine.unlink()


def test_no_half_written_file_is_looked_for_behind_a_link(toy: Bundle, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    other = outside / f".{'0' * 32}.tmp"
    other.write_text("somebody else's")
    (toy.path / ENGINES).mkdir(exist_ok=True)
    link = toy.path / ENGINES / "linked"
    link.symlink_to(outside)
    run(toy, precision=("fp32",))
    link.unlink()
    assert other.exists()


# --- ahead of time --------------------------------------------------------------------------------


def ahead(bundle: Bundle, make: Maker | None = None, **options: Any) -> tuple[Any, ...]:
    return build_bundle(
        bundle,
        BuildOptions(**{"backend": RTX, "targets": ("8.9", "12.0"), **options}),
        lambda _: None,
        make=make or Maker(),
    )


def test_ahead_of_time_everything_is_unproven(toy: Bundle) -> None:
    make = Maker()
    engines = ahead(toy, make)
    assert [(e.sidecar.role, e.sidecar.recipe) for e in engines] == [
        ("encoder", "fp16"),
        ("encoder", "tf32"),
        ("decoder", "fp16"),
        ("decoder", "tf32"),
    ]
    assert list(find_engines(toy)) == by_path(engines)
    for engine in engines:
        sidecar = engine.sidecar
        assert sidecar.state == "unproven"
        assert sidecar.gpu is None
        assert sidecar.driver_version is None
        assert sidecar.targets == ("8.9", "12.0")
        assert sidecar.parity == {}
        assert engine.path.parent.name.startswith("any-sm89-sm120-tensorrt-rtx-")
    assert {r.targets for r in make.requests} == {("8.9", "12.0")}
    assert {r.timing_cache for r in make.requests} == {None}
    assert {r.device for r in make.requests} == {None}
    for capability, fits in (("8.9", True), ("12.0", True), ("8.6", False)):
        target = EngineTarget(Gpu("any", capability), RTX, engines[0].sidecar.tensorrt_version, "1")
        if fits:
            offered = candidates(toy, target)
            assert [engines.precision for engines in offered] == ["fp16", "tf32"]
        else:
            with pytest.raises(BackendError, match=r"targets are 8\.9, 12\.0"):
                candidates(toy, target)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_a_pair_that_cannot_be_built_whole_is_left_out(toy: Bundle, role: str) -> None:
    make = Maker()
    make.fails = lambda what: BuildError("no kernel") if what == f"{role} fp16" else None
    engines = ahead(toy, make)
    assert {e.sidecar.recipe for e in engines[:2]} == {"tf32"}
    assert list(find_engines(toy)) == by_path(engines)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_no_pair_can_be_built(toy: Bundle, role: str) -> None:
    make = Maker()
    make.fails = lambda what: BuildError(f"no {what}") if what.startswith(role) else None
    with pytest.raises(BuildError, match="no precision can be built") as caught:
        ahead(toy, make)
    for recipe in ("fp16", "tf32"):
        assert f"{recipe}: no {role} {recipe}" in str(caught.value)
    assert find_engines(toy) == ()


# --- where they lie -------------------------------------------------------------------------------


def test_folder_names_are_for_people() -> None:
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9")
    assert (
        folder_name(gpu, (), "tensorrt", "10.16.0.72", "fp16")
        == "nvidia-geforce-rtx-4090-sm89-tensorrt-10.16.0.72-fp16"
    )
    assert (
        folder_name(None, ("8.6", "12.0"), "tensorrt-rtx", "1.7.1.116", "bf16")
        == "any-sm86-sm120-tensorrt-rtx-1.7.1.116-bf16"
    )
    assert "/" not in folder_name(Gpu("../A/B", "8.9"), (), "tensorrt", "1", "fp16")


@pytest.mark.parametrize("target", ["elsewhere", "engines"])
def test_engines_are_not_built_behind_a_link_that_leaves_the_bundle(
    toy: Bundle, tmp_path: Path, target: str
) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (toy.path / "engines").symlink_to(outside if target == "elsewhere" else target)
    make = Maker()
    with pytest.raises(BundleError) as caught:
        ahead(toy, make)
    assert caught.value.file == "engines"
    assert make.requests == []
    assert list(outside.iterdir()) == []


# --- options and machines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_objects": 0}, "max_objects: got 0, expected a whole number of at least 1"),
        ({"max_points": -3}, "max_points: got -3, expected a whole number of at least 1"),
        ({"max_points": 1.0}, r"max_points: got 1\.0, expected a whole number of at least 1"),
        ({"max_objects": True}, "max_objects: got True, expected a whole number"),
        ({"max_batch": 0}, "max_batch: got 0, expected a whole number of at least 1"),
        ({"workspace": 0}, "workspace: got 0, expected a positive number of bytes"),
        ({"device": -1}, "device: got -1, expected a whole number of at least 0"),
        (
            {"precision": ("fp8",)},
            "precision: got fp8, expected auto or some of fp16, fp16-activations",
        ),
        ({"precision": ()}, "precision: got nothing, expected auto or some of"),
        ({"backend": "tensorflow"}, "backend: got 'tensorflow', expected tensorrt or tensorrt-rtx"),
        (
            {"backend": "tensorrt", "targets": ("8.9",)},
            r'targets: got 8\.9, expected none, as the backend "tensorrt"',
        ),
        (
            {"targets": ("sm89",)},
            r"targets: got 'sm89', expected a compute capability such as 8\.9",
        ),
        ({"targets": ("8.9", "0.1")}, r"targets: got '0\.1', expected a compute capability"),
        (
            {"targets": ("8.9", "8.7", "9.0")},
            r"targets: got 8\.7, 9\.0, expected some of 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, for",
        ),
    ],
)
def test_options_that_make_no_sense(toy: Bundle, options: dict[str, Any], message: str) -> None:
    make = Maker()
    with pytest.raises(InvalidInputError, match=message):
        run(toy, make, **options)
    assert not make.made
    assert not (toy.path / ENGINES).exists()


@pytest.mark.parametrize(
    ("precision", "order"),
    [(("fp32", "fp16"), ["fp16", "fp32"]), ("auto", [recipe.name for recipe in RECIPES])],
)
def test_recipes_are_tried_fastest_first(toy: Bundle, precision: Any, order: list[str]) -> None:
    prove = Prover(any__any=FEATURES_OFF)
    with pytest.raises(BuildError):
        run(toy, prove=prove, precision=precision)
    assert [pair[0] for pair in prove.seen] == order


def test_without_a_driver_the_way_ahead_of_time_is_shown(toy: Bundle) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a driver here")
    with pytest.raises(BackendError, match=r"--backend tensorrt-rtx --target 8\.9") as caught:
        build_bundle(toy, BuildOptions(backend=RTX), make=Maker())
    assert "NVIDIA driver" in str(caught.value)
    assert not (toy.path / ENGINES).exists()


def test_a_missing_tensorrt_is_named_with_its_extra(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt is not installed .*sam3rt\[gpu\]"):
        run(toy, backend="tensorrt")


def test_the_gate_of_a_build_runs_on_the_device_that_was_probed(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU by default is called as it is declared."""
    opened: list[tuple[str, Device]] = []

    def open_platform(flavour: str, device: Device) -> str:
        opened.append((flavour, device))
        return "platform"

    def backend(bundle: Bundle, engines: EngineSet, platform: str) -> Verdict:
        assert platform == "platform"
        return FEATURES_OFF if engines.encoder.sidecar.recipe == "fp16" else FINE

    monkeypatch.setattr(build, "open_platform", open_platform)
    monkeypatch.setattr(build, "TensorRtBackend", backend)
    encoder, *_ = build_bundle(toy, BuildOptions(backend=RTX), make=Maker(), device=DEVICE)
    assert encoder.sidecar.recipe == SECOND
    assert opened == [(RTX, DEVICE)] * 2
