"""A kind of source is one file: `docs/extending.md` says how to write it, and these tests perform the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from movq_cli import sources
from movq_cli.data.images import decode
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.sources import kinds
from movq_cli.sources.open import open_source, source_kinds

TOY = '''
"""Colors in text files: a toy kind of source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from movq_cli.data.images import BadImageError, encode_png
from movq_cli.errors import BadRequestError
from movq_cli.sources.source import Source, SourceKind

SIDE = 8


class ColorsKind(SourceKind):
    """A .colors file: each line has a class and a color, `red 255 0 0`, which becomes an image of 8 x 8 pixels."""

    def matches(self, location: str, path: Path | None) -> bool:
        """Return whether the path is a .colors file."""
        return path is not None and path.suffix == ".colors"

    def open(self, location: str, path: Path | None) -> Source:
        """Make an image of each line."""
        assert path is not None
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise BadRequestError(f"no color in {path}", "Each line has a class and three numbers: red 255 0 0.")
        classes = tuple(sorted({row[0] for row in rows}))
        return Source(
            location=location,
            names=tuple(f"{number:06d}.png" for number in range(len(rows))),
            members=tuple(range(len(rows))),
            reader=ColorReader(tuple(tuple(row[1:]) for row in rows)),
            labels=tuple(classes.index(row[0]) for row in rows),
            classes=classes,
            native_size=SIDE,
        )


@dataclass(frozen=True)
class ColorReader:
    """Images of one color each."""

    colors: tuple[tuple[str, ...], ...]

    def read(self, member: int) -> bytes:
        """Return the image as a PNG file."""
        try:
            red, green, blue = map(int, self.colors[member])
        except ValueError:
            raise BadImageError("not three numbers") from None
        return encode_png(Image.new("RGB", (SIDE, SIDE), (red, green, blue)))


KIND = ColorsKind()
'''

LINES = ["red 255 0 0", "blue 0 0 255", "red 200 0 0", "green 0 255", "blue 0 0 200", "red 150 10 10"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the toy's one file, which stands for a file in `movq_cli/sources/kinds`."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "toy_colors.py").write_text(TOY)
    (tmp_path / "set.colors").write_text("\n".join(LINES))
    return folder


@pytest.fixture
def registered(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy's file found by this process."""
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(toy)])
    monkeypatch.delitem(sys.modules, f"{kinds.__name__}.toy_colors", raising=False)
    source_kinds.cache_clear()
    yield
    source_kinds.cache_clear()


@pytest.mark.usefixtures("registered")
def test_one_file_adds_a_kind_of_source(tmp_path: Path) -> None:
    source = open_source(str(tmp_path / "set.colors"))
    assert len(source) == 6 and source.classes == ("blue", "green", "red") and source.labels == (2, 0, 2, 1, 0, 2)
    assert decode(source.read(4)).getpixel((3, 3)) == (0, 0, 200)
    (tmp_path / "empty.colors").touch()
    with pytest.raises(BadRequestError, match="no color in"):
        open_source(str(tmp_path / "empty.colors"))


def test_the_real_command_prepares_the_new_kind(tmp_path: Path, toy: Path) -> None:
    code = (
        "import sys; from movq_cli.sources import kinds; kinds.__path__.append(sys.argv.pop(1));"
        "from movq_cli.app import main; main()"
    )
    arguments = ["prepare", "set.colors", "out", "--val", "2", "--workers", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["train"] + result["val"], result["rejected"], result["classes"]) == (5, 1, 3)
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text()
    assert "not three numbers" in rejects and "000003.png" in rejects
    prepared = PreparedSet.open(tmp_path / "out")
    stored = {
        (split.classes[label], tuple(split.pixels(index)[0, 0].tolist()))
        for split in (prepared.split("train"), prepared.split("val"))
        for index, label in enumerate(np.asarray(split.labels).tolist())
    }
    rows = [line.split() for line in LINES if len(line.split()) == 4]
    assert stored == {(row[0], tuple(map(int, row[1:]))) for row in rows}


def test_without_its_file_the_kind_is_unknown(tmp_path: Path, toy: Path) -> None:
    with pytest.raises(BadRequestError, match=r"set\.colors is neither"):
        open_source(str(tmp_path / "set.colors"))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (('f"{number:06d}.png"', 'f"{-number:06d}.png"'), "not sorted and unique"),
        (('f"{number:06d}.png"', '"same.png"'), "not sorted and unique"),
        (('f"{number:06d}.png"', 'f"../{number:06d}.png"'), "not a plain relative path"),
        (("native_size=SIDE", 'splits=("train",)'), "1 splits for 6 names"),
        (("classes=classes,", 'classes=("red",),'), "labels outside 0 to 0"),
    ],
)
def test_a_kind_that_violates_the_contract_is_one_clear_line(
    tmp_path: Path, toy: Path, change: tuple[str, str], violation: str
) -> None:
    assert TOY.count(change[0]) == 1
    (toy / "toy_colors.py").write_text(TOY.replace(*change))
    with pytest.raises(BadRequestError, match=rf"cannot read .*set\.colors: .*{violation}"):
        open_source(str(tmp_path / "set.colors"))


def test_every_file_of_the_package_is_a_kind_and_fallbacks_come_last() -> None:
    files = {path.stem for path in (Path(sources.__file__).parent / "kinds").glob("*.py")} - {"__init__"}
    assert len(source_kinds()) == len(files)
    order = [kind.is_fallback for kind in source_kinds()]
    assert order == sorted(order)
