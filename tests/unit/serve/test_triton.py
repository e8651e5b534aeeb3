"""The model repository for Triton: as it is written, and in the real server from PyPI."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise
from tests.support.serving import (
    ROOT,
    TRITON_PACKAGES,
    TritonServer,
    check_equal,
    clicks,
    environment,
    image_file,
    predicted,
)

from sam3rt import SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt.cli import main
from sam3rt_serve.core import ObjectPrompt
from sam3rt_serve.triton_model import Model

IMAGE = noise(24, 31)
FILE = np.frombuffer(image_file(IMAGE), np.uint8)
POINT = {
    "points": np.array([[[12, 9]]], np.float32),
    "labels": np.array([[1]], np.int32),
}


@pytest.fixture(scope="module")
def predictor(toy: SegmentationModel) -> SAM3InteractiveImagePredictor:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    return predictor


def test_a_repository_is_written_whole_and_never_over_another(
    toy: SegmentationModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models" / "repository"
    write = ["triton", str(repository), "--bundle", str(toy.bundle.path)]
    assert main([*write, "--instances", "3", "--device", "cuda:0", "--deadline", "7"]) == 0
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*.*"))
    assert files == sorted(
        f"sam3rt_{role}/{name}"
        for role in ("decode", "encode", "segment", "session")
        for name in ("1/model.py", "config.pbtxt")
    )
    for path in repository.rglob("model.py"):
        compile(path.read_text(), path, "exec")
        assert str(ROOT / "runtime") in path.read_text()
    config = (repository / "sam3rt_decode" / "config.pbtxt").read_text()
    assert "count: 3 kind: KIND_GPU" in config
    assert "max_queue_size: 256 default_timeout_microseconds: 7000000" in config
    assert (repository / "sam3rt_decode" / "warmup" / "image_id").read_bytes()[4:] == b"warm-up"
    assert str(tmp_path / "models" / "repository-embeddings") in config
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]
    assert main(write) == 1
    assert "repository, which exists" in capsys.readouterr().err


class Tensor(SimpleNamespace):
    """Triton's own, as far as the model uses it."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        super().__init__(name=name, as_numpy=lambda: array)


class Request(SimpleNamespace):
    """A request that can be cancelled."""

    def __init__(self, **inputs: NDArray[Any]) -> None:
        super().__init__(inputs=inputs, cancelled=False, microseconds=0, sequence=(0, 0))

    def timeout(self) -> int:
        return int(self.microseconds)

    def correlation_id(self) -> int:
        return int(self.sequence[0])

    def flags(self) -> int:
        return int(self.sequence[1])

    def is_cancelled(self) -> bool:
        return bool(self.cancelled)


class TritonError(Exception):
    NOT_FOUND, UNAVAILABLE, INVALID_ARG, INTERNAL, CANCELLED = "NUIXC"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


UTILITIES = SimpleNamespace(
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START=1,
    Tensor=Tensor,
    TritonError=TritonError,
    InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(
        outputs={one.name: one.as_numpy() for one in output_tensors}, error=error
    ),
    get_input_tensor_by_name=lambda request, name: (
        Tensor(name, request.inputs[name]) if name in request.inputs else None
    ),
)


@pytest.fixture
def instance(toy: SegmentationModel, tmp_path: Path) -> Iterator[Any]:
    """Makes instances of the three models, which share a folder."""
    made = []

    def make(role: str) -> Model:
        options = {
            "role": role,
            "bundle": str(toy.bundle.path),
            "backend": "onnxruntime",
            "device": "cpu",
            "precision": "auto",
            "threads": 1,
            "cache_bytes": 1 << 20,
            "cache_folder": str(tmp_path),
            "limits": {"objects": 3},
        }
        parameters = {"options": {"string_value": json.dumps(options)}}
        config = json.dumps({"parameters": parameters})
        arguments = {"model_config": config, "model_instance_kind": "CPU"}
        made.append(Model(arguments, UTILITIES))
        return made[-1]

    yield make
    for model in made:
        model.finalize()


def batch(**inputs: NDArray[Any]) -> Request:
    return Request(**{name: array[None] for name, array in inputs.items()})


def test_instances_share_embeddings(
    instance: Any, predictor: SAM3InteractiveImagePredictor
) -> None:
    encoder, decoder = instance("encode"), instance("decode")
    first, second, bad = encoder.execute(
        [Request(image=FILE), Request(pixels=IMAGE), Request(image=FILE, pixels=IMAGE)]
    )
    assert first.outputs["size"].tolist() == [24, 31]
    assert bad.error.code == TritonError.INVALID_ARG
    expected = predicted(predictor, ObjectPrompt([(12, 9)], [1]))
    for answer in (first, second):
        image_id = answer.outputs["image_id"]
        (found,) = decoder.execute([batch(image_id=image_id, **POINT)])
        found = [found.outputs[name][0, 0] for name in ("masks", "scores", "low_res_masks")]
        check_equal(found, expected)


