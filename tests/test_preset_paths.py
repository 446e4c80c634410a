"""Paths in presets and on the command line: `~` and variables are expanded or refused, a base is beside its child."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli import presets
from movq_cli.app import app
from movq_cli.errors import BadRequestError
from movq_cli.paths import expand_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, beside the current folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SCRATCH", str(home / "scratch"))
    monkeypatch.delenv("UNSET", raising=False)
    return home


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("~/x", "home/x"),
        ("~", "home"),
        ("$SCRATCH/x", "home/scratch/x"),
        ("${SCRATCH}-x/y", "home/scratch-x/y"),
        ("$HOME/$HOME", "home/{home}"),
    ],
)
def test_a_home_folder_and_variables_are_expanded(home: Path, text: str, found: str) -> None:
    expected = home.parent / found.replace("{home}", str(home).lstrip("/"))
    assert str(expand_path(Path(text))).replace("//", "/") == str(expected)
    assert str(presets.load("digits", [f"data.path='{text}'"]).data.path).replace("//", "/") == str(expected)


def test_a_preset_file_may_name_a_home_folder(home: Path) -> None:
    Path("own.yaml").write_text("base: ~/base.yaml\ndata: {path: $SCRATCH/set}\n")
    (home / "base.yaml").write_text("base: digits\ndescription: in the home folder\n")
    settings = presets.load("own.yaml")
    assert (settings.data.path, settings.description) == (home / "scratch/set", "in the home folder")
    assert presets.load("~/base.yaml").description == "in the home folder"


@pytest.mark.parametrize("text", ["$UNSET/x", "a/${UNSET}", "~no-such-user-here/x"])
def test_what_cannot_be_expanded_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadRequestError, match=r"not set|does not exist"):
        presets.load("digits", [f"data.path={text}"])
    with pytest.raises(BadRequestError, match=r"not set|does not exist"):
        app(["presets", "new", text, "--data", "data"], standalone_mode=False)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("text", ["~", "~x", "$UNSET", "a$", "$1"])
def test_a_path_that_exists_as_it_is_written_stays(text: str) -> None:
    (Path.cwd() / text).mkdir()
    assert expand_path(Path(text)) == Path(text)


def test_options_expand_what_the_shell_does_not(home: Path) -> None:
    for arguments in (["check", "~/nothing"], ["check", "$HOME/nothing"]):
        with pytest.raises(BadRequestError, match=str(home / "nothing")):
            app(arguments, standalone_mode=False)
    with pytest.raises(BadRequestError, match=str(home / "set")):
        app(["presets", "new", "own.yaml", "--data=~/set"], standalone_mode=False)


def test_a_base_is_searched_beside_its_child_first() -> None:
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("base: parent.yaml\ntrain_vq: {batch_size: 16}\n")
    Path("parent.yaml").write_text("base: digits\ntrain_vq: {steps: 7}\n")
    assert presets.load("sub/child.yaml").train_vq.steps == 7  # It is only in the current folder.
    Path("sub/parent.yaml").write_text("base: digits\ntrain_vq: {steps: 6}\n")
    assert presets.load("sub/child.yaml").train_vq.steps == 6
    Path("sub/child.yaml").write_text("base: parent\n")
    assert presets.load("sub/child.yaml").train_vq.steps == 6


def test_a_preset_may_have_the_name_of_its_base() -> None:
    Path("presets").mkdir()
    Path("presets/digits.yaml").write_text("base: digits\ndescription: own\n")
    settings = presets.load("digits")
    assert settings.description == "own"
    Path("presets/digits.yaml").unlink()
    assert settings.vq == presets.load("digits").vq


def test_a_missing_base_is_named_with_its_child() -> None:
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("base: parent.yaml\n")
    with pytest.raises(BadRequestError, match=r"sub/parent\.yaml or parent\.yaml \(sub/child\.yaml names it"):
        presets.load("sub/child.yaml")


def test_presets_that_inherit_in_a_circle_are_refused() -> None:
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(BadRequestError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        presets.load("a.yaml")
