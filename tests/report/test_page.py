"""The page of a run is complete, escapes what it shows, and is made of whatever the run folder has."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from movq_cli.data import grids
from movq_cli.report import page, pictures
from movq_cli.report.blocks import Film
from movq_cli.run_history import RunHistory
from tests.conftest import Movq, edit_header
from tests.doctor.record import RUNS

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("short_library")


class Elements(HTMLParser):
    """Collects the elements of a page, their attributes, and the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.found or self.found[-1][0] not in {"script", "style"}:
            self.text += data


def render(*folders: Path, device: torch.device | None = None) -> str:
    return page.render([RunHistory.read(folder) for folder in folders], device)


def titles(html: str) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", html)


def test_the_page_of_a_run_has_every_part_that_its_log_and_pictures_give() -> None:
    html = render(RUNS / "healthy-tokenizer")
    assert {
        "What this run is",
        "Diagnosis",
        "Fixed validation images over time",
        "Losses of the reconstruction",
        "PSNR of the validation images",
        "Mean logits of the discriminator",
        "Adaptive weight of the adversarial loss",
        "Norm of the gradients before clipping",
        "Use of the codebook",
        "Throughput",
        "Codebook",
    } <= set(titles(html))
    assert "Healthy: none of 15 rules has found anything." in html
    assert "adversarial loss begins" in html
    assert len(html) < 5e6


def test_a_regularized_discriminator_and_newer_settings_of_the_prior_have_pages_and_diagnoses(
    trained: Path, movq: Movq
) -> None:
    discriminator = {
        **{"r1_weight": 0.1, "r1_every": 2, "lecam_weight": 0.1, "discriminator_norm": "group"},
        **{"discriminator_augmentation": "[color,translation]", "discriminator_start": 2},
    }
    prior = {"prior.qk_norm": True, "prior.dropout": 0.1, "train_prior.random_order": "0.5-0.75", "prior.mode": "auto"}
    shared = ["--preset", "tiny.yaml", "--device", "cpu"]
    options = [f"train_vq.{name}={value}" for name, value in discriminator.items()]
    movq("train-vq", *shared, "--run", "runs/vq", *(word for option in options for word in ("-o", option)))
    options = [f"{name}={value}" for name, value in prior.items()]
    movq(
        *("train-prior", *shared, "--run", "runs/prior", "--tokenizer", "runs/vq"),
        *(word for option in options for word in ("-o", option)),
    )
    plain, regularized = (titles(render(trained / "runs" / name)) for name in ("tiny-vq", "vq"))
    charts = {
        "LeCam regularization of the discriminator, without its weight",
        "Gradient penalty of the discriminator (R1), without its weight",
    }
    assert charts <= set(regularized)
    assert not charts & set(plain)
    of_prior = render(trained / "runs" / "prior", device=CPU)
    assert "Loss of training and validation, and the entropy of the codes" in titles(of_prior)
    assert "no findings of" in movq("doctor", "runs/prior").stdout
    # Ten steps are too few for a discriminator to learn: the remedy then lowers the penalty as well, and can be run.
    found = movq("doctor", "runs/vq", code=3).stdout
    (remedy,) = re.findall(r"remedy: movq (train-vq --from runs/vq@.* -o train_vq\.r1_weight=0\.01)", found)
    movq(*remedy.split(), "--device", "cpu")
    assert charts <= set(titles(render(trained / "runs" / "vq-2")))


def test_a_page_loads_nothing_from_elsewhere() -> None:
    elements = Elements(render(RUNS / "healthy-tokenizer"))
    for tag, attributes in elements.found:
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value[:80])
    policy = next(values["content"] for tag, values in elements.found if values.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


def test_findings_of_an_ill_run_are_on_the_page_with_the_remedy() -> None:
    html = render(RUNS / "discriminator-never-starts")
    assert "The discriminator never starts" in titles(html)
    assert "-o train_vq.discriminator_start=50%" in html


def test_names_from_elsewhere_are_shown_as_text(runs: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    run = runs / evil
    shutil.copytree(RUNS / "healthy-tokenizer", run)
    settings = json.loads((run / "run.json").read_text())["settings"]
    closing = "</script><script>alert(2)</script>\x1b[31m"
    edit_header(run / "run.json", settings={**settings, "description": closing}, preset="{{ 7 * 191 }}")
    session = {"command": ["movq", closing], "device": evil, "ranks": 1}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 240, "time": "2026-11-27T09:00:00+00:00", "session": session}) + "\n")
    path = next((run / "pictures").iterdir())
    grids.save(path, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 1, headings=[evil])
    for html in (render(run), render(run, RUNS / "colors-lost")):
        elements = Elements(html)
        assert evil in elements.text and "1337" not in elements.text
        assert not [values for tag, values in elements.found if tag == "img" and values.get("onerror")]
        assert html.count("<script") == html.count("</script") and "alert(2)</script>" not in html


