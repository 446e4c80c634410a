"""Classes in the Python interface: names and ids."""

from __future__ import annotations

import pytest

from movq_cli.api import Prior
from movq_cli.checkpoints import PriorHeader
from movq_cli.errors import BadRequestError
from movq_cli.models.masked_prior import MaskedPrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import Preset


def prior(tiny: Preset, *classes: str) -> Prior:
    shape = tiny.vq.code_shape
    header = PriorHeader(prior=tiny.prior, shape=shape, sample=tiny.sample, classes=classes, tokenizer="t")
    return Prior(MaskedPrior(tiny.prior, shape), Tokenizer(tiny.vq), header)


def test_integers_are_ids_and_strings_are_names_first_even_if_the_names_are_numbers(tiny: Preset) -> None:
    """The folders 1, 2 and 10 are sorted as text, which makes them the classes 1, 10, 2."""
    numbered = prior(tiny, "1", "10", "2")
    assert numbered.class_ids([]) == [0, 1, 2]
    assert numbered.class_ids(numbered.class_ids([])) == [0, 1, 2]
    assert numbered.class_ids(["1", "2", "10", "0"]) == [0, 2, 1, 0]
    assert numbered.class_ids([1, 2, 0]) == [1, 2, 0]


@pytest.mark.parametrize("name", ["dog", "3", 3, -1, ""])
def test_an_unknown_class_is_a_bad_request(tiny: Preset, name: str | int) -> None:
    with pytest.raises(BadRequestError):
        prior(tiny, "bar", "dot", "sky").class_ids([name])


def test_an_unconditional_prior_takes_no_classes(tiny: Preset) -> None:
    assert prior(tiny).class_ids([]) == []
    with pytest.raises(BadRequestError, match="unconditional"):
        prior(tiny).class_ids([0])
