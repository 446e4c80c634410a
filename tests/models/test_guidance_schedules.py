"""Guidance over the steps: the published functions, and decoding against loops that guide by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.models import priors
from movq_cli.presets import explain
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

SHAPE = CodeShape(height=2, width=3, chunks=2, codebook_size=11)


def test_the_power_cosine_is_the_published_function_of_the_progress() -> None:
    settings = SampleSettings(guidance=3.0, guidance_schedule="power-cosine", guidance_power=2.5)
    for step in range(8):
        # MDT's scale s is 1 plus our strength: s(t) = (s - 1) (1 - cos(pi (t / T)^p)) / 2 + 1.
        scale = (4.0 - 1) * math.sin(math.pi / 2 * (step / 8) ** 2.5) ** 2 + 1
        assert settings.guidance_at(step, 8) == pytest.approx(scale - 1, abs=1e-12)
    assert SampleSettings().guidance_power == 4.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine"])
def test_outside_the_interval_there_is_no_guidance_and_inside_it_the_schedule(schedule: str) -> None:
    values = {"guidance": 2.0, "guidance_schedule": schedule}
    complete = SampleSettings.model_validate(values)
    limited = SampleSettings.model_validate({**values, "guidance_interval": "0.3-0.7"})
    expected = [complete.guidance_at(step, 10) if 3 <= step < 7 else 0.0 for step in range(10)]
    assert [limited.guidance_at(step, 10) for step in range(10)] == expected
    all_steps = SampleSettings.model_validate({**values, "guidance_interval": "0-1"})
    assert [all_steps.guidance_at(step, 7) for step in range(7)] == [complete.guidance_at(step, 7) for step in range(7)]


@pytest.mark.parametrize("text", ["0.8-0.2", "0.2", "0.2-1.5", "-0.2-0.5", "a-b", "0.5-0.5", "0,2-0,8", ""])
def test_what_is_no_interval_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"as 0\.2-0\.8") as caught:
        SampleSettings(guidance_interval=text)
    assert len(explain(caught.value, "sample").splitlines()) == 1  # type: ignore[arg-type]


def model_of(mode: str) -> priors.CodePrior:
    torch.manual_seed(0)
    model = priors.build(PriorSettings(mode=mode, layers=3, heads=2, width=16, hidden=32, classes=3), SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


RISING = SampleSettings(steps=6, guidance=4.0, guidance_schedule="power-cosine", guidance_power=1.5)
LIMITED = SampleSettings(steps=6, guidance=4.0, guidance_interval="0.3-0.8")


@pytest.mark.parametrize("settings", [RISING, LIMITED], ids=["power-cosine", "interval"])
def test_a_masked_prior_draws_from_the_logits_of_each_steps_own_strength(settings: SampleSettings) -> None:
    model, labels, seeds = model_of("mask"), torch.tensor([0, 2]), [4, 9]
    rows: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    found = model.decode(seeds, labels, settings)
    handle.remove()
    strengths = [settings.guidance_at(step, 6) for step in range(6)]
    assert 0.0 in strengths
    assert rows[1:] == [4 if strength else 2 for strength in strengths[1:]]  # Without guidance, half the work.

    def guided(step: int, codes: Tensor, label: Tensor) -> Tensor:
        """Float64 logits of one image's step."""
        with torch.no_grad():
            given = model(codes, label).double()
            none = model(codes, torch.full_like(label, model.no_class)).double()
        return given + strengths[step] * (given - none)

    for image, seed in enumerate(seeds):
        uniforms = torch.rand(6, 2, SHAPE.codes, generator=torch.Generator().manual_seed(seed)).double()
        codes = torch.full((1, *SHAPE.size), model.unknown)
        for step in range(6):
            probability = guided(step, codes, labels[image : image + 1]).flatten(0, 3).softmax(-1)
            drawn = (probability.cumsum(-1) <= uniforms[step, 0, :, None]).sum(-1)
            score = probability.gather(1, drawn[:, None])[:, 0].log()
            score += settings.choice_temperature * (1 - (step + 1) / 6) * -(-uniforms[step, 1].log()).log()
            hidden = codes.flatten() == model.unknown
            left = math.floor(SHAPE.codes * math.cos(math.pi / 2 * (step + 1) / 6) + 1e-9)
            left = 0 if step == 5 else max(1, min(left, int(hidden.sum()) - 1))
            flat = torch.where(hidden, drawn, codes.flatten())
            flat[score.masked_fill(~hidden, math.inf).argsort()[:left]] = model.unknown
            codes = flat.view(codes.shape)
        assert torch.equal(found[image], codes[0])


@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_an_autoregressive_prior_guides_each_code_by_its_place_in_the_sequence(mode: str) -> None:
    model, labels = model_of(mode), torch.tensor([1])
    settings = SampleSettings(guidance=5.0, guidance_schedule="power-cosine", guidance_interval="0.2-0.9")
    found = model.decode([6], labels, settings)
    uniforms = torch.rand(SHAPE.codes, generator=torch.Generator().manual_seed(6)).double()
    codes = torch.zeros(1, SHAPE.codes, dtype=torch.int64)
    for index in range(SHAPE.codes):
        grid = codes.view(1, *SHAPE.size)
        with torch.no_grad():
            given = model(grid, labels).double().flatten(0, 3)[index]
            none = model(grid, torch.full_like(labels, model.no_class)).double().flatten(0, 3)[index]
        progress = index / SHAPE.codes
        strength = 5.0 * (1 - math.cos(math.pi * progress**4)) / 2 if 0.2 <= progress < 0.9 else 0.0
        probability = (given + strength * (given - none)).softmax(-1)
        codes[0, index] = (probability.cumsum(-1) <= uniforms[index]).sum()
    assert torch.equal(found[0].flatten(), codes[0])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guidance_power": 2.0}, "--guidance-power has no effect without guidance"),
        ({"guidance_interval": "0.1-0.5"}, "--guidance-interval has no effect without guidance"),
        ({"guidance": 1.0, "guidance_power": 2.0}, "--guidance-power has no effect with a constant guidance"),
        ({"order": "halton", "choice_temperature": 2.0}, "--choice-temperature has no effect on the order halton"),
    ],
)
def test_an_option_without_effect_is_refused(values: dict[str, object], words: str) -> None:
    from types import SimpleNamespace
    from typing import Any

    from movq_cli.commands.sample import merge_settings

    header: Any = SimpleNamespace(prior=PriorSettings(classes=3), sample=SampleSettings())
    given: Any = SimpleNamespace(transformer=model_of("mask"), header=header, classes=("a", "b", "c"))
    with pytest.raises(BadRequestError, match=words):
        merge_settings(given, values, {})
