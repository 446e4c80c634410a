"""`movq reconstruct`: images through the tokenizer and back."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from movq_cli import checkpoints, devices, runs
from movq_cli.console import Console, Progress
from movq_cli.data import pixels
from movq_cli.data.coding import decode_batch, encode_batch
from movq_cli.data.images import BadImageError, encode_png
from movq_cli.data.shards import SplitName
from movq_cli.errors import BadRequestError
from movq_cli.evaluation import extractors, paired
from movq_cli.evaluation.metrics import load_scorers
from movq_cli.files import atomic_write
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.settings import TokenizerSettings
from movq_cli.sources import stream
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source

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
    codes: Path | None,
    weights: Path | None,
    device: str | None,
    console: Console,
) -> None:
    """Write every image's reconstruction as a PNG of the same size and name, or decode a folder of code maps.

    Args:
        source: Folder, archive, image, prepared set, a set's name, or a folder of code maps as `codes` writes them.
        out: Folder of the PNGs.
        run: Tokenizer's run folder or weight file; None = the newest finished run.
        split: Of a source with splits; None = everything.
        batch_size: Images at once.
        grid: Picture of some originals, evenly spaced, over their reconstructions.
        metrics: Also give mean PSNR and SSIM, and LPIPS where its weights are.
        codes: Folder for each image's code map, `.npy`, uint16 [h, w, c].
        weights: Folder with LPIPS's weights; None = torch hub's.
        device: Name; None = CUDA where there is one.
        console: Where to speak.
    """
    maps = sorted(Path(source).rglob("*.npy")) if Path(source).is_dir() else []
    images = None if maps else open_source(source, split)
    tokenizer = runs.find_weights(run, "vq")
    console.log(f"tokenizer: {tokenizer}")
    where = devices.select(device)
    model = checkpoints.load_tokenizer(tokenizer).to(where)
    if images is None:
        decode_maps(model, Path(source), maps, out, console)
        return
    names = output_names(images.names)
    judges = _judges(weights, where, console) if metrics else []
    scores: dict[str, list[float]] = {judge.key: [] for judge in judges}
    shown: dict[int, Tensor] = dict.fromkeys(pixels.evenly_spaced(len(images), _GRID_COLUMNS), torch.empty(0))
    bad: list[str] = []
    with console.progress(len(images), "reconstructing", "images") as progress:
        for places, originals in stream.same_size_batches(_readable(images, bad, progress), batch_size):
            there = originals.to(where)
            found = encode_batch(model, there)
            made = decode_batch(model, found, originals.shape[-2:])
            for key, values in paired.score_pairs(judges, [(places, torch.stack([there, made], 1))], where).items():
                scores[key] += values
            reconstructed = made.cpu()
            for place, image, code_map in zip(places.tolist(), reconstructed, found.cpu(), strict=True):
                atomic_write(out / names[place], encode_png(pixels.to_image(image)))
                if codes is not None:
                    atomic_write((codes / names[place]).with_suffix(".npy"), _npy(code_map))
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
    if codes is not None:
        result["codes"] = str(codes)
    if grid is not None:
        _save_pairs(grid, [pair for pair in shown.values() if len(pair)])
        result["grid"] = str(grid)
    for judge in judges:
        result[judge.key] = paired.finite_mean(torch.tensor(scores[judge.key], dtype=torch.float64))
        console.log(f"{judge.key}: {result[judge.key]} ({judge.variant}; {len(scores[judge.key])} images)")
    console.result(result, str(out))


def _judges(weights: Path | None, device: torch.device, console: Console) -> list[paired.PairScorer]:
    """PSNR, SSIM, and LPIPS where its weights are on this machine: nothing is downloaded for a figure on the side."""
    keys = {"psnr", "ssim"}
    if extractors.available_trunks(weights):
        keys.add("lpips")
    else:
        console.log("lpips: left out, its weights are not here (movq evaluate --lpips fetches them)")
    return load_scorers(keys, weights, device)


def decode_maps(model: Tokenizer, folder: Path, maps: Sequence[Path], out: Path, console: Console) -> None:
    """Write the image of every code map below a folder, under its name; one map at a time, for they differ in size.

    Raises:
        BadRequestError: A file is no code map of this tokenizer.
    """
    device = model.device
    with console.progress(len(maps), "decoding", "code maps") as progress:
        for path in maps:
            codes = torch.from_numpy(read_map(path, model.settings).astype(np.int64))[None].to(device)
            factor = model.settings.factor
            size = (codes.shape[1] * factor, codes.shape[2] * factor)
            (image,) = decode_batch(model, codes, size)
            name = path.relative_to(folder).with_suffix(".png")
            atomic_write(out / name, encode_png(pixels.to_image(image)))
            progress.advance()
    console.result({"path": str(out), "images": len(maps)}, str(out))


def read_map(path: Path, settings: TokenizerSettings) -> NDArray[np.integer[Any]]:
    """A code map [h, w, c] from an `.npy` file.

    Raises:
        BadRequestError: It is no array of this tokenizer's codes.
    """
    try:
        codes = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadRequestError(f"{path} is not an .npy file: {error}") from None
    integers = np.issubdtype(codes.dtype, np.integer)
    if not integers or codes.ndim != 3 or codes.shape[2] != settings.chunks or not codes.size:
        wanted = f"integers [h, w, {settings.chunks}]"
        raise BadRequestError(f"{path} holds {codes.dtype} {list(codes.shape)}, not a code map: {wanted}")
    if codes.min() < 0 or codes.max() >= settings.codebook_size:
        raise BadRequestError(f"{path} holds codes beyond the codebook of {settings.codebook_size}")
    return codes


def _npy(codes: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes.numpy().astype(np.uint16))
    return buffer.getvalue()


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
    times = Counter(plain)
    return [f"{name}.png" if times[short] > 1 else short for name, short in zip(names, plain, strict=True)]


def _save_pairs(path: Path, pairs: list[Tensor]) -> None:
    """Originals over reconstructions, of the pairs that share the first one's size."""
    same = [pair for pair in pairs if pair.shape == pairs[0].shape]
    both = torch.cat([torch.stack([pair[row] for pair in same]) for row in (0, 1)])
    pixels.save_grid(path, both, len(same), pixels.grid_scale(both.shape[-1]))
