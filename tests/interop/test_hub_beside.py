"""What comes with weights from the hub: the discriminator beside them, and no progress where none is shown."""

from __future__ import annotations

import os
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch

from movq_cli import checkpoints
from movq_cli.cli.options import console_for
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.training import initial_weights
from tests.interop.loopback_hub import LoopbackHub
from tests.interop.test_hub import server, weights

__all__ = ["server", "weights"]


@pytest.mark.parametrize("has_discriminator", [True, False])
def test_a_fine_tuning_takes_the_discriminator_beside_the_weights(
    server: LoopbackHub, weights: Path, tmp_path: Path, has_discriminator: bool
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(weights, folder)
    discriminator = PatchDiscriminator(8, 1)
    if has_discriminator:
        header = checkpoints.DiscriminatorHeader(channels=8, layers=1)
        checkpoints.save_weights(folder / "discriminator.safetensors", discriminator, header)
    server.add("owner/name", folder=folder)
    found = initial_weights.load(Path("hf://owner/name")).discriminator
    assert (found is not None) is has_discriminator
    if found is not None:
        assert all(map(torch.equal, found.state_dict().values(), discriminator.state_dict().values()))


class Terminal(StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "quiet", "silenced"), [(Terminal, False, False), (Terminal, True, True)])
def test_the_hubs_progress_is_silenced_with_quiet(
    stream: type[StringIO], quiet: bool, silenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # So that it is restored afterwards.
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    console_for(False, quiet)
    assert (os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1") is silenced
