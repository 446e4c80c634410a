"""The codebook collapses: few entries do all the work."""

from __future__ import annotations

from movq_cli.doctor.rule import FEWEST_VALIDATIONS, Symptom, again, rule
from movq_cli.run_history import RunHistory

_SMALLEST_SHARE = 0.1
"""Perplexity over the number of entries below which a codebook has collapsed. Healthy ones reach 0.3 to 0.9; VQGAN's
known collapses have 0.01 to 0.05."""

_CODES_PER_ENTRY = 4
"""Codes of the validation images for each entry, without which perplexity measures the number of images."""


def _collapse(history: RunHistory) -> Symptom | None:
    vq = history.manifest.settings.vq
    perplexity = history.series("perplexity", "validation")
    images = validation_images(history)
    is_measurable = images is None or images * vq.code_shape.codes >= _CODES_PER_ENTRY * vq.codebook_size
    if len(perplexity) < FEWEST_VALIDATIONS or not is_measurable:
        return None
    value, usage = perplexity.values[-1], history.series("usage", "validation")
    # Half of the best value lost, and below a third of the entries: it is on its way.
    falls = value < 0.5 * max(perplexity.values) and value < 0.3 * vq.codebook_size
    if value >= _SMALLEST_SHARE * vq.codebook_size and not falls:
        return None
    text = (
        f"At step {perplexity.steps[-1]:,} the codes have a perplexity of {value:.1f} for {vq.codebook_size:,} entries "
        f"(best {max(perplexity.values):.1f}), and {usage.values[-1]:.0%} of the entries are in use."
    )
    revive = history.manifest.settings.train_vq.revive_every
    setting = "train_vq.revive_every=20" if revive == 0 or revive > 20 else "vq.normalize_codes=true"
    return Symptom(text, again(history, setting), perplexity.steps[-1])


COLLAPSE = rule(
    "codebook-collapse",
    "The codebook has collapsed",
    "Perplexity counts the entries that do the work; below a tenth of the codebook most of its capacity is lost.",
    "vq",
)(_collapse)


def validation_images(history: RunHistory) -> int | None:
    """Return the number of images in a validation; None if the log does not say it."""
    counts = history.sessions[-1].values.get("images") if history.sessions else None
    stored = counts.get("val") if isinstance(counts, dict) else None
    limit = history.manifest.train_settings.validate_images
    return min(stored, limit or stored) if isinstance(stored, int) else None
