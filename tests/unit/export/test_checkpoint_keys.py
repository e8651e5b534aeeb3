"""Names of one parameter in sam3.pt, in transformers and in the reference's own tracker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from tests.support.export_helpers import TRUNK, USED, small_tensors
from torch import Tensor

from sam3rt_export.checkpoint_keys import (
    RULES,
    from_transformers,
    to_transformers,
)
from sam3rt_export.references.transformers_sam3 import Sam3TrackerModel, build_tracker_model
from sam3rt_export.sources.sam3_architecture import read_architecture

POSITIONS = TRUNK + "pos_embed"
GAUSS = "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The small SAM 3, unused tensors included."""
    return small_tensors()


def used(names: Iterable[str]) -> set[str]:
    """The names the interactive predictor reads; rotary tables are computed, not read."""
    return {name for name in names if name.startswith(USED) and not name.endswith("freqs_cis")}


def test_there_and_back_again_gives_every_used_tensor(tensors: dict[str, Tensor]) -> None:
    back = from_transformers(to_transformers(tensors))
    assert set(back) == used(tensors)
    for name, tensor in back.items():
        if name == POSITIONS:
            assert torch.equal(tensor[:, 1:], tensors[name][:, 1:])
            assert not tensor[:, 0].any(), "the class token's position is not blank"
        else:
            assert torch.equal(tensor, tensors[name]), name


def test_every_tensor_of_the_model_has_a_name_and_no_other(tensors: dict[str, Tensor]) -> None:
    config = build_tracker_model(read_architecture(tensors), tensors).config
    report = Sam3TrackerModel(config).load_state_dict(to_transformers(tensors), strict=False)
    assert report.missing_keys == []
    assert report.unexpected_keys == []


def test_transformers_names_there_and_back_again(tensors: dict[str, Tensor]) -> None:
    state = build_tracker_model(read_architecture(tensors), tensors).state_dict()
    again = to_transformers(from_transformers(state))
    assert set(again) == set(state)
    for name, tensor in again.items():
        assert torch.equal(tensor, state[name]), name


def test_nothing_large_is_copied(tensors: dict[str, Tensor]) -> None:
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    copies = {
        name
        for name, tensor in to_transformers(tensors).items()
        if tensor.untyped_storage().data_ptr() not in owned
    }
    assert copies == {"prompt_encoder.point_embed.weight"}


def test_no_two_rules_for_one_name() -> None:
    for side in zip(*RULES, strict=True):
        assert [name for name, count in Counter(side).items() if count > 1] == []


def test_both_sides_of_a_rule_share_its_runs() -> None:
    assert all(canonical.count("{}") == hf.count("{}") for canonical, hf in RULES)
