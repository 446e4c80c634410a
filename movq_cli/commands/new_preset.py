"""`movq presets new`: writes a preset for a prepared set, a device and a number of hours, and says why each value."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from movq_cli import devices, presets
from movq_cli.commands import outlook
from movq_cli.commands.preset_base import BASES, base_for
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.devices import Memory
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.image_size import ImageSize
from movq_cli.run_manifest import COMMAND, SECTIONS, Kind, train_settings
from movq_cli.settings import Preset
from movq_cli.training import fit
from movq_cli.training.cost import Cost
from movq_cli.training.pace import Pace
from movq_cli.training_settings import TrainSettings

_SHARES: dict[Kind, float] = {"vq": 0.6, "prior": 0.4}
"""Share of the hours for each stage."""

_PRIOR_EPOCHS = 300
"""Largest number of epochs of the prior, beyond which a small set is only memorized; the paper's have 200."""

_PRIORS = ((5_000, 8, 256), (20_000, 8, 384), (100_000, 12, 512), (500_000, 16, 768), (None, 24, 1024))
"""Priors by the number of training images: the largest number (None = any), transformer blocks, and width.

A row is about three times as large as the row above it; the last one is the paper's prior, of 300 million parameters.
"""

_HEAD_WIDTH = 64
"""Width of an attention head, as in the paper's prior."""

_FEWEST_STEPS = 2000
"""Number of steps below which the batch is halved, or a smaller prior is chosen."""

_SMALLEST_BATCH = 8
"""Batch that is not halved in order to get more steps."""

_VALIDATIONS = 10
"""Largest number of validations of a run."""

_VALIDATION_SHARE = 0.1
"""Share of the time that they may take together, unless there is only one."""

_SECONDS_BETWEEN_CHECKPOINTS = 600.0

_SCALED = ("warmup_steps", "discriminator_warmup", "discriminator_ramp")
"""Settings in steps that are at most a tenth of a run."""


@dataclass(frozen=True)
class NewPresetRequest:
    """The options of the command."""

    path: Path
    """File to write."""
    data: Path
    """Folder of the prepared set."""
    hours: float = 8.0
    """Time for both stages together."""
    memory: float | None = None
    """Memory in GiB that a training may use; None takes that of the device."""
    device_name: str | None = None
    """Name of the device; None uses CUDA if it is available."""
    weights: Path | None = None
    """Folder of the pretrained weights; None uses torch hub's."""
    force: bool = False
    """Replace an existing file."""


