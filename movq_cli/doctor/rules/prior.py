"""The prior: whether it models the codes of its tokenizer, and more than their frequencies."""

from __future__ import annotations

from movq_cli import files
from movq_cli.doctor.rule import FEWEST_LINES, FEWEST_VALIDATIONS, Symptom, again, longer, mean, rule
from movq_cli.run_history import RunHistory

_BELOW = 0.98
"""Loss of a channel over its unigram entropy, below which a prior knows more than frequencies. A prior of 4,000 small
steps on digits has 0.55; one that learns nothing ends at 1.00 to 1.01."""

_APART = 1.15
"""Validation loss over the training loss at the first validation, from which both cannot be of one distribution: in so
few steps nothing is memorized."""

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
    validation, training = history.series("loss", "validation"), history.series("loss")
    if len(validation) < FEWEST_VALIDATIONS:
        return None
    first = validation.steps[0]
    near = [value for step, value in training if first / 2 < step <= first]
    epoch = history.sessions[-1].values.get("steps_per_epoch") if history.sessions else None
    # Within the first epoch, every training view is new to the prior, as a validation image is.
    is_new = isinstance(epoch, int) and first <= epoch
    if not near or not is_new:
        return None
    mean_near = sum(near) / len(near)
    if validation.values[0] < _APART * mean_near:
        return None
    text = (
        f"At step {first:,}, within the first epoch, the validation loss is {validation.values[0]:.3f} and the "
        f"training loss {mean_near:.3f}: the views of the training images are not like the validation images."
    )
    return Symptom(text, again(history, "views.scales=[]", "views.mirror=false"), first)


WRONG_VIEWS = rule(
    "wrong-views",
    "The training views are not like the validation images",
    "Before an image is seen twice, training and validation loss estimate the same number if the images are alike.",
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
