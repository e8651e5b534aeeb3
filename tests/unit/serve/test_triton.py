"""The model repository for Triton: as it is written, and in the real server from PyPI."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.helpers import noise
from tests.support.serving import (
    check_equal,
    clicks,
    environment,
    free_port,
    image_file,
    predicted,
    toy_model,
)

from sam3rt import InvalidInputError, SAM3InteractiveImagePredictor, SegmentationModel
from sam3rt_serve import triton
from sam3rt_serve.core import ObjectPrompt
from sam3rt_serve.triton_model import Model

ROOT = Path(__file__).resolve().parents[3]
IMAGE = noise(24, 31)
FILE = np.frombuffer(image_file(IMAGE), np.uint8)
POINT = {
    "points": np.array([[[12, 9]]], np.float32),
    "labels": np.array([[1]], np.int32),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> SegmentationModel:
    return toy_model(tmp_path_factory.mktemp("bundles") / "toy")


@pytest.fixture(scope="module")
def predictor(toy: SegmentationModel) -> SAM3InteractiveImagePredictor:
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(IMAGE)
    return predictor


def write(repository: Path, *arguments: str) -> None:
    parser = argparse.ArgumentParser()
    triton.add_arguments(parser)
    options = ["--backend", "onnxruntime", "--threads", "1", *arguments]
    assert triton.run(parser.parse_args([str(repository), *options])) == 0


def test_a_repository_is_written_whole_and_never_over_another(
    toy: SegmentationModel, tmp_path: Path
) -> None:
    repository = tmp_path / "models" / "repository"
    write(repository, "--bundle", str(toy.bundle.path), "--instances", "3", "--device", "cuda:0")
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*.*"))
    assert files == sorted(
        f"sam3rt_{role}/{name}"
        for role in ("decode", "encode", "segment")
        for name in ("1/model.py", "config.pbtxt")
    )
    for path in repository.rglob("model.py"):
        compile(path.read_text(), path, "exec")
        assert str(ROOT / "runtime") in path.read_text()
    config = (repository / "sam3rt_decode" / "config.pbtxt").read_text()
    assert "count: 3 kind: KIND_GPU" in config
    assert str(tmp_path / "models" / "repository-embeddings") in config
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]
    with pytest.raises(InvalidInputError, match="exists"):
        write(repository)


class Tensor(SimpleNamespace):
    """Triton's own, as far as the model uses it."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        super().__init__(name=name, as_numpy=lambda: array)


class Request(SimpleNamespace):
    """A request that can be cancelled."""

    def __init__(self, **inputs: NDArray[Any]) -> None:
        super().__init__(inputs=inputs, cancelled=False)

    def is_cancelled(self) -> bool:
        return bool(self.cancelled)


class TritonError(Exception):
    NOT_FOUND, UNAVAILABLE, INVALID_ARG, INTERNAL, CANCELLED = "NUIXC"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


UTILITIES = SimpleNamespace(
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


PACKAGES = (
    *("nvidia-pytriton==0.7.0", "numpy<2", "tritonclient[http,grpc]"),
    *("onnxruntime", "msgspec", "pillow", "safetensors"),
)

_LAYOUT = """
import json, pathlib, pytriton, sys, sysconfig
print(json.dumps([str(pathlib.Path(pytriton.__file__).parent / "tritonserver"),
    str(pathlib.Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"),
    sysconfig.get_config_var("LIBDIR"), "%d.%d" % sys.version_info[:2]]))
"""
# Runs in the server's environment, which has Triton's clients and NumPy 1.
_CLIENT = """
import sys, threading
import numpy as np
import tritonclient.grpc, tritonclient.http

cases = np.load(sys.argv[1])
TYPES = {"float32": "FP32", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}

def call(library, client, model, **arrays):
    inputs = []
    for name, array in arrays.items():
        inputs.append(library.InferInput(name, array.shape, TYPES.get(array.dtype.name, "BYTES")))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs)

def check(library, client):
    stored = call(library, client, "sam3rt_encode", image=cases["image"])
    image_id = stored.as_numpy("image_id")[None]
    prompts = dict(points=cases["points"][None], labels=cases["labels"][None])
    for _ in range(5):
        found = call(library, client, "sam3rt_decode", image_id=image_id, **prompts)
        for name in ("masks", "scores", "low_res_masks"):
            np.testing.assert_array_equal(found.as_numpy(name)[0, 0], cases[name])
    found = call(library, client, "sam3rt_segment", image=cases["image"],
                 points=cases["points"], labels=cases["labels"])
    np.testing.assert_array_equal(found.as_numpy("masks")[0], cases["masks"])
    try:
        nobody = np.array([[b"nobody"]], np.object_)
        call(library, client, "sam3rt_decode", image_id=nobody, **prompts)
    except Exception as error:
        assert "UnknownImageError" in str(error), error
    else:
        raise AssertionError("an unknown image was answered")

def one(library, port, failed):
    try:
        check(library, library.InferenceServerClient(f"127.0.0.1:{port}"))
    except BaseException as error:
        failed.append(error)
        raise

failed = []
threads = [threading.Thread(target=one, args=(library, port, failed))
           for library, port in ((tritonclient.http, sys.argv[2]), (tritonclient.grpc, sys.argv[3]))
           for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(bool(failed))
"""


@pytest.mark.slow
def test_the_real_server(
    toy: SegmentationModel,
    predictor: SAM3InteractiveImagePredictor,
    tmp_path: Path,
) -> None:
    """HTTP and gRPC, several clients at once, and again after a restart."""
    server_python = environment("triton", *PACKAGES)
    package = str(ROOT / "runtime")
    code = (
        "import argparse, sys; from sam3rt_serve import triton; p = argparse.ArgumentParser(); "
        "triton.add_arguments(p); sys.exit(triton.run(p.parse_args()))"
    )
    arguments = ["--bundle", str(toy.bundle.path), "--backend", "onnxruntime", "--threads", "1"]
    subprocess.run(
        [server_python, "-c", code, str(tmp_path / "repository"), *arguments],
        env={**os.environ, "PYTHONPATH": package},
        check=True,
    )
    asked = subprocess.run([server_python, "-c", _LAYOUT], check=True, capture_output=True)
    server, libraries, python_library, version = json.loads(asked.stdout)
    backend = tmp_path / "backends" / "python"
    backend.mkdir(parents=True)
    stub = Path(server) / "python_backend_stubs" / version / "triton_python_backend_stub"
    for path in (*(Path(server) / "backends" / "python").iterdir(), stub):
        (backend / path.name).symlink_to(path)
    masks, scores, low_res = predicted(predictor, ObjectPrompt([(12, 9)], [1]))
    np.savez(
        tmp_path / "cases.npz",
        image=FILE,
        masks=masks,
        scores=scores,
        low_res_masks=low_res,
        **POINT,
    )
    ports = [free_port() for _ in range(3)]
    command = [f"{server}/bin/tritonserver", f"--model-repository={tmp_path / 'repository'}"]
    command += [f"--backend-directory={backend.parent}"]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    paths = ":".join([libraries, f"{server}/external_libs", python_library])
    variables = {**os.environ, "LD_LIBRARY_PATH": paths}
    for _ in range(2):
        with (tmp_path / "log").open("w+") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
            try:
                _wait_until_ready(ports[0], process, tmp_path / "log")
                subprocess.run(
                    [server_python, "-c", _CLIENT, tmp_path / "cases.npz", *map(str, ports[:2])],
                    check=True,
                    timeout=120,
                )
            finally:
                process.terminate()
                process.wait(60)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])
