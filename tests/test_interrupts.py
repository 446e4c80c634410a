"""A command that is interrupted at any moment ends with one line and exit code 130, and leaves nothing over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from movq_cli import app, signals
from movq_cli.errors import InterruptedRunError
from tests.campaign.interrupts import Command, Outcome, interrupt
from tests.conftest import draw_shapes

INTERRUPTED = f"error: {signals.INTERRUPTED}\n"


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """Undo what nohup, or a shell without a terminal, may have set for the tests: their processes inherit it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def run(code: str, *, hangup_ignored: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=ignore if hangup_ignored else None,
    )


@pytest.mark.processes
def test_interrupts_of_the_start_up_end_with_one_line_and_exit_code_130(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "pictures")
    commands = [
        Command(["--help"], 0.3),
        Command(["prepare", "pictures", "out", "--workers", "2"], 0.8),
        Command(["evaluate", "--psnr", "pictures", "pictures"], 1.0),
        Command(["sample", "samples"], 1.0),
    ]
    outcome = interrupt(commands, 12, folder=tmp_path, seed=0, finish=False)
    allowed = {0, 130, 2}  # On a fast machine `sample` may already have reported that there is no prior.
    outcome.wrong_exit_codes = sum(count for code, count in outcome.exit_codes.items() if code not in allowed)
    assert outcome.exit_codes[130] >= 3, outcome
    assert outcome.problems == 0, outcome.details


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
@pytest.mark.parametrize("place", ["movq_cli.app", "typer", "movq_cli.cli.evaluate"])
def test_each_signal_ends_the_process_at_once_during_the_imports(number: signal.Signals, place: str) -> None:
    code = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder())
sys.argv = ["movq", "--help"]
from movq_cli.__main__ import main
main()
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


def command(body: str) -> str:
    """Return a program in which a command has the given body; it runs where the commands of the package do."""
    return f"""
import os, signal, sys, types
from movq_cli import app, signals
commands = types.ModuleType("movq_cli.commands.example")
exec('''def work():
    import os, signal, sys
    from movq_cli import signals
{body}
''', commands.__dict__)
app.app.command("example")(lambda: commands.work())
sys.argv = ["movq", "example"]
signals.handle_from_start()
app.main()
"""


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_command_without_a_message_of_its_own_ends_with_the_common_one(number: signal.Signals) -> None:
    done = run(command(f"    os.kill(os.getpid(), {int(number)})\n    print('not reached')"))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


def test_a_command_with_a_message_says_what_stays() -> None:
    body = """
    with signals.interruptible("the images made", launched=False):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        except Exception:
            print("taken for another error")
"""
    done = run(command(body))
    text = "error: interrupted; the images made so far are kept. Run the same command again to resume.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", text)


def test_further_signals_during_the_cleaning_up_are_ignored() -> None:
    body = """
    import time
    try:
        with signals.interruptible("the images made", launched=False):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)
                print("cleaned")
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("cleaned")
"""
    done = run(command(body))
    assert (done.returncode, done.stdout) == (130, "cleaned\ncleaned\n")
    assert done.stderr.count("\n") == 1
    assert "the images made" in done.stderr


def test_a_later_signal_ends_a_command_that_hangs_while_it_cleans_up() -> None:
    body = """
    import threading, time
    signal.getsignal(signal.SIGINT).patience = 0.2
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        time.sleep(50)
"""
    begin = time.monotonic()
    done = run(command(body))
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)
    assert time.monotonic() - begin < 20


def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    body = """
    import time
    class Closing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    Closing()
    time.sleep(50)
"""
    done = run(command(body))
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)


def test_an_interrupt_in_an_import_comes_after_it(tmp_path: Path) -> None:
    (tmp_path / "swallows_interrupts.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n"
        "except BaseException as error:\n    raise ImportError('garbled') from error\n"
    )
    body = f"""
    import time
    sys.path.insert(0, {str(tmp_path)!r})
    import swallows_interrupts
    time.sleep(50)
"""
    done = run(command(body))
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)


def test_signals_after_the_end_of_a_command_change_neither_its_code_nor_its_output() -> None:
    body = """
    import atexit
    atexit.register(lambda: [os.kill(os.getpid(), number) for number in signals.STOP_SIGNALS])
    print("result")
"""
    done = run(command(body))
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")


def test_nohup_is_respected() -> None:
    done = run(command("    os.kill(os.getpid(), signal.SIGHUP)\n    print('goes on')"), hangup_ignored=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
    body = """
    with signals.interruptible("the images made", launched=False):
        os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
"""
    assert run(command(body), hangup_ignored=True).stdout == "goes on\n"


def test_the_end_of_an_input_is_not_an_aborted_command() -> None:
    done = run(command("    raise EOFError('compressed file ended early')"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: unexpected EOFError: compressed file ended early")
    assert "Aborted" not in done.stderr


@pytest.mark.parametrize(
    "redirection", [">/dev/full", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-", "| true", "2>&1 | true"]
)
@pytest.mark.parametrize("words", ["--help", "presets show none"])
def test_output_that_cannot_be_written_ends_without_a_traceback(redirection: str, words: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m movq_cli {words} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    expected = {0, 1} if words == "--help" else {2}
    if words == "--help" and redirection == ">/dev/full":
        expected = {1}
    assert done.returncode in expected, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_workers_do_not_outlive_an_interrupted_parent() -> None:
    body = """
    import time
    from movq_cli.commands.workers import results
    with results(lambda number: time.sleep(60), 4, 2):
        os.killpg(0, signal.SIGTERM)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", command(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, INTERRUPTED)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def test_a_signal_in_an_interruptible_block_is_the_error_of_the_block_only() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with waiting(5), pytest.raises(InterruptedRunError), signals.interruptible("the images made", launched=True):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_an_outcome_adds_up_its_problems() -> None:
    assert Outcome(tracebacks=1, leftovers=2).problems == 3


def test_a_command_called_in_a_process_that_goes_on_leaves_the_handlers_of_that_process() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    app.app(["presets", "show", "digits"], standalone_mode=False)
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
