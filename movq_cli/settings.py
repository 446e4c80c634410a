"""The typed settings of both stages: a leaf without torch; each field's description is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]

Start = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?( epochs?|%)$")]
"""A moment of a run: a step, or a number of epochs or percents, which do not depend on how many images there are."""

NORM_GROUPS = 32
"""Groups of every GroupNorm, as in VQGAN: each width must be a multiple of it."""


class Settings(BaseModel):
    """Immutable, and closed: an unknown name is an error, not a silent no-op."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataSettings(Settings):
    """Which images are trained on, and how they are cut."""

    path: Path = Field(Path("data/images"), description="prepared set, as `movq prepare` writes it")
    crop: Literal["center", "random"] = Field("center", description="where training crops are taken")
    flip: bool = Field(False, description="mirror half of the training images, drawn anew each epoch")
    workers: int = Field(-1, ge=-1, description="decoding threads; -1 = cores - 1 on CUDA, 0 on the CPU")


class ViewSettings(Settings):
    """Which views of each training image a prior learns from; a validation image is its centre crop alone."""

    mirror: bool = Field(False, description="each view and its mirror image; not where left and right mean something")
    scales: tuple[Annotated[float, Field(gt=1, le=2)], ...] = Field(
        (), description="crop corners and centre with the short side at these times the crop's; empty = centre crop"
    )

    @property
    def count(self) -> int:
        """Views of one image."""
        return (5 * len(self.scales) or 1) * (2 if self.mirror else 1)


class ModulationSettings(Settings):
    """Where and how equation 4 replaces the decoder's plain GroupNorms."""

    levels: int = Field(3, ge=0, description="decoder levels modulated, coarsest first, after the middle")
    kernel_size: Literal[1, 3] = Field(1, description="of the scale and bias convolutions, pixels")
    source: Literal["conv_in", "quantized"] = Field(
        "conv_in", description="the map they read: conv_in(z_q), or z_q itself"
    )
    affine: bool = Field(False, description="keep GroupNorm's own scale and bias beside the modulation")


class TokenizerSettings(Settings):
    """Stage 1's architecture: VQGAN's encoder and decoder, MoVQ's quantizer and modulation (section 3.1)."""

    resolution: Positive = Field(256, description="training image side, pixels")
    channels: Positive = Field(128, description="base width")
    multipliers: tuple[Positive, ...] = Field((1, 1, 2, 2, 4), description="width of each level over base width")
    blocks: Positive = Field(2, description="residual blocks a level (the decoder has one more)")
    attention_resolutions: tuple[Positive, ...] = Field((16,), description="feature map sides with attention")
    z_channels: Positive = Field(256, description="encoder's output channels")
    embed_dim: Positive = Field(256, description="channels that are quantized, all chunks together")
    chunks: Positive = Field(4, description="channel chunks quantized against the one codebook, each a code")
    codebook_size: int = Field(1024, ge=2, le=65536, description="entries of the codebook, K")
    quantizer: str = Field("vq", description="quantizer between encoder and decoder; vq = nearest codebook entry")
    initial_feature: Literal["quantized", "sinusoid", "constant", "fourier", "projected"] = Field(
        "fourier", description="the decoder's first activation, F0 of equation 4"
    )
    modulation: ModulationSettings | None = Field(
        ModulationSettings(), description="equation 4's norms; null = plain GroupNorm everywhere, as in VQGAN"
    )

    @property
    def factor(self) -> int:
        """Image pixels a side for one code position."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def grid(self) -> int:
        """Code positions a side at the training resolution."""
        return self.resolution // self.factor

    @property
    def code_dim(self) -> int:
        """Width of one codebook entry."""
        return self.embed_dim // self.chunks

    @property
    def code_shape(self) -> CodeShape:
        """The codes of one training image."""
        return CodeShape(height=self.grid, width=self.grid, chunks=self.chunks, codebook_size=self.codebook_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.multipliers:
            raise ValueError("multipliers is empty: give one number a level, e.g. [1, 2, 4]")
        odd = [width for width in self.widths if width % NORM_GROUPS]
        if odd:
            raise ValueError(f"channels x multipliers gives widths {odd}: each must be a multiple of {NORM_GROUPS}")
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the downsampling factor {self.factor}")
        if self.embed_dim % self.chunks:
            raise ValueError(f"embed_dim {self.embed_dim} does not divide into {self.chunks} chunks")
        if self.modulation and self.modulation.levels > len(self.multipliers):
            raise ValueError(
                f"modulation.levels is {self.modulation.levels}, but the decoder has {len(self.multipliers)} levels"
            )
        if self.initial_feature == "fourier" and 2 * self.embed_dim != self.widths[-1]:
            raise ValueError(
                f"initial_feature is 'fourier', whose sine and cosine of embed_dim {self.embed_dim} channels must "
                f"fill the coarsest width {self.widths[-1]}: set embed_dim to {self.widths[-1] // 2}"
            )
        if self.initial_feature != "quantized" and self.modulation is None:
            raise ValueError(
                f"initial_feature is {self.initial_feature!r} without modulation, so that no code would reach the "
                "decoder: set initial_feature=quantized or give modulation"
            )
        return self


class CodeShape(Settings):
    """The codes of one image as a prior sees them: a grid of positions, c codes at each, K choices a code."""

    height: Positive
    width: Positive
    chunks: Positive
    codebook_size: int = Field(ge=2, le=65536)

    @property
    def size(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.height, self.width, self.chunks

    @property
    def positions(self) -> int:
        """Positions h w, the transformer's sequence length."""
        return self.height * self.width

    @property
    def codes(self) -> int:
        """Codes of one image, h w c."""
        return self.positions * self.chunks


