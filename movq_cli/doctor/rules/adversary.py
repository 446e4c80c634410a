"""The discriminator: whether it starts, when, and whether its gradient is of use."""

from __future__ import annotations

from movq_cli.doctor.rule import FEWEST_LINES, FEWEST_VALIDATIONS, Symptom, go_on, longer, mean, rule
from movq_cli.run_history import RunHistory, Series

_ALWAYS_WINS = 0.1
"""Hinge loss of the discriminator below which it always wins. It is 0 if all its logits are beyond -1 and 1; balanced
trainings stay between 0.3 and 1."""

INFORMATIVE = 0.1
"""Difference of the mean logits of images and of reconstructions below which it distinguishes nothing."""

_AT_LIMIT = 0.98
"""Adaptive weight over its limit from which it counts as at the limit."""

_USUAL_LIMIT = 0.8
"""Share of the log lines at the limit that is a clamped weight and not a passing one."""

_LOST_DECIBEL = 1.0
"""Loss of PSNR that sharper images do not explain: with a converged tokenizer, they cost 0.2 to 0.8 dB."""

_STILL_LEARNING = 0.3
"""Rise of PSNR between the last two validations before the start, in dB, from which the tokenizer still learns fast."""


def _never_started(history: RunHistory) -> Symptom | None:
    start, steps = history.discriminator_start, history.manifest.steps
    if history.manifest.settings.train_vq.adversarial_weight == 0 or start is None or start < steps or steps == 0:
        return None
    text = f"The adversarial loss begins at step {start:,}, and the run ends at step {steps:,}."
    return Symptom(text, longer(history, 2, "train_vq.discriminator_start=50%"), history.last_step)


NEVER_STARTED = rule(
    "discriminator-never-starts",
    "The discriminator never starts",
    "Without a step of the adversarial loss the images stay blurred; the setting was meant for a longer run.",
    "vq",
)(_never_started)


def _too_early(history: RunHistory) -> Symptom | None:
    psnr, start = history.series("psnr", "validation"), history.discriminator_start
    if start is None or len(psnr) < FEWEST_VALIDATIONS or psnr.steps[-1] <= start:
        return None
    before = [value for step, value in psnr if step <= start]
    after = [value for step, value in psnr if step > start]
    if before:
        is_learning = len(before) < 2 or before[-1] - before[-2] > _STILL_LEARNING
        is_lost = before[-1] - after[-1] > _LOST_DECIBEL
    else:
        is_learning, is_lost = True, max(after) - after[-1] > _LOST_DECIBEL
    if not (is_learning and is_lost) or _has_gained(history, start):
        return None
    best = before[-1] if before else max(after)
    text = (
        f"The adversarial loss began at step {start:,} while the tokenizer was still learning, and PSNR fell from "
        f"{best:.2f} dB to {after[-1]:.2f} dB at step {psnr.steps[-1]:,}."
    )
    first = max(0, start - history.manifest.settings.train_vq.discriminator_warmup)
    return Symptom(text, go_on(history, first, "train_vq.discriminator_start=50%"), psnr.steps[-1])


def _has_gained(history: RunHistory, start: int) -> bool:
    """Return whether FID or LPIPS has improved since the adversarial loss began: then the loss of PSNR is its price."""
    for name in ("rfid", "lpips"):
        series = history.series(name, "validation")
        before = [value for step, value in series if step <= start]
        if before and len(series) and series.values[-1] < before[-1]:
            return True
    return False


TOO_EARLY = rule(
    "discriminator-too-early",
    "The discriminator starts too early",
    "A tokenizer that still learns shapes and colors cannot follow an adversarial gradient, and loses what it has.",
    "vq",
)(_too_early)


def _settled(history: RunHistory, name: str) -> Series:
    """Return the metric since the adversarial loss has had its full weight for a while."""
    train, start = history.manifest.settings.train_vq, history.discriminator_start
    if start is None:
        return Series()
    return history.series(name).from_step(start + train.discriminator_ramp + train.log_every)


