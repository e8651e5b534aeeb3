"""Two ways of running one bundle, side by side: whole, layer by layer, and on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from tests.support.build_helpers import RememberingBackend, first_cases

from sam3rt.accuracy.record import load_record
from sam3rt.bundle import Bundle, ParityLimits, open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli import main
from sam3rt.errors import InvalidInputError
from sam3rt.model import SegmentationModel
from sam3rt_build import compare
from sam3rt_build.compare import LayerDifference, Side, compare_layers, compare_models, parse_side
from sam3rt_build.graph_files import load_graph
from sam3rt_build.recipes import Recipe
from sam3rt_build.typed_graph import FeaturesType

EXACT = ParityLimits(
    feature_error=5e-4, feature_cosine=0.999999, logit_error=1e-3, iou_error=1e-3, mask_iou=0.998
)
ORT = Side("onnxruntime", "auto")


@pytest.fixture(scope="module")
def default() -> Bundle:
    return open_bundle(default_bundle_path(), check_files=False)


@pytest.fixture(scope="module")
def opened() -> dict[Side, SegmentationModel]:
    """The models opened so far."""
    return {}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, opened: dict[Side, SegmentationModel]) -> None:
    """One call of the record in place of all, and models that remember what they returned."""
    real = compare.open_side

    def open_once(bundle: Bundle, side: Side) -> SegmentationModel:
        if side not in opened:
            model = real(bundle, side)
            opened[side] = SegmentationModel(bundle, RememberingBackend(model.backend))
        return opened[side]

    monkeypatch.setattr(compare, "open_side", open_once)
    monkeypatch.setattr(compare, "load_record", lambda b: first_cases(load_record(b), "box_click"))


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("onnxruntime", Side("onnxruntime", "auto")),
        ("openvino:bf16", Side("openvino", "bf16")),
        ("tensorrt:fp16", Side("tensorrt", "fp16")),
        ("tensorrt-rtx", Side("tensorrt-rtx", "auto")),
        ("simulated:fp16-half-sums", Side("simulated", "fp16-half-sums")),
    ],
)
def test_a_side_is_read_and_named(text: str, side: Side) -> None:
    assert parse_side(text) == side
    assert side.name == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "one of .*onnxruntime.*simulated"),
        ("torch", "got 'torch', expected one of .*tensorrt"),
        ("ONNXRUNTIME", "one of"),
        ("simulated", "simulated: with one of fp16, fp16-activations"),
        ("simulated:fp8", "got 'simulated:fp8', expected simulated: with one of fp16"),
        ("simulated:auto", "simulated: with one of"),
    ],
)
def test_a_side_that_is_not_there(text: str, expected: str) -> None:
    with pytest.raises(InvalidInputError, match=expected):
        parse_side(text)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_whole_models_are_judged_by_the_first(default: Bundle) -> None:
    verdict = compare_models(default, ORT, Side("simulated", "fp16"))
    assert verdict.passed, verdict.explain()
    worst = verdict.worst()
    assert 0.999 < worst["features 0 cosine"].value < 1.0
    assert 0.0 < worst["logits relative error"].value < 0.05
    verdict = compare_models(default, ORT, ORT)
    assert verdict.worst()["features 0 relative error"].value == 0.0
    assert verdict.worst()["logits relative error"].value == 0.0


@pytest.mark.slow
def test_layers_come_in_graph_order_and_drift_apart(default: Bundle) -> None:
    pattern = r"^(stem1/Conv|stages\.\d\.\d\.fc2/Add)"
    found = list(compare_layers(default, "encoder", ORT, Side("simulated", "fp16"), pattern))
    order = [node.name for node in load_graph(default, "encoder").graph]
    layers, output = found[:-1], found[-1]
    assert len(layers) == 11
    assert [layer.layer for layer in layers] == sorted(
        (layer.layer for layer in layers), key=order.index
    )
    assert output.layer == "image_embeddings.0"
    assert output.shape == (1, 256, 64, 64)
    for layer in found:
        assert 0.999 < layer.cosine < 1.0, layer
        assert 0.0 < layer.error < 0.1 * layer.largest, layer
    # One rounding and then many.
    assert layers[0].layer == "stem1/Conv_0"
    assert all(layer.cosine < layers[0].cosine for layer in found[1:])


@pytest.mark.usefixtures("quick")
def test_layers_of_a_decoder_and_a_side_with_itself(default: Bundle) -> None:
    pattern = r"^blocks\.\d\.mlp\.2/Add"
    found = list(compare_layers(default, "decoder", ORT, Side("simulated", "fp32"), pattern))
    specs = [spec.name for spec in default.manifest.decoder.outputs]
    assert [layer.layer for layer in found] == [
        "blocks.0.mlp.2/Add_0",
        "blocks.1.mlp.2/Add_0",
        *specs,
    ]
    assert all(layer.error == 0.0 for layer in found)
    assert all(layer.cosine == pytest.approx(1.0) for layer in found)
    # Prompt tokens are few and image tokens many: it is the decoder's first case that ran.
    assert found[0].shape[-1] == 256


@pytest.mark.usefixtures("quick")
def test_layers_that_differ_show_where(default: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the second side is wrong: layers before it agree, those after it do not."""
    real: Callable[..., None] = compare.simulate

    def spoil(model: ir.Model, recipe: Recipe, features: FeaturesType) -> None:
        real(model, recipe, features)
        (node,) = (n for n in model.graph if n.name == "blocks.1.mlp.0/MatMul_0")
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        wrong = weight.const_value.numpy() * np.float32(-1.0)
        weight.const_value = ir.tensor(wrong, name=weight.name)

    monkeypatch.setattr(compare, "simulate", spoil)
    pattern = r"^blocks\.\d\.mlp\.2/Add"
    found = list(compare_layers(default, "decoder", ORT, Side("simulated", "fp32"), pattern))
    assert found[0].error == 0.0
    assert all(layer.cosine < 0.99 for layer in found[1:2])
    assert all(layer.error > 0.0 for layer in found[1:])


