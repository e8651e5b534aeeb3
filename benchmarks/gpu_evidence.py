"""What a GPU shows, by one command: results are written as they come. tests/gpu says what is right.

    python -m benchmarks.gpu_evidence --output FOLDER [--only SECTION ...] [--seconds 460]

Runs from a checkout with ``PYTHONPATH=runtime:export:benchmarks:.`` and without a network. Each
section runs in a process of its own and has its own time, so that one that crashes, hangs or takes
too long loses nothing but its rest. FOLDER gets ``evidence.json`` and ``evidence.md``, written anew
after each section, and what a section printed where it failed.

The model is SAM 3 of the published size with seeded weights. It is made beside the first sections,
which do not need it, and kept in --work for the next time.

On a machine without a GPU: ``--device cpu --small``, which tries the script and shows nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import conditions

from sam3rt.bundle.files import atomic_write

# Of what a failed section printed, characters that are kept.
_TAIL = 4000


@dataclass(frozen=True)
class Section:
    """One part of the evidence.

    Attributes:
        name: what ``--only`` calls it.
        function: ``module:function`` under ``benchmarks.gpu_sections``.
        seconds: after which it is stopped.
        arguments: for the function.
        needs_model: whether it waits for the model.
    """

    name: str
    function: str
    seconds: float
    arguments: tuple[str, ...] = ()
    needs_model: bool = True


MODEL = Section("model", "models:make", 240, needs_model=False)
# What was never measured, or was changed since, comes first, as time may run out. While the model
# is being made, those that do not need it run, whatever their place.
SECTIONS = (
    Section("versions", "machine:versions", 30, needs_model=False),
    Section("ceilings", "machine:ceilings", 40, needs_model=False),
    Section("onnxruntime-fp16-activations", "models:onnxruntime", 75, ("fp16-activations",)),
    Section("kernel-table", "models:kernel_table", 40, ("fp16-activations",)),
    Section("pytorch", "models:pytorch", 120),
    Section("numerics", "numerics:numerics", 75),
    Section("onnxruntime-fp16", "models:onnxruntime", 75, ("fp16",)),
    Section("onnxruntime-tf32", "models:onnxruntime", 50, ("tf32",)),
    Section("tensorrt", "models:tensorrt", 120),
    Section("onnxruntime-fp32", "models:onnxruntime", 50, ("fp32",)),
    Section("onnxruntime-bf16", "models:onnxruntime", 75, ("bf16",)),
)


class Run:
    """A section's process.

    Args:
        section: what it runs.
        options: of the command line.
        work: the folder of the model and of results under way.
        seconds: after which it is stopped.
    """

    def __init__(
        self, section: Section, options: argparse.Namespace, work: Path, seconds: float
    ) -> None:
        self.section = section
        self._result = work / f"{section.name}.json"
        self._result.unlink(missing_ok=True)
        self._log = (work / f"{section.name}.log").open("w+b")
        self._begun = time.monotonic()
        self._seconds = seconds
        command = [sys.executable, "-m", "benchmarks.gpu_sections", section.function]
        command += [*section.arguments, "--work", str(work), "--result", str(self._result)]
        command += ["--device", options.device, "--seconds", f"{seconds:.1f}"]
        command += ["--small"] if options.small else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End it and what it has started, at once."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def finish(self) -> dict[str, Any]:
        """Wait for its end, or make one; what it found and how it ended."""
        state = "done"
        try:
            left = self._seconds - (time.monotonic() - self._begun)
            status = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.stop()
            state = f"stopped after {self._seconds:.0f} s"
        else:
            if status != 0:
                state = f"failed with status {status}"
        took = round(time.monotonic() - self._begun, 1)
        document: dict[str, Any] = {"state": state, "seconds": took, "figures": {}}
        with contextlib.suppress(OSError, ValueError):
            document["figures"] = json.loads(self._result.read_text())
        if state != "done":
            self._log.seek(0)
            document["said"] = self._log.read().decode(errors="replace")[-_TAIL:]
        self._log.close()
        return document


class Evidence:
    """The document, written anew after each section.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._document: dict[str, Any] = {
            "what": "what a GPU shows of sam3rt",
            **conditions(),
            "sections": {},
        }
        self._write()

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Add a section."""
        self._document["sections"][name] = found
        self._write()
        print(f"{name}: {found['state']}, {found['seconds']} s", file=sys.stderr, flush=True)

    def _write(self) -> None:
        text = json.dumps(self._document, indent=1) + "\n"
        for name, content in (("json", text), ("md", markdown(self._document))):
            with atomic_write(self._folder / f"evidence.{name}") as stream:
                stream.write(content.encode())


def markdown(document: dict[str, Any]) -> str:
    """The document for people: a heading and a table for each section."""
    lines = ["# Evidence from a GPU", "", f"`{document['command']}`", ""]
    for name, found in document["sections"].items():
        lines += [f"## {name}", "", f"{found['state']}, {found['seconds']} s", ""]
        rows: list[tuple[str, dict[str, Any]]] = []
        for key, value in found["figures"].items():
            if isinstance(value, dict):
                rows.append((key, value))
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                rows += [(str(row.get("what", "")), _without(row, "what")) for row in value]
            else:
                lines.append(f"- {key}: {_shown(value)}")
        if found["figures"] and not rows:
            lines.append("")
        lines += _tables(rows)
        if found.get("said"):
            lines += ["```", found["said"].strip(), "```", ""]
    return "\n".join(lines) + "\n"


def _tables(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Rows in tables, those of the same columns together."""
    lines: list[str] = []
    columns: tuple[str, ...] | None = None
    for name, cells in rows:
        if tuple(cells) != columns:
            columns = tuple(cells)
            lines += [
                "",
                "| | " + " | ".join(map(_shown, columns)) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
        shown = (_shown(value) for value in cells.values())
        # A kernel's name has brackets that would be taken for HTML.
        lines.append(f"| {f'`{name}`' if '<' in name else name} | " + " | ".join(shown) + " |")
    return [*lines, ""] if lines else []


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def run(options: argparse.Namespace, work: Path) -> None:
    """Run the sections that were chosen, as long as there is time."""
    end = time.monotonic() + options.seconds
    chosen = [s for s in SECTIONS if not options.only or s.name in options.only]
    evidence = Evidence(options.output)
    model: Run | None = None
    needing = [s for s in chosen if s.needs_model]
    made = (work / "bundle").is_dir() and (work / "checkpoint.pt").is_file()
    try:
        if (needing and not made) or MODEL.name in options.only:
            model = Run(MODEL, options, work, min(MODEL.seconds, options.seconds))
            chosen.sort(key=lambda section: section.needs_model)
        for section in chosen:
            if section.needs_model and model is not None:
                evidence.put(MODEL.name, model.finish())
                model = None
            left = end - time.monotonic()
            if left < 5:
                evidence.put(section.name, _left_out("there was no time left"))
            elif section.needs_model and not (work / "bundle").is_dir():
                evidence.put(section.name, _left_out("the model could not be made"))
            else:
                seconds = min(section.seconds, left)
                evidence.put(section.name, Run(section, options, work, seconds).finish())
        if model is not None:
            evidence.put(MODEL.name, model.finish())
            model = None
    finally:
        if model is not None:
            model.stop()


def _left_out(reason: str) -> dict[str, Any]:
    return {"state": f"left out: {reason}", "seconds": 0.0, "figures": {}}


def main() -> None:
    """Run and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and small sizes")
    names = [MODEL.name, *(section.name for section in SECTIONS)]
    parser.add_argument("--only", action="append", choices=names, default=[])
    parser.add_argument("--seconds", type=float, default=460.0, help="for everything")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where the model is kept (default: nowhere)"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sam3rt-gpu-")))
        work.mkdir(parents=True, exist_ok=True)
        run(options, work.resolve())


if __name__ == "__main__":
    main()
