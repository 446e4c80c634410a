"""`movq presets new`: the written preset loads, suits its set, and explains itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from movq_cli import presets
from movq_cli.commands.new_preset import NewPresetRequest, new_preset
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.commands.train_vq import train_vq
from movq_cli.commands.training import TrainRequest
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.training import pace
from tests.conftest import TINY, draw_shapes

JSON = Console(as_json=True, quiet=True)
REQUEST = NewPresetRequest(Path("mine.yaml"), Path("data"), hours=0.05, device_name="cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pace, "_SECONDS", 0.1)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "photos-16.yaml").write_text(json.dumps(TINY))


@pytest.mark.slow
def test_the_written_preset_loads_suits_its_set_and_gives_a_reason_for_each_value(
    prepared: PreparedSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_preset(REQUEST, Console())
    out, err = capsys.readouterr()
    assert out == "mine.yaml\n"
    assert "movq train-vq -p mine.yaml" in err
    assert "movq train-prior -p mine.yaml" in err
    text = (tmp_path / "mine.yaml").read_text()
    assert all("  # " in line or line.startswith("# ") for line in text.splitlines())
    values = yaml.safe_load(text)
    assert values["base"] == "photos-16"  # The others are for larger images.
    settings = presets.load("mine.yaml")
    assert (settings.data.path, settings.prior.classes) == (Path("data"), 3)
    assert settings.prior.layers * settings.prior.width < 24 * 1024
    assert settings.train_vq.epochs is None
    assert settings.train_vq.warmup_steps <= (settings.train_vq.steps or 0)
    assert settings.vq == presets.load("photos-16").vq
    # 48 images: their prior ends after 300 epochs, or before that on a slow machine.
    assert 1 <= (settings.train_prior.steps or 0) <= 300 * (48 // settings.train_prior.batch_size)
    train_vq(TrainRequest("mine.yaml", device_name="cpu", dry_run=True), JSON)
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours"] is None or 0.001 < plan["hours"] < 1  # Other work on the machine disturbs both times.
    # Nothing is overwritten by accident.
    with pytest.raises(BadRequestError, match="exists already"):
        new_preset(REQUEST, JSON)
    assert (tmp_path / "mine.yaml").read_text() == text


@pytest.mark.slow
def test_little_memory_gives_parts_and_very_little_is_refused(
    prepared: PreparedSet, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {**TINY, "train_vq": {**TINY["train_vq"], "batch_size": 32, "discriminator_channels": 512}}  # type: ignore[dict-item]
    Path("presets/photos-16.yaml").write_text(json.dumps(large))
    Path("mine.yaml").write_text("old")
    new_preset(replace(REQUEST, memory=2.6, force=True), JSON)
    settings = presets.load("mine.yaml")
    assert json.loads(capsys.readouterr().out)["peak_memory_gib"]["vq"] < 2.6
    assert settings.train_vq.batch_size % settings.train_vq.accumulate == 0
    with pytest.raises(BadRequestError, match=r"does not fit into 0\.5 GiB, not even one image at a time"):
        new_preset(replace(REQUEST, memory=0.5, force=True), JSON)


def test_a_set_of_images_that_are_too_small_is_refused_and_the_remedy_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "presets" / "photos-16.yaml").unlink()
    source = draw_shapes(tmp_path / "pictures")
    prepare(PrepareRequest(str(source), tmp_path / "data", Preprocessing(size=16), val="12"), JSON)
    with pytest.raises(BadRequestError, match=r"have 16 pixels a side.*Prepare the set again with --size 32 --upscale"):
        new_preset(REQUEST, JSON)
    larger = Preprocessing(size=32, upscale=True)
    prepare(PrepareRequest(str(source), tmp_path / "larger", larger, val="12"), JSON)
    assert PreparedSet.open(tmp_path / "larger").manifest.min_side == 32
    capsys.readouterr()


def test_another_kind_of_file_name_and_a_missing_set_are_refused() -> None:
    with pytest.raises(BadRequestError, match=r"does not end in \.yaml"):
        new_preset(replace(REQUEST, path=Path("mine")), JSON)
    with pytest.raises(BadRequestError, match="no prepared set in data"):
        new_preset(REQUEST, JSON)
    assert not Path("mine.yaml").exists()
