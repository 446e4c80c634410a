"""Each preset builds with its documented number of parameters; inheritance and overrides work, errors are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from movq_cli import presets
from movq_cli.errors import BadRequestError
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset

PARAMETERS = {  # tokenizer, prior
    "constant-ffhq": (82_824_067, 307_030_272),
    "digits": (2_251_027, 1_331_360),
    "ffhq": (82_692_995, 307_030_272),
    "ffhq-1ch": (82_889_603, 304_671_744),
    "ffhq-2ch": (82_758_531, 305_195_520),
    "ffhq-8ch": (82_660_227, 311_093_376),
    "ffhq-plus": (82_692_995, 307_030_272),
    "imagenet": (82_692_995, 307_031_296),
    "imagenet-16384": (83_676_035, 373_878_016),
    "imagenet-plus": (82_692_995, 307_031_296),
    "kandinsky-102m": (101_614_255, 336_916_480),
    "kandinsky-270m": (270_669_103, 336_916_480),
    "kandinsky-67m": (67_832_495, 336_916_480),
    "middle-ffhq": (82_692_995, 307_030_272),
    "multichannel-ffhq": (71_945_091, 307_030_272),
    "photos-128": (19_396_291, 40_189_056),
    "photos-256": (21_333_699, 40_189_056),
    "photos-32": (968_707, 6_892_096),
    "photos-64": (6_980_099, 22_990_176),
    "sinusoid-ffhq": (82_692_995, 307_030_272),
    "vqgan-ffhq": (72_141_699, 304_671_744),
    "vqgan-imagenet": (72_141_699, 304_672_768),
    "vqgan-imagenet-16384": (76_073_859, 336_130_048),
}


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_preset_is_counted() -> None:
    assert presets.available().keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_builds_with_its_documented_number_of_parameters(name: str) -> None:
    settings = presets.load(name)
    with torch.device("meta"):
        found = (
            parameter_count(Tokenizer(settings.vq)),
            parameter_count(MaskedPrior(settings.prior, settings.vq.code_shape)),
        )
    assert found == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_shown_loads_again_as_the_same_settings(name: str, tmp_path: Path) -> None:
    settings = presets.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(presets.to_yaml(settings))
    assert presets.load(str(path)) == settings


@pytest.mark.parametrize(
    ("name", "views", "images", "passes"),
    [
        ("ffhq", 1, 60_000, 200),
        ("vqgan-ffhq", 1, 60_000, 200),
        ("ffhq-plus", 2, 60_000, 400),
        ("imagenet", 3, 1_281_167, 200),
        ("imagenet-plus", 26, 1_281_167, 200),
    ],
)
def test_the_priors_are_trained_for_their_passes_over_the_images(
    name: str, views: int, images: int, passes: int
) -> None:
    settings = presets.load(name)
    assert settings.views.count == views
    steps = settings.train_prior.total_steps(images * views)
    assert steps == round(passes * images / settings.train_prior.batch_size)


def test_every_setting_is_described_by_a_phrase_that_says_what_null_means() -> None:
    for name, field in presets.settings_fields():
        description = field.description or ""
        assert description, name
        assert not description.endswith("."), name
        assert (field.default is None) <= ("; null = " in description), name


def test_a_preset_in_the_current_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "digits.yaml").write_text("description: own\n")
    monkeypatch.chdir(tmp_path)
    assert presets.load("digits").description == "own"
    assert "ffhq" in presets.available()


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_child_states_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path, child=f"base: {tmp_path}/middle.yaml\nvq: {{chunks: 8}}\n")
    write(tmp_path, middle="base: ffhq\nvq: {codebook_size: 512}\ntarget: {mask: {fid: null}}\n")
    child, base = presets.load(f"{tmp_path}/child.yaml"), presets.load("ffhq")
    assert (child.vq.chunks, child.vq.codebook_size) == (8, 512)
    assert child.vq.model_copy(update={"chunks": 4, "codebook_size": 1024}) == base.vq
    assert (child.target.mask.fid, child.target.psnr) == (None, base.target.psnr)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: {here}/a.yaml\n", "circle"),
        ("base: [ffhq, digits]\n", "one preset's name"),
        ("base: ffqh\n", "'ffhq'"),
        ("- 1\n- 2\n", "list"),
        ("vq: {chunks: 4\n", "YAML"),
        ("vq: 3\n", "vq"),
        ("vqq: {}\n", "'vq'"),
        ("train_vq: {steps: 3}\n", "exactly one of epochs and steps"),
        ("vq: {resolution: 250}\n", "downsampling factor 16"),
        ("vq: {channels: 20}\n", "multiple of norm_groups, 32"),
        ("vq: {modulation: null}\n", "initial_feature"),
        ("prior: {classes: 70000}\n", "65536"),
        ("prior: {heads: 7}\n", "7 heads"),
        ("train_vq: {base_learning_rate: .inf}\n", "base_learning_rate"),
        ("views: {scales: [0.9]}\n", "scales"),
    ],
)
def test_an_invalid_preset_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, a=text.replace("{here}", str(tmp_path)))
    with pytest.raises(BadRequestError) as error:
        presets.load(f"{tmp_path}/a.yaml")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("vq.codebook_size=2048", lambda p: p.vq.codebook_size == 2048),
        ("vq.attention_resolutions=[8, 16]", lambda p: p.vq.attention_resolutions == (8, 16)),
        ("vq.modulation.levels=1", lambda p: p.vq.modulation.levels == 1),
        ("train_vq.base_learning_rate=1e-4", lambda p: p.train_vq.base_learning_rate == 1e-4),
        ("views.scales=[1.1]", lambda p: p.views.scales == (1.1,)),
        ("train_vq.clip_norm=null", lambda p: p.train_vq.clip_norm is None),
        ("data.path=a folder/inside", lambda p: p.data.path == Path("a folder/inside")),
        ("description=a=b", lambda p: p.description == "a=b"),
    ],
)
def test_any_setting_can_be_given_on_the_command_line(override: str, found: object) -> None:
    assert callable(found)
    assert found(presets.load("ffhq", [override]))


@given(st.text(max_size=30))
def test_no_override_ends_in_anything_but_a_preset_or_one_line(text: str) -> None:
    try:
        assert isinstance(presets.load("digits", [text]), Preset)
    except BadRequestError as error:
        assert "\n" not in str(error)


@given(st.sampled_from([name for name, _ in presets.settings_fields()]), st.data())
def test_a_misspelt_setting_suggests_the_one_that_was_meant(name: str, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(name) - 1))
    if name[index] == ".":
        return
    misspelt = name[:index] + name[index + 1 :]
    known = [known for known, _ in presets.settings_fields()]
    if misspelt in known or len(misspelt) < 6:
        return
    with pytest.raises(BadRequestError) as error:
        presets.load("ffhq", [f"{misspelt}=1"])
    assert repr(name) in str(error.value)
