"""Time one training step of stage 1 at the paper's size, compared with taming-transformers in the same run.

    python -m benchmarks.training                     with the package `taming` as the peer, if it is installed
    python -m benchmarks.training --taming CLONE      with a clone of CompVis/taming-transformers

A step is everything that a batch of 256 x 256 images costs while the adversarial loss is on: tokenizer, LPIPS,
discriminator, adaptive weight, backward passes, and both optimizers. The classes of the peer run unchanged, and are
called as its training loop (PyTorch Lightning 1.0.8) calls them: each batch goes through `training_step` once for each
optimizer, with the parameters of the other one frozen. The package index has them as `taming-transformers-rom1504`
(`--no-deps`); they also need the packages `einops` and `requests`. Nothing is downloaded: both sides use the same
LPIPS, whose trunk has random weights of a fixed seed. The steps alternate, and the results are medians. On CUDA, movq
runs as it trains, compiled and in bf16, and also not compiled; the peer runs under bf16 autocast and in float32, which
is its own default. The floor is the arithmetic of the step at the rate of one large matrix product, measured in the
same run.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lpips
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.machine import machine
from benchmarks.measure import Contender
from movq_cli import console, devices, presets
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.data import pixels
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.training.vq import TokenizerTraining

SIDE = 256
PEER = "taming"
OURS = ("ffhq", "vqgan-ffhq")
PARAMETERS = {"ffhq": 82_692_995, "vqgan-ffhq": 72_141_699, PEER: 72_141_699}
"""Parameters of the models, without LPIPS and the discriminator. `vqgan-ffhq` has the architecture of the peer."""

PEER_MODEL = {
    "ddconfig": {
        "double_z": False,
        "z_channels": 256,
        "resolution": SIDE,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "dropout": 0.0,
    },
    "lossconfig": {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": 0, "disc_weight": 0.8, "codebook_weight": 1.0},
    },
    "n_embed": 1024,
    "embed_dim": 256,
}
"""Settings of the peer's published model for faces, with the discriminator on from the first step."""


def report(
    device: torch.device, batch_size: int, repeats: int, clone: Path | None, compiled: Sequence[str]
) -> dict[str, Any]:
    """Run the benchmark and return its results.

    Args:
        device: Device of the steps.
        batch_size: Number of images per step.
        repeats: Number of timed steps of each contender.
        clone: Source tree of the peer; None uses the package `taming`, if it is installed.
        compiled: Presets whose step is also timed compiled, on CUDA.
    """
    skipped = why_no_peer(clone)
    precision, *others = ("bf16", "float32") if device.type == "cuda" else ("float32",)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        draw_lpips(work)
        batch = draw_images(work, batch_size).to(device)
        ours = {name: our_training(name, precision, batch, work) for name in OURS}
        steps: dict[str, Callable[[], object]] = {
            name: partial(training.step, batch, 0) for name, training in ours.items()
        }
        if device.type == "cuda":
            eager = {f"{name}, not compiled": partial(not_compiled, step) for name, step in steps.items()}
            steps = eager | {name: steps[name] for name in compiled}
        contenders = [Contender(name, step) for name, step in steps.items()]
        rivals = peers(ours["vqgan-ffhq"], work, batch, (precision, *others)) if skipped is None else {}
        measure.race([*contenders, *rivals.values()], device, repeats)
    rates = {name: devices.matrix_rate(device, name) for name in (precision, *others)}
    rows = [row(contender, rivals.get(precision), precision, batch_size, rates[precision]) for contender in contenders]
    rows += [row(rival, rival, name, batch_size, rates[name]) for name, rival in rivals.items()]
    rows += [
        {
            **row(contender, rivals[other], precision, batch_size, rates[precision]),
            "name": f"{contender.name}, peer in {other}",
        }
        for other in others
        if other in rivals
        for contender in contenders
    ]
    return {
        "batch_size": batch_size,
        "side": SIDE,
        "peer": f"skipped: {skipped}" if skipped else "CompVis/taming-transformers",
        "rows": rows,
        "machine": machine(device),
    }


