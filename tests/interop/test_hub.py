"""Addresses on the Hugging Face hub, against a hub on loopback: downloads, uploads, and each error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from movq_cli import checkpoints, runs
from movq_cli.api import Prior, Tokenizer
from movq_cli.checkpoints import PriorHeader, TokenizerHeader
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import sha256
from movq_cli.interop import containers, hub
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.settings import Preset
from movq_cli.training import initial_weights
from tests.interop import loopback_hub, peers
from tests.interop.loopback_hub import TOKEN, LoopbackHub

PAGE = b"<!DOCTYPE html><html>Log in to this network</html>"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub.running() as running:
        loopback_hub.connect(running, tmp_path / "home" / "hub", monkeypatch)
        yield running


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weight file of a tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    model = peers.tokenizer(peers.MOVQ)
    checkpoints.save_weights(folder / "tokenizer.safetensors", model, TokenizerHeader(vq=peers.MOVQ))
    return folder


@pytest.fixture
def prior(tiny: Preset, tmp_path: Path) -> Path:
    """A folder with the weight files of a prior and of its tokenizer."""
    folder = tmp_path / "prior"
    header = TokenizerHeader(vq=tiny.vq, version="0.0.1")  # An older version, whose name a new file would not have.
    checkpoints.save_weights(folder / "tokenizer.safetensors", Tokenizer(tiny.vq), header)
    digest = sha256(folder / "tokenizer.safetensors")
    shape, classes = tiny.vq.code_shape, ("bar", "dot", "sky")
    prior_header = PriorHeader(prior=tiny.prior, shape=shape, sample=tiny.sample, classes=classes, tokenizer=digest)
    checkpoints.save_weights(folder / "prior.safetensors", MaskedPrior(tiny.prior, shape), prior_header)
    return folder


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def refused(address: str, kind: type[Exception] = BadRequestError) -> str:
    with pytest.raises(kind) as caught:
        Tokenizer.load(address)
    text = str(caught.value)
    assert "\n" not in text
    assert "<html>" not in text
    return text


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://owner/name", ("owner/name", None, "")),
        ("hf:/owner/name", ("owner/name", None, "")),
        (Path("hf://owner/name@v1.0"), ("owner/name", "v1.0", "")),
        ("hf://owner/name/movq/", ("owner/name", None, "movq")),
        ("hf://o-1/n.2_3@main/a/b.ckpt", ("o-1/n.2_3", "main", "a/b.ckpt")),
    ],
)
def test_an_address_has_a_repository_a_revision_and_a_path(text: str | Path, expected: tuple[Any, ...]) -> None:
    address = hub.address_of(text)
    assert address == hub.Address(*expected)
    assert hub.address_of(str(address)) == hub.address_of(Path(str(address))) == address


@pytest.mark.parametrize("path", [None, "runs/hf", "/hf:/a/b", "weights.safetensors", Path("hf")])
def test_a_local_path_is_no_address(path: str | Path | None) -> None:
    assert hub.address_of(path) is None


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://owner/", "hf://owner/name@", "hf://a b/c", "hf:///@v/x"])
def test_an_incomplete_address_is_refused_without_a_request(server: LoopbackHub, text: str) -> None:
    assert "is no address on the Hugging Face hub. Write hf://owner/name[@revision][/path]" in refused(text)
    assert server.requests == []


def test_the_command_line_and_the_classes_do_not_import_huggingface_hub_before_an_address_is_used() -> None:
    code = (
        "import sys, movq_cli.runs, movq_cli.interop.hub\n"
        "sys.argv = ['movq', '--help']\n"
        "from movq_cli.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'huggingface_hub', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_without_huggingface_hub_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'movq[hub]'" in refused("hf://owner/name")
    with pytest.raises(BadRequestError, match=r"movq\[hub\]"):
        Tokenizer(peers.VQGAN).push_to_hub("owner/name")


# --- downloads --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_loaded_from_a_repository_a_revision_and_a_path(server: LoopbackHub, weights: Path) -> None:
    data = (weights / "tokenizer.safetensors").read_bytes()
    old = server.add("owner/name", {"tokenizer.safetensors": data, "a/b/other.safetensors": data})
    server.add("owner/name", {"tokenizer.safetensors": b"nothing"})
    expected = peers.tokenizer(peers.MOVQ)
    for address in (f"hf://owner/name@{old}", "hf://owner/name/a/b/other.safetensors"):
        assert same_weights(Tokenizer.load(address), expected)
    assert server.downloaded() == ["tokenizer.safetensors"]  # The other file is equal to it.


def test_a_file_is_downloaded_once_and_again_if_it_is_damaged(server: LoopbackHub, weights: Path) -> None:
    server.add("owner/name", folder=weights)
    for _ in range(2):
        path = runs.find_weights(Path("hf://owner/name"), "vq")
    assert server.downloaded() == ["tokenizer.safetensors"]
    blob = path.resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x7f")
    assert same_weights(Tokenizer.load("hf://owner/name"), peers.tokenizer(peers.MOVQ))
    assert len(server.downloaded()) == 2


def test_weights_that_the_publisher_damaged_are_refused_by_their_digest(server: LoopbackHub, weights: Path) -> None:
    data = bytearray((weights / "tokenizer.safetensors").read_bytes())
    data[-5] ^= 1
    server.add("owner/name", {"tokenizer.safetensors": bytes(data)})
    assert "its content does not fit its digest" in refused("hf://owner/name")


def test_a_branch_that_moves_during_a_download_gives_no_mixture(server: LoopbackHub) -> None:
    server.add("owner/name", {"model.bin": b"old", "config.json": b"{}"})
    repository = hub.open_repository(hub.Address("owner/name", None, ""))
    server.add("owner/name", {"model.bin": b"new"})
    with pytest.raises(FailureError, match=r"hf://owner/name was changed during the download. Run the command again"):
        repository.download("model.bin")
    assert hub.open_repository(repository.address).download("model.bin").read_bytes() == b"new"


def test_a_fine_tuning_begins_with_an_address(server: LoopbackHub, weights: Path) -> None:
    server.add("owner/name", folder=weights)
    initial = initial_weights.load(Path("hf://owner/name"))
    assert same_weights(initial.tokenizer, peers.tokenizer(peers.MOVQ))
    assert initial.digests == (sha256(weights / "tokenizer.safetensors"),)


def test_without_a_network_what_was_downloaded_before_is_used(
    server: LoopbackHub, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("owner/name", folder=weights)
    server.add("owner/other", folder=weights)
    Tokenizer.load("hf://owner/name")
    server.status = 503
    Tokenizer.load("hf://owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(Tokenizer.load("hf://owner/name@main"), peers.tokenizer(peers.MOVQ))
    assert "HF_HUB_OFFLINE" in refused("hf://owner/other", FailureError)


def test_a_prior_is_loaded_with_the_tokenizer_beside_it(server: LoopbackHub, prior: Path, weights: Path) -> None:
    server.add("owner/prior", {"run.json": b"{}"})
    server.add("owner/prior", folder=prior)
    server.add("owner/other", folder=weights)
    assert same_weights(Prior.load("hf://owner/prior"), Prior.load(prior))
    assert server.downloaded() == ["tokenizer.safetensors", "prior.safetensors"]
    assert same_weights(Prior.load(prior, "hf://owner/prior"), Prior.load(prior))
    with pytest.raises(BadRequestError, match="models the codes of another tokenizer"):
        Prior.load("hf://owner/prior", "hf://owner/other")


def test_the_best_weights_are_an_address_too(server: LoopbackHub, weights: Path) -> None:
    data = (weights / "tokenizer.safetensors").read_bytes()
    server.add("owner/name", {"run/tokenizer-best.safetensors": data})
    best = runs.find_best(Path("hf://owner/name/run"), "vq")
    assert same_weights(Tokenizer.load(best), peers.tokenizer(peers.MOVQ))
    with pytest.raises(BadRequestError, match=r"^hf://owner/name/x.safetensors is a weight file already"):
        runs.find_best(Path("hf://owner/name/x.safetensors"), "vq")


def test_an_import_downloads_the_files_that_it_reads_and_no_others(server: LoopbackHub) -> None:
    state = peers.in_diffusers(peers.tokenizer(peers.VQGAN).state_dict(), 2)
    names = sorted(state)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    index = {"weight_map": {name: shard for shard, group in shards.items() for name in group}}
    files = {shard: save({name: state[name].contiguous() for name in group}) for shard, group in shards.items()}
    files |= {
        "diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode(),
        "config.json": json.dumps(peers.diffusers_config(peers.VQGAN)).encode(),
    }
    unused = {"run.py": b"raise SystemExit", "movq/pytorch_model.bin": b"x", "movq/three.safetensors": b"x"}
    server.add("owner/name", {f"movq/{name}": data for name, data in files.items()} | unused)
    repository = hub.open_repository(hub.Address("owner/name", None, "movq"))
    imported = peers.load(containers.download(repository))
    assert imported.settings == peers.VQGAN
    assert sorted(server.downloaded()) == sorted(f"movq/{name}" for name in files)
    assert repository.pinned == f"hf://owner/name@{repository.commit}/movq"


def test_the_remedy_for_a_folder_of_several_models_names_an_address(server: LoopbackHub) -> None:
    checkpoint = save({"w": torch.zeros(1)})
    server.add("owner/pipeline", {"movq/config.json": b"{}", "movq/model.safetensors": checkpoint})
    server.add("owner/two", {"a.ckpt": b"1", "b.ckpt": b"2"})
    for name, remedy in (("pipeline", "hf://owner/pipeline/movq"), ("two", "hf://owner/two/a.ckpt")):
        with pytest.raises(BadRequestError, match=remedy) as caught:
            containers.download(hub.open_repository(hub.Address(f"owner/{name}", None, "")))
        assert str(caught.value).count(remedy) == 1
        address = hub.address_of(remedy)
        assert address is not None
        assert containers.download(hub.open_repository(address)).is_file()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_private_repository_needs_a_token(
    server: LoopbackHub, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("owner/secret", folder=weights, is_private=True)
    server.add("owner/gated", folder=weights, is_gated=True)
    assert "there is no public repository owner/secret" in refused("hf://owner/secret")
    assert "access to owner/gated is restricted. Ask for it at" in refused("hf://owner/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the remedy
    for name in ("secret", "gated"):
        assert same_weights(Tokenizer.load(f"hf://owner/{name}"), peers.tokenizer(peers.MOVQ))


def test_what_a_hub_does_not_have_is_named(server: LoopbackHub) -> None:
    server.add("owner/name", {"model.ckpt": b"1", "README.md": b"2"})
    server.add("owner/empty")
    assert "there is no public repository owner/missing on http://" in refused("hf://owner/missing")
    assert "owner/name on the hub has no revision v9. Name a branch" in refused("hf://owner/name@v9")
    assert "has no folder/x.ckpt. It has README.md, model.ckpt." in refused("hf://owner/name/folder/x.ckpt")
    assert "It is empty" in refused("hf://owner/empty")
    remedy = "movq import hf://owner/name runs/NAME"
    refusal = refused("hf://owner/name")
    assert "hf://owner/name holds no tokenizer.safetensors, the weight file of movq" in refusal
    assert refusal.endswith(remedy)


def test_a_web_page_in_place_of_a_file_or_of_an_answer_is_named_and_leaves_nothing_behind(
    server: LoopbackHub, weights: Path, tmp_path: Path
) -> None:
    server.add("owner/name", folder=weights)
    server.replaced = PAGE
    assert "arrived with another content than the hub states" in refused("hf://owner/name", FailureError)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    for page in (PAGE, b"[]", b"{}", b'{"id": "owner/new", "siblings": [{}]}', b"\xff"):
        server.page = page
        assert "does not answer like a hub: " in refused("hf://owner/new", FailureError)
    server.replaced = server.page = None
    Tokenizer.load("hf://owner/name")


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (403, BadRequestError, "does not permit this for owner/name"),
        (500, FailureError, "Run the command again later"),
        (429, FailureError, "429"),
    ],
)
def test_a_status_of_the_server_is_one_line(server: LoopbackHub, status: int, kind: type[Exception], text: str) -> None:
    server.status = status
    assert text in refused("hf://owner/name", kind)


def test_a_hub_that_cannot_be_reached_is_named(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refused("hf://owner/name", FailureError)
    assert "hf://owner/name cannot be reached at http://127.0.0.1:9: [Errno 111] Connection refused. Check" in text
    with pytest.raises(FailureError, match="Connection refused"):  # whatever error the caller is handling
        try:
            raise RuntimeError("another error")
        except RuntimeError:
            Tokenizer.load("hf://owner/name")


def test_a_file_in_a_hidden_folder_is_found(server: LoopbackHub, weights: Path) -> None:
    server.add("owner/name", {".hidden/a.safetensors": (weights / "tokenizer.safetensors").read_bytes()})
    assert runs.find_weights(Path("hf://owner/name/.hidden/a.safetensors"), "vq").parent.name == ".hidden"


def test_a_cache_that_cannot_be_written_is_named_and_another_one_helps(
    server: LoopbackHub, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("owner/name", folder=weights)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "hf://owner/name cannot be stored: [Errno" in refused("hf://owner/name", FailureError)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    Tokenizer.load("hf://owner/name")


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_an_uploaded_tokenizer_is_loaded_again_with_the_same_weights(
    server: LoopbackHub, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = Tokenizer.load(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert model.push_to_hub("owner/name", private=True).startswith(f"{server.url}/owner/name/commit/")
    stored = server.repositories["owner/name"]
    assert stored.is_private
    files = stored.commits[stored.branches["main"]]
    assert sorted(files) == ["README.md", "tokenizer.safetensors"]
    assert files["tokenizer.safetensors"] == (weights / "tokenizer.safetensors").read_bytes()
    assert same_weights(Tokenizer.load("hf://owner/name"), model)
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: movq\n---\n\n# Image tokenizer owner/name\n")
    assert 'Tokenizer.load("hf://owner/name")' in card
    assert json.loads(card.split("```json")[1].split("```")[0]) == peers.MOVQ.model_dump(mode="json")
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.push_to_hub("owner/name")  # a second commit, of changed weights
    assert same_weights(Tokenizer.load("hf://owner/name"), model)


def test_an_untrained_tokenizer_is_uploaded_too(server: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = Tokenizer(peers.VQGAN)
    model.push_to_hub("owner/new")
    assert same_weights(Tokenizer.load("hf://owner/new"), model)


def test_an_uploaded_prior_brings_its_tokenizer(
    server: LoopbackHub, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = Prior.load(prior)
    model.push_to_hub("owner/prior")
    again = Prior.load("hf://owner/prior")
    assert same_weights(again, model)
    assert again.classes == ("bar", "dot", "sky")
    for path in prior.iterdir():
        assert runs.find_weights(Path(f"hf://owner/prior/{path.name}"), "vq").read_bytes() == path.read_bytes()
    stored = server.repositories["owner/prior"]
    card = stored.commits[stored.branches["main"]]["README.md"].decode()
    assert "# Image prior owner/prior" in card
    assert "| classes | 3 (bar, dot, sky) |" in card
    with torch.no_grad():
        next(iter(model.tokenizer.parameters())).add_(1)
    with pytest.raises(BadRequestError, match="models the codes of another tokenizer"):
        model.push_to_hub("owner/other")
    assert "owner/other" not in server.repositories


def test_an_upload_without_permission_or_network_is_one_line(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tokenizer(peers.VQGAN)
    for name in ("name", "hf://owner/name", "owner/name/x", "owner/name@v1", ""):
        with pytest.raises(BadRequestError, match=r"is no name of a repository. Write owner/name|is no address"):
            model.push_to_hub(name)
    assert server.requests == []
    with pytest.raises(BadRequestError) as caught:
        model.push_to_hub("owner/name")
    assert "hf auth login" in str(caught.value)
    server.status = 500
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(FailureError) as failed:
        model.push_to_hub("owner/name")
    assert "500" in str(failed.value)
    assert server.repositories == {}
