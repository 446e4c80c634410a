"""Time the sampling of each prior, compared with plain loops and with the limit of the device in the same run.

    python -m benchmarks.sampling                 the size of the paper on CUDA, of the demo on the CPU
    python -m benchmarks.sampling --preset ffhq   the size of the paper on any device

The weights are random, because speed does not depend on them. The plain loops are straightforward implementations:
MaskGIT's decoding with a complete pass at every step and torch.multinomial, in the precision of movq and once in
float32, and autoregressive decoding without a KV cache, with a complete pass for every code. The latter is timed at
some positions of the sequence and scaled to all of them. The floor is the arithmetic over the rate of one large matrix
product. For the autoregressive priors it is the number of bytes over the rate of one large copy, if that is larger:
every step reads all weights, and all keys and values so far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.measure import Contender
from movq_cli import devices, presets
from movq_cli.models import priors
from movq_cli.models.autoregressive_prior import AutoregressivePrior, DepthPrior
from movq_cli.models.cuda_graphs import GraphRecorder
from movq_cli.models.masked_prior import MaskedPrior, mask_ratio
from movq_cli.settings import Preset, SampleSettings

STEPS = (4, 8, 12, 16)
UNCACHED_PLACES = 8
"""Number of positions at which a pass without a KV cache is timed."""


def report(preset: Preset, name: str, device: torch.device, batch_size: int, repeats: int) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        preset: Sizes of the prior and of its codes.
        name: Name of the preset, for the record.
        device: Device of the priors.
        batch_size: Number of images drawn at once.
        repeats: Number of timed runs of each contender.
    """
    rate, bandwidth = devices.matrix_rate(device, "auto"), copy_rate(device)
    rows = []
    with torch.inference_mode(), devices.autocast(device, "auto"):
        for mode in ("mask", "auto", "depth"):
            model = build(preset, mode, device)
            classes = torch.arange(batch_size, device=device) % preset.prior.classes if preset.prior.classes else None
            if isinstance(model, MaskedPrior):
                rows += masked_rows(model, batch_size, classes, rate, device, repeats)
            elif isinstance(model, AutoregressivePrior | DepthPrior):
                rows += causal_rows(model, mode, batch_size, classes, rate, bandwidth, device, repeats)
            del model
    for row in rows:
        row["images_per_second"] = batch_size / row["seconds"]
    return {
        "preset": name,
        "peer": "plain loops",
        "batch_size": batch_size,
        "codes": preset.vq.code_shape.codes,
        "matrix_flops_per_second": rate,
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
        "machine": machine(device),
    }


def build(preset: Preset, mode: str, device: torch.device) -> priors.CodePrior:
    """Return a prior with random weights."""
    torch.manual_seed(0)
    settings = preset.prior.model_copy(update={"mode": mode})
    model = priors.build(settings, preset.vq.code_shape).to(device).eval()
    devices.cast_linear_layers(model, device, "auto")  # as in `movq sample`
    return model


