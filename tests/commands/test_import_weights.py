"""`movq import`: a run folder that every command takes, or one line and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from movq_cli import checkpoints
from movq_cli.api import Tokenizer
from movq_cli.commands.import_weights import ImportRequest, import_weights
from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.files import sha256
from movq_cli.interop.importer import ImportOptions
from movq_cli.runs import Run
from tests.conftest import Movq
from tests.interop import peers


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of a small VQGAN with a discriminator, and its config."""
    model = peers.tokenizer(peers.varied(**changes))
    path = folder / "last.ckpt"
    torch.save({"epoch": 1, "state_dict": {**model.state_dict(), **peers.training_tensors()}}, path)
    (folder / "config.yaml").write_text(yaml.safe_dump(peers.compvis_config(model.settings)))
    return path


def run_import(source: Path, run: Path, **options: Any) -> None:
    import_weights(ImportRequest(source, run, ImportOptions(**options)), Console(quiet=True))


def test_the_run_folder_holds_the_weights_their_settings_and_their_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path)
    import_weights(ImportRequest(source, tmp_path / "run", ImportOptions()), Console(as_json=True))
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["run"] == str(tmp_path / "run")
    for word in ("family: compvis", "used: ", "ignored: loss.*", "assumed: ", "license: "):
        assert word in shown.err
    run = Run(tmp_path / "run", "vq")
    manifest = run.read()
    assert manifest.status == "finished"
    assert manifest.imported is not None
    assert manifest.imported.sha256 == sha256(source) == result["sha256"]
    assert manifest.settings.vq == peers.VQGAN
    assert manifest.settings.train_vq.discriminator_channels == 4
    model, expected = Tokenizer.load(run.folder), peers.tokenizer(peers.VQGAN)
    assert torch.equal(model.encode(peers.images()), expected.encode(peers.images()))
    logits = checkpoints.load_discriminator(run.discriminator)(peers.images(64))
    assert logits.isfinite().all()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_every_command_takes_the_run_folder(movq: Movq, shapes: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, image_range="0,1", normalize_codes=False)
    assert movq("import", source, "runs/vq", "--range", "0,1").stdout == "runs/vq\n"
    movq("prepare", shapes, "data", "--size", "16", "--square", "--val", "12")
    movq("check", "runs/vq")
    result = json.loads(movq("reconstruct", "data", "out", "--split", "val", "--codes", "codes", "--json").stdout)
    assert result["images"] == 12
    movq("reconstruct", "codes", "decoded")
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    first, second = (sorted((tmp_path / folder).rglob("*.png"))[0] for folder in ("out", "decoded"))
    assert names
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    assert "codebook_usage" in json.loads(movq("evaluate", "--codebook", "data", "--run", "runs/vq", "--json").stdout)
    tiny = ["--preset", "runs/vq/settings.yaml", "--data", "data", "-o", "train_prior.epochs=null"]
    for setting in ("train_prior.steps=2", "train_prior.batch_size=4", "prior.layers=1", "prior.width=16"):
        tiny += ["-o", setting]
    tiny += ["-o", "prior.hidden=16", "-o", "prior.heads=2", "-o", "train_prior.precision=float32"]
    movq("train-prior", *tiny, "--tokenizer", "runs/vq", "--run", "runs/prior")
    movq("sample", "--run", "runs/prior", "--n", "2", "--steps", "2", "samples")
    refused = movq("train-vq", *tiny[:4], "--run", "runs/vq", "-o", "train_vq.perceptual_weight=0", code=2)
    assert "runs/vq holds imported weights" in refused.stderr
    (tmp_path / "runs/vq/tokenizer.safetensors").unlink()
    assert "movq import" in movq("reconstruct", "data", "out", "--run", "runs/vq", code=2).stderr


def unreadable(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html></html>")


def nan(path: Path) -> None:
    values = torch.load(path, weights_only=True)
    values["state_dict"]["quant_conv.bias"][0] = float("nan")
    torch.save(values, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def code_in_the_config(path: Path) -> None:
    (path.parent / "config.yaml").write_text("!!python/object/apply:os.system ['touch ran']")


def contradiction(path: Path) -> None:
    (path.parent / "config.yaml").write_text(yaml.safe_dump(peers.compvis_config(peers.varied(codebook_size=30))))


def remapped(path: Path) -> None:
    torch.save(
        {"state_dict": {**torch.load(path, weights_only=True)["state_dict"], "quantize.used": torch.zeros(1)}}, path
    )


@pytest.mark.parametrize("damage", [unreadable, nan, truncated, code_in_the_config, contradiction, remapped])
def test_what_is_refused_leaves_nothing_behind(
    tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    source = write_checkpoint(tmp_path / "source")
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadRequestError):
        run_import(source, tmp_path / "runs" / "a")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_in_one_line_with_exit_code_2(movq: Movq, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path)
    nan(source)
    refused = movq("import", source, "run", code=2)
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1)
    assert "quant_conv.bias holds NaN" in refused.stderr
    assert not (tmp_path / "run").exists()
    assert "'-1,1'" in movq("import", source, "run", "--range", "0,2", code=2).stderr


def test_a_folder_that_exists_is_not_written_to(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    run_import(source, run)  # An empty folder is as good as none.

    def states() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (run, *run.iterdir())}

    before = states()
    run_import(source, run)  # As after an interrupt that came when all was written.
    assert states() == before
    with pytest.raises(BadRequestError, match="exists already with other content"):
        run_import(source, run, image_range="0,1")
    with pytest.raises(BadRequestError, match="exists already with other content"):
        run_import(source, source)
    assert states() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", source.name, "run"]


def test_an_import_into_another_folder_is_refused_before_the_source_is_read(tmp_path: Path, trained_once: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").touch()
    for target in (other, trained_once / "runs" / "tiny-vq"):
        with pytest.raises(BadRequestError, match="exists already with other content"):
            run_import(tmp_path / "missing.ckpt", target)


def test_what_a_killed_import_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "run.partial"
    left.mkdir()
    (left / "tokenizer.safetensors.partial").write_bytes(b"half")
    run_import(write_checkpoint(tmp_path), tmp_path / "run")
    assert not left.exists()
    assert not list((tmp_path / "run").glob("*.partial"))


def test_weights_of_movq_itself_are_used_as_they_are(tmp_path: Path) -> None:
    run_import(write_checkpoint(tmp_path), tmp_path / "run")
    with pytest.raises(BadRequestError, match="is a weight file of movq"):
        run_import(tmp_path / "run" / "tokenizer.safetensors", tmp_path / "again")


def test_a_folder_of_diffusers_is_imported_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "vqvae"
    folder.mkdir()
    model = peers.tokenizer(peers.VQGAN)
    save_file(peers.in_diffusers(model.state_dict(), 2), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(peers.diffusers_config(peers.VQGAN)))
    run_import(folder, tmp_path / "run")
    assert torch.equal(Tokenizer.load(tmp_path / "run").encode(peers.images()), model.encode(peers.images()))
