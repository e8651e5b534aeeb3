"""Builds of whole bundles with engines and verdicts made up, for tests of what is published."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
from onnx import TensorProto
from tests.support.build_helpers import float_types

from sam3rt.accuracy import select
from sam3rt.accuracy.gate import Verdict
from sam3rt.accuracy.metrics import Measurement
from sam3rt.backends.tensorrt.driver import Device, Gpu
from sam3rt.backends.tensorrt.engines import ENGINES, EngineSet
from sam3rt.backends.tensorrt.sidecar import sidecar_path
from sam3rt.bundle import Bundle
from sam3rt_build.build import BuildOptions, build_bundle
from sam3rt_build.builder_process import EngineRequest

GPU = Gpu("NVIDIA Test 4090", "8.9")
DEVICE = Device(1, GPU, 24 << 30, "580.65", (13, 0))
RTX = "tensorrt-rtx"


class Maker:
    """Stands in for the builder: looks at what it is given and writes some bytes as the engine."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.made: list[str] = []
        self.fails: Callable[[str], BaseException | None] = lambda _: None

    def __call__(self, request: EngineRequest) -> None:
        graph = Path(request.graph)
        model = onnx.load(graph)
        onnx.checker.check_model(model)
        recipe = {entry.key: entry.value for entry in model.metadata_props}.get("sam3rt.recipe")
        what = f"{graph.stem} {recipe}" if recipe else graph.stem
        (types,) = ({float_types(model)["image_embeddings.0"]} if recipe else {TensorProto.FLOAT},)
        features = "float16" if TensorProto.FLOAT16 in types else "float32"
        self.requests.append(request)
        self.made.append(what)
        failure = self.fails(what)
        if failure is not None:
            raise failure
        Path(request.engine).write_bytes(f"{what} {features} {len(self.made)}".encode())


def measured(output: str, value: float) -> Measurement:
    return Measurement("image 0", output, "cosine", value, 0.999, at_least=True)


FEATURES_OFF = Verdict((measured("features 0", 0.04), measured("masks", 1.0)))
MASKS_OFF = Verdict((measured("features 0", 1.0), measured("masks", float("nan"))))
FINE = Verdict((measured("features 0", 0.9999), measured("masks", 0.9995)))


class Prover:
    """Stands in for backend and gate: verdicts by encoder and decoder recipe."""

    def __init__(self, **verdicts: Verdict) -> None:
        self.verdicts = {tuple(name.split("__")): verdict for name, verdict in verdicts.items()}
        self.seen: list[tuple[str, str]] = []

    def __call__(self, bundle: Bundle, engines: EngineSet) -> Any:
        """Open a pair; what is opened here is its verdict."""
        for engine in (engines.encoder, engines.decoder):
            # What is judged is whole.
            content = engine.path.read_bytes()
            assert engine.sidecar.engine.sha256 == hashlib.sha256(content).hexdigest()
            assert engine.sidecar.state == "unproven"
        assert engines.encoder.sidecar.features_dtype == engines.decoder.sidecar.features_dtype
        names = (engines.encoder.sidecar.recipe, engines.decoder.sidecar.recipe)
        self.seen.append(names)
        for key in (names, (names[0], "any"), ("any", names[1]), ("any", "any")):
            if key in self.verdicts:
                return self.verdicts[key]
        return FINE


@contextlib.contextmanager
def stand_in_gate(cache: Path) -> Iterator[None]:
    """Let the gate read the verdict that a :class:`Prover` opened, in place of the record.

    Args:
        cache: where verdicts are kept meanwhile.
    """
    with (
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)}),
        mock.patch.object(select, "load_record", return_value="a record"),
        mock.patch.object(select, "verify", lambda verdict, *_: iter(verdict.measurements)),
    ):
        yield


def plan_text(first: str, second: str, *, accumulation: int) -> bytes:
    """An engine's text, as TensorRT for RTX 1.7.1 lays it out, between bytes that are none.

    Args:
        first: what the first product of the fused attention is added up in: ``"fp32"``, ``"fp16"``.
        second: the same of the second product.
        accumulation: TensorRT's number for what three FP16 matmuls are added up in.
    """
    nodes = [f"blocks.0.attention.{name}/MatMul_0" for name in "qkv"]
    steps = {
        f'fully_connected={{ name="a" output={{"c" }} input={{"half.1" "w" }} '
        f"accumulation_type={accumulation} kernel=k": nodes,
        "function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x1 args={ }": [
            "blocks.0.attention/MatMul_1",
            "types/softmax.float16",
            "blocks.0.attention/Softmax_0",
            "blocks.0.attention/MatMul_0",
        ],
        'fully_connected={ name="b" output={"c" } input={"wide^deref" "w" } accumulation_type=0': [
            "blocks.0.fc1/MatMul_0"
        ],
        "function={ name=__myl_Max fqn=__myl_Max_0x2 args={ }": [
            "blocks.10.attention/MatMul_0",
            "blocks.10.attention/Softmax_0",
        ],
    }
    lines = [
        "descriptors {",
        '  tensor={ alignment=2 dims={ 1 8 } name="half.1" offset=0 strides={ 8 1 } type=half }',
        '  sub_tensor={ base="c" name="wide^deref" offset=0 strides={ 8 1 } type=float }',
        "main {",
        " label bb1:",
        '  wait={ name="w" stream=0 event=2 layers="" }',
    ]
    for step, names in steps.items():
        layers = "\n".join(f"[ONNX Layer: {name}]" for name in names)
        lines.append(f'  {step} layers="{layers}" swap_ab=false }}')
    kernel = f"fmha::Ampere_hmma_{first}_traits,\n\tfmha::Ampere_hmma_{second}_traits,\n"
    source = f'{kernel} 64>;\nextern "C" __global__ void _gemm_mha_v2_0x1(\n'
    return b"\0\xff\n" + "\n".join([*lines, "}", source]).encode() + b"\0"


def run(
    bundle: Bundle,
    make: Maker | None = None,
    prove: Prover | None = None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[Any, ...]:
    """A build with TensorRT for RTX, the flavour that is installed here, on a made-up GPU."""
    with stand_in_gate(bundle.path.parent / "cache"):
        return build_bundle(
            bundle,
            BuildOptions(**{"backend": RTX, **options}),
            say,
            make=make or Maker(),
            open_pair=prove or Prover(),
            device=DEVICE,
        )


def check_consistent(bundle: Bundle) -> None:
    """Fail where something in the folder of engines claims what is not so."""
    for path in (bundle.path / ENGINES).rglob("*"):
        if path.is_dir():
            assert not path.name.startswith(".build-"), path
            continue
        assert not path.name.endswith((".tmp", ".request.json", ".onnx.data")), path
        if path.suffix == ".engine":
            document = json.loads(sidecar_path(path).read_text())
            assert document["engine"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert document["state"] in ("proven", "unproven")
        if path.name.endswith(".engine.json"):
            engine = path.with_name(path.name.removesuffix(".json"))
            refused = json.loads(path.read_text())["state"] == "refused"
            assert engine.is_file() != refused, path
        if path.name.endswith("_ctx.onnx"):
            assert path.with_name(path.name.replace("_ctx.onnx", ".engine")).is_file()