def masked_rows(
    model: MaskedPrior, images: int, classes: Tensor | None, rate: float, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time movq and the plain loop at each number of steps; on CUDA compiled, and at 8 steps also uncompiled."""
    plain_model, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    if device.type == "cuda":
        model.compile_blocks()  # as in `movq sample` for many images
        compiling = devices.seconds(partial(model.decode, range(images), classes, SampleSettings(steps=2)), device)
        print(f"the first two steps, including compilation: {compiling:.1f} s")
    rows = []
    for steps in STEPS:
        settings = SampleSettings(steps=steps)
        contenders = [
            Contender(f"mask, {steps} steps", partial(model.decode, range(images), classes, settings)),
            Contender(f"plain loop, {steps} steps", partial(plain_masked, plain_model, images, classes, settings)),
        ]
        if steps == 8:
            work = partial(plain_float32, exact, images, classes, settings)
            contenders.append(Contender("plain loop, 8 steps, float32", work))
            if device.type == "cuda":
                work = partial(plain_model.decode, range(images), classes, settings)
                contenders.append(Contender("mask, 8 steps, not compiled", work))
        measure.race(contenders, device, repeats)
        plain = contenders[1]
        rows += [
            {
                "name": contender.name,
                **measure.figures(contender, plain, rate),
            }  # movq runs the first step once per class
            | ({"peer_over_this": None, "floor_seconds": None} if contender.name.endswith("float32") else {})
            for contender in contenders
        ]
    return rows


def causal_rows(
    model: AutoregressivePrior | DepthPrior,
    mode: str,
    images: int,
    classes: Tensor | None,
    rate: float,
    bandwidth: float,
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time movq with the KV cache and, for the autoregressive prior of the paper, a loop without one."""

    def once() -> None:
        model.decode(range(images), classes, SampleSettings())
        model.recorder = GraphRecorder()

    ours = Contender(mode, lambda: model.decode(range(images), classes, SampleSettings()))
    measure.race([ours], device, repeats)
    model.recorder = GraphRecorder()  # drops the KV cache, which the next decoding would reuse
    ours.memory = measure.peak_memory(once, device)
    flops = pass_flops(model, images, device, classes)
    row = {
        "name": mode,
        **measure.figures(ours, None, rate),
        "flops": flops,  # the operations of a recorded CUDA graph cannot be counted
        "floor_seconds": max(flops / rate, bytes_read(model, images) / bandwidth),
    }
    if not isinstance(model, AutoregressivePrior):
        return [row]
    plain = uncached(model, images, classes, device)
    return [
        {**row, "peer_over_this": plain / ours.median},
        {"name": f"{mode}, no cache", "seconds": plain, "peer_over_this": 1.0},
    ]


def plain_masked(model: MaskedPrior, images: int, classes: Tensor | None, settings: SampleSettings) -> Tensor:
    """Run MaskGIT's loop plainly: a complete pass per step, multinomial draws, and a sort of the confidences."""
    shape, device = model.shape, model.position.device
    codes = torch.full((images, *shape.size), model.unknown, device=device)
    for step in range(settings.steps):
        share = model(codes, classes).float().softmax(-1).flatten(1, 3)
        drawn = torch.multinomial(share.flatten(0, 1), 1).view(images, -1)
        confidence = share.gather(-1, drawn[..., None])[..., 0].log()
        noise = -torch.log(-torch.log(torch.rand_like(confidence).clamp(1e-9, 1 - 1e-7)))
        confidence = confidence + settings.choice_temperature * (1 - (step + 1) / settings.steps) * noise
        hidden = (codes == model.unknown).flatten(1)
        confidence = confidence.masked_fill(~hidden, math.inf)
        decided = torch.where(hidden, drawn, codes.flatten(1))
        count = int(shape.codes * mask_ratio(torch.tensor((step + 1) / settings.steps)).item())
        if step < settings.steps - 1:
            decided.scatter_(1, confidence.argsort(1)[:, :count], model.unknown)
        codes = decided.view(codes.shape)
    return codes


def plain_float32(model: MaskedPrior, images: int, classes: Tensor | None, settings: SampleSettings) -> Tensor:
    """Run the plain loop in float32, the default precision of PyTorch."""
    with devices.autocast(model.position.device, "float32"):
        return plain_masked(model, images, classes, settings)


def uncached(model: AutoregressivePrior, images: int, classes: Tensor | None, device: torch.device) -> float:
    """Estimate the seconds of decoding with a complete pass over all codes so far for every code, from some passes."""
    shape = model.shape
    codes = torch.zeros(images, *shape.size, dtype=torch.int64, device=device)
    total = 0.0
    for place in range(UNCACHED_PLACES):
        rows = max(1, round((place + 0.5) / UNCACHED_PLACES * shape.height))
        short = codes[:, :rows]
        total += best(partial(prefix_pass, model, short, classes), device, 2)
    return total / UNCACHED_PLACES * shape.codes


def prefix_pass(model: AutoregressivePrior, codes: Tensor, classes: Tensor | None) -> Tensor:
    """Run a complete pass over the first rows of a grid [B, rows, w, c]; return the logits of the last code."""
    tokens = codes[0].numel()
    x = model.tokens(torch.nn.functional.pad(codes.flatten(1), (model.shape.chunks, 0))[:, model.newest[:tokens]])
    if classes is not None:
        x = torch.cat([model.class_tokens(classes), x], dim=1)
    for block in model.blocks:
        x = block(x, causal=True)
    return model.code_logits(x[:, -1:], model.shape.chunks - 1)


def pass_flops(model: priors.CodePrior, images: int, device: torch.device, classes: Tensor | None) -> int:
    """Return the operations of a complete pass over a batch; decoding with a KV cache needs as many in total."""
    codes = torch.zeros(1, *model.shape.size, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        model(codes, None if classes is None else classes[:1])
    return images * int(counter.get_total_flops())


def bytes_read(model: priors.CodePrior, images: int) -> float:
    """Return the least bytes that decoding with a KV cache reads: all weights, keys and values at each step."""
    wide = 2 if torch.is_autocast_enabled(model.position.device.type) else 4
    body = model.blocks if isinstance(model, AutoregressivePrior) else model.blocks[:-2]
    steps = model.length
    weights = wide * sum(parameter.numel() for parameter in body.parameters())
    cache = wide * images * len(body) * 2 * model.settings.width * steps / 2
    return steps * (weights + cache)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of one large copy."""
    block = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(block)
    return 2 * block.nbytes / best(lambda: target.copy_(block), device, 5)


def best(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest of several runs, after a warm-up run."""
    work()
    return min(devices.seconds(work, device) for _ in range(repeats))


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    parser = measure.parser("Measure images per second of each prior.", repeats=3)
    parser.add_argument("--preset", help="preset whose sizes are used [default: ffhq on CUDA, otherwise digits]")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images drawn at once [default: 64, as in `movq sample`]"
    )
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    name = arguments.preset or ("ffhq" if device.type == "cuda" else "digits")
    figures = report(presets.load(name), name, device, arguments.batch_size, arguments.repeats)
    measure.show(f"drawing {arguments.batch_size} images of {figures['codes']} codes at once ({name})", figures["rows"])
    print("floor of auto and depth: the time to read weights, keys and values, if that is longer")
    measure.save(figures, arguments.out, "sampling", device)


if __name__ == "__main__":
    main()
