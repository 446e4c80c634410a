"""Batches for stage 1: the right pixels, the same on any number of threads and from any step."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Generator, Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from movq_cli.data import loader, pixels
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet, Split
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import PositionalFiles
from movq_cli.settings import DataSettings, Preset, ViewSettings

CPU = torch.device("cpu")


@pytest.fixture
def split(prepared: PreparedSet) -> Split:
    return prepared.split("train")


def stream(split: Split, data: DataSettings, start: int = 0) -> Generator[torch.Tensor]:
    order = EpochOrder(len(split), 8, seed=5)
    found = loader.training_batches(split, order, data, resolution=12, seed=5, start=start, device=CPU)
    assert isinstance(found, Generator)
    return found


def batches(split: Split, number: int, *, start: int = 0, workers: int = 0, crop: str = "random") -> list[torch.Tensor]:
    data = DataSettings(crop=crop, workers=workers)
    return list(islice(stream(split, data, start), number))


def test_batches_are_the_images_that_the_order_names(split: Split) -> None:
    order = EpochOrder(len(split), 8, seed=5)
    for step, batch in enumerate(batches(split, 8, crop="center")):
        assert (batch.dtype, batch.shape) == (torch.uint8, (8, 3, 12, 12))
        for image, index in zip(batch, order.batch(step)[1], strict=True):
            whole = split.pixels(int(index))
            assert np.array_equal(image.permute(1, 2, 0), whole[2:14, 4:16])


def test_random_crops_lie_inside_and_differ_between_epochs(split: Split) -> None:
    crops = loader.Crops(split, 12, random=True, flip=False, seed=5)
    places = set()
    for epoch in range(40):
        crop = crops.batch([(epoch, 3)])[0].permute(1, 2, 0).numpy()
        whole = split.pixels(3)
        found = [
            (top, left)
            for top in range(5)
            for left in range(9)
            if np.array_equal(whole[top : top + 12, left : left + 12], crop)
        ]
        assert found
        places |= set(found)
    assert {top for top, _ in places} == set(range(5))
    assert len({left for _, left in places}) > 6


def test_flips_mirror_half_of_the_crops_anew_each_epoch_and_leave_their_places(split: Split) -> None:
    plain, flipped = (loader.Crops(split, 12, random=True, flip=flip, seed=5) for flip in (False, True))
    mirrored = []
    for epoch in range(100):
        before, after = (crops.batch([(epoch, 3)])[0] for crops in (plain, flipped))
        mirrored.append(not torch.equal(before, after))
        assert torch.equal(after, before.flip(-1) if mirrored[-1] else before)
    assert 35 < sum(mirrored) < 65
    batch = next(iter(stream(split, DataSettings(flip=True, workers=2))))
    assert torch.equal(batch, next(iter(stream(split, DataSettings(flip=True, workers=0)))))


def test_what_is_wrong_in_a_thread_is_raised_as_it_was_and_leaves_no_thread(split: Split) -> None:
    before = threading.active_count()
    whole = stream(split, DataSettings(workers=2))
    next(whole)
    assert threading.active_count() > before
    whole.close()
    assert threading.active_count() == before
    split.paths[0].unlink()
    broken = stream(dataclasses.replace(split, files=PositionalFiles()), DataSettings(workers=2))
    with pytest.raises(FailureError, match=r"^cannot read .*00000\.zip: No such file or directory$"):
        next(broken)
    assert threading.active_count() == before


def test_no_more_is_decoded_ahead_than_two_batches_a_thread(split: Split) -> None:
    requested = []

    def request_batches() -> Iterator[list[int]]:
        for number in range(100):
            requested.append(number)
            yield [number]

    views = loader.Views(split, 12, ViewSettings())
    batches = loader.view_batches(views, request_batches(), DataSettings(workers=3), device=CPU)
    for taken in range(1, 5):
        next(batches)
        assert len(requested) == taken + 6


def test_threads_and_a_later_start_give_the_same_batches(split: Split) -> None:
    here = batches(split, 9)
    for workers, start in [(2, 0), (0, 4), (1, 7)]:
        again = batches(split, 9 - start, start=start, workers=workers)
        assert all(torch.equal(a, b) for a, b in zip(here[start:], again, strict=True))


def test_validation_sees_every_image_once_in_order(split: Split) -> None:
    whole = loader.validation_batches(split, range(len(split)), DataSettings(), resolution=16, batch_size=7, device=CPU)
    images = torch.cat(list(whole))
    assert len(images) == len(split)
    assert np.array_equal(images[10].permute(1, 2, 0), split.pixels(10)[:, 2:18])


def test_crops_larger_than_the_smallest_image_are_refused(prepared: PreparedSet, tiny: Preset) -> None:
    loader.check_size(prepared, tiny.vq)
    with pytest.raises(BadRequestError, match=r"--size 64, or .* -o vq\.resolution=16\."):
        loader.check_size(prepared, tiny.vq.model_copy(update={"resolution": 64}))


def test_signed_floats_and_bytes_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    signed = pixels.to_signed(every)
    assert (signed.min().item(), signed.max().item()) == (-1, 1)
    assert torch.equal(pixels.to_bytes(signed), every)
    assert pixels.to_bytes(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]
