"""One training step of stage 2: cross-entropy of the masked codes (equation 6, with MaskGIT's masking)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from movq_cli import checkpoints, devices
from movq_cli.data import pixels
from movq_cli.data.code_cache import CodeCache
from movq_cli.data.sampler import EpochOrder
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.models import masked_prior, priors
from movq_cli.models.priors import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import Block
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.runs import Run
from movq_cli.settings import Preset, TrainPriorSettings
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.loop import step_seed
from movq_cli.training.trainable import Guard, Stateful, Trainable, check_shares, recompute

_PICTURES = 16
"""Samples in a run's pictures."""

_RATIO_BINS = 5
"""Parts into which the validation loss is divided by the share of masked codes."""

Batch = tuple[Tensor, Tensor | None]
"""Codes [B, h, w, c] int64, and classes [B] int64 where the prior is class-conditional."""


class PriorTraining:
    """Stage 2 being trained.

    Args:
        preset: The settings.
        training: Codes of the training split.
        validation: Codes of the validation split.
        tokenizer: Decodes the run's pictures.
        tokenizer_hash: SHA-256 of its weight file.
        device: Where.
        ranks: Which part of each batch is this process's.
        judge: Of samples, who has seen training images; None = no FID.

    Raises:
        BadRequestError: There are too few views, or the batch does not divide.
    """

    settings: TrainPriorSettings

    def __init__(
        self,
        preset: Preset,
        training: CodeCache,
        validation: CodeCache,
        tokenizer: Tokenizer,
        tokenizer_hash: str,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
        judge: FIDEvaluator | None = None,
    ) -> None:
        self.judge = judge
        self.preset = preset
        self.settings = settings = preset.train_prior
        self.training, self.validation = training, validation
        self.tokenizer, self.tokenizer_hash = tokenizer, tokenizer_hash
        self.device = device
        self.ranks = ranks
        self.order = EpochOrder(len(training), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(training))
        check_shares(settings, ranks)
        self.guard = Guard(device, ranks)
        torch.manual_seed(settings.seed)
        self.model = priors.build(preset.prior, tokenizer.settings.code_shape).to(device)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )
        self.prior: Trainable[CodePrior] = Trainable(self.model, optimizer, settings, self.steps, ranks)
        if settings.activation_checkpointing:
            recompute(self.model, (Block,))
        self.generator = torch.Generator(device)

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's codes and classes from a step on."""
        step = start
        while True:
            _, indices = self.order.batch(step)
            yield self._read(self.training, indices[self.ranks.share(len(indices))])
            step += 1

    def batch_names(self, step: int) -> list[str]:
        """The image views of a step's whole batch, as places in the code cache."""
        _, indices = self.order.batch(step)
        return [f"view {index}" for index in indices]

    def step(self, batch: Batch, step: int) -> DeviceMetrics:
        """Hide codes, predict them, update.

        Args:
            batch: Codes [B, h, w, c] and classes [B], this rank's share.
            step: From 0.
        """
        self.model.train()
        codes, classes = batch
        size, parts = self.settings.batch_size, self.settings.accumulate
        # Drawn for the whole batch on every rank, so that what is hidden depends neither on how many there are nor on
        # the parts.
        self.generator.manual_seed(step_seed(self.settings.seed, step))
        mine = self.ranks.share(size)
        if classes is not None:
            classes = classes.masked_fill(self._dropped(size)[mine], self.model.unknown)
        targets = self.model.targets(size, self.generator)
        # The mean over all ranks and parts is then that over all codes that are predicted.
        count = targets.sum() / (self.ranks.world_size * parts)
        self.prior.clear()
        losses = []
        for part, (some, hidden) in enumerate(zip(codes.chunk(parts), targets[mine].chunk(parts), strict=True)):
            given = None if classes is None else classes.chunk(parts)[part]
            with self.prior.backward_of(part):
                logits = self._logits(self.prior.forward, some, hidden, given)
                loss = masked_prior.masked_loss(logits, some, hidden, self.preset.label_smoothing, count)
                (loss / parts).backward()
            losses.append(loss.detach())
        metrics = {"loss": torch.stack(losses).mean(), "gradient_norm": self.prior.clip()}
        self.prior.update(step, self.guard.good(step, metrics))
        return metrics

    def _logits(self, model: nn.Module, codes: Tensor, targets: Tensor, classes: Tensor | None) -> Tensor:
        """A model's view [B, h, w, c, K] of codes of which some are to be predicted."""
        with (
            devices.autocast(self.device, self.settings.precision),
            devices.attention_kernels(self.device, self.model.length),
        ):
            return model(self.model.inputs(codes, targets), classes)

    def _dropped(self, size: int) -> Tensor:
        """Images [size] bool whose class is hidden: guidance needs the unconditional distribution too."""
        return torch.rand(size, generator=self.generator, device=self.device) < self.settings.label_dropout

    def _read(self, cache: CodeCache, indices: np.ndarray) -> Batch:
        codes = torch.from_numpy(cache.codes[indices].astype(np.int64)).to(self.device, non_blocking=True)
        if not self.preset.prior.classes:
            return codes, None
        assert cache.labels is not None
        return codes, torch.from_numpy(cache.labels[indices]).to(self.device, non_blocking=True)

    @torch.inference_mode()
    def validate(self) -> Metrics:
        """Nats a predicted code on the validation split, plain, beside the codes' unigram entropy.

        Overall and by channel; of a masked prior also by the share of codes that is masked, in fifths from the fewest
        to all; of an autoregressive one also in bits. The masks are the same at every validation. A loss near the
        entropy means that nothing has been learned yet.
        """
        self.generator.manual_seed(self.settings.seed)
        model, shape = self.prior.exported, self.model.shape
        # Sums of nats and of masked codes, by fifth and channel.
        totals = torch.zeros(2, _RATIO_BINS, shape.chunks, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.validation), self.settings.batch_size):
            places = np.arange(start, min(start + self.settings.batch_size, len(self.validation)))
            mine = self.ranks.share(len(places))
            mask = self.model.targets(len(places), self.generator)[mine]
            if not len(mask):  # the last batch has fewer images than there are ranks
                continue
            codes, classes = self._read(self.validation, places[mine])
            nats = masked_prior.code_losses(self._logits(model, codes, mask, classes), codes) * mask
            masked = mask.double().flatten(1).mean(1)
            fifth = (masked * _RATIO_BINS).long().clamp(max=_RATIO_BINS - 1)
            totals[0].index_add_(0, fifth, nats.double().sum((1, 2)))
            totals[1].index_add_(0, fifth, mask.double().sum((1, 2)))
        loss = _ratio(self.ranks.sum(totals).sum((1, 2)))
        figures: Metrics = {"loss": loss, "loss_of_channels": [_ratio(channel) for channel in totals.sum(1).T]}
        if self.preset.prior.mode == "mask":
            figures["loss_by_masked_share"] = [_ratio(fifth) for fifth in totals.sum(2).T]
        else:
            figures["bits_per_code"] = loss / math.log(2)
        return figures | {"unigram_entropy": self._unigram_entropy()}

    @torch.inference_mode()
    def evaluate(self) -> Metrics:
        """FID of samples, of the same seeds each time, classes in turn."""
        assert self.judge is not None
        mine = range(self.settings.evaluate_images)[self.ranks.share(self.settings.evaluate_images)]
        size = self.settings.batch_size // self.ranks.world_size
        batches = (mine[start : start + size] for start in range(0, len(mine), size))
        return {"fid": self.judge.fid(map(self._samples, batches))}

    def score(self, figures: Metrics) -> float:
        """The loss, lower being better."""
        loss = figures["loss"]
        assert not isinstance(loss, list)
        return -loss

    def _unigram_entropy(self) -> float:
        counts = np.bincount(np.asarray(self.validation.codes).ravel())
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Samples of the same seeds at every step; classes in turn."""
        number = max(_PICTURES, self.preset.prior.classes) if self.preset.prior.classes <= _PICTURES else _PICTURES
        images = self._samples(range(number))
        columns = math.ceil(math.sqrt(number))
        pixels.save_grid(run.picture(step), images, columns, pixels.grid_scale(images.shape[-1]))

    def _samples(self, seeds: Sequence[int]) -> Tensor:
        """Images of these seeds, uint8 [B, 3, H, W]; their classes are all in turn."""
        classes = None
        if self.preset.prior.classes:
            classes = torch.tensor(seeds, device=self.device) % self.preset.prior.classes
        with devices.autocast(self.device, self.settings.precision):
            codes = self.prior.exported.decode(seeds, classes, self.preset.sample)
            return pixels.to_bytes(self.tokenizer.decode(codes))

    def parts(self) -> dict[str, Stateful]:
        """The model with its optimiser and average."""
        return {"prior": self.prior}

    def export(self, path: Path) -> None:
        """The prior's weights with what sampling from them needs."""
        header = checkpoints.PriorHeader(
            prior=self.preset.prior,
            shape=self.model.shape,
            sample=self.preset.sample,
            classes=self.training.header.classes if self.preset.prior.classes else (),
            tokenizer=self.tokenizer_hash,
        )
        checkpoints.save_weights(path, self.prior.exported, header)


def _ratio(pair: Tensor) -> float:
    """Nats [2] over codes; 0 where there are none."""
    nats, codes = pair.tolist()
    return float(nats / max(codes, 1.0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Linear layers' matrices, which decay, and everything else, which does not (minGPT's rule, and so VQGAN's)."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    plain = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
