"""What a built engine says of itself: fused attention, and what its products are added up in.

A serialized engine that was built with detailed profiling holds the programs of its kernels as
text, with the names of the ONNX nodes that each step came from. No GPU is needed to read it.
Verified on TensorRT for RTX 1.7.1. Nothing of the layout is documented, so whatever is not found
counts as unknown, and the gate alone decides.

Each program has a section of descriptors, which state the types of its tensors, and its steps::

    tensor={ ... name="x.1" ... type=half }
    fully_connected={ name="a" ... input={"x.1" "w" } ... accumulation_type=2 ... layers="[ONNX
        Layer: blocks.0.fc1/MatMul_0]" }
    function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x123 ... layers="..." }

Fused attention comes with its CUDA source, which names the accumulators of its two products:
``Ampere_hmma_fp32_traits, Ampere_hmma_fp16_traits``. Of convolutions, nothing says what they are
added up in.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from sam3rt.bundle.files import atomic_write

from .errors import BuildError
from .recipes import Recipe

# What products are added up in. "fp32 throughout" multiplies FP32 factors as well, which is slow;
# "unspecified" multiplies FP16 factors and leaves the sums to the kernel.
Sums = Literal["fp32", "fp32 throughout", "fp16", "unspecified"]

_PROGRAM = re.compile(rb"\ndescriptors \{\n(.*?)\nmain \{\n(.*?)\n\}", re.DOTALL)
_TENSOR = re.compile(rb'^ *(?:sub_)?tensor=\{.* name="([^"]*)".* type=(\w+)', re.MULTILINE)
_STEP = re.compile(
    rb'^ *(function|runtime_fusion|fully_connected|corrltn)=\{ (.*?)\blayers="([^"]*)"',
    re.MULTILINE | re.DOTALL,
)
_ONNX_NODE = re.compile(rb"\[ONNX Layer: ([^\]]*)\]")
_KERNEL_NAME = re.compile(rb"\bfqn=(\w+)")
_INPUT = re.compile(rb'\binput=\{"([^"]*)"')
_ACCUMULATION = re.compile(rb"\baccumulation_type=(\d+)")
# The two accumulators of a fused attention, then the name of its kernel.
_ATTENTION_KERNEL = re.compile(
    rb"hmma_(fp16|fp32)_traits,\s+\S*hmma_(fp16|fp32)_traits,.*?__global__ void (\w+)\(", re.DOTALL
)
_FP32_ACCUMULATION = 2
_BLOCK = re.compile(r"^(?:blocks\.\d+|stages\.\d+\.\d+)(?=\.|/|$)")
REST = "rest"


class BlockEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """One transformer block.

    Attributes:
        attentions: how many there are.
        fused: how many of them are one kernel each.
        attention_sums: what the two products of each fused attention are added up in; less than
            the fused ones where a kernel does not say.
        matmul_sums: how many of the other matmuls are added up in what.
    """

    attentions: int
    fused: int
    attention_sums: tuple[tuple[Sums, Sums], ...]
    matmul_sums: dict[Sums, int]


class PlanEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of an engine.

    Attributes:
        bytes: its size.
        layers: how many kernels one run launches, copies included.
        blocks: by name; what is in none is called ``"rest"``.
    """

    bytes: int
    layers: int
    blocks: dict[str, BlockEvidence]

    def summary(self) -> str:
        """The evidence in one line."""
        every = self.blocks.values()
        attentions = sum(block.attentions for block in every)
        fused = sum(block.fused for block in every)
        pairs = Counter(pair for block in every for pair in block.attention_sums)
        sums: Counter[Sums] = Counter()
        for block in every:
            sums.update(block.matmul_sums)
        parts = [f"{self.bytes / 1e6:.1f} MB", f"{self.layers} layers"]
        if attentions:
            said = ", ".join(f"{n} with sums in {a} and {b}" for (a, b), n in sorted(pairs.items()))
            parts.append(f"{fused} of {attentions} attentions fused" + (f" ({said})" * bool(said)))
        parts.append("matmuls: " + ", ".join(f"{n} in {kind}" for kind, n in sorted(sums.items())))
        return "; ".join(parts)


def evidence_path(engine: Path) -> Path:
    """Where the evidence on an engine file lies: beside it."""
    return engine.with_name(engine.name + ".plan.json")


