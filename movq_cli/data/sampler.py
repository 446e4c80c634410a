"""The order of training: a pure function of the seed and the step, so that a resumed run sees what it would have."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from movq_cli.errors import BadRequestError


class EpochOrder:
    """Every image once an epoch, in an order of the epoch's own; an incomplete last batch is left out.

    Args:
        images: How many there are.
        batch_size: Images a step.
        seed: Of the order.

    Raises:
        BadRequestError: Fewer images than one batch.
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
        # One permutation is kept: 8 MB for a million images.
        self._permutation = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(images))

    def batch(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch that a step is in, and the indices [batch_size] of its images."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch, self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
