"""The application on a real local Ray: replicas, one of which is killed while users click."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.support.helpers import noise
from tests.support.serving import (
    RAY_PACKAGES,
    ROOT,
    environment,
    free_port,
    image_file,
    predicted,
    toy_model,
)

from sam3rt import SAM3InteractiveImagePredictor
from sam3rt_serve.core import ObjectPrompt

# Runs in Ray's environment.
_USERS = """
import sys, threading, time
import numpy as np, ray
from ray import serve
from sam3rt.errors import InvalidInputError
from sam3rt_serve.client import Client, ServerError
from sam3rt_serve.ray_app import app

bundle, folder, port, count = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
cases = np.load(sys.argv[1])
for wrong in ({}, {"cache_folder": folder, "unknown": "1"}):
    try:
        app(wrong)
    except InvalidInputError:
        continue
    raise AssertionError(wrong)
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app({"bundle": bundle, "cache_folder": folder, "backend": "onnxruntime",
               "threads": "1", "replicas": count}))
url = f"http://127.0.0.1:{port}"
with Client(url) as client:
    ids = [client.add_image(cases["image"].tobytes(), f"id-{n}")["image_id"] for n in range(6)]
over = threading.Event()
answered, wrong, failed = [], [], []

def user(number):
    with Client(url) as client:
        while not over.is_set():
            number += 1
            try:
                (found,) = client.segment(ids[number % 6], [{"points": [[12, 9]], "labels": [1]}])
            except (ServerError, OSError) as error:
                failed.append((time.monotonic(), repr(error)))
                continue
            answered.append(time.monotonic())
            if not np.array_equal(found.masks, cases["masks"]):
                wrong.append(number)

threads = [threading.Thread(target=user, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
time.sleep(3)
replicas = [one for one in ray.util.list_named_actors(all_namespaces=True)
            if "REPLICA" in one["name"]]
assert len(replicas) == int(count), replicas
killed = time.monotonic()
ray.kill(ray.get_actor(**replicas[0]))
time.sleep(6)
over.set()
for thread in threads: thread.join()
print(len(answered), "answers,", sum(when > killed + 3 for when in answered), "of them later than",
      "3 s after the kill,", len(failed), "failures:", failed[:3])
assert not wrong
assert sum(when > killed + 3 for when in answered) > 20
# What was in flight may fail, and nothing else.
assert len(failed) <= 8, failed
assert all(when < killed + 3 for when, _ in failed), failed
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3])
def test_a_replica_is_lost_and_no_image_with_it(replicas: int, tmp_path: Path) -> None:
    toy = toy_model(tmp_path / "toy")
    image = noise(24, 31)
    predictor = SAM3InteractiveImagePredictor(toy)
    predictor.set_image(image)
    masks, _, _ = predicted(predictor, ObjectPrompt([(12, 9)], [1]))
    file = np.frombuffer(image_file(image), np.uint8)
    np.savez(tmp_path / "cases.npz", image=file, masks=masks)
    subprocess.run(
        [
            *(environment("ray", *RAY_PACKAGES), "-c", _USERS, tmp_path / "cases.npz"),
            *(toy.bundle.path, tmp_path / "cache", str(free_port()), str(replicas)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "runtime"),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        check=True,
        timeout=300,
    )
