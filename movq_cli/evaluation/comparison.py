"""The measuring of `movq evaluate`: metrics of pairs, metrics of sets, and the protocol of what was done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from movq_cli.console import Console, Progress
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, extractors, feature_cache, paired, protocol, references
from movq_cli.evaluation.codebook import measure_codebook
from movq_cli.evaluation.extractors import FeatureExtractor
from movq_cli.evaluation.feature_cache import Features
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.inputs import SetInputs
from movq_cli.evaluation.metric import Metric, MetricValues, Needs, PairedMetric, SetMetric
from movq_cli.evaluation.paired import PairScorer
from movq_cli.evaluation.pretrained import Network
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.evaluation.sides import Sides
from movq_cli.files import sha256
from movq_cli.ranks import Ranks
from movq_cli.sources import stream


class Comparison:
    """Measures metrics of two sides, and records in the protocol how they were measured.

    Args:
        sides: The real and the fake images.
        request: Batch size, cache, weights, and the codebook's tokenizer.
        ranks: All processes of the command.
        device: Device that runs the networks.
        console: Console for progress and warnings.
    """

    def __init__(
        self, sides: Sides, request: EvaluationRequest, ranks: Ranks, device: torch.device, console: Console
    ) -> None:
        self.sides = sides
        self.request = request
        self.ranks = ranks
        self.device = device
        self.console = console
        self.protocol: dict[str, Any] = protocol.conditions(device) | {"weights": {}}
        self._variants: dict[str, str] = {}

    def measure(self, metrics: Sequence[Metric]) -> MetricValues:
        """Compute the metrics and complete the protocol; only rank 0 has the metrics of sets.

        Args:
            metrics: Metrics that the sides allow and whose weights are available.

        Raises:
            BadRequestError: Weights cannot be used, or too few images could be read.
            FailureError: An image of a strict set is corrupt, or the cache cannot be written.
        """
        # Every file of weights is opened here, before hours go into the first metric.
        scorers = [
            scorer
            for metric in metrics
            if isinstance(metric, PairedMetric)
            for scorer in metric.load(self.request.weights, self.device)
        ]
        by_network = _group_by_network(metrics)
        networks = {name: extractors.load_extractor(name, self.request.weights, self.device) for name in by_network}
        self._describe_networks(scorers, networks)
        values = self._measure_pairs(scorers) if scorers else {}
        for name, group in by_network.items():
            values |= self._measure_sets(group, networks[name])
        if self.request.codebook and self.ranks.is_first:
            values |= self._measure_codebook()
        self._describe_sides()
        self.protocol["variants"] = {key: self._variants[key] for key in values}
        return values

    def _measure_pairs(self, scorers: Sequence[PairScorer]) -> MetricValues:
        """Compute the mean of each metric over the pairs; each rank scores its share of them."""
        real, fake, pairs = self.sides.real, self.sides.fake, self.sides.pairs
        assert real is not None
        for role, names in zip(("real", "fake"), pairs.unpaired, strict=True):
            if names:
                self.console.warn(f"{len(names)} of the {role} images have no partner: {cautions.examples(names)}")
        share = pairs.indices[self.ranks.share(len(pairs.indices))]
        unequal: list[str] = []
        with self.console.progress(len(share), "comparing", "pairs") as progress:
            readable = _read_pairs(real, fake, share, unequal, progress)
            batches = stream.same_size_batches(readable, self.request.batch_size)
            scores = paired.score_pairs(scorers, batches, self.device)
        scores, unequal = self._gather_pairs(real, fake, scores, unequal)
        if unequal:
            self.console.warn(f"left out {len(unequal)} pairs of unequal sizes: {cautions.examples(unequal)}")
        infinite = {key: sum(map(math.isinf, values)) for key, values in scores.items()}
        self.protocol["pairs"] = {
            "matched": len(pairs.indices),
            "without_partner": {"real": len(pairs.unpaired[0]), "fake": len(pairs.unpaired[1])},
            "of_unequal_sizes": len(unequal),
            "identical": max(infinite.values()),
            "averaged": {key: len(values) for key, values in scores.items()},
        }
        means: MetricValues = {}
        for scorer in scorers:
            means |= self._mean(scorer, scores[scorer.key], infinite[scorer.key])
        return means

    def _gather_pairs(
        self, real: ImageSet, fake: ImageSet, scores: dict[str, list[float]], unequal: list[str]
    ) -> tuple[dict[str, list[float]], list[str]]:
        """Return the scores and the names of unequal pairs of all ranks; both sets learn what the ranks read."""
        parts = self.ranks.all_gather((scores, unequal, real.read_report(), fake.read_report()))
        for _, _, of_real, of_fake in parts:
            real.add_report(of_real)
            fake.add_report(of_fake)
        gathered = {key: [value for part, *_ in parts for value in part[key]] for key in scores}
        return gathered, [name for _, names, _, _ in parts for name in names]

    def _mean(self, scorer: PairScorer, scores: list[float], infinite: int) -> MetricValues:
        """Return the mean of a metric's finite scores, or nothing if no pair is large enough.

        Raises:
            BadRequestError: No pair is large enough for a metric that was requested by name.
        """
        if not scores:
            problem = f"{scorer.key} needs readable pairs of equal sizes, at least {scorer.smallest_side} pixels a side"
            if self.request.metrics:
                raise BadRequestError(problem)
            self.console.warn(f"left out {scorer.key}: {problem}")
            return {}
        if infinite:
            self.console.warn(
                f"{infinite} pairs are identical: their {scorer.key} is infinite and not part of the mean"
            )
        self._variants[scorer.key] = scorer.variant
        return {scorer.key: paired.finite_mean(torch.tensor(scores, dtype=torch.float64))}

    def _measure_sets(self, metrics: Sequence[SetMetric], network: FeatureExtractor) -> MetricValues:
        """Compute the metrics of one network: all ranks compute the features, and rank 0 the metrics from them."""
        sides = self.sides
        fake = self._features(sides.fake, network)
        needs_real = any(map(sides.needs_real_features, metrics))
        real = self._features(sides.real, network) if sides.real is not None and needs_real else None
        if not self.ranks.is_first:
            return {}
        inputs = SetInputs(network, self.device, sides.fake, fake, sides.real, real, sides.reference)
        spread = self.protocol.setdefault("spread", {})
        values: MetricValues = {}
        for metric in metrics:
            if metric.needs is Needs.STATISTICS_AND_FAKE and sides.reference is not None:
                references.warn_of_other_weights(sides.reference, network, self.console)
            used = [fake] if real is None or not sides.needs_real_features(metric) else [real, fake]
            # Corrupt images may have left too few.
            metric.require_images(min(len(features.indices) for features in used))
            measured = metric.compute(inputs)
            values |= measured.values
            spread |= measured.spread
            self.protocol |= measured.protocol
            self._variants |= dict.fromkeys(measured.values, metric.variant)
        return values

    def _features(self, images: ImageSet, network: FeatureExtractor) -> Features:
        return feature_cache.cached_features(
            images,
            network,
            self.request.cache,
            batch_size=self.request.batch_size,
            device=self.device,
            ranks=self.ranks,
            console=self.console,
        )

    def _measure_codebook(self) -> MetricValues:
        if self.sides.real is None:
            raise BadRequestError("--codebook needs real images", "Name a set of images first.")
        request = self.request
        values, self.protocol["codebook"] = measure_codebook(
            self.sides.real, request.run, request.batch_size, self.device, self.console
        )
        self._variants |= dict.fromkeys(values, self.protocol["codebook"]["variant"])
        return values

    def _describe_networks(self, scorers: Sequence[PairScorer], networks: dict[Network, FeatureExtractor]) -> None:
        """Write into the protocol which networks are used, with which weights."""
        names = [*(scorer.network for scorer in scorers if scorer.network is not None), *networks]
        self.protocol["weights"] = protocol.describe_weights(names, self.request.weights, self.console)
        self.protocol["extractors"] = [network.name for network in networks.values()]

    def _describe_sides(self) -> None:
        """Write into the protocol which images were compared."""
        self.protocol |= {side.role: side.describe() for side in self.sides.with_images}
        reference = self.sides.reference
        if reference is not None:
            self.protocol["real"] = self.protocol.get("real", {}) | {
                "statistics": str(reference.path),
                "sha256": sha256(reference.path),
                "of": reference.protocol,
            }


def _group_by_network(metrics: Sequence[Metric]) -> dict[Network, list[SetMetric]]:
    """Return the metrics of sets by their network, so that each network runs once."""
    groups: dict[Network, list[SetMetric]] = {}
    for metric in metrics:
        if isinstance(metric, SetMetric):
            assert metric.network is not None
            groups.setdefault(metric.network, []).append(metric)
    return groups


def _read_pairs(
    real: ImageSet, fake: ImageSet, indices: Sequence[tuple[int, int]], unequal: list[str], progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Yield the pairs that can be compared, uint8 [2, 3, H, W], with the index of the real image.

    Args:
        real: Real images.
        fake: Fake images.
        indices: Indices of each pair in both sets.
        unequal: Receives the names of the pairs whose images have different sizes.
        progress: Counts the pairs.
    """
    reals, fakes = real.read(a for a, _ in indices), fake.read(b for _, b in indices)
    for (index, a), (_, b) in zip(reals, fakes, strict=True):
        progress.advance()
        if a is None or b is None:
            continue
        if a.shape == b.shape:
            yield index, torch.stack([a, b])
        else:
            unequal.append(real.names[index])
