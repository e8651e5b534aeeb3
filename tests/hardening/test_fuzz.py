"""Every fuzz target in short; `benchmarks/hardening/fuzz.py` runs them by the hundred thousand."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
from benchmarks.hardening import fuzz
from hypothesis import given
from hypothesis import strategies as st
from tests.support import fuzz_targets as targets
from tests.support.helpers import examples

from sam3rt.errors import Sam3rtError


@pytest.fixture(autouse=True)
def pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a target sets."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_get_behind_the_first_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run would change nothing but what is refused at once."""
    refusals: list[BaseException] = []

    @contextlib.contextmanager
    def noticed(*kinds: type[BaseException]) -> Any:
        try:
            yield
        except kinds as error:
            refusals.append(error)

    monkeypatch.setattr(targets.contextlib, "suppress", noticed)
    seeds = list(targets.seeds(name))
    assert seeds
    taken = 0
    for seed in seeds:
        refusals.clear()
        targets.TARGETS[name](seed)
        tries = 2 if name in ("manifest", "embedding", "parity") else 1
        taken += len(refusals) < tries
    assert taken


@pytest.mark.parametrize("name", targets.TARGETS)
def test_changed_seeds_raise_only_what_is_documented(name: str) -> None:
    seeds = list(targets.seeds(name))

    @given(data=st.data())
    @examples(60)
    def check(data: st.DataObject) -> None:
        content = bytearray(data.draw(st.sampled_from(seeds)))
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(content)))
            end = data.draw(st.integers(start, min(len(content), start + 40)))
            content[start:end] = data.draw(st.binary(max_size=40))
        targets.TARGETS[name](bytes(content))

    check()


@pytest.mark.parametrize("name", sorted(targets.JSON_TARGETS))
def test_changed_json_raises_only_what_is_documented(name: str) -> None:
    for seed in targets.seeds(name):
        content = seed
        for number in range(300):
            changed = targets.change_json(content, number)
            if changed is None or number % 5 == 0:
                content = seed
                continue
            targets.TARGETS[name](changed)
            content = changed


def test_every_target_has_its_share() -> None:
    assert set(fuzz.SHARES) == set(targets.TARGETS)
    assert sum(fuzz.SHARES.values()) == pytest.approx(1)


def test_an_undocumented_exception_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("undocumented")

    monkeypatch.setattr(targets, "parse_manifest", fail)
    assert not issubclass(KeyError, Sam3rtError)
    with pytest.raises(KeyError):
        targets.manifest(b"{}")


def test_prompts_of_every_kind_are_drawn() -> None:
    rng = np.random.default_rng(1)
    kinds = {type(targets._Values(rng.bytes(60)).any()).__name__ for _ in range(300)}
    assert {"NoneType", "ndarray", "list", "str", "dict", "int"} <= kinds
