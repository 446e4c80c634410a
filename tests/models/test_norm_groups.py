"""The number of groups of the norms: what it changes, and that a norm of single channels loses their means."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from movq_cli.models.modulation import Norm
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings
from tests.models.layouts import TINY


@pytest.mark.parametrize("groups", [1, 8, 32])
def test_every_norm_of_the_model_has_the_groups_of_the_settings(groups: int) -> None:
    settings = TokenizerSettings.model_validate({**TINY.model_dump(), "norm_groups": groups})
    norms = [module for module in Tokenizer(settings).modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert {norm.num_groups for norm in norms} == {groups}


def test_a_norm_of_single_channels_loses_the_mean_of_a_channel_and_one_of_few_groups_does_not() -> None:
    x = torch.randn(1, 32, 8, 8)
    brighter = x.clone()
    brighter[:, 3] += 1
    single, grouped = Norm(32, 32), Norm(32, 8)
    torch.testing.assert_close(single(x), single(brighter), atol=1e-5, rtol=0)
    assert (grouped(x) - grouped(brighter)).abs().max() > 0.1


def test_widths_that_the_groups_do_not_divide_are_refused_with_the_setting() -> None:
    with pytest.raises(ValidationError, match=r"widths \[.*multiple of norm_groups, 24"):
        TokenizerSettings.model_validate({**TINY.model_dump(), "norm_groups": 24})
