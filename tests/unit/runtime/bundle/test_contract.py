"""Tests of `sam3rt.bundle.contract`: names, and signatures that must agree."""

from __future__ import annotations

import pytest
from tests.support.helpers import tiny_bundle

from sam3rt.bundle import Manifest, open_bundle
from sam3rt.bundle.contract import (
    HAS_MASKS,
    LABELS,
    MASKS,
    MULTIMASK_OUTPUTS,
    OBJECT_SCORE,
    PIXELS,
    POINTS,
    SINGLE_MASK_OUTPUTS,
    LoadedTensor,
    feature_name,
    signature_mismatch,
)
from sam3rt.bundle.default import default_bundle_path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tiny_bundle(tmp_path_factory.mktemp("contract") / "tiny")


def mismatch(manifest: Manifest, *inputs: LoadedTensor, is_retyped: bool = False) -> str:
    """How a decoder with these inputs, and the promised outputs, differs."""
    outputs = [LoadedTensor(s.name, s.dtype, s.shape) for s in manifest.decoder.outputs]
    return signature_mismatch(manifest.decoder, inputs, outputs, is_retyped=is_retyped)


FEATURES = LoadedTensor("image_embeddings.0", "float32", (None, 256, 72, 72))
CLICKS = LoadedTensor("input_points", "float32", (1, "a", "b", 2))


def test_a_graph_as_promised(manifest: Manifest) -> None:
    assert mismatch(manifest, FEATURES, CLICKS) == ""
    fixed = CLICKS._replace(shape=(1, 7, -1, 2))
    assert mismatch(manifest, FEATURES._replace(shape=(1, 256, 72, 72)), fixed) == ""


@pytest.mark.parametrize(
    "inputs",
    [
        (FEATURES,),
        (CLICKS, FEATURES),
        (FEATURES, CLICKS, CLICKS._replace(name="more")),
        (FEATURES._replace(name="image_embeddings.1"), CLICKS),
        (FEATURES._replace(dtype="float16"), CLICKS),
        (FEATURES._replace(shape=(1, 256, 72, 71)), CLICKS),
        (FEATURES, CLICKS._replace(shape=(1, 1, 2))),
    ],
)
def test_a_graph_that_differs(manifest: Manifest, inputs: tuple[LoadedTensor, ...]) -> None:
    assert "the manifest says" in mismatch(manifest, *inputs)


def test_an_engine_may_have_other_types_and_another_order(manifest: Manifest) -> None:
    half = FEATURES._replace(dtype="float16")
    assert mismatch(manifest, CLICKS, half, is_retyped=True) == ""
    wrong = half._replace(shape=(1, 256, 72, 71))
    assert "71" in mismatch(manifest, CLICKS, wrong, is_retyped=True)
    assert "has inputs" in mismatch(manifest, half, is_retyped=True)


def test_names_are_those_of_the_bundled_model() -> None:
    manifest = open_bundle(default_bundle_path(), check_files=False).manifest
    assert [spec.name for spec in manifest.encoder.inputs] == [PIXELS]
    assert [spec.name for spec in manifest.encoder.outputs] == [feature_name(0)]
    prompts = [POINTS, LABELS, MASKS, HAS_MASKS]
    assert [spec.name for spec in manifest.decoder.inputs] == [feature_name(0), *prompts]
    outputs = [spec.name for spec in manifest.decoder.outputs]
    assert outputs == [*MULTIMASK_OUTPUTS, *SINGLE_MASK_OUTPUTS]
    assert OBJECT_SCORE not in outputs
