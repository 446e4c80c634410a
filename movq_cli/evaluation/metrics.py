"""The metrics of `movq evaluate`: one class for each, and the registry from which everything else is derived.

The options of the command and their help, the pretrained weights that are needed, the smallest number of images, the
variants in the protocol, the decimals in tables and the published targets all come from these classes. To add a
metric, write one class in this file and decorate it with `register`.

The command line imports this module to print its help. Therefore torch, and every module that imports torch, is
imported inside the methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from movq_cli.evaluation.metric import Measurement, Metric, Needs, PairedMetric, PixelMetric, SetMetric

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from movq_cli.evaluation.image_sets import ImageSet
    from movq_cli.evaluation.inputs import SetInputs
    from movq_cli.evaluation.paired import PairScorer
    from movq_cli.evaluation.pretrained import Network

NEIGHBOURS = 3
"""k of precision and recall: the distance to the k-th nearest neighbour is the radius of an image's ball."""

REGISTRY: dict[str, type[Metric]] = {}
"""All metrics by their key, in the order of the options."""

M = TypeVar("M", bound=type[Metric])


def register(metric: M) -> M:
    """Add a metric to the registry; use it as the decorator of the class.

    Raises:
        ValueError: Another metric has this key, option or result key.
    """
    for other in REGISTRY.values():
        same_option = metric.option is not None and metric.option == other.option
        if metric.key == other.key or same_option or set(metric.result_keys) & set(other.result_keys):
            raise ValueError(f"the metric {metric.__name__} has a name of {other.__name__}")
    REGISTRY[metric.key] = metric
    return metric


def requested(keys: Collection[str] = ()) -> list[Metric]:
    """Return the metrics of these keys, those of pairs first.

    No key at all stands for every metric with a flag, apart from variants of others.
    """
    known = {key: metric for key, metric in REGISTRY.items() if metric.option is not None}
    chosen = [metric() for key, metric in known.items() if (key in keys if keys else not metric.is_variant)]
    return sorted(chosen, key=lambda metric: metric.needs is not Needs.PAIRS)


def with_result_key(result_key: str) -> type[Metric] | None:
    """Return the metric that gives a key of the JSON result; None for a key that no metric gives."""
    return next((metric for metric in REGISTRY.values() if result_key in metric.result_keys), None)


def load_scorers(keys: Collection[str], folder: Path | None, device: torch.device) -> list[PairScorer]:
    """Load the paired metrics of these keys.

    Args:
        keys: Keys of paired metrics; must not be empty.
        folder: Folder that is searched for weights before torch hub's.
        device: Device that runs the networks.

    Raises:
        BadRequestError: Weights are missing or cannot be used.
    """
    paired = [metric for metric in requested(keys) if isinstance(metric, PairedMetric)]
    return [scorer for metric in paired for scorer in metric.load(folder, device)]


@register
class FID(SetMetric):
    """Fréchet Inception distance (Heusel et al. 2017)."""

    key = "fid"
    option = "--fid"
    help = "Frechet Inception distance (FID) between the two sets; lower is better."
    result_keys = ("fid",)
    variant = "Inception pool features, sample covariance"
    needs = Needs.STATISTICS_AND_FAKE
    minimum_images = 2
    decimals = 2
    reliable_images = 2048  # With fewer images the covariance of the 2,048 features does not have full rank.
    few_images = "FID is biased upwards and compares only with FIDs of the same number of images"

    def compute(self, inputs: SetInputs) -> Measurement:
        """Compare the mean and the covariance of the features."""
        from movq_cli.evaluation import distributions

        return Measurement(
            {"fid": distributions.frechet_distance(*inputs.real_statistics, *inputs.fake_statistics)},
        )

    @classmethod
    def target_key(cls, result_key: str, *, reconstructed: bool) -> str:
        """Return the key of rFID for reconstructions: papers give their FID under that name."""
        return "rfid" if reconstructed else result_key

    def warnings(self, sides: Sequence[ImageSet], *, reconstructed: bool) -> Iterator[str]:
        """Warn of too few images, and of an rFID on images that the tokenizer was trained on."""
        yield from super().warnings(sides, reconstructed=reconstructed)
        if reconstructed and sides[0].split == "train":
            yield (
                f"{sides[0].location} is its train split: "
                "measure the rFID of a tokenizer on images that it was not trained on"
            )


