"""Time the tokenizer at 256 x 256, compared with diffusers and taming-transformers in the same run.

    python -m benchmarks.autoencoder                     with the packages `diffusers` and `taming`, if installed
    python -m benchmarks.autoencoder --taming CLONE      with a clone of CompVis/taming-transformers

"Forward" is encoder, quantizer and decoder; "forward and backward" adds the gradients of a loss of the image and of the
two losses of the codes. Each peer has the architecture of one of our presets: the `VQModel` of diffusers with its
`spatial` norm that of `kandinsky-67m`, the model of taming that of `vqgan-ffhq`. The benchmark first copies the
parameters and checks that they give the same codes, image and gradient. On CUDA the tensors of movq are channels last,
as in training, and those of the peers as they are made. With --compile, `kandinsky-67m` and diffusers are also timed
channels last and compiled, in bf16.
"""

from __future__ import annotations

import gc
import importlib
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, training
from benchmarks.machine import machine
from benchmarks.measure import Contender
from movq_cli import Tokenizer, devices, presets

PRESETS = {"diffusers": "kandinsky-67m", "taming": "vqgan-ffhq"}
"""The preset with the architecture of each peer."""

PARAMETERS = {"kandinsky-67m": 67_832_495, "ffhq": 82_692_995, "vqgan-ffhq": 72_141_699}
LEGACY = 0.25
"""The weight of the codebook loss in the peers; their commitment loss has weight 1."""

