"""Typed graphs for ONNX Runtime's CUDA provider, written beside a bundle's engines.

ONNX Runtime has no option that computes a graph in FP16, and the runtime has no ``onnx`` to change
one: so the graphs are made here, once, on any machine, and the runtime loads files. TF32 and FP32
need none: the bundle's own graphs and one option of the provider do.

The recipes are TensorRT's with one difference. TensorRT adds up FP16 products in FP16 unless casts
to FP32 surround them. ONNX Runtime hands them to cuBLAS, which is asked for FP32 sums unless
``ORT_CUDA_GEMM_OPTIONS`` says otherwise, and its fused attention sums in FP32; casts would only
make it compute in FP32. So these graphs say nothing of sums.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from sam3rt.backends.onnxruntime.typed import (
    ON_REQUEST,
    TYPED_ORDER,
    TypedSidecar,
    typed_folder,
    write_typed_sidecar,
)
from sam3rt.bundle import Bundle, FileEntry, file_entry
from sam3rt.errors import InvalidInputError

from .engines_folder import exclusive
from .fused_graph import fuse
from .graph_files import load_graph, save_graph
from .recipes import BF16, PRODUCTS, Recipe, recipe_named
from .typed_graph import FLOAT, Role, apply_recipe

_LOG = logging.getLogger(__name__)

_ROLES: tuple[Role, ...] = ("encoder", "decoder")


def _without_casts(name: str) -> Recipe:
    return dataclasses.replace(recipe_named(name), accumulation="float16")


# Encoder's and decoder's by name, fastest first. A decoder costs little, and in BF16 it moves the
# edges of masks: simulations fail the gate by that alone.
TYPED_RECIPES: dict[str, tuple[Recipe, Recipe]] = {
    name: (BF16, _without_casts("fp16")) if name == BF16.name else (_without_casts(name),) * 2
    for name in TYPED_ORDER
}


def build_typed_graphs(
    bundle: Bundle,
    precision: Sequence[str] = (),
    say: Callable[[str], None] = _LOG.info,
) -> tuple[Path, ...]:
    """Write a bundle's graphs for ONNX Runtime on CUDA, and replace those of earlier builds.

    Nothing is run: the runtime proves them where they are first loaded.

    Args:
        bundle: an opened bundle.
        precision: names of recipes; by default all that ``"auto"`` tries at load.
        say: told what is done.

    Returns:
        The folders.

    Raises:
        InvalidInputError: there is no such recipe.
        BundleError, BuildError: a graph cannot be read or typed, the folder of engines lies behind
            a link, or another build is at work.
        OSError: the bundle's folder cannot be written to.
    """
    unknown = [name for name in precision if name not in TYPED_RECIPES]
    if unknown:
        expected = "some of " + ", ".join(TYPED_RECIPES) + " (tf32 and fp32 need no build)"
        raise InvalidInputError("precision", ", ".join(unknown), expected)
    names = precision or [name for name in TYPED_RECIPES if name not in ON_REQUEST]
    with exclusive(bundle) as folder:
        return tuple(_write(bundle, folder, name, say) for name in TYPED_RECIPES if name in names)


def typed_graph(bundle: Bundle, role: Role, name: str) -> tuple[ir.Model, dict[str, int]]:
    """One of a bundle's graphs in a recipe, and how many of each operator were fused.

    Raises:
        BundleError, BuildError: it cannot be read or typed.
    """
    encoder, decoder = TYPED_RECIPES[name]
    model = load_graph(bundle, role)
    fused = fuse(model)
    apply_recipe(model, encoder if role == "encoder" else decoder, encoder.features_dtype)
    return model, fused


def _write(bundle: Bundle, engines: Path, name: str, say: Callable[[str], None]) -> Path:
    target = typed_folder(bundle.path, name)
    encoder, _ = TYPED_RECIPES[name]
    with tempfile.TemporaryDirectory(prefix=".build-", dir=engines) as made:
        folder = Path(made) / target.name
        folder.mkdir()
        files: dict[Role, tuple[FileEntry, ...]] = {}
        narrow: list[str] = []
        for role in _ROLES:
            model, fused = typed_graph(bundle, role, name)
            files[role] = _write_graph(
                model, fused, folder / f"{role}.onnx", f"{role} in {name}", say
            )
            if not _has_fp32_products(model):
                narrow.append(files[role][0].file)
        sidecar = TypedSidecar(
            bundle_fingerprint=bundle.manifest.fingerprint,
            recipe=name,
            tf32=encoder.tf32,
            features_dtype=encoder.features_dtype,
            encoder=files["encoder"],
            decoder=files["decoder"],
            narrow=tuple(narrow),
        )
        write_typed_sidecar(folder, sidecar)
        if target.exists():
            target.rename(Path(made) / "before")
        shutil.move(folder, target)
    return target


def _write_graph(
    model: ir.Model, fused: dict[str, int], path: Path, what: str, say: Callable[[str], None]
) -> tuple[FileEntry, ...]:
    beside = save_graph(model, path)
    operators = ", ".join(f"{count} {name}" for name, count in fused.items()) or "nothing fused"
    say(f"wrote the {what}: {path.stat().st_size / 1e6:.1f} MB, {operators}")
    return (file_entry(path), *(file_entry(file) for file in beside))


def _has_fp32_products(model: ir.Model) -> bool:
    return any(
        node.op_type in PRODUCTS and node.inputs[0] is not None and node.inputs[0].dtype == FLOAT
        for node in model.graph
    )
