"""``sam3rt models``: the bundles that have a name."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..bundle import open_bundle
from ..bundle.names import list_bundles, search_folders
from ..errors import BundleError
from .options import printable

HELP = "list the models that can be loaded by name"
DESCRIPTION = """\
List the models that can be loaded by name: load_model("NAME"), --bundle NAME.

They are looked for in the folder "engines" here, in the folder that SAM3RT_HOME names, and in
"sam3rt" in the user's data folder. The bundled MobileSAM is always there, as mobile_sam.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the list."""
    rows: list[dict[str, Any]] = []
    for name, path in list_bundles().items():
        row: dict[str, Any] = {"name": name, "path": str(path)}
        try:
            manifest = open_bundle(path, check_files=False).manifest
        except BundleError as error:
            row["problem"] = str(error)
        else:
            height, width = manifest.image.size
            row |= {
                "family": manifest.model_type,
                "input": f"{width}x{height}",
                "megabytes": round(sum(entry.bytes for entry in manifest.files()) / 1e6, 1),
                "fingerprint": manifest.fingerprint,
            }
        rows.append(row)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max([4, *(len(printable(row["name"])) for row in rows)]) + 2
    print(f"{'name':<{width}}{'family':<14}{'input':<12}{'size':>10}  path")
    for row in rows:
        start = f"{printable(row['name']):<{width}}"
        if "problem" in row:
            print(f"{start}{printable(row['problem'])} ({printable(row['path'])})")
        else:
            size = f"{row['megabytes']} MB"
            print(
                f"{start}{row['family']:<14}{row['input']:<12}{size:>10}  {printable(row['path'])}"
            )
    print(f"looked for in {', '.join(printable(str(folder)) for folder in search_folders())}")
    return 0
