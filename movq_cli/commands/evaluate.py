"""`movq evaluate`: the figures of one set of images against another, and the protocol behind them."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends import cudnn

from movq_cli import __version__, devices
from movq_cli.console import Console, Progress
from movq_cli.data import stream
from movq_cli.data.images import BadImageError
from movq_cli.data.shards import SplitName
from movq_cli.data.sources import npz_arrays, open_source
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write, sha256
from movq_cli.metrics import distributions, extractors, paired

PAIRED = ("psnr", "ssim", "lpips")
UNPAIRED = ("fid", "isc", "kid", "prc")
_KEPT_FOR = {"isc": "logits", "kid": "pool", "prc": "pool"}

_RELIABLE_FID = 2048  # images: fewer leave the covariance of 2,048 features short of full rank
_LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "pillow")
_SHOWN = 3  # names in a warning

Figures = dict[str, float | None]


def evaluate(
    first: str,
    second: str,
    *,
    fid: bool,
    isc: bool,
    kid: bool,
    prc: bool,
    psnr: bool,
    ssim: bool,
    lpips: bool,
    split: SplitName,
    batch_size: int,
    weights: Path | None,
    device: str | None,
    out: Path | None,
    console: Console,
) -> None:
    """Compare two sets of images; with no figure asked for, by every figure that the inputs allow.

    Args:
        first: The real images: a folder, zip, tar, prepared set or .npz; for FID also an .npz of `mu` and `sigma`.
        second: The fake images: samples, or reconstructions that bear their originals' names.
        fid: Fréchet distance of Inception features.
        isc: Inception Score of the fake images.
        kid: Kernel distance of Inception features.
        prc: Precision and recall.
        psnr: Peak signal-to-noise ratio, in dB.
        ssim: Structural similarity.
        lpips: Learned perceptual distance, with the AlexNet trunk where its weights are, else VGG.
        split: The part of a prepared set.
        batch_size: Images that go through a network at once.
        weights: A folder of pretrained weights, searched before torch hub's.
        device: Where the networks run; None = CUDA where there is one.
        out: A file for the result as JSON.
        console: Where the result and the warnings go.

    Raises:
        BadRequestError: Unusable inputs, no pairs, or weights that are missing or unusable.
    """
    flags = {"psnr": psnr, "ssim": ssim, "lpips": lpips, "fid": fid, "isc": isc, "kid": kid, "prc": prc}
    asked = [metric for metric, wanted in flags.items() if wanted]
    if out is not None and out.is_dir():
        raise BadRequestError(f"{out} is a folder", "--out names the JSON file to write.")
    where = devices.pick(device)
    fake = _Images("fake", second, split, console)
    real = _statistics(first) or _Images("real", first, split, console)
    comparison = _Comparison(real, fake, weights, where, batch_size, console, insist=bool(asked))
    metrics = comparison.choose(asked)
    comparison.warn_of_inputs(metrics)
    # Every file of weights is opened here, before hours go into the first figure.
    judges = paired.load_metrics(metrics, weights, where)
    inception = extractors.load_inception(weights, where) if set(metrics) & set(UNPAIRED) else None
    figures: Figures = {}
    protocol = _conditions(judges, inception is not None, comparison)
    # TF32 would move the figures in their fourth digit. Pillow's notices are silenced for each image, in
    # threads, whose restored filters may be each other's: the outermost block has the last word.
    with torch.inference_mode(), warnings.catch_warnings(), cudnn.flags(enabled=True, allow_tf32=False):
        if judges:
            figures |= _compare_pairs(judges, comparison, protocol)
        if inception is not None:
            figures |= _compare_sets(metrics, inception, comparison, protocol)
    comparison.warn_of_sizes()
    variants = distributions.VARIANTS | {judge.key: judge.variant for judge in judges}
    protocol |= {side.role: side.describe() for side in comparison.sides()}
    protocol["variants"] = {key: variants[key] for key in figures}
    _report(figures, protocol, out, console)


def _statistics(first: str) -> extractors.Reference | None:
    """Statistics in the place of real images; None where an .npz holds images alone, or it is none."""
    if not first.endswith(".npz") or npz_arrays(Path(first)) & {"arr_0", "mu"} == {"arr_0"}:
        return None
    return extractors.read_reference(Path(first))


class _Images:
    """One side of the comparison: where its images come from, and what was met on the way."""

    def __init__(self, role: str, spec: str, split: SplitName, console: Console) -> None:
        self._source = open_source(spec).of_split(split)
        self.role = role
        self.spec = spec
        self.names = self._source.names
        self.sizes: dict[int, str] = {}
        self.unreadable: set[int] = set()
        self._console = console

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Pixels, uint8 [3, H, W], in the order of the indices; None for a corrupt image, which is named."""
        for index, image in stream.decoded(self._source, indices):
            if isinstance(image, BadImageError):
                if index not in self.unreadable:
                    self._console.warn(f"{self.role}: left out {self.names[index]}: {image}")
                self.unreadable.add(index)
                yield index, None
            else:
                self.sizes[index] = f"{image.shape[2]}x{image.shape[1]}"
                yield index, image

    def describe(self) -> dict[str, Any]:
        """What the protocol says of this side."""
        sizes = Counter(self.sizes.values())
        return {
            "source": self.spec,
            "images": len(self.names),
            "unreadable": [self.names[index] for index in sorted(self.unreadable)],
            "sizes": dict(sizes.most_common(5)),
            "distinct_sizes": len(sizes),
        }


