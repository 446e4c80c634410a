"""The benchmark of the presets for own images: it makes its rows by real commands, and says what was not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import photos
from tests.conftest import run_movq

pytestmark = pytest.mark.slow


def test_rows_start_from_the_same_checkpoint_and_others_are_not_measured(
    shapes: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["photos", "no-discriminator"]
    monkeypatch.setattr(photos, "movq", lambda *words: json.loads(run_movq(tmp_path, *words, "--json").stdout))
    monkeypatch.setenv("COLUMNS", "200")  # A narrow table would break "not measured" into lines.
    arguments = [shapes, "--preset", tiny_yaml, "--held-out", "12", "--work", tmp_path / "w", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["photos", *map(str, arguments), "--rows", *rows])
    photos.main()
    results = json.loads((tmp_path / f"tiny-{shapes.stem}.json").read_text())
    assert list(results["rows"]) == rows
    with_loss, without = results["rows"].values()
    # The tiny preset's discriminator is trained from step 4 on, and every fifth step is validated.
    assert without["started_from"] == f"{tmp_path / 'w' / 'photos'}@4"
    assert [len(row["validations"]) for row in (with_loss, without)] == [2, 2]
    assert "logits_real" in with_loss
    assert "logits_real" not in without
    assert with_loss["psnr"] != without["psnr"]
    text = capsys.readouterr().out
    assert text.count("not measured") == 3 * 7
    # Rows that are left out keep their results.
    monkeypatch.setattr(sys, "argv", ["photos", *map(str, arguments), "--rows", "photos"])
    photos.main()
    assert json.loads((tmp_path / f"tiny-{shapes.stem}.json").read_text())["rows"] == results["rows"]


def test_samples_are_compared_with_held_out_images_and_copies_are_looked_for_among_training_images(
    shapes: Path, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = []

    def movq(command: str, *words: str | Path) -> Any:
        if command == "evaluate":  # Inception's weights are not here.
            images = json.loads((Path(words[1]) / "manifest.json").read_text())["images"]
            compared.append([len(images), "--copies" in words, words[words.index("--split") + 1]])
            return {"fid": 7.0, "copies": 0.25}
        return json.loads(run_movq(tmp_path, command, *words, "--json").stdout)

    monkeypatch.setattr(photos, "movq", movq)
    arguments = [shapes, "--preset", tiny_yaml, "--held-out", "12", "--work", tmp_path / "w", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["photos", *map(str, arguments), "--rows", "photos", "prior", "copies"])
    photos.main()
    fid, copies = [12, False, "val"], [12, True, "train"]
    assert compared == [fid, fid, copies, copies]  # Each without guidance and with it.
    rows = json.loads((tmp_path / f"tiny-{shapes.stem}.json").read_text())["rows"]
    assert [row["guidance"] for row in rows["prior"]["samples"]] == [0.0, 1.0]
    assert rows["copies"]["of_guidance"] == {"0": 0.25, "1": 0.25}
    assert "prior, guidance 1: 25.0% of the samples may be copies of training images" in capsys.readouterr().out
