"""Kill -9 at random moments: does half of something ever load, and does the next run work?

    python -m benchmarks.hardening.faults [--kills 100]

Three kinds of work are killed, each in a process of its own: an export that replaces a bundle, a
build of engines, the saving of embeddings (three times as often, since it is short). After each
kill, whatever can be opened is checked whole; after every fifth, the work is done again to its end,
which must succeed without anybody cleaning up, and leave nothing behind. One thing is counted and
not held against it: an embedding's hidden file, whole and never read, of a process that was killed
between giving it that name and the final one.

The export is that of a tiny SAM 3 whose graphs were traced once and are copied, the build's engines
are made up: what is tested is what happens to files. The bundled model needs no unpacking: it is
read where it is installed.

Then the same is done by two processes at once: one at least must succeed, the other may do so too
or say that it was not alone, and what is there must be whole. Fails at the first thing wrong. Needs
the extras export and test.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser

from sam3rt.backends.tensorrt.engines import find_engines
from sam3rt.bundle import TensorSpec, check_file, open_bundle
from sam3rt.embedding import read_embedding, write_embedding
from sam3rt.geometry import ImageGeometry
from sam3rt_build.errors import BuildError

FORK = multiprocessing.get_context("fork")
_PLACE = ImageGeometry((480, 640), (1008, 1008))
_SPECS = (TensorSpec("image_embeddings.0", "float32", ("batch", 64, 64, 64)),)
_FINGERPRINT = "f" * 64
# Exit status of a run that made room for another.
_GAVE_WAY = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that writes files.

    Attributes:
        run: does it once.
        check: raises where what is there is not whole.
        leftovers: what a run that was not killed should not have left.
        hidden: how many hidden files of killed runs there are.
        seconds: about how long a run takes.
        gives_way: whether a run that raised this made room for another.
    """

    run: Callable[[], object]
    check: Callable[[], object]
    leftovers: Callable[[], list[str]]
    hidden: Callable[[], int]
    seconds: float
    gives_way: Callable[[Exception], bool] = lambda _: False


def finish(run: Callable[[], object]) -> float:
    """Do work to its end in a process of its own; the seconds it took.

    Raises:
        RuntimeError: it failed.
    """
    start = time.monotonic()
    process = FORK.Process(target=run)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"a run ended with {process.exitcode}")
    return time.monotonic() - start


