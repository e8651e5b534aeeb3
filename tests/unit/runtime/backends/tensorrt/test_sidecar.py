"""Sidecars: what is written is read back, and anything else is refused with one exception."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.helpers import examples, flip
from tests.support.tensorrt_helpers import SIDECAR

from sam3rt import BundleError
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.sidecar import (
    EngineShapes,
    EngineSidecar,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)


def written(folder: Path, sidecar: EngineSidecar = SIDECAR) -> Path:
    engine = folder / sidecar.engine.file
    write_sidecar(engine, sidecar)
    return engine


def edited(folder: Path, **changes: Any) -> Path:
    engine = written(folder)
    document = json.loads(sidecar_path(engine).read_text()) | changes
    sidecar_path(engine).write_text(json.dumps(document))
    return engine


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)


@given(
    names,
    names,
    st.text(max_size=40),
    st.dictionaries(st.text(max_size=20), st.floats(-1e30, 1e30)),
    st.lists(st.sampled_from(["7.5", "8.6", "8.9", "12.0"]), max_size=3),
)
@examples(60)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    recipe: str,
    version: str,
    name: str,
    parity: dict[str, float],
    targets: list[str],
) -> None:
    sidecar = msgspec.structs.replace(
        SIDECAR,
        recipe=recipe,
        tensorrt_version=version,
        gpu=Gpu(name, "10.3"),
        parity=parity,
        targets=tuple(targets),
    )
    assert read_sidecar(written(tmp_path_factory.mktemp("s"), sidecar)) == sidecar


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_figures_that_json_does_not_know(value: float, tmp_path: Path) -> None:
    engine = written(tmp_path, msgspec.structs.replace(SIDECAR, parity={"a": value, "b": 1.0}))
    text = sidecar_path(engine).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["parity"] == {"a": None, "b": 1.0}
    parity = read_sidecar(engine).parity
    assert math.isnan(parity["a"])
    assert parity["b"] == 1.0


def test_ahead_of_time_engines_have_targets_in_place_of_a_gpu(tmp_path: Path) -> None:
    sidecar = msgspec.structs.replace(
        SIDECAR,
        gpu=None,
        targets=("8.6", "8.9"),
        driver_version=None,
        state="unproven",
        paired_with=None,
    )
    assert read_sidecar(written(tmp_path, sidecar)) == sidecar


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, '"format" is not'),
        ({"format_version": 2}, "update sam3rt or build the engine again"),
        ({"role": "teacher"}, "Invalid enum value 'teacher' - at `$.role`"),
        ({"recipe": "../fp16"}, "not a plain name"),
        ({"recipe": 16}, "Expected `str`, got `int` - at `$.recipe`"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"gpu": None}, "names neither a GPU nor the targets"),
        ({"gpu": None, "targets": ["8.9"]}, "is proven but names no GPU"),
        ({"gpu": {"name": "x", "compute_capability": "89"}}, "'89' is not a compute capability"),
        ({"targets": ["eight"]}, "'eight' is not a compute capability"),
        ({"bundle_fingerprint": "xyz"}, "is not a SHA-256"),
        ({"paired_with": "xyz"}, "is not a SHA-256"),
        ({"role": "encoder"}, '"paired_with" is for decoders only'),
        ({"engine": {"file": "encoder.engine", "sha256": "ab" * 32, "bytes": 1}}, "another file"),
        ({"engine": {"file": "decoder.engine", "sha256": "ab" * 32, "bytes": 0}}, "not positive"),
        ({"parity": {"a": "good"}}, "Expected `float`, got `str` - at `$.parity"),
        ({"parity": [1]}, "Expected `object`, got `array` - at `$.parity`"),
        ({"build_seconds": -1}, "is not a duration"),
        (
            {"shapes": {"max_objects": 0, "max_points": 1, "max_images": 1}},
            '"shapes" is not positive',
        ),
    ],
)
def test_what_breaks_a_rule_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        read_sidecar(edited(tmp_path, **changes))
    assert message in str(caught.value)
    assert caught.value.file == "decoder.engine.json"


@given(st.integers(0, 4000))
@examples(80)
def test_a_flipped_bit_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, bit: int
) -> None:
    """A sidecar is not signed; but nothing in one raises anything but BundleError."""
    engine = written(tmp_path_factory.mktemp("s"))
    content = sidecar_path(engine).read_bytes()
    sidecar_path(engine).write_bytes(flip(content, bit % (len(content) * 8)))
    with contextlib.suppress(BundleError):
        read_sidecar(engine)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{", b'{"format": NaN}', b"[" * 9000])
def test_what_is_not_a_sidecar_is_refused(content: bytes, tmp_path: Path) -> None:
    engine = tmp_path / "decoder.engine"
    sidecar_path(engine).write_bytes(content)
    with pytest.raises(BundleError):
        read_sidecar(engine)


def test_a_missing_or_huge_sidecar_is_refused(tmp_path: Path) -> None:
    engine = tmp_path / "decoder.engine"
    with pytest.raises(BundleError, match="is missing"):
        read_sidecar(engine)
    sidecar_path(engine).write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(BundleError, match="larger"):
        read_sidecar(engine)


def test_a_sidecar_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    engine = written(tmp_path)
    before = sidecar_path(engine).read_bytes()
    with pytest.raises(BundleError, match="another file"):
        write_sidecar(tmp_path / "other.engine", SIDECAR)
    with pytest.raises(BundleError, match="not positive"):
        write_sidecar(engine, msgspec.structs.replace(SIDECAR, shapes=EngineShapes(1, 0, 1)))
    assert sidecar_path(engine).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.engine.json"]
