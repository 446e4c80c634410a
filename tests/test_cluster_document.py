"""The job of Slurm in docs/cluster.md does what the document says.

There is no Slurm here: `srun` and `scontrol` are programs that do the same with processes of this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_documents import parse

DOCUMENT = Path(__file__).parents[1] / "docs" / "cluster.md"
SCRIPT = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)[0]

SRUN = r"""#!/bin/bash
# Starts two tasks, passes signals on, and exits with the largest of their exit codes.
while [[ "$1" == --* ]]; do
    echo "$1" >>srun-options
    shift
done
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
largest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
    ((code > largest)) && largest=$code
done
exit "$largest"
"""

SCONTROL = r"""#!/bin/bash
case "$1" in
show) printf 'node0\nnode1\n' ;;
requeue) echo "$2" >requeued ;;
esac
"""

MOVQ = r"""#!/bin/bash
# Ends at once with the exit code $CODE, or at SIGUSR1 after the time of a checkpoint.
trap 'sleep 0.2; exit 130' USR1
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >"rank-$RANK"
[ "$CODE" ] && exit "$CODE"
while :; do sleep 0.02; done
"""


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """The command that runs the script, in a folder with the programs that it calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "movq": MOVQ}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "train.sh").write_text(SCRIPT)
    given = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    return ["env", f"PATH={programs}:{os.environ['PATH']}", *(f"{key}={value}" for key, value in given.items())]


def start(job: list[str], folder: Path, code: str = "") -> subprocess.Popen[str]:
    command = [*job, f"CODE={code}", "bash", "train.sh"]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_script_is_valid_and_its_command_parses() -> None:
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True, check=False).returncode == 0
    (command,) = re.findall(r"^command=\((.*)\)$", SCRIPT, re.MULTILINE)
    assert shlex.split(command)[:2] == ["movq", "train-vq"]
    parse(command.removeprefix("movq "))


def test_the_script_asks_for_the_signal_for_itself_and_may_be_queued_again() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT, re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    # Slurm reads no option after the first command.
    first_command = re.search(r"^[^#\n]", SCRIPT, re.MULTILINE)
    assert first_command is not None and "#SBATCH" not in SCRIPT[first_command.start() :]


def test_at_the_limit_of_time_all_ranks_end_first_and_the_job_is_queued_again(job: list[str], tmp_path: Path) -> None:
    process = start(job, tmp_path)
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"rank-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # Somebody repeats it with scancel.
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "queued again" in output
    assert (tmp_path / "requeued").read_text() == "40123\n"
    arguments = "train-vq --preset ffhq --data /shared/data/ffhq --run /shared/runs/ffhq-vq"
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text() == f"{rank} {rank} 2 2 node0 20123 {arguments}\n"
    assert "--output=logs/%x-%j-rank%t.log" in (tmp_path / "srun-options").read_text().splitlines()


@pytest.mark.parametrize("code", ["0", "1", "2", "130"])
def test_a_job_that_ends_by_itself_has_the_exit_code_of_its_ranks_and_is_not_queued_again(
    job: list[str], tmp_path: Path, code: str
) -> None:
    process = start(job, tmp_path, code)
    process.communicate(timeout=30)
    assert process.returncode == int(code)
    assert not (tmp_path / "requeued").exists()