def why_no_peer(clone: Path | None) -> str | None:
    """Return why the peer cannot run, or None if it can."""
    if clone is not None:
        sys.path.append(str(clone))
    return measure.missing(("taming", "einops", "requests"))


def draw_lpips(work: Path) -> None:
    """Write weights of LPIPS where both sides read them: a random VGG-16 trunk, and the heads of the library."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in torchvision.models.vgg16(weights=None).state_dict().items()}
    seeded = torch.Generator().manual_seed(0)
    # The classifier is not used: an expanded scalar in place of each tensor keeps the file small.
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.startswith("features.") and name.endswith(".weight"):
            weights[name] = nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="relu", generator=seeded)
    trunk = work / "hub" / "checkpoints" / WEIGHTS["vgg"].file
    trunk.parent.mkdir(parents=True)
    torch.save(weights, trunk)
    heads = work / "taming" / "modules" / "autoencoder" / "lpips" / "vgg.pth"
    heads.parent.mkdir(parents=True)
    shutil.copyfile(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", heads)


def draw_images(work: Path, count: int) -> Tensor:
    """Write a prepared set of smooth random images, and return `count` of them, uint8 [count, 3, 256, 256]."""
    seeded = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count + 1, 3, 16, 16), generator=seeded).float()
    images = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear").to(torch.uint8)
    (work / "pictures").mkdir()
    for number, image in enumerate(images):
        pixels.to_image(image).save(work / "pictures" / f"{number:05d}.png")
    with redirect_stdout(sys.stderr):
        request = PrepareRequest(
            str(work / "pictures"), work / "data", Preprocessing(size=SIDE), val="1", keep_labels=False
        )
        prepare(request, console.Console(quiet=True))
    return images[:count]


def peers(ours: TokenizerTraining, work: Path, batch: Tensor, precisions: tuple[str, ...]) -> dict[str, Contender]:
    """Return the step of the peer in each precision, after checking that its model does the same work as ours."""
    model = peer_model(work).to(batch.device)
    check_equal_work(ours, model, pixels.to_signed(batch))
    assert PARAMETERS[PEER] == count(model) - count(model.loss)
    optimizers, _ = model.configure_optimizers()
    images = pixels.to_signed(batch).permute(0, 2, 3, 1).contiguous()  # the layout of its data sets
    return {name: Contender(PEER, partial(peer_step, model, optimizers, images, name)) for name in precisions}


def our_training(preset: str, precision: str, batch: Tensor, work: Path) -> TokenizerTraining:
    """Return the training of a preset in movq, with the discriminator on from the first step."""
    overrides = [
        f"train_vq.batch_size={len(batch)}",
        f"train_vq.precision={precision}",
        f"train_vq.compile={json.dumps(batch.is_cuda)}",
        "train_vq.discriminator_start=0",
        "train_vq.epochs=null",
        "train_vq.steps=1000",
    ]
    images = PreparedSet.open(work / "data")
    training = TokenizerTraining(presets.load(preset, overrides), images, batch.device, work / "hub" / "checkpoints")
    assert PARAMETERS[preset] == count(training.model)
    return training


def peer_model(work: Path) -> Any:  # noqa: ANN401 - the peer is untyped
    """Return the peer's model with its losses, in training mode."""
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(work / "hub"))
    try:
        # The peer reads its linear heads from below the current folder.
        with stand_ins(), chdir(work), redirect_stdout(sys.stderr):
            model = importlib.import_module("taming.models.vqgan").VQModel(**PEER_MODEL)
    finally:
        torch.hub.set_dir(hub)
    model.learning_rate = presets.load("ffhq").train_vq.base_learning_rate
    return model.train()


