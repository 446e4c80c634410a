"""A training step of stage 1 (equation 3 with VQGAN's perceptual and adversarial terms), and its validation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from movq_cli import checkpoints, devices
from movq_cli.data import grids, loader, pixels
from movq_cli.data.sampler import EpochOrder
from movq_cli.data.shards import PreparedSet
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.models.autoencoder import AttentionBlock, ResidualBlock
from movq_cli.models.discriminator import PatchDiscriminator
from movq_cli.models.quantizer import CodebookHealth
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.runs import Run
from movq_cli.settings import Preset
from movq_cli.training import losses, quantization
from movq_cli.training.adversary import Adversary
from movq_cli.training.initial_weights import InitialWeights
from movq_cli.training.log import DeviceMetrics, Metrics
from movq_cli.training.reconstruction_metrics import CRITERIA, ReconstructionMetrics, best_criterion, validation_scorers
from movq_cli.training.stage import Criterion
from movq_cli.training.trainable import FiniteCheck, ModelT, Stateful, Trainable, check_shares, checkpoint_activations
from movq_cli.training.watch import UNWATCHED, Watch, batch_count
from movq_cli.training_settings import TrainVQSettings

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
        self.size = all_settings.vq.image_size
        self.training_split = images.split("train")
        self.validation_split = images.split("val")
        loader.check_size(images, all_settings.vq)
        self.order = EpochOrder(len(self.training_split), settings.batch_size, settings.seed)
        self.steps = settings.total_steps(len(self.training_split))
        self.discriminator_start = settings.discriminator_step(self.steps, self.order.steps_per_epoch)
        self.perceptual = extractors.load_lpips("vgg", weights, device) if settings.perceptual_weight > 0 else None
        self.metrics = validation_scorers(min(self.size), weights, device)
        self.validation_criterion = best_criterion({metric.key for metric in self.metrics})
        self.criterion = self._best_criterion()
        check_shares(settings, ranks)
        self.finite_check = FiniteCheck(device, ranks)
        torch.manual_seed(settings.seed)
        self.tokenizer = self._trainable(_frozen(Tokenizer(all_settings.vq), settings.freeze))
        self.model = self.tokenizer.model
        quantization.prepare(self.model, settings)
        self.adversary: Adversary | None = None
        if settings.adversarial_weight > 0:
            discriminator = PatchDiscriminator(**settings.discriminator_layout)
            trained = self._trainable(discriminator, settings.discriminator_learning_rate, average=False)
            self.adversary = Adversary(trained, settings, self.discriminator_start, device)
        if settings.activation_checkpointing:
            checkpoint_activations(self.model, (ResidualBlock, AttentionBlock))
        self.uses = CodebookHealth(1, all_settings.vq.codebook_size).to(device)
        self.same_codes: tuple[str, ...] = ()
        """SHA-256 of the weight files whose codes the exported weights give, beside their own."""
        self.validates_first = False
        """Whether the initial weights are validated before the first step."""

    @property
    def discriminator(self) -> Trainable[PatchDiscriminator] | None:
        """The discriminator with its optimizer; None without an adversarial loss."""
        return None if self.adversary is None else self.adversary.discriminator

    def start_from(self, initial: InitialWeights) -> None:
        """Replace the initial random weights by trained ones; a checkpoint of the run replaces them again."""
        self.tokenizer.set_weights(initial.tokenizer)
        if self.discriminator is not None and (stored := initial.discriminator_of(self.settings)) is not None:
            self.discriminator.set_weights(stored)
        self.validates_first = True

    def _trainable(
        self, model: ModelT, learning_rate: float | None = None, *, average: bool = True
    ) -> Trainable[ModelT]:
        model = model.to(self.device).to(memory_format=self._memory_format)
        settings = self.settings
        rate = learning_rate or settings.learning_rate
        groups = quantization.parameter_groups(model, settings.codebook_learning_rate)
        optimizer = torch.optim.Adam(groups, lr=rate, betas=settings.betas, fused=True)
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
            resolution=self.size,
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
        adversary = self.adversary if self.adversary is not None and step >= self.adversary.first_step else None
        self.tokenizer.clear()
        if adversary is not None:
            adversary.begin(step)
        parts = [
            self._backward(part, number, step, adversary)
            for number, part in enumerate(batch.chunk(self.settings.accumulate))
        ]
        metrics = {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in parts[0].metrics}
        metrics["gradient_norm"] = self.tokenizer.clip()
        if adversary is not None:
            metrics["discriminator_gradient_norm"] = adversary.discriminator.clip()
        is_finite = self.finite_check.update(step, metrics)
        self.tokenizer.update(step, is_finite)
        if adversary is not None:
            adversary.update(step, metrics, is_finite)
        self._revive(parts, step, is_finite)
        return metrics

    def _backward(self, batch: Tensor, number: int, step: int, adversary: Adversary | None) -> _Part:
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
            if adversary is not None and step >= adversary.start:
                adversarial_gradient, adversarial_metrics = adversary.gradient(
                    images, out.features, self.model.decoder.conv_out, gradient, number
                )
                gradient = gradient + adversary.ramp(step) * adversarial_gradient
                metrics |= adversarial_metrics
            total = loss.total
            roots = [(out.images, share * gradient)]
            if out.losses:
                quantizer_loss = losses.quantizer(out.losses, self.settings)
                total = total + quantizer_loss
                roots.append((share * quantizer_loss, torch.ones_like(quantizer_loss)))
            # What depends on frozen parts alone has no gradient.
            tensors, gradients = zip(*(root for root in roots if root[0].requires_grad), strict=True)
            torch.autograd.backward(tensors, gradients)
        if adversary is not None:
            with adversary.discriminator.backward_of(number):
                metrics |= adversary.backward(originals, images.detach(), share, number)
        metrics |= losses.logged(out.losses) | {"loss": total}
        return _Part({name: value.detach() for name, value in metrics.items()}, out.encoded.detach(), out.codes)

    def _revive(self, parts: list[_Part], step: int, is_finite: Tensor) -> None:
        """Count the uses of the codes; every `revive_every` steps revive the codebook entries that had none."""
        interval = self.settings.revive_every
        if interval == 0 or "codebook" in self.settings.freeze:
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
    def validate(self, watch: Watch = UNWATCHED, *, averaged: bool = True) -> Metrics:
        """Return PSNR (dB), SSIM, LPIPS if its weights are available, and how colors and the codebook are used.

        `color_error` is the mean absolute error of an image's mean color, in 0..255. `saturation` is that of the
        reconstructions over that of the originals. `usage` is a share of the entries; usage and perplexity are also
        given for each chunk. The images are the complete validation split, or `validate_images` of it, of which each
        rank evaluates a share.

        Args:
            watch: Watch that ends the validation if the training is to stop.
            averaged: Whether the exported weights are validated; otherwise those of the last step.
        """
        model = self.tokenizer.in_eval_mode(averaged=averaged)
        limit = self.settings.validate_images or len(self.validation_split)
        chosen = evenly_spaced(len(self.validation_split), limit)
        metrics = ReconstructionMetrics(self.metrics, self.all_settings.vq, self.device)
        batches = loader.validation_batches(
            self.validation_split,
            chosen,
            self.all_settings.data,
            resolution=self.size,
            batch_size=self._images_at_once,
            device=self.device,
            ranks=self.ranks,
        )
        for batch in watch.batches(batches, batch_count(len(chosen), self._images_at_once, self.ranks), "validating"):
            metrics.update(*self._reconstruct(batch, model), batch)
        return metrics.metrics(self.ranks)

    @torch.inference_mode()
    def evaluate(self, watch: Watch = UNWATCHED) -> Metrics:
        """Return the rFID of `evaluate_images` validation images, evenly spaced in the split."""
        assert self.fid_evaluator is not None
        chosen = evenly_spaced(len(self.validation_split), self.settings.evaluate_images)
        indices = chosen[self.ranks.share(len(chosen))]
        size = self._images_at_once
        batches = (indices[start : start + size] for start in range(0, len(indices), size))
        watched = watch.batches(batches, batch_count(len(chosen), size, self.ranks), "computing rFID")
        model = self.tokenizer.exported
        return {
            "rfid": self.fid_evaluator.fid(
                self._reconstruct(
                    loader.center_crops(self.validation_split, batch, resolution=self.size, device=self.device),
                    model,
                )[1]
                for batch in watched
            )
        }

    @property
    def _images_at_once(self) -> int:
        """Number of images in one forward pass of a rank."""
        return self.settings.batch_size // self.ranks.world_size // self.settings.accumulate

    @property
    def loss_formula(self) -> str:
        """The weighted terms of the logged loss; the adversarial term is not one of them."""
        settings = self.settings
        terms = {"l1": settings.l1_weight, "l2": settings.l2_weight, "perceptual": settings.perceptual_weight}
        terms |= {"codebook": settings.codebook_weight, "commitment": settings.commitment_weight}
        terms |= {"entropy": settings.entropy_weight}
        formula = " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)
        if self.discriminator is None:
            return formula
        adversarial = f"{settings.adversarial_weight:g} adaptive_weight generator"
        return f"{formula}; the decoder also minimizes {adversarial} from step {self.discriminator_start} on"

    @property
    def evaluation_interval(self) -> int:
        """Number of steps between evaluations; 0 if there are none."""
        return self.settings.evaluation_interval(has_weights=self.fid_evaluator is not None)

    @property
    def milestones(self) -> frozenset[int]:
        """The number of steps before the discriminator's first step, to which a run can be taken back."""
        first = 0 if self.adversary is None else self.adversary.first_step
        return frozenset({first} if 0 < first < self.steps else ())

    @property
    def settled_after(self) -> int:
        """The number of steps before the discriminator's first step; 0 without one."""
        return max(self.milestones, default=0)

    @property
    def optional_parts(self) -> frozenset[str]:
        """The discriminator and the averages of its logits, which a run may get later."""
        return frozenset({"discriminator", "lecam"})

    @property
    def has_average(self) -> bool:
        """Whether the exported weights are a running average."""
        return self.tokenizer.average is not None

    def event(self, step: int) -> str | None:
        """Return what begins at the step of this index, for the log."""
        return None if self.adversary is None else self.adversary.event(step)

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """Return a warning about the discriminator, if it is of no use."""
        return None if self.adversary is None else self.adversary.warning(step, means)

    def _best_criterion(self) -> Criterion:
        """Return the criterion of the best weights.

        Raises:
            BadRequestError: The settings name a metric that is not computed.
        """
        computed = {metric.key for metric in self.metrics} | ({"rfid"} if self.evaluation_interval else set())
        chosen = self.settings.best_by
        if chosen is None:
            return best_criterion(computed)
        if chosen not in computed:
            raise BadRequestError(
                f"train_vq.best_by is {chosen}, which is not computed here",
                "Fetch the weights (movq weights --fetch), or choose another metric: null takes the best there is.",
            )
        return CRITERIA[chosen]

    @torch.inference_mode()
    def draw(self, run: Run, step: int) -> None:
        """Write the run's picture of a step: originals, their reconstructions, and the maps of their errors."""
        chosen = evenly_spaced(len(self.validation_split), _PICTURES)
        originals = loader.center_crops(self.validation_split, chosen, resolution=self.size, device=self.device)
        _, reconstructed = self._reconstruct(originals, self.tokenizer.exported)
        grids.save(run.picture(step), grids.with_errors(originals, reconstructed), len(originals), rows=grids.ROWS)

    def _reconstruct(self, batch: Tensor, model: Tokenizer) -> tuple[Tensor, Tensor]:
        """Return the codes and the reconstructions (uint8) of images, uint8 [B, 3, H, W], by a model in eval mode."""
        with devices.autocast(self.device, self.settings.precision):
            codes = model.encode(pixels.to_signed(batch))
            return codes, pixels.to_bytes(model.decode(codes))

    def parts(self) -> dict[str, Stateful]:
        """Return the state of the training by name: the models with their optimizers, and the uses of the codes."""
        parts: dict[str, Stateful] = {"tokenizer": self.tokenizer, "uses": self.uses}
        return parts if self.adversary is None else {**parts, **self.adversary.parts()}

    def export(self, path: Path) -> None:
        """Write the weights of the tokenizer with its settings."""
        header = checkpoints.TokenizerHeader(vq=self.all_settings.vq, same_codes=self.same_codes)
        checkpoints.save_weights(path, self.tokenizer.exported, header)


class _Part(NamedTuple):
    """The results of one part of a batch, apart from its gradients."""

    metrics: DeviceMetrics
    encoded: Tensor  # [B, D, h, w], the input of the quantizer
    codes: Tensor  # [B, h, w, c]


def _frozen(model: Tokenizer, parts: Collection[str]) -> Tokenizer:
    """Exclude parts of a tokenizer from the training, and return it."""
    modules = {
        "encoder": (model.encoder, model.quant_conv),
        "codebook": (model.quantize,),
        "decoder": (model.post_quant_conv, model.decoder),
    }
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(False)
    return model
