"""The mask schedules of training and of decoding, against the published functions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from movq_cli.models.masked_prior import MaskedPrior, mask_ratio, masked_after, revealed, training_mask
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

PUBLISHED: dict[MaskSchedule, Callable[[float], float]] = {
    "cosine": lambda r: math.sin(math.pi / 2 * (1 - r)),
    "arccos": lambda r: 1 - 2 / math.pi * math.asin(r),
    "linear": lambda r: 1 - r,
    "square": lambda r: (1 - r) * (1 + r),
}
"""Share of masked codes at a progress: MaskGIT's functions, and MaskBit's arccos, each in another form than ours."""

INVERSE: dict[MaskSchedule, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": lambda share: 2 / np.pi * np.arccos(share),
    "arccos": lambda share: np.cos(np.pi / 2 * share),
    "linear": lambda share: 1 - share,
    "square": lambda share: np.sqrt(1 - share),
}
"""Progress at which a share of the codes is masked."""


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_a_schedule_is_the_published_function(schedule: MaskSchedule) -> None:
    progress = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = [PUBLISHED[schedule](r) for r in progress.tolist()]
    np.testing.assert_allclose(mask_ratio(progress, schedule).numpy(), expected, atol=1e-12)
    low = mask_ratio(progress.float(), schedule)
    assert low.dtype == torch.float32
    assert ((low > -1e-6) & (low <= 1)).all()


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_training_masks_have_ratios_of_the_schedule(schedule: MaskSchedule) -> None:
    mask = training_mask((1500, 16, 16, 4), torch.Generator().manual_seed(0), schedule)
    ratios = mask.flatten(1).double().mean(1).numpy()
    # A ratio is below a share if the progress is beyond the one at which this share is masked.
    assert stats.kstest(ratios, lambda share: 1 - INVERSE[schedule](np.clip(share, 0, 1))).pvalue > 1e-3


@pytest.mark.parametrize("schedule", PUBLISHED)
@pytest.mark.parametrize(("codes", "steps"), [(1024, 8), (1024, 12), (100, 7), (5, 9), (1, 3), (64, 64)])
def test_decoding_leaves_as_many_codes_masked_as_the_schedule_says(
    schedule: MaskSchedule, codes: int, steps: int
) -> None:
    left = codes
    counts = []
    for step in range(steps):
        after = math.floor(codes * PUBLISHED[schedule]((step + 1) / steps) + 1e-9)
        after = min(max(1, min(after, left - 1)), left) if step < steps - 1 else 0
        counts.append(left - after)
        left = after
    assert revealed(codes, steps, schedule) == counts
    assert sum(counts) == codes


def test_the_default_schedule_is_the_papers_cosine() -> None:
    assert TRAINED.targets(4, torch.Generator().manual_seed(1)).equal(
        TRAINED.targets(4, torch.Generator().manual_seed(1), "cosine")
    )
    assert revealed(1024, 8) == revealed(1024, 8, "cosine") == [20, 58, 95, 127, 156, 177, 192, 199]
    start = torch.tensor([30])
    assert masked_after(3, 8, start, start).equal(masked_after(3, 8, start, start, "cosine"))
    assert SampleSettings().mask_schedule == "cosine"


SHAPE = CodeShape(height=3, width=4, chunks=2, codebook_size=11)
TRAINED = MaskedPrior(PriorSettings(layers=1, heads=2, width=16, hidden=32), SHAPE).eval()


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_the_decoder_follows_its_own_schedule_and_records_it(schedule: MaskSchedule) -> None:
    unknown: list[int] = []
    handle = TRAINED.register_forward_pre_hook(
        lambda _, inputs: unknown.append(int((inputs[0][0] == TRAINED.unknown).sum()))
    )
    settings = SampleSettings(steps=5, mask_schedule=schedule)
    TRAINED.decode([3, 4], None, settings)
    handle.remove()
    expected = TRAINED.manifest_entries(settings)["revealed"]
    assert [before - after for before, after in pairwise([*unknown, 0])] == expected
    assert expected == revealed(SHAPE.codes, 5, schedule)
