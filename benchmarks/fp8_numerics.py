"""What linear layers of the encoder in FP8 would cost in accuracy, simulated on the CPU.

    python -m benchmarks.fp8_numerics BUNDLE [--images FOLDER] [--output FILE]

The usual recipe for FP8 on SM89 and later: weights with one scale for each output, activations with
one for each tensor, both E4M3 and scaled to the largest value that was seen, on the images of the
parity record or of a folder. Everything else, the sums included, stays FP32, and so does the
decoder. No recipe does this: the figures are why.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from benchmarks.report import conditions, publish, script_parser
from numpy.typing import NDArray

from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.backends.onnxruntime.backend import OnnxRuntimeBackend
from sam3rt.bundle import Bundle, GraphSpec, open_bundle
from sam3rt.geometry import preprocess
from sam3rt.image_files import read_image
from sam3rt_build.graph_files import load_graph, save_graph
from sam3rt_build.typed_graph import FLOAT, drop_unused_weights, new_weight

_E4M3 = ml_dtypes.float8_e4m3fn
_LARGEST = float(ml_dtypes.finfo(_E4M3).max)


def linears(model: ir.Model) -> list[ir.Node]:
    """Products of an activation and a constant matrix."""
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None and weight.shape.rank() == 2:
            found.append(node)
    return found


def largest_inputs(bundle: Bundle, pixels: list[NDArray[np.float32]], folder: Path) -> list[float]:
    """The largest absolute input of each linear layer, over some images."""
    model = load_graph(bundle, "encoder")
    graph = model.graph
    graph.outputs.clear()
    for index, node in enumerate(linears(model)):
        size = ir.node("Abs", [node.inputs[0]], name=f"abs_{index}")
        most = ir.node("ReduceMax", size.outputs, attributes={"keepdims": 0}, name=f"max_{index}")
        for made, name in ((size, f"abs_{index}"), (most, f"max_{index}")):
            made.outputs[0].name, made.outputs[0].type = name, ir.TensorType(FLOAT)
        most.outputs[0].shape = ir.Shape([])
        graph.insert_before(node, [size, most])
        graph.outputs.append(most.outputs[0])
    save_graph(model, folder / "observed.onnx")
    session = ort.InferenceSession(folder / "observed.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    seen = [session.run(None, {name: array}) for array in pixels]
    return [float(np.max(values)) for values in zip(*seen, strict=True)]


def quantize(model: ir.Model, largest: list[float]) -> None:
    """Round factors of linear layers to FP8, in place."""
    graph = model.graph
    # The first whose rounding knows FP8; nothing else that a bundle holds changed with it.
    graph.opset_imports[""] = max(19, graph.opset_imports[""])
    zero = new_weight(graph, "fp8/zero", ir.tensor(np.zeros((), _E4M3), name="fp8/zero"))
    for index, (node, most) in enumerate(zip(linears(model), largest, strict=True)):
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        matrix = weight.const_value.numpy()
        scales = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / _LARGEST
        rounded = (matrix / scales).astype(_E4M3).astype(np.float32) * scales
        name = f"fp8/weight_{index}"
        node.replace_input_with(1, new_weight(graph, name, ir.tensor(rounded, name=name)))
        name = f"fp8/scale_{index}"
        scale = new_weight(graph, name, ir.tensor(np.float32(most / _LARGEST), name=name))
        down = ir.node("QuantizeLinear", [x, scale, zero], name=f"fp8/down_{index}")
        up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"fp8/up_{index}")
        down.outputs[0].name, up.outputs[0].name = f"fp8/narrow_{index}", f"fp8/wide_{index}"
        up.outputs[0].type = ir.TensorType(FLOAT)
        graph.insert_before(node, [down, up])
        node.replace_input_with(0, up.outputs[0])
    drop_unused_weights(graph)


class Fp8Backend(OnnxRuntimeBackend):
    """A bundle whose encoder is another file."""

    def __init__(self, bundle: Bundle, encoder: Path) -> None:
        super().__init__(bundle)
        self._file = encoder

    def create_session(self, graph: GraphSpec, *, memory_pattern: bool) -> Any:
        """Load the file in place of the bundle's encoder."""
        if graph is not self.bundle.manifest.encoder:
            return super().create_session(graph, memory_pattern=memory_pattern)
        options = ort.SessionOptions()
        # As it is written: ONNX Runtime takes a rounding and its inverse out, or moves them.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(self._file, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure and publish."""
    parser = script_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, help="a folder, for the activations' scales")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    record = load_record(bundle)
    images = record.images()
    if options.images is not None:
        images = [read_image(path) for path in sorted(options.images.iterdir())]
    pixels = [preprocess(bundle.manifest.image, image)[0] for image in images]
    with tempfile.TemporaryDirectory(prefix="sam3rt-fp8-") as made:
        folder = Path(made)
        largest = largest_inputs(bundle, pixels, folder)
        model = load_graph(bundle, "encoder")
        quantize(model, largest)
        save_graph(model, folder / "encoder.onnx")
        backend = Fp8Backend(bundle, folder / "encoder.onnx")
        verdict = judge(verify(backend, bundle.manifest, record, GATE_LIMITS))
    publish(
        {
            "what": "worst figures over the parity record, linear layers of the encoder in FP8",
            **conditions("onnxruntime"),
            "bundle": bundle.manifest.name,
            "linear_layers": len(largest),
            "images_for_the_scales": len(images),
            "passed": verdict.passed,
            "explanation": verdict.explain(),
            "worst": {name: float(f"{m.value:.4g}") for name, m in verdict.worst().items()},
        },
        options.output,
    )


if __name__ == "__main__":
    main()
