"""The training settings of the quantizer, applied to a tokenizer: gradient estimator, entropy loss, perturbed codes."""

from __future__ import annotations

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
