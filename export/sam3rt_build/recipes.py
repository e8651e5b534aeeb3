"""Precision recipes: which operators of the two graphs compute in what, as data.

FP16 by itself does this network no harm; kernels do, differently on each GPU and each version of
TensorRT. So there is a ladder of recipes, fastest first, and every rung has to pass the gate on
the machine that will use it. Rules go by operator types and by node names, which the export makes
of module paths (``blocks.3.attention/MatMul_0``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sam3rt.backends.tensorrt.engines import RECIPE_ORDER

Narrow = Literal["float16", "bfloat16"]

_ATTENTION = r"(?:^|\.)(?:attention|self_attention|token_to_image|image_to_token|final)$"


@dataclass(frozen=True)
class Rule:
    """Nodes that stay in FP32.

    Attributes:
        reason: why.
        operators: ONNX operator types it is about; empty for all.
        scope: regular expression searched for in the module path; empty for all.
        upstream: whether everything the nodes are computed from is meant as well.
    """

    reason: str
    operators: frozenset[str] = frozenset()
    scope: str = ""
    upstream: bool = False

    def matches(self, operator: str, scope: str) -> bool:
        """Whether the rule is about a node of this type in this module."""
        return (not self.operators or operator in self.operators) and (
            not self.scope or re.search(self.scope, scope) is not None
        )


@dataclass(frozen=True)
class Recipe:
    """One way to compute a graph.

    Attributes:
        name: as in :data:`sam3rt.backends.tensorrt.engines.RECIPE_ORDER`.
        summary: what it does, in words.
        narrow: the type of everything no rule keeps in FP32; ``None`` keeps all.
        rules: what stays in FP32.
        leading_blocks: share of the transformer blocks, counted from the input, that stay in FP32
            together with all that comes before them.
        tf32: whether FP32 matmuls may round their factors to TF32.
    """

    name: str
    summary: str
    narrow: Narrow | None
    rules: tuple[Rule, ...] = ()
    leading_blocks: float = 0.0
    tf32: bool = False

    @property
    def features_dtype(self) -> Literal["float16", "float32"]:
        """Type of the feature maps that an encoder of this recipe hands to the decoder.

        BF16 would spend a decoder's input on range it does not need.
        """
        return "float32" if self.narrow is None else "float16"


# What any narrow recipe keeps: sums of squares, exponentials, angles, counts of pixels. None is
# large, and each loses what comes after it when it is rounded.
_ALWAYS = (
    Rule("normalizations square and sum", frozenset({"LayerNormalization", "ReduceMean"})),
    Rule("softmax exponentiates and sums", frozenset({"Softmax"})),
    Rule(
        "rotary positions, attention biases and the marks of padding",
        frozenset({"Mul", "Add", "Sub"}),
        _ATTENTION,
    ),
    Rule("sines of coordinates times large frequencies", frozenset({"Sin", "Cos"}), upstream=True),
    Rule("stability counts up to 82,944 pixels; FP16 ends at 65,504", scope=r"^single_mask$"),
    Rule("the scores themselves, and next to nothing to compute", scope=r"^(?:iou|object)_head"),
)
_ATTENTION_CORE = Rule(
    "the fused attention kernel is what has been wrong on GPUs; types it lacks break the fusion",
    scope=_ATTENTION,
)

_RECIPES = (
    Recipe(
        "fp16",
        "FP16; normalization, softmax, positions and scores in FP32",
        "float16",
        _ALWAYS,
    ),
    Recipe(
        "bf16",
        "BF16; normalization, softmax, positions and scores in FP32",
        "bfloat16",
        _ALWAYS,
    ),
    Recipe(
        "fp16-attention-fp32",
        "as fp16, with the attention core (scores, softmax, mixing) in FP32",
        "float16",
        (*_ALWAYS, _ATTENTION_CORE),
    ),
    Recipe(
        "bf16-attention-fp32",
        "as bf16, with the attention core in FP32",
        "bfloat16",
        (*_ALWAYS, _ATTENTION_CORE),
    ),
    # 20 to 24 of SAM 3's 32 blocks is what it took on an H200 with TensorRT 11.1
    # (Efficient-SAM3-TensorRT): errors compound from block to block.
    Recipe(
        "fp16-blocks-fp32",
        "as fp16-attention-fp32, with the first three quarters of the blocks in FP32",
        "float16",
        (*_ALWAYS, _ATTENTION_CORE),
        leading_blocks=0.75,
    ),
    Recipe("tf32", "FP32, with matmuls in TF32", None, tf32=True),
    Recipe("fp32", "FP32", None),
)
# The runtime tries engines in the same order.
RECIPES: tuple[Recipe, ...] = tuple(
    sorted(_RECIPES, key=lambda recipe: RECIPE_ORDER.index(recipe.name))
)


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        KeyError: there is none.
    """
    return {recipe.name: recipe for recipe in RECIPES}[name]
