"""The prior: whether it models the codes of its tokenizer, and more than their frequencies."""

from __future__ import annotations

from movq_cli import files
from movq_cli.doctor.rule import FEWEST_LINES, FEWEST_VALIDATIONS, Symptom, again, longer, mean, rule
from movq_cli.doctor.rules.codebook import validation_images
from movq_cli.run_history import RunHistory

_BELOW = 0.98
"""Loss of a channel over its unigram entropy, below which a prior knows more than frequencies. A prior of 4,000 small
steps on digits has 0.55; one that learns nothing ends at 1.00 to 1.01."""

_APART = 0.1
"""Divergence of the frequencies of the validation codes from those of the training codes, in nats a code, that is no
chance; mirrored and moderately scaled views have 0.00 to 0.03."""

_digests: dict[tuple[str, int, int], str] = {}


def _wrong_tokenizer(history: RunHistory) -> Symptom | None:
    path, expected = history.run.tokenizer, history.manifest.tokenizer
    if expected is None or not path.is_file():
        return None
    status = path.stat()
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    if key not in _digests:
        _digests[key] = files.sha256(path)
    if _digests[key] == expected:
        return None
    text = (
        f"{path.name} in the run folder has the SHA-256 {_digests[key][:12]}, and the prior was trained on the codes "
        f"of {expected[:12]}: its samples are decoded by another tokenizer."
    )
    return Symptom(text, again(history), history.last_step)


WRONG_TOKENIZER = rule(
    "wrong-tokenizer",
    "The tokenizer is not the one whose codes the prior models",
    "Codes have no meaning beyond their own tokenizer; a single other byte is another file.",
    "prior",
)(_wrong_tokenizer)


def _wrong_views(history: RunHistory) -> Symptom | None:
    cross, entropy = (history.series(f"unigram_{name}", "validation") for name in ("cross_entropy", "entropy"))
    images, shape = validation_images(history), history.manifest.settings.vq.code_shape
    if not len(cross) or not len(entropy) or images is None:
        return None
    # Frequencies that are estimated from few codes differ by chance: by K / (2 N) nats on average, of N codes.
    expected = shape.codebook_size / max(1, images * shape.positions)
    apart = cross.values[-1] - entropy.values[-1]
    if apart < _APART + expected:
        return None
    text = (
        f"The validation codes have an entropy of {entropy.values[-1]:.3f} nats, and of {cross.values[-1]:.3f} nats by "
        "the frequencies of the training codes: the views of the training images are unlike the validation images."
    )
    remedy = again(history, "views.scales=[]", "views.mirror=false")
    if history.manifest.settings.views.count == 1:  # The splits themselves are unlike.
        remedy = f"movq prepare SOURCE {history.manifest.settings.data.path}-2 --val {images}"
    return Symptom(text, remedy, cross.steps[-1])


WRONG_VIEWS = rule(
    "wrong-views",
    "The training views are not like the validation images",
    "Views of the same kind of image have the same frequencies of codes; what a prior learns from others is of no use.",
    "prior",
)(_wrong_views)


def _not_below_unigram(history: RunHistory) -> Symptom | None:
    last = history.last_validation
    losses, entropies = last.get("loss_of_channels"), last.get("unigram_entropy_of_chunks")
    steps = history.series("loss", "validation").steps
    is_early = history.last_step < 0.3 * history.manifest.steps or len(steps) < FEWEST_VALIDATIONS
    if is_early or not isinstance(losses, list) or not isinstance(entropies, list):
        return None
    pairs = list(zip(losses, entropies, strict=False))
    behind = [index for index, (loss, entropy) in enumerate(pairs) if loss >= _BELOW * entropy > 0]
    if not behind:
        return None
    listed = ", ".join(f"{index}: {pairs[index][0]:.3f} of {pairs[index][1]:.3f}" for index in behind)
    text = (
        f"At step {steps[-1]:,} the loss of {len(behind)} of {len(pairs)} channels is not below the unigram entropy "
        f"(channel {listed} nats): the prior knows only how frequent these codes are."
    )
    loss = history.series("loss")
    if len(loss) >= FEWEST_LINES and mean(loss, 0.9) < 0.995 * mean(loss, 0.5, 0.6):
        return Symptom(text, longer(history, 3), steps[-1])
    rate = history.manifest.settings.train_prior.base_learning_rate
    return Symptom(text, again(history, f"train_prior.base_learning_rate={10 * rate:.3g}"), steps[-1])


NOT_BELOW_UNIGRAM = rule(
    "not-below-unigram",
    "The prior has not beaten the unigram entropy",
    "A prior without any input reaches the unigram entropy; only what is below it draws images.",
    "prior",
)(_not_below_unigram)