class PriorSettings(Settings):
    """Stage 2's transformer (section 4.3); its grid, chunks and codebook come from the tokenizer."""

    mode: str = Field(
        "mask",
        description="how codes are predicted: mask (in parallel steps), auto (autoregressively), or depth "
        "(autoregressively, with a small transformer over the chunks)",
    )
    layers: Positive = Field(24, description="transformer blocks; with mode=depth 2 of them over the chunks")
    heads: Positive = Field(16, description="attention heads")
    width: Positive = Field(1024, description="embedding width")
    hidden: Positive = Field(4096, description="hidden width of a block's MLP")
    classes: int = Field(0, ge=0, description="classes the prior is conditioned on; 0 = unconditional")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class TrainSettings(Settings):
    """What the training of both stages shares."""

    batch_size: Positive = Field(48, description="images a step, over all ranks")
    epochs: float | None = Field(None, gt=0, description="passes over the training images; or give steps")
    steps: Positive | None = Field(None, description="optimizer steps; or give epochs")
    base_learning_rate: float = Field(4.5e-6, gt=0, description="Adam's rate = this x batch_size")
    betas: tuple[Share, Share] = Field((0.5, 0.9), description="Adam's moment decays")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    decay: Literal["none", "cosine"] = Field("none", description="of the rate to 0 over the run, after warm-up")
    clip_norm: float | None = Field(None, gt=0, description="gradient norm above which it is scaled; null = never")
    ema_decay: Share = Field(0.0, description="of the running average of the weights that is exported; 0 = off")
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="matrix arithmetic; auto = bf16 where the device is built for it"
    )
    accumulate: Positive = Field(1, description="parts a rank's share of a batch is worked through in, to save memory")
    compile: bool | None = Field(None, description="torch.compile; null = on CUDA")
    activation_checkpointing: bool = Field(
        False, description="compute blocks again in the backward pass: much less memory, a third more time"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of initialisation, data order and every draw")
    log_every: Positive = Field(50, description="steps between log lines")
    validate_every: Positive = Field(1000, description="steps between validations")
    evaluate_every: int = Field(
        0,
        ge=0,
        description="steps between FIDs, of reconstructions or of samples (needs Inception's weights); 0 = never",
    )
    evaluate_images: int = Field(10_000, ge=2, description="images that an FID is of")
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints to resume from")
    tensorboard: bool | None = Field(None, description="TensorBoard events in the run folder; null = where installed")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps (set the other to null)")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.accumulate} parts (accumulate)")
        return self

    @property
    def learning_rate(self) -> float:
        """The optimizer's rate: VQGAN's rule, base rate times global batch."""
        return self.base_learning_rate * self.batch_size

    def total_steps(self, images: int) -> int:
        """Optimizer steps of the whole run.

        Args:
            images: Training images, or views of them, in an epoch.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (images // self.batch_size)))


class TrainVQSettings(TrainSettings):
    """Stage 1's training: equation 3 with VQGAN's perceptual and adversarial terms."""

    epochs: float | None = Field(40, gt=0, description="passes over the training images; or give steps")
    l1_weight: Weight = Field(1.0, description="mean absolute error, images in [-1, 1]")
    l2_weight: Weight = Field(0.0, description="mean squared error, images in [-1, 1]")
    perceptual_weight: Weight = Field(1.0, description="LPIPS with VGG-16; 0 = off, no weights needed")
    codebook_weight: Weight = Field(
        0.25, description="pulls codes to the encoder; VQGAN's code applies its beta 0.25 here ('legacy')"
    )
    commitment_weight: Weight = Field(
        1.0,
        description="pulls the encoder to its codes; 0.25 with codebook_weight=1 is equation 3 as written",
    )
    revive_every: int = Field(
        0, ge=0, description="steps after which codebook entries unused since are moved to encoder outputs; 0 = never"
    )
    channels_last: bool | None = Field(None, description="memory format of the convolutions; null = on CUDA")
    adversarial_weight: Weight = Field(0.8, description="times the adaptive weight; 0 = no discriminator")
    discriminator_start: Start = Field(
        0, description="when the adversarial term sets in: a step (30001), '3 epochs', or '50%' of the run"
    )
    discriminator_ramp: int = Field(
        0, ge=0, description="steps over which the adversarial term then rises to its weight"
    )
    discriminator_channels: Positive = Field(64, description="PatchGAN's base width")
    discriminator_layers: Positive = Field(3, description="PatchGAN's strided layers")

    def discriminator_step(self, steps: int, steps_per_epoch: int) -> int:
        """The first step with the adversarial term.

        Args:
            steps: Of the whole run.
            steps_per_epoch: Of one pass over the training images.
        """
        start = self.discriminator_start
        if isinstance(start, int):
            return start
        if start.endswith("%"):
            return round(float(start[:-1]) / 100 * steps)
        return round(float(start.split()[0]) * steps_per_epoch)


class TrainPriorSettings(TrainSettings):
    """Stage 2's training: cross-entropy on the masked codes."""

    batch_size: Positive = Field(64, description="image views a step, over all ranks")
    epochs: float | None = Field(200, gt=0, description="passes over all views of the training images; or give steps")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's moment decays")
    weight_decay: Weight = Field(0.01, description="AdamW's, on matrices only")
    label_smoothing: Share | None = Field(
        None, description="share of the target spread over all codes; null = 0.1 for mode=mask, none for the others"
    )
    label_dropout: Share = Field(0.1, description="share of images trained without their class, for guidance")


