"""The curves of a training: which metrics share a chart, and what each chart looks like if the training is healthy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movq_cli.report import charts
from movq_cli.report.blocks import Chart
from movq_cli.run_history import Part, RunHistory, Series

_TRAINING: Part = "training"
_VALIDATION: Part = "validation"


@dataclass(frozen=True)
class Curve:
    """A chart, and the metrics in it."""

    title: str
    note: str
    metrics: tuple[tuple[Part, str, str], ...]
    """Part of the log, name of the metric, and name of its line."""
    unit: str = ""
    is_log: bool = False
    arrays: tuple[str, str] | None = None
    """A validation metric that is an array, and the name of its lines, to which the index is added."""


_VQ = (
    Curve(
        "Losses of the reconstruction",
        "Healthy: all fall fast, then slowly, and never rise for long. When the adversarial loss begins, l1 and l2 may "
        "rise a little, because sharper images are further from the mean.",
        (
            (_TRAINING, "loss", "loss (without the adversarial term)"),
            (_TRAINING, "l1", "l1"),
            (_TRAINING, "l2", "l2"),
            (_TRAINING, "perceptual", "perceptual"),
            (_TRAINING, "codebook", "codebook"),
        ),
        is_log=True,
    ),
    Curve(
        "PSNR of the validation images",
        "Healthy: it rises and levels off; a small loss after the start of the adversarial loss is normal. The line of "
        "the weights of the last step ends when the running average is as good.",
        (
            (_VALIDATION, "psnr", "exported weights"),
            ("validation_of_raw_weights", "psnr", "weights of the last step"),
        ),
        unit="dB",
    ),
    Curve(
        "LPIPS and SSIM of the validation images",
        "Healthy: LPIPS (a distance) falls, and SSIM (a similarity, at most 1) rises.",
        ((_VALIDATION, "lpips", "LPIPS"), (_VALIDATION, "lpips_vgg", "LPIPS (VGG)"), (_VALIDATION, "ssim", "SSIM")),
    ),
    Curve(
        "FID of the reconstructions (rFID)",
        "Healthy: it falls, and falls again after the adversarial loss begins: that is what the discriminator is for. "
        "Its level depends on the number of images; compare it only with runs that use as many.",
        ((_VALIDATION, "rfid", "rFID"),),
    ),
    Curve(
        "Colors of the reconstructions",
        "Healthy: saturation approaches 1. Below 0.9 colors are lost, above 1.1 they are exaggerated.",
        ((_VALIDATION, "saturation", "saturation, reconstruction over original"),),
    ),
    Curve(
        "Error of the mean color",
        "Healthy: it falls towards 1 level of 256 and stays there. A rise is a cast of color or brightness.",
        ((_VALIDATION, "color_error", "mean error of an image's mean color"),),
        unit="levels of 256",
    ),
    Curve(
        "Mean logits of the discriminator",
        "Healthy: images stay above reconstructions by about 0.2 to 2. Equal lines mean that it learns nothing; with a "
        "gap above about 4 it is too strong, unless rFID or LPIPS still improve.",
        ((_TRAINING, "logits_real", "images"), (_TRAINING, "logits_fake", "reconstructions")),
    ),
    Curve(
        "Losses of the discriminator and of the decoder against it",
        "Healthy: the hinge loss of the discriminator stays between 0.3 and 1. At 1 it distinguishes nothing; near 0 "
        "it always wins, which does harm unless rFID or LPIPS still improve.",
        ((_TRAINING, "discriminator", "discriminator"), (_TRAINING, "generator", "decoder (adversarial loss)")),
    ),
    Curve(
        "LeCam regularization of the discriminator, without its weight",
        "Healthy: it rises when the discriminator begins to distinguish, and then stays level, below about 8: twice "
        "the squared gap of the mean logits. A steady rise means that the logits drift apart; a higher lecam_weight "
        "holds them together.",
        ((_TRAINING, "lecam", "LeCam term"),),
    ),
    Curve(
        "Gradient penalty of the discriminator (R1), without its weight",
        "Healthy: it rises when the discriminator begins, and then stays level. A steady rise means that the "
        "discriminator becomes ever steeper at the images; a higher r1_weight flattens it. If it is near 0 and the "
        "mean logits are equal, the weight is so high that the discriminator cannot learn.",
        ((_TRAINING, "r1", "squared norm of a logit's gradient"),),
        is_log=True,
    ),
    Curve(
        "Adaptive weight of the adversarial loss",
        "Healthy: it varies below its limit. A line that lies on the limit means that the discriminator's gradient "
        "vanishes; the adversarial loss then only adds noise.",
        ((_TRAINING, "adaptive_weight", "adaptive weight"),),
        is_log=True,
    ),
    Curve(
        "Use of the codebook",
        "Healthy: the share of entries in use is high, and perplexity over the number of entries above about 0.3. A "
        "falling line is the start of a collapse.",
        ((_VALIDATION, "usage", "all chunks together"),),
        unit="share of entries",
        arrays=("usage_of_chunks", "chunk"),
    ),
    Curve(
        "Perplexity of the codes",
        "Healthy: it rises to a large part of the number of entries, alike in all chunks.",
        ((_VALIDATION, "perplexity", "all chunks together"),),
        unit="entries",
        arrays=("perplexity_of_chunks", "chunk"),
    ),
)

_PRIOR = (
    Curve(
        "Loss of training and validation, and the entropy of the codes",
        "Healthy: both fall well below the unigram entropy, which is the loss of a prior that knows only how frequent "
        "each code is. Validation that rises while training falls is overfitting. The loss of training includes label "
        "smoothing, dropout and random orders where they are set, and may be the larger one.",
        (
            (_TRAINING, "loss", "training"),
            (_VALIDATION, "loss", "validation"),
            ("validation_of_raw_weights", "loss", "validation, weights of the last step"),
            (_VALIDATION, "unigram_entropy", "unigram entropy of the codes"),
        ),
        unit="nats per code",
    ),
    Curve(
        "Validation loss of each channel",
        "Healthy: every channel falls, the ones with a low entropy most.",
        (),
        unit="nats per code",
        arrays=("loss_of_channels", "channel"),
    ),
    Curve(
        "FID of samples",
        "Healthy: it falls, and often goes on falling when the loss no longer does. Its level "
        "depends on the number of samples; compare it only with runs that draw as many.",
        ((_VALIDATION, "fid", "FID"),),
    ),
)

_BOTH = (
    Curve(
        "Norm of the gradients before clipping",
        "Healthy: it falls at first and then stays level. Spikes that come more often, or a steady rise, precede a "
        "divergence.",
        ((_TRAINING, "gradient_norm", "model"), (_TRAINING, "discriminator_gradient_norm", "discriminator")),
        is_log=True,
    ),
    Curve(
        "Throughput",
        "Healthy: level. It falls when the discriminator begins, and for good if other work shares the machine.",
        ((_TRAINING, "images_per_second", "images/s"),),
        unit="images/s",
    ),
    Curve(
        "Time spent waiting for data, and share of the device's matrix rate",
        "Healthy: waiting stays below 0.1; above 0.3 the training is bound by loading its data.",
        (
            (_TRAINING, "waiting_for_data", "waiting for data"),
            (_TRAINING, "share_of_matrix_rate", "share of the matrix rate"),
        ),
        unit="share",
    ),
)


def of_run(history: RunHistory) -> list[Chart]:
    """Return the curves of a run."""
    events = marks(history)
    drawn = []
    for curve in _curves(history):
        series = {line: history.series(name, part) for part, name, line in curve.metrics}
        if curve.arrays is not None:
            name, line = curve.arrays
            for index in range(history.length(name)):
                series[f"{line} {index}"] = history.series(name, "validation", index)
        shown = _without_zeros(series)
        drawn.append(
            charts.of_series(curve.title, curve.note, shown, events=events, unit=curve.unit, is_log=curve.is_log)
        )
    return [chart for chart in drawn if chart is not None]


def of_runs(histories: Sequence[RunHistory], names: Sequence[str]) -> list[Chart]:
    """Return the curves of several runs over each other, one metric a chart."""
    curves = {curve.title: curve for history in histories for curve in _curves(history)}
    drawn = []
    for curve in curves.values():
        for part, metric, line in curve.metrics:
            series = {name: history.series(metric, part) for name, history in zip(names, histories, strict=True)}
            if part == "validation_of_raw_weights":
                continue
            title = curve.title if len(curve.metrics) == 1 else f"{curve.title}: {line}"
            drawn.append(
                charts.of_series(title, curve.note, _without_zeros(series), unit=curve.unit, is_log=curve.is_log)
            )
    return [chart for chart in drawn if chart is not None]


def marks(history: RunHistory) -> list[tuple[float, str]]:
    """Return what happened at certain steps of a run: the start of the discriminator, and resumptions."""
    events: list[tuple[float, str]] = [(step, "resumed") for step in dict.fromkeys(history.resumptions)]
    start = history.discriminator_start
    if history.manifest.kind == "vq" and start is not None and start <= history.last_step:
        warmup = history.manifest.settings.train_vq.discriminator_warmup
        events.append((start, "adversarial loss begins"))
        if warmup:
            events.append((max(0, start - warmup), "discriminator begins"))
    return sorted(events)


def _curves(history: RunHistory) -> tuple[Curve, ...]:
    return (_VQ if history.manifest.kind == "vq" else _PRIOR) + _BOTH


def _without_zeros(series: dict[str, Series]) -> dict[str, Series]:
    """Leave out metrics that are 0 at every step: their term is off."""
    return {name: values for name, values in series.items() if any(values.values)}