def write_evidence(engine: Path, evidence: PlanEvidence) -> None:
    """Keep the evidence beside an engine. It is for people; no runtime reads it.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    content = msgspec.json.format(msgspec.json.encode(evidence), indent=2)
    with atomic_write(evidence_path(engine)) as stream:
        stream.write(content + b"\n")


def load_evidence(engine: Path) -> PlanEvidence | None:
    """The evidence kept beside an engine; ``None`` where there is none that can be read."""
    try:
        return msgspec.json.decode(evidence_path(engine).read_bytes(), type=PlanEvidence)
    except (OSError, msgspec.DecodeError):
        return None


def read_engine(engine: Path) -> PlanEvidence | None:
    """What a serialized engine says of itself.

    Args:
        engine: the file, which is not empty.

    Returns:
        The evidence; ``None`` where the engine holds no such text.

    Raises:
        OSError: the file cannot be read.
    """
    with (
        engine.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan,
    ):
        return _read(plan)


def _read(plan: mmap.mmap) -> PlanEvidence | None:
    kernels = {
        match[3]: (_sums(match[1]), _sums(match[2])) for match in _ATTENTION_KERNEL.finditer(plan)
    }
    layers = 0
    attentions: Counter[str] = Counter()
    fused: Counter[str] = Counter()
    attention_sums: dict[str, list[tuple[Sums, Sums]]] = {}
    matmul_sums: dict[str, Counter[Sums]] = {}
    for types, steps in _programs(plan):
        # A fusion's own program has its steps, which are no kernels.
        if any(kind in ("function", "runtime_fusion") for kind, _, _ in steps):
            layers += len(steps)
        for kind, description, nodes in steps:
            matmuls = [node for node in nodes if node.rpartition("/")[2].startswith("MatMul_")]
            softmaxes = [node for node in nodes if node.rpartition("/")[2].startswith("Softmax_")]
            name = _KERNEL_NAME.search(description)
            # Generated kernels may take one of the two products in; fused attention has both.
            if kind == "function" and softmaxes and len(matmuls) > 1:
                block = _block(softmaxes[0])
                fused[block] += 1
                if name is not None and name[1] in kernels:
                    attention_sums.setdefault(block, []).append(kernels[name[1]])
            if kind == "function":
                # Other steps repeat a node's name where TensorRT split it.
                attentions.update(_block(node) for node in softmaxes)
            if kind == "fully_connected":
                sums = _matmul_sums(description, types)
                for node in matmuls:
                    matmul_sums.setdefault(_block(node), Counter())[sums] += 1
    if not layers:
        return None
    names = sorted({*attentions, *matmul_sums}, key=_in_order)
    return PlanEvidence(
        len(plan),
        layers,
        {
            name: BlockEvidence(
                attentions[name],
                fused[name],
                tuple(attention_sums.get(name, ())),
                dict(matmul_sums.get(name, {})),
            )
            for name in names
        },
    )


def check_promise(recipe: Recipe, evidence: PlanEvidence) -> None:
    """Refuse an engine that adds up FP16 products in less than its recipe promises.

    Raises:
        BuildError: naming the first such block.
    """
    if not recipe.promises_fp32_sums:
        return
    for name, block in evidence.blocks.items():
        if any("fp16" in pair for pair in block.attention_sums):
            what = "a product of its fused attention"
        elif set(block.matmul_sums) & {"fp16", "unspecified"}:
            what = "a matmul"
        else:
            continue
        raise BuildError(
            f"the engine breaks the promise of recipe {recipe.name}: {name} adds up {what} in less "
            f"than FP32 ({evidence.summary()})"
        )


def _programs(
    plan: mmap.mmap,
) -> Iterator[tuple[dict[bytes, bytes], list[tuple[str, bytes, list[str]]]]]:
    """The types of each program's tensors, and its steps: kind, description, ONNX nodes."""
    for program in _PROGRAM.finditer(plan):
        types = {match[1]: match[2] for match in _TENSOR.finditer(program[1])}
        yield (
            types,
            [
                (
                    step[1].decode(),
                    step[2],
                    [
                        node.decode(errors="replace")
                        for node in dict.fromkeys(_ONNX_NODE.findall(step[3]))
                        if not node.startswith(b"types/")
                    ],
                )
                for step in _STEP.finditer(program[2])
            ],
        )


def _matmul_sums(description: bytes, types: dict[bytes, bytes]) -> Sums:
    factor = _INPUT.search(description)
    if factor is not None and types.get(factor[1]) == b"float":
        return "fp32 throughout"
    said = _ACCUMULATION.search(description)
    return "fp32" if said is not None and int(said[1]) == _FP32_ACCUMULATION else "unspecified"


def _sums(traits: bytes) -> Sums:
    return "fp32" if traits == b"fp32" else "fp16"


def _block(node: str) -> str:
    match = _BLOCK.match(node)
    return match.group() if match else REST


def _in_order(name: str) -> tuple[bool, tuple[int, ...]]:
    return name == REST, tuple(map(int, re.findall(r"\d+", name)))
