"""The command line: registers the commands, and turns errors into one line and an exit code.

Nothing here imports torch: each command imports its own when it is called.
Exit codes: 0 done, 1 failed, 2 a bad request, 130 interrupted (finished work is on disk).
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
    help="Train and run MoVQ: a modulated VQ image tokenizer and a prior that draws an image in 8 steps.",
    epilog="In order: prepare, train-vq, train-prior, sample, evaluate. Each goes on where it was stopped.",
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
presets_app = typer.Typer(help="List the presets, or show one.", rich_markup_mode=None)
presets_app.callback()(presets)
presets_app.command("show")(presets_show)
app.add_typer(presets_app, name="presets", invoke_without_command=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"movq {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="movq")
    except MovqError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has enough of it. Nothing is left to flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _complain(f"{error.filename or 'input or output'}: {error.strerror or error}", FailureError.exit_code)
    except Exception as error:
        code = _unforeseen(error)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def _unforeseen(error: Exception) -> int:
    """A fault of ours, or memory: one line all the same, and the traceback for who asks for it."""
    if os.environ.get("MOVQ_TRACEBACK"):
        traceback.print_exc()
    text = " ".join(str(error).split())[:300]
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return _complain(f"out of memory. Try a smaller batch size. ({text})", FailureError.exit_code)
    return _complain(
        f"unexpected {type(error).__name__}: {text}. Set MOVQ_TRACEBACK=1 to see where.",
        FailureError.exit_code,
    )