def test_bad_requests_fail_alone(instance: Any) -> None:
    encoder, decoder = instance("encode"), instance("decode")
    (stored,) = encoder.execute([Request(image=FILE)])
    image_id = stored.outputs["image_id"]
    nobody = np.array([b"nobody"], np.object_)
    requests = {
        "": batch(image_id=image_id, **POINT),
        "N": batch(image_id=nobody, **POINT),
        "IX": batch(image_id=image_id),
        "IXX": batch(image_id=image_id, points=POINT["points"]),
        "I": batch(image_id=image_id, **POINT, boxes=np.zeros((2, 4), np.float32)),
        "II": batch(image_id=image_id, **POINT | {"labels": np.array([[7]], np.int32)}),
        "III": Request(image_id=np.stack([image_id] * 2)),
        "IIII": batch(**POINT),
        "XX": batch(image_id=image_id, points=np.broadcast_to(np.float32(1), (1, 2, 2))),
    }
    answers = decoder.execute(list(requests.values()))
    codes = [answer.error.code if answer.error else "" for answer in answers]
    assert codes == ["", "N", "I", "I", "I", "I", "I", "I", "X"]
    assert "numpy<2" in str(answers[-1].error)
    (garbage,) = encoder.execute([Request(image=FILE[:50])])
    assert garbage.error.code == "I"


def test_limits_timeouts_and_cancellation(instance: Any) -> None:
    encoder, decoder = instance("encode"), instance("decode")
    (stored,) = encoder.execute([Request(image=FILE)])
    click = {"image_id": stored.outputs["image_id"], **POINT}
    many = {name: np.repeat(array, 4, axis=0) for name, array in POINT.items()}
    gate = threading.Event()
    service = decoder._service
    for _ in service.clicks.threads:  # nobody is free to answer
        service.segment("warm-up", [ObjectPrompt([(1, 1)], [1])], finish=lambda _: gate.wait(10))
    late, gone = batch(**click), batch(**click)
    late.microseconds, gone.cancelled = 1, True
    threading.Timer(0.5, gate.set).start()
    answers = decoder.execute([batch(**click | many), gone, late, batch(**click)])
    assert [answer.error and answer.error.code for answer in answers] == ["I", "C", "C", None]
    assert "at most 3" in str(answers[0].error)
    assert "cancelled" in str(answers[1].error)
    assert "its turn" in str(answers[2].error)


def test_a_sequence_refines(instance: Any, predictor: SAM3InteractiveImagePredictor) -> None:
    (stored,) = instance("encode").execute([Request(image=FILE)])
    one = ObjectPrompt([(12, 9)], [1])
    first = predicted(predictor, one)
    refined = predicted(predictor, one, mask=first[2][first[1].argmax()])
    model = instance("session")
    # Sequence, whether it starts, and what comes.
    for number, flags, expected in ((1, 1, first), (2, 1, first), (1, 0, refined), (1, 1, first)):
        request = batch(image_id=stored.outputs["image_id"], **POINT)
        request.sequence = (number, flags)
        (answer,) = model.execute([request])
        names = ("masks", "scores", "low_res_masks")
        check_equal([answer.outputs[name][0, 0] for name in names], expected)


def test_the_whole_in_one_call(instance: Any, predictor: SAM3InteractiveImagePredictor) -> None:
    objects = [one for one in clicks(12, 24, 31) if len(one.points) == 2 and one.box]
    (found,) = instance("segment").execute(
        [
            Request(
                image=FILE,
                points=np.array([one.points for one in objects], np.float32),
                labels=np.array([one.labels for one in objects], np.int32),
                boxes=np.array([one.box for one in objects], np.float32),
                multimask=np.array([False]),
            )
        ]
    )
    for number, one in enumerate(objects):
        single = [found.outputs[n][number] for n in ("masks", "scores", "low_res_masks")]
        as_float32 = ObjectPrompt(
            np.array(one.points, np.float32).tolist(), one.labels, np.float32(one.box).tolist()
        )
        check_equal(single, predicted(predictor, as_float32, False))


# --- the real server ------------------------------------------------------------------------------


