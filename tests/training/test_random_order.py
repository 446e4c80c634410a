"""Random orders of an autoregressive prior (RAR): what a code sees, the annealing, and the weights for inference."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from movq_cli import checkpoints
from movq_cli.errors import BadRequestError
from movq_cli.models import priors
from movq_cli.models.autoregressive_prior import AutoregressivePrior
from movq_cli.models.transformer import Block
from movq_cli.settings import CodeShape, Preset, PriorSettings, SampleSettings
from movq_cli.training_settings import TrainPriorSettings
from tests.training.test_prior_training import in_mode, stage_of

SHAPE = CodeShape(height=2, width=3, chunks=2, codebook_size=11)
ANNEALED = TrainPriorSettings(random_order="0.5-0.75")


def prior_of(classes: int = 0, settings: TrainPriorSettings = ANNEALED) -> AutoregressivePrior:
    torch.manual_seed(0)
    model = priors.build(PriorSettings(mode="auto", layers=2, heads=2, width=16, hidden=32, classes=classes), SHAPE)
    model.prepare_training(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    assert isinstance(model, AutoregressivePrior)
    return model.eval()


def random_codes(images: int = 2) -> Tensor:
    return torch.randint(0, SHAPE.codebook_size, (images, *SHAPE.size), generator=torch.Generator().manual_seed(1))


def test_the_logits_of_an_order_are_those_of_its_sequence_written_out_code_by_code() -> None:
    model = prior_of().double()
    assert model.previous is not None
    codes = random_codes(1)
    order = [4, 0, 5, 2, 1, 3]
    found = model(codes, None, torch.tensor([order]))[0].flatten(0, 1)
    grid = codes[0].flatten(0, 1)
    tokens: list[Tensor] = []
    for place, position in enumerate(order):
        for chunk in range(SHAPE.chunks):
            # Chunks before the token's own are read at its own position, the others at the position before it.
            read = [grid[position] if other < chunk else None for other in range(SHAPE.chunks)]
            if place:
                read = [grid[order[place - 1]] if at is None else at for at in read]
            ids = [model.unknown if at is None else int(at[other]) for other, at in enumerate(read)]
            token = torch.cat([model.table.weight[code] for code in ids])
            token = token + model.position[0, position] + model.channel[chunk]
            if place:
                token = token + model.previous[0, order[place - 1]]
            tokens.append(token)
    for index, position in enumerate(order):
        for chunk in range(SHAPE.chunks):
            # The loop gives the model no later token at all.
            x = torch.stack(tokens[: index * SHAPE.chunks + chunk + 1])[None]
            for block in model.blocks:
                assert isinstance(block, Block)
                x = block(x, causal=True)
            expected = model.code_logits(x[:, -1:], chunk)[0]
            torch.testing.assert_close(found[position, chunk], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("classes", [0, 3])
def test_the_raster_order_is_an_order_like_the_others(classes: int) -> None:
    model, codes = prior_of(classes), random_codes()
    labels = torch.tensor([1, 2]) if classes else None
    raster = torch.arange(SHAPE.positions).expand(2, -1)
    torch.testing.assert_close(model(codes, labels, raster), model(codes, labels), atol=1e-5, rtol=1e-5)


def test_an_image_has_the_same_logits_beside_images_with_other_orders() -> None:
    model, codes = prior_of(), random_codes(3)
    orders = torch.stack([torch.randperm(SHAPE.positions) for _ in range(3)])
    together = model(codes, None, orders)
    for image in range(3):
        alone = model(codes[image : image + 1], None, orders[image : image + 1])[0]
        torch.testing.assert_close(together[image], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], model(codes, None, orders.roll(1, 0))[0], atol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_weights_for_inference_give_the_same_logits_and_codes_in_a_plain_prior(
    guidance: float, tmp_path: Path
) -> None:
    model, codes, labels = prior_of(classes=3), random_codes(), torch.tensor([0, 2])
    header = checkpoints.PriorHeader(
        prior=model.settings, shape=SHAPE, sample=SampleSettings(), classes=("a", "b", "c"), tokenizer="t"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints.save_weights(tmp_path / "prior.safetensors", model.for_inference(), header)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "previous" in before
    plain, _ = checkpoints.load_prior(tmp_path / "prior.safetensors")
    assert plain.state_dict().keys() == before.keys() - {"previous"}
    torch.testing.assert_close(plain(codes, labels), model(codes, labels), atol=1e-5, rtol=1e-5)
    settings = SampleSettings(guidance=guidance)
    drawn = model.decode([5, 6], labels, settings)
    assert torch.equal(plain.decode([5, 6], labels, settings), drawn)
    assert torch.equal(model.for_inference().decode([5, 6], labels, settings), drawn)


def test_without_the_setting_the_prior_has_no_more_parameters_than_before() -> None:
    model = prior_of(settings=TrainPriorSettings())
    assert model.previous is None
    assert model.for_inference() is model
    assert "previous" not in model.state_dict()


def test_the_share_of_permuted_images_falls_linearly_between_start_and_end() -> None:
    steps = 1000
    for step in range(0, steps + 1, 25):
        if step < 500:
            expected = 1.0
        elif step > 750:
            expected = 0.0
        else:
            expected = 1.0 - (step - 500) / (750 - 500)
        assert ANNEALED.random_order_share(step, steps) == pytest.approx(expected)
    assert TrainPriorSettings().random_order_share(0, steps) == 0


def annealed(tiny: Preset, **changes: object) -> Preset:
    values = {"random_order": "0.2-0.8", "steps": 10, "epochs": None, **changes}
    preset = tiny.model_copy(update={"train_prior": tiny.train_prior.model_copy(update=values)})
    return in_mode(preset, "auto")


def test_the_orders_of_a_step_are_permutations_that_depend_on_seed_and_step_alone(tiny: Preset, tmp_path: Path) -> None:
    stage = stage_of(annealed(tiny), tmp_path)
    positions, raster = stage.model.shape.positions, torch.arange(stage.model.shape.positions)
    permuted: list[float] = []
    for step in (0, 5, 9):
        stage.generator.manual_seed(step)
        orders = stage._orders(400, step)
        assert orders is not None
        assert orders.sort(1).values.equal(raster.expand(400, -1))
        permuted.append((orders != raster).any(1).double().mean().item())
    assert positions > 3
    assert permuted[0] == 1
    assert permuted[1] == pytest.approx(0.5, abs=0.12)
    assert permuted[2] == 0


def test_a_resumed_training_equals_an_uninterrupted_one_and_parts_do_not_change_it(
    tiny: Preset, tmp_path: Path
) -> None:
    complete = stage_of(annealed(tiny), tmp_path / "complete")
    losses = [complete.step(batch, step)["loss"].item() for step, batch in enumerate(islice(complete.batches(0), 8))]
    before = stage_of(annealed(tiny), tmp_path / "before")
    for step, batch in enumerate(islice(before.batches(0), 4)):
        before.step(batch, step)
    after = stage_of(annealed(tiny, accumulate=2), tmp_path / "after")
    after.prior.load_state_dict(before.prior.state_dict())
    resumed = [after.step(batch, step)["loss"].item() for step, batch in enumerate(islice(after.batches(4), 4), 4)]
    assert resumed == pytest.approx(losses[4:], rel=1e-4)
    after.export(tmp_path / "prior.safetensors")
    plain, _ = checkpoints.load_prior(tmp_path / "prior.safetensors")
    codes = torch.from_numpy(after.validation.codes[:2].astype("int64"))
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(plain(codes, labels), after.prior.exported(codes, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["mask", "depth"])
def test_other_modes_refuse_random_orders(tiny: Preset, tmp_path: Path, mode: str) -> None:
    with pytest.raises(BadRequestError, match=r"random_order has no meaning.*prior\.mode=auto"):
        stage_of(in_mode(annealed(tiny), mode), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "mask", "-o", "train_prior.random_order=0.5-0.75"], "random_order has no meaning"),
        (["--mode", "auto", "-o", "train_prior.mask_schedule=linear"], "mask_schedule has no meaning.*mode auto"),
        (["--mode", "auto", "-o", "train_prior.random_order=0.75-0.5"], "as 0.2-0.8"),
    ],
)
def test_the_command_refuses_settings_of_other_modes(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from movq_cli.app import app

    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequestError, match=words):
        app(["train-prior", "--preset", "digits", "--dry-run", "--device", "cpu", *arguments], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_a_run_in_raster_order_does_not_go_on_in_random_orders(tmp_path: Path) -> None:
    from movq_cli import runs
    from movq_cli.run_manifest import RunManifest
    from movq_cli.runs import Run, new_manifest

    def manifest(**changes: object) -> RunManifest:
        settings = Preset.model_validate({"prior": {"mode": "auto"}, "train_prior": changes})
        return new_manifest("prior", preset_name="p", settings=settings, steps=9, data="d", tokenizer="t")

    run = Run(tmp_path, "prior")
    runs.start_or_resume(run, manifest())
    with pytest.raises(BadRequestError, match=r"train_prior\.random_order"):
        runs.branch(run, 3, manifest(random_order="0.5-0.75"))
    assert json.loads(run.manifest_file.read_text())["settings"]["train_prior"]["random_order"] is None
