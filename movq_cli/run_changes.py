"""The settings in which the runs of a folder, or a run and the one that goes on from it, may differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from movq_cli.errors import BadRequestError
from movq_cli.run_manifest import COMMAND, Kind, RunManifest
from movq_cli.settings import Preset

FREE_TO_CHANGE = frozenset(
    f"{section}.{name}"
    for section in ("train_vq", "train_prior")
    for name in (
        *("steps", "epochs", "log_every", "validate_every", "validate_images", "evaluate_every", "evaluate_images"),
        *("checkpoint_every", "keep_checkpoints", "best_by", "early_stop", "tensorboard", "wandb", "trackio", "report"),
        *("accumulate", "compile", "activation_checkpointing", "channels_last"),
        *("precision", "base_learning_rate", "warmup_steps", "decay", "clip_norm"),
        *("l1_weight", "l2_weight", "perceptual_weight", "codebook_weight", "commitment_weight", "adversarial_weight"),
        *("discriminator_start", "discriminator_ramp", "discriminator_warmup", "discriminator_learning_rate"),
        *("adaptive_weight_limit", "revive_every", "weight_decay", "label_dropout", "label_smoothing", "mask_schedule"),
        *("quantizer_gradient", "entropy_weight", "entropy_temperature"),
        *("perturbed_images", "perturbed_codes", "perturbation_neighbors"),
        *("lecam_weight", "r1_weight", "r1_every", "discriminator_augmentation"),
    )
) | {"prior.dropout"}
"""Settings that may differ when a run is resumed: its length, how it is computed and monitored, and what a user changes
after training has become unstable or to go on in another way: rates, and weights of losses."""

_OF_THIS_MACHINE = frozenset({"data.path", "data.workers", "description"})
"""Settings that do not change what is trained; a run's history does not record them."""


def require_same_run(
    folder: Path, before: RunManifest, after: RunManifest, different: Mapping[str, tuple[Any, Any]], remedy: str
) -> None:
    """Refuse to go on from a run with anything that would make it another run.

    Args:
        folder: Run folder.
        before: Manifest of the run.
        after: Manifest of what goes on.
        different: Settings that differ and must not, with both values.
        remedy: What to do about any difference.

    Raises:
        BadRequestError: The kinds, the data, the tokenizers or settings differ, or the weights were imported.
    """
    if before.kind != after.kind:
        raise BadRequestError(f"{folder} is a run of `movq {COMMAND[before.kind]}`", remedy)
    if before.imported is not None:
        raise BadRequestError(f"{folder} holds imported weights, whose training cannot be resumed", remedy)
    if before.tokenizer != after.tokenizer:
        raise BadRequestError(
            f"{folder} was trained on the codes of another tokenizer ({_short(before.tokenizer)}, "
            f"not {_short(after.tokenizer)})",
            remedy,
        )
    if before.data != after.data:
        raise BadRequestError(f"{folder} was trained on another prepared set", remedy)
    if different:
        name, (old, new) = next(iter(different.items()))
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise BadRequestError(
            f"{folder} was trained with other settings ({name}: {old} before, {new} now{more})", remedy
        )


def changed_settings(before: Preset, after: Preset, kind: Kind) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with both values as in JSON, of those on which training of this kind depends."""
    sections = {"vq": ("data", "vq", "train_vq"), "prior": ("data", "vq", "views", "prior", "train_prior")}[kind]
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{name}": (old[section].get(name), value)
        for section in sections
        for name, value in new[section].items()
        if old[section].get(name) != value and f"{section}.{name}" not in _OF_THIS_MACHINE
    }


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
