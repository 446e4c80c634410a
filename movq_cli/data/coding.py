"""Images of any size to codes and back; sides that are not multiples of the downsampling factor are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from movq_cli.data import pixels
from movq_cli.errors import FailureError, is_out_of_memory
from movq_cli.models.tokenizer import Tokenizer


def encode_batch(model: Tokenizer, originals: Tensor) -> Tensor:
    """Encode images of any size; sides that are not multiples of the factor are padded.

    Args:
        model: Tokenizer.
        originals: Images [B, 3, H, W] uint8, on the tokenizer's device.

    Returns:
        Codes [B, h, w, c] int64, where h and w are H and W divided by the factor, rounded up.
    """
    height, width = originals.shape[-2:]
    factor = model.settings.factor
    # The border is repeated, because black padding would add an edge that the codes would have to describe.
    return model.encode(F.pad(pixels.to_signed(originals), (0, -width % factor, 0, -height % factor), mode="replicate"))


class ImageMemoryError(FailureError):
    """There is not enough memory to encode or decode images."""


@contextmanager
def naming_images(names: Sequence[str], size: Sequence[int]) -> Iterator[None]:
    """Name the images that are encoded or decoded in the block if there is not enough memory for them.

    Args:
        names: Names of the images, which have one size.
        size: Height and width of the images, pixels.

    Raises:
        ImageMemoryError: There is not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        more = f" and {len(names) - 1} more images" if len(names) > 1 else ""
        remedy = f"Set a --batch-size below {len(names)}." if len(names) > 1 else "Leave this image out, or resize it."
        raise ImageMemoryError(f"out of memory at {names[0]}{more} of {size[1]} x {size[0]} pixels", remedy) from None


def decode_batch(model: Tokenizer, codes: Tensor, size: Sequence[int]) -> Tensor:
    """Decode the codes of images of any size, and cut off the padding.

    Args:
        model: Tokenizer.
        codes: Codes [B, h, w, c].
        size: Height and width H, W of the images.

    Returns:
        Images [B, 3, H, W] uint8.
    """
    height, width = size
    return pixels.to_bytes(model.decode(codes))[..., :height, :width]
