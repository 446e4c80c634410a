"""The time of a training: real steps on random data are measured on this device, and fitted into a number of hours.

The arithmetic of a step does not give its time: on the same CPU, one model reaches 5% of the rate of a large matrix
product, and another one 90%. So a few steps of the real models are measured, which takes seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from movq_cli import devices
from movq_cli.data.code_cache import CodeCache, CodeCacheHeader
from movq_cli.data.shards import DatasetManifest, PreparedSet, Split, SplitName
from movq_cli.evaluation import extractors
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.pretrained import is_available
from movq_cli.image_size import ImageSize
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.settings import CodeShape, Preset
from movq_cli.training.prior import PriorTraining
from movq_cli.training.stage import Stage
from movq_cli.training.vq import TokenizerTraining
from movq_cli.training.watch import UNWATCHED
from movq_cli.training_settings import TrainSettings, TrainVQSettings

_SECONDS_PER_STEP = 2.0
"""Longest measured step on the CPU. The time of a longer one is that of fewer images, times the ratio."""

_SECONDS = 3.0
"""Time for the measured steps of one kind, unless fewer than `_STEPS` have been made."""

_STEPS, _MOST_STEPS = 3, 20
"""Smallest and largest number of measured steps of one kind."""

_FEW, _EVALUATED = 4, 16
"""Numbers of images of two measured evaluations: the former, and their difference. A part of the time is the same for
any number of images."""

_SettingsT = TypeVar("_SettingsT", bound=TrainSettings)

_DISCRIMINATOR_START = 1
"""First step with the adversarial loss in a measured training."""


class Pace(NamedTuple):
    """The time that the parts of a training take, in seconds."""

    step: float
    """Time of a step; in stage 1 of a step without the discriminator."""
    adversarial_step: float
    """Time of a step with the discriminator; equal to `step` where there is none."""
    validation: float
    """Time of a validation."""
    evaluation: float = 0.0
    """Time of an evaluation of FID; 0 if there are none."""

    def seconds(self, train: TrainSettings, steps: int, steps_per_epoch: int) -> float:
        """Return the time of a complete training.

        It does not include checkpoints and the exchange of gradients between ranks. The measured steps are not
        compiled, and a long training on CUDA is, which makes it faster.

        Args:
            train: Training settings, of which the length is not used.
            steps: Number of steps.
            steps_per_epoch: Number of steps of one pass over the training images.
        """
        before = steps
        if isinstance(train, TrainVQSettings):
            first = train.discriminator_step(steps, steps_per_epoch) - train.discriminator_warmup
            before = min(steps, max(0, first))
        # With a running average, the first validation is one of the raw weights too.
        validations = math.ceil(steps / train.validate_every) + (train.ema_decay > 0)
        interval = train.evaluation_interval(has_weights=self.evaluation > 0)
        evaluations = math.ceil(steps / interval) if interval else 0
        training = before * self.step + (steps - before) * self.adversarial_step
        return training + validations * self.validation + evaluations * self.evaluation

    def steps(self, train: TrainSettings, seconds: float, steps_per_epoch: int) -> int:
        """Return the largest number of steps that takes at most this time; at least 1.

        Args:
            train: Training settings, of which the length is not used.
            seconds: Time for the complete training.
            steps_per_epoch: Number of steps of one pass over the training images.
        """
        fits, too_many = 1, 2 + int(seconds / min(self.step, self.adversarial_step))
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.seconds(train, middle, steps_per_epoch) <= seconds:
                fits = middle
            else:
                too_many = middle
        return fits


def of_tokenizer(
    settings: Preset, device: torch.device, *, validation_images: int, weights: Path | None, ranks: int = 1
) -> Pace:
    """Measure the training of stage 1 on random images.

    Args:
        settings: Settings of the tokenizer and of its training.
        device: Device of the training.
        validation_images: Number of validation images.
        weights: Folder with the weights of LPIPS; without them the network of the loss has random weights, and
            validation is measured without LPIPS, as it will be.
        ranks: Number of ranks that share each batch and each validation; the exchange between them is not measured.
    """
    train = settings.train_vq
    share = _part_size(train, ranks)
    changes = {"discriminator_start": _DISCRIMINATOR_START, "discriminator_warmup": 0, "discriminator_ramp": 0}
    # The network of the loss is added below, with random weights: its cost is the same, and nothing is downloaded.
    image_size, count = settings.vq.image_size, max(1, min(share, validation_images))
    own = _for_measurement(train, share, count).model_copy(update={**changes, "perceptual_weight": 0.0})
    images = _RandomSet.of(image_size, {"train": share, "val": max(count, _FEW + _EVALUATED)})
    stage = TokenizerTraining(settings.model_copy(update={"train_vq": own}), images, device, weights)
    if train.perceptual_weight > 0:
        stage.perceptual = extractors.untrained_lpips("vgg", device)
        stage.settings = own.model_copy(update={"perceptual_weight": train.perceptual_weight})

    settings_of_parts = stage.settings

    def step(size: int, number: int) -> None:
        stage.settings = settings_of_parts.model_copy(update={"batch_size": size})
        if stage.adversary is not None:
            stage.adversary.settings = stage.settings
        stage.step(torch.randint(0, 256, (size, 3, *image_size), dtype=torch.uint8, device=device), number)

    size, seconds = _measure_steps(device, partial(step, number=0), share)
    adversarial = seconds
    if train.adversarial_weight > 0:
        _, adversarial = _measure_steps(device, partial(step, number=_DISCRIMINATOR_START), size)
    stage.settings = settings_of_parts
    return Pace(
        train.accumulate * seconds * share / size,
        train.accumulate * adversarial * share / size,
        _validation_seconds(stage, min(validation_images, train.validate_images or validation_images) / ranks / count),
        _evaluation_seconds(stage, train, validation_images, weights, ranks),
    )


def of_prior(
    settings: Preset, device: torch.device, *, validation_images: int, weights: Path | None, ranks: int = 1
) -> Pace:
    """Measure the training of stage 2 on random codes.

    Args:
        settings: Settings of the prior, of the tokenizer whose codes it models, and of its training.
        device: Device of the training.
        validation_images: Number of validation images.
        weights: Folder with the weights of Inception, for FID.
        ranks: Number of ranks that share each batch and each validation; the exchange between them is not measured.
    """
    train, shape, classes = settings.train_prior, settings.vq.code_shape, settings.prior.classes
    share = _part_size(train, ranks)
    count = max(1, min(share, validation_images))
    own = _for_measurement(train, share, count)
    tokenizer = Tokenizer(settings.vq).to(device)
    training, validation = (_RandomCodes(shape, number, classes) for number in (share, count))
    changed = settings.model_copy(update={"train_prior": own})
    stage = PriorTraining(changed, training, validation, tokenizer, "", device)

    def step(size: int) -> None:
        codes = torch.randint(0, shape.codebook_size, (size, *shape.size), device=device)
        labels = torch.randint(0, classes, (size,), device=device) if classes else None
        stage.settings = own.model_copy(update={"batch_size": size})
        stage.step((codes, labels), 0)

    size, seconds = _measure_steps(device, step, share)
    whole = train.accumulate * seconds * share / size
    stage.settings = own
    validated = min(validation_images, train.validate_images or validation_images)
    return Pace(
        whole,
        whole,
        _validation_seconds(stage, validated / ranks / count),
        _evaluation_seconds(stage, train, train.evaluate_images, weights, ranks),
    )


def _part_size(train: TrainSettings, ranks: int) -> int:
    """Return the number of images in one pass of a rank."""
    return max(1, train.batch_size // ranks // train.accumulate)


def _for_measurement(train: _SettingsT, size: int, validated: int) -> _SettingsT:
    """Return the settings of a training whose batch is one part of the real one, and which validates a few images.

    Its models are not compiled: compilation takes far longer than the measured steps.
    """
    length = {"batch_size": size, "accumulate": 1, "epochs": None, "steps": 1000, "compile": False}
    return train.model_copy(
        update={**length, "validate_images": validated, "evaluate_every": 0, "evaluate_images": 2, "best_by": None}
    )


def _measure_steps(device: torch.device, step: Callable[[int], object], most: int) -> tuple[int, float]:
    """Return the number of images of the measured steps, and the median of their times in seconds.

    Args:
        device: Device of the steps.
        step: Function that makes a step with a number of images.
        most: Number of images of a real step; fewer are measured if a step would take too long.
    """
    size = most
    if device.type == "cpu" and most > 1:
        step(1)  # The first step allocates memory, and libraries choose their algorithms.
        size = max(1, min(most, int(_SECONDS_PER_STEP / devices.seconds(partial(step, 1), device))))
    if size > 1:
        step(size)
    times: list[float] = []
    while len(times) < _STEPS or (sum(times) < _SECONDS and len(times) < _MOST_STEPS):
        times.append(devices.seconds(partial(step, size), device))
    return size, statistics.median(times)


def _validation_seconds(stage: Stage, ratio: float) -> float:
    """Return the time of a validation.

    Args:
        stage: Training with some validation images.
        ratio: Number of images that a rank validates, divided by the number of those.
    """
    stage.validate(UNWATCHED)
    return ratio * devices.seconds(partial(stage.validate, UNWATCHED), stage.device)


def _evaluation_seconds(
    stage: TokenizerTraining | PriorTraining, train: TrainSettings, images: int, weights: Path | None, ranks: int
) -> float:
    """Return the time of an evaluation of FID; 0 if the training has none.

    Args:
        stage: Training on random data.
        train: Settings of the real training.
        images: Number of images that there are to evaluate.
        weights: Folder with the weights of Inception.
        ranks: Number of ranks that share the images.
    """
    if not train.evaluation_interval(has_weights=is_available("inception", weights)):
        return 0.0
    inception = extractors.load_inception(weights, stage.device)
    width = inception.width
    real = torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    stage.fid_evaluator = FIDEvaluator(inception, real, stage.device, SINGLE_PROCESS)
    before, times = stage.settings, []
    for count in (_FEW, _FEW + _EVALUATED):
        stage.settings = before.model_copy(update={"evaluate_images": count})
        times.append(devices.seconds(partial(stage.evaluate, UNWATCHED), stage.device))
    of_image = max(0.0, times[1] - times[0]) / _EVALUATED
    return times[0] + of_image * max(0, min(images, train.evaluate_images) / ranks - _FEW)


@dataclass(frozen=True, eq=False)
class _RandomSplit(Split):
    """A split of random images of one size, without files."""

    size: ImageSize = field(default=ImageSize(1, 1))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return random pixels, uint8 [H, W, 3]."""
        return np.random.default_rng(index).integers(0, 256, (*self.size, 3), np.uint8)


