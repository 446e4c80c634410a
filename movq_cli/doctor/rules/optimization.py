"""The course of a training: rates, overfitting, averages, data, and what is validated."""

from __future__ import annotations

import math
from itertools import pairwise

from movq_cli.doctor.rule import FEWEST_LINES, FEWEST_VALIDATIONS, Symptom, again, longer, mean, rule
from movq_cli.doctor.rules.codebook import validation_images
from movq_cli.run_history import RunHistory, Series
from movq_cli.run_manifest import SECTIONS

_DIVERGED = 1.3
"""Loss of the last tenth over the lowest tenth from which a training has lost what it had learned."""

_EXPLODED = 30.0
"""Gradient norm of the last tenth over its median from which a training is about to diverge."""

_JUMP, _JUMPS = 3.0, 2
"""Ratio of two neighbouring log lines that is a jump, and the number of jumps that are no accident: the mean loss of
some steps varies by a few per cent."""

_LEARNED = 0.05
"""Share by which the loss has to fall during a training; tiny models with a proper rate reach that in 100 steps."""

_WORSE = 0.02
"""Share by which validation has to be worse than at its best to count."""

_WAITING = 0.3
"""Share of the time spent waiting for data from which the loading of data decides the speed."""

_FEWEST_IMAGES = 64
"""Number of validation images below which a metric varies more between sets than between good and bad settings: PSNR
varies by some 3 dB between images, so that the mean of 64 is known to 0.4 dB."""

_BETTER = 0.005
"""Share by which raw weights have to be better than their average to count."""


