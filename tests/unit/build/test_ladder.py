"""The ladder: what a verdict blames, and which pair of recipes a search ends with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.build_helpers import RememberingBackend, WrappedBackend, first_cases

from sam3rt.accuracy.gate import GATE_LIMITS, Verdict, judge
from sam3rt.accuracy.record import ParityRecord, load_record, rerecord, verify
from sam3rt.model import SegmentationModel
from sam3rt_build.errors import BuildError
from sam3rt_build.ladder import Trial, climb_down, trial_of
from sam3rt_build.recipes import RECIPES, Recipe

# --- the search -----------------------------------------------------------------------------------

Outcomes = dict[tuple[str, str], str]
PASS, ENCODER, DECODER = "passes", "encoder", "decoder"


class Script:
    """Answers by a table, and notes what was tried."""

    def __init__(self, outcomes: Outcomes, otherwise: str = PASS) -> None:
        self.outcomes = outcomes
        self.otherwise = otherwise
        self.tried: list[tuple[str, str]] = []
        self.said: list[str] = []

    def __call__(self, encoder: Recipe, decoder: Recipe) -> Trial:
        pair = (encoder.name, decoder.name)
        self.tried.append(pair)
        outcome = self.outcomes.get(pair, self.otherwise)
        return Trial(None if outcome == PASS else outcome, f"so says the script: {outcome}")  # type: ignore[arg-type]

    def climb(self, recipes: tuple[Recipe, ...] = RECIPES[:3]) -> tuple[str, str]:
        encoder, decoder = climb_down(recipes, self, self.said.append)
        assert len(self.said) == len(self.tried)
        return encoder.name, decoder.name


A, B, C = (recipe.name for recipe in RECIPES[:3])


def test_the_fastest_pair_is_taken_when_it_passes() -> None:
    script = Script({})
    assert script.climb() == (A, A)
    assert script.said == [f"encoder {A}, decoder {A}: so says the script: passes"]


def test_features_that_fail_send_the_encoder_down() -> None:
    script = Script({(A, A): ENCODER, (B, A): ENCODER})
    assert script.climb() == (C, A)
    assert script.tried == [(A, A), (B, A), (C, A)]


def test_masks_that_fail_send_the_decoder_down() -> None:
    script = Script({(A, A): DECODER, (A, B): DECODER})
    assert script.climb() == (A, C)
    assert script.tried == [(A, A), (A, B), (A, C)]


def test_each_goes_down_for_its_own_faults() -> None:
    script = Script({(A, A): ENCODER, (B, A): DECODER})
    assert script.climb() == (B, B)


def test_where_no_decoder_is_good_enough_the_features_were_not() -> None:
    script = Script({(A, A): DECODER, (A, B): DECODER, (A, C): DECODER})
    assert script.climb() == (B, A)
    assert script.tried == [(A, A), (A, B), (A, C), (B, A)]


def test_features_blamed_late_keep_the_decoder_that_was_reached() -> None:
    script = Script({(A, A): DECODER, (A, B): ENCODER})
    assert script.climb() == (B, B)


def test_when_nothing_passes_everything_that_was_tried_is_listed() -> None:
    script = Script({}, DECODER)
    with pytest.raises(BuildError) as caught:
        script.climb()
    assert len(script.tried) == 9
    for line in script.said:
        assert line in str(caught.value)
    script = Script({}, ENCODER)
    with pytest.raises(BuildError, match="no precision passes the gate on this machine"):
        script.climb()
    assert script.tried == [(A, A), (B, A), (C, A)]


def test_a_single_recipe_is_tried_once() -> None:
    script = Script({}, DECODER)
    with pytest.raises(BuildError):
        script.climb(RECIPES[:1])
    assert script.tried == [(A, A)]


def first_passing(names: list[str], outcomes: Outcomes) -> tuple[str, str] | None:
    """The rule once more: per encoder, decoders until one passes or the features are blamed."""
    start = 0
    for encoder in names:
        for index in range(start, len(names)):
            outcome = outcomes[encoder, names[index]]
            if outcome == PASS:
                return encoder, names[index]
            if outcome == ENCODER:
                start = index
                break
        else:
            start = 0
    return None


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_any_ladder_ends_at_the_first_pair_that_passes(data: st.DataObject) -> None:
    recipes = RECIPES[: data.draw(st.integers(1, 5))]
    names = [recipe.name for recipe in recipes]
    kinds = st.sampled_from(
        data.draw(st.sampled_from([[ENCODER, DECODER], [PASS, DECODER, ENCODER]]))
    )
    outcomes = {pair: data.draw(kinds) for pair in itertools.product(names, names)}
    script = Script(outcomes)
    expected = first_passing(names, outcomes)
    if expected is None:
        with pytest.raises(BuildError):
            script.climb(recipes)
    else:
        assert script.climb(recipes) == expected
        assert outcomes[expected] == PASS
        assert script.tried[-1] == expected
    assert len(set(script.tried)) == len(script.tried)
    assert all(outcomes[pair] != PASS for pair in script.tried[:-1])


# --- what a verdict blames ------------------------------------------------------------------------

Maps = list[NDArray[np.float32]]
Named = dict[str, NDArray[np.float32]]
CALLS = ("box_click", "objects")


class Judged:
    """A real model, a record of what it says, and verdicts on it perturbed."""

    def __init__(self, model: SegmentationModel) -> None:
        self.backend = RememberingBackend(model.backend)
        self.model = SegmentationModel(model.bundle, self.backend)
        # SAM 3 at a resolution of 1008 takes a second per call.
        calls = ("box_click",) if model.bundle.manifest.model_type == "sam3" else CALLS
        record = first_cases(load_record(model.bundle), *calls)
        self.record: ParityRecord = rerecord(self.backend, model.manifest, record)

    def trial(self, **changes: Callable[..., Any]) -> Trial:
        backend = WrappedBackend(self.backend, **changes)
        manifest = self.model.manifest
        return trial_of(judge(verify(backend, manifest, self.record, GATE_LIMITS)))


@pytest.fixture(scope="module")
def judged(model: SegmentationModel) -> Judged:
    return Judged(model)


def with_cosine(cosine: float) -> Callable[[Maps], Maps]:
    """Adds noise at right angles to each map, so that the cosine is what it was in the field."""

    def change(maps: Maps) -> Maps:
        rng = np.random.default_rng(0)
        changed = []
        for array in maps:
            noise = rng.standard_normal(array.shape)
            noise -= array * float((noise * array).sum() / (array.astype(np.float64) ** 2).sum())
            noise *= np.linalg.norm(array.ravel()) / np.linalg.norm(noise.ravel())
            mixed = cosine * array + np.sqrt(1.0 - cosine**2) * noise
            changed.append(mixed.astype(np.float32))
        return changed

    return change


def one_nan(maps: Maps) -> Maps:
    # Between the channels, rows and columns that the record holds.
    maps[-1][0, 1, 1, 1] = np.nan
    return maps


def one_infinity(maps: Maps) -> Maps:
    maps[0][0, -2, -2, -2] = np.inf
    return maps


FEATURES: dict[str, Callable[[Maps], Maps]] = {
    "cosine 0.04": with_cosine(0.04),
    "cosine 0.5": with_cosine(0.5),
    "cosine 0.9": with_cosine(0.9),
    "cosine 0.998": with_cosine(0.998),
    "one NaN": one_nan,
    "one infinity": one_infinity,
    "scaled": lambda maps: [1.5 * array for array in maps],
    "shifted": lambda maps: [np.roll(array, 1, axis=-1) for array in maps],
    "zero": lambda maps: [0.0 * array for array in maps],
    "transposed": lambda maps: [np.ascontiguousarray(a.swapaxes(2, 3)) for a in maps],
    "one outlier channel": lambda maps: (
        [np.where(np.arange(a.shape[1])[:, None, None] == 8, 3.0 * a, a) for a in maps[-1:]]
        if len(maps) == 1
        else [*maps[:-1], np.where(np.arange(maps[-1].shape[1])[:, None, None] == 8, 9.0, maps[-1])]
    ),
}


@pytest.mark.parametrize("name", FEATURES)
def test_wrong_features_are_blamed_on_the_encoder(judged: Judged, name: str) -> None:
    trial = judged.trial(on_encode=FEATURES[name])
    assert trial.failed == "encoder"
    assert trial.reason.startswith("refused: ")
    assert "features" in trial.reason


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3])
def test_small_noise_passes(judged: Judged, size: float) -> None:
    def shake(maps: Maps) -> Maps:
        rng = np.random.default_rng(1)
        return [(a * (1.0 + size * rng.standard_normal(a.shape))).astype(np.float32) for a in maps]

    def tremble(outputs: Named) -> None:
        rng = np.random.default_rng(2)
        for array in outputs.values():
            array *= (1.0 + size * rng.standard_normal(array.shape)).astype(np.float32)

    trial = judged.trial(on_encode=shake, on_decode=tremble)
    assert trial == Trial(None, "passes the gate"), trial.reason


def nan_in_a_mask(outputs: Named) -> None:
    if "pred_masks" in outputs:
        outputs["pred_masks"][..., 1, 1] = np.nan


def nan_in_a_score(outputs: Named) -> None:
    if "single_iou_scores" in outputs:
        outputs["single_iou_scores"][0, 0] = np.nan


def swapped_masks(outputs: Named) -> None:
    if "pred_masks" in outputs:
        outputs["pred_masks"][:] = outputs["pred_masks"][:, :, ::-1].copy()


def shifted_masks(outputs: Named) -> None:
    for name in ("pred_masks", "single_pred_masks"):
        if name in outputs:
            outputs[name][:] = np.roll(outputs[name], 12, axis=-1)


def scaled_masks(outputs: Named) -> None:
    for name in ("pred_masks", "single_pred_masks"):
        if name in outputs:
            outputs[name] *= 1.5


def other_scores(outputs: Named) -> None:
    if "iou_scores" in outputs:
        outputs["iou_scores"][:] = 1.0 - outputs["iou_scores"]


def negative_single_mask(outputs: Named) -> None:
    if "single_pred_masks" in outputs:
        outputs["single_pred_masks"] *= -1.0


OUTPUTS: dict[str, Callable[[Named], None]] = {
    "NaN in a mask": nan_in_a_mask,
    "NaN in a score": nan_in_a_score,
    "masks swapped": swapped_masks,
    "masks shifted": shifted_masks,
    "masks scaled": scaled_masks,
    "other scores": other_scores,
    "single mask turned over": negative_single_mask,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_masks_and_scores_are_blamed_on_the_decoder(judged: Judged, name: str) -> None:
    trial = judged.trial(on_decode=OUTPUTS[name])
    assert trial.failed == "decoder", trial.reason
    assert "features" not in trial.reason


def test_a_wrong_single_mask_is_blamed_on_the_decoder(judged: Judged) -> None:
    """Another of the masks that the decoder made: right by itself, and not the one to return."""
    embedding = judged.model.encode(judged.record.images()[0])
    refused = 0
    for choice in range(3):

        def choose(outputs: Named, choice: int = choice) -> None:
            if "single_pred_masks" in outputs:
                objects = outputs["single_pred_masks"].shape[1]
                (case,) = (c for c in judged.record.cases() if len(c.prompts.points) == objects)
                multi = judged.model.decode_packed(embedding, case.prompts, multimask_output=True)
                outputs["single_pred_masks"][0] = multi.low_res_masks[:, choice : choice + 1]

        trial = judged.trial(on_decode=choose)
        refused += trial.failed == "decoder"
    # At most one of the three is the right one, for both calls and all their objects.
    assert refused >= 2


def test_swapped_scores_are_blamed_on_the_decoder(judged: Judged) -> None:
    """Where the scores differ by more than the gate lets pass."""
    spread = 0.0

    def swap(outputs: Named) -> None:
        nonlocal spread
        if "iou_scores" in outputs:
            scores = outputs["iou_scores"]
            spread = max(spread, float(np.abs(scores - scores[..., ::-1]).max()))
            scores[:] = scores[..., ::-1].copy()

    trial = judged.trial(on_decode=swap)
    assert (trial.failed == "decoder") == (spread > GATE_LIMITS.iou_error)
    assert trial.failed in (None, "decoder")


def test_nothing_compared_is_the_encoders_fault() -> None:
    trial = trial_of(Verdict(()))
    assert trial == Trial("encoder", "refused: nothing was compared")
