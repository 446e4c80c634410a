"""A training step of stage 2, the cross-entropy of predicted codes (equations 5 and 6), and its validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from movq_cli import checkpoints, devices
from movq_cli.data import grids, pixels
from movq_cli.data.code_cache import CodeCache
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.spacing import evenly_spaced
from movq_cli.evaluation.code_statistics import entropy_of_counts
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.models import masked_prior, priors
from movq_cli.models.priors import CodePrior
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.models.transformer import Block
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.runs import Run
from movq_cli.setting_types import bounds_of
from movq_cli.settings import Preset
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.loop import step_seed
from movq_cli.training.stage import Criterion
from movq_cli.training.trainable import FiniteCheck, Stateful, Trainable, check_shares, checkpoint_activations
from movq_cli.training.watch import UNWATCHED, Watch, batch_count
from movq_cli.training_settings import TrainPriorSettings

_PICTURES = 16
"""Largest number of samples in the pictures of a run."""

_COUNTED_VIEWS = 4096
"""Largest number of training views whose codes are counted."""

_COLUMNS = 8
"""Largest number of classes in the pictures of a run."""

_SHARE_BINS = 5
"""Number of intervals of the share of predicted codes for which the validation loss is computed."""

Batch = tuple[Tensor, Tensor | None]
"""Codes, [B, h, w, c] int64, and class ids, [B] int64, or None for an unconditional prior."""


class PriorTraining:
    """The training of stage 2: the prior and its optimizer.

    Args:
        all_settings: Settings of the model, of the training and of sampling.
        training: Codes of the training split.
        validation: Codes of the validation split.
        tokenizer: Tokenizer that decodes samples.
        tokenizer_hash: SHA-256 of the tokenizer's weight file.
        device: Device of the models.
        ranks: Processes that share each batch.
        fid_evaluator: Evaluator of samples, with the statistics of training images; None computes no FID.

    Raises:
        BadRequestError: There are too few views, the batch cannot be divided, or the prior cannot be built or sampled
            with these settings.
    """

    settings: TrainPriorSettings

    def __init__(
        self,
        all_settings: Preset,
        training: CodeCache,
        validation: CodeCache,
        tokenizer: Tokenizer,
        tokenizer_hash: str,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
        fid_evaluator: FIDEvaluator | None = None,
    ) -> None:
        self.fid_evaluator = fid_evaluator
        self.all_settings = all_settings
        self.settings = settings = all_settings.train_prior
        self.training, self.validation = training, validation
        self.tokenizer, self.tokenizer_hash = tokenizer, tokenizer_hash
        self.device = device
        self.ranks = ranks
        self.order = EpochOrder(len(training), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(training))
        check_shares(settings, ranks)
        self.finite_check = FiniteCheck(device, ranks)
        torch.manual_seed(settings.seed)
        self.model = priors.build(all_settings.prior, tokenizer.settings.code_shape)
        self.model.check_sample_settings(all_settings.sample)
        self.model.check_training_settings(settings)
        self.model.prepare_training(settings)
        self.model.to(device)
        smoothing = settings.label_smoothing
        self.label_smoothing = self.model.label_smoothing if smoothing is None else smoothing
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=True,
        )
        self.prior: Trainable[CodePrior] = Trainable(self.model, optimizer, settings, self.steps, ranks)
        if settings.activation_checkpointing:
            checkpoint_activations(self.model, (Block,))
        self.generator = torch.Generator(device)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield this rank's codes and class ids for step `start` and all later steps."""
        step = start
        while True:
            _, indices = self.order.batch(step)
            yield self._read(self.training, indices[self.ranks.share(len(indices))])
            step += 1

    def batch_names(self, step: int) -> list[str]:
        """Return the image views in the batch of all ranks at a step, as indices into the code cache."""
        _, indices = self.order.batch(step)
        return [f"view {index}" for index in indices]

    def step(self, batch: Batch, step: int) -> DeviceMetrics:
        """Update the prior.

        Args:
            batch: Codes, [B, h, w, c], and class ids, [B], this rank's share of the batch.
            step: Index of the step, from 0.
        """
        self.model.train()
        codes, classes = batch
        size, parts = self.settings.batch_size, self.settings.accumulate
        # Every rank draws the targets of the complete batch, so that they depend neither on the number of ranks nor on
        # the number of parts.
        self.generator.manual_seed(step_seed(self.settings.seed, step))
        own = self.ranks.share(size)
        if classes is not None:
            classes = classes.masked_fill(self._dropped_classes(size)[own], self.model.no_class)
        targets = self.model.targets(size, self.generator, self.settings.mask_schedule)
        orders = self._orders(size, step)
        # With this divisor, the mean over all ranks and parts is the mean over all predicted codes of the batch.
        count = targets.sum() / (self.ranks.world_size * parts)
        self.prior.clear()
        losses = []
        for part, (part_codes, predicted) in enumerate(zip(codes.chunk(parts), targets[own].chunk(parts), strict=True)):
            part_classes = None if classes is None else classes.chunk(parts)[part]
            order = () if orders is None else (orders[own].chunk(parts)[part],)
            with self.prior.backward_of(part):
                logits = self._logits(self.prior.forward, part_codes, predicted, part_classes, *order)
                loss = masked_prior.masked_loss(logits, part_codes, predicted, self.label_smoothing, count)
                (loss / parts).backward()
            losses.append(loss.detach())
        metrics = {"loss": torch.stack(losses).mean(), "gradient_norm": self.prior.clip()}
        self.prior.update(step, self.finite_check.update(step, metrics))
        return metrics

    def _logits(
        self, model: nn.Module, codes: Tensor, targets: Tensor, classes: Tensor | None, *order: Tensor
    ) -> Tensor:
        """Return the logits [B, h, w, c, K] of a model that gets the input for these targets.

        Args:
            model: Prior, or the wrapper that averages its gradients over the ranks.
            codes: Codes, [B, h, w, c] int64.
            targets: Codes to predict, [B, h, w, c] bool.
            classes: Class ids, [B] int64; None for an unconditional prior.
            order: Order of the positions, [B, h w] int64, if the mode permutes them; see AutoregressivePrior.forward.
        """
        with (
            devices.autocast(self.device, self.settings.precision),
            devices.attention_kernels(self.device, self.model.length),
        ):
            return model(self.model.inputs(codes, targets), classes, *order)

    def _dropped_classes(self, size: int) -> Tensor:
        """Draw the images, [size] bool, that are trained without their class, as guidance needs."""
        return torch.rand(size, generator=self.generator, device=self.device) < self.settings.label_dropout

    def _orders(self, size: int, step: int) -> Tensor | None:
        """Draw the order of the positions of each image, [size, h w] int64; None if no order is ever permuted."""
        if self.settings.random_order is None:
            return None
        positions = self.model.shape.positions
        permuted = torch.rand(size, positions, generator=self.generator, device=self.device).argsort(1)
        chances = torch.rand(size, 1, generator=self.generator, device=self.device)
        share = self.settings.random_order_share(step, self.steps)
        return torch.where(chances < share, permuted, torch.arange(positions, device=self.device))

    def _read(self, cache: CodeCache, indices: np.ndarray) -> Batch:
        codes = torch.from_numpy(cache.codes[indices].astype(np.int64)).to(self.device, non_blocking=True)
        if not self.all_settings.prior.classes:
            return codes, None
        assert cache.labels is not None
        return codes, torch.from_numpy(cache.labels[indices]).to(self.device, non_blocking=True)

    @torch.inference_mode()
    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        """Return the cross-entropy on the validation split in nats a predicted code, and the codes' unigram entropy.

        The loss has no label smoothing. It is given over all codes and for each channel; the prior's mode adds metrics
        of its own. The targets are the same at every validation; those of a masked prior follow the cosine schedule, so
        that priors trained with different schedules can be compared. A loss near the unigram entropy means that the
        prior has not learned how codes depend on each other. The images are the complete validation split, or
        `validate_images` of it.

        Args:
            watch: Watch that ends the validation if the training is to stop.
            averaged: Whether the exported weights are validated; otherwise those of the last step.
        """
        self.generator.manual_seed(self.settings.seed)
        model, shape = self.prior.in_eval_mode(averaged=averaged), self.model.shape
        # The sum of nats and the number of predicted codes, by interval of the predicted share and by channel.
        totals = torch.zeros(2, _SHARE_BINS, shape.chunks, dtype=torch.float64, device=self.device)
        limit, size = self.settings.validate_images or len(self.validation), self.settings.batch_size
        chosen = np.array(evenly_spaced(len(self.validation), limit))
        starts = range(0, len(chosen), size)
        for start in watch.batches(starts, len(starts), "validating"):
            indices = chosen[start : start + size]
            own = self.ranks.share(len(indices))
            targets = self.model.targets(len(indices), self.generator)[own]
            if not len(targets):  # The last batch may have fewer images than there are ranks.
                continue
            codes, classes = self._read(self.validation, indices[own])
            nats = masked_prior.code_losses(self._logits(model, codes, targets, classes), codes) * targets
            share = targets.double().flatten(1).mean(1)
            interval = (share * _SHARE_BINS).long().clamp(max=_SHARE_BINS - 1)
            totals[0].index_add_(0, interval, nats.double().sum((1, 2)))
            totals[1].index_add_(0, interval, targets.double().sum((1, 2)))
        loss = _ratio(self.ranks.sum(totals).sum((1, 2)))
        metrics: Metrics = {"loss": loss, "loss_of_channels": [_ratio(channel) for channel in totals.sum(1).T]}
        metrics |= self.model.validation_metrics(loss, [_ratio(interval) for interval in totals.sum(2).T])
        return metrics | self._unigram_entropies()

    @torch.inference_mode()
    def evaluate(self, watch: Watch = UNWATCHED) -> Metrics:
        """Return the FID of `evaluate_images` samples, with the same seeds each time and the classes in turn."""
        assert self.fid_evaluator is not None
        seeds = range(self.settings.evaluate_images)[self.ranks.share(self.settings.evaluate_images)]
        size = self.settings.batch_size // self.ranks.world_size
        batches = (seeds[start : start + size] for start in range(0, len(seeds), size))
        count = batch_count(self.settings.evaluate_images, size, self.ranks)
        watched = watch.batches(batches, count, "sampling for FID")
        return {"fid": self.fid_evaluator.fid(map(self._samples, watched))}

    @property
    def loss_formula(self) -> str:
        """The cross-entropy, with the label smoothing that its logged value includes."""
        smoothing = f", with label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"cross-entropy in nats per predicted code{smoothing}"

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations; 0 if there are none."""
        return self.settings.evaluation_interval(has_weights=self.fid_evaluator is not None)

    @property
    def criterion(self) -> Criterion:
        """The metric that decides which weights are saved as the best ones."""
        best_by = self.settings.best_by or ("fid" if self.evaluation_interval else "loss")
        return Criterion(best_by, higher_is_better=False)

    @property
    def validation_criterion(self) -> Criterion:
        """The metric of every validation by which weights are compared."""
        return Criterion("loss", higher_is_better=False)

    @property
    def milestones(self) -> frozenset[int]:
        """No steps: every checkpoint of a prior is like any other."""
        return frozenset()

    @property
    def optional_parts(self) -> frozenset[str]:
        """No parts: there is the prior alone."""
        return frozenset()

    @property
    def settled_after(self) -> int:
        """The number of steps up to the end of the random orders; 0 without them."""
        interval = self.settings.random_order
        return 0 if interval is None else math.ceil(bounds_of(interval)[1] * self.steps)

    @property
    def validates_first(self) -> bool:
        """Never: a prior starts from random weights."""
        return False

    @property
    def has_average(self) -> bool:
        """Whether the exported weights are a running average."""
        return self.prior.average is not None

    def event(self, step: int) -> str | None:
        """Return None: nothing begins during the training of a prior."""

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """Return None: there is no warning about a step of a prior."""

    def _unigram_entropies(self) -> Metrics:
        """Return the entropies of the validation codes' frequencies: their mean over the chunks, of each, and pooled.

        A prior knows the chunk of a code, so that the mean over the chunks is the loss of a prior that knows nothing
        else. The entropy over all chunks together is larger if the chunks use different entries.
        """
        codes = np.asarray(self.validation.codes)
        of_chunks = [_entropy(codes[..., chunk]) for chunk in range(codes.shape[-1])]
        # The entropy of the validation codes under the frequencies of the training codes; larger if these differ.
        cross = [_entropy(codes[..., chunk], self._training_frequencies[chunk]) for chunk in range(codes.shape[-1])]
        return {
            "unigram_entropy": float(np.mean(of_chunks)),
            "unigram_cross_entropy": float(np.mean(cross)),
            "unigram_entropy_of_chunks": of_chunks,
            "unigram_entropy_pooled": _entropy(codes),
        }

    @cached_property
    def _training_frequencies(self) -> np.ndarray:
        """The share of each code in each chunk of evenly spaced training views, [c, K]; none is 0."""
        chosen = evenly_spaced(len(self.training), _COUNTED_VIEWS)
        codes, size = np.asarray(self.training.codes[chosen]), self.model.shape.codebook_size
        counts = np.stack([np.bincount(codes[..., chunk].ravel(), minlength=size) for chunk in range(codes.shape[-1])])
        return (counts + 1) / (counts + 1).sum(1, keepdims=True)

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Write the run's picture of a step: samples with the same seeds at every step, in columns by class."""
        names = self.training.header.classes if self.all_settings.prior.classes else ()
        columns = min(len(names), _COLUMNS) if len(names) > 1 else math.isqrt(_PICTURES)
        # The seed decides the class, so that each column has one class.
        seeds = [
            column + row * len(names or range(columns))
            for row in range(_PICTURES // columns)
            for column in range(columns)
        ]
        grids.save(run.picture(step), self._samples(seeds), columns, headings=names[:columns])

    def _samples(self, seeds: Sequence[int]) -> Tensor:
        """Return samples with these seeds, uint8 [B, 3, H, W]; a seed also decides the class, all in turn."""
        classes = None
        if self.all_settings.prior.classes:
            classes = torch.tensor(seeds, device=self.device) % self.all_settings.prior.classes
        with devices.autocast(self.device, self.settings.precision):
            codes = self.prior.exported.decode(seeds, classes, self.all_settings.sample)
            return pixels.to_bytes(self.tokenizer.decode(codes))

    def parts(self) -> dict[str, Stateful]:
        """Return the state of the training by name: the prior with its optimizer and running average."""
        return {"prior": self.prior}

    def export(self, path: Path) -> None:
        """Write the weights of the prior with the settings that sampling needs."""
        header = checkpoints.PriorHeader(
            prior=self.all_settings.prior,
            shape=self.model.shape,
            sample=self.all_settings.sample,
            classes=self.training.header.classes if self.all_settings.prior.classes else (),
            tokenizer=self.tokenizer_hash,
        )
        checkpoints.save_weights(path, self.prior.exported.for_inference(), header)


def _entropy(codes: np.ndarray, frequencies: np.ndarray | None = None) -> float:
    """Return the entropy of the frequencies of codes, in nats; with other frequencies [K], the cross entropy."""
    return entropy_of_counts(np.bincount(codes.ravel()), frequencies)


def _ratio(pair: Tensor) -> float:
    """Divide a sum of nats by a number of codes, [2] in all; 0 without codes."""
    nats, codes = pair.tolist()
    return float(nats / max(codes, 1.0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters: weights of linear layers have weight decay, all others none (minGPT's and VQGAN's rule)."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [parameter for parameter in model.parameters() if id(parameter) in matrices]
    plain = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
