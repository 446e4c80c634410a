"""Imports run one way, and only the edge reads presets and touches Typer."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "movq_cli"

LAYERS = [
    {"app", "__main__"},
    {"cli"},
    {"commands"},
    {"api"},
    {"training"},
    {"evaluation"},
    {"sources"},
    {"data"},
    {"ranks"},
    {"presets", "checkpoints", "devices", "runs"},
    {"models"},
    {"console", "files", "signals"},
    {"settings"},
    {"errors", "version"},
]
"""From the edge down: a module imports only from its own layer and from those below."""

DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """Dotted modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("movq_cli"):
            names = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name.removeprefix("movq_cli.") for name in names}
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("movq_cli.") for name in node.names if name.name.startswith("movq_cli.")}
    return found


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imports(path)
        if name.split(".")[0] in DEPTH and DEPTH[name.split(".")[0]] < DEPTH[place(path)]
    ]
    assert not wrong


def test_every_module_has_a_layer() -> None:
    assert {place(path) for path in files()} == DEPTH.keys()


def test_models_know_nothing_of_files_and_the_command_line() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"models", "settings", "errors"}, path


def test_only_the_edge_reads_presets_and_only_the_command_line_touches_typer() -> None:
    for path in files():
        text = path.read_text()
        if place(path) not in {"app", "cli", "commands", "api", "presets"}:
            assert "movq_cli.presets" not in text and "import presets" not in text, path
        if place(path) not in {"app", "cli"}:
            assert "typer" not in text.lower().replace("touches typer", ""), path


def test_the_leaves_load_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, movq_cli.settings, movq_cli.presets, movq_cli.errors, movq_cli.console, movq_cli.runs\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