def _diverges(history: RunHistory) -> Symptom | None:
    name = SECTIONS[history.manifest.kind]
    train = history.manifest.train_settings
    remedy = [f"{name}.base_learning_rate={train.base_learning_rate / 4:.3g}", f"{name}.clip_norm=1"]
    if (history.run.folder / "nonfinite.json").is_file() and history.manifest.status != "finished":
        text = (
            f"A step after step {history.last_step:,} was not finite; nonfinite.json in the run folder has its metrics."
        )
        return Symptom(text, again(history, *remedy), history.last_step)
    loss, norm = _same_phase(history, "loss"), _same_phase(history, "gradient_norm")
    if len(loss) < 2 * FEWEST_LINES:
        return None
    tenths = [mean(loss, tenth / 10, (tenth + 1) / 10) for tenth in range(10)]
    lowest = min(tenths)
    has_exploded = len(norm) >= 2 * FEWEST_LINES and mean(norm, 0.9) > _EXPLODED * sorted(norm.values)[len(norm) // 2]
    jumps = _jumps(history.series("loss"))
    if len(jumps) >= _JUMPS:
        listed = ", ".join(f"{before:.3g} to {after:.3g} at step {step:,}" for step, before, after in jumps[:3])
        return Symptom(f"The loss jumped {len(jumps)} times: from {listed}.", again(history, *remedy), jumps[-1][0])
    if tenths[-1] <= _DIVERGED * abs(lowest) and not has_exploded:
        return None
    text = (
        f"The loss of the last tenth of the training (up to step {loss.steps[-1]:,}) is {tenths[-1]:.4g}, and was "
        f"{lowest:.4g} before; the gradient norm is {mean(norm, 0.9):.3g} and was {mean(norm, 0.0, 0.5):.3g}."
    )
    return Symptom(text, again(history, *remedy), loss.steps[-1])


def _jumps(loss: Series) -> list[tuple[int, float, float]]:
    """Return the steps after which the loss was many times what it had been, with both values."""
    found = []
    for (_, before), (step, after) in pairwise(loss):
        if after > _JUMP * before > 0:
            found.append((step, before, after))
    return found


def _same_phase(history: RunHistory, name: str) -> Series:
    """Return the metric since the adversarial loss has its full weight; of a shorter run, before that loss begins.

    The adversarial loss raises the other losses, as it should.
    """
    series, start = history.series(name), history.discriminator_start
    if history.manifest.kind != "vq" or start is None:
        return series
    train = history.manifest.settings.train_vq
    settled = series.from_step(start + train.discriminator_ramp + train.log_every)
    return settled if len(settled) >= 2 * FEWEST_LINES else Series.of(pair for pair in series if pair[0] <= start)


DIVERGES = rule(
    "learning-rate-too-high",
    "The training diverges: the learning rate is too high",
    "A loss varies by a few per cent from tenth to tenth; a third more than before is never chance.",
)(_diverges)


def _too_slow(history: RunHistory) -> Symptom | None:
    loss = history.series("loss")
    is_early = history.last_step < 0.3 * history.manifest.steps
    if len(loss) < 2 * FEWEST_LINES or is_early:
        return None
    first, last = mean(loss, 0.0, 0.1), mean(loss, 0.9)
    has_started_well = history.manifest.history and any(change.branched_from for change in history.manifest.history)
    if has_started_well or not 1 - _LEARNED < last / first < 1 + _LEARNED:
        return None
    name = SECTIONS[history.manifest.kind]
    train = history.manifest.train_settings
    text = (
        f"The loss was {first:.4g} in the first tenth and is {last:.4g} in the last one, up to step "
        f"{loss.steps[-1]:,}: the model hardly learns with a learning rate of {train.learning_rate:.3g}."
    )
    rate = f"{name}.base_learning_rate={10 * train.base_learning_rate:.3g}"
    return Symptom(text, again(history, rate), loss.steps[-1])


TOO_SLOW = rule(
    "learning-rate-too-low",
    "The model hardly learns: the learning rate is too low",
    "From random weights every proper rate lowers the loss by far more than a twentieth.",
)(_too_slow)


def _overfits(history: RunHistory) -> Symptom | None:
    is_vq = history.manifest.kind == "vq"
    name = "psnr" if is_vq else "loss"
    series, training = history.series(name, "validation"), history.series("l1" if is_vq else "loss")
    start = history.discriminator_start
    if is_vq and start is not None:  # Adversarial training lowers PSNR as it should.
        series = Series.of(pair for pair in series if pair[0] <= start)
    if len(series) < FEWEST_VALIDATIONS + 1 or len(training) < FEWEST_LINES:
        return None
    best = max(series.values) if is_vq else min(series.values)
    at, last = series.steps[series.values.index(best)], series.values[-1]
    is_worse = best - last > _WORSE * best if is_vq else last - best > _WORSE * best
    still = [value for step, value in training if step >= series.steps[-2]] or [math.inf]
    before = [value for step, value in training if step <= at] or [-math.inf]
    falls = sum(still) / len(still) < before[-1] - 0.02 * abs(before[-1])
    if not (is_worse and falls and at < 0.8 * series.steps[-1]):
        return None
    text = (
        f"Validation {name} was best at step {at:,} ({best:.4g}) and is {last:.4g} at step {series.steps[-1]:,}, while "
        f"the training loss goes on falling."
    )
    remedy = "data.flip=true" if is_vq else "views.mirror=true"
    used = history.manifest.settings.data.flip if is_vq else history.manifest.settings.views.mirror
    if used:
        remedy = "train_vq.steps=" + str(at) if is_vq else "views.scales=[1.1, 1.05]"
        if history.manifest.settings.views.scales and not is_vq:
            remedy = "train_prior.weight_decay=0.1"
    settings = [remedy, "train_vq.epochs=null"] if remedy.startswith("train_vq.steps") else [remedy]
    return Symptom(text, again(history, *settings), series.steps[-1])


OVERFITS = rule(
    "overfitting",
    "The model overfits",
    "Validation varies by less than two per cent between neighbouring validations; training that falls meanwhile is "
    "memory.",
)(_overfits)


def _samples_do_not_improve(history: RunHistory) -> Symptom | None:
    name = "rfid" if history.manifest.kind == "vq" else "fid"
    fid, loss = history.series(name, "validation"), history.series("loss")
    if len(fid) < FEWEST_VALIDATIONS + 1 or len(loss) < 2 * FEWEST_LINES:
        return None
    middle = len(fid) // 2
    best_before, best_after = min(fid.values[:middle]), min(fid.values[middle:])
    falls = mean(loss, 0.75) < 0.97 * mean(loss.from_step(fid.steps[0]), 0.0, 0.25)
    if not falls or best_after < 0.97 * best_before:
        return None
    text = (
        f"The {name} of the second half of the evaluations is {best_after:.1f} at best (up to step {fid.steps[-1]:,}) "
        f"and was {best_before:.1f} in the first half, while the loss fell to {mean(loss, 0.75):.4g}."
    )
    sample = history.manifest.settings.sample
    if name == "rfid":
        setting = "train_vq.discriminator_start=50%"
    elif sample.temperature != 1:
        setting = "sample.temperature=1"
    else:
        setting = f"sample.choice_temperature={sample.choice_temperature / 2:g}"
    return Symptom(text, again(history, setting), fid.steps[-1])


SAMPLES_DO_NOT_IMPROVE = rule(
    "samples-do-not-improve",
    "The loss falls, but the images do not improve",
    "FID of the same seeds varies by one or two per cent; an improving model gains more than that in half a training.",
)(_samples_do_not_improve)


def _average_not_warm(history: RunHistory) -> Symptom | None:
    name, sign = ("psnr", 1) if history.manifest.kind == "vq" else ("loss", -1)
    averaged, raw = history.series(name, "validation"), history.series(name, "validation_of_raw_weights")
    is_early = history.last_step < 0.5 * history.manifest.steps or len(averaged) < FEWEST_VALIDATIONS
    if is_early or not len(raw) or raw.steps[-1] != averaged.steps[-1]:
        return None
    gain = sign * (raw.values[-1] - averaged.values[-1])
    if gain <= _BETTER * abs(averaged.values[-1]):
        return None
    part, steps = SECTIONS[history.manifest.kind], history.manifest.steps
    train = history.manifest.train_settings
    decay = min(train.ema_decay, 1 - 10 / max(20, steps))
    text = (
        f"At step {raw.steps[-1]:,} the weights of the last step have a {name} of {raw.values[-1]:.4g}, and the "
        f"exported average has {averaged.values[-1]:.4g}: with a decay of {train.ema_decay:g} it is still behind."
    )
    return Symptom(text, again(history, f"{part}.ema_decay={decay:.4g}"), raw.steps[-1])


AVERAGE_NOT_WARM = rule(
    "average-not-warm",
    "The running average of the weights is not warm yet",
    "An average is for being better than the last weights; while it is worse, the exported weights lose quality.",
)(_average_not_warm)


def _bound_by_data(history: RunHistory) -> Symptom | None:
    waiting = history.series("waiting_for_data")
    recent = waiting.values[len(waiting) // 2 :]
    if len(waiting) < FEWEST_LINES or sorted(recent)[len(recent) // 2] < _WAITING:
        return None
    rate = history.series("images_per_second")
    text = (
        f"Up to step {waiting.steps[-1]:,} the training spends {sorted(recent)[len(recent) // 2]:.0%} of its time "
        f"waiting for data, at {mean(rate, 0.5):.3g} images/s."
    )
    workers = history.manifest.settings.data.workers
    more = -1 if workers >= 0 else 8
    return Symptom(text, longer(history, 1, f"data.workers={more}"), waiting.steps[-1])


BOUND_BY_DATA = rule(
    "bound-by-data",
    "The training is bound by loading its data",
    "Prefetching hides the loading as long as it is the faster one; a third of the time is then lost.",
)(_bound_by_data)


def _few_validation_images(history: RunHistory) -> Symptom | None:
    images, validations = validation_images(history), history.series("loss", "validation")
    if history.manifest.kind == "vq":
        validations = history.series("psnr", "validation")
    if images is None or images >= _FEWEST_IMAGES or len(validations) < FEWEST_VALIDATIONS:
        return None
    text = (
        f"A validation has {images} images, up to step {validations.steps[-1]:,}: its metrics vary with their choice."
    )
    part, data = SECTIONS[history.manifest.kind], history.manifest.settings.data.path
    train = history.manifest.train_settings
    if train.validate_images and train.validate_images < _FEWEST_IMAGES <= _stored(history):
        return Symptom(text, longer(history, 1, f"{part}.validate_images=1000"), validations.steps[-1])
    return Symptom(text, f"movq prepare SOURCE {data}-2 --val {_FEWEST_IMAGES * 4}", validations.steps[-1])


def _stored(history: RunHistory) -> int:
    counts = history.sessions[-1].values.get("images")
    return int(counts["val"]) if isinstance(counts, dict) and isinstance(counts.get("val"), int) else 0


FEW_VALIDATION_IMAGES = rule(
    "few-validation-images",
    "The validation set is too small",
    "The best weights are chosen by these metrics, and by chance if there are few images.",
)(_few_validation_images)
