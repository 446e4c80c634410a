"""The autoregressive priors: their size, what a code may see, and their decoding against the full pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import special, stats
from torch import Tensor

from movq_cli import devices, presets
from movq_cli.models import priors
from movq_cli.models.autoregressive_prior import AutoregressivePrior, DepthPrior
from movq_cli.models.transformer import CACHE_INCREMENT, Block
from movq_cli.settings import CodeShape, PriorSettings, SampleSettings

SHAPE = CodeShape(height=3, width=4, chunks=2, codebook_size=11)
UNKNOWN = SHAPE.codebook_size
MODES = ["auto", "depth"]


def random_model(mode: str, classes: int = 0, shape: CodeShape = SHAPE, layers: int = 4) -> priors.CodePrior:
    """Its weights so large that codes depend on those before: some are near certain, others open."""
    torch.manual_seed(0)
    settings = PriorSettings(mode=mode, layers=layers, heads=2, width=16, hidden=32, classes=classes)
    model = priors.build(settings, shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


def random_codes(images: int, shape: CodeShape = SHAPE) -> Tensor:
    return torch.randint(0, shape.codebook_size, (images, *shape.size), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("mode", "classes", "parameters"),
    [("auto", 0, 307_034_368), ("depth", 0, 307_299_584), ("auto", 1000, 307_035_392), ("mask", 0, 307_030_272)],
)
def test_at_the_papers_size_each_has_its_parameters(mode: str, classes: int, parameters: int) -> None:
    preset = presets.load("ffhq", [f"prior.mode={mode}", f"prior.classes={classes}"])
    with torch.device("meta"):
        model = priors.build(preset.prior, preset.vq.code_shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_code_sees_all_codes_before_it_and_none_after(mode: str, classes: int) -> None:
    model = random_model(mode, classes)
    labels = torch.tensor([1]) if classes else None
    codes = random_codes(1)
    before = model(codes, labels).flatten(1, 3)
    for t in range(SHAPE.codes):
        changed = codes.flatten(1).clone()
        changed[0, t] = (changed[0, t] + 1) % SHAPE.codebook_size
        moved = (model(changed.view(codes.shape), labels).flatten(1, 3) - before).abs().amax(-1)[0]
        assert (moved[: t + 1] == 0).all()
        assert (moved[t + 1 :] > 1e-6).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_class_is_seen_by_every_code(mode: str) -> None:
    model, codes = random_model(mode, 3), random_codes(1)
    one, two = (model(codes, torch.tensor([label])) for label in (0, 2))
    assert ((one - two).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("mode", MODES)
def test_positions_and_chunks_are_distinguished(mode: str) -> None:
    """Equal codes everywhere: only the embeddings of position and chunk make their distributions differ."""
    model = random_model(mode)
    logits = model(torch.full((1, *SHAPE.size), 4)).flatten(0, 2)
    for chunk in range(SHAPE.chunks):
        assert len(logits[1:, chunk].round(decimals=3).unique(dim=0)) == SHAPE.positions - 1


def logits_seen(model: priors.CodePrior, codes: Tensor, labels: Tensor | None) -> Tensor:
    """The logits [B, N, K] that decoding draws from, made to repeat given codes."""
    seen: list[Tensor] = []
    plain = model.code_logits

    def keep(x: Tensor, chunk: int) -> Tensor:
        seen.append(plain(x, chunk))
        return seen[-1]

    model.code_logits = keep  # type: ignore[method-assign]
    drawn = model.decode(range(len(codes)), labels, SampleSettings(), codes)
    del model.code_logits
    assert torch.equal(drawn, codes)
    return torch.stack(seen, 1)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_cache_gives_the_full_passs_logits_at_every_place(mode: str, classes: int) -> None:
    model, codes = random_model(mode, classes), random_codes(4)
    labels = torch.tensor([0, 2, 1, UNKNOWN]) if classes else None
    full = model(codes, labels).flatten(1, 3)
    torch.testing.assert_close(logits_seen(model, codes, labels), full, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_also_at_all_1024_places_of_the_papers_images(mode: str) -> None:
    shape = CodeShape(height=16, width=16, chunks=4, codebook_size=64)
    assert shape.codes > 4 * CACHE_INCREMENT
    model, codes = random_model(mode, 0, shape, layers=3), random_codes(2, shape)
    full = model(codes).flatten(1, 3)
    torch.testing.assert_close(logits_seen(model, codes, None), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sample", [SampleSettings(), SampleSettings(temperature=0.6, top_k=4), SampleSettings(guidance=2.0, top_p=0.8)]
)
def test_decoding_is_what_a_loop_of_full_passes_gives(mode: str, sample: SampleSettings) -> None:
    model, seeds, labels = random_model(mode, 3), [3, 2**31, 8], torch.tensor([0, 1, 2])
    found = model.decode(seeds, labels, sample)
    for image, seed in enumerate(seeds):
        numbers = torch.rand(SHAPE.codes, generator=torch.Generator().manual_seed(seed)).double()
        codes = torch.zeros(1, SHAPE.codes, dtype=torch.int64)
        for t in range(SHAPE.codes):
            grid = codes.view(1, *SHAPE.size)
            with torch.no_grad():
                given = model(grid, labels[image : image + 1]).double().flatten(0, 3)[t]
                none = model(grid, torch.tensor([UNKNOWN])).double().flatten(0, 3)[t]
            logits = (given + sample.guidance * (given - none)) / sample.temperature
            codes[0, t] = draw_by_hand(special.softmax(logits.numpy()), numbers[t].item(), sample)
        assert torch.equal(found[image].flatten(), codes[0])


def draw_by_hand(share, number: float, sample: SampleSettings) -> int:
    order = sorted(range(len(share)), key=lambda code: -share[code])[: sample.top_k]
    kept: list[int] = []
    mass = 0.0
    for code in order:
        if kept and mass >= sample.top_p:
            break
        kept.append(code)
        mass += share[code] / sum(share[code] for code in order)
    passed = 0.0
    for code in sorted(kept):
        passed += share[code] / sum(share[code] for code in kept)
        if passed > number:
            return code
    return max(kept)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_does_not_depend_on_those_beside_it(mode: str) -> None:
    model = random_model(mode, 3)
    labels = torch.arange(7) % 3
    together = model.decode(range(7), labels, SampleSettings())
    for size in (1, 3):
        parts = [
            model.decode(range(i, min(i + size, 7)), labels[i : i + size], SampleSettings()) for i in range(0, 7, size)
        ]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_stays_of_the_decoding_before(mode: str) -> None:
    used, labels = random_model(mode, 3), torch.tensor([0, 2])
    known = random_codes(2)
    known[:, 1:] = UNKNOWN
    calls = [
        ([1, 2], labels, SampleSettings(), None),
        ([3, 4], labels.flip(0), SampleSettings(), known),
        ([1, 2], labels, SampleSettings(), None),
        ([1, 2], labels, SampleSettings(guidance=2.0), None),
        ([5], labels[:1], SampleSettings(), None),
    ]
    found = [used.decode(*call) for call in calls]
    for call, codes in zip(calls, found, strict=True):
        assert torch.equal(codes, random_model(mode, 3).decode(*call))
    used.head.weight.data.neg_()  # a step of training, in place
    other = random_model(mode, 3)
    other.head.weight.data.neg_()
    assert torch.equal(used.decode(*calls[-1]), other.decode(*calls[-1]))


@pytest.mark.parametrize("mode", MODES)
def test_known_codes_stay_and_are_read_by_those_after_them(mode: str) -> None:
    model = random_model(mode)
    known = random_codes(300)[:1].repeat(300, 1, 1, 1)
    known[:, 1:] = UNKNOWN  # the first row is known
    codes = model.decode(range(300), None, SampleSettings(), known)
    assert torch.equal(codes[:, 0], known[:, 0])
    with torch.no_grad():
        next_one = special.softmax(model(codes[:1])[0, 1, 0, 0].double().numpy())
    drawn = torch.bincount(codes[:, 1, 0, 0], minlength=SHAPE.codebook_size).numpy()
    likely = next_one * 300 >= 5
    assert stats.chisquare(drawn[likely], next_one[likely] / next_one[likely].sum() * drawn[likely].sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [("auto", AutoregressivePrior, SHAPE.codes), ("depth", DepthPrior, SHAPE.positions)],
)
def test_the_depth_prior_spends_a_body_pass_on_each_position_and_no_more(
    mode: str, kind: type[priors.CodePrior], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(mode)
    assert isinstance(model, kind)
    passes = 0
    block = model.blocks[0]
    assert isinstance(block, Block)
    step = block.step

    def counted(*arguments: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return step(*arguments)

    monkeypatch.setattr(block, "step", counted)
    model.decode([0], None, SampleSettings())
    assert passes == expected


@pytest.mark.parametrize("mode", ["mask", *MODES])
def test_matrices_stored_as_they_are_multiplied_give_the_same_codes(mode: str) -> None:
    model, labels, cpu = random_model(mode, 3), torch.arange(5) % 3, torch.device("cpu")
    with devices.autocast(cpu, "bf16"):
        expected = model.decode(range(5), labels, SampleSettings(guidance=1.0))
        devices.cast_linear_layers(model, cpu, "bf16")
        found = model.decode(range(5), labels, SampleSettings(guidance=1.0))
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert block.qkv.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == model.table.weight.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_drawing_a_position_never_looks_at_its_tensors_from_the_host(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be traced whole can be recorded as a CUDA graph, and what is traced once serves all positions."""
    model, labels = random_model(mode, 3, layers=3), torch.arange(5) % 3
    sample = SampleSettings(guidance=1.5, guidance_schedule="linear", top_p=0.9)
    expected = model.decode(range(5), labels, sample)
    torch._dynamo.utils.counters.clear()
    assert isinstance(model, AutoregressivePrior | DepthPrior)
    compiled = torch.compile(model._draw_position, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(model, "_draw_position", compiled)
    assert torch.equal(model.decode(range(5), labels, sample), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
