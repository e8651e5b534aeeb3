"""Makes the picture of the page: ``python -m tests.browser.screenshot docs/demo-page.png``.

On a machine that does nothing else, since the picture shows how long a click takes.
"""

from __future__ import annotations

import io
import sys

import PIL.Image
from tests.support.browser import WEB, Demo, chromium, demo_server

from sam3rt_serve.demo_page import PAGE


def screenshot() -> PIL.Image.Image:
    """The cat by two clicks and its eye by another, 1200 x 750 pixels."""
    with demo_server() as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 750}, color_scheme="light")
        page.goto(address)
        demo = Demo(page).open(PAGE / "chelsea.jpg")
        demo.click((225, 150))
        demo.click((425, 215), button="right")
        demo.press("n")
        demo.click((172, 112))
        for switched in [True, False] if WEB else []:
            page.get_by_role("switch").set_checked(switched)
            demo.settle()
            demo.press("z")  # the first click was slower
            demo.click((172, 112))
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(1100, 700)
        return PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB")


if __name__ == "__main__":
    # 64 levels a colour look the same and make the file two thirds as large.
    levels = [round(round(value * 63 / 255) * 255 / 63) for value in range(256)]
    screenshot().point(levels * 3).save(sys.argv[1], optimize=True)
