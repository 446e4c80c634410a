"""One training step of stage 2: cross-entropy of the masked codes (equation 6, with MaskGIT's masking)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from movq_cli import checkpoints, devices
from movq_cli.data import pixels
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.tokens import TokenCache
from movq_cli.models import masked_prior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import CodeTransformer
from movq_cli.runs import Run
from movq_cli.settings import Preset, TrainPriorSettings
from movq_cli.training.loop import Metrics, Stateful, Trainable, step_seed

_PICTURES = 16
"""Samples in a run's pictures."""

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
    """

    settings: TrainPriorSettings

    def __init__(
        self,
        preset: Preset,
        training: TokenCache,
        validation: TokenCache,
        tokenizer: Tokenizer,
        tokenizer_hash: str,
        device: torch.device,
    ) -> None:
        self.preset = preset
        self.settings = settings = preset.train_prior
        self.training, self.validation = training, validation
        self.tokenizer, self.tokenizer_hash = tokenizer, tokenizer_hash
        self.device = device
        self.order = EpochOrder(len(training), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(training))
        torch.manual_seed(settings.seed)
        self.model = CodeTransformer(preset.prior, tokenizer.settings.code_shape).to(device)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )
        self.prior = Trainable(self.model, optimizer, settings, self.steps)
        self.generator = torch.Generator(device)

    def batches(self, start: int) -> Iterator[Batch]:
        """Codes and classes from a step on."""
        step = start
        while True:
            _, indices = self.order.batch(step)
            yield self._read(self.training, indices)
            step += 1

    def step(self, batch: Batch, step: int) -> Metrics:
        """Hide codes, predict them, update."""
        self.model.train()
        self.generator.manual_seed(step_seed(self.settings.seed, step))
        codes, classes = batch
        if classes is not None:
            classes = self._drop(classes)
        loss = self._loss(self.model, codes, classes, self.settings.label_smoothing)
        self.prior.update(loss.backward)
        return {"loss": loss.detach()}

    def _loss(self, model: CodeTransformer, codes: Tensor, classes: Tensor | None, label_smoothing: float) -> Tensor:
        mask = masked_prior.training_mask(codes, self.generator)
        with (
            devices.autocast(self.device, self.settings.precision),
            devices.attention(self.device, model.shape.positions),
        ):
            logits = model(codes.masked_fill(mask, model.unknown), classes)
        return masked_prior.masked_loss(logits, codes, mask, label_smoothing)

    def _drop(self, classes: Tensor) -> Tensor:
        """Hide some images' classes, so that the unconditional distribution, which guidance needs, is learned too."""
        draw = torch.rand(classes.shape, generator=self.generator, device=self.device)
        return classes.masked_fill(draw < self.settings.label_dropout, self.model.unknown)

    def _read(self, cache: TokenCache, indices: np.ndarray) -> Batch:
        codes = torch.from_numpy(cache.codes[indices].astype(np.int64)).to(self.device, non_blocking=True)
        if not self.preset.prior.classes:
            return codes, None
        assert cache.labels is not None
        return codes, torch.from_numpy(cache.labels[indices]).to(self.device, non_blocking=True)

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Nats a masked code on the validation split, plain, beside the codes' unigram entropy.

        The masks are the same at every validation; a loss near the entropy means that nothing has been learned yet.
        """
        self.generator.manual_seed(self.settings.seed)
        size = self.settings.batch_size
        total = 0.0
        for start in range(0, len(self.validation), size):
            indices = np.arange(start, min(start + size, len(self.validation)))
            codes, classes = self._read(self.validation, indices)
            total += self._loss(self.prior.exported, codes, classes, 0.0).item() * len(indices)
        return {"loss": total / len(self.validation), "unigram_entropy": self._unigram_entropy()}

    def _unigram_entropy(self) -> float:
        counts = np.bincount(np.asarray(self.validation.codes).ravel())
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Samples of the same seeds at every step; classes in turn."""
        number = max(_PICTURES, self.preset.prior.classes) if self.preset.prior.classes <= _PICTURES else _PICTURES
        classes = None
        if self.preset.prior.classes:
            classes = torch.arange(number, device=self.device) % self.preset.prior.classes
        with devices.autocast(self.device, self.settings.precision):
            codes = masked_prior.decode(self.prior.exported, range(number), classes, self.preset.sample)
            images = pixels.to_bytes(self.tokenizer.decode(codes))
        columns = math.ceil(math.sqrt(number))
        pixels.save_grid(run.picture(step), images, columns, pixels.grid_scale(images.shape[-1]))

    def parts(self) -> dict[str, Stateful]:
        """The model with its optimiser and average."""
        return {"prior": self.prior}

    def export(self, run: Run) -> None:
        """The prior's weights with what sampling from them needs."""
        header = checkpoints.PriorHeader(
            prior=self.preset.prior,
            shape=self.model.shape,
            sample=self.preset.sample,
            classes=self.training.header.classes if self.preset.prior.classes else (),
            tokenizer=self.tokenizer_hash,
        )
        checkpoints.save_weights(run.weights, self.prior.exported, header)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Linear layers' matrices, which decay, and everything else, which does not (minGPT's rule, and so VQGAN's)."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    plain = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
