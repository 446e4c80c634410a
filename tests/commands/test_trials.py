"""The trials of a search: they are stored, repeat by the seed, and go on after a killed process."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli.commands.trials import Space, Trials, require_optuna
from movq_cli.commands.tuning_objectives import LowestFID, Metrics, PrecisionAtRecall, is_beyond_spread
from movq_cli.commands.tuning_picture import frontier
from movq_cli.data.tuned_settings import JOURNAL
from movq_cli.errors import BadRequestError
from movq_cli.settings import SampleSettings

optuna = pytest.importorskip("optuna", reason="optuna is not installed (pip install 'movq[tune]')")

NAMES = ("steps", "temperature", "choice_temperature", "top_k", "top_p", "guidance", "guidance_schedule")
SPACE = Space(SampleSettings(), NAMES, 64)


def measure(settings: SampleSettings) -> tuple[Metrics, float]:
    """A FID with its minimum away from the preset's settings, and a time that grows with the steps."""
    fid = (settings.temperature - 0.8) ** 2 + (settings.choice_temperature - 9) ** 2 / 100 + abs(settings.top_p - 1)
    return {"fid": 10 * fid + 1 / settings.steps}, settings.steps / 100


def trade(settings: SampleSettings) -> tuple[Metrics, float]:
    """A precision that falls with the temperature, and with the distance of top-p from 0.9, and a recall that rises."""
    diversity = (settings.temperature - 0.6) / 0.7
    precision = 0.95 - 0.5 * diversity - abs(settings.top_p - 0.9)
    return {"precision": precision, "recall": 0.1 + 0.8 * diversity}, settings.steps / 100


def killed(settings: SampleSettings) -> tuple[Metrics, float]:
    raise KeyboardInterrupt


def trials(folder: Path, seed: int = 0) -> Trials:
    folder.mkdir(exist_ok=True)
    return Trials(folder, {"prior": "a"}, SPACE, LowestFID(), seed)


def constrained(folder: Path, min_recall: float) -> Trials:
    folder.mkdir(exist_ok=True)
    return Trials(folder, {"prior": "a"}, SPACE, PrecisionAtRecall(min_recall), 0)


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
    assert search.ranked[0].metrics["fid"] == min(trial.metrics["fid"] for trial in found)
    assert search.ranked[0].metrics["fid"] < 0.7 * found[0].metrics["fid"]
    assert all(0.6 <= trial.settings.temperature <= 1.3 for trial in found)
    assert other.run(measure) == found[0]
    assert other.run(measure) != found[1]


def test_a_search_of_other_weights_has_trials_of_its_own_and_a_damaged_journal_is_named(tmp_path: Path) -> None:
    trials(tmp_path).run(measure)
    assert Trials(tmp_path, {"prior": "b"}, SPACE, LowestFID(), 0).measured == []
    assert len(trials(tmp_path).measured) == 1
    journal = tmp_path / JOURNAL
    journal.write_bytes(b"damage\n" + journal.read_bytes())
    with pytest.raises(BadRequestError, match="Remove it: the search then begins again"):
        trials(tmp_path)
    journal.unlink()
    assert trials(tmp_path).measured == []


def test_a_changed_bit_of_the_journal_is_found_or_changes_no_trial(tmp_path: Path) -> None:
    search = trials(tmp_path)
    for _ in range(2):
        search.run(measure)
    journal, known = tmp_path / JOURNAL, search.measured
    content = journal.read_bytes()
    refused = 0
    for position in range(0, len(content), 13):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        if content[position] == ord("\n") or changed[position] == ord("\n"):
            continue
        journal.write_bytes(changed)
        try:
            assert trials(tmp_path).measured == known
        except BadRequestError as error:
            assert "Remove it: the search then begins again" in str(error)
            refused += 1
    assert refused > 0.8 * len(content) / 13


def test_settings_outside_of_the_usual_ranges_are_tried_first_all_the_same(tmp_path: Path) -> None:
    base = SampleSettings(steps=1, temperature=2.5, choice_temperature=40, top_k=100, top_p=0.123456, guidance=9)
    search = Trials(tmp_path, {}, Space(base, NAMES, 64), LowestFID(), 0)
    assert search.run(measure).settings == base


def test_a_confirmation_is_measured_once(tmp_path: Path) -> None:
    def confirmed(repeat: int, value: float) -> Metrics:
        return trials(tmp_path).confirmed(SampleSettings(), repeat, lambda: {"fid": value})

    assert confirmed(1, 2.5) == {"fid": 2.5}
    assert confirmed(1, 9.5) == {"fid": 2.5}
    assert confirmed(2, 3.5) == {"fid": 3.5}


