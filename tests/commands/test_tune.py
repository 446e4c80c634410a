"""`movq sample --tune` stores settings beside the weights, and `movq sample` finds them there."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

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


def test_a_search_stores_its_trials_its_picture_and_its_result(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason=OPTUNA)
    path = trained / "weights" / WEIGHTS["inception"].file
    path.parent.mkdir()
    path.write_bytes(b"stub")
    network = Projection()
    found = extractors.Inception(network, "projection", WIDTH, path)
    monkeypatch.setattr(extractors, "load_inception", lambda *_: found)
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

    # Without time for more, only the preset's settings are tried, and they stay in use.
    result, said = sample(capsys, *arguments[:-4], "--minutes", 0)
    assert (result["trials"], result["is_better"], result["best_fids"]) == (1, False, [])
    assert "no settings had a lower FID than the preset's, which stay in use" in said


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
        (["out", "--against", "x"], "--against has no effect without --tune"),
        ([], "missing argument 'OUT'"),
    ],
)
def test_options_without_effect_and_a_missing_folder_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        app(["sample", *arguments], standalone_mode=False)
