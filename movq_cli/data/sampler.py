"""Order of the training images: a pure function of seed and step, so that a resumed run gets the same batches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from movq_cli.errors import BadRequestError


class EpochOrder:
    """Random order in which each epoch uses every image once; an incomplete last batch is left out.

    Args:
        images: Number of images.
        batch_size: Number of images in a step.
        seed: Seed of the order.

    Raises:
        BadRequestError: There are fewer images than one batch needs.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        if images < batch_size:
            raise BadRequestError(
                f"the training split has {images} images, fewer than one batch of {batch_size}",
                "Set a smaller batch_size or prepare more images.",
            )
        self.images = images
        self.batch_size = batch_size
        self.steps_per_epoch = images // batch_size
        # One permutation is cached: 8 MB for a million images.
        self._permutation = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(images))

    def batch(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch of a step, and the indices [batch_size] of its images.

        Args:
            step: Number of the step, from 0.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch, self._permutation(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
