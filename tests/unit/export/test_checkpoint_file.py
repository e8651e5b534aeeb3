"""Checkpoint files: what opens, what is refused and why, and that nothing in a file is run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.export_helpers import (
    DECODER,
    NO_MEMORY,
    TRUNK,
    Exploit,
    canonical_tensors,
    tiny_tensors,
)
from torch import Tensor, nn

from sam3rt.bundle.files import sha256_file
from sam3rt_export.errors import CheckpointError
from sam3rt_export.sources import SourceOptions, checkpoint_file, open_source
from sam3rt_export.sources.checkpoint_file import read_state

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """A tiny SAM 3."""
    return tiny_tensors()


@pytest.fixture(scope="module")
def checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SAM 3 as a file."""
    path = tmp_path_factory.mktemp("tiny") / "sam3_tiny.pt"
    torch.save(tensors, path)
    return path


def loaded(path: Path, weights_key: str | None = None) -> Tensors:
    return canonical_tensors(read_state(path, weights_key)[0], "test")


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def plain(tensors: Tensors) -> Tensors:
    """With rotary tables as two real ones, for formats without complex numbers."""
    split = {n: t.contiguous() for n, t in tensors.items() if not t.is_complex()}
    for name, tensor in tensors.items():
        if tensor.is_complex():
            split[name + "_real"] = tensor.real.contiguous()
            split[name + "_imag"] = tensor.imag.contiguous()
    return split


# --- pickled files --------------------------------------------------------------------------------


