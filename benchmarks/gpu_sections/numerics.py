"""What types and sums cost in accuracy on this GPU: the full-size graph, run by PyTorch."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from benchmarks.gpu_sections.record import Record, Settings
from tests.support.torch_graph import TorchGraph, TorchRunner
from torch import Tensor

from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.bundle import Bundle, open_bundle
from sam3rt_build.fused_graph import fuse
from sam3rt_build.graph_files import load_graph
from sam3rt_build.ort_graphs import TYPED_RECIPES, typed_graph
from sam3rt_build.typed_graph import Role

_ROLES: tuple[Role, Role] = ("encoder", "decoder")


def numerics(record: Record, settings: Settings) -> None:
    """Each way of computing by itself, the most telling ones first.

    Attention is plain, products and a softmax, where sums are FP16: PyTorch's fused kernels add up
    in FP32 whatever it is told.
    """
    bundle = open_bundle(settings.bundle, check_files=False)
    ways: list[tuple[str, str, bool, bool]] = [("fp32", "fp32", False, False)]
    for name in TYPED_RECIPES:
        ways.append((f"{name}, FP32 sums", name, False, False))
    ways.insert(1, ("fp16-activations, FP16 sums, plain attention", "fp16-activations", True, True))
    ways += [
        ("fp16, FP16 sums, plain attention", "fp16", True, True),
        ("fp16-activations, FP16 sums, fused attention", "fp16-activations", True, False),
        ("fp16-activations, FP32 sums, plain attention", "fp16-activations", False, True),
        ("tf32", "tf32", False, False),
    ]
    matmul = torch.backends.cuda.matmul
    for label, recipe, half_sums, plain in ways:
        if half_sums and settings.device == "cpu":
            continue  # PyTorch has no such sums there
        matmul.allow_fp16_accumulation = half_sums
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe in ("tf32", "bf16")
        matmul.allow_fp16_reduced_precision_reduction = half_sums
        record.attempt(label, _judge, bundle, recipe, plain, settings)
        if settings.device != "cpu":
            torch.cuda.empty_cache()


def _judge(bundle: Bundle, recipe: str, plain: bool, settings: Settings) -> Any:
    largest = _Largest()
    graphs = []
    for role in _ROLES:
        watch = largest if role == "encoder" else None
        graphs.append(
            TorchGraph(
                _model(bundle, role, recipe), settings.device, plain_attention=plain, watch=watch
            )
        )
    runner = TorchRunner(bundle, *graphs)
    verdict = judge(verify(runner, bundle.manifest, load_record(bundle), GATE_LIMITS))
    worst = {name: m.value for name, m in verdict.worst().items()}
    return {"passes the gate": verdict.passed, **largest.figures(), **worst}


def _model(bundle: Bundle, role: Role, recipe: str) -> ir.Model:
    if recipe in TYPED_RECIPES:
        return typed_graph(bundle, role, recipe)[0]
    model = load_graph(bundle, role)
    fuse(model)
    return model


class _Largest:
    """The largest values of the residual stream and of what attention mixes."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def __call__(self, node: ir.Node, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        if node.op_type == "SkipLayerNormalization":
            self._note("largest of the residual stream", made[3])
        elif node.op_type == "MultiHeadAttention":
            self._note("largest |V|", given[2])

    def _note(self, name: str, tensor: Tensor) -> None:
        # Read at the end only, so that the GPU is not waited for.
        value = tensor.detach().abs().amax().float()
        known = self._found.get(name)
        self._found[name] = value if known is None else torch.maximum(known, value)

    def figures(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._found.items()}
