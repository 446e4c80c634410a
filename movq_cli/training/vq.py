"""One training step of stage 1: equation 3 with VQGAN's perceptual and adversarial terms, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from movq_cli.training.loop import Metrics, averaged, learning_rate_schedule

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
        self.model = Tokenizer(preset.vq).to(device).to(memory_format=_memory_format(device))
        self.average = averaged(self.model, settings.ema_decay)
        self.optimizer, self.schedule = self._optimizer(self.model)
        self.uses = torch.zeros(preset.vq.codebook_size, dtype=torch.int64, device=device)
        self.discriminator: nn.Module | None = None
        if settings.adversarial_weight > 0:
            discriminator = PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
            self.discriminator = discriminator.to(device).to(memory_format=_memory_format(device))
            self.discriminator_optimizer, self.discriminator_schedule = self._optimizer(self.discriminator)

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
        adversarial = self.discriminator is not None and step >= self.discriminator_start
        if adversarial:
            pull, more = self._adversarial_gradient(images, out.features, gradient)
            gradient = gradient + self._ramp(step) * pull
            metrics |= more
        codes_loss = (
            self.settings.codebook_weight * out.codebook_loss + self.settings.commitment_weight * out.commitment_loss
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([out.images, codes_loss], [gradient, None])
        self._update(self.model, self.optimizer)
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._revive(out, step)
        if adversarial:
            metrics |= self._discriminator_step(originals, images.detach())
        metrics |= {"codebook": out.codebook_loss, "loss": loss.total + codes_loss}
        return {name: value.detach() for name, value in metrics.items()}

    def _adversarial_gradient(self, images: Tensor, features: Tensor, gradient: Tensor) -> tuple[Tensor, Metrics]:
        """The weighted gradient of the adversarial loss at the images."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with devices.autocast(self.device, self.settings.precision):
            logits = self.discriminator(images)
        self.discriminator.requires_grad_(True)
        generator = losses.generator_hinge(logits.float())
        (pull,) = torch.autograd.grad(generator, images)
        weight = losses.adaptive_weight(features, self.model.decoder.conv_out, gradient, pull)
        return self.settings.adversarial_weight * weight * pull, {
            "generator": generator,
            "adaptive_weight": weight,
        }

    def _ramp(self, step: int) -> float:
        """The share of its weight that the adversarial term has at a step, in (0, 1]."""
        return min(1.0, (step - self.discriminator_start + 1) / max(1, self.settings.discriminator_ramp))

    def _discriminator_step(self, originals: Tensor, images: Tensor) -> Metrics:
        """Update the discriminator on originals and on the reconstructions that this step made."""
        assert self.discriminator is not None
        with devices.autocast(self.device, self.settings.precision):
            real, fake = self.discriminator(originals), self.discriminator(images)
        loss = losses.discriminator_hinge(real.float(), fake.float())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._update(self.discriminator, self.discriminator_optimizer)
        self.discriminator_schedule.step()
        return {"discriminator": loss, "logits_real": real.float().mean(), "logits_fake": fake.float().mean()}

    def _revive(self, out: Reconstruction, step: int) -> None:
        """Count the entries' uses; at intervals bring the unused ones back and forget their averages."""
        every = self.settings.revive_every
        if every == 0:
            return
        self.uses += torch.bincount(out.codes.flatten(), minlength=len(self.uses))
        if (step + 1) % every:
            return
        dead = (self.uses == 0)[:, None]
        self.model.quantize.revive(dead, out.encoded.detach())
        entries = self.model.quantize.embedding.weight
        for name in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[entries][name].masked_fill_(dead, 0.0)
        if self.average is not None:
            average = self.exported.quantize.embedding.weight.data
            average.copy_(torch.where(dead, entries.data, average))
        self.uses.zero_()

    def _optimizer(self, model: nn.Module) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.Adam(
            model.parameters(), lr=self.settings.learning_rate, betas=self.settings.betas, fused=True
        )
        return optimizer, learning_rate_schedule(optimizer, self.settings, self.steps)

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip_norm)
        optimizer.step()

    @property
    def exported(self) -> Tokenizer:
        """The weights that are validated and exported: the average where there is one."""
        model = self.model if self.average is None else self.average.module
        assert isinstance(model, Tokenizer)
        return model.eval()

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
        model = self.exported
        with devices.autocast(self.device, self.settings.precision):
            codes = model.encode(pixels.to_signed(batch))
            return codes, pixels.to_bytes(model.decode(codes))

    def state(self) -> dict[str, Any]:
        """Both models, both optimisers, the average, the codebook's uses."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {"uses": self.uses}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.uses.copy_(state["uses"])

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        if self.average is not None:
            parts["average"] = self.average
        if self.discriminator is not None:
            parts |= {
                "discriminator": self.discriminator,
                "discriminator_optimizer": self.discriminator_optimizer,
                "discriminator_schedule": self.discriminator_schedule,
            }
        return parts

    def export(self, run: Run) -> None:
        """The tokenizer's weights with its settings."""
        checkpoints.save_weights(run.weights, self.exported, checkpoints.TokenizerHeader(vq=self.preset.vq))


def _memory_format(device: torch.device) -> torch.memory_format:
    # Convolutions on CUDA want channels last; on the CPU, at our widths, it took twice as long.
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
