"""docs/paper.md names every setting of the paper's presets that differs from the paper, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from movq_cli import presets

DOCUMENT = Path(__file__).parent.parent / "docs" / "paper.md"


class Stated(NamedTuple):
    """A value that the paper states, or that the code has to which the paper refers."""

    value: Any
    place: str


VQGAN_STAGE_1 = (
    "4.2, 'we set hyper-parameters following the baseline VQGAN work': imagenet_vqgan.yaml, faceshq_vqgan.yaml"
)
VQGAN_STAGE_2 = "4.3, 'the hyper-parameters follow the defaults setting as in VQGAN': cond_transformer.py, mingpt.py"
RANDOM_CROP = "a random crop in each epoch"

PAPER: dict[str, Stated] = {
    "vq.resolution": Stated(256, "4.2, 256 x 256 images"),
    "vq.chunks": Stated(4, "3.1, 'we employ 4 parallel chunks'"),
    "vq.codebook_size": Stated(1024, "4.2, '1024 codevectors each with 64 dimensions'"),
    "vq.embed_dim": Stated(256, "4.2, 64 dimensions in each of 4 chunks"),
    "vq.initial_feature": Stated("fourier", "4.4 and Figure 6a, last row"),
    "vq.modulation.levels": Stated(3, "4.2, 'in the first three blocks of the decoder'"),
    "vq.modulation.source": Stated("quantized", "equation 4"),
    "vq.modulation.affine": Stated(False, "equation 4"),
    "vq.channels": Stated(128, VQGAN_STAGE_1),
    "vq.multipliers": Stated((1, 1, 2, 2, 4), VQGAN_STAGE_1 + "; 4.2, 'downsampled by a fixed factor of 16'"),
    "vq.blocks": Stated(2, VQGAN_STAGE_1),
    "vq.attention_resolutions": Stated((16,), VQGAN_STAGE_1),
    "vq.z_channels": Stated(256, VQGAN_STAGE_1),
    "vq.norm_groups": Stated(32, VQGAN_STAGE_1),
    "train_vq.batch_size": Stated(48, "4.2, 'a batch size of 48 across 4 Tesla V100 GPUs with 40 epochs'"),
    "train_vq.epochs": Stated(40, "4.2, 'a batch size of 48 across 4 Tesla V100 GPUs with 40 epochs'"),
    "train_vq.codebook_weight": Stated(1.0, "equation 3"),
    "train_vq.commitment_weight": Stated(0.25, "equation 3, with VQGAN's beta"),
    "train_vq.base_learning_rate": Stated(4.5e-6, VQGAN_STAGE_1),
    "train_vq.betas": Stated((0.5, 0.9), VQGAN_STAGE_1),
    "train_vq.precision": Stated("float32", VQGAN_STAGE_1),
    "train_vq.perceptual_weight": Stated(1.0, VQGAN_STAGE_1),
    "train_vq.adversarial_weight": Stated(0.8, VQGAN_STAGE_1),
    "train_vq.discriminator_start": Stated(30001, VQGAN_STAGE_1),
    "train_vq.discriminator_channels": Stated(64, VQGAN_STAGE_1),
    "train_vq.discriminator_layers": Stated(3, VQGAN_STAGE_1),
    "train_vq.adaptive_weight_limit": Stated(1e4, VQGAN_STAGE_1),
    "prior.layers": Stated(24, "4.3, '24 layers, 16 attention heads, 1024 embedding dimensions and 4096 hidden'"),
    "prior.heads": Stated(16, "4.3, '24 layers, 16 attention heads, 1024 embedding dimensions and 4096 hidden'"),
    "prior.width": Stated(1024, "4.3, '24 layers, 16 attention heads, 1024 embedding dimensions and 4096 hidden'"),
    "prior.hidden": Stated(4096, "4.3, '24 layers, 16 attention heads, 1024 embedding dimensions and 4096 hidden'"),
    "prior.classes": Stated(0, "4.3, unconditional generation on FFHQ"),
    "train_prior.batch_size": Stated(64, "4.3, 'a batch size of 64 across 4 Tesla V100 GPUs with 200 epochs'"),
    "train_prior.epochs": Stated(None, "in steps, see train_prior.steps"),
    "train_prior.steps": Stated(200 * 60_000 // 64, "4.3, 200 epochs, of the 60,000 images of VQGAN's ffhqtrain.txt"),
    "train_prior.base_learning_rate": Stated(4.5e-6, VQGAN_STAGE_2),
    "train_prior.betas": Stated((0.9, 0.95), VQGAN_STAGE_2),
    "train_prior.weight_decay": Stated(0.01, VQGAN_STAGE_2),
    "train_prior.precision": Stated("float32", VQGAN_STAGE_2),
    "train_prior.label_smoothing": Stated(0.0, VQGAN_STAGE_2),
    "train_prior.label_dropout": Stated(0.0, VQGAN_STAGE_2),
    "views.scales": Stated((), VQGAN_STAGE_2),
    "sample.steps": Stated(8, "Table 2"),
    "sample.choice_temperature": Stated(4.5, "4.3, as in MaskGIT: maskgit_class_cond_config.py"),
    "sample.top_k": Stated(None, "4.3, 'we do not set any special sampling strategies such as top-k and top-p'"),
    "sample.top_p": Stated(1.0, "4.3, 'we do not set any special sampling strategies such as top-k and top-p'"),
    "sample.guidance": Stated(0.0, "4.3, 'we do not set any special sampling strategies'"),
}

IMAGENET = {
    "data.crop": Stated("random", "VQGAN's taming/data/imagenet.py"),
    "train_vq.discriminator_start": Stated(250001, VQGAN_STAGE_1),
    "views.scales": Stated(RANDOM_CROP, "VQGAN's taming/data/imagenet.py"),
    "prior.classes": Stated(1000, "4.3, class-conditional generation on ImageNet"),
    "train_prior.steps": Stated(round(200 * 1_281_167 / 64), "4.3, 200 epochs"),
    "sample.steps": Stated(12, "Table 3"),
}
BASELINE = {
    "vq.chunks": Stated(1, "Figure 6a, first row"),
    "vq.initial_feature": Stated("quantized", "Figure 6a, first row"),
    "vq.modulation": Stated(None, "Figure 6a, first row"),
}
LARGE = {"vq.codebook_size": Stated(16384, "Figure 6b")}

PRESETS: dict[str, dict[str, Stated]] = {
    "ffhq": {},
    "imagenet": IMAGENET,
    "vqgan-ffhq": BASELINE,
    "vqgan-imagenet": IMAGENET | BASELINE,
    "vqgan-imagenet-16384": IMAGENET | BASELINE | LARGE,
    "imagenet-16384": IMAGENET | LARGE,
    "multichannel-ffhq": BASELINE | {"vq.chunks": Stated(4, "Figure 6a, second row")},
    "sinusoid-ffhq": {"vq.initial_feature": Stated("sinusoid", "Figure 6a, third row")},
    "constant-ffhq": {"vq.initial_feature": Stated("embedded_constant", "4.4, 'the same size as the embedded'")},
    "ffhq-1ch": {"vq.chunks": Stated(1, "Figure 6c")},
    "ffhq-2ch": {"vq.chunks": Stated(2, "Figure 6c")},
    "ffhq-8ch": {"vq.chunks": Stated(8, "Figure 6c")},
}

OTHERS = {"description", "data.path"}
"""Settings of the presets that are not about a model; `target` has what the paper publishes."""


def differing(name: str) -> set[str]:
    """Return the settings of a preset that differ from the paper's, or from their default if it does not state them."""
    settings = presets.load(name)
    stated = PAPER | PRESETS[name]
    found = set()
    for setting, field in presets.settings_fields():
        value, default = settings, field.get_default(call_default_factory=True)
        for part in setting.split("."):
            value = None if value is None else getattr(value, part)
        is_section = presets.section_class(field.annotation) is not None and value is not None
        if setting in OTHERS or setting.startswith("target") or is_section:
            continue
        if setting.startswith("vq.modulation.") and settings.vq.modulation is None:
            continue
        if value != stated.get(setting, Stated(default, "")).value:
            found.add(setting)
    return found


def documented() -> dict[str, set[str]]:
    """Return the settings in the first table of departures, by preset."""
    section = DOCUMENT.read_text().split("## Departures from the paper")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    found: dict[str, set[str]] = {name: set() for name in PRESETS}
    for setting, named, *_ in rows:
        for name in PRESETS if named == "all" else re.findall(r"`([^`]+)`", named):
            found[name].add(setting.strip("`"))
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_the_document_names_every_setting_that_differs_from_the_paper(name: str) -> None:
    assert documented()[name] == differing(name)


def test_the_document_lists_the_presets_that_are_the_papers() -> None:
    section = DOCUMENT.read_text().split("## Departures from the paper")[1].split("\n## ")[0]
    listed = section.split("Those presets are")[1].split(";")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == PRESETS.keys()


def test_a_setting_that_is_changed_in_a_preset_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "changed.yaml"
    path.write_text("base: ffhq\ntrain_prior: {ema_decay: 0.999}\nvq: {blocks: 3}\nviews: {mirror: true}\n")
    PRESETS[str(path)] = {}
    try:
        assert differing(str(path)) - differing("ffhq") == {"train_prior.ema_decay", "vq.blocks", "views.mirror"}
    finally:
        del PRESETS[str(path)]
