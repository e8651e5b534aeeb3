"""The command line: ``sam3rt segment | export | build | verify | compare | info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from .._version import __version__
from ..errors import Sam3rtError
from . import info, segment, verify

_LOG = logging.getLogger(__name__)

# A subcommand is a module with HELP, DESCRIPTION, add_arguments(parser) and run(arguments) -> int.
# It imports what it needs when it runs, so that --help is quick and needs no extra.
_OWN = (segment, verify, info)
_GROUP = "sam3rt.commands"
# In the order in which people need them; whatever else is installed comes last.
_ORDER = ("segment", "export", "build", "verify", "compare", "bench", "info")

_EPILOG = """\
examples:
  sam3rt segment photo.jpg --point 225,150 --output masks
  sam3rt segment photo.jpg --box 40,60,300,280 --point 90,100,0 --single-mask --output masks
  sam3rt export sam3.pt --output engines/sam3
  sam3rt build engines/sam3
  sam3rt verify engines/sam3
  sam3rt compare engines/sam3 onnxruntime simulated:fp16
  sam3rt bench engines/sam3 --quick
  sam3rt info --json
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="sam3rt",
        description="Segment objects in images from clicks, boxes and masks, without PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sam3rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _subcommands().items():
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
        command.set_defaults(run=module.run)
    return parser


def _subcommands() -> dict[str, ModuleType]:
    """The runtime's own subcommands and those that other installed packages offer."""
    found = {module.__name__.rpartition(".")[2]: module for module in _OWN}
    for entry in importlib.metadata.entry_points(group=_GROUP):
        try:
            found[entry.name] = entry.load()
        except ImportError as error:  # somebody else's broken package must not break this one
            _LOG.warning("the subcommand %s cannot be loaded: %s", entry.name, error)
    order = [name for name in _ORDER if name in found]
    return {name: found[name] for name in (*order, *sorted(set(found) - set(order)))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where something failed, 2 where the arguments are wrong.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        status: int = options.run(options)
    except Sam3rtError as error:
        print(f"sam3rt {options.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sam3rt {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
