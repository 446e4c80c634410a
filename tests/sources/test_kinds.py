"""A new kind of source is one file that registers itself; each source keeps the contract."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from movq_cli.sources.open import open_source
from movq_cli.sources.source import KINDS, Source

TOY = textwrap.dedent(
    '''
    """Text files with one colour a line, each an image of one colour."""

    from dataclasses import dataclass
    from pathlib import Path

    from PIL import Image

    from movq_cli.data.images import encode_png
    from movq_cli.sources.source import Source, SourceKind, register


    @dataclass(frozen=True)
    class ColourReader:
        """Draws an image of one colour."""

        colours: tuple[str, ...]

        def read(self, member: int) -> bytes:
            """Return the image as a PNG file."""
            return encode_png(Image.new("RGB", (32, 32), self.colours[member]))


    def _open(location: str, path: Path) -> Source:
        colours = tuple(path.read_text().split())
        names = tuple(f"{index:06d}.png" for index in range(len(colours)))
        return Source(location, names, tuple(range(len(colours))), ColourReader(colours))


    register(SourceKind(lambda _, path: path.suffix == ".colours" and path.is_file(), _open))
    '''
)
"""The kind of source of docs/extending.md, as its one file."""


def test_a_kind_of_source_is_one_file_and_works_in_the_command(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "warm.colours").write_text("red orange gold tomato coral salmon maroon brown pink crimson\n")
    script = "import movq_cli.sources.open, toy\nfrom movq_cli.app import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script, "prepare", "warm.colours", "data", "--size", "16", "--val", "2", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"path": "data", "train": 8, "val": 2, "rejected": 0, "classes": 0}
    assert open_source(str(tmp_path / "data")).native_size == 16


def test_at_most_one_kind_that_is_no_fallback_matches(tmp_path: Path, shapes: Path) -> None:
    """The order in which kinds are asked must have no meaning, or a new file would change what an old one opens."""
    import tarfile
    import zipfile

    image = next(shapes.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(image, "a.png")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-00.tar", "w") as tar:
        tar.add(image, "a.png")
    (tmp_path / "list.txt").write_text(f"{image}\n")
    locations = [shapes, image, tmp_path / "a.zip", tmp_path / "tars", tmp_path / "tars" / "train-00.tar"]
    for location in (*map(str, locations), str(tmp_path / "list.txt"), "digits", str(tmp_path / "{00..01}.tar")):
        for is_fallback, allowed in ((False, {0, 1}), (True, {0, 1})):
            kinds = [
                kind for kind in KINDS if kind.is_fallback is is_fallback and kind.matches(location, Path(location))
            ]
            assert len(kinds) in allowed, location
        if Path(location).exists():
            assert len(open_source(location)) >= 1


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("b.png", "a.png")},
        {"names": ("a.png", "a.png")},
        {"names": ("../a.png", "b.png")},
        {"members": (0,)},
        {"labels": (0,)},
        {"labels": (0, 2)},
        {"splits": ("train",)},
    ],
)
def test_a_source_that_breaks_the_contract_cannot_be_made(change: dict[str, object]) -> None:
    class Nothing:
        def read(self, member: int) -> bytes:
            return b""

    good = Source("here", ("a.png", "b.png"), (0, 1), Nothing(), labels=(0, 1), classes=("x", "y"))
    with pytest.raises(AssertionError):
        dataclasses.replace(good, **change)  # type: ignore[arg-type]
