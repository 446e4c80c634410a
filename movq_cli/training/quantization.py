"""The training settings of the quantizer, applied to a tokenizer: gradients, losses, perturbation, learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from movq_cli.models.perturbation import Perturbation
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.training import losses
from movq_cli.training_settings import TrainVQSettings


def prepare(model: Tokenizer, settings: TrainVQSettings) -> None:
    """Prepare the quantizer of a tokenizer for a training.

    Raises:
        BadRequestError: The quantizer has no gradient estimator, or no entropy loss.
    """
    model.quantize.prepare_training(settings.quantizer_gradient, losses.entropy_temperature(settings))
    if settings.perturbed_images > 0:
        model.perturbation = Perturbation(
            settings.perturbed_images, settings.perturbed_codes, settings.perturbation_neighbors
        )


def parameter_groups(model: nn.Module, codebook_learning_rate: float | None) -> list[dict[str, Any]]:
    """Return the parameters of a model; those of the quantizer are a group of their own if they have their own rate."""
    if codebook_learning_rate is None or not isinstance(model, Tokenizer):
        return [{"params": list(model.parameters())}]
    own = list(model.quantize.parameters())
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in own)]
    return [{"params": others}, {"params": own, "constant_rate": codebook_learning_rate}]
