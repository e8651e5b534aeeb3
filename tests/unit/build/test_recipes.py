"""The precision recipes as data."""

from __future__ import annotations

import pytest

from sam3rt.backends.tensorrt.engines import RECIPE_ORDER
from sam3rt_build.recipes import (
    HALF_SUMS,
    RECIPES,
    SIMULATED_RECIPES,
    Recipe,
    Rule,
    recipe_named,
)

NARROW = [recipe for recipe in SIMULATED_RECIPES if recipe.factors == "float16"]


def test_recipes_are_those_the_runtime_sorts_by() -> None:
    assert tuple(recipe.name for recipe in RECIPES) == RECIPE_ORDER
    assert [recipe_named(name) for name in RECIPE_ORDER] == list(RECIPES)
    with pytest.raises(KeyError):
        recipe_named("int8")


def test_half_sums_are_simulated_and_never_built() -> None:
    assert HALF_SUMS not in RECIPES
    assert recipe_named(HALF_SUMS.name) is HALF_SUMS


def test_every_fp16_recipe_of_the_ladder_promises_fp32_sums() -> None:
    promising = [recipe for recipe in SIMULATED_RECIPES if recipe.promises_fp32_sums]
    assert promising == [recipe for recipe in RECIPES if recipe.factors == "float16"]
    assert len(promising) == 3


def test_the_last_recipe_changes_nothing() -> None:
    assert RECIPES[-1] == Recipe("fp32", RECIPES[-1].summary)
    assert [recipe.name for recipe in RECIPES if recipe.tf32] == ["fp16-attention-tf32", "tf32"]


@pytest.mark.parametrize("recipe", NARROW, ids=lambda recipe: recipe.name)
def test_every_narrow_recipe_keeps_what_loses_most(recipe: Recipe) -> None:
    for operator in ("LayerNormalization", "Softmax", "Sin", "Cos", "ReduceMean"):
        assert any(rule.matches(operator, "anywhere") for rule in recipe.rules), operator
    for scope in (
        "single_mask",
        "iou_head.0",
        "object_head.4",
        "trunk.stages.2.1.linear_attention",
    ):
        for operator in ("MatMul", "ReduceSum", "Div"):
            assert any(rule.matches(operator, scope) for rule in recipe.rules), scope
    assert any(rule.upstream for rule in recipe.rules if "Sin" in rule.operators)
    assert any(rule.matches("Conv", "trunk.blocks.3.mixer") for rule in recipe.rules)
    assert not any(rule.matches("Conv", "trunk.blocks.3.widen") for rule in recipe.rules)
    assert not any(rule.matches("MatMul", "blocks.3.fc1") for rule in recipe.rules)


@pytest.mark.parametrize(
    ("scope", "core"),
    [
        ("blocks.3.attention", True),
        ("stages.1.0.attention", True),
        ("blocks.0.self_attention", True),
        ("blocks.1.token_to_image", True),
        ("blocks.1.image_to_token", True),
        ("final", True),
        ("blocks.3.attention.q", False),
        ("blocks.3.attention.out", False),
        ("final_norm", False),
        ("blocks.3", False),
        ("", False),
    ],
)
def test_the_attention_core_is_told_from_its_projections(scope: str, core: bool) -> None:
    rules = recipe_named("fp16-attention-tf32").rules
    assert any(rule.matches("MatMul", scope) for rule in rules) == core
    assert not any(rule.matches("MatMul", scope) for rule in recipe_named("fp16").rules)
    # Biases and rotary positions of any attention, in any narrow recipe.
    assert any(rule.matches("Add", scope) for rule in recipe_named("fp16").rules) == core


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_feature_maps_are_fp16_unless_the_encoder_is_fp32(recipe: Recipe) -> None:
    expected = "float16" if recipe in NARROW else "float32"
    assert recipe.features_dtype == expected


def test_a_rule_about_everything_matches_everything() -> None:
    assert Rule("all").matches("MatMul", "")
    assert Rule("all", scope="^a$").matches("MatMul", "a")
    assert not Rule("all", scope="^a$").matches("MatMul", "a.b")
    assert not Rule("all", frozenset({"Add"}), "^a$").matches("MatMul", "a")
