"""The trials of a search: they are stored, repeat by the seed, and go on after a killed process."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli.commands.trials import JOURNAL, Measured, Space, Trials
from movq_cli.commands.tune import is_beyond_spread
from movq_cli.commands.tuning_picture import frontier
from movq_cli.errors import BadRequestError
from movq_cli.settings import SampleSettings

pytest.importorskip("optuna", reason="optuna is not installed (pip install 'movq[tune]')")

NAMES = ("steps", "temperature", "choice_temperature", "top_k", "top_p", "guidance", "guidance_schedule")
SPACE = Space(SampleSettings(), NAMES, 64)


def measure(settings: SampleSettings) -> tuple[float, float]:
    """A FID with its minimum away from the preset's settings, and a time that grows with the steps."""
    fid = (settings.temperature - 0.8) ** 2 + (settings.choice_temperature - 9) ** 2 / 100 + abs(settings.top_p - 1)
    return 10 * fid + 1 / settings.steps, settings.steps / 100


def killed(settings: SampleSettings) -> tuple[float, float]:
    raise KeyboardInterrupt


def trials(folder: Path, seed: int = 0) -> Trials:
    folder.mkdir(exist_ok=True)
    return Trials(folder, {"prior": "a"}, SPACE, seed)


def test_a_search_that_is_killed_again_and_again_makes_the_same_trials(tmp_path: Path) -> None:
    undisturbed = trials(tmp_path / "a")
    for _ in range(10):
        undisturbed.run(measure)
    assert undisturbed.measured[0].settings == SampleSettings()

    journal = tmp_path / "b" / JOURNAL
    for number in range(10):
        if number in (0, 1, 8, 9):
            with pytest.raises(KeyboardInterrupt):
                trials(tmp_path / "b").run(killed)
            with journal.open("ab") as file:
                file.write(b'{"op_code": 5, "half a li')
            journal.with_name(f"{JOURNAL}.lock").symlink_to(journal)
            assert len(trials(tmp_path / "b").measured) == number
        trials(tmp_path / "b").run(measure)
    assert trials(tmp_path / "b").measured == undisturbed.measured


def test_the_search_finds_better_settings_than_the_presets_and_another_seed_finds_others(tmp_path: Path) -> None:
    search, other = trials(tmp_path / "0"), trials(tmp_path / "1", seed=1)
    for _ in range(16):
        search.run(measure)
    found = search.measured
    assert min(trial.fid for trial in found) < 0.7 * found[0].fid
    assert all(0.6 <= trial.settings.temperature <= 1.3 for trial in found)
    assert other.run(measure) == found[0]
    assert other.run(measure) != found[1]


def test_a_search_of_other_weights_has_trials_of_its_own_and_a_damaged_journal_is_named(tmp_path: Path) -> None:
    trials(tmp_path).run(measure)
    assert Trials(tmp_path, {"prior": "b"}, SPACE, 0).measured == []
    assert len(trials(tmp_path).measured) == 1
    journal = tmp_path / JOURNAL
    journal.write_bytes(b"damage\n" + journal.read_bytes())
    with pytest.raises(BadRequestError, match="Remove it: the search then begins again"):
        trials(tmp_path)
    journal.unlink()
    assert trials(tmp_path).measured == []


def test_settings_outside_of_the_usual_ranges_are_tried_first_all_the_same(tmp_path: Path) -> None:
    base = SampleSettings(steps=1, temperature=2.5, choice_temperature=40, top_k=100, top_p=0.123456, guidance=9)
    search = Trials(tmp_path, {}, Space(base, NAMES, 64), 0)
    assert search.run(measure).settings == base


def test_a_confirmation_is_measured_once(tmp_path: Path) -> None:
    assert trials(tmp_path).confirmed(SampleSettings(), 1, lambda: 2.5) == 2.5
    assert trials(tmp_path).confirmed(SampleSettings(), 1, lambda: 0 / 0) == 2.5
    assert trials(tmp_path).confirmed(SampleSettings(), 2, lambda: 3.5) == 3.5


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds() -> None:
    assert is_beyond_spread([9.0, 9.1, 8.9], [10.0, 10.1, 9.9])
    assert not is_beyond_spread([9.0, 11.0, 7.0], [10.0, 10.1, 9.9])
    assert not is_beyond_spread([10.0, 10.1, 9.9], [9.0, 9.1, 8.9])
    assert not is_beyond_spread([5.0, 5.0], [5.0, 5.0])


def test_the_frontier_has_what_nothing_else_is_better_than() -> None:
    made = [Measured(SampleSettings(), fid, time) for fid, time in ((5, 1), (4, 3), (4.5, 2), (6, 2), (4, 4), (7, 0.5))]
    assert [(trial.fid, trial.seconds) for trial in frontier(made)] == [(7, 0.5), (5, 1), (4.5, 2), (4, 3)]