def torment(work: Work, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill work over and over.

    Raises:
        RuntimeError: something was half there, or a run after it failed or left something.
    """
    killed = faster = reruns = 0
    while killed < kills:
        process = FORK.Process(target=work.run)
        process.start()
        process.join(rng.uniform(0, 1.1 * work.seconds))
        if process.exitcode is None:
            process.kill()
        process.join()
        work.check()
        if process.exitcode != -signal.SIGKILL:
            faster += 1
            continue
        killed += 1
        if killed % 5 == 0:
            finish(work.run)
            work.check()
            left = work.leftovers()
            if left:
                raise RuntimeError(f"left over: {left}")
            reruns += 1
    return {
        "kills": killed,
        "runs_that_were_faster": faster,
        "runs_afterwards": reruns,
        "hidden_files_left": work.hidden(),
    }


def race(work: Work, rounds: int) -> dict[str, int]:
    """Let two processes do the same work at the same moment, over and over.

    Raises:
        RuntimeError: neither succeeded, one failed, or what is there is not whole.
    """
    gave_way = 0
    for _ in range(rounds):
        start = FORK.Barrier(2)
        runners = [FORK.Process(target=_compete, args=(work, start)) for _ in range(2)]
        for process in runners:
            process.start()
        for process in runners:
            process.join()
        codes = [process.exitcode for process in runners]
        if 0 not in codes or not {0, _GAVE_WAY}.issuperset(codes):
            raise RuntimeError(f"two runs at once ended with {codes}")
        gave_way += codes.count(_GAVE_WAY)
        work.check()
        left = work.leftovers()
        if left:
            raise RuntimeError(f"left over: {left}")
    return {"pairs_of_runs": rounds, "runs_that_gave_way": gave_way}


def _compete(work: Work, start: Any) -> None:
    start.wait()
    try:
        work.run()
    except Exception as error:
        if work.gives_way(error):
            os._exit(_GAVE_WAY)
        raise


@contextmanager
def export_work(folder: Path) -> Iterator[Work]:
    """A tiny SAM 3, exported over and over in the place of its last export."""
    import torch
    from tests.support.export_helpers import copied_graphs, tiny_tensors

    from sam3rt_export import ExportOptions, export_bundle, exporter

    checkpoint, traced, target = folder / "tiny.pt", folder / "traced", folder / "out" / "bundle"
    torch.save(tiny_tensors(), checkpoint)

    def export(output: Path, name: str) -> None:
        torch.set_num_threads(1)
        export_bundle(checkpoint, output, ExportOptions(name=name, overwrite=True))

    # In a process of its own: PyTorch's threads do not survive a fork.
    finish(lambda: export(traced, "traced"))
    copy = copied_graphs(traced)

    def run() -> None:
        exporter.trace_to_file = copy
        export(target, f"export {os.getpid()}")

    seconds = finish(run)
    yield Work(
        run,
        # Once there was one, there always is: it is replaced in one step.
        lambda: open_bundle(target),
        lambda: [e.name for e in target.parent.iterdir() if e.name != target.name],
        lambda: 0,
        seconds,
    )


@contextmanager
def build_work(folder: Path) -> Iterator[Work]:
    """Engines of made-up content for a bundle of a few nodes, proven by a made-up verdict."""
    from tests.support import stand_in_builds
    from tests.support.build_helpers import toy_bundle

    bundle = toy_bundle(folder / "toy")

    def run() -> None:
        stand_in_builds.run(bundle)

    def check() -> None:
        for engine in find_engines(bundle):
            check_file(engine.path.parent, engine.sidecar.engine)

    def leftovers() -> list[str]:
        stand_in_builds.check_consistent(bundle)
        return [str(path) for path in (bundle.path / "engines").glob(".build-*")]

    def gives_way(error: Exception) -> bool:
        return isinstance(error, BuildError) and "another build is at work" in str(error)

    yield Work(run, check, leftovers, lambda: 0, finish(run), gives_way)


@contextmanager
def embedding_work(folder: Path) -> Iterator[Work]:
    """Embeddings of a megabyte, each saved in the place of the one before."""
    place = folder / "embeddings"
    place.mkdir()
    path = place / "a.embedding"
    maps = np.random.default_rng(0).random((20, 1, 64, 64, 64), np.float32)

    def run() -> None:
        for array in maps:
            write_embedding(path, {"image_embeddings.0": array}, _PLACE, _FINGERPRINT)

    def check() -> None:
        found, _ = read_embedding(path, _FINGERPRINT, _SPECS)
        if not any(np.array_equal(found[0], array) for array in maps):
            raise RuntimeError("an embedding is none of those that were saved")

    def hidden() -> int:
        return len(list(place.glob(".*.tmp")))

    def leftovers() -> list[str]:
        return [e.name for e in place.iterdir() if e != path and not e.name.endswith(".tmp")]

    yield Work(run, check, leftovers, hidden, finish(run))


WORKS = {"export": export_work, "build": build_work, "embedding": embedding_work}


def main() -> None:
    """Run, print and write the counts."""
    parser = script_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--work", action="append", choices=list(WORKS), dest="names")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    results: dict[str, Any] = {}
    races: dict[str, Any] = {}
    for name in options.names or WORKS:
        with tempfile.TemporaryDirectory() as folder, WORKS[name](Path(folder)) as work:
            kills = options.kills * (3 if name == "embedding" else 1)
            results[name] = torment(work, kills, rng)
            races[name] = race(work, options.races)
            print(name, results[name], races[name], file=sys.stderr, flush=True)
    publish(
        {**conditions("numpy"), "killed": results, "two_at_once": races},
        options.output,
    )


if __name__ == "__main__":
    main()
