"""Tests of the documentation: what it quotes is what there is."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sam3rt

ROOT = Path(__file__).parents[2]


def message_texts() -> str:
    """Every text in the sources, with formatted values as a mark."""
    texts = []
    for folder in ("runtime/sam3rt", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_the_page_of_errors_quotes_messages_that_exist() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    texts = message_texts()
    missing = [
        part
        for quote in quoted
        for part in quote.split("...")
        if part.strip() not in texts
        and not quote.endswith("Warning")
        and not quote.endswith("Error")
    ]
    assert missing == []


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/prompts.md", "docs/results.md"]
)
def test_the_python_of_a_page_runs_as_it_stands(
    page: str,
    tiny_model: sam3rt.SegmentationModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block after block, as one who copies them would, on a model that takes no time."""
    monkeypatch.setattr(sam3rt, "load_model", lambda *named: tiny_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Warnings are errors there, and so are links to nothing."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    text = (tmp_path / "site" / "cli.html").read_text()
    assert "sam3rt segment photo.jpg" in text
    assert "usage: sam3rt verify" in text
    # Roles of docstrings are for their readers.
    assert ":class:" not in (tmp_path / "site" / "api.html").read_text()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md"])
def test_links_to_files_lead_to_files(page: str) -> None:
    """The site's own pages are checked where it is built."""
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 750
