"""One training step of stage 1: equation 3 with VQGAN's perceptual and adversarial terms, in one pass."""

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
from movq_cli.training.trainable import Guard, ModelT, Stateful, Trainable, check_shares, recompute

_PICTURES = 8
"""Validation images in a run's pictures."""


class TokenizerTraining:
    """Stage 1 being trained: the tokenizer, its discriminator, and their optimisers.

    Args:
        preset: The settings.
        images: The prepared set.
        device: Where.
        weights: Folder with VGG's and AlexNet's weights, for LPIPS as a loss and as a figure; None = torch hub's.
        ranks: Which part of each batch is this process's.
        judge: Of the reconstructions, who has seen the validation images that the settings ask for; None = no rFID.

    Raises:
        BadRequestError: The images are too small or too few, weights are missing, or the batch does not divide.
    """

    settings: TrainVQSettings

    def __init__(
        self,
        preset: Preset,
        images: PreparedSet,
        device: torch.device,
        weights: Path | None = None,
        ranks: Ranks = SINGLE_PROCESS,
        judge: FIDEvaluator | None = None,
    ) -> None:
        self.judge = judge
        self.preset = preset
        self.settings = settings = preset.train_vq
        self.device = device
        self.ranks = ranks
        self.side = preset.vq.resolution
        self.training_split = images.split("train")
        self.validation_split = images.split("val")
        loader.check_side(images.manifest.min_side, self.side, preset.data.path)
        self.order = EpochOrder(len(self.training_split), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(self.training_split))
        self.discriminator_start = settings.discriminator_step(self.steps, self.order.steps_per_epoch)
        self.perceptual = extractors.load_lpips("vgg", weights, device) if settings.perceptual_weight > 0 else None
        self.metrics = _validation_metrics(self.side, weights, device)
        check_shares(settings, ranks)
        self.guard = Guard(device, ranks)
        torch.manual_seed(settings.seed)
        self.tokenizer = self._trainable(Tokenizer(preset.vq))
        self.model = self.tokenizer.model
        self.discriminator: Trainable[PatchDiscriminator] | None = None
        if settings.adversarial_weight > 0:
            discriminator = PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers)
            self.discriminator = self._trainable(discriminator, average=False)
        if settings.activation_checkpointing:
            recompute(self.model, (ResidualBlock, AttentionBlock))
        self.uses = CodebookHealth(1, preset.vq.codebook_size).to(device)

    def _trainable(self, model: ModelT, *, average: bool = True) -> Trainable[ModelT]:
        model = model.to(self.device).to(memory_format=self._memory_format)
        settings = self.settings
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=settings.betas, fused=True)
        return Trainable(model, optimizer, settings, self.steps, self.ranks, average=average)

    @property
    def _memory_format(self) -> torch.memory_format:
        # Convolutions on CUDA want channels last; on the CPU, at our widths, it took twice as long.
        chosen = devices.enabled_on_cuda(self.settings.channels_last, self.device)
        return torch.channels_last if chosen else torch.contiguous_format

    def batches(self, start: int) -> Iterator[Tensor]:
        """This rank's uint8 images [B, 3, H, W] from a step on."""
        return loader.training_batches(
            self.training_split,
            self.order,
            self.preset.data,
            side=self.side,
            seed=self.settings.seed,
            start=start,
            device=self.device,
            ranks=self.ranks,
        )

    def batch_names(self, step: int) -> list[str]:
        """The images of a step's whole batch, as their shards call them."""
        _, indices = self.order.batch(step)
        return [self.training_split.name(int(index)) for index in indices]

    def step(self, batch: Tensor, step: int) -> DeviceMetrics:
        """Update the tokenizer and the discriminator from one forward pass of the tokenizer.

        Args:
            batch: uint8 [B, 3, H, W], this rank's share.
            step: From 0.
        """
        self.model.train()
        judge = self.discriminator if step >= self.discriminator_start else None
        moving: list[Trainable[Any]] = [self.tokenizer] if judge is None else [self.tokenizer, judge]
        for trainable in moving:
            trainable.clear()
        parts = [
            self._backward(part, number, step, judge)
            for number, part in enumerate(batch.chunk(self.settings.accumulate))
        ]
        metrics = {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in parts[0].metrics}
        metrics["gradient_norm"] = self.tokenizer.clip()
        if judge is not None:
            metrics["discriminator_gradient_norm"] = judge.clip()
        good = self.guard.good(step, metrics)
        for trainable in moving:
            trainable.update(step, good)
        self._revive(parts, step, good)
        return metrics

    def _backward(self, batch: Tensor, number: int, step: int, judge: Trainable[PatchDiscriminator] | None) -> _Part:
        """Leave the gradients of one part of a batch, of `accumulate` such, in the models."""
        originals = pixels.to_signed(batch).contiguous(memory_format=self._memory_format)
        share = 1 / self.settings.accumulate
        with self.tokenizer.backward_of(number):
            with devices.autocast(self.device, self.settings.precision):
                out = self.tokenizer.forward(originals)
            # The losses see a leaf: their gradients at the images are summed first and passed back through the decoder
            # once, where the adaptive weight as first written needs three passes.
            images = out.images.detach().requires_grad_()
            loss = losses.reconstruction(images, originals, self.settings, self.perceptual)
            (gradient,) = torch.autograd.grad(loss.total, images)
            metrics = {"l1": loss.l1, "l2": loss.l2, "perceptual": loss.perceptual}
            if judge is not None:
                pull, more = self._adversarial_gradient(judge.model, images, out.features, gradient)
                gradient = gradient + self._ramp(step) * pull
                metrics |= more
            codes_loss = (
                self.settings.codebook_weight * out.codebook_loss
                + self.settings.commitment_weight * out.commitment_loss
            )
            torch.autograd.backward([out.images, share * codes_loss], [share * gradient, None])
        if judge is not None:
            with judge.backward_of(number):
                metrics |= self._judge(judge, originals, images.detach(), share)
        metrics |= {"codebook": out.codebook_loss, "loss": loss.total + codes_loss}
        return _Part({name: value.detach() for name, value in metrics.items()}, out.encoded.detach(), out.codes)

    def _adversarial_gradient(
        self, judge: PatchDiscriminator, images: Tensor, features: Tensor, gradient: Tensor
    ) -> tuple[Tensor, DeviceMetrics]:
        """The weighted gradient of the adversarial loss at the images."""
        judge.requires_grad_(False)
        with devices.autocast(self.device, self.settings.precision):
            logits = judge(images)
        judge.requires_grad_(True)
        generator = losses.generator_hinge(logits.float())
        (pull,) = torch.autograd.grad(generator, images)
        weight = losses.adaptive_weight(features, self.model.decoder.conv_out, gradient, pull, self.ranks)
        metrics = {"generator": generator, "adaptive_weight": weight}
        return self.settings.adversarial_weight * weight * pull, metrics

    def _ramp(self, step: int) -> float:
        """The share of its weight that the adversarial term has at a step, in (0, 1]."""
        return min(1.0, (step - self.discriminator_start + 1) / max(1, self.settings.discriminator_ramp))

    def _judge(
        self, judge: Trainable[PatchDiscriminator], originals: Tensor, images: Tensor, share: float
    ) -> DeviceMetrics:
        """Leave the discriminator's gradients on originals and on the reconstructions that this step made."""
        with devices.autocast(self.device, self.settings.precision):
            real, fake = judge.forward(originals), judge.forward(images)
        loss = losses.discriminator_hinge(real.float(), fake.float())
        (share * loss).backward()
        return {"discriminator": loss, "logits_real": real.float().mean(), "logits_fake": fake.float().mean()}

    def _revive(self, parts: list[_Part], step: int, good: Tensor) -> None:
        """Count the entries' uses; at intervals bring the unused ones back and forget their averages."""
        every = self.settings.revive_every
        if every == 0:
            return
        codes = torch.cat([part.codes for part in parts])
        moved = good.bool()
        self.uses.counts += self.ranks.sum(self.uses.count(codes.flatten()[:, None])) * moved
        if (step + 1) % every:
            return
        dead = (self.uses.counts == 0).T & moved
        vectors = self.model.quantize.vectors(torch.cat([part.encoded for part in parts]))
        places = torch.randint(len(vectors) * self.ranks.world_size, (len(dead),), device=self.device)
        self.model.quantize.revive(dead, self.ranks.gather_rows(vectors, places))
        entries = self.model.quantize.embedding.weight
        for name in ("exp_avg", "exp_avg_sq"):
            self.tokenizer.optimizer.state[entries][name].masked_fill_(dead, 0.0)
        average = self.tokenizer.exported.quantize.embedding.weight.data
        average.copy_(torch.where(dead, entries.data, average))
        self.uses.counts.masked_fill_(moved, 0)

    @torch.inference_mode()
    def validate(self) -> Metrics:
        """PSNR (dB), SSIM, LPIPS where its weights are here, codebook usage (share of entries) and perplexity.

        Over the whole validation split, of which each rank does its share; usage and perplexity also a chunk.
        """
        health = CodebookHealth(self.preset.vq.chunks, self.preset.vq.codebook_size).to(self.device)
        # For each metric the sum of the finite scores, and their number.
        totals = torch.zeros(len(self.metrics), 2, dtype=torch.float64, device=self.device)
        for batch in loader.validation_batches(
            self.validation_split,
            self.preset.data,
            side=self.side,
            batch_size=self.settings.batch_size // self.ranks.world_size // self.settings.accumulate,
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
        figures: Metrics = {
            metric.key: total / count
            for metric, (total, count) in zip(self.metrics, totals.tolist(), strict=True)
            if count
        }
        for name, (overall, of_chunks) in (("usage", health.usage()), ("perplexity", health.perplexity())):
            figures |= {name: overall, f"{name}_of_chunks": of_chunks}
        return figures

    @torch.inference_mode()
    def evaluate(self) -> Metrics:
        """RFID of validation images, evenly spread."""
        assert self.judge is not None
        chosen = pixels.evenly_spaced(len(self.validation_split), self.settings.evaluate_images)
        mine = chosen[self.ranks.share(len(chosen))]
        size = self.settings.batch_size // self.ranks.world_size // self.settings.accumulate
        batches = (mine[start : start + size] for start in range(0, len(mine), size))
        return {
            "rfid": self.judge.fid(
                self._reconstruct(
                    loader.center_crops(self.validation_split, batch, side=self.side, device=self.device)
                )[1]
                for batch in batches
            )
        }

    def score(self, figures: Metrics) -> float:
        """LPIPS, which the discriminator does not spoil as it does PSNR; PSNR where there is no LPIPS."""
        if "lpips" in figures:
            return -_number(figures["lpips"])
        return _number(figures.get("psnr", -math.inf))

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Originals over reconstructions."""
        chosen = pixels.evenly_spaced(len(self.validation_split), _PICTURES)
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

    def export(self, path: Path) -> None:
        """The tokenizer's weights with its settings."""
        checkpoints.save_weights(path, self.tokenizer.exported, checkpoints.TokenizerHeader(vq=self.preset.vq))


class _Part(NamedTuple):
    """What a part of a batch leaves beside its gradients."""

    metrics: DeviceMetrics
    encoded: Tensor  # [B, D, h, w], the quantizer's input
    codes: Tensor  # [B, h, w, c]


def _validation_metrics(side: int, weights: Path | None, device: torch.device) -> list[paired.PairScorer]:
    """PSNR, SSIM and, where its weights are here, LPIPS, as far as images of that side are large enough for each."""
    keys = {"psnr", "ssim"} | ({"lpips"} if extractors.available_trunks(weights) else set())
    return [metric for metric in load_scorers(keys, weights, device) if side >= metric.smallest_side]


def _number(figure: float | list[float]) -> float:
    assert not isinstance(figure, list)
    return figure
