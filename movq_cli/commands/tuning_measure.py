"""The measurement of one trial of `movq sample --tune`: images are sampled, and compared with the real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from movq_cli import runs
from movq_cli.api import Prior
from movq_cli.commands.sample import SampleRequest
from movq_cli.commands.tuning_objectives import Metrics, Objective
from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors, references
from movq_cli.evaluation.feature_cache import Extractor
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metrics import PrecisionRecall
from movq_cli.evaluation.precision_evaluator import PrecisionEvaluator
from movq_cli.files import cache_folder, sha256
from movq_cli.image_size import Resolution
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.settings import SampleSettings

_FID_REFERENCES = 50_000
"""Number of real images of the FID, at most, as for the FID during training."""


@dataclass(frozen=True)
class Evaluator:
    """Measures images against the real ones."""

    measure: Callable[[Iterable[Tensor]], Metrics]
    """Function that returns the metrics of images, uint8 [B, 3, H, W] on the device."""
    inception: Extractor
    real: str
    """SHA-256 of the real images and their crop, or of the file of their statistics."""


@dataclass
class Measure:
    """Samples images with settings, and measures their metrics and the time.

    Args:
        prior: The prior.
        class_ids: Indices of the classes that the images take in turn; empty for an unconditional prior.
        request: Number of images, seed and batch size.
        evaluator: Evaluator against the real images.
        device: Device of the prior.
    """

    prior: Prior
    class_ids: Sequence[int]
    request: SampleRequest
    evaluator: Evaluator
    device: torch.device
    _seconds: float = field(init=False, default=0.0)

    def __call__(self, settings: SampleSettings, first: int = 0) -> tuple[Metrics, float]:
        """Return the metrics of images, and the seconds that sampling one of them took.

        Args:
            settings: Settings of sampling.
            first: Index of the first image.
        """
        self._seconds = 0.0
        metrics = self.evaluator.measure(self._images(settings, first))
        return metrics, self._seconds / self.request.n

    def warm_up(self, settings: SampleSettings) -> None:
        """Sample one batch, whose time is not representative."""
        next(iter(self._images(settings, 0)))

    def _images(self, settings: SampleSettings, first: int) -> Iterator[Tensor]:
        count, size = self.request.n, self.request.batch_size
        for start in range(first, first + count, size):
            began = time.perf_counter()
            indices = range(start, min(start + size, first + count))
            drawn = self.prior.sample(
                seed=self.request.seed, classes=self.class_ids, settings=settings, indices=indices
            )
            batch = pixels.to_bytes(drawn)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds += time.perf_counter() - began
            yield batch


@dataclass(frozen=True)
class RealImages:
    """The real images with which samples are compared."""

    location: str
    split: Literal["train", "val"] | None

    @classmethod
    def of(cls, against: str | None, split: Literal["train", "val"], weights: Path) -> RealImages:
        """Return the requested set, or the prepared set of the run.

        Args:
            against: Location of the real images or of their statistics; None = the prepared set of the run.
            split: Split of a prepared set.
            weights: Weight file of the prior.

        Raises:
            BadRequestError: No set is named, and the run folder does not tell one.
        """
        if against is not None:
            return cls(against, split)
        try:
            data = runs.Run(weights.parent, "prior").read().settings.data.path
        except BadRequestError:
            data = None
        if data is None or not Path(data).is_dir():
            where = f"at {data}" if data is not None else "in the manifest of the run"
            raise BadRequestError(f"the prepared set of {weights.parent} is not {where}", "Name it: --against SET.")
        return cls(str(data), split)

    def evaluator(
        self, objective: Objective, size: Resolution, weights: Path | None, device: torch.device, console: Console
    ) -> Evaluator:
        """Return what measures the metrics of an objective against these images, whose features are cached.

        Args:
            objective: What is searched for.
            size: Size of the sampled images.
            weights: Folder that is searched for Inception's weights before torch hub's; None searches torch hub's.
            device: Device that runs Inception.
            console: Console for progress.

        Raises:
            BadRequestError: The weights are missing, there are too few images, or statistics in place of the images
                that precision and recall need.
        """
        reference = references.find_reference(self.location, cache_folder())
        if "fid" not in objective.names:
            if reference is not None and not references.has_images(reference):
                raise BadRequestError(
                    f"precision and recall need real images, and {reference.path} holds their statistics",
                    "Name a set of images: --against SET.",
                )
            images = self._images(size, PrecisionRecall.references, console)
            precision = PrecisionEvaluator.of(images, cache_folder(), weights, device, console)
            real = images.content_hash
            return Evaluator(lambda batches: precision.precision_recall(batches)._asdict(), precision.inception, real)
        if reference is None:
            images = self._images(size, _FID_REFERENCES, console)
            fid = FIDEvaluator.of(images, cache_folder(), weights, device, SINGLE_PROCESS, console)
            real = images.content_hash
        else:
            inception = extractors.load_inception(weights, device)
            references.warn_of_other_weights(reference, inception, console)
            console.log(f"real images: the statistics {reference.path}")
            fid = FIDEvaluator(inception, reference.on(torch.device("cpu")), device, SINGLE_PROCESS)
            real = sha256(reference.path)
        return Evaluator(lambda batches: {"fid": fid.fid(batches)}, fid.inception, real)

    def _images(self, size: Resolution, limit: int | None, console: Console) -> ImageSet:
        images = ImageSet("real", self.location, self.split or "train", crop=size, limit=limit, console=console)
        reason = ", as published FIDs of samples use" if images.split == "train" else ""
        split = "" if images.split is None else f" of the split {images.split}{reason}"
        console.log(f"real images: {len(images)}{split} in {self.location}")
        return images