@pytest.mark.parametrize(
    "side", [Side("openvino", "auto"), Side("tensorrt", "auto"), Side("openvino", "bf16")]
)
def test_sides_without_layers(default: Bundle, side: Side) -> None:
    with pytest.raises(InvalidInputError, match="onnxruntime, simulated:RECIPE or tensorrt:RECIPE"):
        list(compare_layers(default, "decoder", ORT, side, "mlp"))


def test_two_flavours_of_tensorrt_do_not_share_a_process(default: Bundle) -> None:
    sides = (Side("tensorrt", "fp16"), Side("tensorrt-rtx", "fp16"))
    with pytest.raises(InvalidInputError, match="both TensorRT flavours"):
        list(compare_layers(default, "decoder", *sides, "mlp"))


def test_values_that_are_nan_or_zero() -> None:
    zero, one = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    difference = compare._difference
    assert difference("x", zero, zero) == LayerDifference("x", (2, 3), 1.0, 0.0, 0.0)
    assert difference("x", zero, one) == LayerDifference("x", (2, 3), 0.0, 1.0, 0.0)
    assert difference("x", one, -one).cosine == pytest.approx(-1.0)
    assert math.isnan(difference("x", one, np.full((2, 3), np.nan, np.float32)).cosine)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_command_shows_figures_and_succeeds(
    default: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(default.path), "onnxruntime", "simulated:fp16"]) == 0
    shown = capsys.readouterr().out
    assert "simulated:fp16 against onnxruntime" in shown
    assert "features 0 cosine" in shown
    assert "<-- off" not in shown


@pytest.mark.usefixtures("quick")
def test_the_command_exits_with_one_where_the_second_is_off(
    default: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held to what only FP32 reaches."""
    monkeypatch.setattr(compare, "GATE_LIMITS", EXACT)
    assert main(["compare", str(default.path), "onnxruntime", "simulated:fp16"]) == 1
    shown = capsys.readouterr()
    assert "<-- off" in shown.out
    assert "outside the gate's limits: image 0 features 0: " in shown.err


@pytest.mark.usefixtures("quick")
def test_the_command_shows_layers(default: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(default.path), "onnxruntime", "simulated:fp16-half-sums"]
    assert main([*arguments, "--graph", "decoder", "--layers", r"mlp\.2/Add"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "shape", "cosine", "max", "error", "largest"]
    assert lines[1].startswith("blocks.0.mlp.2/Add_0")
    assert len(lines) == 1 + 2 + len(default.manifest.decoder.outputs)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["onnxruntime", "torch"], "side: got 'torch'"),
        (["simulated", "onnxruntime"], "simulated: with one of"),
        (["onnxruntime", "onnxruntime", "--graph", "decoder"], "--graph: got 'decoder', expected"),
    ],
)
def test_the_command_names_a_wrong_side(
    default: Bundle, sides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(default.path), *sides]) == 1
    assert message in capsys.readouterr().err
