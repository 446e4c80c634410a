"""The benchmarks count arithmetic and memory correctly, and compare equal work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import __main__ as everything
from benchmarks import growth, loading, measure, quantizer, summary, training
from benchmarks.machine import machine
from benchmarks.measure import Contender
from movq_cli.data import pixels
from movq_cli.data.images import encode_png
from movq_cli.models.quantizers.vector import VectorQuantizer

CPU = torch.device("cpu")


def test_arithmetic_is_counted_forward_and_backward() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1)
    images = torch.randn(2, 4, 5, 6, requires_grad=True)
    with measure.Arithmetic() as forward:
        out = layer(images)
    with measure.Arithmetic() as backward:
        torch.autograd.grad(out.sum(), [images, *layer.parameters()])
    assert forward.flops == 2 * (2 * 8 * 5 * 6) * (4 * 3 * 3)
    assert backward.flops == 2 * forward.flops


def test_arithmetic_is_counted_in_inference_mode_too() -> None:
    layer, images = nn.Linear(5, 7), torch.randn(3, 5)
    with torch.inference_mode(), measure.Arithmetic() as counted:
        out = layer(images)
    assert counted.flops == 2 * 3 * 5 * 7
    assert torch.equal(out, layer(images))


def test_memory_is_the_most_that_is_held_at_once_on_top_of_what_was_before() -> None:
    kept = [torch.empty(10, 1000)]

    def work() -> None:
        kept.clear()
        first, second = torch.empty(300, 1000), torch.empty(500, 1000)
        del first
        third = torch.empty(100, 1000)
        kept.append(third)
        del second

    assert measure.peak_memory(work, CPU) == (300 + 500 - 100) * 4000  # the 100 of the run before are freed first


def test_contenders_run_in_turn() -> None:
    order: list[str] = []
    contenders = [Contender(name, partial(order.append, name)) for name in "ab"]
    measure.race(contenders, CPU, 3)
    assert order[-6:] == ["a", "b"] * 3
    assert [len(contender.seconds) for contender in contenders] == [3, 3]


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ x)


def test_what_is_compiled_is_counted_uncompiled_and_timed_compiled() -> None:
    module, square = Doubled(), torch.randn(3, 3)
    called: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        def record_and_run(*inputs: torch.Tensor) -> object:
            called.append(1)
            return graph(*inputs)

        return record_and_run

    module.compile(backend=backend)
    contender = Contender("doubled", lambda: module(square))
    measure.race([contender], CPU, 2)
    assert contender.flops == 2 * 3**3
    assert len(called) >= 3


def test_quantizers_that_give_other_numbers_do_not_pass_for_equal() -> None:
    torch.manual_seed(0)
    one = VectorQuantizer(64, 64)
    nn.init.normal_(one.embedding.weight)
    z, weight = quantizer.inputs(one, 1)
    right = quantizer.our_pass(one, z, weight)
    quantizer.check_equal_work(right, quantizer.our_pass(one, z, weight))
    for part, value in right._asdict().items():
        wrong = value.clone()
        wrong.view(-1)[0] += 1
        with pytest.raises(AssertionError, match="differ"):
            quantizer.check_equal_work(right._replace(**{part: wrong}), right)


@pytest.mark.slow
def test_a_missing_peer_is_named_and_ours_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "PACKAGES", ("torch", "no_such_package"))
    figures = quantizer.report(CPU, [1], [16, 32], repeats=2)
    assert figures["peer"] == "skipped: no package no_such_package"
    assert [row["name"] for row in figures["rows"]] == ["movq, K = 16, batch 1", "movq, K = 32, batch 1"]
    for row, size in zip(figures["rows"], (16, 32), strict=True):
        assert row["flops"] == 2 * 1024 * size * 64
        assert row["floor_seconds"] == pytest.approx(row["flops"] / row["matrix_flops_per_second"])
        assert row["memory_bytes"] >= 1024 * size * 4
        assert row["peer_over_this"] is None
        assert len(row["runs"]) == 2


def test_the_power_and_the_operator_of_growth_are_found() -> None:
    found = growth.curve("product", "side", (64, 128, 256), product, CPU, 1)
    assert found["memory_exponent"] == pytest.approx(2)
    assert found["dominant"] == "aten::mm"
    assert [point["flops"] for point in found["points"]] == [2 * side**3 for side in (64, 128, 256)]
    assert growth.exponent((1, 2, 8), [3.0, 24.0, 1536.0]) == pytest.approx(3)


def product(side: int) -> Callable[[], object]:
    one = torch.randn(side, side)
    return lambda: one @ one


def result(folder: Path, name: str, **figures: object) -> None:
    (folder / name).write_text(json.dumps({"machine": machine(), **figures}))


def test_the_summary_has_what_was_measured_and_no_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"name": "ours", "precision": "bf16", "seconds": 2.0, "peer_over_this": 1.5, "floor_seconds": 0.5},
        {"name": "alone", "seconds": 2.0, "peer_over_this": None, "floor_seconds": 1.0, "memory_bytes": 2**30},
        {"name": "theirs", "seconds": 3.0, "peer_over_this": 1.0, "floor_seconds": 0.5},
    ]
    result(tmp_path, "thing-cuda.json", rows=rows, peer="theirs")
    result(tmp_path, "ablation.json", rows=[{"row": "other", "psnr": 1.0}])
    results = summary.read(tmp_path)
    place = results[0].place
    assert summary.ratios(results) == [("thing", "ours bf16", "2", "1.50", "-", *place)]
    expected = [("thing", "ours bf16", "2", "0.5", "25%", *place), ("thing", "alone", "2", "1", "50%", *place)]
    assert summary.floors(results) == expected
    summary.show("floors", summary.FLOORS, expected, markdown=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(summary.FLOORS) + 1}


@pytest.mark.processes
def test_a_benchmark_that_fails_or_is_late_hides_no_others_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    result(tmp_path, "thing-cpu.json", rows=[{"name": "ours", "seconds": 2.0, "peer_over_this": 1.5}])
    arguments = ["--device", "cpu", "--minutes", "0.05", "--out", str(tmp_path), "no_such_benchmark", "growth"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert everything.main() == 1
    out, said = capfd.readouterr()
    assert "no_such_benchmark: failed, exit code 1" in out
    assert "growth: out of time" in out
    assert "1.50" in out
    assert said.splitlines()[-1] == "not done: no_such_benchmark, growth"


def test_without_the_peer_its_absence_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert training.why_no_peer(tmp_path) == "no package taming"


def test_the_record_says_where_and_when() -> None:
    assert machine().keys() == {"processor", "cores", "python", "torch", "date"}


def test_the_drawn_pictures_pack_as_photographs_do_and_both_loaders_give_the_same_pixels(tmp_path: Path) -> None:
    drawn = [Image.fromarray(loading.draw(seed)) for seed in range(4)]
    sizes = [len(encode_png(image, compress_level=6)) for image in drawn]
    assert 90_000 < sum(sizes) / len(sizes) < 130_000
    sets = loading.make_sets(tmp_path, None, 5)
    theirs, _ = next(iter(loading.its_loader(tmp_path / "png", 4, 0)))
    for prepared in sets.values():
        ours = pixels.to_signed(next(loading.ours(prepared.split("train"), 4, 0)))
        matched = [(ours - image).abs().amax((1, 2, 3)).min().item() for image in theirs]
        assert max(matched) < 1e-6
