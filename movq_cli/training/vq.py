"""A training step of stage 1 (equation 3 with VQGAN's perceptual and adversarial terms), and its validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from movq_cli import checkpoints, devices
from movq_cli.data import loader, pixels
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation import extractors, paired
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.metrics import load_scorers
from movq_cli.models.autoencoder import AttentionBlock, ResidualBlock
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.runs import Run
from movq_cli.settings import Preset, TrainVQSettings
from movq_cli.training import losses
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.trainable import FiniteCheck, ModelT, Stateful, Trainable, check_shares, checkpoint_activations

_PICTURES = 8
"""Number of validation images in the pictures of a run."""


class TokenizerTraining:
    """The training of stage 1: the tokenizer, its discriminator, and their optimizers.

    Args:
        all_settings: Settings of the models and of the training.
        images: Prepared data set.
        device: Device of the models.
        weights: Folder with the weights of VGG and AlexNet, for LPIPS as a loss and as a metric; None uses the weights
            that torch.hub has cached or downloads.
        ranks: Processes that share each batch.
        fid_evaluator: Evaluator of the reconstructions, with the statistics of the validation images; None computes no
            rFID.

    Raises:
        BadRequestError: The images are too small or too few, weights are missing, or the batch cannot be divided.
    """

    settings: TrainVQSettings

    def __init__(
        self,
        all_settings: Preset,
        images: PreparedSet,
        device: torch.device,
        weights: Path | None = None,
        ranks: Ranks = SINGLE_PROCESS,
        fid_evaluator: FIDEvaluator | None = None,
    ) -> None:
        self.fid_evaluator = fid_evaluator
        self.all_settings = all_settings
        self.settings = settings = all_settings.train_vq
        self.device = device
        self.ranks = ranks
        self.side = all_settings.vq.resolution
        self.training_split = images.split("train")
        self.validation_split = images.split("val")
        loader.check_side(images.manifest.min_side, self.side, all_settings.data.path)
        self.order = EpochOrder(len(self.training_split), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(self.training_split))
        self.discriminator_start = settings.discriminator_step(self.steps, self.order.steps_per_epoch)
        self.perceptual = extractors.load_lpips("vgg", weights, device) if settings.perceptual_weight > 0 else None
        self.metrics = _validation_metrics(self.side, weights, device)
        check_shares(settings, ranks)
        self.finite_check = FiniteCheck(device, ranks)
        torch.manual_seed(settings.seed)
        self.tokenizer = self._trainable(Tokenizer(all_settings.vq))
        self.model = self.tokenizer.model
        self.discriminator: Trainable[PatchDiscriminator] | None = None
        if settings.adversarial_weight > 0:
            discriminator = PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
            self.discriminator = self._trainable(discriminator, settings.discriminator_learning_rate, average=False)
        if settings.activation_checkpointing:
            checkpoint_activations(self.model, (ResidualBlock, AttentionBlock))
        self.uses = CodebookHealth(1, all_settings.vq.codebook_size).to(device)

    def _trainable(
        self, model: ModelT, learning_rate: float | None = None, *, average: bool = True
    ) -> Trainable[ModelT]:
        model = model.to(self.device).to(memory_format=self._memory_format)
        settings = self.settings
        rate = learning_rate or settings.learning_rate
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=settings.betas, fused=True)
        return Trainable(model, optimizer, settings, self.steps, self.ranks, average=average, learning_rate=rate)

    @property
    def _memory_format(self) -> torch.memory_format:
        # Convolutions on CUDA are faster in the channels-last format; on the CPU, at these widths, it took twice as
        # long.
        is_channels_last = devices.enabled_on_cuda(self.settings.channels_last, self.device)
        return torch.channels_last if is_channels_last else torch.contiguous_format

    def batches(self, start: int) -> Iterator[Tensor]:
        """Yield this rank's images, uint8 [B, 3, H, W], for step `start` and all later steps."""
        return loader.training_batches(
            self.training_split,
            self.order,
            self.all_settings.data,
            side=self.side,
            seed=self.settings.seed,
            start=start,
            device=self.device,
            ranks=self.ranks,
        )

    def batch_names(self, step: int) -> list[str]:
        """Return the names of the images in the batch of all ranks at a step."""
        _, indices = self.order.batch(step)
        return [self.training_split.name(int(index)) for index in indices]

    def step(self, batch: Tensor, step: int) -> DeviceMetrics:
        """Update the tokenizer and the discriminator from one forward pass of the tokenizer.

        Args:
            batch: uint8 [B, 3, H, W], this rank's share of the batch.
            step: Index of the step, from 0.
        """
        self.model.train()
        is_trained = step >= self.discriminator_start - self.settings.discriminator_warmup
        discriminator = self.discriminator if is_trained else None
        trained: list[Trainable[Any]] = [self.tokenizer] if discriminator is None else [self.tokenizer, discriminator]
        for trainable in trained:
            trainable.clear()
        parts = [
            self._backward(part, number, step, discriminator)
            for number, part in enumerate(batch.chunk(self.settings.accumulate))
        ]
        metrics = {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in parts[0].metrics}
        metrics["gradient_norm"] = self.tokenizer.clip()
        if discriminator is not None:
            metrics["discriminator_gradient_norm"] = discriminator.clip()
        is_finite = self.finite_check.update(step, metrics)
        for trainable in trained:
            trainable.update(step, is_finite)
        self._revive(parts, step, is_finite)
        return metrics

    def _backward(
        self, batch: Tensor, number: int, step: int, discriminator: Trainable[PatchDiscriminator] | None
    ) -> _Part:
        """Add the gradients of one of the `accumulate` parts of a batch to those of the models."""
        originals = pixels.to_signed(batch).contiguous(memory_format=self._memory_format)
        share = 1 / self.settings.accumulate
        with self.tokenizer.backward_of(number):
            with devices.autocast(self.device, self.settings.precision):
                out = self.tokenizer.forward(originals)
            # The losses start from a detached copy of the images. Their gradients at the images are added up and pass
            # back through the decoder once, whereas the adaptive weight as VQGAN computes it needs three passes.
            images = out.images.detach().requires_grad_()
            loss = losses.reconstruction(images, originals, self.settings, self.perceptual)
            (gradient,) = torch.autograd.grad(loss.total, images)
            metrics = {"l1": loss.l1, "l2": loss.l2, "perceptual": loss.perceptual}
            if discriminator is not None and step >= self.discriminator_start:
                adversarial_gradient, adversarial_metrics = self._adversarial_gradient(
                    discriminator.model, images, out.features, gradient
                )
                gradient = gradient + self._ramp(step) * adversarial_gradient
                metrics |= adversarial_metrics
            total = loss.total
            roots, gradients = [out.images], [share * gradient]
            if out.losses:
                quantizer_loss = losses.quantizer(out.losses, self.settings)
                total = total + quantizer_loss
                roots.append(share * quantizer_loss)
                gradients.append(torch.ones_like(quantizer_loss))
            torch.autograd.backward(roots, gradients)
        if discriminator is not None:
            with discriminator.backward_of(number):
                metrics |= self._discriminator_backward(discriminator, originals, images.detach(), share)
        metrics |= losses.logged(out.losses) | {"loss": total}
        return _Part({name: value.detach() for name, value in metrics.items()}, out.encoded.detach(), out.codes)

    def _adversarial_gradient(
        self, discriminator: PatchDiscriminator, images: Tensor, features: Tensor, gradient: Tensor
    ) -> tuple[Tensor, DeviceMetrics]:
        """Return the weighted gradient of the adversarial loss at the images, and the metrics of that loss."""
        discriminator.requires_grad_(False)
        with devices.autocast(self.device, self.settings.precision):
            logits = discriminator(images)
        discriminator.requires_grad_(True)
        generator = losses.generator_hinge(logits.float())
        (adversarial,) = torch.autograd.grad(generator, images)
        limit = self.settings.adaptive_weight_limit
        weight = losses.adaptive_weight(features, self.model.decoder.conv_out, gradient, adversarial, limit, self.ranks)
        metrics = {"generator": generator, "adaptive_weight": weight}
        return self.settings.adversarial_weight * weight * adversarial, metrics

    def _ramp(self, step: int) -> float:
        """Return the factor in (0, 1] on the weight of the adversarial term at a step."""
        return min(1.0, (step - self.discriminator_start + 1) / max(1, self.settings.discriminator_ramp))

    def _discriminator_backward(
        self, discriminator: Trainable[PatchDiscriminator], originals: Tensor, images: Tensor, share: float
    ) -> DeviceMetrics:
        """Add the discriminator's gradients on the originals and on the reconstructions of this step."""
        with devices.autocast(self.device, self.settings.precision):
            real, fake = discriminator.forward(originals), discriminator.forward(images)
        loss = losses.discriminator_hinge(real.float(), fake.float())
        (share * loss).backward()
        return {"discriminator": loss, "logits_real": real.float().mean(), "logits_fake": fake.float().mean()}

    def _revive(self, parts: list[_Part], step: int, is_finite: Tensor) -> None:
        """Count the uses of the codes; every `revive_every` steps revive the codebook entries that had none."""
        interval = self.settings.revive_every
        if interval == 0:
            return
        codes = torch.cat([part.codes for part in parts])
        is_updated = is_finite.bool()
        self.uses.counts += self.ranks.sum(self.uses.count(codes.flatten()[:, None])) * is_updated
        if (step + 1) % interval:
            return
        unused = (self.uses.counts[0] == 0) & is_updated
        encoded = torch.cat([part.encoded for part in parts])
        changed = self.model.quantize.revive(unused, encoded, self._sample_rows)
        self.tokenizer.reset_rows({f"quantize.{name}": rows for name, rows in changed.items()})
        self.uses.counts.masked_fill_(is_updated, 0)

    def _sample_rows(self, rows: Tensor, count: int) -> Tensor:
        """Draw rows [count, d] from the rows [N, d] of all ranks; the draw is the same on every rank."""
        indices = torch.randint(len(rows) * self.ranks.world_size, (count,), device=self.device)
        return self.ranks.gather_rows(rows, indices)

    @torch.inference_mode()
    def validate(self) -> Metrics:
        """Return PSNR (dB), SSIM, LPIPS if its weights are available, codebook usage (share of entries) and perplexity.

        The metrics are those of the complete validation split, of which each rank evaluates a share. Usage and
        perplexity are also given for each chunk.
        """
        health = CodebookHealth(self.all_settings.vq.chunks, self.all_settings.vq.codebook_size).to(self.device)
        # For each metric, the sum of its finite scores and their number.
        totals = torch.zeros(len(self.metrics), 2, dtype=torch.float64, device=self.device)
        for batch in loader.validation_batches(
            self.validation_split,
            self.all_settings.data,
            side=self.side,
            batch_size=self._images_at_once,
            device=self.device,
            ranks=self.ranks,
        ):
            codes, reconstructed = self._reconstruct(batch)
            health.update(codes)
            for row, metric in enumerate(self.metrics):
                scores = metric.score(reconstructed, batch).double()
                finite = scores.isfinite()
                totals[row] += torch.stack([torch.where(finite, scores, 0).sum(), finite.sum()])
        self.ranks.sum(totals)
        self.ranks.sum(health.counts)
        metrics: Metrics = {
            metric.key: total / count
            for metric, (total, count) in zip(self.metrics, totals.tolist(), strict=True)
            if count
        }
        for name, (overall, of_chunks) in (("usage", health.usage()), ("perplexity", health.perplexity())):
            metrics |= {name: overall, f"{name}_of_chunks": of_chunks}
        return metrics

    @torch.inference_mode()
    def evaluate(self) -> Metrics:
        """Return the rFID of `evaluate_images` validation images, evenly spaced in the split."""
        assert self.fid_evaluator is not None
        chosen = pixels.evenly_spaced(len(self.validation_split), self.settings.evaluate_images)
        indices = chosen[self.ranks.share(len(chosen))]
        size = self._images_at_once
        batches = (indices[start : start + size] for start in range(0, len(indices), size))
        return {
            "rfid": self.fid_evaluator.fid(
                self._reconstruct(
                    loader.center_crops(self.validation_split, batch, side=self.side, device=self.device)
                )[1]
                for batch in batches
            )
        }

    @property
    def _images_at_once(self) -> int:
        """Number of images in one forward pass of a rank."""
        return self.settings.batch_size // self.ranks.world_size // self.settings.accumulate

    def score(self, metrics: Metrics) -> float:
        """Return the score of a validation, higher is better: minus LPIPS, or PSNR without LPIPS.

        Adversarial training lowers PSNR although images look better, and does not do so to LPIPS.
        """
        if "lpips" in metrics:
            return -_scalar(metrics["lpips"])
        return _scalar(metrics.get("psnr", -math.inf))

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Write the run's picture of a step: a row of originals above a row of their reconstructions."""
        chosen = pixels.evenly_spaced(len(self.validation_split), _PICTURES)
        originals = loader.center_crops(self.validation_split, chosen, side=self.side, device=self.device)
        _, reconstructed = self._reconstruct(originals)
        both = torch.cat([originals, reconstructed])
        pixels.save_grid(run.picture(step), both, len(originals), pixels.grid_scale(self.side))

    def _reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and the reconstructions (uint8) of images, uint8 [B, 3, H, W]."""
        model = self.tokenizer.exported
        with devices.autocast(self.device, self.settings.precision):
            codes = model.encode(pixels.to_signed(batch))
            return codes, pixels.to_bytes(model.decode(codes))

    def parts(self) -> dict[str, Stateful]:
        """Return the state of the training by name: the models with their optimizers, and the uses of the codes."""
        parts: dict[str, Stateful] = {"tokenizer": self.tokenizer, "uses": self.uses}
        return parts if self.discriminator is None else {**parts, "discriminator": self.discriminator}

    def export(self, path: Path) -> None:
        """Write the weights of the tokenizer with its settings."""
        checkpoints.save_weights(path, self.tokenizer.exported, checkpoints.TokenizerHeader(vq=self.all_settings.vq))


class _Part(NamedTuple):
    """The results of one part of a batch, apart from its gradients."""

    metrics: DeviceMetrics
    encoded: Tensor  # [B, D, h, w], the input of the quantizer
    codes: Tensor  # [B, h, w, c]


def _validation_metrics(side: int, weights: Path | None, device: torch.device) -> list[paired.PairScorer]:
    """Return PSNR, SSIM and, if its weights are available, LPIPS; a metric that needs larger images is left out."""
    keys = {"psnr", "ssim"} | ({"lpips"} if extractors.available_trunks(weights) else set())
    return [metric for metric in load_scorers(keys, weights, device) if side >= metric.smallest_side]


def _scalar(metric: float | list[float]) -> float:
    assert not isinstance(metric, list)
    return metric
