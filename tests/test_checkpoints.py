"""Weights and training states: exact round trips, atomic writes, and no code that runs while loading."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from movq_cli import checkpoints, digests
from movq_cli.checkpoints import PriorHeader, TokenizerHeader
from movq_cli.errors import BadRequestError
from movq_cli.files import sha256
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(tiny: Preset) -> Tokenizer:
    return Tokenizer(tiny.vq)


def test_a_tokenizer_is_built_from_its_file_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.safetensors"
    checkpoints.save_weights(path, tokenizer, TokenizerHeader(vq=tokenizer.settings))
    loaded = checkpoints.load_tokenizer(path)
    assert loaded.settings == tokenizer.settings
    assert not loaded.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weight_files_have_the_permissions_of_other_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "plain").write_bytes(b"")
    checkpoints.save_weights(tmp_path / "weights", tokenizer, TokenizerHeader(vq=tokenizer.settings))
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_equal_weights_have_equal_hashes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    header = TokenizerHeader(vq=tokenizer.settings)
    for number in range(8):
        checkpoints.save_weights(tmp_path / str(number), tokenizer, header)
    assert len({sha256(path) for path in tmp_path.iterdir()}) == 1


def test_a_prior_is_built_with_everything_that_sampling_needs(tmp_path: Path, tiny: Preset) -> None:
    model = MaskedPrior(tiny.prior, tiny.vq.code_shape)
    header = PriorHeader(
        prior=tiny.prior, shape=tiny.vq.code_shape, sample=tiny.sample, classes=("a", "b", "ç"), tokenizer="f" * 64
    )
    checkpoints.save_weights(tmp_path / "p", model, header)
    loaded, found = checkpoints.load_prior(tmp_path / "p")
    assert found == header
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_an_error_names_the_file_that_is_not_a_weight_file(tmp_path: Path, tokenizer: Tokenizer, tiny: Preset) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(BadRequestError, match=r"t\.safetensors"):
        checkpoints.load_tokenizer(path)
    checkpoints.save_weights(path, tokenizer, TokenizerHeader(vq=tokenizer.settings))
    with pytest.raises(BadRequestError, match="not a prior"):
        checkpoints.load_prior(path)
    complete = path.read_bytes()
    for damaged in (b"", complete[:7], complete[:-1], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(BadRequestError, match=r"not a complete safetensors file|is damaged"):
            checkpoints.load_tokenizer(path)
    other = Tokenizer(tiny.vq.model_copy(update={"codebook_size": 8}))
    checkpoints.save_weights(path, other, TokenizerHeader(vq=tokenizer.settings))
    with pytest.raises(BadRequestError, match="does not fit its own settings"):
        checkpoints.load_tokenizer(path)


def test_a_training_state_is_loaded_exactly(tmp_path: Path) -> None:
    state = {"step": 3, "stage": {"a": torch.randn(3, dtype=torch.float64), "b": [1, {"c": torch.arange(3)}]}}
    checkpoints.save_state(tmp_path / "s", state)
    loaded = checkpoints.load_state(tmp_path / "s", CPU, "")
    assert loaded["step"] == 3
    assert torch.equal(loaded["stage"]["a"], state["stage"]["a"])  # type: ignore[index]
    assert torch.equal(loaded["stage"]["b"][1]["c"], torch.arange(3))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pickle", "torch"):
        path = tmp_path / name
        if name == "pickle":
            path.write_bytes(pickle.dumps({"step": Harmful()}))
        else:
            torch.save({"step": Harmful()}, path)
        if name == "torch":
            with path.open("r+b") as file:
                digests.append_to_zip(file)  # A digest is no protection against somebody who writes one as well.
        with pytest.raises(BadRequestError, match=name) as caught:
            checkpoints.load_state(path, CPU, "Remove it.")
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.processes
@pytest.mark.parametrize("function", ["save_state", "save_weights"])
def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path, function: str) -> None:
    """The system limits the size of the process's files, as a quota would."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = f"""
import torch
from torch import nn
from pathlib import Path
from movq_cli import checkpoints, digests
from movq_cli.errors import FailureError
from movq_cli.digests import Header
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = nn.Linear(1000, 1000)
try:
    if {function!r} == "save_state":
        checkpoints.save_state(Path({str(path)!r}), big.state_dict())
    else:
        checkpoints.save_weights(Path({str(path)!r}), big, Header())
except FailureError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert str(path) in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
