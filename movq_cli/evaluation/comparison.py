"""The two sides of `movq evaluate`, what can be measured of them, and how."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli.console import Console, Progress
from movq_cli.data import pixels
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import cautions, distributions, extractors, feature_cache, paired, pretrained
from movq_cli.evaluation.codebook import codebook_figures
from movq_cli.evaluation.distributions import Copies
from movq_cli.evaluation.extractors import FeatureExtractor, Inception
from movq_cli.evaluation.feature_cache import Features, Reference
from movq_cli.evaluation.image_sets import ImageSet, Size
from movq_cli.evaluation.pretrained import Network
from movq_cli.files import atomic_write, sha256
from movq_cli.ranks import Ranks
from movq_cli.sources import stream
from movq_cli.sources.arrays import npz_arrays
from movq_cli.version import __version__

PAIRED = ("psnr", "ssim", "lpips")
UNPAIRED = ("fid", "isc", "kid", "prc", "prc_vgg")

_INCEPTION = {"fid", "isc", "kid", "prc", "copies"}
_NEEDS_REAL_IMAGES = {*PAIRED, "kid", "prc", "prc_vgg", "copies"}
_LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "pillow")
_PICTURED = 12
"""The samples nearest to a real image, in the picture of copies."""

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What `movq evaluate` is asked for, beside the two sets."""

    metrics: tuple[str, ...]
    """Among `PAIRED` and `UNPAIRED`; none = all that the inputs and the weights that are here allow."""
    insist: bool
    """Weights that are not here are an error, and are fetched where that can be; so wherever figures are named."""
    copies: Path | None
    """A picture of the fakes that are nearest to real images; None = they are not looked for."""
    codebook: bool
    """Also how a tokenizer's codebook is used by the real images."""
    run: Path | None
    """That tokenizer's; None = the newest finished one."""
    split: SplitName
    """Of a prepared set."""
    crop: int | None
    """Side of the central squares that are compared, pixels; None = the images as they are."""
    strict: bool
    """A corrupt image is an error."""
    batch_size: int
    """Images that go through a network at once."""
    weights: Path | None
    """A folder of pretrained weights, searched before torch hub's."""
    cache: Path
    """Where features are kept."""
    preset: str | None
    """Whose published figures stand beside."""
    device: str | None
    """Where the networks run; None = CUDA where there is one."""
    gpus: int | None
    """Processes to start, one a GPU; None = this one alone, or those that torchrun has started."""
    out: Path | None
    """A file for the result as JSON."""


