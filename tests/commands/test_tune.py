"""`movq sample --tune` stores settings beside the weights, and `movq sample` finds them there."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from movq_cli import files, runs
from movq_cli.api import Prior
from movq_cli.app import app
from movq_cli.commands.trials import Space
from movq_cli.data import tuned_settings
from movq_cli.data.tuned_settings import TunedSettings
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.evaluation import extractors
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.settings import SampleSettings
from tests.conftest import run_movq
from tests.evaluation.test_fid_evaluator import WIDTH, Projection
from tests.test_formats import documented_fields

pytestmark = pytest.mark.usefixtures("offline")

OPTUNA = "optuna is not installed (pip install 'movq[tune]')"


def sample(capsys: pytest.CaptureFixture[str], *arguments: str | Path | float) -> tuple[Any, str]:
    """The result of `movq sample` and its lines on stderr."""
    capsys.readouterr()
    app(["sample", "--json", "--device", "cpu", *map(str, arguments)], standalone_mode=False)
    out, said = capsys.readouterr()
    return json.loads(out), said


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["settings"]


def tuned(weights: Path, **changes: Any) -> TunedSettings:
    values = {
        "prior": files.sha256(weights),
        "is_better": True,
        "best": {"steps": 3, "temperature": 0.75, "top_k": None},
        "preset": {"steps": 4, "temperature": 1.0, "top_k": None},
        "fixed": {},
        "best_fids": (1.0, 1.1),
        "preset_fids": (2.0, 2.1),
        "best_seconds": 0.1,
        "preset_seconds": 0.2,
        "trials": 9,
        "images": 8,
        "seed": 0,
        "against": "data",
        "split": "train",
        "inception": "0" * 64,
        "device": "cpu",
        "date": runs.now(),
    }
    return TunedSettings.model_validate({**values, **changes})


@pytest.fixture
def projection(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """A stand-in for Inception, for tests of searches, which need optuna."""
    pytest.importorskip("optuna", reason=OPTUNA)
    path = trained / "weights" / WEIGHTS["inception"].file
    path.parent.mkdir()
    path.write_bytes(b"stub")
    network = Projection()
    found = extractors.Inception(network, "projection", WIDTH, path)
    monkeypatch.setattr(extractors, "load_inception", lambda *_: found)
    return network


def test_a_search_stores_its_trials_its_picture_and_its_result(
    trained: Path, projection: Projection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = projection
    monkeypatch.chdir(trained)

    arguments = ("--tune", "-n", 12, "--batch-size", 5, "--run", "runs/tiny-prior", "--seed", 3, "--top-p", 0.9)
    result, said = sample(capsys, *arguments, "--budget", 2)
    assert "real images: 48 of the split train, as published FIDs of samples use in " in said
    assert (result["trials"], len(result["measured"]), result["fixed"]) == (2, 2, {"top_p": 0.9})
    assert result["preset"] == {
        **{"steps": 4, "temperature": 1.0, "choice_temperature": 4.5},
        **{"order": "confidence", "mask_schedule": "cosine"},
        **{"top_k": None, "guidance": 0.0, "guidance_schedule": "constant"},
    }

    result, said = sample(capsys, *arguments, "--budget", 5)
    assert "2 trials are already in" in said
    fids = [trial["fid"] for trial in result["measured"]]
    assert (result["trials"], fids) == (5, sorted(fids))
    stored = json.loads(Path("runs/tiny-prior/prior-tuned.json").read_text())
    assert all(stored[name] == result[name] for name in stored if name != "digest")
    with Image.open(result["picture"]) as picture:
        assert min(picture.size) > 300

    # The FIDs with other seeds are those of evaluate's statistics of the same images, and they decide.
    if stored["best_fids"]:
        assert len(stored["best_fids"]) == len(stored["preset_fids"]) == 4
        spread = (statistics.variance(stored["best_fids"]) + statistics.variance(stored["preset_fids"])) ** 0.5
        gain = statistics.mean(stored["preset_fids"]) - statistics.mean(stored["best_fids"])
        assert stored["is_better"] == (gain > spread)
        assert f"FID {statistics.mean(stored['best_fids']):.4g} ± " in result["verdict"]
    seen = network.seen
    again, _ = sample(capsys, *arguments, "--budget", 5)
    assert again["measured"] == result["measured"]
    assert network.seen == seen

    # A set with other images at the same place has trials of its own, and one at another place has those of before.
    shutil.copytree("data", "elsewhere")
    assert "5 trials are already in" in sample(capsys, *arguments, "--budget", 5, "--against", "elsewhere")[1]
    shutil.rmtree("data")
    run_movq(Path.cwd(), "prepare", "pictures", "data", "--size", "16", "--val", "20", "--workers", "0")
    assert "trials are already in" not in sample(capsys, *arguments, "--budget", 1, "--against", "data")[1]
    shutil.rmtree("data")
    shutil.move("elsewhere", "data")

    # Without time for more, only the preset's settings are tried, and they stay in use.
    result, said = sample(capsys, *arguments[:-4], "--minutes", 0)
    assert (result["trials"], result["is_better"], result["best_fids"]) == (1, False, [])
    assert "no settings had a lower FID than the preset's, which stay in use" in said


def test_a_search_for_precision_measures_what_evaluate_does_and_goes_on_with_another_recall(
    trained: Path, projection: Projection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    drawn = ("-n", 12, "--run", "runs/tiny-prior")
    arguments = ("--tune", *drawn, "--batch-size", 5)
    result, said = sample(capsys, *arguments, "--budget", 5, "--min-recall", 0.2)
    measured = result["measured"]
    (preset,) = [trial for trial in measured if trial["settings"] == result["preset"]]
    assert f"with the preset's settings: precision {preset['precision']:.4g}, recall {preset['recall']:.4g}" in said
    is_allowed = [trial["recall"] >= 0.2 for trial in measured]
    assert is_allowed == sorted(is_allowed, reverse=True)
    allowed = [trial["precision"] for trial in measured if trial["recall"] >= 0.2]
    assert allowed == sorted(allowed, reverse=True)
    assert (result["min_recall"], result["trials"], result["best_fids"]) == (0.2, 5, [])
    with Image.open(result["picture"]) as picture:
        assert min(picture.size) > 300

    # The values are those of evaluate on the same images.
    sample(capsys, "samples", *drawn, "--preset-settings")
    capsys.readouterr()
    app(
        ["evaluate", "--prc", "--json", "--split", "train", "--crop", "16", "--weights", "weights", "data", "samples"],
        standalone_mode=False,
    )
    evaluated = json.loads(capsys.readouterr().out)
    assert [evaluated[name] for name in ("precision", "recall")] == [preset["precision"], preset["recall"]]

    # Another recall uses the same trials, and the stored result says what was searched.
    seen, first = projection.seen, result
    result, said = sample(capsys, *arguments, "--budget", 5, "--min-recall", 1.0)
    assert "5 trials are already in" in said
    assert sorted(trial["precision"] for trial in result["measured"]) == sorted(
        trial["precision"] for trial in measured
    )
    assert (result["is_better"], result["best_precisions"], projection.seen) == (False, [], seen)
    highest = max(trial["recall"] for trial in measured)
    assert f"no settings had a recall of 1, the highest one was {highest:.4g}" in said
    assert "lower --min-recall, or raise --budget" in said
    again, _ = sample(capsys, *arguments, "--budget", 5, "--min-recall", 0.2)
    assert {**again, "date": ""} == {**first, "date": ""}
    assert projection.seen == seen


def test_the_search_for_precision_compares_the_best_settings_by_other_seeds(
    trained: Path, projection: Projection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    arguments = ("--tune", "-n", 32, "--run", "runs/tiny-prior", "--budget", 6, "--min-recall", 0)
    for seed in (3, 0, 1, 2, 4, 5):  # With some seeds, the preset's settings are the best ones.
        result, said = sample(capsys, *arguments, "--seed", seed)
        if result["best_precisions"]:
            break
    best, preset = result["best_precisions"], result["preset_precisions"]
    assert len(best) == len(preset) == len(result["best_recalls"]) == len(result["preset_recalls"]) == 4
    spread = (statistics.variance(best) + statistics.variance(preset)) ** 0.5
    assert result["is_better"] == (statistics.mean(best) - statistics.mean(preset) > spread)
    assert f"with 4 other seeds, precision {statistics.mean(best):.4g} ± " in said
    assert f" at recall {statistics.mean(result['preset_recalls']):.4g} ± " in said


def test_statistics_in_place_of_images_are_refused_for_precision(
    trained: Path, projection: Projection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    np.savez("stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(BadRequestError, match=r"stats\.npz holds their statistics.*--against SET"):
        sample(capsys, "--tune", "--run", "runs/tiny-prior", "--min-recall", 0.5, "--against", "stats.npz")
    assert projection.seen == 0
    with pytest.raises(BadRequestError, match="prc needs at least 4 images in each set, not 3"):
        sample(capsys, "--tune", "--run", "runs/tiny-prior", "--min-recall", 0.5, "-n", 3)


def test_settings_that_were_found_for_precision_say_so_when_they_are_used(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    weights = Path("runs/tiny-prior/prior.safetensors")
    tuned_settings.write(weights, tuned(weights, min_recall=0.5, best_fids=(), preset_fids=()))
    _, said = sample(capsys, "a", "-n", 2, "--run", "runs/tiny-prior")
    assert "tuned settings for the highest precision at a recall of at least 0.5: steps 3, temperature 0.75" in said


def test_tuned_settings_are_named_and_used_and_given_ones_win(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    weights = Path("runs/tiny-prior/prior.safetensors")
    path = tuned_settings.write(weights, tuned(weights))
    options = ("-n", 2, "--run", "runs/tiny-prior")
    _, said = sample(capsys, "a", *options)
    assert f"tuned settings: steps 3, temperature 0.75, top_k all (from {path}; --preset-settings ignores them)" in said
    assert (manifest(Path("a"))["steps"], manifest(Path("a"))["temperature"]) == (3, 0.75)
    _, said = sample(capsys, "b", *options, "--steps", 2)
    assert "tuned settings: temperature 0.75, top_k all (from " in said
    assert (manifest(Path("b"))["steps"], manifest(Path("b"))["temperature"]) == (2, 0.75)
    _, said = sample(capsys, "c", *options, "--preset-settings")
    assert "tuned" not in said
    assert (manifest(Path("c"))["steps"], manifest(Path("c"))["temperature"]) == (4, 1.0)

    tuned_settings.write(weights, tuned(weights, fixed={"top_p": 0.9}))
    _, said = sample(capsys, "d", *options)
    assert f"{path} is not used: it was found with top_p 0.9" in said
    assert manifest(Path("d")) == manifest(Path("c"))
    sample(capsys, "e", *options, "--top-p", 0.9)
    assert manifest(Path("e"))["steps"] == 3

    tuned_settings.write(weights, tuned(weights, is_better=False))
    sample(capsys, "f", *options)
    assert manifest(Path("f")) == manifest(Path("c"))

    tuned_settings.write(weights, tuned(weights, prior="1" * 64))
    _, said = sample(capsys, "g", *options)
    assert f"warning: {path} was found for other weights, and is not used" in said
    assert manifest(Path("g")) == manifest(Path("c"))

    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.85"))
    with pytest.raises(BadRequestError, match="or add --preset-settings"):
        sample(capsys, "h", *options)
    with pytest.raises(FailureError):
        app(["check", "runs/tiny-prior"], standalone_mode=False)
    assert f"warning: {path} is damaged" in capsys.readouterr().err
    sample(capsys, "h", *options, "--preset-settings")


def test_every_field_of_tuned_settings_is_documented() -> None:
    fields = documented_fields("Tuned settings", "field of tuned settings")
    assert fields == set(TunedSettings.model_fields)


def test_only_settings_that_the_prior_has_are_searched(trained_once: Path, ordered_once: Path) -> None:
    base = SampleSettings()
    masked, ordered = Prior.load(trained_once / "runs" / "tiny-prior"), Prior.load(ordered_once / "auto")
    common = ("temperature", "top_k", "top_p", "guidance", "guidance_schedule")
    assert Space.of(ordered, base, {}, can_guide=True).names == common
    assert Space.of(masked, base, {}, can_guide=False).names == (
        "steps",
        "temperature",
        "choice_temperature",
        "order",
        "mask_schedule",
        *common[1:3],
    )
    assert "top_k" not in Space.of(masked, base, {"top_k": 5}, can_guide=True).names
    assert "guidance_schedule" not in Space.of(masked, base, {"guidance": 0.0}, can_guide=True).names
    with pytest.raises(BadRequestError, match="nothing to search"):
        Space.of(ordered, base, {"temperature": 1, "top_k": 3, "top_p": 0.5}, can_guide=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--tune"], "OUT has no effect with --tune"),
        (["--tune", "--grid", "g.png"], "--grid has no effect with --tune"),
        (["--tune", "--gpus", "2"], "--gpus has no effect with --tune"),
        (["out", "--budget", "3"], "--budget has no effect without --tune"),
        (["out", "--min-recall", "0.5"], "--min-recall has no effect without --tune"),
        (["out", "--against", "x"], "--against has no effect without --tune"),
        ([], "missing argument 'OUT'"),
    ],
)
def test_options_without_effect_and_a_missing_folder_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        app(["sample", *arguments], standalone_mode=False)
