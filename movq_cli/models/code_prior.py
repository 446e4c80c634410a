"""The interface of a prior: everything that the commands and the training ask of it, whatever its mode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.models.transformer import CodeTransformer
from movq_cli.setting_types import MaskSchedule
from movq_cli.settings import PriorSettings, SampleSettings
from movq_cli.training_settings import TrainPriorSettings


class CodePrior(CodeTransformer):
    """A distribution over the codes of images that can be trained and sampled.

    A mode is a subclass that is registered in `priors.PRIORS`.
    """

    run_suffix: ClassVar[str]
    """End of the name of a run folder, `runs/PRESET-SUFFIX`, so that a preset's priors have folders of their own."""
    decoding: ClassVar[str]
    """How `decode` works, as the end of a sentence that begins with "this prior"; messages quote it."""
    label_smoothing: ClassVar[float] = 0.0
    """Label smoothing in training, in [0, 1), unless the settings give one."""
    unused_sample_settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of SampleSettings that `decode` does not use: as options they are refused, and no manifest has them."""
    unused_training_settings: ClassVar[frozenset[str]] = frozenset()
    """Fields of TrainPriorSettings that only other modes use: `-o` with one of them is refused."""
    fills_hidden_codes: ClassVar[bool] = False
    """Whether a code is predicted from visible codes anywhere in the image, which in-painting needs."""

    @classmethod
    def check_settings(cls, settings: PriorSettings) -> None:
        """Check the settings of the architecture beyond what all modes need.

        Raises:
            BadRequestError: This mode cannot be built with these settings.
        """

    @classmethod
    def check_training_settings(cls, settings: TrainPriorSettings) -> None:
        """Check settings of the training before it begins.

        Raises:
            BadRequestError: This mode cannot be trained with these settings.
        """
        if settings.random_order is not None and "random_order" in cls.unused_training_settings:
            raise BadRequestError(
                f"train_prior.random_order has no meaning for this prior, which {cls.decoding}: it permutes the order "
                "of mode auto",
                "Set -o prior.mode=auto or -o train_prior.random_order=null.",
            )

    @classmethod
    def check_sample_settings(cls, settings: SampleSettings) -> None:
        """Check settings before the first image is sampled with them.

        Raises:
            BadRequestError: `decode` cannot work with these settings.
        """

    @abstractmethod
    def forward(self, codes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the logits of every code.

        Args:
            codes: Codes, [B, h, w, c] int64 in [0, K]; K is an unknown code.
            classes: Class ids, [B] int64 in [0, classes), or `no_class`; None for an unconditional prior.

        Returns:
            [B, h, w, c, K] in the precision of autocast.
        """

    def prepare_training(self, settings: TrainPriorSettings) -> None:
        """Add the parameters that only a training with these settings needs; without any, do nothing."""

    def for_inference(self) -> CodePrior:
        """Return the prior without the parameters of `prepare_training`, which gives the same codes."""
        return self

    @abstractmethod
    def targets(self, images: int, generator: torch.Generator, schedule: MaskSchedule = "cosine") -> Tensor:
        """Draw the codes that a training step or a validation predicts.

        Args:
            images: Number of images, B.
            generator: Generator on the device of the model.
            schedule: Schedule of the share of masked codes, if the mode has such a share.

        Returns:
            [B, h, w, c] bool, on the device of the generator.
        """

    @abstractmethod
    def inputs(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Return the codes [B, h, w, c] that `forward` gets when the targets are predicted."""

    @abstractmethod
    def decode(
        self,
        seeds: Sequence[int],
        classes: Tensor | None,
        settings: SampleSettings,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw the codes of images.

        Args:
            seeds: Seeds of the B images, each in [0, 2^32). An image depends on its own seed and class alone.
            classes: Class ids, [B] int64 in [0, classes), or `no_class`; None for an unconditional prior.
            settings: Settings of the sampler.
            known: Codes that are given, [B, h, w, c] int64 in [0, K], where K is a code to be drawn. None draws all.

        Returns:
            [B, h, w, c] int64 in [0, K).
        """

    def manifest_entries(self, settings: SampleSettings) -> dict[str, Any]:
        """Return what a sample manifest says of the decoding beside the settings."""
        return {}

    def validation_metrics(self, loss: float, loss_by_target_share: Sequence[float]) -> Mapping[str, Any]:
        """Return the validation metrics that only this mode has.

        Args:
            loss: Cross-entropy of the predicted codes, in nats a code.
            loss_by_target_share: The same for images grouped by the share of their codes that is predicted, in equal
                intervals of (0, 1]; 0 for an interval without images.
        """
        return {}
