"""Options that are colors."""

from __future__ import annotations

from typing import Annotated

import typer

from movq_cli.errors import BadRequestError

Background = Annotated[str, typer.Option(help="Color behind transparent pixels: R,G,B, each 0 to 255.")]


def color(text: str, option: str) -> tuple[int, int, int]:
    """Return the color that is the value of an option, R,G,B.

    Args:
        text: Value of the option.
        option: Name of the option, for the error.

    Raises:
        BadRequestError: The text is not three numbers from 0 to 255.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts):
        raise BadRequestError(f"{option} {text!r} is not three numbers from 0 to 255", f"Example: {option} 0,0,0")
    red, green, blue = map(int, parts)
    return red, green, blue