# Runs in the server's environment, which has Triton's clients and NumPy 1.
_CLIENT = """
import sys, threading
import numpy as np
import tritonclient.grpc, tritonclient.http
import tritonclient.utils

for library in (tritonclient.grpc, tritonclient.http):
    library.InferenceServerException = tritonclient.utils.InferenceServerException

cases = np.load(sys.argv[1])
TYPES = {"float32": "FP32", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}

def tensors(library, arrays):
    inputs = []
    for name, array in arrays.items():
        inputs.append(library.InferInput(name, array.shape, TYPES.get(array.dtype.name, "BYTES")))
        inputs[-1].set_data_from_numpy(array)
    return inputs

def call(library, client, model, options={}, **arrays):
    return client.infer(model, tensors(library, arrays), **options)

def check(library, client):
    stored = call(library, client, "sam3rt_encode", image=cases["image"])
    image_id = stored.as_numpy("image_id")[None]
    prompts = dict(points=cases["points"][None], labels=cases["labels"][None])
    # Whichever instance answers finds the image.
    for _ in range(5):
        found = call(library, client, "sam3rt_decode", image_id=image_id, **prompts)
        for name in ("masks", "scores", "low_res_masks"):
            np.testing.assert_array_equal(found.as_numpy(name)[0, 0], cases[name])
    found = call(library, client, "sam3rt_segment", image=cases["image"],
                 points=cases["points"], labels=cases["labels"])
    np.testing.assert_array_equal(found.as_numpy("masks")[0], cases["masks"])
    nobody = np.array([[b"nobody"]], np.object_)
    for kind, model, arrays in (
        ("UnknownImageError", "sam3rt_decode", dict(image_id=nobody, **prompts)),
        ("ImageError", "sam3rt_encode", dict(image=np.zeros(9, np.uint8))),
        ("TooLargeError", "sam3rt_encode", dict(image=np.zeros(2 << 20, np.uint8))),
        ("PromptError", "sam3rt_decode", dict(image_id=image_id)),
    ):
        try:
            call(library, client, model, **arrays)
        except library.InferenceServerException as error:
            assert kind in str(error), error
        else:
            raise AssertionError(kind)
    # A sequence stays with its instance, which knows the earlier mask. A new start forgets it.
    sequence = threading.get_ident() % (1 << 60)
    for start, end, expected in ((1, 0, "masks"), (0, 0, "refined"), (1, 1, "masks")):
        found = call(library, client, "sam3rt_session", image_id=image_id, **prompts, options=dict(
            sequence_id=sequence, sequence_start=bool(start), sequence_end=bool(end)))
        np.testing.assert_array_equal(found.as_numpy("masks")[0, 0], cases[expected])

def cancel(port):
    # Clients that give up disturb nobody.
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}")
    stored = call(tritonclient.grpc, client, "sam3rt_encode", image=cases["image"])
    inputs = tensors(tritonclient.grpc, dict(
        image_id=stored.as_numpy("image_id")[None], points=cases["points"][None],
        labels=cases["labels"][None]))
    ended = threading.Semaphore(0)
    errors = []
    def over(result, error):
        errors.append(error)
        ended.release()
    for _ in range(200):
        client.async_infer("sam3rt_decode", inputs, over).cancel()
    for _ in range(200):
        assert ended.acquire(timeout=30)
    assert any("ancel" in str(error) for error in errors), errors[:3]

def guarded(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        failed.append(error)
        raise

def user(library, port):
    check(library, library.InferenceServerClient(f"127.0.0.1:{port}"))

failed = []
threads = [threading.Thread(target=guarded, args=(user, library, port))
           for library, port in ((tritonclient.http, sys.argv[2]), (tritonclient.grpc, sys.argv[3]))
           for _ in range(3)]
threads.append(threading.Thread(target=guarded, args=(cancel, sys.argv[3])))
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(bool(failed))
"""


@pytest.mark.slow
def test_the_real_server(
    toy: SegmentationModel, predictor: SAM3InteractiveImagePredictor, tmp_path: Path
) -> None:
    """HTTP and gRPC, several clients at once, two instances, and again after a restart."""
    python = environment("triton", *TRITON_PACKAGES)
    one = ObjectPrompt([(12, 9)], [1])
    masks, scores, low_res = predicted(predictor, one)
    refined, _, _ = predicted(predictor, one, mask=low_res[scores.argmax()])
    found = {"masks": masks, "scores": scores, "low_res_masks": low_res, "refined": refined}
    np.savez(tmp_path / "cases.npz", image=FILE, **found, **POINT)
    arguments = ["--bundle", str(toy.bundle.path), "--backend", "onnxruntime", "--threads", "1"]
    arguments += ["--instances", "2", "--max-image-mb", "1"]
    server = TritonServer(python, tmp_path, *arguments)
    for _ in range(2):
        with server:
            client = [python, "-c", _CLIENT, tmp_path / "cases.npz"]
            subprocess.run([*client, str(server.http), str(server.grpc)], check=True, timeout=120)
