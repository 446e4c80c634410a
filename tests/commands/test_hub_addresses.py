"""Addresses on the Hugging Face hub on the command line, against a hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from movq_cli import checkpoints
from movq_cli.api import Tokenizer
from movq_cli.checkpoints import PriorHeader, TokenizerHeader
from movq_cli.commands.export import ExportRequest, export
from movq_cli.commands.import_weights import ImportRequest, import_weights
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError
from movq_cli.files import link_or_copy, sha256
from movq_cli.interop.importer import ImportOptions
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.runs import Run
from movq_cli.settings import Preset
from tests.conftest import Movq
from tests.interop import loopback_hub, peers
from tests.interop.loopback_hub import LoopbackHub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub.running() as running:
        loopback_hub.connect(running, tmp_path / "home" / "hub", monkeypatch)
        yield running


@pytest.fixture
def published(server: LoopbackHub, tiny: Preset, tmp_path: Path) -> LoopbackHub:
    """A hub with the repository owner/prior: a tokenizer of the tiny preset, and a prior of its codes."""
    tokenizer, shape = tmp_path / "public" / "tokenizer.safetensors", tiny.vq.code_shape
    checkpoints.save_weights(tokenizer, Tokenizer(tiny.vq), TokenizerHeader(vq=tiny.vq))
    header = PriorHeader(
        prior=tiny.prior, shape=shape, sample=tiny.sample, classes=("bar", "dot", "sky"), tokenizer=sha256(tokenizer)
    )
    checkpoints.save_weights(tokenizer.with_name("prior.safetensors"), MaskedPrior(tiny.prior, shape), header)
    server.add("owner/prior", folder=tokenizer.parent)
    return server


@pytest.mark.slow
def test_commands_take_an_address_in_place_of_a_run_folder(
    published: LoopbackHub, movq: Movq, prepared: PreparedSet, tiny_yaml: Path, tmp_path: Path
) -> None:
    result = json.loads(movq("reconstruct", "data", "back", "--run", "hf://owner/prior", "--json").stdout)
    assert result["images"] == 60
    train = ["train-prior", "--preset", tiny_yaml, "-o", "train_prior.steps=1", "--run", "new"]
    movq(*train, "--tokenizer", "hf://owner/prior")
    assert len(list((tmp_path / "new" / "tokens").glob("*/codes.npy"))) == 2
    assert not list((tmp_path / "home").rglob("codes.npy"))
    assert published.downloaded() == ["tokenizer.safetensors"]
    movq("sample", "samples", "--n", "3", "--run", "hf://owner/prior@main")
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 3
    shutil.rmtree(tmp_path / "home")
    stored = Run(tmp_path / "new", "prior").tokenizer
    assert not stored.is_symlink()
    assert sha256(stored) == sha256(tmp_path / "public" / "tokenizer.safetensors")


def test_an_error_is_one_line_with_its_exit_code_and_nothing_is_left(server: LoopbackHub, movq: Movq) -> None:
    shown = movq("import", "hf://owner/missing", "new", code=2)
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    assert "there is no public repository owner/missing" in shown.stderr
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    shown = movq("export", "hf://owner/name", "new", "--to", "safetensors", code=1, **closed)
    assert shown.stderr.count("\n") == 1
    assert "hf://owner/name cannot be reached at http://127.0.0.1:9" in shown.stderr


def test_an_import_records_the_commit_from_which_it_can_be_repeated(server: LoopbackHub, tmp_path: Path) -> None:
    torch.save({"state_dict": peers.tokenizer(peers.VQGAN).state_dict()}, tmp_path / "last.ckpt")
    commit = server.add("owner/name", {"vq/last.ckpt": (tmp_path / "last.ckpt").read_bytes()})
    import_weights(ImportRequest(Path("hf://owner/name/vq"), tmp_path / "a", ImportOptions()), Console(quiet=True))
    record = Run(tmp_path / "a", "vq").read().imported
    assert record is not None
    assert record.source == f"hf://owner/name@{commit}/vq"
    assert record.sha256 == sha256(tmp_path / "last.ckpt")
    server.add("owner/name", {"vq/last.ckpt": b"something else"})
    import_weights(ImportRequest(Path(record.source), tmp_path / "b", ImportOptions()), Console(quiet=True))
    first, second = (Run(tmp_path / name, "vq").weights for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html></html>", "is a web page, not the weights"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"\x80\x02cos\nsystem\n(S'touch executed'\ntR.", "os.system"),
    ],
)
def test_a_downloaded_file_that_is_no_weights_is_refused_without_running_it(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    server.add("owner/name", {"model.bin": data})
    with pytest.raises(BadRequestError, match=reason):
        import_weights(ImportRequest(Path("hf://owner/name"), tmp_path / "run", ImportOptions()), Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_an_exported_download_is_a_file_of_its_own(published: LoopbackHub, tmp_path: Path) -> None:
    request = ExportRequest(Path("hf://owner/prior"), tmp_path / "out", "safetensors")
    export(request, Console(quiet=True))
    shutil.rmtree(tmp_path / "home")
    assert sha256(tmp_path / "out" / "tokenizer.safetensors") == sha256(tmp_path / "public" / "tokenizer.safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# Image tokenizer owner/prior\n")
    assert "`movq export hf://owner/prior OUT --to safetensors`" in card


def test_the_second_name_of_a_symbolic_link_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    link_or_copy(tmp_path / "link", tmp_path / "folder" / "name")
    assert not (tmp_path / "folder" / "name").is_symlink()
    assert (tmp_path / "folder" / "name").read_bytes() == b"content"
