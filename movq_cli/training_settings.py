"""The settings of the training of both stages; this module does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from movq_cli.setting_types import Channels, Depth, Interval, MaskSchedule, Positive, Settings, Share, Weight, bounds_of

Start = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?( epochs?|%)$")]
"""A point of a run: a step (30001), a number of epochs ('3 epochs'), or a share of the run ('50%')."""


class TrainSettings(Settings):
    """The training settings that both stages share."""

    batch_size: Positive = Field(48, description="images in a training step, over all processes")
    epochs: float | None = Field(None, gt=0, description="length of the run in epochs; null = given by steps")
    steps: Positive | None = Field(None, description="length of the run in optimizer steps; null = given by epochs")
    base_learning_rate: float = Field(4.5e-6, gt=0, description="Adam's learning rate is this x batch_size")
    betas: tuple[Share, Share] = Field((0.5, 0.9), description="decay rates of Adam's two moment estimates")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    decay: Literal["none", "cosine"] = Field("none", description="decay of the learning rate to 0 after the warm-up")
    clip_norm: float | None = Field(
        None, gt=0, description="limit to which the gradient norm is clipped; null = no limit"
    )
    ema_decay: Share = Field(
        0.0, description="decay of the exported average of the weights after its warm-up; 0 = no average"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="number format of matrix products; auto = bf16 if the hardware supports it"
    )
    accumulate: Positive = Field(1, description="number of parts in which a batch is processed, to save memory")
    compile: bool | None = Field(None, description="use torch.compile; null = on CUDA, from 2,000 steps on")
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: much less memory, a third more time"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of initialisation, data order and random numbers")
    log_every: Positive = Field(50, description="steps between log lines")
    validate_every: Positive = Field(1000, description="steps between validations")
    validate_images: Positive | None = Field(
        None, description="number of validation images, evenly spaced in the split; null = all"
    )
    evaluate_every: Annotated[int, Field(ge=0)] | None = Field(
        0,
        description="steps between FIDs, which need Inception's weights; 0 = never; "
        "null = at each validation if there are the weights",
    )
    evaluate_images: int = Field(10_000, ge=2, description="number of reconstructions or samples for such an FID")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints from which a run can be resumed")
    keep_checkpoints: int = Field(
        0, ge=0, description="number of earlier checkpoints that stay beside the last one, for `--from RUN@STEP`"
    )
    early_stop: Positive | None = Field(
        None, description="end the run after this many validations without a better value of best_by; null = never"
    )
    tensorboard: bool | None = Field(None, description="write TensorBoard events; null = if it is installed")
    wandb: bool = Field(False, description="record the run by Weights & Biases too (movq[wandb])")
    trackio: bool = Field(False, description="record the run by trackio too (movq[trackio])")
    report: bool | None = Field(
        None, description="write report.html at each validation; null = if movq[report] is installed"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps (set the other to null)")
        if self.evaluate_every == 0 and getattr(self, "best_by", None) in {"rfid", "fid"}:
            raise ValueError("best_by is an FID, which is never computed: set evaluate_every")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)")
        return self

    @property
    def learning_rate(self) -> float:
        """Learning rate of the optimizer: the base learning rate times the global batch size, which is VQGAN's rule."""
        return self.base_learning_rate * self.batch_size

    def evaluation_interval(self, *, has_weights: bool) -> int:
        """Return the number of steps between FIDs, 0 for none.

        Args:
            has_weights: Whether Inception's weights are available.
        """
        if self.evaluate_every is None:
            return self.validate_every if has_weights else 0
        return self.evaluate_every

    def total_steps(self, images: int) -> int:
        """Return the number of optimizer steps of the complete run.

        Args:
            images: Number of training images, or of views of them, in an epoch.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (images // self.batch_size)))


class TrainVQSettings(TrainSettings):
    """The training of stage 1: equation 3, with the perceptual and adversarial terms of VQGAN."""

    epochs: float | None = Field(40, gt=0, description="length of the run in epochs; null = given by steps")
    l1_weight: Weight = Field(1.0, description="weight of the mean absolute error of images in [-1, 1]")
    l2_weight: Weight = Field(0.0, description="weight of the mean squared error of images in [-1, 1]")
    perceptual_weight: Weight = Field(
        1.0, description="weight of LPIPS with VGG-16; 0 = off, without pretrained weights"
    )
    codebook_weight: Weight = Field(
        0.25, description="weight of the codebook loss; VQGAN's code applies its beta of 0.25 here ('legacy')"
    )
    commitment_weight: Weight = Field(
        1.0, description="weight of the commitment loss; 0.25 with codebook_weight=1 is equation 3 as written"
    )
    quantizer_gradient: Literal["straight-through", "rotation"] = Field(
        "straight-through",
        description="gradient from the decoder to the encoder: copied, or turned and scaled by the rotation trick",
    )
    entropy_weight: Weight = Field(
        0.0, description="weight of the entropy loss, by which choices become certain and all codes frequent; 0 = off"
    )
    entropy_temperature: float = Field(
        0.01, gt=0, description="temperature of the softmax over the negative distances in the entropy loss"
    )
    codebook_learning_rate: float | None = Field(
        None,
        gt=0,
        description="learning rate of the quantizer, constant and not scaled by batch_size; null = as all weights",
    )
    perturbed_images: float = Field(
        0.0, ge=0, le=1, description="share of the images whose codes are perturbed, against a prior's errors; 0 = off"
    )
    perturbed_codes: float = Field(0.5, gt=0, le=1, description="share of the codes of such an image that are replaced")
    perturbation_neighbors: Positive = Field(
        100, description="number of nearest codebook entries from which a replaced code is drawn"
    )
    freeze: tuple[Literal["encoder", "codebook", "decoder"], ...] = Field(
        (), description="parts that are not trained; with the encoder and the codebook, all codes stay the same"
    )
    revive_every: int = Field(
        0, ge=0, description="steps between replacements of unused codebook entries by encoder outputs; 0 = never"
    )
    channels_last: bool | None = Field(None, description="channels-last memory format; null = on CUDA only")
    adversarial_weight: Weight = Field(
        0.8, description="weight of the adversarial loss, times the adaptive weight; 0 = no discriminator"
    )
    discriminator_start: Start = Field(
        0, description="start of the adversarial loss: a step (30001), '3 epochs', or '50%' of the run"
    )
    discriminator_ramp: int = Field(0, ge=0, description="steps over which that loss then rises to its weight")
    discriminator_warmup: int = Field(
        0, ge=0, description="steps for which the discriminator is trained before that start; 0 = as in VQGAN"
    )
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="learning rate of the discriminator, not scaled by batch_size; null = the tokenizer's"
    )
    adaptive_weight_limit: float = Field(
        1e4, gt=0, description="upper limit of the adaptive weight of the adversarial loss; VQGAN's code has 10,000"
    )
    lecam_weight: Weight = Field(
        0.0, description="weight of the LeCam regularization of the discriminator, for few images; 0 = off"
    )
    r1_weight: Weight = Field(
        0.0, description="weight of the gradient penalty of the discriminator on the originals (R1's gamma); 0 = off"
    )
    r1_every: Positive = Field(
        16, description="steps between penalties, each of which then counts as often, as in StyleGAN2"
    )
    discriminator_augmentation: tuple[Literal["color", "translation", "cutout"], ...] = Field(
        (), description="random changes to all images that the discriminator sees, for few images"
    )
    best_by: Literal["rfid", "lpips", "psnr"] | None = Field(
        None, description="metric of the best weights; null = rfid if it is computed, else lpips, else psnr"
    )
    discriminator_channels: Channels = Field(64, description="channels of the discriminator's first layer (PatchGAN)")
    discriminator_layers: Depth = Field(3, description="number of strided layers of the discriminator")
    discriminator_norm: Literal["batch", "group", "none"] = Field(
        "batch", description="normalization in the discriminator: over the batch, in groups of channels, or none"
    )
    discriminator_blur: bool = Field(
        False, description="blur before the discriminator's layers downsample, in place of strided convolutions"
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if {"encoder", "codebook", "decoder"} <= set(self.freeze):
            raise ValueError("freeze names all parts: leave one of encoder, codebook and decoder to train")
        return self

    @property
    def discriminator_layout(self) -> dict[str, Any]:
        """The arguments with which the discriminator is built."""
        return {name: getattr(self, f"discriminator_{name}") for name in ("channels", "layers", "norm", "blur")}

    def discriminator_step(self, steps: int, steps_per_epoch: int) -> int:
        """Return the index of the first step with the adversarial loss.

        Args:
            steps: Number of steps of the complete run.
            steps_per_epoch: Number of steps of one pass over the training images.
        """
        start = self.discriminator_start
        if isinstance(start, int):
            return start
        if start.endswith("%"):
            return round(float(start[:-1]) / 100 * steps)
        return round(float(start.split()[0]) * steps_per_epoch)


class TrainPriorSettings(TrainSettings):
    """The training of stage 2: cross-entropy on the masked codes, or on all codes of an autoregressive prior."""

    batch_size: Positive = Field(64, description="image views in a training step, over all processes")
    epochs: float | None = Field(
        200, gt=0, description="length of the run in epochs of all views; null = given by steps"
    )
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="decay rates of AdamW's two moment estimates")
    weight_decay: Weight = Field(0.01, description="weight decay of AdamW, applied to weight matrices only")
    label_smoothing: Share | None = Field(
        None, description="share of the target spread evenly over all codes; null = 0.1 with mode=mask, else 0"
    )
    mask_schedule: MaskSchedule = Field(
        "cosine", description="schedule from which the share of masked codes of each image is drawn, with mode=mask"
    )
    random_order: Interval | None = Field(
        None,
        description="with mode=auto, train in random orders of the positions; between these shares of the steps, such "
        "as 0.5-0.75, the raster order replaces them; null = raster order only",
    )
    best_by: Literal["fid", "loss"] | None = Field(
        None, description="metric of the best weights; null = fid if it is computed, else loss"
    )
    label_dropout: Share = Field(
        0.0, description="share of images trained without their class, which guidance needs; 0 = none, as in the paper"
    )

    def random_order_share(self, step: int, steps: int) -> float:
        """Return the share of images whose positions are permuted at a step.

        Args:
            step: Index of the step, from 0.
            steps: Number of steps of the complete run.

        Returns:
            1 up to the start of `random_order`, 0 from its end on, and linear in between; 0 without the setting.
        """
        if self.random_order is None:
            return 0.0
        start, end = bounds_of(self.random_order)
        return min(1.0, max(0.0, (end - step / steps) / (end - start)))