@dataclass
class _Draft:
    """The settings that are chosen so far, with the reason for each of them."""

    base: str
    device: torch.device
    memory: Memory
    images: PreparedSet
    weights: Path | None
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Value and reason of each setting, by its dotted name."""

    def set(self, name: str, value: object, reason: str) -> None:
        """Choose the value of a setting."""
        self.values[name] = value, reason

    @property
    def settings(self) -> Preset:
        """All settings, with those of the base."""
        return presets.load(self.base, [f"{name}={json.dumps(value)}" for name, (value, _) in self.values.items()])

    def train(self, kind: Kind) -> TrainSettings:
        """Return the training settings of a stage."""
        return train_settings(self.settings, kind)


def new_preset(request: NewPresetRequest, console: Console) -> None:
    """Write a preset for a prepared set, and print its path.

    Args:
        request: Options of the command.
        console: Console for the summary and the result.

    Raises:
        BadRequestError: The file exists already, there is no usable set or no preset for its size, or the models do not
            fit into the memory.
    """
    _check_path(request)
    images = PreparedSet.open(request.data)
    if not images.manifest.counts["val"]:
        raise BadRequestError(
            f"the prepared set {request.data} has no validation images", "Prepare it from at least two images."
        )
    device = devices.select(request.device_name)
    memory = devices.memory(device) if request.memory is None else Memory(request.memory, request.memory)
    base, rectangle = base_for(images, request.data)
    draft = _Draft(base, device, memory, images, request.weights)
    draft.set("data.path", str(request.data), "the prepared set")
    if rectangle is not None:
        _set_rectangle(draft, rectangle)
    console.log(f"base {draft.base}; some steps of each stage are measured on {device}")
    seconds = 3600 * request.hours
    draft.set("prior.classes", len(images.manifest.classes), _why_classes(images))
    used = _choose_prior_training(draft, _SHARES["prior"] * seconds)
    used_by_tokenizer = _choose_training(draft, "vq", seconds - used)
    atomic_write(request.path, _as_yaml(draft, request).encode())
    times: dict[Kind, float] = {"vq": used_by_tokenizer, "prior": used}
    peaks: dict[Kind, float] = {kind: _peak(draft, kind) for kind in times}
    for kind, spent in times.items():
        console.log(
            f"movq {COMMAND[kind]} -p {request.path}: {draft.train(kind).steps:,} steps, about "
            f"{spent / 3600:.2g} hours, {peaks[kind]:.1f} of {memory.total:.1f} GiB of memory"
        )
    result = {
        "preset": str(request.path),
        "base": draft.base,
        "hours": {kind: round(spent / 3600, 3) for kind, spent in times.items()},
        "peak_memory_gib": {kind: round(peak, 2) for kind, peak in peaks.items()},
    }
    console.result(result, str(request.path))


def _check_path(request: NewPresetRequest) -> None:
    if request.path.suffix not in {".yaml", ".yml"}:
        raise BadRequestError(f"{request.path} does not end in .yaml, as the path of a preset must")
    if request.path.exists() and not request.force:
        raise BadRequestError(f"{request.path} exists already", "Name another file, or overwrite it with --force.")


def _set_rectangle(draft: _Draft, size: ImageSize) -> None:
    """Choose rectangular images, with attention at the levels of the base."""
    sides = [min(size) // 2**level for level in draft.settings.vq.attention_levels]
    # Both at once: each alone contradicts the other setting of the base.
    draft.values |= {
        "vq.resolution": (list(size), "height and width of all images of the set"),
        "vq.attention_resolutions": (sides, f"attention at the levels of {draft.base}, by the shorter side"),
    }


def _why_classes(images: PreparedSet) -> str:
    classes = images.manifest.classes
    return f"the set has {len(classes)} classes" if classes else "the set has no classes"


def _choose_prior_training(draft: _Draft, seconds: float) -> float:
    """Choose the prior's size and training, and return its time in seconds."""
    count = draft.images.manifest.counts["train"]
    row = next(number for number, (most, _, _) in enumerate(_PRIORS) if most is None or count <= most)
    suitable = row
    while True:
        _, layers, width = _PRIORS[row]
        reason = f"for {count:,} training images" + (
            "" if row == suitable else "; a larger one would have too few steps in these hours"
        )
        draft.set("prior.layers", layers, f"transformer blocks {reason}")
        draft.set("prior.heads", width // _HEAD_WIDTH, f"heads of {_HEAD_WIDTH} channels")
        draft.set("prior.width", width, f"width {reason}")
        draft.set("prior.hidden", 4 * width, "four times the width, as in the paper")
        used = _choose_training(draft, "prior", seconds)
        steps = draft.train("prior").steps
        assert steps is not None
        if row == 0 or steps >= min(_FEWEST_STEPS, _most_steps(draft)):
            return used
        row -= 1


def _choose_training(draft: _Draft, kind: Kind, seconds: float) -> float:
    """Choose the batch, the number of steps and the intervals of a stage, and return its time in seconds."""
    section = SECTIONS[kind]
    for name in [name for name in draft.values if name.startswith(f"{section}.")]:
        del draft.values[name]
    pace = _choose_batch(draft, kind, seconds)
    train, epoch = draft.train(kind), _steps_per_epoch(draft, kind)
    interval = _choose_intervals(draft, kind, pace, seconds)
    train = train.model_copy(update={"validate_every": interval})
    steps = pace.steps(train, seconds, epoch)
    reason = f"what fits into {seconds / 3600:.2g} hours at {pace.adversarial_step:.2g} s a step, with validations"
    if kind == "prior" and steps > _most_steps(draft):
        steps, reason = _most_steps(draft), f"{_PRIOR_EPOCHS} epochs; more would only memorize the images"
    draft.set(f"{section}.epochs", None, "the length is given in steps")
    draft.set(f"{section}.steps", steps, reason)
    for name in _SCALED:
        value = getattr(train, name, 0)
        if value > steps // 10:
            draft.set(f"{section}.{name}", steps // 10, f"a tenth of the steps, instead of {value} as in {draft.base}")
    return pace.seconds(train, steps, epoch)


def _choose_batch(draft: _Draft, kind: Kind, seconds: float) -> Pace:
    """Choose the batch size, its number of parts and activation checkpointing, and return the measured times."""
    section, base = SECTIONS[kind], draft.train(kind)
    size, reason = base.batch_size, f"as in {draft.base}"
    images = outlook.images_per_epoch(draft.settings, kind, draft.images)
    while size > images:
        size, reason = size // 2, f"halved from {base.batch_size}, because there are {images:,} images"
    _set_batch(draft, kind, size, reason)
    pace, measured = _measure(draft, kind), size
    while size >= 2 * _SMALLEST_BATCH and seconds / pace.adversarial_step * measured / size < _FEWEST_STEPS:
        size //= 2
    if size != measured:
        _set_batch(draft, kind, size, f"halved from {base.batch_size}, because the hours allow few steps")
        pace = _measure(draft, kind)
    rate = getattr(base, "discriminator_learning_rate", None)
    if size != base.batch_size and rate is not None:
        draft.set(
            f"{section}.discriminator_learning_rate",
            rate * size / base.batch_size,
            "smaller by the ratio of the batches, as the tokenizer's rate is",
        )
    return pace


def _set_batch(draft: _Draft, kind: Kind, size: int, reason: str) -> None:
    """Set a batch size, and what makes it fit into the memory.

    Raises:
        BadRequestError: Not even one image fits.
    """
    section = SECTIONS[kind]
    draft.set(f"{section}.batch_size", size, reason)
    draft.set(f"{section}.accumulate", 1, "the whole batch fits into the memory at once")
    draft.set(f"{section}.activation_checkpointing", False, "the activations fit into the memory")
    settings = draft.settings

    def cost_of(train: TrainSettings) -> Cost:
        return outlook.cost_of(outlook.with_training(settings, kind, train), kind, draft.device)

    train = train_settings(settings, kind)
    limit = fit.fit(cost_of(train), draft.device, 1, draft.memory).limit
    images = fit.most_images(train, cost_of, limit, 1)
    if not images:
        images = fit.most_images(train.model_copy(update={"activation_checkpointing": True}), cost_of, limit, 1)
        draft.set(f"{section}.activation_checkpointing", True, "not even one image fits into the memory without it")
    if not images:
        raise BadRequestError(
            f"{draft.base} does not fit into {draft.memory.total:.1f} GiB, not even one image at a time",
            "Allow more with --memory, or prepare the set at a smaller --size.",
        )
    parts = fit.smallest_accumulate(size, images)
    if parts > 1:
        draft.set(f"{section}.accumulate", parts, f"parts of {size // parts} images; {images} fit into the memory")


def _choose_intervals(draft: _Draft, kind: Kind, pace: Pace, seconds: float) -> int:
    """Choose the intervals of validations and checkpoints, and return the former."""
    section, train = SECTIONS[kind], draft.train(kind)
    measured = pace.validation + pace.evaluation
    number = max(1, min(_VALIDATIONS, int(_VALIDATION_SHARE * seconds / max(measured, 1e-6))))
    steps = max(1, int(seconds / pace.adversarial_step))
    if kind == "prior":
        steps = min(steps, _most_steps(draft))
    interval = max(1, steps // number)
    draft.set(
        f"{section}.validate_every",
        interval,
        f"{number} validation{'s' * (number > 1)}, of about {measured:,.0f} s each",
    )
    between = max(1, min(train.checkpoint_every, round(_SECONDS_BETWEEN_CHECKPOINTS / pace.adversarial_step)))
    minutes = between * pace.adversarial_step / 60
    draft.set(
        f"{section}.checkpoint_every", between, f"at most about {minutes:.2g} minutes are lost if a run is killed"
    )
    return interval


def _measure(draft: _Draft, kind: Kind) -> Pace:
    return outlook.measure(
        draft.settings,
        kind,
        draft.device,
        validation_images=draft.images.manifest.counts["val"],
        weights=draft.weights,
    )


def _steps_per_epoch(draft: _Draft, kind: Kind) -> int:
    images = outlook.images_per_epoch(draft.settings, kind, draft.images)
    return max(1, images // draft.train(kind).batch_size)


def _most_steps(draft: _Draft) -> int:
    """Return the largest number of steps of the prior."""
    return _PRIOR_EPOCHS * _steps_per_epoch(draft, "prior")


def _peak(draft: _Draft, kind: Kind) -> float:
    """Return the peak memory of a stage in GiB."""
    cost = outlook.cost_of(draft.settings, kind, draft.device)
    return fit.fit(cost, draft.device, 1, draft.memory).peak


def _as_yaml(draft: _Draft, request: NewPresetRequest) -> str:
    """Return the preset as YAML, with the reason of each value as a comment."""
    manifest = draft.images.manifest
    size = draft.settings.vq.image_size
    lines = [
        f"# `movq presets new` wrote this for {manifest.counts['train']:,} training images, {request.hours:g} hours,",
        f"# and a device ({draft.device}) with {draft.memory.total:.1f} GiB of memory.",
        "# `movq presets show` prints all settings, with those that are inherited.",
        f"base: {draft.base}  # the preset {BASES}* that suits {size.in_words}",
        f"description: {json.dumps(f'own images at {size.in_words}, {request.hours:g} hours')}  # for `movq presets`",
    ]
    sections: dict[str, list[str]] = {}
    for name, (value, reason) in draft.values.items():
        section, _, leaf = name.partition(".")
        sections.setdefault(section, []).append(f"  {leaf}: {json.dumps(value)}  # {reason}")
    purposes = {
        "data": "images",
        "vq": "tokenizer",
        "prior": "size of stage 2",
        "train_vq": "stage 1",
        "train_prior": "stage 2",
    }
    for section, purpose in purposes.items():
        if section in sections:
            lines += [f"{section}:  # {purpose}", *sections[section]]
    return "\n".join(lines) + "\n"
