"""A bundle of a few nodes that runs on every backend, for tests of everything round the graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.support.helpers import (
    MOBILE_IMAGE,
    MOBILE_MASKS,
    MOBILE_PROMPTS,
    SAM3_IMAGE,
    SAM3_MASKS,
    SAM3_PROMPTS,
    edit_manifest,
    tiny_bundle,
)

from sam3rt.bundle import Bundle, GraphSpec, TensorSpec, file_entry, open_bundle
from sam3rt.bundle.contract import EXPORT_ID

_FEATURES = TensorSpec("image_embeddings.0", "float32", ("batch", 4, 2, 2))
_ENCODER_INPUTS = (TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8)),)
_DECODER_INPUTS = (
    msgspec.structs.replace(_FEATURES, shape=(1, 4, 2, 2)),
    TensorSpec("input_points", "float32", (1, "num_objects", "num_points", 2)),
    TensorSpec("input_labels", "int64", (1, "num_objects", "num_points")),
    TensorSpec("input_masks", "float32", (1, "num_masks", 8, 8)),
    TensorSpec("has_input_masks", "float32", (1,)),
)
# By name: the shape after (1, num_objects).
_DECODER_OUTPUTS = {
    "pred_masks": (3, 8, 8),
    "iou_scores": (3,),
    "single_pred_masks": (1, 8, 8),
    "single_iou_scores": (1,),
    "object_score_logits": (1,),
}


_RULES = {
    "sam3": (SAM3_IMAGE, SAM3_PROMPTS, SAM3_MASKS),
    "mobile_sam": (MOBILE_IMAGE, MOBILE_PROMPTS, MOBILE_MASKS),
}


def runnable_bundle(folder: Path, model_type: str = "sam3") -> Bundle:
    """Make a bundle of 8 px images: one convolution, and masks that depend on points and image.

    Args:
        folder: where to make it.
        model_type: whose rules for images, prompts and masks it has: ``"sam3"`` or
            ``"mobile_sam"``, which has no object scores.
    """
    export_id = tiny_bundle(folder).export_id
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    encoder = _save(
        folder / "encoder.onnx",
        export_id,
        [helper.make_node("Conv", ["pixel_values", "filters"], [_FEATURES.name], strides=[4, 4])],
        _ENCODER_INPUTS,
        (_FEATURES,),
        [weight("filters", 4, 3, 4, 4)],
    )
    nodes = [
        helper.make_node("ReduceMean", ["input_points", "axis"], ["middle"], keepdims=0),
        helper.make_node("Cast", ["input_labels"], ["labels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["labels", "axis"], ["label"], keepdims=1),
        helper.make_node("Add", ["middle", "label"], ["point"]),
        helper.make_node("Mul", ["input_masks", "has_input_masks"], ["mask"]),
        helper.make_node("ReduceMean", ["mask"], ["cover"], keepdims=0),
        helper.make_node("ReduceMean", [_FEATURES.name], ["brightness"], keepdims=0),
        helper.make_node("Add", ["cover", "brightness"], ["shade"]),
    ]
    weights = [numpy_helper.from_array(np.array([2]), "axis")]
    found = dict(_DECODER_OUTPUTS)
    if model_type == "mobile_sam":
        del found["object_score_logits"]
    for name, shape in found.items():
        sizes = numpy_helper.from_array(np.array([1, -1, *shape]), f"{name}.shape")
        weights += [weight(f"{name}.weight", 2, int(np.prod(shape))), sizes]
        nodes += [
            helper.make_node("MatMul", ["point", f"{name}.weight"], [f"{name}.product"]),
            helper.make_node("Add", [f"{name}.product", "shade"], [f"{name}.sum"]),
            helper.make_node("Reshape", [f"{name}.sum", f"{name}.shape"], [name]),
        ]
    outputs = tuple(
        TensorSpec(name, "float32", (1, "num_objects", *shape)) for name, shape in found.items()
    )
    decoder = _save(folder / "decoder.onnx", export_id, nodes, _DECODER_INPUTS, outputs, weights)

    def describe(document: dict[str, Any]) -> None:
        document["encoder"] = msgspec.to_builtins(encoder)
        document["decoder"] = msgspec.to_builtins(decoder)
        document["model_type"] = model_type
        for part, rules in zip(("image", "prompts", "masks"), _RULES[model_type], strict=True):
            document[part] = msgspec.to_builtins(rules)
        document["image"]["size"] = [8, 8]
        document["prompts"]["mask_size"] = [8, 8]
        document["masks"]["low_res_size"] = [8, 8]

    edit_manifest(folder, describe)
    return open_bundle(folder)


def _save(
    path: Path,
    export_id: str,
    nodes: list[onnx.NodeProto],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    weights: list[onnx.TensorProto],
) -> GraphSpec:
    """Write a graph, and say what the manifest says of it."""

    def value(spec: TensorSpec) -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        return helper.make_tensor_value_info(spec.name, kind, list(spec.shape))

    graph = helper.make_graph(
        nodes, path.stem, list(map(value, inputs)), list(map(value, outputs)), weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    entry = model.metadata_props.add()
    entry.key, entry.value = EXPORT_ID, export_id
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return GraphSpec(file_entry(path), (), 18, len(nodes), inputs, outputs)
