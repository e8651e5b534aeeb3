"""Fuzz everything that reads bytes or values somebody else made, guided by coverage.

    python -m benchmarks.hardening.fuzz [--executions N] [--target NAME ...] [--output FILE]

Runs each target of tests/support/fuzz_targets.py in a process of its own under atheris (libFuzzer),
from valid inputs. Anything but a documented exception ends a target's run and is listed as a
finding, with the input that caused it. Exits with 1 where there is one. Needs atheris.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import conditions, publish, script_parser

# Shares of the executions: more where one takes less time.
SHARES = {
    "manifest": 0.1,
    "sidecar": 0.15,
    "embedding": 0.15,
    "onnx": 0.15,
    "onnx_differential": 0.1,
    "parity": 0.05,
    "verdict": 0.15,
    "image": 0.05,
    "prompts": 0.1,
}
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")
_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")
_SECONDS_PER_INPUT = 10
_MEMORY_MB = 1024


def fuzz_here(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["sam3rt", "PIL", "numpy.lib"]):
        from tests.support import fuzz_targets as targets

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        changed = targets.change_json(data, seed) if seed % 4 else None
        if changed is None or len(changed) > most:
            return bytes(atheris.Mutate(data, most))
        return changed

    mutator = {"custom_mutator": mutate} if name in targets.JSON_TARGETS else {}
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name], **mutator)
    atheris.Fuzz()


def fuzz(name: str, executions: int, seed: int, keep: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and say how it went."""
    from tests.support import fuzz_targets as targets

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        for number, content in enumerate(targets.seeds(name)):
            (corpus / f"seed_{number}").write_bytes(content)
        seeds = len(list(corpus.iterdir()))
        keep.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "benchmarks.hardening.fuzz", "--here", name),
            f"-runs={executions}",
            f"-seed={seed}",
            f"-timeout={_SECONDS_PER_INPUT}",
            f"-rss_limit_mb={_MEMORY_MB}",
            f"-artifact_prefix={keep}/{name}-",
            "-print_final_stats=1",
            str(corpus),
        ]
        start = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seconds = time.monotonic() - start
        grown = len(list(corpus.iterdir()))
    output = result.stdout + result.stderr
    done = _DONE.search(output)
    count = re.search(r"stat::number_of_executed_units: (\d+)", output)
    coverage = _COVERAGE.findall(output)
    finding = None
    if result.returncode or done is None:
        finding = output[-4000:]
        print(finding, file=sys.stderr)
    return {
        "executions": int(done.group(1) if done else count.group(1) if count else 0),
        "seconds": round(seconds, 1),
        "seeds": seeds,
        "corpus": grown,
        "coverage": int(coverage[-1][0]) if coverage else 0,
        "features": int(coverage[-1][1]) if coverage else 0,
        "finding": finding,
    }


def main() -> int:
    """Fuzz, print and write the counts."""
    if sys.argv[1:2] == ["--here"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    parser = script_parser(__doc__)
    parser.add_argument("--executions", type=int, default=1_200_000, help="over all targets")
    parser.add_argument("--target", action="append", choices=list(SHARES), dest="names")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    names = options.names or list(SHARES)
    whole = sum(SHARES[name] for name in names)
    results = {}
    for name in names:
        share = round(options.executions * SHARES[name] / whole)
        results[name] = fuzz(name, share, options.seed, options.keep.resolve())
        print(name, results[name] | {"finding": bool(results[name]["finding"])}, flush=True)
    findings = [name for name, result in results.items() if result["finding"]]
    publish(
        {
            **conditions("atheris", "numpy", "pillow"),
            "executions": sum(result["executions"] for result in results.values()),
            "findings": findings,
            "targets": results,
        },
        options.output,
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
