"""Metrics of pairs equal scikit-image, and pairs are formed by name alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.evaluation.metrics import SSIM, load_scorers
from movq_cli.evaluation.paired import PairScorer, match, psnr, score_pairs

CPU = torch.device("cpu")
ssim = SSIM().score


def noisy_pair(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randint(0, 256, (count, 3, height, width), generator=generator)
    noise = torch.randint(-40, 41, original.shape, generator=generator)
    return original.to(torch.uint8), (original + noise).clamp(0, 255).to(torch.uint8)


def unit(image: Tensor) -> np.ndarray:
    """[3, H, W] uint8 as scikit-image takes it: [H, W, 3] in [0, 1]."""
    return image.permute(1, 2, 0).numpy().astype(np.float64) / 255


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(SSIM.window, 40), st.integers(SSIM.window, 40), st.integers(0, 2**31 - 1))
def test_psnr_and_ssim_are_scikit_images(count: int, height: int, width: int, seed: int) -> None:
    a, b = noisy_pair(count, height, width, seed)
    for x, y, p, s in zip(a, b, psnr(a, b), ssim(a, b), strict=True):
        assert p.item() == pytest.approx(peak_signal_noise_ratio(unit(x), unit(y), data_range=1.0), abs=1e-9)
        expected = structural_similarity(unit(x), unit(y), win_size=11, channel_axis=-1, data_range=1.0)
        assert s.item() == pytest.approx(expected, abs=1e-6)


def test_smooth_bright_images_do_not_lose_the_ssim_to_rounding() -> None:
    # Nearly flat: the variance is the small difference of two large numbers.
    ramp = torch.linspace(0.97, 0.98, 32).expand(1, 3, 32, 32).contiguous()
    wave = ramp + 1e-3 * torch.sin(torch.arange(32.0))
    expected = structural_similarity(
        ramp[0].permute(1, 2, 0).double().numpy(),
        wave[0].permute(1, 2, 0).double().numpy(),
        win_size=11,
        channel_axis=-1,
        data_range=1.0,
    )
    assert ssim(ramp, wave).item() == pytest.approx(expected, abs=1e-6)


def test_bytes_and_floats_give_the_same_figures() -> None:
    a, b = noisy_pair(2, 24, 30)
    torch.testing.assert_close(psnr(a / 255, b / 255), psnr(a, b), atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(a / 255, b / 255), ssim(a, b), atol=1e-6, rtol=0)


def test_an_image_against_itself_is_infinitely_near() -> None:
    a, b = noisy_pair(2, 16, 16)
    b[0] = a[0]
    assert psnr(a, b).isinf().tolist() == [True, False]
    assert ssim(a, b)[0].item() == pytest.approx(1)


def test_shapes_that_cannot_be_compared_are_refused() -> None:
    a, _ = noisy_pair(1, 16, 16)
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, a[..., :15])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(a[..., :10], a[..., :10])


def test_images_match_by_name_whatever_their_suffix() -> None:
    pairs = match(["a/1.png", "a/2.png", "b/1.jpg"], ["a/1.webp", "b/1.png", "c.png"])
    assert pairs.indices == [(0, 0), (2, 1)]
    assert pairs.unpaired == (["a/2.png"], ["c.png"])


def test_names_that_only_their_suffixes_tell_apart_keep_them() -> None:
    assert match(["a.jpg", "a.png"], ["a.jpg.png", "a.png.png"]).indices == [(0, 0), (1, 1)]
    assert match(["a.jpg", "a.png"], ["a.jpg", "a.png"]).indices == [(0, 0), (1, 1)]


def test_names_that_make_no_pairs_are_refused() -> None:
    with pytest.raises(BadRequestError, match=r"no image.*a.png, the second b.png"):
        match(["a.png"], ["b.png"])


def test_images_too_small_for_a_metric_do_not_count_for_it() -> None:
    small, large = torch.stack(noisy_pair(2, 8, 8), dim=1), torch.stack(noisy_pair(3, 16, 16), dim=1)
    metrics = load_scorers({"psnr", "ssim"}, None, CPU)
    scores = score_pairs(metrics, [(torch.arange(2), small), (torch.arange(3), large)], CPU)
    assert {key: len(values) for key, values in scores.items()} == {"psnr": 5, "ssim": 3}


def test_scores_keep_their_pairs_apart() -> None:
    images = torch.stack(noisy_pair(4, 16, 16), dim=1)
    first = PairScorer("first", "", 1, lambda a, b: a.double().mean(dim=(1, 2, 3)))
    whole = score_pairs([first], [(torch.arange(4), images)], CPU)
    assert score_pairs([first], [(torch.arange(1), image[None]) for image in images], CPU) == whole