@contextmanager
def stand_ins() -> Iterator[None]:
    """Provide stand-ins for two modules that the peer imports: Lightning, and the peer's own script."""

    class LightningModule(nn.Module):
        global_step = 0

        def log(self, *_: object, **__: object) -> None:
            """Discard a metric."""

        log_dict = log

    def instantiate_from_config(config: dict[str, Any]) -> Any:  # noqa: ANN401
        module, _, name = config["target"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**config["params"])

    lightning, script = ModuleType("pytorch_lightning"), ModuleType("main")
    vars(lightning)["LightningModule"] = LightningModule
    vars(script)["instantiate_from_config"] = instantiate_from_config
    # The script is beside the package in a clone, and inside it in the published package.
    stands = {"pytorch_lightning": lightning, "main": script, "taming.main": script}
    before = sys.modules.copy()
    sys.modules |= stands
    try:
        yield
    finally:
        for name in stands:
            del sys.modules[name]
            sys.modules |= {name: before[name]} if name in before else {}


def peer_step(model: Any, optimizers: list[torch.optim.Optimizer], images: Tensor, precision: str) -> None:  # noqa: ANN401
    """Do what the peer's training loop does with a batch [B, 256, 256, 3] in [-1, 1]."""
    for index, optimizer in enumerate(optimizers):
        for other in optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(other is optimizer)
        with devices.autocast(images.device, precision):
            loss = model.training_step({"image": images}, 0, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def check_equal_work(ours: TokenizerTraining, peer: Any, images: Tensor) -> None:  # noqa: ANN401
    """Assert that both sides compute the same with the same weights, on images [B, 3, 256, 256] in [-1, 1]."""
    weights = {name: tensor for name, tensor in peer.state_dict().items() if not name.startswith("loss.")}
    ours.model.load_state_dict(weights)
    assert ours.perceptual is not None and ours.discriminator is not None
    z = ours.model.encoder(images)
    peer.eval()  # its train() also enables the dropout of its LPIPS
    pairs = {
        "encoder": (z, peer.encoder(images)),
        "decoder": (ours.model.decoder(z, z), peer.decoder(z)),
        "LPIPS": (ours.perceptual(images, images.flip(3)), peer.loss.perceptual_loss(images, images.flip(3))),
    }
    peer.train()
    for part, (value, expected) in pairs.items():
        difference = ((value - expected).norm() / expected.norm()).item()
        assert difference < 1e-2, f"{part}: the two sides differ by {difference:.1%}"
    layouts = [
        [tensor.shape for tensor in model.parameters()] for model in (ours.discriminator.model, peer.loss.discriminator)
    ]
    assert layouts[0] == layouts[1], "the discriminators differ"


def not_compiled(step: Callable[[], object]) -> None:
    """Make a training step without the compiled programs of its models."""
    with torch.compiler.set_stance("force_eager"):
        step()


def count(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def row(contender: Contender, rival: Contender | None, precision: str, batch_size: int, rate: float) -> dict[str, Any]:
    """Return the row of a contender."""
    return {
        "name": contender.name,
        "precision": precision,
        "parameters": PARAMETERS[contender.name.split(",")[0]],
        **measure.figures(contender, rival, rate),
        "images_per_second": batch_size / contender.median,
    }


def main() -> None:
    """Run the benchmark, print its table and write its results."""
    parser = measure.parser("Time a training step of stage 1.", repeats=5)
    parser.add_argument("--batch-size", type=int, help="images per step [default: 16 on CUDA, otherwise 1]")
    parser.add_argument("--taming", type=Path, help="a clone of CompVis/taming-transformers")
    parser.add_argument(
        "--compiled", nargs="*", choices=OURS, default=OURS[:1], help="presets that are timed compiled too, on CUDA"
    )
    arguments = parser.parse_args()
    device = devices.select(arguments.device)
    batch_size = arguments.batch_size or (16 if device.type == "cuda" else 1)
    figures = report(device, batch_size, arguments.repeats, arguments.taming, arguments.compiled)
    measure.show(f"one training step, {batch_size} x {SIDE} x {SIDE}", figures["rows"])
    print(f"peer: {figures['peer']}")
    measure.save(figures, arguments.out, "training", device)


if __name__ == "__main__":
    main()