def _too_strong(history: RunHistory) -> Symptom | None:
    loss = _settled(history, "discriminator")
    if len(loss) < FEWEST_LINES or mean(loss, 0.5) >= _ALWAYS_WINS:
        return None
    # The decoder's loss has a gradient even then, and small images may profit from it to the end.
    validations = history.series("psnr", "validation")
    if len(validations) < FEWEST_VALIDATIONS or _has_gained(history, history.discriminator_start or 0):
        return None
    real, fake = (mean(_settled(history, name), 0.5) for name in ("logits_real", "logits_fake"))
    text = (
        f"Up to step {loss.steps[-1]:,} the discriminator's hinge loss is {mean(loss, 0.5):.3f}, with mean logits of "
        f"{real:.2f} for images and {fake:.2f} for reconstructions: it always wins, and learns nothing more."
    )
    train = history.manifest.settings.train_vq
    rate = (train.discriminator_learning_rate or train.learning_rate) / 4
    setting = f"train_vq.discriminator_learning_rate={rate:.3g}"
    return Symptom(text, go_on(history, history.discriminator_start or 0, setting), loss.steps[-1])


TOO_STRONG = rule(
    "discriminator-too-strong",
    "The discriminator is too strong",
    "A hinge loss near 0 has no gradient: the discriminator is certain of every patch, and learns no more.",
    "vq",
)(_too_strong)


def _learns_nothing(history: RunHistory) -> Symptom | None:
    real, fake = _settled(history, "logits_real"), _settled(history, "logits_fake")
    if len(real) < FEWEST_LINES or mean(real, 0.5) - mean(fake, 0.5) >= INFORMATIVE:
        return None
    text = (
        f"Up to step {real.steps[-1]:,} the mean logits are {mean(real, 0.5):.2f} for images and {mean(fake, 0.5):.2f} "
        "for reconstructions: the discriminator does not distinguish them, and its loss only adds noise."
    )
    train = history.manifest.settings.train_vq
    rate = 2 * (train.discriminator_learning_rate or train.learning_rate)
    settings = [f"train_vq.discriminator_learning_rate={rate:.3g}", "train_vq.adaptive_weight_limit=1"]
    if not train.discriminator_warmup:
        settings.append("train_vq.discriminator_warmup=200")
    if train.r1_weight:
        settings.append(f"train_vq.r1_weight={train.r1_weight / 10:.3g}")  # The penalty may hold the logits together.
    return Symptom(text, go_on(history, history.discriminator_start or 0, *settings), real.steps[-1])


LEARNS_NOTHING = rule(
    "discriminator-learns-nothing",
    "The discriminator learns nothing",
    "Equal logits mean that images and reconstructions look alike to it, which no decoder achieves this early.",
    "vq",
)(_learns_nothing)


def _weight_at_limit(history: RunHistory) -> Symptom | None:
    weight, limit = _settled(history, "adaptive_weight"), history.manifest.settings.train_vq.adaptive_weight_limit
    recent = weight.values[len(weight) // 2 :]
    if len(weight) < FEWEST_LINES:
        return None
    share = sum(value >= _AT_LIMIT * limit for value in recent) / len(recent)
    if share < _USUAL_LIMIT:
        return None
    text = (
        f"Up to step {weight.steps[-1]:,} the adaptive weight is at its limit of {limit:g} in {share:.0%} of the log "
        "lines: the gradient of the discriminator vanishes beside that of the reconstruction."
    )
    train = history.manifest.settings.train_vq
    rate = 2 * (train.discriminator_learning_rate or train.learning_rate)
    settings = [f"train_vq.discriminator_learning_rate={rate:.3g}"]
    settings.append(f"train_vq.discriminator_warmup={max(200, 2 * train.discriminator_warmup)}")
    first = max(0, (history.discriminator_start or 0) - train.discriminator_warmup)
    return Symptom(text, go_on(history, first, *settings), weight.steps[-1])


WEIGHT_AT_LIMIT = rule(
    "adaptive-weight-at-limit",
    "The adaptive weight is at its limit",
    "The weight balances two gradients; at its limit it no longer does, and the balance is what the setting says.",
    "vq",
)(_weight_at_limit)