@dataclass(frozen=True)
class _Comparison:
    """The two sides, and what every pass over them needs."""

    real: _Images | extractors.Reference
    fake: _Images
    weights: Path | None
    device: torch.device
    batch_size: int
    console: Console
    insist: bool  # the user named the figures: one that cannot be had is an error

    def sides(self) -> list[_Images]:
        """Those that have images, real first."""
        return [side for side in (self.real, self.fake) if isinstance(side, _Images)]

    def warn_of_inputs(self, metrics: Sequence[str]) -> None:
        """Say, before the work begins, where the figures would mislead."""
        for side in self.sides():
            if "fid" in metrics and len(side.names) < _RELIABLE_FID:
                few = f"{side.role} has {len(side.names)} images, fewer than {_RELIABLE_FID}"
                self.console.warn(f"{few}: FID is biased upwards and compares only at equal counts")
        if len({Path(side.spec).resolve() for side in self.sides()}) < len(self.sides()):
            self.console.warn(f"both sides are the same images: {self.fake.spec}")
        jpeg = [side.role for side in self.sides() if side.names[0].lower().endswith((".jpg", ".jpeg"))]
        if len(jpeg) == 1 and len(self.sides()) == 2:
            self.console.warn(f"only the {jpeg[0]} images are JPEG: the figures see its artefacts")

    def warn_of_sizes(self) -> None:
        """Say that images of several sizes were met, on one side or between them."""
        sizes = {side.role: Counter(side.sizes.values()) for side in self.sides()}
        if len(set().union(*sizes.values())) > 1:
            seen = "; ".join(f"{role}: {_few(list(counts))}" for role, counts in sizes.items() if counts)
            self.console.warn(f"images of several sizes ({seen}): the figures depend on how each is resized")

    def choose(self, asked: list[str]) -> list[str]:
        """The figures to compute: those asked for, which must be possible, or else all that are."""
        if asked:
            for metric in asked:
                self._check(metric, download=True)
            return asked
        chosen: list[str] = []
        left_out: dict[str, list[str]] = defaultdict(list)
        for metric in (*PAIRED, *UNPAIRED):
            try:
                self._check(metric, download=False)
                chosen.append(metric)
            except BadRequestError as error:
                left_out[str(error)].append(metric)
        reasons = [f"left out {', '.join(metrics)}: {reason}" for reason, metrics in left_out.items()]
        if not chosen:
            raise BadRequestError(f"no figure can be computed: {'; '.join(reasons)}")
        for reason in reasons:
            self.console.warn(reason)
        return chosen

    def _check(self, metric: str, *, download: bool) -> None:
        """Refuse a figure that these inputs or the present weights do not allow; no image is read yet."""
        if isinstance(self.real, extractors.Reference) and metric not in {"fid", "isc"}:
            raise BadRequestError(f"{metric} needs real images, and {self.real.path} holds their statistics")
        if metric in PAIRED:
            paired.match(*(side.names for side in self.sides()))
        if metric in UNPAIRED:
            distributions.require_images(metric, min(len(side.names) for side in self.sides()))
            self._find("inception", download=download)
        if metric == "lpips" and not extractors.trunks_here(self.weights):
            self._find("alex", download=download)

    def _find(self, name: extractors.Network, *, download: bool) -> None:
        if download and not extractors.is_here(name, self.weights):
            wanted = extractors.WEIGHTS[name]
            self.console.log(f"downloading {wanted.file} ({wanted.megabytes} MB)")
        extractors.find_weights(name, self.weights, download=download)


def _compare_pairs(judges: list[paired.PairedMetric], comparison: _Comparison, protocol: dict[str, Any]) -> Figures:
    """The mean of each figure over the pairs, and in the protocol how many there were."""
    real, fake, console = comparison.real, comparison.fake, comparison.console
    assert isinstance(real, _Images)
    pairs = paired.match(real.names, fake.names)
    for role, names in zip(("real", "fake"), pairs.lonely, strict=True):
        if names:
            console.warn(f"{len(names)} of the {role} images have no partner: {_few(names)}")
    unequal: list[str] = []
    with console.progress(len(pairs.places), "comparing", "pairs") as progress:
        stacked = stream.same_size_batches(_read_pairs(real, fake, pairs, unequal, progress), comparison.batch_size)
        scores = paired.score_pairs(judges, stacked, comparison.device)
    if unequal:
        console.warn(f"left out {len(unequal)} pairs of unequal sizes: {_few(unequal)}")
    protocol["pairs"] = {
        "matched": len(pairs.places),
        "without_partner": {"real": len(pairs.lonely[0]), "fake": len(pairs.lonely[1])},
        "of_unequal_sizes": len(unequal),
        "identical": sum(map(math.isinf, scores.get("psnr", []))),
        "averaged": {key: len(values) for key, values in scores.items()},
    }
    figures: Figures = {}
    for judge in judges:
        figures |= _mean(judge, scores[judge.key], comparison)
    return figures


