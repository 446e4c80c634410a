"""Names in another case, or one among thousands, are answered with the name that is meant."""

from __future__ import annotations

import pytest

from movq_cli import presets
from movq_cli.cli.prepare import _filter
from movq_cli.errors import BadRequestError, did_you_mean
from movq_cli.sources.open import open_source


@pytest.mark.parametrize(
    ("name", "meant"), [("DIGITS", "'digits'"), ("Photos-64", "'photos-64'"), ("IMAGENT", "'imagenet'")]
)
def test_a_preset_in_another_case_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(BadRequestError, match=f"Did you mean {meant}"):
        presets.load(name)


def test_a_data_set_and_a_filter_in_another_case_are_suggested() -> None:
    with pytest.raises(BadRequestError, match=r"Did you mean 'cifar10'\?"):
        open_source("CIFAR10")
    with pytest.raises(BadRequestError, match=r"Did you mean 'lanczos'\?"):
        _filter("LANCZOS")


def test_names_that_differ_in_case_alone_are_both_suggested_and_a_long_list_is_cut() -> None:
    assert did_you_mean("CAT", ["Cat", "cat", "cap"]) == "Did you mean 'Cat' or 'cat'?"
    known = [f"n{number:08d}" for number in range(1000)]
    assert did_you_mean("N00000999", known) == "Did you mean 'n00000999'?"
    assert did_you_mean("zebra", known).endswith("n00000029 and 970 more.")
    assert did_you_mean("zebra", []) == ""
