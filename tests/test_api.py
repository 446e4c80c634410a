"""The Python face's small print: what a class's name and number mean."""

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


def test_numbers_are_ids_and_texts_are_names_first_also_where_names_are_numbers(tiny: Preset) -> None:
    """Sorted as text, the folders 1, 2 and 10 are the classes 1, 10, 2."""
    numbered = prior(tiny, "1", "10", "2")
    assert numbered.class_ids([]) == [0, 1, 2]
    assert numbered.class_ids(numbered.class_ids([])) == [0, 1, 2]
    assert numbered.class_ids(["1", "2", "10", "0"]) == [0, 2, 1, 0]
    assert numbered.class_ids([1, 2, 0]) == [1, 2, 0]


@pytest.mark.parametrize("name", ["dog", "3", 3, -1, ""])
def test_a_class_that_is_not_there_is_a_bad_request(tiny: Preset, name: str | int) -> None:
    with pytest.raises(BadRequestError):
        prior(tiny, "bar", "dot", "sky").class_ids([name])


def test_an_unconditional_prior_takes_no_classes(tiny: Preset) -> None:
    assert prior(tiny).class_ids([]) == []
    with pytest.raises(BadRequestError, match="unconditional"):
        prior(tiny).class_ids([0])
