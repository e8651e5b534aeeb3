"""``sam3rt triton``: a model repository for Triton Inference Server's Python backend."""

from __future__ import annotations

import argparse
import json
import site
import struct
import tempfile
from dataclasses import asdict
from pathlib import Path

import sam3rt
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.cli.options import add_bundle_argument, add_model_options, named_path
from sam3rt.errors import InvalidInputError

from .limits import WARM_UP, add_limit_options, add_number, limits_from_options

HELP = "write a model repository for Triton Inference Server"
DESCRIPTION = """\
Write a model repository for Triton Inference Server, whose Python backend then runs this package.

  sam3rt_encode    image file or pixels -> image_id, size
  sam3rt_decode    image_id, points, labels, boxes -> masks, scores, low_res_masks
  sam3rt_session   the same in a sequence, where an object's earlier mask is a prompt too
  sam3rt_segment   all of it in one call

The configurations name this Python's packages, the bundle and the folder through which embeddings
go from the model that encodes to the one that decodes: all three must be where the server runs.
"""

# Name, type, dimensions, and whether it may be left out.
_Tensor = tuple[str, str, str, bool]

_IMAGE: tuple[_Tensor, ...] = (
    ("image", "UINT8", "-1", True),
    ("pixels", "UINT8", "-1, -1, 3", True),
)
_PROMPTS: tuple[_Tensor, ...] = (
    ("points", "FP32", "-1, -1, 2", True),
    ("labels", "INT32", "-1, -1", True),
    ("boxes", "FP32", "-1, 4", True),
    ("multimask", "BOOL", "1", True),
)
_MASKS: tuple[_Tensor, ...] = (
    ("masks", "BOOL", "-1, -1, -1, -1", False),
    ("scores", "FP32", "-1, -1", False),
    ("low_res_masks", "FP32", "-1, -1, -1, -1", False),
)
# Inputs and outputs by role.
_MODELS: dict[str, tuple[tuple[_Tensor, ...], tuple[_Tensor, ...]]] = {
    "encode": (
        (*_IMAGE, ("image_id", "STRING", "1", True)),
        (("image_id", "STRING", "1", False), ("size", "INT32", "2", False)),
    ),
    "decode": ((("image_id", "STRING", "1", False), *_PROMPTS), _MASKS),
    "session": ((("image_id", "STRING", "1", False), *_PROMPTS), _MASKS),
    "segment": ((*_IMAGE, *_PROMPTS), _MASKS),
}
# Requests that wait are given to the backend together; each has its own shapes.
_BATCHED = ("decode", "session")
_QUEUE = """\
dynamic_batching {{ default_queue_policy {{
  max_queue_size: {waiting} default_timeout_microseconds: {microseconds}
}} }}
"""
# A sequence stays with one instance, which keeps its masks.
_SEQUENCES = """\
sequence_batching {{
  max_sequence_idle_microseconds: 3600000000 oldest {{ max_candidate_sequences: {waiting} }}
}}
"""
# The request that every instance answers before it is ready: inputs, types, shapes and data.
_POINT = (
    ("points", "FP32", "1, 1, 2", "zero_data: true"),
    ("labels", "INT32", "1, 1", "zero_data: true"),
)
_PIXELS = (("pixels", "UINT8", "8, 8, 3", "zero_data: true"),)
_NAME = (("image_id", "STRING", "1", 'input_data_file: "image_id"'),)
_WARM_UP = {"encode": _PIXELS, "decode": (*_NAME, *_POINT), "segment": (*_PIXELS, *_POINT)}
# What the server may repeat from its response cache. An image that it has an id of may have left,
# and a session's answers differ.
_REPEATABLE = ("segment",)
_PROGRAM = '''\
"""Loads the model named in config.pbtxt; written by sam3rt triton."""

import site
import sys

# The server's Python knows nothing of this environment, and may have another NumPy.
own = sys.path[:]
for folder in {packages}:
    site.addsitedir(folder)
sys.path[:] = [*sys.path[len(own) :], *own]

import triton_python_backend_utils

from sam3rt_serve.triton_model import Model


class TritonPythonModel:
    """What Triton's Python backend asks for."""

    def initialize(self, args):
        self._model = Model(args, triton_python_backend_utils)

    def execute(self, requests):
        return self._model.execute(requests)

    def finalize(self):
        self._model.finalize()
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("repository", type=named_path, metavar="REPOSITORY", help="folder to make")
    add_bundle_argument(parser, "--bundle")
    parser.add_argument(
        "--cache-folder",
        type=named_path,
        metavar="DIR",
        help="where embeddings go from model to model (default: REPOSITORY-embeddings)",
    )
    add_number(parser, "--cache-mb", 1024, "memory of one instance for embeddings")
    add_number(parser, "--instances", 1, "processes of each model, on a GPU on each GPU")
    add_limit_options(parser)
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Write the repository, whole or not at all."""
    target: Path = options.repository.absolute()
    if target.exists():
        raise InvalidInputError("REPOSITORY", f"{target}, which exists", "a folder to be made")
    bundle = open_bundle(
        default_bundle_path() if options.bundle is None else options.bundle, check_files=False
    )
    limits = limits_from_options(options)
    folder = options.cache_folder or target.with_name(f"{target.name}-embeddings")
    shared = {
        "bundle": str(bundle.path.absolute()),
        "backend": options.backend,
        "device": options.device,
        "precision": options.precision,
        "threads": options.threads,
        "cache_bytes": options.cache_mb << 20,
        "cache_folder": str(folder.absolute()),
        "limits": asdict(limits),
    }
    own = [str(Path(module).resolve().parents[1]) for module in (sam3rt.__file__, __file__)]
    packages = list(dict.fromkeys([*own, *site.getsitepackages()]))
    kind = "KIND_GPU" if options.device.startswith("cuda") else "KIND_CPU"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        repository = Path(scratch) / "repository"
        for role, (inputs, outputs) in _MODELS.items():
            ragged = role in _BATCHED
            waiting = limits.waiting_images if role == "encode" else limits.waiting_clicks
            scheduling = _SEQUENCES if role == "session" else _QUEUE
            parts = [f'name: "sam3rt_{role}"\nbackend: "python"\n']
            parts += ["max_batch_size: 8\n"] * ragged
            parts.append(scheduling.format(waiting=waiting, microseconds=int(limits.seconds * 1e6)))
            parts += [_tensor("input", tensor, ragged) for tensor in inputs]
            parts += [_tensor("output", tensor, False) for tensor in outputs]
            parts.append(f"instance_group [{{ count: {options.instances} kind: {kind} }}]\n")
            parts.append(f"response_cache {{ enable: {str(role in _REPEATABLE).lower()} }}\n")
            parts.append(_warm_up(role))
            text = json.dumps(json.dumps(shared | {"role": role}))
            parts.append(f'parameters {{ key: "options" value {{ string_value: {text} }} }}\n')
            model = repository / f"sam3rt_{role}"
            (model / "1").mkdir(parents=True)
            (model / "config.pbtxt").write_text("".join(parts))
            (model / "1" / "model.py").write_text(_PROGRAM.format(packages=packages))
            (model / "warmup").mkdir()
            name = WARM_UP.encode()
            (model / "warmup" / "image_id").write_bytes(struct.pack("<I", len(name)) + name)
        repository.rename(target)
    print(f"{target}: {', '.join(f'sam3rt_{role}' for role in _MODELS)}")
    return 0


def _warm_up(role: str) -> str:
    inputs = "".join(
        f'\n  inputs {{ key: "{name}" value {{ data_type: TYPE_{kind} dims: [{shape}] {data} }} }}'
        for name, kind, shape, data in _WARM_UP.get(role, ())
    )
    return inputs and f'model_warmup {{ name: "{role}" batch_size: 1{inputs}\n}}\n'


def _tensor(where: str, tensor: _Tensor, ragged: bool) -> str:
    name, kind, dimensions, optional = tensor
    more = " optional: true" * optional + " allow_ragged_batch: true" * ragged
    return f'{where} [{{ name: "{name}" data_type: TYPE_{kind} dims: [{dimensions}]{more} }}]\n'