class _RandomSet(PreparedSet):
    """A prepared set of random images, without files."""

    @classmethod
    def of(cls, size: ImageSize, counts: dict[SplitName, int]) -> Self:
        """Return a set.

        Args:
            size: Size of the images.
            counts: Number of images of each split.
        """
        manifest = DatasetManifest(
            source="random",
            size=size.resolution,
            square=size.is_square,
            filter="none",
            upscale=False,
            background=(0, 0, 0),
            orientation=False,
            counts=counts,
            shards={},
            classes=(),
            min_side=min(size),
            max_side=max(size),
            rejects=0,
            hash="",
        )
        return cls(Path(), manifest)

    def split(self, name: SplitName) -> Split:
        """Return the split of this name."""
        extents = np.zeros((self.manifest.counts[name], 4), np.int64)
        return _RandomSplit((), (), None, extents, size=ImageSize.of(self.manifest.size or 1))


class _RandomCodes(CodeCache):
    """Random codes and labels in place of a code cache.

    Args:
        shape: Shape of the codes of one image.
        count: Number of images.
        classes: Number of classes; 0 = there are no labels.
    """

    def __init__(self, shape: CodeShape, count: int, classes: int) -> None:
        rng = np.random.default_rng(0)
        self.header = CodeCacheHeader(tokenizer="", data="", split="", views=count, classes=())
        self.codes = rng.integers(0, shape.codebook_size, (count, *shape.size)).astype(np.uint16)
        self.labels = rng.integers(0, classes, count) if classes else None
