"""The choice among recipes: which one a search ends with, and what a verdict blames."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.build_helpers import RememberingBackend, WrappedBackend, first_cases
from tests.support.helpers import examples, tiny_bundle

from sam3rt.accuracy import select as module
from sam3rt.accuracy.gate import GATE_LIMITS, judge
from sam3rt.accuracy.metrics import Measurement
from sam3rt.accuracy.record import ParityRecord, load_record
from sam3rt.accuracy.run import rerecord, verify
from sam3rt.accuracy.select import Recipe, select
from sam3rt.accuracy.verdicts import StoredVerdict, Subject, verdict_folder
from sam3rt.bundle import Bundle
from sam3rt.errors import BackendError, BundleError, VerificationError
from sam3rt.model import SegmentationModel

# --- the search -----------------------------------------------------------------------------------

Pair = tuple[str, str]
Outcomes = dict[Pair, str]
PASS, ENCODER, DECODER, BROKEN = "passes", "encoder", "decoder", "cannot be opened"
A, B, C = NAMES = ("a", "b", "c")
MEASURED = {
    PASS: Measurement("image 0", "features 0", "cosine", 1.0, 0.999, True),
    ENCODER: Measurement("image 0", "features 0", "cosine", 0.04, 0.999, True),
    DECODER: Measurement("box", "masks", "mean IoU", 0.5, 0.99, True),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "tiny", tiny_bundle(tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts kept in a folder of the test's own, and runners that say what is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load_record", lambda bundle: "a record")
    monkeypatch.setattr(module, "verify", lambda runner, *_: iter([MEASURED[runner.outcome]]))


class Opened:
    """A runner of a script."""

    def __init__(self, pair: Pair, outcome: str) -> None:
        self.pair = pair
        self.outcome = outcome


class Script:
    """Pairs of recipes that do as a table says, and notes of what was asked for."""

    def __init__(self, outcomes: Outcomes, otherwise: str = PASS) -> None:
        self.outcomes = outcomes
        self.otherwise = otherwise
        self.opened: list[Pair] = []
        self.said: list[str] = []
        self.reached: list[tuple[Pair, bool]] = []

    def search(self, bundle: Bundle, names: tuple[str, ...] = NAMES) -> Pair:
        pairs = {
            Recipe("+".join(pair), pair[0], Subject("script", "1", "here", "+".join(pair))): pair
            for pair in itertools.product(names, names)
        }

        def open_recipe(recipe: Recipe) -> Any:
            pair = pairs[recipe]
            self.opened.append(pair)
            outcome = self.outcomes.get(pair, self.otherwise)
            if outcome == BROKEN:
                raise BackendError("no memory")
            return Opened(pair, outcome)

        def on_verdict(recipe: Recipe, verdict: StoredVerdict) -> None:
            self.reached.append((pairs[recipe], verdict.passed))

        found: Any = select(
            bundle, tuple(pairs), open_recipe, say=self.said.append, on_verdict=on_verdict
        )
        return found.pair


def test_the_fastest_pair_is_taken_when_it_passes(
    tiny: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script({})
    assert script.search(tiny) == (A, A)
    assert script.said == [
        "comparing a+a with the parity record",
        "computing in a+a",
    ]
    # One line, so that a service that starts for the first time does not seem to hang.
    assert caplog.text.count("once on this machine") == 1


def test_an_encoder_whose_features_fail_is_not_tried_again(tiny: Bundle) -> None:
    script = Script({(A, A): ENCODER, (B, A): ENCODER})
    assert script.search(tiny) == (C, A)
    assert script.opened == [(A, A), (B, A), (C, A)]


def test_masks_that_fail_send_the_search_to_the_next_decoder(tiny: Bundle) -> None:
    script = Script({(A, A): DECODER, (A, B): DECODER})
    assert script.search(tiny) == (A, C)
    assert script.opened == [(A, A), (A, B), (A, C)]


def test_where_no_decoder_is_good_enough_the_features_were_not(tiny: Bundle) -> None:
    script = Script({(A, A): DECODER, (A, B): DECODER, (A, C): DECODER})
    assert script.search(tiny) == (B, A)
    assert script.opened == [(A, A), (A, B), (A, C), (B, A)]


def test_what_cannot_be_opened_is_passed_over(tiny: Bundle) -> None:
    script = Script({(A, A): BROKEN})
    assert script.search(tiny) == (A, B)
    assert "not a+a: no memory" in script.said


def test_when_nothing_passes_everything_that_was_tried_is_listed(tiny: Bundle) -> None:
    script = Script({}, DECODER)
    with pytest.raises(BackendError) as caught:
        script.search(tiny)
    assert len(script.opened) == 9
    for pair in itertools.product(NAMES, NAMES):
        assert f"not {'+'.join(pair)}: " in str(caught.value)
    assert "mean IoU 0.5, at least 0.99 allowed" in str(caught.value)


def test_a_single_recipe_fails_with_its_own_error(tiny: Bundle) -> None:
    with pytest.raises(VerificationError, match=r"a\+a fails the gate"):
        Script({}, DECODER).search(tiny, (A,))
    with pytest.raises(BackendError, match=r"^no memory$"):
        Script({}, BROKEN).search(tiny, (B,))


def test_a_verdict_is_reached_once(tiny: Bundle) -> None:
    outcomes = {(A, A): DECODER}
    first, second = Script(outcomes), Script(outcomes)
    assert first.search(tiny) == (A, B)
    assert first.reached == [((A, A), False), ((A, B), True)]
    assert second.search(tiny) == (A, B)
    assert second.reached == []
    # What failed is not even opened again.
    assert second.opened == [(A, B)]


def test_a_subject_may_be_found_out_late(tiny: Bundle) -> None:
    """As by a build, which can fail."""
    asked: list[str] = []

    def subject(name: str) -> Subject:
        asked.append(name)
        if name == A:
            raise BackendError("cannot be built")
        return Subject("script", "1", "here", name, files=f"hash of {name}")

    recipes = [Recipe(name, name, lambda name=name: subject(name)) for name in NAMES]
    found: Any = select(tiny, recipes, lambda recipe: Opened((recipe.name, A), PASS))
    assert found.pair == (B, A)
    assert asked == [A, B]
    with pytest.raises(BackendError, match="cannot be built"):
        select(tiny, recipes[:1], lambda recipe: Opened((recipe.name, A), PASS))


def test_a_damaged_record_is_not_the_recipes_fault(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(bundle: Bundle) -> ParityRecord:
        raise BundleError("is cut", "parity.npz")

    monkeypatch.setattr(module, "load_record", damaged)
    with pytest.raises(BundleError, match="is cut"):
        Script({}).search(tiny)


def first_passing(names: tuple[str, ...], outcomes: Outcomes) -> Pair | None:
    """The rule once more: per encoder, decoders until one passes or the features are blamed."""
    for encoder in names:
        for decoder in names:
            outcome = outcomes[encoder, decoder]
            if outcome == PASS:
                return encoder, decoder
            if outcome == ENCODER:
                break
    return None


@given(st.data())
@examples(60)
def test_any_search_ends_at_the_first_pair_that_passes(tiny: Bundle, data: st.DataObject) -> None:
    folder = verdict_folder()
    assert folder is not None
    for path in folder.glob("*.json"):
        path.unlink()
    names = tuple("abcde"[: data.draw(st.integers(1, 5))])
    kinds = st.sampled_from(
        data.draw(st.sampled_from([[ENCODER, DECODER], [PASS, DECODER, ENCODER, BROKEN]]))
    )
    outcomes = {pair: data.draw(kinds) for pair in itertools.product(names, names)}
    script = Script(outcomes)
    expected = first_passing(names, outcomes)
    if expected is None:
        with pytest.raises((BackendError, VerificationError)):
            script.search(tiny, names)
    else:
        assert script.search(tiny, names) == expected
        assert script.opened[-1] == expected
    assert len(set(script.opened)) == len(script.opened)


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

    def verdict(self, **changes: Callable[..., Any]) -> StoredVerdict:
        backend = WrappedBackend(self.backend, **changes)
        manifest = self.model.manifest
        return StoredVerdict.of(judge(verify(backend, manifest, self.record, GATE_LIMITS)))


@pytest.fixture(scope="module", params=["tiny_model", "default_model"])
def judged(request: pytest.FixtureRequest) -> Judged:
    return Judged(request.getfixturevalue(request.param))


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
    verdict = judged.verdict(on_encode=FEATURES[name])
    assert not verdict.passed
    assert verdict.encoder_failed
    assert "features" in verdict.explanation


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3])
def test_small_noise_passes(judged: Judged, size: float) -> None:
    def shake(maps: Maps) -> Maps:
        rng = np.random.default_rng(1)
        return [(a * (1.0 + size * rng.standard_normal(a.shape))).astype(np.float32) for a in maps]

    def tremble(outputs: Named) -> None:
        rng = np.random.default_rng(2)
        for array in outputs.values():
            array *= (1.0 + size * rng.standard_normal(array.shape)).astype(np.float32)

    verdict = judged.verdict(on_encode=shake, on_decode=tremble)
    assert verdict.passed, verdict.explanation


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
    verdict = judged.verdict(on_decode=OUTPUTS[name])
    assert not verdict.passed
    assert not verdict.encoder_failed
    assert "features" not in verdict.explanation
