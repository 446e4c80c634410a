"""The discriminator in training: when it is trained, when its loss reaches the decoder, and whether it is of use."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor, nn

from movq_cli import devices
from movq_cli.doctor.rules.adversary import INFORMATIVE
from movq_cli.models import augmentation
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.training import losses
from movq_cli.training.log import DeviceMetrics
from movq_cli.training.logit_averages import LogitAverages
from movq_cli.training.trainable import Stateful, Trainable
from movq_cli.training_settings import TrainVQSettings


class _Pass(IntEnum):
    """The passes of a step through the discriminator, each of which has augmentations of its own."""

    DECODER = 0
    ORIGINALS = 1
    RECONSTRUCTIONS = 2


class Adversary:
    """The discriminator and the adversarial loss of a tokenizer's training.

    Args:
        discriminator: Discriminator with its optimizer.
        settings: Settings of the training.
        start: Index of the first step with the adversarial loss.
        device: Device of the models.
    """

    def __init__(
        self,
        discriminator: Trainable[PatchDiscriminator],
        settings: TrainVQSettings,
        start: int,
        device: torch.device,
    ) -> None:
        self.discriminator = discriminator
        self.settings = settings
        self.start = start
        self.device = device
        self.averages: LogitAverages | None = None
        """Averages of the logits; None without LeCam regularization."""
        if settings.lecam_weight > 0:
            self.averages = LogitAverages(discriminator.ranks).to(device)
        self._step = 0
        self._numbers: Tensor | None = None

    def parts(self) -> dict[str, Stateful]:
        """Return the state of the discriminator's training by name."""
        parts: dict[str, Stateful] = {"discriminator": self.discriminator}
        return parts if self.averages is None else {**parts, "lecam": self.averages}

    @property
    def first_step(self) -> int:
        """Index of the first step in which the discriminator is trained."""
        return max(0, self.start - self.settings.discriminator_warmup)

    def ramp(self, step: int) -> float:
        """Return the factor on the weight of the adversarial term at a step, in [0, 1]; 0 before its start."""
        return min(1.0, max(0, step - self.start + 1) / max(1, self.settings.discriminator_ramp))

    def begin(self, step: int) -> None:
        """Begin the step of this index: delete the gradients of the step before it, and draw the augmentations."""
        self._step = step
        self.discriminator.clear()
        if self.settings.discriminator_augmentation:
            # Every rank draws the numbers of the complete batch, so that they depend neither on the number of ranks nor
            # on the number of parts.
            size = (len(_Pass), self.settings.batch_size, augmentation.NUMBERS)
            self._numbers = torch.rand(size, device=self.device)

    def gradient(
        self, images: Tensor, features: Tensor, last: nn.Conv2d, image_gradient: Tensor, part: int = 0
    ) -> tuple[Tensor, DeviceMetrics]:
        """Return the weighted gradient of the adversarial loss at the images, and the metrics of that loss.

        Args:
            images: Reconstructions [B, 3, H, W], which require a gradient.
            features: Input of the decoder's last layer, [B, C, H, W].
            last: The decoder's last layer.
            image_gradient: Gradient of the reconstruction loss at the images, [B, 3, H, W].
            part: Index of the part of the batch.
        """
        model = self.discriminator.model
        model.requires_grad_(False)
        with devices.autocast(self.device, self.settings.precision):
            logits = model(self._augmented(images, _Pass.DECODER, part))
        model.requires_grad_(True)
        generator = losses.generator_hinge(logits.float())
        (adversarial,) = torch.autograd.grad(generator, images)
        limit, ranks = self.settings.adaptive_weight_limit, self.discriminator.ranks
        weight = losses.adaptive_weight(features, last, image_gradient, adversarial, limit, ranks)
        metrics = {"generator": generator, "adaptive_weight": weight}
        return self.settings.adversarial_weight * weight * adversarial, metrics

    def backward(self, originals: Tensor, images: Tensor, share: float, part: int = 0) -> DeviceMetrics:
        """Add the discriminator's gradients on the originals and on the reconstructions of a step.

        Args:
            originals: Original images [B, 3, H, W] in [-1, 1].
            images: Their reconstructions, detached.
            share: Factor on the loss: the share of these images in the batch.
            part: Index of the part of the batch.
        """
        augmented = self._augmented(originals, _Pass.ORIGINALS, part)
        with devices.autocast(self.device, self.settings.precision):
            real = self.discriminator.forward(augmented)
            fake = self.discriminator.forward(self._augmented(images, _Pass.RECONSTRUCTIONS, part))
        real, fake = real.float(), fake.float()
        hinge = loss = losses.discriminator_hinge(real, fake)
        metrics = {"discriminator": hinge, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.averages is not None:
            metrics["lecam"] = losses.lecam(real, fake, self.averages.real, self.averages.fake)
            loss = loss + self.settings.lecam_weight * metrics["lecam"]
        if self.settings.r1_weight > 0 and self._step % self.settings.r1_every == 0:
            metrics["r1"] = self._gradient_penalty(originals, part)
            loss = loss + self.settings.r1_weight / 2 * self.settings.r1_every * metrics["r1"]
        (share * loss).backward()
        return metrics

    def _gradient_penalty(self, originals: Tensor, part: int) -> Tensor:
        """Return the penalty R1 without its weight, computed in float32.

        The forward pass is that of the model itself: a compiled model has no second derivative.
        """
        images = originals.detach().requires_grad_()
        logits = self.discriminator.model.forward(self._augmented(images, _Pass.ORIGINALS, part))
        return losses.gradient_penalty(logits, images)

    def _augmented(self, images: Tensor, use: _Pass, part: int) -> Tensor:
        """Return the images of a part of the batch as one of the passes of a step sees them."""
        if self._numbers is None:
            return images
        own = self._numbers[use, self.discriminator.ranks.share(self.settings.batch_size)]
        numbers = own.chunk(self.settings.accumulate)[part]
        return augmentation.augment(images, self.settings.discriminator_augmentation, numbers)

    def update(self, step: int, metrics: DeviceMetrics, is_finite: Tensor) -> None:
        """Update the discriminator, and the averages of its logits.

        Args:
            step: Index of the step.
            metrics: Metrics of the step.
            is_finite: Scalar float32; with 0 nothing is updated.
        """
        self.discriminator.update(step, is_finite)
        if self.averages is not None:
            self.averages.update(metrics["logits_real"], metrics["logits_fake"], is_finite)

    def event(self, step: int) -> str | None:
        """Return that the discriminator's training or the adversarial loss begins at the step of this index."""
        if step == self.start:
            ramp = self.settings.discriminator_ramp
            return "the adversarial loss begins" + (f", and has its full weight {ramp} steps later" if ramp else "")
        if step == self.first_step:
            return f"the discriminator's training begins, {self.start - step} steps before its loss"
        return None

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """Return a warning if the discriminator no longer distinguishes reconstructions from images.

        Args:
            step: Number of steps done.
            means: Means of the metrics since the last log line.
        """
        settled = self.start + self.settings.discriminator_ramp + self.settings.log_every
        real, fake = means.get("logits_real"), means.get("logits_fake")
        if real is None or fake is None or step < settled or real - fake >= INFORMATIVE:
            return None
        return (
            f"the discriminator does not distinguish reconstructions from images: its mean logits are {real:.2f} for "
            f"images and {fake:.2f} for reconstructions. Its loss then only adds noise. Go on from a checkpoint before "
            "it (--from RUN@STEP) with a longer discriminator_warmup, a higher discriminator_learning_rate, or a lower "
            "adversarial_weight and an adaptive_weight_limit of 1."
        )
