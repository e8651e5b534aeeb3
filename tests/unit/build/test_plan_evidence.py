"""What is read from engines: made-up texts here, real ones in test_tensorrt_rtx_builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.build_helpers import toy_bundle
from tests.support.stand_in_builds import Maker, plan_text, run

from sam3rt.bundle import Bundle
from sam3rt_build.builder_process import EngineRequest
from sam3rt_build.errors import BuildError
from sam3rt_build.plan_evidence import (
    BlockEvidence,
    PlanEvidence,
    check_promise,
    evidence_path,
    load_evidence,
    read_engine,
    write_evidence,
)
from sam3rt_build.recipes import HALF_SUMS, RECIPES, Recipe


def read(folder: Path, content: bytes) -> PlanEvidence | None:
    path = folder / "encoder.engine"
    path.write_bytes(content)
    return read_engine(path)


def test_a_text_is_read_block_by_block(tmp_path: Path) -> None:
    evidence = read(tmp_path, plan_text("fp32", "fp16", accumulation=2))
    assert evidence is not None
    assert evidence.layers == 4
    assert evidence.blocks == {
        "blocks.0": BlockEvidence(1, 1, (("fp32", "fp16"),), {"fp32": 3, "fp32 throughout": 1}),
        "blocks.10": BlockEvidence(1, 0, (), {}),
    }
    assert evidence.summary() == (
        f"{evidence.bytes / 1e6:.1f} MB; 4 layers; 1 of 2 attentions fused "
        "(1 with sums in fp32 and fp16); matmuls: 3 in fp32, 1 in fp32 throughout"
    )


@pytest.mark.parametrize("content", [b"\0", b"\n".join([b"an engine"] * 1000)])
def test_an_engine_without_such_text_is_unknown(content: bytes, tmp_path: Path) -> None:
    assert read(tmp_path, content) is None


@pytest.mark.parametrize("recipe", [*RECIPES, HALF_SUMS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    ("second", "accumulation", "broken"),
    [
        ("fp32", 2, ""),
        ("fp16", 2, "blocks.0 adds up a product of its fused attention in less than FP32"),
        ("fp32", 0, "blocks.0 adds up a matmul in less than FP32"),
        ("fp32", 1, "blocks.0 adds up a matmul in less than FP32"),
    ],
)
def test_a_promise_is_held_to_the_evidence(
    recipe: Recipe, second: str, accumulation: int, broken: str, tmp_path: Path
) -> None:
    evidence = read(tmp_path, plan_text("fp32", second, accumulation=accumulation))
    assert evidence is not None
    if broken and recipe.promises_fp32_sums:
        with pytest.raises(BuildError, match=f"recipe {recipe.name}: {broken}"):
            check_promise(recipe, evidence)
    else:
        check_promise(recipe, evidence)


def test_evidence_is_kept_beside_the_engine(tmp_path: Path) -> None:
    evidence = read(tmp_path, plan_text("fp32", "fp32", accumulation=2))
    assert evidence is not None
    engine = tmp_path / "encoder.engine"
    assert load_evidence(engine) is None
    write_evidence(engine, evidence)
    assert load_evidence(engine) == evidence
    evidence_path(engine).write_text("{}")
    assert load_evidence(engine) is None


# --- in a build -----------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return toy_bundle(tmp_path / "toy")


class Writer(Maker):
    """Builds encoders that say what they add up in."""

    def __init__(self, **second: str) -> None:
        super().__init__()
        self.second = second

    def __call__(self, request: EngineRequest) -> None:
        super().__call__(request)
        what = self.made[-1].split()
        if what[0] == "encoder":
            second = self.second.get(what[1], "fp32")
            with Path(request.engine).open("ab") as stream:
                stream.write(plan_text("fp32", second, accumulation=2))


def test_an_engine_that_breaks_its_promise_is_passed_over(toy: Bundle) -> None:
    said: list[str] = []
    maker = Writer(fp16="fp16")
    encoder, decoder, *_ = run(toy, maker, say=said.append)
    assert (encoder.sidecar.recipe, decoder.sidecar.recipe) == ("fp16-activations", "fp16")
    assert any("breaks the promise of recipe fp16: blocks.0" in line for line in said)
    assert not list(toy.path.glob("engines/*-fp16/encoder*"))
    kept = load_evidence(encoder.path)
    assert kept is not None
    assert kept.blocks["blocks.0"].attention_sums == (("fp32", "fp32"),)
    assert any(line.endswith(kept.summary()) for line in said)
    # Made-up decoders say nothing.
    assert load_evidence(decoder.path) is None
    assert any(line.endswith("what it computes with is unknown") for line in said)


def test_old_evidence_does_not_outlive_its_engine(toy: Bundle) -> None:
    encoder, *_ = run(toy, Writer(), precision=("fp16",))
    assert evidence_path(encoder.path).is_file()
    encoder, *_ = run(toy, Maker(), precision=("fp16",))
    assert not evidence_path(encoder.path).exists()


def test_a_discarded_engine_leaves_no_evidence(toy: Bundle) -> None:
    maker = Writer()
    maker.fails = lambda what: BuildError("no kernel") if what.startswith("decoder") else None
    with pytest.raises(BuildError, match="no kernel"):
        run(toy, maker, precision=("fp16",))
    assert not list(toy.path.glob("engines/*/*"))
