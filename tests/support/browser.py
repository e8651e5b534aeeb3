"""The page of ``sam3rt demo`` in a real Chromium, for tests and for the picture of it.

``CHROMIUM`` names the browser where it is not in the PATH. For what decodes in the page,
``SAM3RT_ONNXRUNTIME_WEB`` names the package that ``sam3rt demo --onnxruntime-web`` asks for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WEB = os.environ.get("SAM3RT_ONNXRUNTIME_WEB")
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def demo_server(*options: str) -> Iterator[str]:
    """The address of a demo that runs in a process of its own for the length of the block."""
    command = [sys.executable, "-m", "sam3rt", "demo", "--no-browser"]
    command += ["--backend", "onnxruntime", "--device", "cpu", *options]
    if WEB:
        command += ["--onnxruntime-web", WEB]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split(" ")[0]
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


class Demo:
    """The page as people use it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.settle()

    def settle(self) -> None:
        """Wait until the page waits for nothing."""
        self.page.wait_for_selector("#space[aria-busy=false]", timeout=60_000)

    def open(self, picture: Path) -> Demo:
        self.page.set_input_files("#file", picture)
        self.page.wait_for_selector("#stage:not([hidden])", timeout=60_000)
        self.settle()
        return self

    def at(self, x: int, y: int) -> tuple[float, float]:
        """Where the middle of a pixel of the picture is on the screen."""
        box = self.page.locator("#stage").bounding_box()
        scale = box["width"] / self.page.evaluate("document.querySelector('#picture').naturalWidth")
        return box["x"] + (x + 0.5) * scale, box["y"] + (y + 0.5) * scale

    def click(self, place: tuple[int, int], **options: Any) -> None:
        self.page.mouse.click(*self.at(*place), **options)
        self.settle()

    def drag(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        self.page.mouse.move(*self.at(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.at(*end), steps=4)
        self.page.mouse.up()
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def download(self, name: str) -> tuple[str, bytes]:
        """A file's name and content, by the name of its button."""
        with self.page.expect_download() as event:
            self.page.get_by_role("button", name=name).click()
        return event.value.suggested_filename, event.value.path().read_bytes()

    @property
    def status(self) -> str:
        return str(self.page.inner_text("#status"))
