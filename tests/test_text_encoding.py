"""Text that people write in other encodings than UTF-8, and names of files that are in none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from movq_cli import presets
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.shards import DatasetManifest
from movq_cli.errors import BadRequestError
from movq_cli.interop import configs
from movq_cli.sources.open import open_source
from movq_cli.text_encoding import storable_text


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (len(path.name), 0, 0)).save(path)
    return path


def prepared(source: Path, out: Path, val_list: Path | None = None) -> DatasetManifest:
    prepare(PrepareRequest(str(source), out, Preprocessing(size=16), val_list=val_list), Console(quiet=True))
    return DatasetManifest.read(out)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_lists_are_read_in_the_encodings_that_windows_writes(tmp_path: Path, encoding: str) -> None:
    names = [draw(tmp_path / "imgs" / f"é{number}.png").name for number in range(4)]
    (tmp_path / "imgs" / "all.txt").write_bytes("\r\n".join(names).encode(encoding))
    (tmp_path / "val.txt").write_bytes(f"{names[2]}\r\n".encode(encoding))
    manifest = prepared(tmp_path / "imgs" / "all.txt", tmp_path / "out", val_list=tmp_path / "val.txt")
    assert (manifest.counts, manifest.rejects) == ({"train": 3, "val": 1}, 0)


def test_a_list_of_held_out_images_names_files_in_their_own_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    for file in (name, "b.png"):
        draw(tmp_path / "imgs" / file)
    (tmp_path / "val.txt").write_bytes(b"caf\xe9.png\n")
    assert prepared(tmp_path / "imgs", tmp_path / "out", val_list=tmp_path / "val.txt").counts["val"] == 1


def test_classes_and_folders_whose_names_are_not_utf8_are_prepared(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"gar\xe7on")
    for folder in (os.fsdecode(b"caf\xe9"), "the"):
        for number in range(2):
            draw(source / folder / f"{number}.png")
    manifest = prepared(source, tmp_path / "out")
    assert manifest.classes == (r"caf\xe9", "the")
    assert manifest.source == str(tmp_path / r"gar\xe7on")
    assert prepared(source, tmp_path / "out") == manifest  # A second run recognizes the set.


def test_a_list_with_zeros_is_refused_as_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a.png".encode("utf-16-le"))
    with pytest.raises(BadRequestError, match=r"list\.txt: it has bytes that are zero.*Save it as UTF-8"):
        open_source(str(tmp_path / "list.txt"))


def test_presets_and_configs_are_read_in_utf16_and_refused_in_latin1_with_the_line(tmp_path: Path) -> None:
    text = "# für später\nbase: digits\ntrain_vq: {steps: 6}\n"
    for name, read in (("preset.yaml", lambda path: presets.load(str(path))), ("config.yaml", configs.read)):
        path = tmp_path / name
        path.write_bytes(text.encode("utf-16"))
        read(path)
        path.write_bytes(f"a: 1\n{text}".encode("latin1"))
        with pytest.raises(BadRequestError, match=r"not UTF-8 in line 2\. Save it as UTF-8, or convert it: iconv"):
            read(path)


def test_a_config_whose_aliases_stand_for_a_billion_values_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(BadRequestError, match="aliases stand for more than 10000 values"):
        configs.read(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("model: {a: 1, a: 2}\nlr: 010\n")  # Other projects may be ambiguous.
    assert configs.read(tmp_path / "config.yaml")["model"] == {"a": 2}


@pytest.mark.parametrize("text", ["plain", "ünï", "\udce9", "\ud800x\udfff", "a\udc80b"])
def test_a_storable_name_is_utf8_and_changes_no_other_character(text: str) -> None:
    stored = storable_text(text)
    stored.encode()
    assert (stored == text) is text.isprintable()