def test_several_runs_are_compared_by_what_differs() -> None:
    names = ("healthy-tokenizer", "adaptive-weight-at-limit")
    html = render(*(RUNS / name for name in names))
    rows = re.findall(r"train_vq\.adaptive_weight_limit</td>(.*?)</tr>", html)
    assert re.findall(r">([\d.]+)<", rows[0]) == ["1.0", "0.01"]
    assert "train_vq.batch_size" not in html
    chart = next(
        text for text in re.findall(r'<script type="application/json">(.*?)</script>', html) if "lines" in text
    )
    assert [name for name, *_ in json.loads(chart)["lines"]] == list(names)
    assert "adaptive-weight-at-limit: The adaptive weight is at its limit" in html


def test_runs_of_both_stages_are_compared() -> None:
    html = render(RUNS / "healthy-tokenizer", RUNS / "healthy-prior")
    assert "Use of the codebook" in titles(html) and "prior.width" not in html


def test_two_runs_of_the_same_folder_name_are_told_apart_by_their_paths(runs: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(RUNS / "healthy-prior", runs / parent / "run")
    histories = [RunHistory.read(runs / parent / "run") for parent in ("a", "b")]
    assert page.names_of(histories) == [str(runs / parent / "run") for parent in ("a", "b")]


@pytest.mark.parametrize("missing", ["log.jsonl", "pictures"])
def test_a_run_that_lacks_a_part_has_a_page_that_says_so(runs: Path, missing: str) -> None:
    shutil.copytree(RUNS / "healthy-tokenizer", runs / "run")
    path = runs / "run" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = render(runs / "run", device=CPU)
    assert ("has no pictures yet" in html) == (missing == "pictures")
    assert ("no training in the log" in html) == (missing == "log.jsonl")
    assert "The run has no weights yet." in html


def test_pictures_that_are_damaged_or_of_another_size_are_left_out_of_the_film(runs: Path) -> None:
    shutil.copytree(RUNS / "healthy-tokenizer", runs / "run")
    folder = runs / "run" / "pictures"
    (folder / "00000160.png").write_bytes(b"\x89PNG half")
    grids.save(folder / "00000200.png", torch.zeros(24, 3, 8, 8, dtype=torch.uint8), 8, rows=grids.ROWS)
    film = pictures.film(RunHistory.read(runs / "run"))
    assert isinstance(film, Film) and film.steps == [240]
    (folder / "00000240.png").write_bytes(b"")
    assert not isinstance(pictures.film(RunHistory.read(runs / "run")), Film) or film.steps


def test_a_picture_of_an_earlier_version_without_headings_is_shown(runs: Path) -> None:
    shutil.copytree(RUNS / "healthy-tokenizer", runs / "run")
    path = runs / "run" / "pictures" / "00000240.png"
    _, tiles = grids.read(path)
    with Image.new("RGB", ((2 + 8 * 18) * 4, (2 + 2 * 18) * 4), "white") as picture:
        for index, tile in enumerate(tiles[:16]):
            corner = ((2 + index % 8 * 18) * 4, (2 + index // 8 * 18) * 4)
            picture.paste(Image.fromarray(pictures.enlarged(tile, 4)), corner)
        picture.save(path)
    found = pictures.originals_and_reconstructions(RunHistory.read(runs / "run"), 240)
    assert found is not None and (found[0] == tiles[:8]).all() and (found[1] == tiles[8:16]).all()


def test_a_film_of_a_long_run_has_few_steps_and_both_ends(runs: Path) -> None:
    shutil.copytree(RUNS / "healthy-tokenizer", runs / "run")
    folder = runs / "run" / "pictures"
    for step in range(10_000, 10_100):
        (folder / f"{step:08d}.png").symlink_to(folder / "00000240.png")
    film = pictures.film(RunHistory.read(runs / "run"))
    assert isinstance(film, Film) and len(film.steps) <= 24
    assert (film.steps[0], film.steps[-1]) == (160, 10_099)


@pytest.mark.parametrize(("name", "parts"), [
    ("tiny-vq", {"How often each entry is used", "The most used entries", "Codes over a picture"}),
    ("tiny-prior", {"Decoding step by step", "Nearest training images", "Loss by channel", "Samples over time",
                    "Loss by the share of masked codes"}),
])  # fmt: skip
def test_the_parts_of_a_page_that_need_the_weights_are_drawn(trained_once: Path, name: str, parts: set[str]) -> None:
    html = render(trained_once / "runs" / name, device=CPU)
    assert parts <= set(titles(html))
    assert "This part is missing" not in html and "No cache of the training images" not in html


def test_weights_that_are_damaged_cost_their_part_alone(runs: Path) -> None:
    shutil.copytree(RUNS / "healthy-tokenizer", runs / "run")
    (runs / "run" / "tokenizer.safetensors").write_bytes(b"damaged")
    html = render(runs / "run", device=CPU)
    assert "This part is missing" in html and "Throughput" in titles(html)
