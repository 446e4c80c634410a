"""The command line: registers the commands, and maps each error to one line and an exit code.

This module does not import torch, so that `movq --help` answers at once: each command imports what it needs when it is
called. Exit codes: 0 success, 1 failure, 2 bad request, 130 interrupted (finished work is on disk).
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from movq_cli.cli.evaluate import evaluate
from movq_cli.cli.prepare import prepare
from movq_cli.cli.presets import presets, presets_show
from movq_cli.cli.reconstruct import reconstruct
from movq_cli.cli.sample import sample
from movq_cli.cli.train import train_prior, train_vq
from movq_cli.cli.weights import weights
from movq_cli.errors import FailureError, MovqError
from movq_cli.version import __version__

app = typer.Typer(
    name="movq",
    help="Train and run MoVQ: a modulated VQ image tokenizer, and a masked prior that samples an image in 8 steps.",
    epilog="Usual order: prepare, train-vq, train-prior, sample, evaluate. Run an interrupted command again to resume.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prepare")(prepare)
app.command("train-vq")(train_vq)
app.command("train-prior")(train_prior)
app.command("reconstruct")(reconstruct)
app.command("sample")(sample)
app.command("evaluate")(evaluate)
app.command("weights")(weights)
presets_app = typer.Typer(help="List the presets, or show one of them.", rich_markup_mode=None)
presets_app.callback()(presets)
presets_app.command("show")(presets_show)
app.add_typer(presets_app, name="presets", invoke_without_command=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"movq {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # PyTorch, which reads this when it is imported, would print a page about a lost rank beside our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app(prog_name="movq")
    except MovqError as error:
        code = _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except BrokenPipeError:
        # The reader has closed the pipe of our output, so that the final flush must go somewhere else.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _report(f"{error.filename or 'input or output'}: {error.strerror or error}", FailureError.exit_code)
    except Exception as error:
        code = _report_unexpected(error)
    sys.exit(code)


def _report(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def _report_unexpected(error: Exception) -> int:
    """Print one line about an error that no command foresees; with MOVQ_TRACEBACK=1, after its traceback."""
    if os.environ.get("MOVQ_TRACEBACK"):
        traceback.print_exc()
    text = " ".join(str(error).split())[:300]
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return _report(f"out of memory. Try a smaller batch size. ({text})", FailureError.exit_code)
    return _report(
        f"unexpected {type(error).__name__}: {text}. Set MOVQ_TRACEBACK=1 to see the traceback.",
        FailureError.exit_code,
    )
