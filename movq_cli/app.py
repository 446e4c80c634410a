"""The command line: registers the commands, and maps each error to one line and an exit code.

This module does not import torch, so that `movq --help` answers at once: each command imports what it needs when it is
called. Exit codes: 0 success, 1 failure, 2 bad request, 3 findings of `movq doctor`, 130 interrupted by a signal of
`signals.STOP_SIGNALS` (finished work is on disk).
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from movq_cli import signals, streams
from movq_cli.cli.check import check
from movq_cli.cli.doctor import doctor
from movq_cli.cli.evaluate import evaluate
from movq_cli.cli.interop import export, import_weights
from movq_cli.cli.prepare import prepare
from movq_cli.cli.presets import presets, presets_new, presets_show
from movq_cli.cli.reconstruct import reconstruct
from movq_cli.cli.report import report
from movq_cli.cli.sample import sample
from movq_cli.cli.train import train_prior, train_vq
from movq_cli.cli.weights import weights
from movq_cli.console import write_line
from movq_cli.errors import FailureError, MovqError, is_out_of_memory
from movq_cli.paths import expand_path
from movq_cli.version import __version__


class _PastParserError(Exception):
    """Carries an error of a command past the parser, which has messages and exit codes of its own for it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class _Group(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the parser's context and a command's result
        """Run a command; the parser would turn these errors into "Aborted!", or into an exit without a message."""
        try:
            return super().invoke(ctx)
        except (EOFError, OSError, KeyboardInterrupt) as error:
            raise _PastParserError(error) from error
        finally:
            signals.ignore_from_end()


class _Command(TyperCommand):
    """A command, in whose paths `~` and variables are expanded: a shell does not do so after `--option=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - the parser's context
        """Read the arguments, and expand those that are paths."""
        rest = super().parse_args(ctx, args)
        ctx.params |= {name: expand_path(value) for name, value in ctx.params.items() if isinstance(value, Path)}
        return rest


app = typer.Typer(
    name="movq",
    cls=_Group,
    help="Train and run MoVQ: a modulated VQ image tokenizer, and a masked prior that samples an image in 8 steps.",
    epilog="Usual order: prepare, train-vq, train-prior, sample, evaluate. Run an interrupted command again to resume.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare", cls=_Command)(prepare)
app.command("train-vq", cls=_Command)(train_vq)
app.command("train-prior", cls=_Command)(train_prior)
app.command("reconstruct", cls=_Command)(reconstruct)
app.command("sample", cls=_Command)(sample)
app.command("evaluate", cls=_Command)(evaluate)
app.command("report", cls=_Command)(report)
app.command("doctor", cls=_Command)(doctor)
app.command("check", cls=_Command)(check)
app.command("import", cls=_Command)(import_weights)
app.command("export", cls=_Command)(export)
app.command("weights", cls=_Command)(weights)
presets_app = typer.Typer(help="List the presets, show one of them, or write one.", rich_markup_mode=None)
presets_app.callback()(presets)
presets_app.command("show", cls=_Command)(presets_show)
presets_app.command("new", cls=_Command)(presets_new)
app.add_typer(presets_app, name="presets", invoke_without_command=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"movq {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit with its code, which is not changed by a signal after the command's end."""
    # PyTorch, which reads this when it is imported, would print a page about a lost rank beside our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    streams.open_closed()
    streams.survive_loss_of_stderr()
    threading.excepthook = _report_thread
    try:
        try:
            code = _run()
        except KeyboardInterrupt:
            code = _report_interrupt()
        signals.ignore_from_end()
    except KeyboardInterrupt:  # The first signal came while the end of the command was reported.
        signals.ignore_from_end()
        code = signals.EXIT_CODE
    sys.exit(code if streams.discard_unwritable() is None else code or FailureError.exit_code)


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except that of a failed write, which is reported where the file is closed."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def _run() -> int:
    """Run the command line, report its error, and return its exit code."""
    try:
        app(prog_name="movq")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except _PastParserError as carrier:
        return _report_error(carrier.error)
    except Exception as error:
        return _report_error(error)
    return 0


def _report_error(error: BaseException) -> int:
    """Report an error in one line, and return the exit code."""
    if isinstance(error, MovqError):
        return _report(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return _report_interrupt()
    if isinstance(error, BrokenPipeError):
        return FailureError.exit_code
    if isinstance(error, OSError):
        # A stream has no name; then it is stdout or stderr that cannot be written.
        name = os.fsdecode(error.filename) if error.filename else streams.discard_unwritable() or "input or output"
        return _report(f"{name}: {error.strerror or error}", FailureError.exit_code)
    return _report_unexpected(error)


def _report_interrupt() -> int:
    """Report a signal for which the command has no message; of several ranks only the first one does so."""
    return _report(signals.INTERRUPTED, signals.EXIT_CODE, mute=not signals.is_first_rank())


def _report(message: str, code: int, *, mute: bool = False) -> int:
    signals.ignore_from_end()
    if not mute:
        with suppress(OSError):  # There is no other place to report it.
            write_line(f"error: {message}")
    return code


_LESS_MEMORY = {
    "prepare": "Set fewer --workers, or a smaller --max-pixels",
    "train-vq": "Set -o train_vq.accumulate=2 or more, which processes a batch in parts, or a smaller "
    "train_vq.batch_size",
    "train-prior": "Set -o train_prior.accumulate=2 or more, which processes a batch in parts, or a smaller "
    "train_prior.batch_size",
    "reconstruct": "Set a smaller --batch-size or a --crop; with a mask, fewer --samples",
    "sample": "Set a smaller --batch-size",
    "evaluate": "Set a smaller --batch-size",
}
"""Advice that lowers the memory of a command, by the name of the command."""


def _report_unexpected(error: BaseException) -> int:
    """Print one line about an error that no command foresees; with MOVQ_TRACEBACK=1, after its traceback."""
    if os.environ.get("MOVQ_TRACEBACK"):
        with suppress(OSError):
            traceback.print_exception(error)
    text = " ".join(str(error).split())[:300]
    if is_out_of_memory(error):
        command = next((word for word in sys.argv[1:] if word in _LESS_MEMORY), "")
        remedy = _LESS_MEMORY.get(command, "Try a smaller batch size")
        return _report(f"out of memory. {remedy}. ({text})", FailureError.exit_code)
    return _report(
        f"unexpected {type(error).__name__}: {text}. Set MOVQ_TRACEBACK=1 to see the traceback.",
        FailureError.exit_code,
    )
