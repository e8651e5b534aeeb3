"""`benchmarks/hardening/faults.py` in short: work that is killed, and work that two do at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.hardening import faults
from benchmarks.hardening.faults import Work, finish, race, torment
from tests.conftest import ROOT

# Kills come at moments of a clock.
pytestmark = pytest.mark.serial


@pytest.mark.parametrize(
    ("work", "kills"),
    [
        # Its first export is traced, which takes a while.
        pytest.param("export", 5, marks=pytest.mark.slow),
        ("build", 5),
        ("embedding", 15),
    ],
)
def test_killed_and_doubled_work_leaves_nothing_half_done(
    work: str, kills: int, tmp_path: Path
) -> None:
    """In a process of its own, which has no threads that a fork would lose."""
    report = tmp_path / "faults.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.hardening.faults", "--work", work),
            *("--kills", "5", "--races", "2", "--output", str(report)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["killed"][work]["kills"] == kills
    assert found["two_at_once"][work]["pairs_of_runs"] == 2


# --- that the above can fail ----------------------------------------------------------------------


def careless(path: Path) -> Work:
    """Writes a file in place, slowly, which is exactly what must not be done."""

    def run() -> None:
        with path.open("wb") as stream:
            for _ in range(40):
                stream.write(b"x")
                stream.flush()
                time.sleep(0.005)

    def check() -> None:
        if path.stat().st_size != 40:
            raise RuntimeError("half a file")

    return Work(run, check, list, lambda: 0, finish(run))


def test_half_a_file_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half a file"):
        torment(careless(tmp_path / "a"), 20, random.Random(0))


@pytest.mark.parametrize("codes", [(1, 0), (faults._GAVE_WAY, faults._GAVE_WAY)])
def test_a_race_without_a_winner_or_with_a_failure_is_noticed(
    tmp_path: Path, codes: tuple[int, int]
) -> None:
    def run() -> None:
        try:
            (tmp_path / "first").touch(exist_ok=False)
        except FileExistsError:
            os._exit(codes[1])
        os._exit(codes[0])

    work = Work(run, lambda: None, list, lambda: 0, 0.1)
    with pytest.raises(RuntimeError, match="two runs at once ended with"):
        race(work, 1)


def test_what_is_left_over_is_noticed(tmp_path: Path) -> None:
    work = Work(lambda: None, lambda: None, lambda: ["a.tmp"], lambda: 0, 0.1)
    with pytest.raises(RuntimeError, match=r"left over: \['a\.tmp'\]"):
        race(work, 1)
