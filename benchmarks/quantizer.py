"""Time the quantizer, forward and backward, compared with vector-quantize-pytorch in the same run.

    python -m benchmarks.quantizer

The shapes are the paper's, 256 channels in 4 chunks at 16 x 16 positions. The peer (the package
`vector-quantize-pytorch`; skipped if it is not installed) is configured for exactly the same work: four heads on one
codebook that is learned by gradient, no moving averages, the plain straight-through gradient, and a commitment loss of
weight 1, which moves encoder and codebook as the two losses of movq together do. Codes, output, loss and all gradients
are compared before anything is timed, on inputs near codebook entries, so that no code depends on rounding.
"""

from __future__ import annotations

import gc
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.measure import Contender
from movq_cli import devices
from movq_cli.models.quantizers.vector import VectorQuantizer

PEER = "vector-quantize-pytorch"
PACKAGES = ("vector_quantize_pytorch", "einops", "einx", "loguru", "torch_einops_utils")
CHANNELS, CHUNKS, GRID = 256, 4, 16
SIZES = (1024, 16384)


class Outcome(NamedTuple):
    """The results of one forward and backward pass."""

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    input_gradient: Tensor
    codebook_gradient: Tensor


def report(device: torch.device, batch_sizes: list[int], sizes: list[int], repeats: int) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        device: Device of the quantizers.
        batch_sizes: Numbers of images, each of 16 x 16 positions.
        sizes: Numbers of codebook entries, K.
        repeats: Number of timed runs of each contender.
    """
    skipped = measure.missing(PACKAGES)
    with measure.full_float32():  # the precision of the distances
        rate = devices.matrix_rate(device, "float32")
    rows = []
    for size in sizes:
        for images in batch_sizes:
            rows += race(device, images, size, rate, repeats, with_peer=skipped is None)
            gc.collect()
    return {
        "peer": f"skipped: {skipped}" if skipped else PEER,
        "channels": CHANNELS,
        "chunks": CHUNKS,
        "grid": GRID,
        "rows": rows,
        "machine": machine(device),
    }


def race(
    device: torch.device, images: int, size: int, rate: float, repeats: int, *, with_peer: bool
) -> list[dict[str, Any]]:
    """Return the rows of one batch size and one codebook size."""
    torch.manual_seed(0)
    ours = VectorQuantizer(size, CHANNELS // CHUNKS).to(device)
    nn.init.normal_(ours.embedding.weight)
    z, weight = inputs(ours, images)
    passes = {"movq": lambda: our_pass(ours, z, weight)}
    if device.type == "cuda":
        compiled = VectorQuantizer(size, CHANNELS // CHUNKS).to(device)
        compiled.load_state_dict(ours.state_dict())
        compiled.compile()  # as in training
        passes["movq, compiled"] = lambda: our_pass(compiled, z, weight)
    if with_peer:
        peer = peer_model(ours)
        passes[PEER] = lambda: peer_pass(peer, z, weight)
        check_equal_work(passes["movq"](), passes[PEER]())
    contenders = [Contender(name, work) for name, work in passes.items()]
    measure.race(contenders, device, repeats)
    rival = contenders[-1] if with_peer else None
    floor = 2 * images * GRID**2 * CHUNKS * size * (CHANNELS // CHUNKS) / rate  # the matrix product of the distances
    return [
        {
            "name": f"{contender.name}, K = {size:,}, batch {images}",
            "precision": "float32",
            **measure.figures(contender, rival, rate),
            "floor_seconds": floor,
        }
        for contender in contenders
    ]


def inputs(quantizer: VectorQuantizer, images: int) -> tuple[Tensor, Tensor]:
    """Return vectors near codebook entries, [B, D, h, w], and weights of the same shape for the loss."""
    entries = quantizer.embedding.weight
    codes = torch.randint(len(entries), (images, GRID, GRID, CHUNKS), device=entries.device)
    with torch.no_grad():
        z = quantizer.decode(codes)
    z = z + 0.1 * torch.randn_like(z)
    return z.requires_grad_(), torch.randn_like(z)


def our_pass(quantizer: VectorQuantizer, z: Tensor, weight: Tensor) -> Outcome:
    """Run one forward and backward pass of movq's quantizer."""
    out = quantizer(z)
    loss = (out.vectors * weight).sum() + out.losses["codebook"] + out.losses["commitment"]
    gradients = torch.autograd.grad(loss, (z, quantizer.embedding.weight))
    return Outcome(out.vectors, out.codes, out.losses["commitment"], *gradients)


def peer_model(ours: VectorQuantizer) -> Any:  # noqa: ANN401 - the peer is untyped
    """Return the peer with the codebook of `ours`, in training mode."""
    size, width = ours.embedding.weight.shape
    model = importlib.import_module("vector_quantize_pytorch").VectorQuantize(
        dim=CHANNELS,
        codebook_size=size,
        codebook_dim=width,
        heads=CHUNKS,
        accept_image_fmap=True,
        ema_update=False,
        learnable_codebook=True,
        rotation_trick=False,
        commitment_weight=1.0,
    )
    with torch.no_grad():
        model._codebook.embed.copy_(ours.embedding.weight[None])
    return model.to(ours.embedding.weight.device).train()


def peer_pass(model: Any, z: Tensor, weight: Tensor) -> Outcome:  # noqa: ANN401
    """Run one forward and backward pass of the peer."""
    vectors, codes, loss = model(z)
    of_input, of_entries = torch.autograd.grad((vectors * weight).sum() + loss, (z, model._codebook.embed))
    return Outcome(vectors, codes, loss, of_input, of_entries[0])


def check_equal_work(ours: Outcome, peers: Outcome) -> None:
    """Assert that both quantizers give the same codes, and the same numbers up to rounding."""
    assert torch.equal(ours.codes, peers.codes), "the codes differ"
    for (part, value), expected in zip(ours._asdict().items(), peers, strict=True):
        close = torch.allclose(value, expected, atol=1e-6, rtol=1e-4)
        assert close, f"{part}: the two sides differ by up to {(value - expected).abs().max().item():.1e}"


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    parser = measure.parser("Time the quantizer, forward and backward.", repeats=11)
    parser.add_argument(
        "--batch-size", type=int, nargs="+", help="numbers of images [default: 16 and 48 on CUDA, otherwise 1 and 4]"
    )
    parser.add_argument("--codebook-size", type=int, nargs="+", default=list(SIZES), help="numbers of codebook entries")
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    batch_sizes = arguments.batch_size or ([16, 48] if device.type == "cuda" else [1, 4])
    figures = report(device, batch_sizes, arguments.codebook_size, arguments.repeats)
    measure.show("the quantizer, forward and backward", figures["rows"])
    print(f"peer: {figures['peer']}")
    measure.save(figures, arguments.out, "quantizer", device)


if __name__ == "__main__":
    main()