class Comparison:
    """The two sides, the networks that judge them, and the protocol of what was done.

    Args:
        first: As for `evaluate`.
        second: As for `evaluate`.
        asked: What is wanted.
        mine: Who shares the work.
        where: The device.
        console: For progress and warnings.
    """

    def __init__(
        self, first: str, second: str, asked: EvaluationRequest, mine: Ranks, where: torch.device, console: Console
    ) -> None:
        self.asked = asked
        self.ranks = mine
        self.device = where
        self.console = console
        self.reference = find_reference(first, asked.cache)
        images = self.reference is None or "arr_0" in npz_arrays(self.reference.path)
        self.real = self._set("real", first) if images else None
        self.fake = self._set("fake", second)
        self.missing: list[BadRequestError] = []
        self.protocol = conditions(where) | {"weights": {}}

    def _set(self, role: str, location: str) -> ImageSet:
        asked = self.asked
        return ImageSet(role, location, asked.split, crop=asked.crop, strict=asked.strict, console=self.console)

    @property
    def sides(self) -> list[ImageSet]:
        """Those that have images, real first."""
        return [self.fake] if self.real is None else [self.real, self.fake]

    # What can be measured

    def choose(self) -> list[str]:
        """The figures to compute: those asked for, which the inputs must allow, or else all that they do.

        Metrics whose weights are not to be had are left out, and `complain` tells in the end; unless none is left.
        """
        chosen: list[str] = []
        left_out: dict[str, list[str]] = defaultdict(list)
        for metric in self.asked.metrics or (*PAIRED, *UNPAIRED):
            try:
                self._check_inputs(metric)
                self._check_weights(metric)
                chosen.append(metric)
            except _NoWeightsError as error:
                (self.missing.append(error) if self.asked.insist else left_out[str(error)].append(metric))
            except BadRequestError as error:
                if self.asked.metrics:
                    raise
                left_out[str(error)].append(metric)
        if self.asked.copies is not None:
            self._check_inputs("copies")
            self._check_weights("copies")
            chosen.append("copies")
        if not chosen and not self.asked.codebook:
            self.complain()
            reasons = [f"left out {', '.join(metrics)}: {reason}" for reason, metrics in left_out.items()]
            raise BadRequestError(f"no figure can be computed: {'; '.join(reasons)}")
        for reason, metrics in left_out.items():
            self.console.warn(f"left out {', '.join(metrics)}: {reason}")
        return chosen

    def complain(self) -> None:
        """Raise what stood in the way of figures that were insisted on."""
        if self.missing:
            raise self.missing[0]

    def _check_inputs(self, metric: str) -> None:
        """Refuse a figure that these inputs do not allow; no image is read yet."""
        if self.real is None and metric in _NEEDS_REAL_IMAGES:
            assert self.reference is not None
            raise BadRequestError(f"{metric} needs real images, and {self.reference.path} holds their statistics")
        if metric in PAIRED:
            paired.match(*(side.names for side in self.sides))
        else:
            distributions.require_images(metric, min(len(side) for side in self.sides))

    def _check_weights(self, metric: str) -> None:
        network: Network | None = "inception" if metric in _INCEPTION else None
        if metric == "prc_vgg":
            network = "vgg"
        if metric == "lpips" and not extractors.available_trunks(self.asked.weights):
            network = "alex"
        if network is None or pretrained.is_available(network, self.asked.weights):
            return
        if self.asked.insist and self.ranks.is_first:
            wanted = pretrained.WEIGHTS[network]
            self.console.log(f"downloading {wanted.file} ({wanted.megabytes} MB)")
        fault = self.ranks.from_first(lambda: self._fault_of(network))
        if fault is not None:
            raise _NoWeightsError(*fault)

    def _fault_of(self, network: Network) -> tuple[str, str] | None:
        """Why a network's weights are not to be had, and what to do; as words, which rank 0 sends to the others."""
        try:
            pretrained.find_weights(network, self.asked.weights, download=self.asked.insist)
        except BadRequestError as error:
            return error.message, error.hint
        return None

    # What is measured

    def measure(self, metrics: Sequence[str]) -> Metrics:
        """The figures; what they averaged over is then in the protocol. Only rank 0's are whole."""
        # Every file of weights is opened here, before hours go into the first figure.
        judges = paired.load_metrics(metrics, self.asked.weights, self.device)
        inception = extractors.load_inception(self.asked.weights, self.device) if _INCEPTION & set(metrics) else None
        vgg = extractors.load_vgg(self.asked.weights, self.device) if "prc_vgg" in metrics else None
        self._describe_networks(judges, [network for network in (inception, vgg) if network is not None])
        figures: Metrics = {}
        if judges:
            figures |= self._of_pairs(judges)
        if inception is not None:
            figures |= self._of_sets(metrics, inception)
        if vgg is not None:
            assert self.real is not None
            real, fake = self._features(self.real, vgg), self._features(self.fake, vgg)
            if self.ranks.is_first:
                there = distributions.precision_recall(self._moved(real), self._moved(fake), references=None)
                figures |= {"precision_vgg": there.precision, "recall_vgg": there.recall}
        variants = distributions.VARIANTS | {judge.key: judge.variant for judge in judges}
        if self.asked.codebook and self.ranks.is_first:
            if self.real is None:
                raise BadRequestError("--codebook needs real images", "Name a set of images first.")
            used, self.protocol["codebook"] = codebook_figures(
                self.real, self.asked.run, self.asked.batch_size, self.device, self.console
            )
            figures |= used
            variants |= dict.fromkeys(used, self.protocol["codebook"]["variant"])
        self.protocol |= {side.role: side.describe() for side in self.sides}
        if self.reference is not None:
            self.protocol["real"] = self.protocol.get("real", {}) | {
                "statistics": str(self.reference.path),
                "sha256": sha256(self.reference.path),
                "of": self.reference.protocol,
            }
        self.protocol["variants"] = {key: variants[key] for key in figures}
        return figures

    def _of_pairs(self, judges: list[paired.PairedMetric]) -> Metrics:
        """The mean of each figure over the pairs, each rank scoring its share."""
        real, fake, console = self.real, self.fake, self.console
        assert real is not None
        pairs = paired.match(real.names, fake.names)
        for role, names in zip(("real", "fake"), pairs.unpaired, strict=True):
            if names:
                console.warn(f"{len(names)} of the {role} images have no partner: {cautions.examples(names)}")
        share = pairs.places[self.ranks.share(len(pairs.places))]
        unequal: list[str] = []
        with console.progress(len(share), "comparing", "pairs") as progress:
            stacked = stream.same_size_batches(_read_pairs(real, fake, share, unequal, progress), self.asked.batch_size)
            scored = paired.score_pairs(judges, stacked, self.device)
        parts = self.ranks.all_gather((scored, unequal, _Met.of(real), _Met.of(fake)))
        for _, _, of_real, of_fake in parts:
            of_real.add_to(real)
            of_fake.add_to(fake)
        unequal = [name for _, names, _, _ in parts for name in names]
        if unequal:
            console.warn(f"left out {len(unequal)} pairs of unequal sizes: {cautions.examples(unequal)}")
        scores = {judge.key: [value for part, *_ in parts for value in part[judge.key]] for judge in judges}
        self.protocol["pairs"] = {
            "matched": len(pairs.places),
            "without_partner": {"real": len(pairs.unpaired[0]), "fake": len(pairs.unpaired[1])},
            "of_unequal_sizes": len(unequal),
            "identical": sum(map(math.isinf, scores.get("psnr", []))),
            "averaged": {key: len(values) for key, values in scores.items()},
        }
        figures: Metrics = {}
        for judge in judges:
            figures |= self._mean(judge, scores[judge.key])
        return figures

    def _mean(self, judge: paired.PairedMetric, scores: list[float]) -> Metrics:
        """A figure's mean; nothing where no pair has one, unless the user insists."""
        if not scores:
            problem = f"{judge.key} needs readable pairs of equal sizes, at least {judge.smallest_side} pixels a side"
            if self.asked.metrics:
                raise BadRequestError(problem)
            self.console.warn(f"left out {judge.key}: {problem}")
            return {}
        infinite = sum(map(math.isinf, scores))
        if infinite:
            self.console.warn(f"{infinite} pairs are identical, their {judge.key} infinite: not in its mean")
        return {judge.key: paired.finite_mean(torch.tensor(scores, dtype=torch.float64))}

    def _of_sets(self, metrics: Sequence[str], inception: Inception) -> Metrics:
        """FID, IS, KID, precision, recall and copies."""
        fake = self._features(self.fake, inception)
        with_images = {"kid", "prc", "copies"} | ({"fid"} if self.reference is None else set())
        real = self._features(self.real, inception) if self.real and with_images & set(metrics) else None
        if not self.ranks.is_first:
            return {}
        figures: Metrics = {}
        spread = self.protocol.setdefault("spread", {})
        if "fid" in metrics:
            figures["fid"] = distributions.frechet_distance(
                *(real.statistics(self.device) if self.reference is None and real else self._reference(inception)),
                *fake.statistics(self.device),
            )
        if "isc" in metrics:
            logits = torch.cat([inception.logits(rows.to(self.device)).cpu() for rows in fake.rows.split(4096)])
            figures["isc"], spread["isc"] = distributions.inception_score(logits)
        if real is None or not {"kid", "prc", "copies"} & set(metrics):
            return figures
        x, y = self._moved(real), self._moved(fake)
        if "kid" in metrics:
            figures["kid"], spread["kid"] = distributions.kernel_distance(x, y)
        if "prc" in metrics:
            there = distributions.precision_recall(x, y)
            figures |= {"precision": there.precision, "recall": there.recall}
        if "copies" in metrics:
            found = distributions.copies(x, y)
            figures["copies"] = found.share
            self.protocol["nearest"] = self._show_copies(real, fake, found)
        return figures

    def _features(self, images: ImageSet, network: FeatureExtractor) -> Features:
        return feature_cache.cached_features(
            images,
            network,
            self.asked.cache,
            batch_size=self.asked.batch_size,
            device=self.device,
            ranks=self.ranks,
            console=self.console,
        )

    def _moved(self, of: Features) -> Tensor:
        return of.rows.to(self.device)

    def _reference(self, inception: Inception) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the real images, from a file."""
        reference = self.reference
        assert reference is not None
        made_with = reference.protocol.get("weights", {}).get("inception", {}).get("sha256", inception.digest)
        if made_with != inception.digest:
            self.console.warn(f"{reference.path} was made with other weights of Inception: FID compares with no others")
        where = self.device if self.device.type == "cuda" else torch.device("cpu")
        return reference.mu.to(where), reference.sigma.to(where)

    def _show_copies(self, real: Features, fake: Features, found: Copies) -> list[dict[str, Any]]:
        """Make the picture of the fakes nearest to real images, those below them; which they are."""
        assert self.real is not None
        assert self.asked.copies is not None
        order = found.distance.argsort()[:_PICTURED].tolist()
        places = [int(fake.places[index]) for index in order]
        nearest = [int(real.places[int(found.nearest[index])]) for index in order]
        shown = [image for _, image in (*self.fake.read(places), *self.real.read(nearest)) if image is not None]
        size = shown[0].shape[-2:]
        same = [F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8) for image in shown]
        pixels.save_grid(self.asked.copies, torch.stack(same), len(order), pixels.grid_scale(size[-1]))
        return [
            {"fake": self.fake.names[a], "real": self.real.names[b], "distance": float(found.distance[index])}
            for a, b, index in zip(places, nearest, order, strict=True)
        ]

    def _describe_networks(self, judges: list[paired.PairedMetric], networks: list[FeatureExtractor]) -> None:
        """Which networks judge, with which weights; a warning where these are not the published ones."""
        names: list[Network] = [judge.trunk for judge in judges if judge.trunk is not None]
        names += ["inception" if isinstance(network, Inception) else "vgg" for network in networks]
        for name in dict.fromkeys(names):
            path = pretrained.find_weights(name, self.asked.weights)
            self.protocol["weights"][name] = pretrained.record(path)
            if not pretrained.is_published(path):
                self.console.warn(f"{path} is not the published file: its figures compare with no others")
        self.protocol["extractors"] = [network.name for network in networks]


class _NoWeightsError(BadRequestError):
    """A network's weights are not here, and could not be fetched."""


