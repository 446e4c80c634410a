"""Run folders: which run may be resumed, which one is the newest finished one, and what an error advises."""

from __future__ import annotations

from pathlib import Path

import pytest

from movq_cli import runs
from movq_cli.errors import BadRequestError
from movq_cli.run_manifest import COMMAND, Kind, RunManifest
from movq_cli.runs import Run
from movq_cli.settings import Preset


def write_run(folder: Path, kind: Kind, tiny: Preset, finished: str | None, status: str = "finished") -> Run:
    run = Run(folder, kind)
    manifest = RunManifest(
        kind=kind, preset="tiny", steps=10, step=10, started="2026", data="d", settings=tiny, finished=finished
    )
    run.write(manifest.model_copy(update={"status": status}))
    run.weights.write_bytes(b"weights")
    return run


def test_the_newest_finished_run_of_the_kind_is_found(tmp_path: Path, tiny: Preset) -> None:
    write_run(tmp_path / "old", "vq", tiny, "2026-01-01")
    newest = write_run(tmp_path / "new", "vq", tiny, "2026-01-03")
    write_run(tmp_path / "running", "vq", tiny, None, "running")
    write_run(tmp_path / "prior", "prior", tiny, "2026-01-04")
    write_run(tmp_path / "lost", "vq", tiny, "2026-01-05").weights.unlink()
    assert runs.find_run(None, "vq", root=tmp_path) == newest


def test_only_runs_with_the_given_tokenizer_settings_are_found(tmp_path: Path, tiny: Preset) -> None:
    fits = write_run(tmp_path / "fits", "vq", tiny, "2026-01-01")
    other = tiny.model_copy(update={"vq": tiny.vq.model_copy(update={"codebook_size": 32})})
    write_run(tmp_path / "other", "vq", other, "2026-01-02")
    assert runs.find_run(None, "vq", fits=tiny.vq, root=tmp_path) == fits


@pytest.mark.parametrize("kind", ["vq", "prior"])
def test_without_any_run_the_error_says_what_to_train(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(BadRequestError, match=f"movq {COMMAND[kind]}"):
        runs.find_run(None, kind, root=tmp_path)
    with pytest.raises(BadRequestError, match="nowhere"):
        runs.find_run(tmp_path / "nowhere", kind)


def test_a_run_of_the_other_stage_is_refused(tmp_path: Path, tiny: Preset) -> None:
    write_run(tmp_path / "run", "prior", tiny, "2026-01-01")
    with pytest.raises(BadRequestError, match="train-prior"):
        runs.find_run(tmp_path / "run", "vq")


def start(run: Run, tiny: Preset, *, steps: int = 10, data: str = "d", tokenizer: str | None = None) -> RunManifest:
    return runs.start_or_resume(
        run, runs.new_manifest(run.kind, preset_name="tiny", settings=tiny, steps=steps, data=data, tokenizer=tokenizer)
    )


def changed(tiny: Preset, section: str, **values: object) -> Preset:
    return tiny.model_copy(update={section: getattr(tiny, section).model_copy(update=values)})


def test_a_run_is_resumed_with_settings_that_do_not_change_its_steps(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path / "run", "vq")
    started = start(run, tiny).started
    again = start(run, changed(tiny, "train_vq", log_every=3, steps=20), steps=20)
    assert (again.started, again.steps, again.settings.train_vq.log_every) == (started, 20, 3)
    # The training of a tokenizer does not depend on the settings of the prior.
    start(run, changed(tiny, "prior", layers=5))


@pytest.mark.parametrize(
    ("section", "values"), [("vq", {"chunks": 2}), ("train_vq", {"seed": 1}), ("data", {"crop": "random"})]
)
def test_a_run_with_other_settings_is_not_resumed(
    tmp_path: Path, tiny: Preset, section: str, values: dict[str, object]
) -> None:
    run = Run(tmp_path / "run", "vq")
    start(run, tiny)
    before = run.manifest_file.read_bytes()
    with pytest.raises(BadRequestError, match=f"{section}.{next(iter(values))}"):
        start(run, changed(tiny, section, **values))
    assert run.manifest_file.read_bytes() == before


def test_other_data_another_tokenizer_and_the_other_stage_are_refused(tmp_path: Path, tiny: Preset) -> None:
    run = Run(tmp_path / "run", "prior")
    start(run, tiny, tokenizer="a" * 64)
    with pytest.raises(BadRequestError, match="another prepared set"):
        start(run, tiny, data="e", tokenizer="a" * 64)
    with pytest.raises(BadRequestError, match="another tokenizer"):
        start(run, tiny, tokenizer="b" * 64)
    with pytest.raises(BadRequestError, match="train-prior"):
        start(Run(tmp_path / "run", "vq"), tiny)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, "vq")
    run.manifest_file.write_text("{}")
    with pytest.raises(BadRequestError, match=r"run\.json"):
        run.read()
