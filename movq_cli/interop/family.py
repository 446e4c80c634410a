"""The contract of a family: what one project's tokenizers are called, and what their tensors alone do not say."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from movq_cli.interop.names import NameTable
from movq_cli.settings import TokenizerSettings


@dataclass(frozen=True)
class Claims:
    """The statements of a config about a tokenizer.

    `facts` are compared with the tensors, and `settings` are taken, because the tensors do not show them. Both map a
    name of ours to the key in the config and its value.
    """

    facts: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """Facts by their names in `architecture.facts`."""
    settings: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """Settings of the tokenizer: `resolution`, `norm_groups`, `image_range` and `normalize_codes`."""
    refused: str = ""
    """Why such a model cannot be imported; empty if nothing in the config says so."""


class Family(ABC):
    """The tokenizers of one project.

    A family is a module in `interop/families/` with an instance, `FAMILY`.
    """

    key: ClassVar[str]
    """Name of the family."""
    mark: ClassVar[re.Pattern[str]]
    """Pattern of name beginnings of this family; a file is of the family with the most such names."""
    names: ClassVar[NameTable]
    """Names of the tensors, theirs and ours."""
    first_level: ClassVar[str]
    """Beginning of the names of the encoder's levels, with `{i}` for the level."""
    ignored: ClassVar[Sequence[str]] = ()
    """Names of tensors that the model does not need, theirs."""
    note: ClassVar[str] = ""
    """Note for the user about all models of the family, in words; empty if there is none."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the tokenizer that all models of the family have, whatever their tensors show."""
    training: ClassVar[Mapping[str, Any]] = {}
    """Settings of stage 1 with which the family was trained, where they differ from the defaults."""

    def license(self, names: Collection[str], config: Mapping[str, Any]) -> str:
        """Return what is known about the license of the weights.

        Args:
            names: Names of all tensors in the file.
            config: The config; empty if there is none.
        """
        return "not known"

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of our layout from those of this family, which already have our names.

        The default changes nothing. An error is a ValueError that names a tensor.
        """
        return tensors

    def lacks(self, settings: TokenizerSettings) -> list[str]:
        """Return the settings that this family's models cannot have, each with its value; empty if it has all of them.

        The default is that of a family to which tokenizers are not exported.
        """
        return [f"any setting: nothing is exported to {self.key}"]

    def config(self, settings: TokenizerSettings) -> dict[str, Any]:
        """Return the config with which this family's project builds a tokenizer; it fits what `lacks` allows."""
        raise NotImplementedError

    def convert_back(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this family's tensors, by our names, from those of our layout; the reverse of `complete`."""
        return tensors

    def claims(self, config: Mapping[str, Any], part: str) -> Claims | None:
        """Return what a config says; None if it is not a config of this family.

        A config may hold anything: what it lacks, or has in a wrong type, may raise KeyError, TypeError, ValueError or
        AttributeError.

        Args:
            config: Content of the config.
            part: Part of the model that is imported, `first_stage` or `cond_stage`, of a config that holds several.
        """
        return None