@dataclass(frozen=True)
class _Met:
    """What a rank has met in its share of a set."""

    sizes: Mapping[int, Size]
    unreadable: Mapping[int, str]

    @classmethod
    def of(cls, images: ImageSet) -> _Met:
        return cls(images.sizes, images.unreadable)

    def add_to(self, images: ImageSet) -> None:
        images.sizes |= self.sizes
        for index, reason in self.unreadable.items():
            images.leave_out(index, reason)


def conditions(device: torch.device) -> dict[str, Any]:
    """What of a protocol does not depend on the sets."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "precision": "float32",
        "versions": {"movq": __version__} | {name: version(name) for name in _LIBRARIES},
    }


def report(figures: Metrics, protocol: dict[str, Any], out: Path | None, console: Console) -> None:
    """Give the figures with what is published beside them, and write them to a file where one is named."""
    result = {**figures, "protocol": protocol}
    published = protocol.get("published")
    columns = ["figure", "value", *(["published"] if published else []), "variant"]
    rows = []
    for key, value in figures.items():
        beside = [f"{published[key]:g}" if key in published else "-"] if published else []
        rows.append([key, "inf" if value is None else f"{value:.6g}", *beside, protocol["variants"][key]])
    console.table(result, columns, rows)
    if out is not None:
        atomic_write(out, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def find_reference(location: str, cache: Path) -> Reference | None:
    """Statistics in the place of real images: an .npz that holds some, or a name under which they are kept.

    Raises:
        BadRequestError: The file cannot be read.
    """
    path = Path(location)
    if not path.exists() and kept_statistics(location, cache).is_file():
        path = kept_statistics(location, cache)
    elif path.suffix != ".npz" or npz_arrays(path) & {"arr_0", "mu"} == {"arr_0"}:
        return None
    reference, width = feature_cache.read_reference(path), extractors.INCEPTION_WIDTH
    if len(reference.mu) != width:
        raise BadRequestError(f"{path} holds statistics of {len(reference.mu)} features, not of Inception's {width}")
    return reference


def kept_statistics(name: str, cache: Path) -> Path:
    """Where statistics of a name are kept."""
    return cache / "statistics" / f"{Path(name).name}.npz"


def _read_pairs(
    real: ImageSet, fake: ImageSet, places: Sequence[tuple[int, int]], unequal: list[str], progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Pairs that can be compared, uint8 [2, 3, H, W]; the names of those of unequal sizes go to `unequal`."""
    firsts, seconds = real.read(a for a, _ in places), fake.read(b for _, b in places)
    for (place, a), (_, b) in zip(firsts, seconds, strict=True):
        progress.advance()
        if a is None or b is None:
            continue
        if a.shape == b.shape:
            yield place, torch.stack([a, b])
        else:
            unequal.append(real.names[place])
