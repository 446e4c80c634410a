"""The command line: its frozen options, its help and completion without torch, and one line for each bad request."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
from PIL import Image

from movq_cli import app, presets

if TYPE_CHECKING:
    from tests.conftest import Movq

FROZEN = Path(__file__).parent / "command_line.txt"
DOCS = Path(__file__).parents[1] / "docs"
COMMANDS = (
    *(
        "prepare",
        "train-vq",
        "train-prior",
        "reconstruct",
        "sample",
        "evaluate",
        "check",
        "import",
        "export",
        "weights",
    ),
    "presets",
)


def declared(command: Any, name: str) -> Iterator[str]:
    """Yield one line for each command and for each of its parameters, below a command."""
    for parameter in command.params:
        if parameter.name != "help":
            default = parameter.default() if inspect.isfunction(parameter.default) else parameter.default
            yield f"{name}: {' '.join((*parameter.opts, *parameter.secondary_opts))} = {default!r}"
    for child in sorted(getattr(command, "commands", {})):
        yield f"{name} {child}"
        yield from declared(command.commands[child], f"{name} {child}")


def test_the_command_line_is_the_frozen_one() -> None:
    """Scripts depend on these names. If a change is intended, write the new list to the file."""
    current = list(declared(typer.main.get_command(app.app), "movq"))
    assert current == FROZEN.read_text().splitlines(), "\n".join(current)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_neither_torch_nor_numpy(command: str) -> None:
    code = (
        "import sys\nfrom movq_cli import app\n"
        f"sys.argv = ['movq', *{command.split()!r}, '--help']\n"
        "try:\n    app.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'torchvision', 'lpips'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def complete(words: str, folder: Path) -> list[str]:
    """Return what bash would offer to complete the last word, from a process that must not load torch."""
    code = (
        "import sys\nfrom movq_cli import app\n"
        "sys.argv = ['movq']\n"
        "try:\n    app.main()\n"
        "finally:\n    assert not {'torch', 'numpy', 'PIL', 'torchvision', 'lpips'} & set(sys.modules), 'heavy'"
    )
    request = {"_MOVQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **request},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("movq presets show ffhq-", ["ffhq-1ch", "ffhq-2ch", "ffhq-8ch", "ffhq-own", "ffhq-plus"]),
        ("movq train-vq --preset kand", ["kandinsky-102m", "kandinsky-270m", "kandinsky-67m"]),
        ("movq train-prior -p dig", ["digits"]),
        ("movq sample --guidance-schedule l", ["linear"]),
        ("movq sample --top", ["--top-k", "--top-p"]),
        ("movq train", ["train-vq", "train-prior"]),
        ("movq presets show none-such", []),
    ],
)
def test_the_shell_completes_commands_options_and_names_without_torch(
    tmp_path: Path, words: str, expected: list[str]
) -> None:
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "ffhq-own.yaml").write_text("base: ffhq\n")
    assert complete(words, tmp_path) == expected


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_reference_in_docs_is_up_to_date_for_any_terminal(columns: str) -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generate.py", "--check"],
        env={**os.environ, "COLUMNS": columns, "NO_COLOR": "1", "LANG": "C", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_reference_is_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    for name in ("generate.py", "cli.md", "settings.md"):
        shutil.copy(DOCS / name, tmp_path / name)
    command = [sys.executable, str(tmp_path / "generate.py")]
    with (tmp_path / "cli.md").open("a") as file:
        file.write("an edit by hand\n")
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: not up to date: docs/cli.md; run `make docs`\n"
    subprocess.run(command, check=True)
    assert (tmp_path / "cli.md").read_text() == (DOCS / "cli.md").read_text()


def test_the_reference_has_every_command_option_and_setting() -> None:
    commands, settings = (DOCS / "cli.md").read_text(), (DOCS / "settings.md").read_text()
    for name in FROZEN.read_text().splitlines():
        command, _, parameter = name.partition(": ")
        assert command == "movq" or f"\n## {command}\n" in commands
        section = commands.partition(f"\n## {command}\n")[2].partition("\n## ")[0] or commands
        for flag in parameter.partition(" = ")[0].split():
            assert not flag.startswith("-") or f"`{flag}`" in section, name
    for name, field in presets.settings_fields():
        assert f"| `{name}` |" in settings or f"\n## {name}\n" in settings
        assert (field.description or "").partition(";")[0] in settings or f"\n## {name}\n" in settings


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_every_option_says_what_it_is_and_its_default(command: str) -> None:
    group = typer.main.get_command(app.app)
    for parameter in group.commands[command].params:  # type: ignore[attr-defined]
        if parameter.name != "help":
            assert parameter.help, f"{command} {parameter.name}"
            shown = parameter.required or parameter.default is not None or "[default:" in parameter.help
            optional = parameter.name in {
                "val_list",
                "val_labels",
                "codes",
                "grid",
                "out",
                "overrides",
                "mask",
                "mask_ratio",
                "copies",
                "stats",
                "figure",
            }
            assert shown or optional, f"{command} {parameter.name} has a default that its help does not tell"


def line(text: str) -> str:
    """Return the error line of a command, which must be the only one."""
    errors = [found for found in text.splitlines() if found.startswith("error: ")]
    assert len(errors) == 1, text
    return errors[0]


def test_the_three_command_lines_of_the_readme_say_what_is_missing(movq: Movq, tmp_path: Path) -> None:
    assert "data/ffhq" in line(movq("train-vq", "--preset", "ffhq", code=2).stderr)
    assert "movq train-prior" in line(movq("sample", "--steps", "8", "--n", "60000", "out/", code=2).stderr)
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (32, 32), (number * 50, 0, 0)).save(tmp_path / name / f"{number}.png")
    done = movq("evaluate", "--fid", "real/", "fake/", code=2, https_proxy="http://127.0.0.1:9", no_proxy="")
    assert "weights-inception-2015-12-05-6726825d.pth" in line(done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "nowhere"], ["nowhere"]),
        (["prepare", "empty"], ["empty"]),
        (["prepare", "text.png", "out"], ["text.png"]),
        (["prepare", "bad", "out"], ["bad", "none"]),
        (["prepare", "good", "out", "--val", "2.5"], ["2.5"]),
        (["prepare", "good", "out", "--background", "300,0,0"], ["300,0,0"]),
        (["prepare", "good", "out", "--compression", "zip"], ["'zip'", "none", "zlib"]),
        *(
            (["prepare", "good", "out", "--shard", text], [repr(text), "3/8"])
            for text in ("2", "9/8", "0/0", "a/b", "-1/2")
        ),
        (["train-vq", "--preset", "ffqh"], ["ffqh", "'ffhq'"]),
        (["train-vq", "--preset", "none.yaml"], ["none.yaml"]),
        (["train-vq", "--preset", "ffhq", "-o", "vq.codebok_size=3"], ["vq.codebok_size", "vq.codebook_size"]),
        (["train-vq", "--preset", "ffhq", "-o", "vq.codebook_size=many"], ["vq.codebook_size", "'many'"]),
        (["train-vq", "--preset", "ffhq", "-o", "vq.codebook_size"], ["name=value"]),
        (["train-vq", "--preset", "ffhq", "-o", "vq.chunks=3"], ["256", "3"]),
        (["train-vq", "--preset", "ffhq", "--data", "good"], ["good"]),
        (["train-vq", "--preset", "digits", "--device", "cuda:77"], ["cuda:77", "--device cpu"]),
        (["train-prior", "--preset", "digits"], ["data/digits"]),
        (["reconstruct", "good", "out"], ["train-vq"]),
        (["reconstruct", "good", "out", "--run", "empty"], ["empty", "tokenizer.safetensors"]),
        (["reconstruct", "good", "out", "--run", "text.png"], ["text.png"]),
        (["reconstruct", "good", "out", "--split", "middle"], ["middle"]),
        (["sample", "out", "--run", "nowhere"], ["nowhere"]),
        (["sample", "out", "--steps", "0"], ["--steps", "1", "0"]),
        (["sample", "out", "--temperature", "nan"], ["--temperature"]),
        (["reconstruct", "good", "out", "--mask-ratio", "0.5", "--steps", "-1"], ["--steps", "-1"]),
        (["train-prior", "--preset", "digits", "--mode", "beam"], ["prior.mode", "'beam'", "mask, auto, depth"]),
        (["evaluate", "good", "nowhere"], ["nowhere"]),
        (["evaluate", "good", "empty", "--psnr"], ["empty"]),
        (["presets", "show", "nothing"], ["nothing"]),
    ],
)
def test_a_bad_request_is_one_line_that_names_the_problem(
    movq: Movq, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "good" / f"{number}.png")
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "text.png").write_text("no image")
    done = movq(*arguments, code=2)
    assert done.stdout == ""
    for word in words:
        assert word in line(done.stderr)


def test_usage_errors_are_bad_requests_too(movq: Movq) -> None:
    assert "--preset" in movq("train-vq", code=2).stderr
    assert "No such command" in movq("trian", code=2).stderr
    assert "valid integer" in movq("sample", "out", "--n", "x", code=2).stderr


def test_a_run_folder_without_a_checkpoint_says_how_to_resume(movq: Movq, trained: Path) -> None:
    shapes = trained / "pictures"
    run = trained / "runs" / "tiny-vq"
    for name in ("checkpoint.pt", "tokenizer.safetensors"):
        (run / name).unlink()
    text = line(movq("reconstruct", shapes, "out", "--run", run, code=2).stderr)
    assert "has lost its tokenizer.safetensors" in text
    assert "movq train-vq" in text


def test_damaged_files_are_named(movq: Movq, tiny_yaml: Path, trained: Path) -> None:
    shapes, run = trained / "pictures", trained / "runs" / "tiny-vq"
    weights = run / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "tokenizer.safetensors" in line(movq("reconstruct", shapes, "out", code=2).stderr)
    (run / "checkpoint.pt").write_bytes(b"PK")
    again = movq("train-vq", "--preset", tiny_yaml, "-o", "train_vq.steps=20", code=2)
    assert "checkpoint.pt" in line(again.stderr)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("chattr") is None, reason="root may write anywhere")
def test_an_unwritable_folder_fails_without_a_traceback(movq: Movq, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in line(movq("prepare", shapes, "file/data", code=1).stderr)
    assert "/proc" in line(movq("prepare", shapes, "/proc/data", code=1).stderr)


def test_an_interrupted_pipe_is_no_error_message(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m movq_cli presets show ffhq | head -n 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr


def test_a_dry_run_needs_no_data_and_prints_the_parameters(movq: Movq) -> None:
    import json

    plan = json.loads(movq("train-vq", "--preset", "vqgan-ffhq", "--dry-run", "--json").stdout)
    assert plan["parameters"] == {
        "encoder": 29_298_176,
        "decoder": 42_449_795,
        "quantizer": 262_144,
        "quant_conv": 65_792,
        "post_quant_conv": 65_792,
        "total": 72_141_699,
    }
    assert (plan["discriminator"], plan["lpips"]) == (2_765_633, 14_716_160)
    plan = json.loads(movq("train-prior", "--preset", "ffhq", "--dry-run", "--json").stdout)
    assert plan["parameters"]["total"] == 307_030_272
    assert plan["steps"] == 187_500
    assert [plan[name] for name in ("images", "views", "steps_per_epoch")] == [None] * 3
