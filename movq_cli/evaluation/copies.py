"""The fake images that are nearest to real ones, as a picture and as a list for the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from movq_cli.data import grids
from movq_cli.evaluation.distributions import NearestImages
from movq_cli.evaluation.inputs import SetInputs

_SHOWN_PAIRS = 12


class NearestPair(NamedTuple):
    """A fake image and its nearest real one."""

    fake: int  # index in the fake set
    real: int  # index in the real set
    distance: float  # Euclidean, between their features

    def describe(self, inputs: SetInputs) -> dict[str, Any]:
        """Return the pair's entry in the protocol."""
        assert inputs.real_images is not None
        names = {"fake": inputs.fake_images.names[self.fake], "real": inputs.real_images.names[self.real]}
        return names | {"distance": self.distance}


def nearest_pairs(inputs: SetInputs, found: NearestImages) -> list[NearestPair]:
    """Return the pairs at the smallest distances, in their order.

    Args:
        inputs: The two sets.
        found: The nearest real image of each fake one that could be read.
    """
    assert inputs.real_features is not None
    fake_indices, real_indices = inputs.fake_features.indices, inputs.real_features.indices
    return [
        NearestPair(int(fake_indices[row]), int(real_indices[int(found.nearest[row])]), float(found.distance[row]))
        for row in found.distance.argsort()[:_SHOWN_PAIRS].tolist()
    ]


def save_picture(path: Path, inputs: SetInputs, pairs: list[NearestPair]) -> None:
    """Draw the fake images of some pairs in a row, and the real images below them, all at the size of the first.

    The columns have their distances as headings.

    Args:
        path: File of the picture.
        inputs: The two sets.
        pairs: Pairs to draw.
    """
    assert inputs.real_images is not None
    fakes = inputs.fake_images.read(pair.fake for pair in pairs)
    reals = inputs.real_images.read(pair.real for pair in pairs)
    images = [image for _, image in (*fakes, *reals) if image is not None]
    size = images[0].shape[-2:]
    resized = [F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8) for image in images]
    distances = [f"{pair.distance:.3g}" for pair in pairs]
    grids.save(path, torch.stack(resized), len(pairs), rows=("fake", "nearest real"), headings=distances)
