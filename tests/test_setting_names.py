"""The hint about an unknown setting: by its meaning in other projects, by its name, and by similar names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from movq_cli import presets
from movq_cli.errors import BadRequestError
from movq_cli.setting_names import ABSENT, ELSEWHERE, suggest

KNOWN = [name for name, _ in presets.settings_fields()]


def test_every_suggested_setting_exists() -> None:
    leaves = {name.rpartition(".")[2] for name in KNOWN}
    assert {own for names in ELSEWHERE.values() for own in names} <= leaves
    assert all(names or name in ABSENT for name, names in ELSEWHERE.items())
    for text in ABSENT.values():
        for word in re.findall(r"\w+_\w+", text):
            assert word in leaves | {"train_prior"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gan_weight", "Did you mean 'train_vq.adversarial_weight'?"),
        ("train_vq.disc_start", "Did you mean 'train_vq.discriminator_start'?"),
        ("lr", "Did you mean 'train_vq.base_learning_rate' or 'train_prior.base_learning_rate'?"),
        ("train_prior.lr", "Did you mean 'train_prior.base_learning_rate'?"),
        ("batch_size", "Did you mean 'train_vq.batch_size' or 'train_prior.batch_size'?"),
        ("vq.n_embed", "Did you mean 'vq.codebook_size'?"),
        ("num_classes", "Did you mean 'prior.classes'?"),
        ("prior.embd_pdrop", "movq does not have it: embeddings are not dropped"),
        ("train_prior.beta", "Did you mean 'train_prior.betas' or 'train_vq.commitment_weight'"),
        ("train_vq.beta", "Did you mean 'train_vq.betas' or 'train_vq.commitment_weight'"),
        ("vq.codebok_size", "Did you mean 'vq.codebook_size'"),
    ],
)
def test_a_setting_is_suggested_by_its_meaning(name: str, hint: str) -> None:
    assert suggest(name, KNOWN).startswith(hint)
    with pytest.raises(BadRequestError, match=re.escape(hint)):
        presets.load("digits", [f"{name}=1"])


def test_a_setting_in_a_file_is_suggested_by_its_meaning_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: digits\ntrain_vq: {gan_weight: 0.5}\n")
    with pytest.raises(BadRequestError, match=r"gan_weight'\. Did you mean 'train_vq\.adversarial_weight'\?"):
        presets.load(str(tmp_path / "mine.yaml"))
