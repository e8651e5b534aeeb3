"""The parser of the command line, and how a subcommand is run."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from .._version import __version__
from ..errors import Sam3rtError
from .options import printable, problem_of

_LOG = logging.getLogger(__name__)

# A subcommand is a module with HELP, DESCRIPTION, add_arguments(parser) and run(arguments) -> int.
# What an extra installs, it imports when it runs, so that --help needs none.
_OWN = ("segment", "models", "verify", "info")
_GROUP = "sam3rt.commands"
# In the order in which people need them; whatever else is installed comes last.
_ORDER = (
    *("demo", "segment", "serve", "export", "build", "verify", "compare", "bench", "models"),
    *("triton", "info"),
)

# Coordinates that begin with a minus sign, which argparse would take for an option.
_NEGATIVE = re.compile(r"-[0-9.][^=]*,.*")

_SHELLS = ("bash", "zsh", "tcsh")

_EPILOG = """\
examples:
  sam3rt demo
  sam3rt segment photo.jpg --point 225,150 --output masks
  sam3rt segment imgs/ --prompts prompts.jsonl --format coco -o out
  sam3rt segment photo.jpg --box 40,60,300,280 --point 90,100,0 --single-mask --output masks
  sam3rt export sam3.pt --output engines/sam3
  sam3rt build engines/sam3
  sam3rt verify engines/sam3
  sam3rt compare engines/sam3 onnxruntime simulated:fp16
  sam3rt bench engines/sam3 --quick
  sam3rt models
  sam3rt info --json
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints show what the user typed without obeying it, and what is near."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            message += _near(wrong[1], [name.strip("' ") for name in wrong[2].split(",")])
        self.exit(2, f"{self.prog}: {printable(message)}\ntry: {self.prog} --help\n")


def _near(typed: str, known: Iterable[str]) -> str:
    """What a user may have meant, as the end of a message, or nothing."""
    found = difflib.get_close_matches(typed, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


class _PrintCompletion(argparse.Action):
    """Print what makes a shell complete sam3rt's options."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"{option_string} needs: pip install shtab")
        print(shtab.complete(parser, values))
        parser.exit()


class _Formatter(logging.Formatter):
    """Log lines without the control characters that a file's name may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser with all subcommands.

    Args:
        only: leave out the others where there is one of this name: what they need takes a moment
            to import.
    """
    parser = _Parser(
        prog="sam3rt",
        description="Segment objects in images from clicks, boxes and masks, without PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sam3rt {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=_SHELLS,
        help="print a script for a shell's completion (needs shtab)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _subcommands(only).items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="log what is done, to standard error"
        )
        command.set_defaults(run=module.run, parser=command)
    return parser


def _subcommands(only: str | None = None) -> dict[str, ModuleType]:
    """The runtime's own subcommands and those that other installed packages offer."""
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=_GROUP)}
    listed = [name for name in _ORDER if name in {*_OWN, *entries}]
    names = (*listed, *sorted(set(entries) - set(listed)))
    found = {}
    for name in [only] if only in names else names:
        try:
            found[name] = (
                entries[name].load()
                if name in entries
                else importlib.import_module(f".{name}", __package__)
            )
        except ImportError as error:
            if name not in entries:
                raise
            # Somebody else's broken package must not break this one.
            _LOG.warning("the subcommand %s cannot be loaded: %s", name, error)
    return found or _subcommands()


def run(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and run the subcommand they name; see :func:`sam3rt.cli.main`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser(given[0] if given else None)
    if not given:
        parser.print_help(sys.stderr)
        return 2
    options, unknown = parser.parse_known_args(_attach_negative(given))
    if unknown:
        command = options.parser
        near = _near(unknown[0].partition("=")[0], re.findall(r"--[a-z-]+", command.format_help()))
        command.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    # Pillow's, of odd metadata, which play no part here.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        status: int = options.run(options)
        return status
    except BrokenPipeError:
        raise
    except (Sam3rtError, OSError, MemoryError) as error:
        print(f"sam3rt {options.command}: {printable(problem_of(error))}", file=sys.stderr)
        return 1


def _attach_negative(arguments: Sequence[str]) -> list[str]:
    """Write ``--point -5,10`` as ``--point=-5,10``."""
    attached: list[str] = []
    for argument in arguments:
        last = attached[-1] if attached else ""
        if last.startswith("--") and "=" not in last and _NEGATIVE.fullmatch(argument):
            attached[-1] = f"{last}={argument}"
        else:
            attached.append(argument)
    return attached