@register
class InceptionScore(SetMetric):
    """Inception Score (Salimans et al. 2016)."""

    splits: ClassVar[int] = 10

    key = "isc"
    option = "--is"
    help = "Inception Score of FAKE alone; higher is better."
    result_keys = ("isc",)
    variant = f"Inception logits without bias, mean over {splits} shuffled splits"
    needs = Needs.FAKE
    reliable_images = 5000
    few_images = "the Inception Score is biased downwards and compares only with scores of the same number of images"
    decimals = 1

    def compute(self, inputs: SetInputs) -> Measurement:
        """Compute the score from the class logits of the fake images."""
        from movq_cli.evaluation import distributions

        found = distributions.inception_score(inputs.fake_logits(), splits=self.splits)
        return Measurement({"isc": found.mean}, {"isc": found.std})


@register
class OrderedInceptionScore(SetMetric):
    """Inception Score in the convention of guided-diffusion's evaluator.

    Its splits are consecutive images, in the order of their names. Samples that are sorted by class have few classes in
    a split, and a lower score than shuffled ones.
    """

    split_size: ClassVar[int] = 5000

    key = "isc_ordered"
    option = "--is-ordered"
    help = "Inception Score of FAKE in guided-diffusion's convention: splits in the order of names."
    result_keys = ("isc_ordered",)
    variant = f"Inception logits without bias, mean over consecutive splits of {split_size:,} images"
    needs = Needs.FAKE
    is_variant = True
    decimals = 1

    def compute(self, inputs: SetInputs) -> Measurement:
        """Compute the score from the class logits of the fake images."""
        from movq_cli.evaluation import distributions

        found = distributions.ordered_inception_score(inputs.fake_logits(), split_size=self.split_size)
        return Measurement({"isc_ordered": found.mean}, {"isc_ordered": found.std})


@register
class KID(SetMetric):
    """Kernel Inception distance (Binkowski et al. 2018)."""

    subsets: ClassVar[int] = 100
    subset_size: ClassVar[int] = 1000

    key = "kid"
    option = "--kid"
    help = "Kernel Inception distance (KID) between the two sets; lower is better."
    result_keys = ("kid",)
    variant = f"Inception pool features, cubic kernel, unbiased, mean over {subsets} subsets of at most {subset_size:,}"
    minimum_images = 2
    reliable_images = subset_size
    few_images = "its subsets are equal, so that the standard deviation of KID says nothing"

    def compute(self, inputs: SetInputs) -> Measurement:
        """Compute the mean over random subsets of both sets."""
        from movq_cli.evaluation import distributions

        found = distributions.kernel_distance(
            inputs.real, inputs.fake, subsets=self.subsets, subset_size=self.subset_size
        )
        return Measurement({"kid": found.mean}, {"kid": found.std})


@register
class PrecisionRecall(SetMetric):
    """Improved precision and recall (Kynkäänniemi et al. 2019) in the convention of guided-diffusion's evaluator."""

    references: ClassVar[int | None] = 10_000
    """Number of real images that are used at most; None uses all."""

    key = "prc"
    option = "--prc"
    help = "Precision and recall, 0 to 1, of Inception features."
    result_keys = ("precision", "recall")
    variant = f"Inception pool features, k = {NEIGHBOURS}, at most {references:,} references"
    minimum_images = NEIGHBOURS + 1
    reliable_images = 5000
    few_images = "precision and recall depend on the number of images and compare only with those of the same numbers"

    def compute(self, inputs: SetInputs) -> Measurement:
        """Compute the shares of each set that lie within the other."""
        from movq_cli.evaluation import distributions

        found = distributions.precision_recall(inputs.real, inputs.fake, k=NEIGHBOURS, references=self.references)
        return Measurement(dict(zip(self.result_keys, found, strict=True)))


