"""Parity cases whose single mask has a margin."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.export_helpers import tiny_tensors
from torch import Tensor, nn

import sam3rt
from sam3rt.accuracy.record import ParityCase, load_record
from sam3rt.prompts import PackedPrompts
from sam3rt_export import stable_prompts
from sam3rt_export.graphs.sam_decoder import DecoderArchitecture, SamDecoderGraph, SingleMask
from sam3rt_export.parity_inputs import cases_for, default_images
from sam3rt_export.source import ExportSource
from sam3rt_export.sources import open_source
from sam3rt_export.stable_prompts import SHIFTS, most_decided

ARCHITECTURE = DecoderArchitecture(image_size=80, grid=5)


class Scripted(nn.Module):
    """Stands in for a decoder: what each case's masks and scores are is written down.

    The number of the case is the x coordinate of its first point.
    """

    def __init__(self, rule: SingleMask, scores: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.single_mask = rule
        self.scores = scores
        self.architecture = ARCHITECTURE
        self.seen: list[int] = []

    def forward(
        self, features: Any, points: Tensor, labels: Tensor, masks: Tensor, present: Tensor
    ) -> tuple[Tensor, ...]:
        number = int(points[0, 0, 0, 0])
        self.seen.append(number)
        return self.single_mask(*self.scores[number])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    """A tiny SAM 3 of 8 x 8 pixels, opened."""
    path = tmp_path_factory.mktemp("tiny") / "sam3_tiny.pt"
    torch.save(tiny_tensors(), path)
    return open_source(path)


def masks_of(stability: float) -> Tensor:
    """Four masks [1, 4, 20, 20] of which the first has that stability score, in 1/400ths."""
    inner = round(400 * stability)
    first = torch.full((400,), 0.0)  # between the two offsets: outer, not inner
    first[:inner] = 1.0
    others = torch.ones(3, 400)
    return torch.cat([first[None], others]).reshape(1, 4, 20, 20)


def case(number: int) -> ParityCase:
    points = np.array([[[number, 0.0]]], np.float32)
    return ParityCase(f"case_{number}", 0, PackedPrompts(points, np.array([[1]], np.int64), None))


def decide(scores: dict[int, tuple[float, list[float]]], **rule: Any) -> tuple[int, list[int]]:
    """Which case is chosen, by its number, and which ones were looked at."""
    architecture = dataclasses.replace(ARCHITECTURE, **rule)
    made = {
        number: (masks_of(stability), torch.tensor([iou]))
        for number, (stability, iou) in scores.items()
    }
    decoder: Any = Scripted(SingleMask(architecture), made)
    decoder.architecture = architecture
    chosen = most_decided(decoder, (), [case(number) for number in scores])
    return int(chosen.prompts.points[0, 0, 0]), decoder.seen


# Stability from 0.98 on keeps mask 0; below, the best of the others is taken.
STABLE, UNSTABLE, ON_THE_EDGE = 1.0, 0.5, 0.98
APART, CLOSE = [0.9, 0.8, 0.5, 0.4], [0.9, 0.8, 0.7991, 0.4]


@pytest.mark.parametrize(
    ("scores", "chosen", "looked_at"),
    [
        # The first one will do, and nothing more is computed.
        ({0: (STABLE, CLOSE), 1: (STABLE, APART)}, 0, [0]),
        ({0: (UNSTABLE, APART), 1: (STABLE, APART)}, 0, [0]),
        # It hangs by the stability, or by two scores that are nearly equal.
        ({0: (ON_THE_EDGE, APART), 1: (STABLE, CLOSE)}, 1, [0, 1]),
        ({0: (UNSTABLE, CLOSE), 1: (ON_THE_EDGE, APART), 2: (UNSTABLE, APART)}, 2, [0, 1, 2]),
        # None will do: the one nearest to it.
        ({0: (ON_THE_EDGE, APART), 1: (UNSTABLE, CLOSE)}, 1, [0, 1]),
        (
            {0: (UNSTABLE, [0.9, 0.8, 0.797, 0.0]), 1: (UNSTABLE, CLOSE), 2: (ON_THE_EDGE, APART)},
            0,
            [0, 1, 2],
        ),
    ],
)
def test_the_first_case_with_a_margin_is_taken(
    scores: dict[int, tuple[float, list[float]]], chosen: int, looked_at: list[int]
) -> None:
    assert decide(scores) == (chosen, looked_at)


@pytest.mark.parametrize(("second", "chosen"), [(0.8975, 1), (0.8875, 0)])
def test_log_odds_are_judged_as_the_ious_they_mean(second: float, chosen: int) -> None:
    """SAM 3.1's scores near 0.9 are ten times as far apart as the IoUs."""
    ious = torch.tensor([0.5, 0.9, second, 0.1])
    scores = {0: (UNSTABLE, torch.logit(ious).tolist()), 1: (STABLE, APART)}
    assert decide(scores, sigmoid_iou=False)[0] == chosen
    assert decide(scores | {0: (UNSTABLE, ious.tolist())})[0] == chosen