NAMES = (
    (r"\.resnets\.(\d)\.", r".block.\1."),
    (r"\.attentions\.(\d)\.", r".attn.\1."),
    (r"mid_block\.block\.0\.", "mid.block_1."),
    (r"mid_block\.block\.1\.", "mid.block_2."),
    (r"mid_block\.attn\.0\.", "mid.attn_1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"down_blocks\.", "down."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.(group|spatial)_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
"""Patterns of parameter names of diffusers and their replacements in movq; `up_blocks` are counted in reverse order."""


def report(
    device: torch.device, batch_size: int, side: int, repeats: int, clone: Path | None, *, compiled: bool
) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        device: Device of the models.
        batch_size: Number of images per pass.
        side: Side of the images in pixels; the models are those for 256.
        repeats: Number of timed passes of each contender.
        clone: Source tree of taming; None uses the package, if it is installed.
        compiled: Whether compiled models are timed too; compilation takes minutes.
    """
    reasons = {"diffusers": measure.missing(("diffusers", "huggingface_hub")), "taming": training.why_no_peer(clone)}
    make: dict[str, Callable[[], Any]] = {"diffusers": diffusers_model, "taming": taming_model}
    torch.manual_seed(0)
    images = torch.rand(batch_size, 3, side, side, device=device) * 2 - 1
    rows: list[dict[str, Any]] = []
    differences: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bf16") if device.type == "cuda" else ("float32",):
        tokenizers = {name: ours(name, device) for name in PARAMETERS}
        peers = {name: make[name]().to(device) for name, reason in reasons.items() if reason is None}
        with measure.full_float32():
            differences = {name: check_equal_work(tokenizers[PRESETS[name]], peers[name], images) for name in peers}
        models: dict[str, nn.Module] = {**tokenizers, **peers}
        rate = devices.matrix_rate(device, precision)
        for backward in (False, True):
            rows += race(models, images, precision, rate, repeats, backward=backward)
        if precision == "bf16" and compiled:
            pair = {name: model for name, model in models.items() if name in ("diffusers", PRESETS["diffusers"])}
            for model in pair.values():
                model.to(memory_format=torch.channels_last).compile()
            pair_rows = race(pair, images, precision, rate, repeats, backward=True)
            rows += [{**row, "name": f"{row['name']}, compiled"} for row in pair_rows]
        del models, tokenizers, peers
        gc.collect()
    return {
        "peer": ", ".join(name if reason is None else f"{name} skipped: {reason}" for name, reason in reasons.items()),
        "batch_size": batch_size,
        "side": side,
        "differences": differences,
        "rows": rows,
        "machine": machine(device),
    }


def race(
    models: dict[str, nn.Module], images: Tensor, precision: str, rate: float, repeats: int, *, backward: bool
) -> list[dict[str, Any]]:
    """Time one kind of pass in one precision; return its rows."""
    contenders = [Contender(name, Pass(model, images, precision, backward)) for name, model in models.items()]
    measure.race(contenders, images.device, repeats)
    timed = {contender.name: contender for contender in contenders}
    rivals = {preset: timed.get(peer) for peer, preset in PRESETS.items()}
    kind = "forward and backward" if backward else "forward"
    return [
        {
            "name": f"{name}, {kind}",
            "precision": precision,
            "parameters": PARAMETERS[PRESETS.get(name, name)],
            **measure.figures(contender, contender if name in PRESETS else rivals.get(name), rate),
        }
        for name, contender in timed.items()
    ]


class Pass:
    """One pass of a model over images, of movq or of a peer.

    Args:
        model: Model that runs.
        images: Images [B, 3, H, W] in [-1, 1].
        precision: Precision, as in `devices.autocast`.
        backward: Whether the gradients are computed too.
    """

    def __init__(self, model: nn.Module, images: Tensor, precision: str, backward: bool) -> None:
        self.model = model
        self.images = images
        self.precision = precision
        self.backward = backward

    def __call__(self) -> tuple[Tensor | None, ...]:
        """Run the pass; return the gradients of the parameters in their order, None for an unused parameter."""
        with torch.set_grad_enabled(self.backward), devices.autocast(self.images.device, self.precision):
            out = self.model(self.images)
        if not self.backward:
            return ()
        if isinstance(self.model, Tokenizer):
            image, loss = out.images, LEGACY * out.losses["codebook"] + out.losses["commitment"]
        else:
            image, loss = out if isinstance(out, tuple) else (out.sample, out.commit_loss)
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(image.float().square().mean() + loss, learned, allow_unused=True)


def ours(preset: str, device: torch.device) -> Tokenizer:
    """Return the tokenizer of a preset, with codebook entries drawn from a standard normal distribution."""
    model = Tokenizer(presets.load(preset).vq).to(device)
    nn.init.normal_(model.quantize.get_parameter("embedding.weight"))
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]
    return model


def diffusers_model() -> Any:  # noqa: ANN401 - the peers are untyped
    """Return the diffusers model with the architecture of its preset."""
    settings = presets.load(PRESETS["diffusers"]).vq
    before = len(settings.widths) - 1  # levels without attention; the last level has attention
    return importlib.import_module("diffusers").VQModel(
        down_block_types=("DownEncoderBlock2D",) * before + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * before,
        block_out_channels=settings.widths,
        layers_per_block=settings.blocks,
        latent_channels=settings.z_channels,
        vq_embed_dim=settings.embed_dim,
        num_vq_embeddings=settings.codebook_size,
        norm_type="spatial",
    )


def taming_model() -> Any:  # noqa: ANN401
    """Return the taming model without its losses."""
    settings = {**training.PEER_MODEL, "lossconfig": {"target": "torch.nn.Identity", "params": {}}}
    with training.stand_ins(), redirect_stdout(sys.stderr):
        return importlib.import_module("taming.models.vqgan").VQModel(**settings)


def our_names(weights: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return weights of diffusers with the names and shapes of movq; those of taming are unchanged."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", name)  # noqa: PLW2901
        is_matrix = tensor.ndim == 2 and "embedding" not in name
        renamed[name] = tensor[:, :, None, None] if is_matrix else tensor
    return renamed


def check_equal_work(model: Tokenizer, peer: Any, images: Tensor) -> dict[str, float]:  # noqa: ANN401
    """Copy the weights of the peer to our model, and assert that both compute the same.

    Returns:
        The largest difference of the image and of the gradient of the first layer, each relative to its largest value,
        and the share of codes that differ.
    """
    with torch.no_grad():
        z = peer.quant_conv(peer.encoder(images))
        # With entries distributed like the quantized vectors, few codes depend on rounding.
        peer.quantize.embedding.weight.copy_(z.mean() + z.std() * torch.randn_like(peer.quantize.embedding.weight))
        model.load_state_dict(our_names(peer.state_dict(), len(model.settings.widths)))
        codes = model.encode(images)
        its_codes = peer.quantize(z)[2][2].view(codes.shape)
        # The images are decoded from the same codes, because one different code changes the complete image.
        quantized = model.quantize.decode(codes)
        image = model.decoder(model.post_quant_conv(quantized), quantized)
        condition = () if model.settings.modulation is None else (quantized,)
        its_image = peer.decoder(peer.post_quant_conv(quantized), *condition)
    found = {
        "image": ((image - its_image).abs().max() / its_image.abs().max()).item(),
        "gradient": gradient_difference(model, peer, images),
        "codes": (codes != its_codes).float().mean().item(),
    }
    assert found["image"] < 1e-3 and found["codes"] < 1e-2, f"the two sides differ: {found}"
    return found


def gradient_difference(model: nn.Module, peer: nn.Module, images: Tensor) -> float:
    """Return the largest difference of the gradients of the first layer, relative to the largest gradient."""
    ours_first, its_first = (Pass(side, images, "float32", True)()[0] for side in (model, peer))
    assert ours_first is not None and its_first is not None
    return ((ours_first - its_first).abs().max() / its_first.abs().max()).item()


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    parser = measure.parser("Time the passes of the tokenizer.", repeats=3)
    parser.add_argument("--batch-size", type=int, help="images per pass [default: 16 on CUDA, otherwise 1]")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers")
    parser.add_argument("--side", type=int, default=256, help="side of the images, pixels")
    parser.add_argument(
        "--compile", action="store_true", help="on CUDA, also time kandinsky-67m and diffusers compiled"
    )
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    batch_size = arguments.batch_size or (16 if device.type == "cuda" else 1)
    figures = report(
        device, batch_size, arguments.side, arguments.repeats, arguments.taming, compiled=arguments.compile
    )
    measure.show(f"the tokenizer, {batch_size} x {arguments.side} x {arguments.side}", figures["rows"])
    print(f"peers: {figures['peer']}; largest relative differences to them: {figures['differences']}")
    measure.save(figures, arguments.out, "autoencoder", device)


if __name__ == "__main__":
    main()
