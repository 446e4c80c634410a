"""The contract of a metric: what it is called, which images and weights it needs, and how it is reported.

`metrics` has the metrics themselves. The command line imports both modules to print its help. Therefore torch, and
every module that imports torch, is imported inside the methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from movq_cli.errors import BadRequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from movq_cli.evaluation.image_sets import ImageSet
    from movq_cli.evaluation.inputs import SetInputs
    from movq_cli.evaluation.paired import PairScorer
    from movq_cli.evaluation.pretrained import Network

DEFAULT_DECIMALS = 4

MetricValues = dict[str, float | None]
"""Values by result key. None stands for a mean over pairs that are all identical, whose PSNR is infinite."""


class Needs(Enum):
    """The images from which a metric is computed."""

    PAIRS = auto()
    """Pairs of a real and a fake image that have the same name."""
    REAL_AND_FAKE = auto()
    """The features of both sets."""
    STATISTICS_AND_FAKE = auto()
    """Mean and covariance of the real features, for which a file of statistics suffices, and the fake features."""
    FAKE = auto()
    """The features of the fake images alone."""


@dataclass(frozen=True)
class Measurement:
    """The result of a metric that compares two sets."""

    values: Mapping[str, float]
    """Value of each result key."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation over subsets or splits, by result key."""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the protocol."""


class Metric(ABC):
    """A metric: what it is called, what it needs, and how it is reported."""

    key: ClassVar[str]
    """Name of the metric in requests and messages."""
    option: ClassVar[str | None]
    """Flag of `movq evaluate` that asks for the metric; None for a metric that has an option of its own kind."""
    help: ClassVar[str]
    """Help text of the flag."""
    result_keys: ClassVar[tuple[str, ...]]
    """Keys of the JSON result that the metric may give."""
    variant: ClassVar[str]
    """Text that says which of the metric's definitions is computed; the protocol records it."""
    needs: ClassVar[Needs]
    """The images from which the metric is computed."""
    network: ClassVar[Network | None] = None
    """Pretrained network whose weights are needed."""
    minimum_images: ClassVar[int] = 1
    """Smallest number of images in each set, or of pairs, for which the metric is defined."""
    reliable_images: ClassVar[int] = 0
    """Number of images in each set below which the metric misleads; 0 = it does not."""
    few_images: ClassVar[str] = ""
    """Clause for the warning that says how the metric misleads below that number."""
    is_variant: ClassVar[bool] = False
    """Whether another metric measures the same by the usual convention; then this one is computed on request only."""
    decimals: ClassVar[int] = DEFAULT_DECIMALS
    """Decimals in the tables of `movq evaluate --table`."""

    @classmethod
    def require_images(cls, count: int) -> None:
        """Refuse sets that are too small for the metric to be defined.

        Args:
            count: Number of images in the smaller set, or of pairs.

        Raises:
            BadRequestError: There are too few images.
        """
        if count < cls.minimum_images:
            unit = "pairs" if cls.needs is Needs.PAIRS else "images in each set"
            raise BadRequestError(f"{cls.key} needs at least {cls.minimum_images} {unit}, not {count}")

    def missing_network(self, folder: Path | None) -> Network | None:
        """Return the network whose weights the metric needs and does not find on this machine, or None.

        Args:
            folder: Folder that is searched for weights before torch hub's.
        """
        from movq_cli.evaluation import pretrained

        if self.network is None or pretrained.is_available(self.network, folder):
            return None
        return self.network

    @classmethod
    def target_key(cls, result_key: str, *, reconstructed: bool) -> str:
        """Return the name under which a preset's `target` holds the published value.

        Args:
            result_key: One of `result_keys`.
            reconstructed: Whether the fake images are reconstructions of the real ones.
        """
        del reconstructed
        return result_key

    def warnings(self, sides: Sequence[ImageSet], *, reconstructed: bool) -> Iterator[str]:
        """Yield a line for each reason why this metric would mislead on these sets; no image has been read yet.

        Args:
            sides: The sets that have images, the real one first.
            reconstructed: Whether the fake images are reconstructions of the real ones.
        """
        del reconstructed
        for side in sides if self.needs is not Needs.FAKE else sides[-1:]:
            if len(side) < self.reliable_images:
                yield f"{side.role} has {len(side)} images, fewer than {self.reliable_images}: {self.few_images}"


class PairedMetric(Metric):
    """A metric that has one value for each pair of images; its result is the mean of the finite values."""

    needs = Needs.PAIRS
    smallest_side: ClassVar[int] = 1
    """Smallest height and width of an image, in pixels; smaller pairs are left out of the mean."""

    @abstractmethod
    def load(self, folder: Path | None, device: torch.device) -> list[PairScorer]:
        """Return what scores the pairs, one scorer for each result key; the weights of a network are loaded here.

        Args:
            folder: Folder that is searched for weights before torch hub's.
            device: Device that runs the networks.
        """


class PixelMetric(PairedMetric):
    """A metric of pairs that is computed from the pixels, without a network."""

    @abstractmethod
    def score(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return one value for each pair, [N].

        Args:
            real: Real images, uint8 [N, 3, H, W].
            fake: Fake images of the same names, uint8 [N, 3, H, W].
        """

    def load(self, folder: Path | None, device: torch.device) -> list[PairScorer]:
        """Return the one scorer, which needs no weights."""
        from movq_cli.evaluation.paired import PairScorer

        del folder, device
        (key,) = self.result_keys
        return [PairScorer(key, self.variant, self.smallest_side, self.score)]


class SetMetric(Metric):
    """A metric of two sets of features, computed by one process."""

    needs = Needs.REAL_AND_FAKE
    network: ClassVar[Network | None] = "inception"

    @abstractmethod
    def compute(self, inputs: SetInputs) -> Measurement:
        """Compute the metric from the features of `network`.

        Args:
            inputs: The features, of at least `minimum_images` images in each set.
        """
