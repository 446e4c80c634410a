"""`movq prepare` in processes of its own: kills, full disks and two at once end in the same bytes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movq_cli.data.images import encode_png
from movq_cli.data.shards import PreparedSet
from movq_cli.errors import BadRequestError

pytestmark = pytest.mark.processes


def images(folder, count, side=12, suffix="png"):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side + i % 5, 3), dtype=np.uint8)).save(path)
    return folder


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


SCRIPT = """
import sys
from pathlib import Path
from movq_cli.commands import prepare_plan
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.console import Console
from movq_cli.errors import MovqError
prepare_plan.SHARD_IMAGES = 4
try:
    request = PrepareRequest(
        sys.argv[1], Path(sys.argv[2]), prepare_plan.Preprocessing(size=64, square=True, upscale=True), val="4",
        workers=int(sys.argv[3]), shard=tuple(map(int, sys.argv[4:])) or None,
    )
    prepare(request, Console(quiet=True))
except MovqError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(source, out, workers, *shard, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, (source, out, workers, *shard))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Forty images that take a moment each, and what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("large")
    folder = images(root / "in", 40, side=700)
    process = start(folder, root / "out", 1)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    return folder, tree(root / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_run_after_a_kill_resumes_and_makes_the_same_bytes(tmp_path, large, workers):
    folder, expected = large
    out = tmp_path / "out"
    process = start(folder, out, workers)
    wait_until(lambda: len(list(out.glob("train/*.zip"))) >= 2)
    orphans = children(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, orphans)), 2)
    made = {path: path.stat().st_mtime_ns for path in out.glob("train/*.zip")}
    assert 2 <= len(made) < 10 and not (out / "manifest.json").exists()
    with pytest.raises(BadRequestError, match="unfinished"):
        PreparedSet.open(out)
    again = start(folder, out, 3 - workers)
    assert again.communicate(timeout=60)[1] == "" and again.returncode == 0
    assert tree(out) == expected
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_killed_worker_is_a_failure_and_finished_shards_stay(tmp_path, large):
    folder, expected = large
    out = tmp_path / "out"
    process = start(folder, out, 2)
    wait_until(lambda: len(list(out.glob("train/*.zip"))) >= 1)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and len(error.splitlines()) == 1
    assert "worker" in error and "run it again" in error
    assert list(out.glob("train/*.zip"))
    again = start(folder, out, 2)
    assert again.communicate(timeout=60)[1] == "" and tree(out) == expected


def test_ctrl_c_ends_at_once_without_the_workers_tracebacks(tmp_path, large):
    folder, _ = large
    for number in range(8):  # so much work that the signal comes long before its end
        shutil.copytree(folder, tmp_path / "in" / str(number))
    out = tmp_path / "out"
    # A shell that runs the tests in the background has Ctrl-C ignored in all that they start.
    process = start(tmp_path / "in", out, 2, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_until(lambda: len(list(out.glob("train/*.zip"))) >= 1)
    workers = children(process.pid)
    before = len(list(out.glob("*/*.zip")))
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    made = len(list(out.glob("*/*.zip"))) - before
    assert process.returncode == 130
    assert process.returncode == 130
    assert made < 20, "of 80 shards those that were at work are finished at most, not all that were waiting"
    assert error == "interrupted; the finished shards so far are kept. Run the same command again to resume.\n"
    assert not any(map(alive, workers))


def test_two_runs_in_one_folder_do_not_mix(tmp_path, large):
    folder, expected = large
    out = tmp_path / "out"
    first = start(folder, out, 1)
    wait_until((out / "plan.json").exists)
    second = start(folder, out, 1)
    error = second.communicate(timeout=20)[1]
    assert second.returncode == 2 and f"another movq prepare (process {first.pid}) is at work" in error
    assert first.communicate(timeout=60)[1] == "" and tree(out) == expected


def test_jobs_at_once_one_of_them_killed_and_one_started_twice_make_the_same_bytes(tmp_path, large):
    folder, expected = large
    out = tmp_path / "out"
    jobs = [start(folder, out, 1, *shard) for shard in [(1, 3), (2, 3), (3, 3), (3, 3)]]
    wait_until(lambda: len(list(out.glob("train/*.partial"))) >= 2, 20)
    jobs[0].kill()
    for job in jobs:
        error = job.communicate(timeout=60)[1]
        assert job.returncode == (-signal.SIGKILL if job is jobs[0] else 0), error
        assert job is jobs[0] or all("shards are missing" in line for line in error.splitlines())
    assert not (out / "manifest.json").exists()
    again = start(folder, out, 1, 1, 3)
    assert again.communicate(timeout=60)[1] == "" and tree(out) == expected


def test_a_whole_run_and_a_job_do_not_mix(tmp_path, large):
    folder, expected = large
    out = tmp_path / "out"
    first = start(folder, out, 1)
    wait_until((out / "plan.json").exists)
    second = start(folder, out, 1, 1, 3)
    error = second.communicate(timeout=20)[1]
    assert second.returncode == 2 and f"another movq prepare (process {first.pid}) is at work" in error
    assert first.communicate(timeout=60)[1] == "" and tree(out) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_a_failure_in_one_line_and_the_run_can_go_on(tmp_path, large, workers):
    folder, expected = large
    out = tmp_path / "out"
    # Four images of 64 pixels make some 50 kB.
    limit = (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    process = start(folder, out, workers, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    stdout, error = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "") and len(error.splitlines()) == 1, error
    assert "cannot write" in error and ".zip: File too large" in error and "space" in error
    assert not list(out.rglob("*.partial")) and not (out / "manifest.json").exists()
    again = start(folder, out, workers)
    assert again.communicate(timeout=60)[1] == "" and tree(out) == expected


def test_memory_stays_bounded_by_the_image_not_the_shard(tmp_path):
    # 480 MB of pixels in one shard, whose PNGs are small.
    one = encode_png(Image.new("RGB", (2000, 2000)))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for i in range(40):
            archive.writestr(f"{i}.png", one)
    code = SCRIPT.replace("SHARD_IMAGES = 4", "SHARD_IMAGES = 1000") + "print(Path('/proc/self/status').read_text())"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.zip"), str(tmp_path / "out"), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = next(line for line in run.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 250_000  # kB
