"""The typed settings of both stages; this module does not import torch.

The default, the bounds and the description of a setting stand here once. The help texts of the options
(`cli/options.py`), the comments of `movq presets show` and `docs/settings.md` are generated from them. A description is
a phrase that starts in lower case and has no full stop; where None is allowed, it ends in "; null = MEANING".
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from movq_cli.image_size import ImageSize
from movq_cli.setting_types import (
    Channels,
    Depth,
    Interval,
    MaskSchedule,
    Parts,
    Positive,
    Settings,
    Share,
    Side,
    SizeSetting,
    Weight,
    bounds_of,
)
from movq_cli.training_settings import TrainPriorSettings, TrainVQSettings


class DataSettings(Settings):
    """The training images and how they are cropped."""

    path: Path = Field(Path("data/images"), description="folder of the prepared data set, as written by `movq prepare`")
    crop: Literal["center", "random"] = Field("center", description="position of the training crops")
    flip: bool = Field(False, description="mirror each training image with probability 1/2, drawn anew in each epoch")
    workers: int = Field(-1, ge=-1, description="number of decoding threads; -1 = cores - 1 on CUDA, 0 on the CPU")


class ViewSettings(Settings):
    """The views of each training image from which a prior learns; a validation image has its centre crop only."""

    mirror: bool = Field(False, description="add the mirror image of each view; unsuitable if left and right differ")
    scales: tuple[Annotated[float, Field(ge=1, le=2)], ...] = Field(
        (),
        description="sizes, relative to the crop, at which corners and centre are cropped, at 1 the ends of the longer "
        "side and the centre; empty = the centre crop",
    )

    @property
    def count(self) -> int:
        """Number of views of one image."""
        crops = sum(3 if scale == 1 else 5 for scale in self.scales)
        return (crops or 1) * (2 if self.mirror else 1)


class ModulationSettings(Settings):
    """The spatially conditional normalization (equation 4) that replaces GroupNorms of the decoder."""

    levels: int = Field(3, ge=0, description="number of modulated levels, coarsest first, beside the middle block")
    kernel_size: Literal[1, 3] = Field(1, description="kernel size of the scale and bias convolutions, in pixels")
    source: Literal["conv_in", "quantized"] = Field(
        "conv_in", description="input of these convolutions: conv_in(z_q), or z_q itself"
    )
    affine: bool = Field(False, description="keep GroupNorm's own scale and bias beside the modulation")


class TokenizerSettings(Settings):
    """The architecture of stage 1: encoder and decoder of VQGAN, quantizer and modulation of MoVQ (section 3.1)."""

    resolution: SizeSetting = Field(
        256, description="side of the square training images in pixels, or height and width: [192, 256]"
    )
    channels: Channels = Field(128, description="number of channels at the finest level, before the multipliers")
    multipliers: tuple[Depth, ...] = Field(
        (1, 1, 2, 2, 4), max_length=14, description="channels of each level over `channels`, finest first"
    )
    blocks: Depth = Field(2, description="residual blocks in each level of the encoder; the decoder has one more")
    attention_resolutions: tuple[Side, ...] = Field(
        (16,), max_length=14, description="feature map sides with self-attention; of a rectangle, the shorter side"
    )
    mid_attention: bool = Field(True, description="self-attention between the two residual blocks in the middle")
    z_channels: Channels = Field(256, description="output channels of the encoder")
    embed_dim: Channels = Field(256, description="channels of the quantized map, all chunks together")
    chunks: Parts = Field(4, description="number of chunks of the channels, each coded by the shared codebook")
    codebook_size: int = Field(1024, ge=2, le=65536, description="number of entries of the codebook, K")
    quantizer: str = Field(
        "vq",
        description="quantizer: vq = nearest codebook entry, simvq = the same with entries that are a linear layer of "
        "frozen vectors, fsq = rounded channels without a codebook, gumbel = entry with the largest logit",
    )
    fsq_levels: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(
        (), max_length=16, description="levels of each channel of quantizer fsq; their product is codebook_size"
    )
    normalize_codes: bool = Field(False, description="compare and decode vectors of unit length, as LlamaGen does")
    image_range: Literal["-1,1", "0,1"] = Field("-1,1", description="range of the networks' own pixel values")
    norm_groups: Parts = Field(
        32, description="groups of each GroupNorm, 32 in VQGAN; a group of one channel would lose the channel's mean"
    )
    initial_feature: Literal["quantized", "sinusoid", "constant", "embedded_constant", "fourier", "projected"] = Field(
        "fourier",
        description="first activation of the decoder, F0 in equation 4; quantized = as in VQGAN, embedded_constant = "
        "conv_in of a constant",
    )
    modulation: ModulationSettings | None = Field(
        default_factory=ModulationSettings,
        description="modulated norms (equation 4); null = plain GroupNorm everywhere, as in VQGAN",
    )

    @property
    def factor(self) -> int:
        """Downsampling factor: side in pixels of the image area of one code position."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def image_size(self) -> ImageSize:
        """Height and width of the training images, in pixels."""
        return ImageSize.of(self.resolution)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels with self-attention, 0 = the finest: those whose feature map has its shorter side in the setting."""
        side = min(self.image_size)
        levels = range(len(self.multipliers))
        return tuple(level for level in levels if side // 2**level in self.attention_resolutions)

    @property
    def code_dim(self) -> int:
        """Number of channels of one codebook entry."""
        return self.embed_dim // self.chunks

    @property
    def code_shape(self) -> CodeShape:
        """Shape of the codes of one training image."""
        height, width = (side // self.factor for side in self.image_size)
        return CodeShape(height=height, width=width, chunks=self.chunks, codebook_size=self.codebook_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels of each level, finest first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.multipliers:
            raise ValueError("multipliers is empty: give one number a level, e.g. [1, 2, 4]")
        odd = [width for width in self.widths if width % self.norm_groups]
        if odd:
            raise ValueError(
                f"channels x multipliers gives widths {odd}: each must be a multiple of norm_groups, {self.norm_groups}"
            )
        if any(side % self.factor for side in self.image_size):
            subject = f"resolution {self.resolution} is not a multiple"
            if not self.image_size.is_square:
                subject = f"resolution {list(self.image_size)} has a side that is not a multiple"
            raise ValueError(f"{subject} of the downsampling factor {self.factor}")
        if self.attention_resolutions and not self.attention_levels and not self.image_size.is_square:
            sides = [min(self.image_size) // 2**level for level in range(len(self.multipliers))]
            raise ValueError(
                f"attention_resolutions {list(self.attention_resolutions)} has the shorter side of no feature map: "
                f"with resolution {list(self.image_size)} these sides are {sides}; [] is no attention"
            )
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
    """The shape of the codes of one image: h x w positions, c codes at each position, K possible values of a code."""

    height: Side
    width: Side
    chunks: Parts
    codebook_size: int = Field(ge=2, le=65536)

    @property
    def size(self) -> tuple[int, int, int]:
        """The tuple (h, w, c)."""
        return self.height, self.width, self.chunks

    @property
    def positions(self) -> int:
        """Number of positions, h w; the sequence length of the transformer."""
        return self.height * self.width

    @property
    def codes(self) -> int:
        """Number of codes of one image, h w c."""
        return self.positions * self.chunks


class PriorSettings(Settings):
    """The transformer of stage 2 (section 4.3); the shape of the codes comes from the tokenizer."""

    mode: str = Field(
        "mask",
        description="decoding: mask = in parallel, auto = autoregressive, depth = by a depth transformer",
    )
    layers: Parts = Field(24, description="transformer blocks; with mode=depth, 2 of them run over the chunks")
    heads: Parts = Field(16, description="number of attention heads")
    width: Channels = Field(1024, description="width of the embeddings")
    hidden: Annotated[int, Field(ge=1, le=2**20)] = Field(4096, description="hidden width of the MLP in each block")
    classes: int = Field(
        0, ge=0, le=65536, description="number of classes on which the prior is conditioned; 0 = unconditional"
    )
    qk_norm: bool = Field(False, description="normalize the queries and keys of attention, for stability")
    dropout: Share = Field(
        0.0, description="share of the outputs of attention and of the MLP that training drops; 0 = none"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class SampleSettings(Settings):
    """The settings of sampling from a prior. Each field is also an option of `movq sample`, which takes precedence."""

    steps: Annotated[int, Field(ge=1, le=2**20)] = Field(8, description="number of decoding steps of a masked prior")
    temperature: float = Field(1.0, gt=0, description="temperature of the codes' distributions; 1 = as learned")
    top_k: Positive | None = Field(None, description="draw only among this many most likely codes; null = all codes")
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw only among the most likely codes that together have this probability"
    )
    choice_temperature: Weight = Field(
        4.5, description="scale of the Gumbel noise on a masked prior's confidences; it falls to 0 over the steps"
    )
    order: str = Field(
        "confidence",
        description="order in which a masked prior decides codes: confidence = most likely first, halton = those far "
        "apart in one step, random = any",
    )
    mask_schedule: MaskSchedule = Field(
        "cosine", description="schedule of the number of codes that stay masked over the steps of a masked prior"
    )
    guidance: Weight = Field(
        0.0, description="classifier-free guidance, the scale of diffusers minus 1; 0 = off, the paper's setting"
    )
    guidance_schedule: Literal["constant", "linear", "power-cosine"] = Field(
        "constant",
        description="strength over the decoding steps; linear = rising to the full strength at the last one, "
        "power-cosine = rising late",
    )
    guidance_power: float = Field(
        4.0, gt=0, le=64, description="exponent of the progress in the power-cosine; the larger, the later it rises"
    )
    guidance_interval: Interval | None = Field(
        None, description="shares of the decoding steps between which there is guidance, as 0.2-0.8; null = all steps"
    )

    def guidance_at(self, step: int, steps: int) -> float:
        """Return the strength of guidance at a decoding step.

        The power-cosine of the progress t / T is that of MDT (Gao et al. 2023), (1 - cos(pi (t / T)^power)) / 2; the
        interval is that of Kynkäänniemi et al. (2024) with the progress in place of the noise level.

        Args:
            step: Index of the step, t, from 0.
            steps: Number of decoding steps, T.
        """
        progress = step / steps
        start, end = bounds_of(self.guidance_interval or "0-1")
        if not start <= progress < end:
            return 0.0
        if self.guidance_schedule == "power-cosine":
            return self.guidance * (1 - math.cos(math.pi * progress**self.guidance_power)) / 2
        return self.guidance * (1.0 if self.guidance_schedule == "constant" else (step + 1) / steps)


class SampleTargets(Settings):
    """Published values of the samples of one prior; null where the source gives none."""

    fid: float | None = Field(None, description="FID of samples; null = not published")
    isc: float | None = Field(None, description="Inception Score of samples; null = not published")
    precision: float | None = Field(None, description="precision of samples; null = not published")
    recall: float | None = Field(None, description="recall of samples; null = not published")


class Targets(Settings):
    """Published values that a preset should reproduce; null where the source gives none."""

    source: str = Field("", description="publication that gives the values")
    psnr: float | None = Field(None, description="PSNR of reconstructions in dB; null = not published")
    ssim: float | None = Field(None, description="SSIM of reconstructions; null = not published")
    lpips: float | None = Field(None, description="LPIPS of reconstructions; null = not published")
    rfid: float | None = Field(None, description="FID of reconstructions; null = not published")
    mask: SampleTargets = Field(default_factory=SampleTargets, description="samples of the masked prior")
    auto: SampleTargets = Field(default_factory=SampleTargets, description="samples of the autoregressive prior")

    def of_reconstructions(self) -> dict[str, float]:
        """Return the values of reconstructions that are published, by their names."""
        return self.model_dump(exclude={"source", "mask", "auto"}, exclude_none=True)

    def of_samples(self, mode: str | None) -> dict[str, float]:
        """Return the values of samples that are published, by their names.

        Args:
            mode: Mode of the prior that drew the samples; None if it is not known, and then none is comparable.
        """
        known = {"mask": self.mask, "auto": self.auto}
        return known[mode].model_dump(exclude_none=True) if mode in known else {}


class Preset(Settings):
    """All settings of one model: its data, both architectures, both trainings and its sampling."""

    description: str = Field("", description="line that `movq presets` shows")
    data: DataSettings = Field(default_factory=DataSettings, description="training images")
    vq: TokenizerSettings = Field(default_factory=TokenizerSettings, description="architecture of stage 1")
    train_vq: TrainVQSettings = Field(default_factory=TrainVQSettings, description="training of stage 1")
    views: ViewSettings = Field(default_factory=ViewSettings, description="views of each training image for stage 2")
    prior: PriorSettings = Field(default_factory=PriorSettings, description="architecture of stage 2")
    train_prior: TrainPriorSettings = Field(default_factory=TrainPriorSettings, description="training of stage 2")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="sampling from the prior of stage 2")
    target: Targets = Field(default_factory=Targets, description="published values that the preset should reproduce")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.prior.width % self.vq.chunks:
            raise ValueError(f"prior.width {self.prior.width} does not divide into {self.vq.chunks} code embeddings")
        return self