def test_a_file_is_read_with_its_digest(checkpoint: Path, tensors: Tensors) -> None:
    state, digest = read_state(checkpoint)
    assert same(canonical_tensors(state, "test"), tensors)
    assert digest == sha256_file(checkpoint)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_open_source_outlives_its_file(tensors: Tensors, kind: str, tmp_path: Path) -> None:
    """Training may overwrite its checkpoint. Reading a file that was cut is a bus error."""
    path = tmp_path / f"last.{kind}"
    if kind == "pt":
        torch.save(tensors, path)
    else:
        save_file(plain(tensors), path)
    source = open_source(path)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    weights = [p for part in (source.encoder, source.decoder) for p in part.parameters()]
    assert all(weight.any() for weight in weights if weight.ndim > 1)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_changes_while_it_is_read_is_refused(
    checkpoint: Path, replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest would be of other weights than those that are exported."""
    path = tmp_path / "last.pt"
    shutil.copy(checkpoint, path)

    def hash_it(file: Path) -> str:
        if replaced:
            shutil.copy(checkpoint, tmp_path / "next.pt")
            (tmp_path / "next.pt").replace(file)
        else:
            with file.open("ab") as stream:
                stream.write(b"x")
        return sha256_file(file)

    monkeypatch.setattr(checkpoint_file, "sha256_file", hash_it)
    with pytest.raises(CheckpointError, match=r"last\.pt: changed while it was read"):
        read_state(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(tensors: Tensors, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = cast(tensors, dtype)
    torch.save(stored, tmp_path / "stored.pt")
    assert same(loaded(tmp_path / "stored.pt"), cast(stored, torch.float32))


def test_a_file_older_than_pytorch_1_6(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "legacy.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same(loaded(path), tensors)


def test_entries_that_are_no_tensors_are_left_out(tensors: Tensors, tmp_path: Path) -> None:
    content = tensors | {"epoch": 4, "names": ["x"], 5: torch.ones(1)}
    torch.save(content, tmp_path / "mixed.pt")
    assert read_state(tmp_path / "mixed.pt")[0].keys() == tensors.keys()


def test_parameters_are_loaded_detached(tensors: Tensors, tmp_path: Path) -> None:
    name = DECODER + "conv_s0.bias"
    torch.save(tensors | {name: nn.Parameter(tensors[name])}, tmp_path / "parameters.pt")
    assert not loaded(tmp_path / "parameters.pt")[name].requires_grad


# --- several state dicts --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", "ema"])
def test_the_only_model_of_a_file_is_taken(tensors: Tensors, key: str, tmp_path: Path) -> None:
    content = {key: tensors, "optimizer": {"state": {0: torch.ones(2)}}, "step": 3}
    torch.save(content, tmp_path / "x.pt")
    assert same(loaded(tmp_path / "x.pt"), tensors)


def test_one_of_several_models_must_be_chosen(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    other = {name: tensor + 1.0 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "ema": {"module": other}, "step": 3}, path)
    with pytest.raises(CheckpointError, match=r"'model', 'ema\.module'.*--weights-key"):
        read_state(path)
    assert same(loaded(path, "model"), tensors)
    assert same(loaded(path, "ema.module"), other)
    with pytest.raises(CheckpointError, match=r"weights_key is 'emma', the file has 'model'"):
        read_state(path, "emma")


def test_a_key_is_for_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weights_key"):
        open_source(tmp_path, SourceOptions(weights_key="ema"))


# --- safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sam3.safetensors", "sam3.pt"])
def test_safetensors_whatever_their_name(
    tensors: Tensors, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    save_file(cast(plain(tensors), dtype), tmp_path / name)
    state, digest = read_state(tmp_path / name)
    assert digest == sha256_file(tmp_path / name)
    found = canonical_tensors(state, "test")
    tables = {n: found.pop(n) for n in list(found) if n.endswith("freqs_cis")}
    assert all((table - tensors[n]).abs().max() < 0.01 for n, table in tables.items())
    rounded = cast(cast(tensors, dtype), torch.float32)
    assert same(found, {n: t for n, t in rounded.items() if n not in tables})
    assert open_source(tmp_path / name).kind == "sam3.pt"


def shards(tensors: Tensors, folder: Path) -> Path:
    parts = plain(tensors)
    names = sorted(parts)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: parts[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_safetensors_in_several_files(tensors: Tensors, tmp_path: Path) -> None:
    assert same(loaded(shards(tensors, tmp_path)), tensors)
    assert open_source(tmp_path).kind == "sam3.pt"  # the folder stands for its index


def test_other_weights_behind_the_same_index_have_another_digest(
    tensors: Tensors, tmp_path: Path
) -> None:
    index = shards(tensors, tmp_path)
    before = read_state(index)[1]
    assert read_state(shards(tensors, tmp_path))[1] == before
    changed = tensors | {NO_MEMORY: tensors[NO_MEMORY] + 1.0}
    text = index.read_text()
    index = shards(changed, tmp_path)
    assert index.read_text() == text
    assert read_state(index)[1] != before


@pytest.mark.parametrize(
    "damage", ["no file", "a pipe", "no tensor", "a path", "no map", "no names", "no JSON"]
)
def test_a_damaged_index_is_refused(tensors: Tensors, damage: str, tmp_path: Path) -> None:
    index = shards(tensors, tmp_path)
    content = json.loads(index.read_text())
    if damage == "no file":
        (tmp_path / "model-1.safetensors").unlink()
    elif damage == "a pipe":
        (tmp_path / "model-1.safetensors").unlink()
        os.mkfifo(tmp_path / "model-1.safetensors")
    elif damage == "no names":
        content["weight_map"]["x"] = None
    elif damage == "no tensor":
        content["weight_map"]["x"] = "model-0.safetensors"
    elif damage == "a path":
        content["weight_map"]["x"] = "../model-0.safetensors"
    elif damage == "no map":
        del content["weight_map"]
    index.write_text("{" if damage == "no JSON" else json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_state(index)


def test_a_file_of_another_run_behind_the_index_is_refused(
    tensors: Tensors, tmp_path: Path
) -> None:
    """A tensor in two files: the one that the index does not name would have won."""
    index = shards(tensors, tmp_path)
    path = tmp_path / "model-1.safetensors"
    stale = load_file(tmp_path / "model-0.safetensors")
    name = sorted(stale)[0]
    save_file(load_file(path) | {name: stale[name] + 1}, path)
    with pytest.raises(
        CheckpointError, match=r"index\.json: '.*' is in model-1\.safetensors, other"
    ):
        read_state(index)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_only_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sam3.pt").write_bytes(checkpoint.read_bytes())
    assert open_source(tmp_path).origin == "sam3.pt"
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several.*other\.pt"):
        open_source(tmp_path)


@pytest.mark.parametrize("other", ["sam3.pt", "other.safetensors", "a.safetensors.index.json"])
def test_a_folder_with_another_checkpoint_beside_its_shards_stands_for_neither(
    tensors: Tensors, checkpoint: Path, other: str, tmp_path: Path
) -> None:
    index = shards(tensors, tmp_path)
    (tmp_path / other).write_bytes((index if other.endswith("json") else checkpoint).read_bytes())
    with pytest.raises(
        CheckpointError, match=rf"several.*model.*index\.json.*{other}|{other}.*model"
    ):
        open_source(tmp_path)


def test_metas_checkpoint_may_lie_beside_a_configuration(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sam3.pt").write_bytes(checkpoint.read_bytes())
    assert open_source(tmp_path).origin == "sam3.pt"


def test_a_folder_of_adapters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    for config in (False, True):
        if config:
            (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"LoRA adapters.*--lora"):
            open_source(tmp_path)


# --- what reads wrongly ---------------------------------------------------------------------------


def test_a_file_that_was_zipped_again_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """PyTorch maps compressed records as if they were the values."""
    path = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(checkpoint) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            kept = entry.filename.endswith(("data.pkl", "version", "byteorder", ".data/"))
            kind = zipfile.ZIP_STORED if kept else zipfile.ZIP_DEFLATED
            new.writestr(entry.filename, old.read(entry), compress_type=kind)
    with pytest.raises(CheckpointError, match=r"packed\.pt: its records are compressed"):
        open_source(path)


def test_a_download_with_a_wrong_byte_is_refused(
    checkpoint: Path, tensors: Tensors, tmp_path: Path
) -> None:
    """PyTorch compares no checksums, and the graphs would be held to the same wrong weights."""
    content = bytearray(checkpoint.read_bytes())
    stored = tensors[TRUNK + "blocks.1.attn.qkv.weight"].numpy().tobytes()
    content[content.index(stored) + 100] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be read.*CRC"):
        open_source(tmp_path / "x.pt")


def test_a_file_may_have_no_checksums(
    tensors: Tensors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
    torch.save(tensors, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    assert same(loaded(tmp_path / "x.pt"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_file_does_not_expand_to_a_large_model(
    tensors: Tensors, zipped: bool, tmp_path: Path
) -> None:
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(
        tensors | {TRUNK + "pos_embed": huge},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=zipped,
    )
    assert (tmp_path / "x.pt").stat().st_size < 1e6
    with pytest.raises(CheckpointError, match=r"expand to 4\.4e\+03 GB"):
        open_source(tmp_path / "x.pt")


# --- what is no checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_code_in_a_file_is_refused_and_not_run(
    tensors: Tensors, zipped: bool, nested: bool, tmp_path: Path
) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pt"
    content: dict[str, Any] = tensors | {"extra": Exploit(trace)}
    torch.save(
        {"model": content} if nested else content, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match=r"evil\.pt: cannot be read.*Python object"):
        open_source(path)
    assert not trace.exists()
    # The file does what it is feared to do where it is trusted.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_nobody_is_told_to_run_the_code_in_a_file(tmp_path: Path) -> None:
    torch.save({"model": {}, "x": Exploit(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": Exploit(trace)}))
    with pytest.raises(CheckpointError):
        open_source(path)
    assert not trace.exists()


def zip_without_data(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


def cut(path: Path) -> None:
    torch.save(tiny_tensors(), path)
    path.write_bytes(path.read_bytes()[:-4000])


def program(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)


NOT_CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "empty file": (lambda path: path.write_bytes(b""), "is empty"),
    "git-lfs pointer": (
        lambda path: path.write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3450062241\n"
        ),
        "Git LFS pointer.*git lfs pull",
    ),
    "text": (lambda path: path.write_text("authorization required\n"), "b'authorization re'"),
    "web page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>Log in</html>"),
        "a web page",
    ),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "it starts with"),
    "zip of something else": (zip_without_data, r"without PyTorch's data.pkl.*readme\.txt"),
    "TorchScript": (program, "TorchScript"),
    "cut file": (cut, "cannot be read"),
    "list": (lambda path: torch.save([torch.ones(1)], path), "holds a list"),
    "tensor": (lambda path: torch.save(torch.ones(1), path), "holds a Tensor"),
    "number": (lambda path: torch.save(5, path), "holds a int"),
    "empty dict": (lambda path: torch.save({}, path), "no tensors"),
    "empty model": (lambda path: torch.save({"model": {}}, path), "no tensors"),
    "no tensors": (lambda path: torch.save({"lr": 0.1}, path), "no tensors"),
    "other tensors": (lambda path: torch.save({"fc.weight": torch.ones(2, 2)}, path), "fc.weight"),
    "SAM 2": (
        lambda path: torch.save({"model": {"image_encoder.trunk.pos_embed": torch.ones(2)}}, path),
        "SAM 2",
    ),
    "safetensors header": (lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      "), ""),
    "safetensors of nothing": (
        lambda path: path.write_bytes(b'\x0a\0\0\0\0\0\0\0{"x": "y"}'),
        "SafetensorError",
    ),
    "pickled global": (lambda path: path.write_bytes(b"\x80\x02cposix\nsystem\n."), ""),
    "bare pickle stop": (lambda path: path.write_bytes(b"\x80\x02."), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("write", "message"), NOT_CHECKPOINTS.values(), ids=list(NOT_CHECKPOINTS))
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(
    write: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(CheckpointError, match=rf"model\.pt: .*{message}"):
        open_source(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=40).map(lambda tail: b"\x80\x02" + tail) | st.binary(max_size=40))
def test_garbage_is_refused_as_such(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "garbage.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            open_source(path)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_damaged_files_open_or_are_refused(checkpoint: Path, data: st.DataObject) -> None:
    damaged = bytearray(checkpoint.read_bytes())
    # At the front and the end, where the pickle and the zip's directory are.
    where = st.integers(0, 4000) | st.integers(len(damaged) - 4000, len(damaged) - 1)
    for at, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=4)):
        damaged[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.pt"
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            open_source(path)
