"""Encode the images of a folder to one array of codes, and decode that array back to images.

    python examples/codes_of_a_folder.py runs/digits-vq photos/ codes.npy decoded/

The array is uint16 [N, h, w, c]: one grid of h x w positions for each image, in the order of the file names, with c
codes at each position. It is some hundred times smaller than the pixels, and any model of sequences can be trained on
it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from movq_cli import Tokenizer

BATCH = 16


def load(path: Path, height: int, width: int) -> torch.Tensor:
    """Return the central part of an image, as the tokenizer expects it: float [3, height, width] in [-1, 1]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def save(image: torch.Tensor, path: Path) -> None:
    """Write an image, float [3, H, W] in [-1, 1], as a PNG file."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


@torch.inference_mode()
def main(run: str, folder: str, array: str, out: str) -> None:
    """Encode every PNG and JPEG file below `folder`, then decode what was written to `array`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.load(run).to(device)  # in eval mode; `run` may also be a .safetensors file
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg"})

    codes = []
    for start in range(0, len(paths), BATCH):
        images = torch.stack([load(path, *tokenizer.settings.image_size) for path in paths[start : start + BATCH]])
        codes.append(tokenizer.encode(images.to(device)).cpu().numpy().astype(np.uint16))  # int64 [B, h, w, c]
    np.save(array, np.concatenate(codes))

    # The way back needs the array and the tokenizer alone.
    stored = torch.from_numpy(np.load(array).astype(np.int64))
    Path(out).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(stored), BATCH):
        for number, image in enumerate(tokenizer.decode(stored[start : start + BATCH].to(device)), start):
            save(image, Path(out) / f"{number:06d}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
