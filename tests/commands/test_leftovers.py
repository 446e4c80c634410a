"""Folders and names that are almost what a command expects: each file is made, or left out by name."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from movq_cli import app as command_line
from movq_cli import checkpoints
from movq_cli.app import app
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.reconstruct import output_names
from movq_cli.console import Console
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import paired
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset
from tests.conftest import Movq


def draw(path: Path, seed: int = 0, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def weights(tiny: Preset, tmp_path: Path) -> Path:
    """The weights of an untrained tokenizer."""
    path = tmp_path / "weights" / "tokenizer.safetensors"
    torch.manual_seed(0)
    checkpoints.save_weights(path, Tokenizer(tiny.vq), checkpoints.TokenizerHeader(vq=tiny.vq))
    return path


def movq(*arguments: str | Path) -> None:
    app(list(map(str, arguments)), standalone_mode=False)


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.from_regex(r"a(\.(png|jpg)){1,4}", fullmatch=True), min_size=1, unique=True))
def test_every_image_has_an_output_of_its_own_which_is_its_partner(names: Sequence[str]) -> None:
    names = sorted(names)
    outputs = output_names(names)
    assert len(set(outputs)) == len(names)
    order = np.argsort(outputs)
    pairs = paired.match(names, [outputs[index] for index in order])
    assert [int(order[fake]) for real, fake in sorted(pairs.indices)] == list(range(len(names)))


def test_a_prepared_set_is_paired_with_its_reconstructions_under_source_names(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        draw(tmp_path / "imgs" / "cat" / f"{number}.png", number)
    prepare(PrepareRequest(str(tmp_path / "imgs"), tmp_path / "data", val="2"), Console(quiet=True))
    data, out, crop = tmp_path / "data", tmp_path / "out", ("--device", "cpu")
    movq("reconstruct", data, out, "--split", "val", "--source-names", "--run", weights, *crop)
    movq("evaluate", data, out, "--psnr", "--json", *crop)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]["pairs"]["matched"] == 2


# --- code maps --------------------------------------------------------------------------------------------------------


def test_a_stray_array_does_not_turn_a_folder_of_images_into_code_maps(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imgs, out = tmp_path / "imgs", tmp_path / "out"
    draw(imgs / "a.png")
    np.save(imgs / "statistics.npy", np.zeros(3))
    movq("reconstruct", imgs, out, "--run", weights, "--device", "cpu", "--codes", tmp_path / "codes")
    assert [path.name for path in out.iterdir()] == ["a.png"]
    assert "1 .npy" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "decoded"])
def test_code_maps_are_decoded_again_with_their_images_beside_them(tmp_path: Path, weights: Path, out: str) -> None:
    draw(tmp_path / "imgs" / "a.png")
    codes = tmp_path / "codes"
    movq("reconstruct", tmp_path / "imgs", tmp_path / "first", "--run", weights, "--device", "cpu", "--codes", codes)
    for _ in range(2):
        movq("reconstruct", codes, codes / out, "--run", weights, "--device", "cpu")
        assert (codes / out / "a.png").read_bytes() == (tmp_path / "first" / "a.png").read_bytes()
        (codes / out / "a.png").touch()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_images_for_which_the_memory_does_not_suffice_are_counted_in_a_failure_whose_remedy_works(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = Tokenizer.encode

    def limited(self: Tokenizer, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] > 32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return encode(self, images)

    monkeypatch.setattr(Tokenizer, "encode", limited)
    for name, side in (("a", 16), ("b", 64), ("c", 16)):
        draw(tmp_path / "imgs" / f"{name}.png", side=side)
    arguments: list[str | Path] = [
        "reconstruct",
        tmp_path / "imgs",
        tmp_path / "out",
        "--run",
        weights,
        "--device",
        "cpu",
    ]
    with pytest.raises(FailureError) as caught:
        movq(*arguments)
    assert "1 of 3 images were left out, because the memory does not suffice" in str(caught.value)
    assert "b.png of 64 x 64 pixels" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    movq(*arguments, "--crop", "16")
    assert (tmp_path / "out" / "b.png").is_file()


@pytest.mark.parametrize("command", ["prepare", "train-vq", "train-prior", "reconstruct", "sample", "evaluate"])
def test_an_error_of_memory_names_options_that_the_command_has(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["movq", command])
    assert command_line._report_unexpected(MemoryError("no room")) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory. Set ")
    frozen = (Path(__file__).parents[1] / "command_line.txt").read_text()
    for word in (word.strip(",.;") for word in line.split() if word.startswith("--")):
        assert f"movq {command}: {word} " in frozen


# --- outputs on inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--copies", "--out"])
def test_evaluate_does_not_write_onto_what_it_reads(tmp_path: Path, option: str) -> None:
    for role in ("real", "fake"):
        for number in range(2):
            draw(tmp_path / role / f"{number}.png", number)
    picture = tmp_path / "fake" / "0.png"
    before = picture.read_bytes()
    target = picture if option == "--copies" else tmp_path / "fake.json"
    second = tmp_path / "fake" if option == "--copies" else target
    if option == "--out":  # The content of an archive decides, not its suffix.
        with zipfile.ZipFile(target, "w") as archive:
            archive.write(picture, "0.png")
    with pytest.raises(BadRequestError, match="is read, so that it cannot be written"):
        movq("evaluate", tmp_path / "real", second, "--psnr", option, target, "--device", "cpu")
    assert picture.read_bytes() == before
    if option == "--copies":
        with pytest.raises(BadRequestError, match="would be one of its images"):
            movq("evaluate", tmp_path / "real", second, "--psnr", option, tmp_path / "real" / "new.png")


def test_an_array_file_without_images_says_what_it_holds_and_what_is_needed(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", samples=np.zeros((2, 16, 16, 3), np.uint8), y=np.zeros(2))
    with pytest.raises(BadRequestError, match=r"named\.npz holds the arrays samples, y: neither .* arr_0"):
        movq("evaluate", tmp_path / "named.npz", tmp_path / "named.npz", "--psnr")


def test_a_manifest_of_samples_whose_entries_lack_a_field_is_named(tmp_path: Path) -> None:
    manifest = {"settings": {}, "made_with": {}, "images": [{"seed": 0, "class": None}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    draw(tmp_path / "000000.png")
    with pytest.raises(FailureError):
        movq("check", tmp_path)


# --- fillings ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fillings_leave_out_what_cannot_be_made_and_refuse_an_empty_mask(movq: Movq, trained: Path) -> None:
    for name in ("a", "n" * 250, "bad"):
        draw(trained / "imgs" / f"{name}.png")
    (trained / "imgs" / "bad.png").write_bytes(b"no image")
    fill = ("reconstruct", "imgs", "out", "--mask-ratio", "0.5", "--samples", "2", "--figure", "figure.png", "--json")
    done = movq(*fill)
    assert json.loads(done.stdout)["skipped"] == 2
    assert "2 images were skipped: bad.png (not an image); nnn" in done.stderr
    assert sorted(path.name for path in (trained / "out").iterdir()) == ["a-0.png", "a-1.png"]
    Image.new("L", (16, 16)).save(trained / "black.png")
    assert "has no white pixel" in movq("reconstruct", "imgs", "no", "--mask", "black.png", code=2).stderr
