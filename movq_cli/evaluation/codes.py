"""`movq evaluate --codes`: whether the codes of a tokenizer are easy to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli.console import Console
from movq_cli.data import pixels
from movq_cli.data.coding import naming_images
from movq_cli.data.spacing import evenly_spaced
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import code_statistics, perturbed, pretrained, similar_priors
from movq_cli.evaluation.code_statistics import MutualInformation
from movq_cli.evaluation.fid_evaluator import FIDEvaluator
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.metric import MetricValues
from movq_cli.evaluation.perturbed import SHARES
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.evaluation.request import EvaluationRequest
from movq_cli.files import sha256
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.ranks import SINGLE_PROCESS
from movq_cli.sources import stream

_UNRELIABLE = 0.25
"""Share of the largest possible mutual information that chance may give before a warning says that the images are too
few."""

_MAX_PAIRS = 4_000_000
"""Number of pairs from which a mutual information is estimated, about, at most: a second of sorting for each chunk."""

_TEXTS = {
    "position": "of a code and its position",
    "horizontal": "of neighboring codes, side by side",
    "vertical": "of neighboring codes, one above the other",
    "chunks": "of two chunks of a position",
}


@dataclass(frozen=True)
class CodeStatistics:
    """The statistics of the codes of a set of images; entropies and information in nats."""

    codebook_size: int
    codes: NDArray[np.uint16]
    """[N, h, w, c]."""

    @cached_property
    def entropy_of_chunks(self) -> list[float]:
        """The entropy of the codes of each chunk."""
        return [code_statistics.entropy(self.codes[..., chunk]) for chunk in range(self.codes.shape[-1])]

    @cached_property
    def entropy_of_positions(self) -> NDArray[np.float64]:
        """The entropy over the images at each position and chunk, [h, w, c]."""
        return code_statistics.entropy_of_positions(self.codes)

    @cached_property
    def information(self) -> dict[str, Mapping[str, MutualInformation]]:
        """The mutual information of each kind, by chunk ("0") or pair of chunks ("0-1"); without what has no pair."""
        images, height, width, chunks = self.codes.shape
        codes = self.codes[evenly_spaced(images, max(1, _MAX_PAIRS // (height * width)))]
        found = {"position": code_statistics.of_positions(codes)} if height * width > 1 else {}
        if width > 1:
            found["horizontal"] = code_statistics.of_neighbors(codes, 2)
        if height > 1:
            found["vertical"] = code_statistics.of_neighbors(codes, 1)
        named: dict[str, Mapping[str, MutualInformation]] = {
            kind: {str(chunk): value for chunk, value in enumerate(values)} for kind, values in found.items()
        }
        if chunks > 1:
            pairs = code_statistics.of_chunks(codes)
            named["chunks"] = {f"{first}-{second}": value for (first, second), value in pairs.items()}
        return named

    def values(self) -> tuple[MetricValues, dict[str, str]]:
        """Return the metrics and the variant of each."""
        chunks, largest = self.codes.shape[-1], np.log(self.codebook_size)
        values: MetricValues = {
            "code_entropy": float(np.mean(self.entropy_of_chunks)),
            "code_entropy_of_positions": float(self.entropy_of_positions.mean()),
        }
        mean = f"nats, mean of {chunks} chunks, at most {largest:.2f}"
        variants = {"code_entropy": mean, "code_entropy_of_positions": f"{mean}, over the images at each position"}
        for kind, parts in self.information.items():
            key = f"code_information_{kind}"
            limit = np.mean([part.limit for part in parts.values()])
            chance = np.mean([part.by_chance for part in parts.values()])
            values[key] = float(np.mean([part.adjusted for part in parts.values()]))
            variants[key] = (
                f"mutual information {_TEXTS[kind]}, nats, at most {limit:.2f}; random pairs have {chance:.2g}"
            )
        return values, variants

    def protocol(self) -> dict[str, Any]:
        """Return the values of each chunk and position."""
        grid = self.entropy_of_positions.mean(-1)
        return {
            "codebook_size": self.codebook_size,
            "grid": list(self.codes.shape[1:]),
            "entropy_of_chunks": self.entropy_of_chunks,
            "entropy_of_positions": [[round(value, 4) for value in row] for row in grid.tolist()],
            "information": {
                kind: {
                    name: {
                        "adjusted": part.adjusted,
                        "plain": part.plain,
                        "by_chance": part.by_chance,
                        "limit": part.limit,
                    }
                    for name, part in parts.items()
                }
                for kind, parts in self.information.items()
            },
        }

    def warnings(self) -> Iterator[str]:
        """Yield a line if the images are too few."""
        unreliable = [
            kind
            for kind, parts in self.information.items()
            if any(part.by_chance > _UNRELIABLE * part.limit > 0 for part in parts.values())
        ]
        if unreliable:
            yield (
                f"{len(self.codes)} images are few for a codebook of {self.codebook_size} entries: random pairs of "
                f"codes already share more than {_UNRELIABLE:.0%} of their entropy ({', '.join(unreliable)}), so that "
                "the adjusted values are uncertain"
            )


def measure_codes(
    model: Tokenizer, path: Path, images: ImageSet, batch_size: int, console: Console
) -> tuple[CodeStatistics, dict[str, Any]]:
    """Encode a set of images and compute the statistics of the codes.

    Args:
        model: Tokenizer on its device, in eval mode.
        path: Weight file of the tokenizer.
        images: The images, cropped to one size.
        batch_size: Number of images in a batch.
        console: Console for progress and warnings.

    Returns:
        The statistics, and the entry of the protocol.

    Raises:
        BadRequestError: No image can be read.
    """
    codes: list[NDArray[np.uint16]] = []
    with console.progress(len(images), "encoding", "images") as progress:
        for names, batch in _batches(images, batch_size):
            with naming_images(names, batch.shape[-2:]):
                encoded = model.encode(pixels.to_signed(batch.to(model.device)))
            codes.append(encoded.cpu().numpy().astype(np.uint16))
            progress.advance(len(batch))
    if not codes:
        raise BadRequestError(f"no image of {images.location} can be read", "Name a set of images.")
    console.log("counting pairs of codes")
    statistics = CodeStatistics(model.settings.codebook_size, np.concatenate(codes))
    for line in statistics.warnings():
        console.warn(line)
    described = {
        "tokenizer": {"path": str(path), "sha256": sha256(path)},
        "images": len(statistics.codes),
        **statistics.protocol(),
    }
    return statistics, described


def perturbed_fid(
    model: Tokenizer, codes: NDArray[np.uint16], images: ImageSet, request: EvaluationRequest, console: Console
) -> dict[float, float]:
    """Return the FID of reconstructions from perturbed codes by the share of replaced ones; empty without Inception.

    Args:
        model: Tokenizer on its device, in eval mode.
        codes: Codes of the images, [N, h, w, c].
        images: The images.
        request: The batch size, the folders of weights and of the feature cache, and whether weights are downloaded.
        console: Console for progress, and for the line that says why the FID is left out.

    Raises:
        BadRequestError: The weights cannot be downloaded or used.
    """
    if not request.require_weights and not pretrained.is_available("inception", request.weights):
        console.log(
            f"no perturbed FID: the weights {WEIGHTS['inception'].file} are missing; add --all to download them"
        )
        return {}
    if len(codes) < 2:
        console.log("no perturbed FID: it needs at least two images")
        return {}
    evaluator = FIDEvaluator.of(images, request.cache, request.weights, model.device, SINGLE_PROCESS, console)
    batches = [
        torch.from_numpy(codes[start : start + request.batch_size].astype(np.int64)).to(model.device)
        for start in range(0, len(codes), request.batch_size)
    ]
    shares = (0.0, *SHARES)
    with console.progress(len(shares) * len(codes), "decoding perturbed codes", "images") as progress:

        def counted() -> Iterator[Tensor]:
            for batch in batches:
                yield batch
                progress.advance(len(batch))

        return {share: perturbed.fid_of_codes(model, counted(), evaluator, share) for share in shares}


def prior_values(root: Path, model: Tokenizer, tokenizer: str) -> tuple[MetricValues, str, list[dict[str, Any]]]:
    """Return the gain of the best earlier prior, its variant, and the entries of all priors for the protocol.

    Args:
        root: Folder of run folders.
        model: The tokenizer.
        tokenizer: SHA-256 of its weight file.
    """
    results = similar_priors.find(root, model.settings, tokenizer)
    if not results:
        return {}, "", []
    best = results[0]
    of_which = "this tokenizer" if best.same_tokenizer else "another tokenizer with such codes"
    variant = (
        f"nats that {best.run} ({best.mode}, step {best.step}) is below the unigram entropy {best.unigram_entropy:.3g} "
        f"of {of_which}"
    )
    return {"prior_gain": best.gain}, variant, [result.describe() for result in results]


def _batches(images: ImageSet, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the names of the readable images of a batch, and their pixels, uint8 [B, 3, H, W]."""
    readable = ((index, image) for index, image in images.read(range(len(images))) if image is not None)
    for indices, batch in stream.same_size_batches(readable, batch_size):
        yield [images.names[index] for index in indices.tolist()], batch
