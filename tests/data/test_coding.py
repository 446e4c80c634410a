"""An image for which there is not enough memory is named, with its size and with what to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from movq_cli.data.coding import naming_images
from movq_cli.errors import FailureError, is_out_of_memory


def test_the_allocator_of_the_cpu_is_understood_and_the_image_is_named() -> None:
    def allocate() -> None:
        with naming_images(["class/a.png"], (30, 40)):
            torch.empty(2**48)

    # After a failed allocation, glibc gives the thread another arena, in which large tensors are always new memory.
    with ThreadPoolExecutor(1) as pool, pytest.raises(FailureError) as caught:
        pool.submit(allocate).result()
    assert str(caught.value) == "out of memory at class/a.png of 40 x 30 pixels. Leave this image out, or resize it."


def test_the_first_image_of_a_batch_is_named_with_the_batch_size_to_set() -> None:
    with pytest.raises(FailureError) as caught, naming_images(["a.png", "b.png", "c.png"], (30, 40)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    message = "out of memory at a.png and 2 more images of 40 x 30 pixels. Set a --batch-size below 3."
    assert str(caught.value) == message


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), naming_images(["a.png"], (30, 40)):
        raise RuntimeError("shapes")
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("memory"))
