"""Tests of `sam3rt.bundle.contract`: names, and signatures that must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from tests.support.helpers import external_weights, tiny_bundle

from sam3rt import BundleError
from sam3rt.bundle import Bundle, Manifest, open_bundle
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
    graph_source,
    load_graph,
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


# --- graphs in memory -----------------------------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path) -> Bundle:
    """The bundled model with its decoder's large weights in a file beside it."""
    return external_weights(tmp_path / "external")


def feed(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    """A click at one place, on features that are numbers."""
    grid = (1, *bundle.manifest.encoder.outputs[0].shape[1:])
    rng = np.random.default_rng(0)
    return {
        "image_embeddings.0": rng.normal(size=grid).astype(np.float32),  # type: ignore[arg-type]
        POINTS: np.full((1, 1, 1, 2), 300, np.float32),
        LABELS: np.ones((1, 1, 1), np.int64),
        MASKS: np.zeros((1, 1, *bundle.manifest.prompts.mask_size), np.float32),
        HAS_MASKS: np.zeros(1, np.float32),
    }


def test_a_graph_without_weights_beside_it_is_its_bytes() -> None:
    bundle = open_bundle(default_bundle_path())
    loaded = load_graph(bundle, bundle.manifest.decoder)
    assert loaded.model == (bundle.path / "decoder.onnx").read_bytes()
    assert loaded.weights == {}
    assert loaded.with_addresses() is loaded.model
    assert graph_source(bundle, bundle.manifest.decoder) == loaded.model


def test_what_was_hashed_is_run_whatever_becomes_of_the_files(external: Bundle) -> None:
    """In both libraries, and as the bundled model says."""
    loaded = load_graph(external, external.manifest.decoder)
    (external.path / "decoder.data").write_bytes(b"")
    (external.path / "decoder.onnx").unlink()
    assert list(loaded.weights) == ["decoder.data"]

    inputs, name = feed(external), SINGLE_MASK_OUTPUTS[0]
    original = default_bundle_path() / "decoder.onnx"
    (wanted,) = onnxruntime.InferenceSession(original).run([name], inputs)

    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(loaded.with_addresses()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled(inputs)[name], wanted, atol=1e-3 * np.abs(wanted).max())

    options = onnxruntime.SessionOptions()
    weights = loaded.initializers()
    options.add_external_initializers(
        list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in weights.values()]
    )
    session = onnxruntime.InferenceSession(loaded.model, options)
    for array in loaded.weights.values():
        array[:] = 0  # the session has its own copy, so that they need not live as long
    np.testing.assert_array_equal(session.run([name], inputs)[0], wanted)


def test_weights_that_changed_are_refused(external: Bundle) -> None:
    path = external.path / "decoder.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.data.*SHA-256"):
        load_graph(external, external.manifest.decoder)
    assert graph_source(external, external.manifest.decoder) == str(external.path / "decoder.onnx")
    path.write_bytes(content[:-1])
    for load in (load_graph, graph_source):
        with pytest.raises(BundleError, match=r"decoder\.data.*bytes"):
            load(external, external.manifest.decoder)


def test_a_graph_that_changed_is_refused(external: Bundle) -> None:
    path = external.path / "decoder.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    for load in (load_graph, graph_source):
        with pytest.raises(BundleError, match=r"decoder\.onnx.*SHA-256"):
            load(external, external.manifest.decoder)
