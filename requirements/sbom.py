"""Write the software bill of materials: the locked packages of the runtime, and its model.

    python requirements/sbom.py --environment .venv-demo

Packages and hashes come from ``cpu.lock``, licences from the packages' own metadata in an
environment that has them, the model's from its manifest. Needs cyclonedx-python-lib.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
MODEL = ROOT / "engines" / "mobile_sam" / "bundle.json"
OUTPUT = ROOT / "requirements" / "sam3rt.cdx.json"


class Locked(NamedTuple):
    """One package of a lock file.

    Attributes:
        name: its name.
        version: its version.
        hashes: SHA-256 of every file that may be installed.
    """

    name: str
    version: str
    hashes: tuple[str, ...]


def read_lock(text: str) -> Iterator[Locked]:
    """The packages of a lock file."""
    for entry in re.split(r"\n(?=\S)", text.strip()):
        name, version = re.split(r"==| ", entry, maxsplit=2)[:2]
        yield Locked(name, version, tuple(re.findall(r"sha256:([0-9a-f]{64})", entry)))


def bill(environment: Path) -> Bom:
    """The bill of materials.

    Args:
        environment: virtual environment with the locked packages.
    """
    lock = LOCK.read_text()
    model = json.loads(MODEL.read_text())
    version = re.search(r'"(.+)"', (ROOT / "runtime/sam3rt/_version.py").read_text().split("=")[1])
    if version is None:
        raise ValueError("runtime/sam3rt/_version.py names no version")
    licenses = LicenseFactory()
    product = Component(
        name="sam3rt",
        version=version.group(1),
        type=ComponentType.LIBRARY,
        bom_ref="sam3rt",
        licenses=[licenses.make_from_string("Apache-2.0")],
    )
    # The same content gets the same number, so that a new one means something changed.
    content = lock + model["fingerprint"] + version.group(1)
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, content))
    bom.metadata.component = product
    (folder,) = environment.glob("lib/python3*/site-packages")
    parts = [_package(locked, folder, licenses) for locked in read_lock(lock)]
    parts.append(_model(model, licenses))
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(product, parts)
    return bom


def _package(locked: Locked, folder: Path, licenses: LicenseFactory) -> Component:
    return Component(
        name=locked.name,
        version=locked.version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{locked.name}=={locked.version}",
        purl=PackageURL("pypi", None, locked.name, locked.version),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in locked.hashes],
        licenses=[licenses.make_from_string(_license(locked.name, folder))],
    )


def _license(name: str, folder: Path) -> str:
    """What a package's metadata call its licence.

    Raises:
        LookupError: the package is not in the environment, or names no licence.
    """
    for distribution in importlib.metadata.distributions(name=name, path=[str(folder)]):
        metadata = distribution.metadata
        for field in ("License-Expression", "License"):
            if metadata.get(field):
                return str(metadata[field]).splitlines()[0]
        for classifier in metadata.get_all("Classifier") or []:
            if classifier.startswith("License :: "):
                return str(classifier.rpartition(" :: ")[2])
    raise LookupError(f"{name} in {folder} names no licence")


def _model(manifest: dict[str, Any], licenses: LicenseFactory) -> Component:
    """The bundled model, with each of its files."""
    source = manifest["source"]
    component = Component(
        name=str(manifest["name"]),
        version=str(manifest["fingerprint"]),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"model:{manifest['name']}",
        description=f"bundled model, exported from {source['reference']}",
        licenses=[licenses.make_from_string(source["license"])],
    )
    for entry in sorted(file_entries(manifest), key=lambda entry: entry["file"]):
        component.components.add(
            Component(
                name=entry["file"],
                type=ComponentType.FILE,
                bom_ref=f"model:{manifest['name']}/{entry['file']}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry["sha256"])],
            )
        )
    return component


def file_entries(value: object) -> Iterator[dict[str, str]]:
    """Every file that a manifest vouches for."""
    if isinstance(value, dict):
        if set(value) == {"file", "sha256", "bytes"}:
            yield value
        else:
            for inner in value.values():
                yield from file_entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from file_entries(inner)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--environment", type=Path, required=True, help="virtual environment with the packages"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    text = JsonV1Dot6(bill(options.environment)).output_as_string(indent=2)
    options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