def test_a_search_for_precision_stays_above_the_lowest_recall(tmp_path: Path) -> None:
    searches = {min_recall: constrained(tmp_path / str(min_recall), min_recall) for min_recall in (0.0, 0.5)}
    for search in searches.values():
        for _ in range(30):
            search.run(trade)
    free, bound = searches.values()
    preset, best = bound.measured[0], bound.ranked[0]
    assert best.metrics["precision"] > preset.metrics["precision"] + 0.05
    assert best.metrics["recall"] >= 0.5 > free.ranked[0].metrics["recall"]
    # The suggestions after the first, random ones seek the highest precision where the recall is high enough.
    allowed = [sum(trial.metrics["recall"] >= 0.5 for trial in search.measured[-15:]) for search in (free, bound)]
    assert allowed[0] < 5 < 8 < allowed[1]


def test_a_search_with_another_recall_goes_on_with_the_same_trials(tmp_path: Path) -> None:
    for _ in range(12):
        constrained(tmp_path, 0.7).run(trade)
    same, other = constrained(tmp_path, 0.7), constrained(tmp_path, 0.2)
    assert same.measured == other.measured
    assert same.ranked[0] != other.ranked[0]
    assert other.ranked[0].metrics["precision"] > same.ranked[0].metrics["precision"]
    suggested: list[SampleSettings] = []

    def interrupted(settings: SampleSettings) -> tuple[Metrics, float]:
        suggested.append(settings)
        raise KeyboardInterrupt

    for search in (same, other):
        with pytest.raises(KeyboardInterrupt):
            search.run(interrupted)
    assert suggested[0] != suggested[1]
    assert trials(tmp_path).measured == []  # FIDs are trials of their own.


def test_trials_below_the_lowest_recall_come_last_the_closest_first() -> None:
    objective = PrecisionAtRecall(0.5)
    made = [{"precision": 0.9, "recall": 0.4}, {"precision": 0.6, "recall": 0.7}, {"precision": 0.99, "recall": 0.2}]
    made += [{"precision": 0.7, "recall": 0.5}]
    assert [metrics["precision"] for metrics in sorted(made, key=objective.order)] == [0.7, 0.6, 0.9, 0.99]


def repeats(precisions: list[float], recalls: list[float]) -> list[Metrics]:
    pairs = zip(precisions, recalls, strict=True)
    return [{"precision": precision, "recall": recall} for precision, recall in pairs]


def test_precision_counts_only_with_enough_recall_and_beyond_the_spread() -> None:
    objective = PrecisionAtRecall(0.5)
    preset, low = repeats([0.6, 0.62], [0.55, 0.56]), repeats([0.6, 0.62], [0.3, 0.31])
    better = repeats([0.7, 0.71], [0.51, 0.50])
    assert objective.is_better(better, preset)
    assert not objective.is_better(preset, better)
    assert not objective.is_better(repeats([0.7, 0.71], [0.5, 0.49]), preset)
    assert not objective.is_better(repeats([0.61, 0.63], [0.7, 0.71]), preset)
    # Against a preset whose recall is too low, a gain of recall is enough, if it is beyond the spread.
    assert objective.is_better(repeats([0.4, 0.41], [0.52, 0.53]), low)
    assert not objective.is_better(repeats([0.4, 0.41], [0.5, 0.52]), repeats([0.6, 0.62], [0.48, 0.51]))


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds() -> None:
    assert is_beyond_spread([9.0, 9.1, 8.9], [10.0, 10.1, 9.9])
    assert not is_beyond_spread([9.0, 11.0, 7.0], [10.0, 10.1, 9.9])
    assert not is_beyond_spread([10.0, 10.1, 9.9], [9.0, 9.1, 8.9])
    assert not is_beyond_spread([5.0, 5.0], [5.0, 5.0])


def test_the_frontier_has_what_nothing_else_is_better_than() -> None:
    made = [(1, 5), (3, 4), (2, 4.5), (2, 6), (4, 4), (0.5, 7)]
    assert frontier(made) == [(0.5, 7), (1, 5), (2, 4.5), (3, 4)]


def test_an_optuna_without_constraints_of_trials_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna, "__version__", "4.9.0")
    with pytest.raises(BadRequestError, match=r"needs optuna 5 or newer, not 4\.9\.0"):
        require_optuna()