def test_scores_of_the_first_mask_do_not_count() -> None:
    """Equal to another's, it is no rival: only masks 1 to 3 compete."""
    assert decide({0: (UNSTABLE, [0.8, 0.8, 0.5, 0.4]), 1: (STABLE, APART)}) == (0, [0])


def test_a_model_that_always_takes_the_first_mask_is_always_decided() -> None:
    chosen, seen = decide({0: (ON_THE_EDGE, CLOSE), 1: (STABLE, APART)}, single_mask="token0")
    assert (chosen, seen) == (0, [])


def test_the_least_decided_object_counts() -> None:
    rule = SingleMask(ARCHITECTURE)
    two = {
        0: (
            torch.cat([masks_of(STABLE), masks_of(ON_THE_EDGE)]),
            torch.tensor([APART, APART]),
        ),
        1: (torch.cat([masks_of(STABLE), masks_of(STABLE)]), torch.tensor([APART, APART])),
    }
    decoder: Any = Scripted(rule, two)
    assert most_decided(decoder, (), [case(0), case(1)]).name == "case_1"


def test_there_must_be_a_candidate(tiny: ExportSource) -> None:
    with pytest.raises(ValueError, match="no candidate"):
        most_decided(tiny.decoder, (), [])


def test_nothing_stays_hooked_to_the_decoder(tiny: ExportSource) -> None:
    decoder: SamDecoderGraph = tiny.decoder
    images = default_images()
    features = tiny.reference.encode(torch.zeros(1, 3, *tiny.image.size))
    candidates = [cases_for(images, tiny.image, tiny.prompts, shift)[0] for shift in SHIFTS]
    chosen = most_decided(decoder, features, candidates)
    assert not decoder.single_mask._forward_pre_hooks
    # It is the one whose margin is the greatest, or the first that has enough.
    with torch.no_grad():
        margins = [stable_prompts._margin(decoder, features, each) for each in candidates]
    enough = [margin >= 1.0 for margin in margins]
    expected = enough.index(True) if any(enough) else int(np.argmax(margins))
    assert chosen is candidates[expected]


def test_a_failing_decoder_leaves_no_hook(tiny: ExportSource) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever PyTorch raises)
        most_decided(tiny.decoder, (), [case(0)])
    assert not tiny.decoder.single_mask._forward_pre_hooks


def test_shifts_move_prompts_and_keep_them_inside(tiny: ExportSource) -> None:
    images = default_images()
    plain = cases_for(images, tiny.image, tiny.prompts)
    assert SHIFTS[0] == (0.0, 0.0)
    for shift in SHIFTS[1:]:
        assert max(map(abs, shift)) <= 0.05
        moved = cases_for(images, tiny.image, tiny.prompts, shift)
        assert [c.name for c in moved] == [c.name for c in plain]
        for before, after in zip(plain, moved, strict=True):
            real = before.prompts.labels >= 0
            assert np.array_equal(after.prompts.labels, before.prompts.labels)
            if real.any():
                change = after.prompts.points[real] - before.prompts.points[real]
                side = np.array(tiny.image.size[::-1], np.float32)
                assert np.allclose(change / side, shift, atol=1e-5)
                inside = after.prompts.points[real]
                assert (inside >= 0).all()
                assert (inside <= side).all()


def test_single_masks_of_an_export_survive_noise_of_fp16s_size(
    small_model: sam3rt.SegmentationModel,
) -> None:
    """What the margins are for: features off by FP16's rounding lead to the same choices."""
    record = load_record(small_model.bundle)
    clean = small_model.encode(record.images()[0])
    rng = np.random.default_rng(0)
    maps = [
        (a * (1.0 + 2.0**-11 * rng.standard_normal(a.shape))).astype(np.float32)
        for a in clean.features.numpy()
    ]
    noisy = dataclasses.replace(clean, features=small_model.backend.upload(maps))
    decode = small_model.backend.decode
    checked = 0
    for parity_case in record.cases():
        if not parity_case.name.endswith(("box_0", "clicks_0", "box_click_0", "refine_0")):
            continue
        masks = [
            decode(embedding.features, parity_case.prompts, ["single_pred_masks"])[0] > 0
            for embedding in (clean, noisy)
        ]
        both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
        assert both > 0.99 * either, parity_case.name
        checked += 1
    assert checked == 4
