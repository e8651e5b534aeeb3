"""The command line: ``sam3rt segment | export | build | verify | compare | info``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import Sam3rtError

# Subcommand modules by name. Each has HELP, add_arguments(parser) and run(arguments) -> int, and
# imports what it needs when it runs, so that --help is quick and needs no extra.
_SUBCOMMANDS = {
    "segment": "sam3rt.cli.segment",
    "export": "sam3rt.cli.export",
    "build": "sam3rt.cli.build",
    "verify": "sam3rt.cli.verify",
    "compare": "sam3rt.cli.compare",
    "bench": "sam3rt.cli.bench",
    "info": "sam3rt.cli.info",
}

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
    for name, path in _SUBCOMMANDS.items():
        module = importlib.import_module(path)
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
