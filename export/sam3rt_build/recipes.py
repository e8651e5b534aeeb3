"""Precision recipes: which operators of the two graphs compute in what, as data.

FP16 by itself does this network no harm. What does is what a builder makes of it: sums in half
precision where nobody asked for more, and attention kernels that are wrong on some GPUs. So an
FP16 recipe asks for FP32 sums in the graph itself, there is a ladder of recipes, fastest first, and
every rung has to pass the gate on the machine that will use it. Rules go by operator types and by
node names, which the export makes of module paths (``blocks.3.attention/MatMul_0``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sam3rt.backends.tensorrt.engines import RECIPE_ORDER

Width = Literal["float16", "float32"]
Factors = Width | Literal["bfloat16"]

# ONNX Runtime's fused attention, which graphs for other libraries do not hold.
FUSED_ATTENTION = "MultiHeadAttention"
# Operators that multiply factors and add up the products.
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", FUSED_ATTENTION})
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
        factors: type of what matmuls and convolutions multiply, and of their results, where no
            rule keeps FP32. The fused attention, which has no BF16, is in FP16 instead.
        activations: type of everything else, where no rule keeps FP32.
        accumulation: type in which FP16 products are added up. FP32 is written into the graph, by
            casts around every product. FP16 leaves the choice to the builder, which takes half
            accumulators where they are faster; the simulation takes them everywhere.
        rules: what stays in FP32.
        tf32: whether FP32 matmuls may round their factors to TF32.
    """

    name: str
    summary: str
    factors: Factors = "float32"
    activations: Width = "float32"
    accumulation: Width = "float32"
    rules: tuple[Rule, ...] = ()
    tf32: bool = False

    @property
    def features_dtype(self) -> Width:
        """Type of the feature maps that an encoder of this recipe hands to the decoder."""
        return "float16" if self.factors == "float16" else "float32"

    @property
    def promises_fp32_sums(self) -> bool:
        """Whether an engine whose FP16 products are added up in less than FP32 breaks its word."""
        return self.factors == "float16" and self.accumulation == "float32"


# What any FP16 recipe keeps: sums of squares, exponentials, angles, counts of pixels. None is
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
    Rule(
        "linear attention sums over thousands of pixels and divides by such a sum plus 1e-15",
        scope=r"(?:^|\.)linear_attention$",
    ),
    Rule(
        "RepViT's depthwise mixers replace the stream that blocks add to, so that their rounding "
        "adds up over all of them",
        frozenset({"Conv"}),
        r"(?:^|\.)mixer$",
    ),
    Rule("stability counts up to 82,944 pixels; FP16 ends at 65,504", scope=r"^single_mask$"),
    Rule("the scores themselves, and next to nothing to compute", scope=r"^(?:iou|object)_head"),
)
ATTENTION_CORE = Rule(
    "the fused attention kernel is what has been wrong on GPUs; types it lacks break the fusion",
    scope=_ATTENTION,
)

_RECIPES = (
    Recipe(
        "fp16",
        "FP16 factors, FP32 sums; everything between the matmuls in FP32",
        factors="float16",
        rules=_ALWAYS,
    ),
    Recipe(
        "fp16-activations",
        "as fp16, with FP16 between the matmuls but for normalization, softmax and positions",
        factors="float16",
        activations="float16",
        rules=_ALWAYS,
    ),
    Recipe(
        "fp16-attention-tf32",
        "as fp16, with the attention core (scores, softmax, mixing) in TF32, not fused",
        factors="float16",
        rules=(*_ALWAYS, ATTENTION_CORE),
        tf32=True,
    ),
    Recipe("tf32", "FP32, with matmuls in TF32", tf32=True),
    Recipe("fp32", "FP32"),
)
# For ONNX Runtime, which has matmuls in BF16 but neither convolutions nor attention.
BF16 = Recipe(
    "bf16",
    "matmuls of BF16 factors, attention in FP16, convolutions in TF32, everything else in FP32",
    factors="bfloat16",
    accumulation="float16",
    rules=(*_ALWAYS, Rule("there are no such kernels", frozenset({"Conv", "ConvTranspose"}))),
    tf32=True,
)
# The ladder. The runtime tries engines in the same order.
RECIPES: tuple[Recipe, ...] = tuple(
    sorted(_RECIPES, key=lambda recipe: RECIPE_ORDER.index(recipe.name))
)
# For simulations only: what FP16 graphs risk that leave the sums to the builder.
HALF_SUMS = Recipe(
    "fp16-half-sums",
    "FP16 between the matmuls, and FP16 sums inside them, as a builder may choose",
    factors="float16",
    activations="float16",
    accumulation="float16",
    rules=_ALWAYS,
)
SIMULATED_RECIPES = (*RECIPES, HALF_SUMS)


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        KeyError: there is none.
    """
    return {recipe.name: recipe for recipe in SIMULATED_RECIPES}[name]
