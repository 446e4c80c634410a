"""The selection of metrics: those that are computed, those that are left out, and the reasons."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from movq_cli.console import Console
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import metrics, pretrained
from movq_cli.evaluation.metric import Metric, Needs
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.evaluation.sides import Sides
from movq_cli.ranks import Ranks


@dataclass(frozen=True)
class Selection:
    """The metrics to compute."""

    metrics: list[Metric]
    missing: list[BadRequestError]
    """The errors of requested metrics whose weights could not be had; they are raised after the other metrics."""

    @property
    def has_pairs(self) -> bool:
        """Whether a metric compares pairs, so that the fake images are reconstructions of the real ones."""
        return any(metric.needs is Needs.PAIRS for metric in self.metrics)

    def raise_missing(self) -> None:
        """Raise the first error of a requested metric whose weights could not be had."""
        if self.missing:
            raise self.missing[0]


def select_metrics(sides: Sides, request: EvaluationRequest, ranks: Ranks, console: Console) -> Selection:
    """Choose the requested metrics, or without a request all that the inputs and the weights allow.

    Metrics of a request whose weights cannot be had do not prevent the others: `Selection.missing` holds their errors.

    Args:
        sides: The two sets.
        request: The requested metrics.
        ranks: All processes of the command; every one must call this.
        console: Console for warnings.

    Raises:
        BadRequestError: The inputs do not allow a requested metric, or no metric can be computed.
    """
    chosen: list[Metric] = []
    missing: list[BadRequestError] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for metric in metrics.requested(request.metrics):
        try:
            sides.check(metric)
            _require_weights(metric, request, ranks, console)
            chosen.append(metric)
        except _NoWeightsError as error:
            if request.require_weights:
                missing.append(error)
            else:
                left_out[str(error)].append(metric.key)
        except BadRequestError as error:
            if request.metrics:
                raise
            left_out[str(error)].append(metric.key)
    if request.copies is not None:
        search = metrics.Copies(request.copies)
        sides.check(search)
        _require_weights(search, request, ranks, console)
        chosen.append(search)
    selection = Selection(chosen, missing)
    reasons = [f"left out {', '.join(keys)}: {reason}" for reason, keys in left_out.items()]
    if not chosen and not request.codebook:
        selection.raise_missing()
        raise BadRequestError(f"no metric can be computed: {'; '.join(reasons)}")
    for line in reasons:
        console.warn(line)
    return selection


class _NoWeightsError(BadRequestError):
    """The weights of a network are not on this machine, and were not or could not be downloaded."""


def _require_weights(metric: Metric, request: EvaluationRequest, ranks: Ranks, console: Console) -> None:
    """Find a metric's weights, or download them if the request says so.

    Raises:
        _NoWeightsError: The weights are not available.
    """
    # Rank 0 decides for all. A rank that came late could otherwise find the file that rank 0 has downloaded meanwhile,
    # and skip the broadcast that the others wait for.
    problem = ranks.from_first(lambda: _find_problem(metric, request, console))
    if problem is not None:
        raise _NoWeightsError(*problem)


def _find_problem(metric: Metric, request: EvaluationRequest, console: Console) -> tuple[str, str] | None:
    """Return why a metric's weights are not available and what to do, as strings that rank 0 can send to the others."""
    network = metric.missing_network(request.weights)
    if network is None:
        return None
    if request.require_weights:
        file = pretrained.WEIGHTS[network]
        console.log(f"downloading {file.file} ({file.megabytes} MB)")
    try:
        pretrained.find_weights(network, request.weights, download=request.require_weights)
    except BadRequestError as error:
        return error.message, error.hint
    return None
