"""The C interface through ctypes: every golden case, and errors as values."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from ctypes import byref, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.c_library import (
    STATUS,
    Library,
    PredictOptions,
    Prompts,
    Sam3rtError,
    copied,
    image,
    prompts,
)
from tests.support.cpp_driver import ROOT
from tests.support.golden_calls import Call, Golden, check_call
from tests.support.helpers import noise
from tests.support.runnable_bundle import runnable_bundle

import sam3rt
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.geometry import MAX_PIXELS, MAX_SIDE
from sam3rt.prompts import MAX_MASK_LOGIT, MAX_OBJECTS, MAX_POINTS

HEADER = (ROOT / "runtime" / "cpp" / "include" / "sam3rt.h").read_text()
CLICK: dict[str, Any] = {"point_coords": [[30, 25]], "point_labels": [1]}


@pytest.fixture(scope="module")
def toy(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[c_void_p]:
    """A predictor of a model of a few nodes, with an image set."""
    loaded = library.load(runnable_bundle(tmp_path_factory.mktemp("toy") / "bundle").path)
    predictor = library.predictor(loaded)
    library.call("predictor_set_image", predictor, byref(image(noise(50, 70))))
    library.c.sam3rt_model_free(loaded)
    yield predictor
    library.c.sam3rt_predictor_free(predictor)


def refused(status: str, subject: str, library: Library, name: str, *arguments: Any) -> str:
    """Assert that a call fails with a status, about a subject; return the message."""
    with pytest.raises(Sam3rtError) as caught:
        library.call(name, *arguments)
    assert (caught.value.status, caught.value.subject) == (status, subject)
    assert caught.value.message
    return caught.value.message


def test_header_and_library_agree(library: Library) -> None:
    assert library.c.sam3rt_version().decode() == sam3rt.__version__
    version = re.search(r"#define SAM3RT_ABI_VERSION (\d+)", HEADER)
    assert version is not None
    assert library.c.sam3rt_abi_version() == int(version.group(1))
    numbers = dict(re.findall(r"SAM3RT_([A-Z_]+) = (\d+)", HEADER))
    assert numbers == {name: str(number) for number, name in enumerate(STATUS)}


def test_every_golden_call(library: Library, golden: Golden) -> None:
    """As a binding makes them; what the decoder alone says is clamped and squeezed by `predict`."""
    model = library.load(golden.bundle)
    manifest = json.loads(library.c.sam3rt_model_manifest_json(model))
    limit = manifest["masks"]["low_res_limit"] or np.inf
    has_scores = any(o["name"] == "object_score_logits" for o in manifest["decoder"]["outputs"])
    library.call("model_prepare", model)
    embeddings = {name: library.encode(model, pixels) for name, pixels in golden.images.items()}
    for name, maps in golden.features.items():
        found = library.maps(embeddings[name])
        assert list(found) == list(maps)
        for key, array in maps.items():
            np.testing.assert_allclose(found[key], array, atol=1e-3, rtol=1e-3)
    for call in golden.calls:
        predictor = library.predictor(model, **call.options)
        library.call("predictor_set_embedding", predictor, embeddings[call.image])
        found = library.predict(predictor, call.arguments)
        check_call(call, golden, *found)
        library.c.sam3rt_predictor_free(predictor)
        single = int(not call.arguments.get("multimask_output", True))
        given = prompts(call.arguments)
        embedding = embeddings[call.image]
        decoded = library.make("model_decode", model, embedding, byref(given), single, None)
        low_res = copied(library.c.sam3rt_prediction_low_res(decoded), np.float32)
        iou = copied(library.c.sam3rt_prediction_iou(decoded), np.float32)
        scores = library.c.sam3rt_prediction_object_scores(decoded)
        np.testing.assert_array_equal(low_res.clip(-limit, limit).reshape(found[2].shape), found[2])
        np.testing.assert_array_equal(iou.reshape(found[1].shape), found[1])
        objects = len(low_res)
        expected_axes = [1, objects] if has_scores and objects else [0, 0]
        assert [scores.axes, scores.shape[0]] == expected_axes
        library.c.sam3rt_prediction_free(decoded)
    check_batches(library, model, golden, embeddings)
    for embedding in embeddings.values():
        library.c.sam3rt_embedding_free(embedding)
    library.c.sam3rt_model_free(model)


def check_batches(
    library: Library, model: c_void_p, golden: Golden, embeddings: dict[str, c_void_p]
) -> None:
    """The calls again, as few as their options allow, each on its own embedding."""
    groups: dict[str, list[Call]] = {}
    for call in golden.calls:
        chosen = [call.arguments.get(name) for name in ("multimask_output", "return_logits")]
        groups.setdefault(str((call.options, chosen)), []).append(call)
    assert max(map(len, groups.values())) > 1
    for calls in groups.values():
        predictor = library.predictor(model, **calls[0].options)
        count = ctypes.c_size_t(len(calls))
        given = (c_void_p * len(calls))(*(embeddings[call.image].value for call in calls))
        library.call("predictor_set_embedding_batch", predictor, given, count)
        found = library.predict_batch(predictor, [call.arguments for call in calls])
        for call, arrays in zip(calls, found, strict=True):
            check_call(call, golden, *arrays)
        library.c.sam3rt_predictor_free(predictor)


def test_verify_and_health(library: Library) -> None:
    """What they say is what Python says of the same bundle: the bundled one, which passes."""
    python = sam3rt.load_model(backend="onnxruntime", device="cpu", threads=1)
    bundle = python.bundle
    expected = list(
        verify(python.backend, bundle.manifest, load_record(bundle), bundle.manifest.parity.limits)
    )
    model, c = library.load(bundle.path, threads=1), library.c
    report = library.make("model_verify", model, None)
    assert c.sam3rt_report_passed(report) == 1
    assert c.sam3rt_report_explanation(report) == b"all outputs are within the gate's limits"
    assert c.sam3rt_report_count(report) == len(expected)
    for number, wanted in enumerate(expected):
        index = ctypes.c_size_t(number)
        names = (
            getattr(c, f"sam3rt_report_{part}")(report, index)
            for part in ("case", "output", "metric")
        )
        assert [name.decode() for name in names] == [wanted.case, wanted.output, wanted.metric]
        assert c.sam3rt_report_value(report, index) == pytest.approx(
            wanted.value, rel=1e-5, abs=2e-6
        )
        assert c.sam3rt_report_limit(report, index) == wanted.limit
        assert c.sam3rt_report_is_within(report, index) == 1
    c.sam3rt_report_free(report)
    health = library.make("model_health", model, None)
    assert c.sam3rt_health_is_healthy(health) == 1, c.sam3rt_health_problem(health)
    assert c.sam3rt_health_problem(health) == b""
    assert c.sam3rt_health_backend(health).decode() == python.backend.name
    assert c.sam3rt_health_device(health).decode() == python.device
    assert c.sam3rt_health_precision(health).decode() == python.backend.precision
    assert c.sam3rt_health_fingerprint(health).decode() == bundle.manifest.fingerprint
    assert c.sam3rt_health_encode_seconds(health) > c.sam3rt_health_decode_seconds(health) > 0
    c.sam3rt_health_free(health)
    c.sam3rt_model_free(model)


def test_what_is_odd_about_prompts_is_said(library: Library, toy: c_void_p) -> None:
    ragged = {"point_coords": [[30, 25], [9, 9], [5, 5]], "point_labels": [1, 0, 1]}
    for arguments, word in (
        (CLICK, ""),
        ({}, "no prompt"),
        ({**CLICK, "point_coords": [[300, 25]]}, "(300, 25)"),
        ({"box": [200, 20, 300, 40]}, "centre of a box"),
        ({**ragged, "point_counts": [2, 1]}, ""),
    ):
        made = library.make("predictor_predict", toy, byref(prompts(arguments)), None)
        warning = library.c.sam3rt_prediction_warning(made).decode()
        assert word in warning
        assert bool(word) == bool(warning)
        objects = 2 if "point_counts" in arguments else 1
        assert library.arrays(made)[0].shape == ((2, 3, 50, 70) if objects == 2 else (3, 50, 70))
        library.c.sam3rt_prediction_free(made)
    assert library.c.sam3rt_prediction_warning(None) == b""


def test_errors_are_utf8_whatever_a_file_holds(library: Library, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(b'{"name": "caf\xe9"}')
    with pytest.raises(Sam3rtError, match="caf\ufffd") as caught:
        library.load(tmp_path)
    assert (caught.value.status, caught.value.subject) == ("BUNDLE_ERROR", "bundle.json")


def test_formats_and_outputs(library: Library, tmp_path: Path) -> None:
    """What services have: images of BGR pixels, and masks for a picture."""
    model = library.load(runnable_bundle(tmp_path / "bundle").path)
    predictor = library.predictor(model)
    pixels = noise(50, 70)
    expected = None
    for form, stored in (
        (0, pixels),
        (1, pixels[..., ::-1]),
        (2, pixels[..., [0, 1, 2, 0]]),
        (3, pixels[..., [2, 1, 0, 0]]),
    ):
        given = image(np.ascontiguousarray(stored))
        given.width, given.format = 70, form
        library.call("predictor_set_image", predictor, byref(given))
        found = library.predict(predictor, CLICK)
        expected = expected or found
        for array, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, wanted)
    given.format = 8
    refused("IMAGE_ERROR", "image", library, "predictor_set_image", predictor, byref(given))
    options = PredictOptions(ctypes.sizeof(PredictOptions), best_mask_only=1, foreground=255)
    made = library.make("predictor_predict", predictor, byref(prompts(CLICK)), byref(options))
    masks, scores, _ = library.arrays(made)
    library.c.sam3rt_prediction_free(made)
    assert expected is not None
    best = int(expected[1].argmax())
    np.testing.assert_array_equal(masks, expected[0][best : best + 1] * np.uint8(255))
    assert scores.tolist() == [expected[1][best]]
    options.foreground = 256
    arguments = (predictor, byref(prompts(CLICK)), byref(options), byref(c_void_p()))
    refused("INVALID_INPUT", "foreground", library, "predictor_predict", *arguments)
    library.c.sam3rt_predictor_free(predictor)
    library.c.sam3rt_model_free(model)


def test_limits_are_pythons(library: Library) -> None:
    numbers = dict(re.findall(r"#define SAM3RT_(MAX_[A-Z_]+) ([\d.]+)", HEADER))
    assert float(numbers.pop("MAX_MASK_LOGIT")) == MAX_MASK_LOGIT
    assert {name: int(number) for name, number in numbers.items()} == {
        "MAX_IMAGE_SIDE": MAX_SIDE,
        "MAX_IMAGE_PIXELS": MAX_PIXELS,
        "MAX_OBJECTS": MAX_OBJECTS,
        "MAX_POINTS": MAX_POINTS,
        "MAX_AXES": 4,
    }


def test_older_callers_structures(library: Library, toy: c_void_p) -> None:
    """Fields that a caller does not know count as zero, whatever lies in their place."""
    given = prompts({**CLICK, "point_counts": [7]})
    given.struct_size = Prompts.point_counts.offset  # as it was before there was such a field
    made = library.make("predictor_predict", toy, byref(given), None)
    expected = library.predict(toy, CLICK)
    for actual, wanted in zip(library.arrays(made), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5, rtol=0)
    library.c.sam3rt_prediction_free(made)


def test_newer_callers_structures(library: Library, toy: c_void_p) -> None:
    """What this library does not know must be 0: it could not be honoured."""
    given = prompts(CLICK)
    size = ctypes.sizeof(Prompts)
    for tail, fits in ((b"\0" * 64, True), (b"\0" * 63 + b"\1", False), (b"\xff", False)):
        longer = ctypes.create_string_buffer(bytes(given) + tail, size + len(tail))
        ctypes.c_size_t.from_buffer(longer).value = len(longer)
        arguments = ("predictor_predict", toy, longer, None)
        if fits:
            library.c.sam3rt_prediction_free(library.make(*arguments))
        else:
            message = refused("INVALID_INPUT", "prompts", library, *arguments, byref(c_void_p()))
            assert f"byte {size + len(tail) - 1}" in message


def test_sizes_that_no_version_had(library: Library, toy: c_void_p) -> None:
    given = prompts(CLICK)
    older, now = Prompts.point_counts.offset, ctypes.sizeof(Prompts)
    for size in (0, 7, 8, Prompts.box.offset, older - 1, older + 1, now - 1, 65537, 2**64 - 1):
        given.struct_size = size
        arguments = ("predictor_predict", toy, byref(given), None, byref(c_void_p()))
        refused("INVALID_INPUT", "prompts", library, *arguments)
