"""The command line as a process: pipes, interrupts, odd names, narrow terminals, no memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sam3rt.cli import main
from sam3rt.cli.options import printable


def run(
    *arguments: str | bytes, code: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line, after some code, in a process of its own."""
    start = f"import sys; from sam3rt.cli import main\n{code}\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        capture_output=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("arguments", [["info"], ["segment", "--help"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sam3rt", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""
    # argparse prints its help without looking at errors.
    assert done.returncode == (0 if "--help" in arguments else 141)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_closed_stream_is_an_empty_one(stream: int, tmp_path: Path, tiny_sam3: Path) -> None:
    image = tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    model = ("--bundle", str(tiny_sam3), "--backend", "onnxruntime", "--device", "cpu")
    for source, status in ((str(image), 0), ("-", 0 if stream else 1)):
        command = ["segment", source, "--point", "5,5", *model, "--output", str(tmp_path / "o")]
        closed = ["sh", "-c", f'exec {stream}<&-; exec "$@"', "sh", sys.executable, "-m", "sam3rt"]
        done = subprocess.run(
            [*closed, *command],
            capture_output=True,
            check=False,
            input=image.read_bytes() if stream else None,
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == status
    if stream == 0:
        assert b"image -: got no image" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_sigterm_leaves_nothing_half_written(tmp_path: Path, tiny_sam3: Path) -> None:
    image = tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    code = """
import sys, time
from sam3rt.cli import main, segment
def write(*arguments):
    print("writing", flush=True)
    time.sleep(60)
segment.write_pictures = write
sys.exit(main())
"""
    model = ("--bundle", str(tiny_sam3), "--backend", "onnxruntime", "--device", "cpu")
    output = ("--output", str(tmp_path / "deep" / "o"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, "segment", str(image), "--point", "5,5", *model, *output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_an_interrupt_while_libraries_load_is_quiet(tmp_path: Path) -> None:
    """A NumPy that never finishes loading stands in for a slow disk."""
    (tmp_path / "numpy.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from sam3rt.cli import main; sys.exit(main())", "info"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs the tests in the background ignores interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, b"")


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, tiny_sam3: Path) -> None:
    output = tmp_path / "masken_für_\u2603"
    image = tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    done = run(
        *("segment", str(image), "--point", "5,5", "--device", "cpu", "--bundle", str(tiny_sam3)),
        *("--backend", "onnxruntime", "--output", str(output)),
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"masken_f\\xfcr_\\u2603" in done.stdout
    assert (output / "result.json").exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="file names there are Unicode")
def test_a_name_that_is_not_unicode_is_escaped(tmp_path: Path) -> None:
    done = run("verify", os.fsencode(tmp_path) + b"/\xff\xfe")
    assert done.returncode == 1
    assert b"\\udcff\\udcfe" in done.stderr
    assert b"Traceback" not in done.stderr


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\n\x9b31m\u202eb"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", HOSTILE],
        ["info", HOSTILE],
        ["segment", HOSTILE, "--point", "1,1", "--output", "o"],
        ["segment", "missing.png", "--point", HOSTILE, "--output", "o"],
        ["segment", "missing.png", "--output", "o", "-v", HOSTILE],
    ],
)
def test_terminal_escapes_in_names_are_shown_and_not_obeyed(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert r"\x1b]0;owned" in printed.err


def test_printable_changes_nothing_else() -> None:
    for text in ("photo.jpg", "Füße ☃ 写真.png", "a b", ""):
        assert printable(text) == text
    assert printable("a\tb\nc\\d") == r"a\tb\nc\d"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("9 TiB"), "not enough memory (9 TiB)"),
        (MemoryError(), "not enough memory"),
        (OSError(5, "Input/output error", 3), "3: Input/output error"),
        (OSError(28, "No space left", b"\xff"), "\\udcff: No space left"),
        (OSError("bare"), "bare"),
        (OSError(), "OSError"),
    ],
)
def test_any_failure_is_one_line(
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("sam3rt.cli.info.default_bundle_path", fail)
    assert main(["info"]) == 1
    assert capfd.readouterr().err == f"sam3rt info: {said}\n"


def test_a_command_loads_nothing_that_others_need(tmp_path: Path, tiny_sam3: Path) -> None:
    image = tmp_path / "photo.png"
    PIL.Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(image)
    code = "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    for how, foreign in (("onnxruntime", "openvino"), ("openvino", "onnxruntime")):
        done = run(
            *("segment", str(image), "--point", "5,5", "--device", "cpu"),
            *("--bundle", str(tiny_sam3), "--backend", how, "--output", str(tmp_path / how)),
            code=code,
        )
        assert done.returncode == 0
        loaded = set(done.stderr.decode().split())
        assert "sam3rt.cli.segment" in loaded
        packages = {name.partition(".")[0] for name in loaded}
        assert {name for name in packages if name.startswith("sam3rt")} == {"sam3rt"}
        assert foreign not in packages
        for other in ("cli.verify", "cli.info", "backends.tensorrt.backend"):
            assert f"sam3rt.{other}" not in loaded