def _mean(judge: paired.PairedMetric, scores: list[float], comparison: _Comparison) -> Figures:
    """A figure's mean; nothing where no pair has one, unless the user insists."""
    if not scores:
        problem = f"{judge.key} needs readable pairs of equal sizes, at least {judge.smallest_side} pixels a side"
        if comparison.insist:
            raise BadRequestError(problem)
        comparison.console.warn(f"left out {judge.key}: {problem}")
        return {}
    infinite = sum(map(math.isinf, scores))
    if infinite:
        comparison.console.warn(f"{infinite} pairs are identical, their {judge.key} infinite: not in its mean")
    return {judge.key: paired.finite_mean(torch.tensor(scores, dtype=torch.float64))}


def _read_pairs(
    real: _Images, fake: _Images, pairs: paired.Pairs, unequal: list[str], progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Pairs that can be compared, uint8 [2, 3, H, W]; the names of those of unequal sizes go to `unequal`."""
    firsts, seconds = real.read(a for a, _ in pairs.places), fake.read(b for _, b in pairs.places)
    for (place, a), (_, b) in zip(firsts, seconds, strict=True):
        progress.advance()
        if a is None or b is None:
            continue
        if a.shape == b.shape:
            yield place, torch.stack([a, b])
        else:
            unequal.append(real.names[place])


def _compare_sets(
    metrics: Sequence[str], inception: extractors.Inception, comparison: _Comparison, protocol: dict[str, Any]
) -> Figures:
    """FID, IS, KID, precision and recall, and in the protocol what they averaged over."""
    keep = {_KEPT_FOR[metric] for metric in metrics if metric in _KEPT_FOR}
    fake = _features(comparison.fake, inception, keep, comparison)
    figures: Figures = {}
    spread = protocol.setdefault("spread", {})
    if "isc" in metrics:
        figures["isc"], spread["isc"] = distributions.inception_score(fake.logits)
    if not set(metrics) & {"fid", "kid", "prc"}:
        return figures
    if isinstance(comparison.real, extractors.Reference):
        return figures | {"fid": _fid((comparison.real.mu, comparison.real.sigma), fake)}
    real = _features(comparison.real, inception, keep - {"logits"}, comparison)
    if "fid" in metrics:
        figures["fid"] = _fid((real.statistics.mean, real.statistics.covariance), fake)
    if "kid" in metrics:
        figures["kid"], spread["kid"] = distributions.kernel_distance(real.pool, fake.pool)
    if "prc" in metrics:
        on_device = [features.pool.to(comparison.device) for features in (real, fake)]
        figures["precision"], figures["recall"] = distributions.precision_recall(on_device[0], on_device[1])
    return figures


def _fid(real: tuple[Tensor, Tensor], fake: extractors.Features) -> float:
    statistics = fake.statistics
    mu, sigma = (x.to(statistics.mean) for x in real)
    return distributions.frechet_distance(mu, sigma, statistics.mean, statistics.covariance)


def _features(
    images: _Images, inception: extractors.Inception, keep: set[str], comparison: _Comparison
) -> extractors.Features:
    with comparison.console.progress(len(images.names), f"features of {images.role}", "images") as progress:

        def readable() -> Iterator[tuple[int, Tensor]]:
            for place, image in images.read(range(len(images.names))):
                progress.advance()
                if image is not None:
                    yield place, image

        batches = stream.same_size_batches(readable(), comparison.batch_size)
        return extractors.collect_features(inception, batches, comparison.device, keep)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _conditions(judges: list[paired.PairedMetric], inception: bool, comparison: _Comparison) -> dict[str, Any]:
    """What somebody would need to know to repeat the figures."""
    networks: list[extractors.Network] = [judge.trunk for judge in judges if judge.trunk is not None]
    if inception:
        networks.append("inception")
    weights = {}
    for network in networks:
        path = extractors.find_weights(network, comparison.weights)
        weights[network] = {"file": path.name, "sha256": sha256(path)}
        if not weights[network]["sha256"].startswith(extractors.WEIGHTS[network].sha256_prefix):
            comparison.console.warn(f"{path} is not the published file: its figures compare with no others")
    conditions: dict[str, Any] = {
        "extractor": extractors.INCEPTION if inception else None,
        "weights": weights,
        "device": str(comparison.device),
        "precision": "float32",
        "versions": {"movq": __version__} | {name: version(name) for name in _LIBRARIES},
    }
    if isinstance(comparison.real, extractors.Reference):
        path = comparison.real.path
        conditions["real"] = {"source": str(path), "sha256": sha256(path)}
    return conditions


def _report(figures: Figures, protocol: dict[str, Any], out: Path | None, console: Console) -> None:
    result = {**figures, "protocol": protocol}
    rows = [
        [key, "inf" if value is None else f"{value:.6g}", protocol["variants"][key]] for key, value in figures.items()
    ]
    console.table(result, ["figure", "value", "variant"], rows)
    if out is not None:
        atomic_write(out, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