class SampleSettings(Settings):
    """The decoding loop's settings; a command's options win over them."""

    steps: Positive = Field(8, description="decoding steps")
    temperature: float = Field(1.0, gt=0, description="of the codes' distribution; 1 = as learned")
    choice_temperature: Weight = Field(4.5, description="Gumbel noise on the confidences, falling to 0 over the steps")
    order: str = Field("confidence", description="which codes a decoding step keeps; confidence = the likeliest")
    top_k: Positive | None = Field(None, description="draw only among as many likeliest codes; null = all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw only among the likeliest codes that make up this share")
    guidance: Weight = Field(0.0, description="classifier-free guidance; 0 = off, plain class-conditional samples")
    guidance_schedule: Literal["constant", "linear"] = Field(
        "constant", description="guidance over the steps; linear = rising from none to the whole at the last step"
    )

    def guidance_at(self, step: int, steps: int) -> float:
        """The strength of guidance at a step of so many, from 0."""
        return self.guidance * (1.0 if self.guidance_schedule == "constant" else (step + 1) / steps)


class Targets(Settings):
    """Published figures that a preset is held against; null where the source gives none."""

    source: str = Field("", description="where the figures stand")
    psnr: float | None = Field(None, description="reconstruction PSNR, dB")
    ssim: float | None = Field(None, description="reconstruction SSIM")
    lpips: float | None = Field(None, description="reconstruction LPIPS")
    rfid: float | None = Field(None, description="reconstruction FID")
    fid: float | None = Field(None, description="sample FID")
    isc: float | None = Field(None, description="sample Inception Score")
    precision: float | None = Field(None, description="sample precision")
    recall: float | None = Field(None, description="sample recall")


class Preset(Settings):
    """Everything that one model, its training and its sampling need: what a YAML preset resolves to."""

    description: str = Field("", description="one line for `movq presets`")
    data: DataSettings = Field(DataSettings(), description="the images")
    vq: TokenizerSettings = Field(TokenizerSettings(), description="stage 1's architecture")
    train_vq: TrainVQSettings = Field(TrainVQSettings(), description="stage 1's training")
    views: ViewSettings = Field(ViewSettings(), description="stage 2's views of each training image")
    prior: PriorSettings = Field(PriorSettings(), description="stage 2's architecture")
    train_prior: TrainPriorSettings = Field(TrainPriorSettings(), description="stage 2's training")
    sample: SampleSettings = Field(SampleSettings(), description="stage 2's decoding")
    target: Targets = Field(Targets(), description="published figures to reach")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.prior.width % self.vq.chunks:
            raise ValueError(f"prior.width {self.prior.width} does not divide into {self.vq.chunks} code embeddings")
        if self.prior.classes > self.vq.codebook_size:
            raise ValueError(
                f"prior.classes is {self.prior.classes}, but class ids share the code table's "
                f"{self.vq.codebook_size} rows"
            )
        return self
