"""The base class of all settings, and the types of their values with their bounds."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from movq_cli.image_size import ImageSize, Resolution

Positive = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=2**14)]
"""Side of an image or of a code map. The upper bounds are far beyond all models: they protect against damaged files."""


def _as_resolution(value: object, validate: ValidatorFunctionWrapHandler) -> Resolution:
    """Check a resolution as one value, and turn a pair of equal sides into the side of a square."""
    try:
        resolution: Resolution = validate(value)
    except ValidationError:
        raise ValueError(
            f"give the side of a square (256) or height and width ([192, 256]), each from 1 to {2**14}"
        ) from None
    return ImageSize.of(resolution).resolution


SizeSetting = Annotated[Side | tuple[Side, Side], WrapValidator(_as_resolution)]
"""Size of images: the side of a square, or height and width; a pair of equal numbers becomes the side of a square."""

Channels = Annotated[int, Field(ge=1, le=2**16)]
Depth = Annotated[int, Field(ge=1, le=2**6)]
Parts = Annotated[int, Field(ge=1, le=2**10)]
"""Number of layers, heads or chunks."""

MaskSchedule = Literal["cosine", "arccos", "linear", "square"]
"""Share of the codes that are masked at a progress r in [0, 1]: cos(pi r / 2), 2 arccos(r) / pi, 1 - r, or 1 - r^2."""


def bounds_of(interval: str) -> tuple[float, float]:
    """Return start and end of an Interval."""
    start, _, end = interval.partition("-")
    return float(start), float(end)


def _as_interval(value: str) -> str:
    is_pair = re.fullmatch(r"\d+(\.\d+)?-\d+(\.\d+)?", value, re.ASCII) is not None
    start, end = bounds_of(value) if is_pair else (0.0, 0.0)
    if not start < end <= 1:
        raise ValueError("give two shares of the steps, the first smaller than the second, as 0.2-0.8")
    return value


Interval = Annotated[str, AfterValidator(_as_interval)]
"""Two shares of the steps of a run or of a decoding, the first smaller than the second: '0.2-0.8'."""

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]


class Settings(BaseModel):
    """Base class of all settings: immutable, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true, yes and on where a number belongs, which pydantic would read as 1."""
        if _has_truth_value(value) and not _allows_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("give a number or a text in place of a truth value (in YAML also yes, no, on and off)")
        return value


def _has_truth_value(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_truth_value, value)))


def _allows_bool(annotation: object) -> bool:
    return annotation is bool or any(map(_allows_bool, get_args(annotation)))
