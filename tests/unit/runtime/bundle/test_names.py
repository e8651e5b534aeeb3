"""Bundles by name: what is found where, what wins, and what is said where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.helpers import tiny_bundle

import sam3rt
from sam3rt import BundleError
from sam3rt.bundle import open_bundle
from sam3rt.bundle.default import default_bundle_path
from sam3rt.bundle.names import find_bundle, list_bundles


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders that are searched, by where they come from, none of which exists yet."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("SAM3RT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("sys.platform", "linux")
    return {
        "engines": Path("engines"),
        "home": tmp_path / "home",
        "data": tmp_path / "data" / "sam3rt",
    }


def test_the_bundled_model_has_a_name(folders: dict[str, Path]) -> None:
    assert list_bundles() == {"mobile_sam": default_bundle_path()}
    assert open_bundle("mobile_sam").path == default_bundle_path()
    assert sam3rt.load_model("mobile_sam", device="cpu").manifest.name == "mobile_sam"


@pytest.mark.parametrize("where", ["engines", "home", "data"])
def test_each_folder_is_searched(where: str, folders: dict[str, Path]) -> None:
    tiny_bundle(folders[where] / "tiny")
    (folders[where] / "no bundle").mkdir()
    assert list_bundles() == {"tiny": folders[where] / "tiny", "mobile_sam": default_bundle_path()}
    assert open_bundle("tiny").path == folders[where] / "tiny"
    assert open_bundle(Path("tiny"), check_files=False).manifest.name == "tiny ☃"


def test_the_first_folder_wins_and_a_path_wins_over_all(folders: dict[str, Path]) -> None:
    order = ["data", "home", "engines"]
    for name in order:
        tiny_bundle(folders[name] / "mobile_sam")
        assert find_bundle("mobile_sam") == folders[name] / "mobile_sam"
        assert list_bundles() == {"mobile_sam": folders[name] / "mobile_sam"}
    Path("mobile_sam").mkdir()
    assert find_bundle("mobile_sam") == Path("mobile_sam")
    with pytest.raises(BundleError, match=r"bundle\.json: is missing from mobile_sam"):
        open_bundle("mobile_sam")


def test_an_unknown_name_lists_what_was_searched(folders: dict[str, Path]) -> None:
    tiny_bundle(folders["engines"] / "sam3")
    with pytest.raises(BundleError) as caught:
        sam3rt.load_model("mobilesam")
    said = str(caught.value)
    for folder in folders.values():
        assert str(folder) in said
    assert "by name there are sam3, mobile_sam" in said
    assert said.endswith("did you mean mobile_sam?")
    assert "\n" not in said


@pytest.mark.parametrize("path", ["no/where", "/no/where", "..", "./a/../tiny", ""])
def test_only_a_bare_name_is_one(path: str, folders: dict[str, Path]) -> None:
    tiny_bundle(folders["home"] / "tiny")
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert "searched" not in str(caught.value)
    assert "of that name" not in str(caught.value)
