"""`movq reconstruct`: images through the tokenizer and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor

from movq_cli import checkpoints, devices, runs
from movq_cli.console import Console, Progress
from movq_cli.data import pixels, stream
from movq_cli.data.images import BadImageError, encode_png
from movq_cli.data.shards import SplitName
from movq_cli.data.sources import Source, open_source
from movq_cli.errors import BadRequestError
from movq_cli.files import atomic_write
from movq_cli.metrics import paired
from movq_cli.models.tokenizer import Tokenizer

_GRID_COLUMNS = 16
_BAD_NAMED = 5


def reconstruct(
    source: str,
    out: Path,
    *,
    run: Path | None,
    split: SplitName | None,
    batch_size: int,
    grid: Path | None,
    metrics: bool,
    device: str | None,
    console: Console,
) -> None:
    """Write every image's reconstruction as a PNG of the same size and name.

    Args:
        source: Folder, archive, image, prepared set, or a set's name.
        out: Folder of the PNGs.
        run: Tokenizer's run folder or weight file; None = the newest finished run.
        split: Of a source with splits; None = everything.
        batch_size: Images at once.
        grid: Picture of some originals, evenly spaced, over their reconstructions.
        metrics: Also give mean PSNR and SSIM.
        device: Name; None = CUDA where there is one.
        console: Where to speak.
    """
    images = open_source(source, split)
    weights = run if run is not None and run.is_file() else runs.resolve(run, "vq").weights
    console.log(f"tokenizer: {weights}")
    where = devices.pick(device)
    model = checkpoints.load_tokenizer(weights).to(where)
    names = output_names(images.names)
    figures: list[Tensor] = []
    shown: dict[int, Tensor] = dict.fromkeys(pixels.spread(len(images), _GRID_COLUMNS), torch.empty(0))
    bad: list[str] = []
    with console.progress(len(images), "reconstructing", "images") as progress:
        for places, originals in stream.same_size_batches(_readable(images, bad, progress), batch_size):
            reconstructed = reconstruct_batch(model, originals.to(where)).cpu()
            for place, image in zip(places.tolist(), reconstructed, strict=True):
                atomic_write(out / names[place], encode_png(pixels.to_image(image)))
            if metrics and min(originals.shape[-2:]) >= paired.SSIM_WINDOW:
                figures.append(
                    torch.stack([paired.psnr(reconstructed, originals), paired.ssim(reconstructed, originals)])
                )
            for place, *pair in zip(places.tolist(), originals, reconstructed, strict=True):
                if place in shown:
                    shown[place] = torch.stack(pair)
    if bad:
        more = " ..." if len(bad) > _BAD_NAMED else ""
        console.warn(f"{len(bad)} images were skipped: {'; '.join(bad[:_BAD_NAMED])}{more}")
    done = len(images) - len(bad)
    if not done:
        raise BadRequestError(f"no usable image in {source}: {bad[0]}")
    result: dict[str, object] = {"path": str(out), "images": done, "skipped": len(bad)}
    if grid is not None:
        _save_pairs(grid, [pair for pair in shown.values() if len(pair)])
        result["grid"] = str(grid)
    if figures:
        psnr, ssim = (paired.finite_mean(scores) for scores in torch.cat(figures, dim=1))
        result |= {"psnr": psnr, "ssim": ssim}
        console.log(f"PSNR {psnr} dB ({paired.PSNR_VARIANT}), SSIM {ssim} ({paired.SSIM_VARIANT})")
    console.result(result, str(out))


@torch.inference_mode()
def reconstruct_batch(model: Tokenizer, originals: Tensor) -> Tensor:
    """Encode and decode images of any size: what the factor does not divide is padded, then cut off again.

    Args:
        model: The tokenizer.
        originals: [B, 3, H, W] uint8, on the model's device.

    Returns:
        The same shape, uint8.
    """
    height, width = originals.shape[-2:]
    factor = model.settings.factor
    # Repeating the border costs fewer codes on nothing than black would.
    padded = F.pad(pixels.to_signed(originals), (0, -width % factor, 0, -height % factor), mode="replicate")
    return pixels.to_bytes(model.decode(model.encode(padded)))[..., :height, :width]


def _readable(images: Source, bad: list[str], progress: Progress) -> Iterator[tuple[int, Tensor]]:
    """The images that can be decoded; the others go to `bad`, each with its reason."""
    for index, image in stream.decoded(images, range(len(images))):
        progress.advance()
        if isinstance(image, BadImageError):
            bad.append(f"{images.names[index]} ({image})")
        else:
            yield index, image


def output_names(names: tuple[str, ...]) -> list[str]:
    """A PNG's name for each image: its own with another suffix, or with one more where two would meet."""
    plain = [str(PurePosixPath(name).with_suffix(".png")) for name in names]
    twice = {name for name in plain if plain.count(name) > 1} if len(set(plain)) < len(plain) else set()
    return [f"{name}.png" if short in twice else short for name, short in zip(names, plain, strict=True)]


def _save_pairs(path: Path, pairs: list[Tensor]) -> None:
    """Originals over reconstructions, of the pairs that share the first one's size."""
    same = [pair for pair in pairs if pair.shape == pairs[0].shape]
    both = torch.cat([torch.stack([pair[row] for pair in same]) for row in (0, 1)])
    pixels.save_grid(path, both, len(same), pixels.grid_scale(both.shape[-1]))