@register
class PrecisionRecallVGG(PrecisionRecall):
    """Improved precision and recall in StyleGAN's convention."""

    references = None

    key = "prc_vgg"
    option = "--prc-vgg"
    help = "Precision and recall, 0 to 1, of VGG-16 features: StyleGAN's convention."
    result_keys = ("precision_vgg", "recall_vgg")
    variant = f"VGG-16 fc2 features, k = {NEIGHBOURS}, all images"
    network = "vgg"


@register
class PSNR(PixelMetric):
    """Peak signal-to-noise ratio."""

    key = "psnr"
    option = "--psnr"
    help = "PSNR of pairs of the same name, in dB; higher is better."
    result_keys = ("psnr",)
    variant = "RGB in [0,1], one value an image, mean over images"
    decimals = 2

    def score(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return decibels [N], infinite for identical images."""
        from movq_cli.evaluation import paired

        return paired.psnr(real, fake)


@register
class SSIM(PixelMetric):
    """Structural similarity (Wang et al. 2004), as the paper's first author computes it.

    The paper does not state its window. That of TFill by the same author (evaluations/evaluation.py in
    https://github.com/lyndonzheng/TFill) is scikit-image's `structural_similarity` with `win_size=11` and
    `data_range=1`.
    """

    window: ClassVar[int] = 11
    """Side of the window in pixels."""

    key = "ssim"
    option = "--ssim"
    help = "SSIM of pairs of the same name; higher is better."
    result_keys = ("ssim",)
    variant = f"uniform {window}x{window} window, RGB in [0,1], one value an image, mean over images"
    smallest_side = window

    def score(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return similarities [N] in [-1, 1]."""
        from movq_cli.evaluation import paired

        return paired.ssim(real, fake, self.window)


@register
class LPIPS(PairedMetric):
    """Learned perceptual distance (Zhang et al. 2018).

    The AlexNet trunk is the usual one for evaluation, and that of TFill by the paper's first author
    (`lpips.LPIPS(net='alex')` in evaluations/evaluation.py); the paper does not state its trunk. VGG-16 takes its place
    where only the weights of VGG-16 are on this machine. Where both are, both are computed, and `lpips_vgg` is the
    second. Their scales differ, so each variant names its trunk.
    """

    key = "lpips"
    option = "--lpips"
    help = "LPIPS of pairs of the same name; lower is better."
    result_keys = ("lpips", "lpips_vgg")
    variant = "{trunk} trunk, version 0.1, mean over images"
    network = "alex"

    def missing_network(self, folder: Path | None) -> Network | None:
        """Return AlexNet where the weights of neither trunk are on this machine."""
        from movq_cli.evaluation import extractors

        return None if extractors.available_trunks(folder) else self.network

    def load(self, folder: Path | None, device: torch.device) -> list[PairScorer]:
        """Load a scorer for each trunk whose weights are on this machine."""
        from functools import partial

        from movq_cli.evaluation import extractors, paired

        scorers = []
        # Without any weights, loading AlexNet's raises the error that says how to get them.
        trunks = extractors.available_trunks(folder) or ["alex"]
        for key, trunk in zip(self.result_keys, trunks, strict=False):
            score = partial(paired.perceptual_distance, extractors.load_lpips(trunk, folder, device))
            variant = self.variant.format(trunk=trunk)
            scorers.append(paired.PairScorer(key, variant, extractors.SMALLEST_SIDE[trunk], score, trunk))
        return scorers


@register
class Copies(SetMetric):
    """Share of fake images that may be copies of real ones; its option `--copies` names a picture of the nearest.

    Args:
        picture: File of the picture.
    """

    key = "copies"
    option = None
    help = ""
    result_keys = ("copies",)
    variant = "share of fakes nearer to a real image than that is to any other, Inception pool features"
    minimum_images = 2

    def __init__(self, picture: Path) -> None:
        self.picture = picture

    def compute(self, inputs: SetInputs) -> Measurement:
        """Find the nearest real image of each fake one, and draw the nearest pairs."""
        from movq_cli.evaluation import copies, distributions

        found = distributions.find_copies(inputs.real, inputs.fake)
        nearest = copies.nearest_pairs(inputs, found)
        copies.save_picture(self.picture, inputs, nearest)
        return Measurement({"copies": found.share}, protocol={"nearest": [pair.describe(inputs) for pair in nearest]})
