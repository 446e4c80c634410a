"""The rules of the Makefile that make the paper's tables: what they would run, and a table with tiny networks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import plan
from benchmarks.evaluation import draw_weights
from movq_cli import presets
from tests.conftest import draw_shapes

ROOT = Path(__file__).parents[1]
TABLES = ("table1", "table2", "table3", "fig6a", "fig6b", "fig6c", "figA1")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The environment of an installation is not made: the rules run the commands of this one. A file that is new now is
    # newer than pyproject.toml, whatever the order in which a clone was written.
    with tempfile.NamedTemporaryFile() as installed:
        own = [f"MOVQ={sys.executable} -m movq_cli", f"INSTALLED={installed.name}"]
        command = ["make", "--no-print-directory", *own, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def commands(tmp_path: Path, *targets: str) -> list[str]:
    made = make("-n", *targets, "FFHQ=faces", "IMAGENET=net", f"DATA={tmp_path}/data", f"RESULTS={tmp_path}", "GPUS=8")
    assert made.returncode == 0, made.stderr
    lines = made.stdout.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" -m movq_cli ", 1)[1]) for line in lines if " -m movq_cli " in line]


def test_each_row_of_the_tables_is_trained_once_and_compared_with_its_own_published_values(tmp_path: Path) -> None:
    run = commands(tmp_path, "tables")
    trained = {name: [line for line in run if line.startswith(name)] for name in ("train-vq", "train-prior")}
    priors = [(re.findall(r"--preset (\S+) --mode (\w+)", line)[0]) for line in trained["train-prior"]]
    tokenizers = [re.findall(r"--preset (\S+)", line)[0] for line in trained["train-vq"]]
    assert sorted(priors) == sorted((name, mode) for name, modes in plan.MODES.items() for mode in modes)
    assert sorted(tokenizers) == sorted(plan.MODES)
    assert set(tokenizers) <= set(presets.available())
    assert all("--gpus 8" in line for line in run if line.startswith(("train", "sample", "evaluate --psnr")))
    for line in run:
        if line.startswith("evaluate") and "--table" not in line:
            preset = re.findall(r"--preset (\S+)", line)[0]
            assert f"/data/{'imagenet' if 'imagenet' in preset else 'ffhq'} " in line
            assert re.search(rf"/{preset}-(reconstructions|(mask|auto)-samples)( |$)", line)
    assert sum("--n 60000" in line for line in run) == 9
    assert sum("--n 50000" in line for line in run) == 2


@pytest.mark.parametrize("table", TABLES)
def test_a_table_alone_runs_only_the_commands_of_its_rows(table: str, tmp_path: Path) -> None:
    alone, everything = commands(tmp_path, table), commands(tmp_path, "tables")
    assert set(alone) <= set(everything)
    assert 3 < len(alone) < len(everything)


def test_missing_images_are_named_in_one_line(tmp_path: Path) -> None:
    made = make("table2", f"DATA={tmp_path}", f"RESULTS={tmp_path}")
    assert made.returncode == 2
    assert "error: name the folder of FFHQ's images: make table2 FFHQ=/path" in made.stderr


def test_the_plan_counts_the_steps_of_the_papers_prior() -> None:
    row = plan.prior_row("ffhq", presets.load("ffhq", ["train_prior.batch_size=64"]), plan.IMAGES["ffhq"])
    views = 60_000
    assert row.steps == 200 * views // 64 == 187_500
    tokens, parameters = 64 * 256, 24 * 12 * 1024**2 + 1024 * 4096
    assert row.exaflops == pytest.approx(row.steps * 6 * tokens * parameters / 1e18, rel=0.1)
    assert row.disk_gib == pytest.approx(views * 1024 * 2 / 2**30)


def test_samples_are_compared_with_train_images_and_those_of_tiny_networks_with_the_few_of_the_val_split(
    tmp_path: Path,
) -> None:
    given = [f"{name}={tmp_path}" for name in ("FFHQ", "IMAGENET", "SMALL", "RESULTS")]
    for target, split in (("tables", "train"), ("tables-small", "val")):
        made = make("-n", target, *given)
        assert made.returncode == 0, made.stderr
        splits = re.findall(r"evaluate --fid(?: --is --prc)? .*--split (\w+)", made.stdout)
        assert len(splits) > 7
        assert set(splits) == {split}


def test_tiny_trainings_have_a_number_of_steps_of_their_own(tmp_path: Path) -> None:
    made = make("-n", "tables-small", f"SMALL={tmp_path}", f"RESULTS={tmp_path}")
    assert made.returncode == 0, made.stderr
    steps = re.findall(r"-o train_(?:vq|prior)\.(?:steps|validate_every)=(\S*)", made.stdout)
    assert len(steps) > 40
    assert set(map(int, steps)) == {60}


@pytest.mark.slow
def test_a_table_with_tiny_networks_is_made_and_interrupted_work_is_not_made_again(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "pictures")
    draw_weights(tmp_path / "weights")
    # The commands of the smallest table that trains a tokenizer and both priors.
    given = [f"SMALL={tmp_path}/pictures", f"RESULTS={tmp_path}/out", f"WEIGHTS={tmp_path}/weights", "STEPS=2"]
    small = ["SMALL_VAL=8", "SMALL_SAMPLES=4"]
    made = make("table2-small", *given, *small)
    assert made.returncode == 0, made.stderr[-2000:]
    out = tmp_path / "out" / "small"
    table = (out / "table2.md").read_text()
    assert table in made.stdout
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    source = "Zheng et al. 2022, Tables 1 and 2"
    assert rows == ["ffhq-auto-samples", f"ffhq auto, {source}", "ffhq-mask-samples", f"ffhq mask, {source}"]
    assert json.loads((out / "table2.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (out / "table2.md").unlink()
    (out / "metrics" / "ffhq-mask-samples.json").unlink()
    assert make("table2-small", *given, *small).returncode == 0
    again = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert {path.name for path in again} == {"table2.md", "table2.json", "ffhq-mask-samples.json"}


def test_the_sets_are_made_with_vqgans_filter_and_list(tmp_path: Path) -> None:
    listed = [line for line in commands(tmp_path, "table1", "FFHQ_VAL_LIST=faces.txt") if line.startswith("prepare")]
    drawn = [line for line in commands(tmp_path, "table1") if line.startswith("prepare")]
    assert all("--filter vqgan" in line for line in listed + drawn)
    assert "--val-list faces.txt" in listed[0] and "--val " not in listed[0]
    assert "--val 10000" in drawn[0] and "--val-list" not in drawn[0]
