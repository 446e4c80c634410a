"""One training step of stage 1: equation 3 with VQGAN's perceptual and adversarial terms, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from movq_cli import checkpoints, devices
from movq_cli.data import loader, pixels
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet
from movq_cli.metrics import extractors, paired
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.models.tokenizer import Reconstruction, Tokenizer
from movq_cli.runs import Run
from movq_cli.settings import Preset, TrainVQSettings
from movq_cli.training import losses
from movq_cli.training.loop import Metrics, ModelT, Stateful, Trainable

_PICTURES = 8
"""Validation images in a run's pictures."""


class TokenizerTraining:
    """Stage 1 being trained: the tokenizer, its discriminator, and their optimisers.

    Args:
        preset: The settings.
        images: The prepared set.
        device: Where.
        weights: Folder with VGG's weights, for the perceptual loss; None = torch hub's.
    """

    settings: TrainVQSettings

    def __init__(self, preset: Preset, images: PreparedSet, device: torch.device, weights: Path | None = None) -> None:
        self.preset = preset
        self.settings = settings = preset.train_vq
        self.device = device
        self.side = preset.vq.resolution
        self.training_split = images.split("train")
        self.validation_split = images.split("val")
        loader.check_side(images.manifest.min_side, self.side, preset.data.path)
        self.order = EpochOrder(len(self.training_split), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(self.training_split))
        self.discriminator_start = settings.discriminator_step(self.steps, self.order.steps_per_epoch)
        self.perceptual = extractors.load_lpips("vgg", weights, device) if settings.perceptual_weight > 0 else None
        torch.manual_seed(settings.seed)
        self.tokenizer = self._trainable(Tokenizer(preset.vq))
        self.model = self.tokenizer.model
        self.discriminator: Trainable[PatchDiscriminator] | None = None
        if settings.adversarial_weight > 0:
            judge = PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
            self.discriminator = self._trainable(judge, average=False)
        self.uses = CodebookHealth(1, preset.vq.codebook_size).to(device)

    def _trainable(self, model: ModelT, *, average: bool = True) -> Trainable[ModelT]:
        model = model.to(self.device).to(memory_format=_memory_format(self.device))
        settings = self.settings
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=settings.betas, fused=True)
        return Trainable(model, optimizer, settings, self.steps, average=average)

    def batches(self, start: int) -> Iterator[Tensor]:
        """uint8 images [B, 3, H, W] from a step on."""
        return loader.training_batches(
            self.training_split,
            self.order,
            self.preset.data,
            side=self.side,
            seed=self.settings.seed,
            start=start,
            device=self.device,
        )

    def step(self, batch: Tensor, step: int) -> Metrics:
        """Update the tokenizer, then the discriminator, from one forward pass of the tokenizer."""
        originals = pixels.to_signed(batch).contiguous(memory_format=_memory_format(self.device))
        self.model.train()
        with devices.autocast(self.device, self.settings.precision):
            out = self.model(originals)
        # The losses see a leaf: their gradients at the images are summed first and passed back through the decoder
        # once, where the adaptive weight as first written needs three passes.
        images = out.images.detach().requires_grad_()
        loss = losses.reconstruction(images, originals, self.settings, self.perceptual)
        (gradient,) = torch.autograd.grad(loss.total, images)
        metrics = {"l1": loss.l1, "l2": loss.l2, "perceptual": loss.perceptual}
        judge = self.discriminator if step >= self.discriminator_start else None
        if judge is not None:
            pull, more = self._adversarial_gradient(judge.model, images, out.features, gradient)
            gradient = gradient + self._ramp(step) * pull
            metrics |= more
        codes_loss = (
            self.settings.codebook_weight * out.codebook_loss + self.settings.commitment_weight * out.commitment_loss
        )
        self.tokenizer.update(lambda: torch.autograd.backward([out.images, codes_loss], [gradient, None]))
        self._revive(out, step)
        if judge is not None:
            metrics |= self._discriminator_step(judge, originals, images.detach())
        metrics |= {"codebook": out.codebook_loss, "loss": loss.total + codes_loss}
        return {name: value.detach() for name, value in metrics.items()}

    def _adversarial_gradient(
        self, judge: PatchDiscriminator, images: Tensor, features: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The weighted gradient of the adversarial loss at the images."""
        judge.requires_grad_(False)
        with devices.autocast(self.device, self.settings.precision):
            logits = judge(images)
        judge.requires_grad_(True)
        generator = losses.generator_hinge(logits.float())
        (pull,) = torch.autograd.grad(generator, images)
        weight = losses.adaptive_weight(features, self.model.decoder.conv_out, gradient, pull)
        metrics = {"generator": generator, "adaptive_weight": weight}
        return self.settings.adversarial_weight * weight * pull, metrics

    def _ramp(self, step: int) -> float:
        """The share of its weight that the adversarial term has at a step, in (0, 1]."""
        return min(1.0, (step - self.discriminator_start + 1) / max(1, self.settings.discriminator_ramp))

    def _discriminator_step(self, judge: Trainable[PatchDiscriminator], originals: Tensor, images: Tensor) -> Metrics:
        """Update the discriminator on originals and on the reconstructions that this step made."""
        with devices.autocast(self.device, self.settings.precision):
            real, fake = judge.model(originals), judge.model(images)
        loss = losses.discriminator_hinge(real.float(), fake.float())
        judge.update(loss.backward)
        return {"discriminator": loss, "logits_real": real.float().mean(), "logits_fake": fake.float().mean()}

    def _revive(self, out: Reconstruction, step: int) -> None:
        """Count the entries' uses; at intervals bring the unused ones back and forget their averages."""
        every = self.settings.revive_every
        if every == 0:
            return
        self.uses.update(out.codes.flatten()[:, None])
        if (step + 1) % every:
            return
        dead = (self.uses.counts == 0).T
        self.model.quantize.revive(dead, out.encoded.detach())
        entries = self.model.quantize.embedding.weight
        for name in ("exp_avg", "exp_avg_sq"):
            self.tokenizer.optimizer.state[entries][name].masked_fill_(dead, 0.0)
        average = self.tokenizer.exported.quantize.embedding.weight.data
        average.copy_(torch.where(dead, entries.data, average))
        self.uses.counts.zero_()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """PSNR (dB), SSIM, codebook usage (share of entries) and perplexity over the validation split."""
        health = CodebookHealth(self.preset.vq.chunks, self.preset.vq.codebook_size).to(self.device)
        psnr: list[Tensor] = []
        ssim: list[Tensor] = []
        size = self.settings.batch_size
        for batch in loader.validation_batches(
            self.validation_split, side=self.side, batch_size=size, device=self.device
        ):
            codes, reconstructed = self._reconstruct(batch)
            health.update(codes)
            psnr.append(paired.psnr(reconstructed, batch))
            if self.side >= paired.SSIM_WINDOW:
                ssim.append(paired.ssim(reconstructed, batch))
        means = {
            name: paired.finite_mean(torch.cat(scores)) for name, scores in (("psnr", psnr), ("ssim", ssim)) if scores
        }
        figures = {name: mean for name, mean in means.items() if mean is not None}
        return figures | {"usage": health.usage()[0], "perplexity": health.perplexity()[0]}

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Originals over reconstructions."""
        chosen = pixels.spread(len(self.validation_split), _PICTURES)
        originals = loader.center_crops(self.validation_split, chosen, side=self.side, device=self.device)
        _, reconstructed = self._reconstruct(originals)
        both = torch.cat([originals, reconstructed])
        pixels.save_grid(run.picture(step), both, len(originals), pixels.grid_scale(self.side))

    def _reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and images as uint8, of uint8 images."""
        model = self.tokenizer.exported
        with devices.autocast(self.device, self.settings.precision):
            codes = model.encode(pixels.to_signed(batch))
            return codes, pixels.to_bytes(model.decode(codes))

    def parts(self) -> dict[str, Stateful]:
        """Both models with their optimisers, and the codebook's uses."""
        parts: dict[str, Stateful] = {"tokenizer": self.tokenizer, "uses": self.uses}
        return parts if self.discriminator is None else {**parts, "discriminator": self.discriminator}

    def export(self, run: Run) -> None:
        """The tokenizer's weights with its settings."""
        checkpoints.save_weights(run.weights, self.tokenizer.exported, checkpoints.TokenizerHeader(vq=self.preset.vq))


def _memory_format(device: torch.device) -> torch.memory_format:
    # Convolutions on CUDA want channels last; on the CPU, at our widths, it took twice as long.
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
