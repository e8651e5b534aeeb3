"""Hooks of the documentation's generator: pages about files and commands of the repository.

Pages link to files outside `docs` by relative paths, so that the links work where the repository is
read as it is. The site gets a copy of each such file, and a link to nothing fails the build.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sam3rt.cli.commands import build_parser

_ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)")
_COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copy to the site every file of the repository that a page links to."""
    for page in list(files.documentation_pages()):
        for match in _LINK.finditer(page.content_string):
            path = (_ROOT / "docs" / match[2]).resolve()
            name = f"repository/{path.relative_to(_ROOT)}"
            if path.is_file() and files.get_file_from_path(_name_on_site(name)) is None:
                files.append(File.generated(config, _name_on_site(name), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the copies, and fill in the help of every command."""

    def rewrite(match: re.Match[str]) -> str:
        path = (_ROOT / "docs" / match[2]).resolve()
        if path.is_dir():
            path = path / "README.md"
        if not path.is_file():
            raise PluginError(f"{page.file.src_uri} links to {match[2]}, which is not there")
        return f"{match[1]}{_name_on_site(f'repository/{path.relative_to(_ROOT)}')}"

    text = _LINK.sub(rewrite, markdown)
    return text.replace(_COMMANDS, _commands()) if _COMMANDS in text else text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the roles of docstrings (``:class:`~a.b.C```) as the last part of the name alone."""
    return re.sub(r":(?:meth|class|func|data|attr|mod|exc):<code>~?(?:[\w.]*\.)?", "<code>", html)


def _name_on_site(name: str) -> str:
    """Copies are shown as text: pages of their own would need links of their own."""
    return f"{name}.txt" if name.endswith((".md", ".py", ".hpp", ".h")) else name


def _commands() -> str:
    """``--help`` of `sam3rt` and of each of its subcommands."""
    with mock.patch.dict(os.environ, COLUMNS="96", NO_COLOR="1"):
        parser = build_parser()
        listed = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parts = [f"```\n{parser.format_help()}```\n"]
        parts += [
            f"## sam3rt {name}\n\n```\n{command.format_help()}```\n"
            for name, command in listed.choices.items()
        ]
    return "\n".join(parts)
