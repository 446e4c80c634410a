"""Imports go one way: modules form no circles, layers import only downwards, and presets are read at the edge alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "movq_cli"

LAYERS = [
    {"__init__"},
    {"app", "__main__"},
    {"cli"},
    {"commands"},
    {"api"},
    {"training"},
    {"report"},
    {"doctor"},
    {"evaluation"},
    {"sources"},
    {"data"},
    {"agreement", "launcher", "ranks"},
    {"interop", "presets", "checkpoints", "devices", "runs", "run_changes", "run_manifest", "run_history"},
    {"models"},
    {"digested_lines", "digests"},
    {"console", "cores", "files", "folder_locks", "paths", "signals", "streams", "strict_yaml", "text_encoding"},
    {"settings", "training_settings", "setting_types", "setting_names", "image_size"},
    {"errors", "version"},
]
"""From the top down: a module imports only from its own layer and from the layers below it."""

DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

Graph = dict[str, set[str]]
"""For each module its imports, wherever in the file, those under TYPE_CHECKING included."""


def import_graph(package: Path) -> Graph:
    """Read the imports between the modules of a package, by dotted names such as `movq_cli.models.priors`."""
    root = package.name
    paths = {module_name(path, package): path for path in package.rglob("*.py")}
    return {name: imported_modules(path, root, paths.keys()) for name, path in paths.items()}


def module_name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, root: str, modules: Collection[str]) -> set[str]:
    """Return the modules of the package that a file imports; a name of a module counts as that module."""
    imports: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            source = node.module or ""
            for alias in node.names:
                name = f"{source}.{alias.name}"
                imports.add(name if name in modules else source)
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
    return {name for name in imports if name == root or name.startswith(f"{root}.")}


def circles(graph: Graph) -> list[set[str]]:
    """Return the strongly connected components of more than one module, and modules that import themselves."""
    reachable = {name: reachable_from(name, graph) for name in graph}
    on_circle = [name for name in graph if name in reachable[name]]
    components = {
        frozenset(other for other in on_circle if name in reachable[other] and other in reachable[name])
        for name in on_circle
    }
    return [set(component) for component in components]


def reachable_from(start: str, graph: Graph) -> set[str]:
    """Return the modules to which a path of at least one import leads."""
    reached: set[str] = set()
    frontier = [start]
    while frontier:
        for name in graph[frontier.pop()] - reached:
            reached.add(name)
            frontier.append(name)
    return reached


def layer(module: str) -> str:
    """Return the part of a module's name that has a layer."""
    return module.split(".")[1] if "." in module else "__init__"


GRAPH = import_graph(PACKAGE)


def test_layers_import_only_downwards() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if DEPTH[layer(name)] < DEPTH[layer(module)]
    ]
    assert not wrong


def test_no_module_imports_a_name_from_the_package_itself() -> None:
    """`__init__` gives Tokenizer and Prior to users; inside the package they come from their own modules."""
    assert [module for module, names in GRAPH.items() if "movq_cli" in names] == []


def test_modules_form_no_circles() -> None:
    assert circles(GRAPH) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": "from p import b", "b": "import p.c", "c": ""}, []),
        (
            {"a": "from p.b import x", "b": "def f() -> None:\n    from p.c import y", "c": "import p.a"},
            ["a", "b", "c"],
        ),
        ({"a": "from p import name", "__init__": "from p.a import x"}, ["", "a"]),
        (
            {
                "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
                "b": "from p.a import A",
            },
            ["a", "b"],
        ),
    ],
)
def test_circles_are_found_wherever_the_import_is(tmp_path: Path, files: dict[str, str], expected: list[str]) -> None:
    package = tmp_path / "p"
    package.mkdir()
    for name, text in ({"__init__": ""} | files).items():
        (package / f"{name}.py").write_text(text)
    modules = {f"p.{name}" if name else "p" for name in expected}
    assert circles(import_graph(package)) == ([modules] if modules else [])


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in GRAPH} == DEPTH.keys()


def test_models_import_only_settings_and_errors() -> None:
    for module, names in GRAPH.items():
        if layer(module) == "models":
            settings = {"settings", "setting_types", "training_settings"}
            assert {layer(name) for name in names} <= {"models", "errors"} | settings, module


def test_only_the_edge_reads_presets_and_only_the_command_line_imports_typer() -> None:
    for module, names in GRAPH.items():
        if layer(module) not in {"app", "cli", "commands", "api", "presets"}:
            assert "movq_cli.presets" not in names, module
    for path in PACKAGE.rglob("*.py"):
        if layer(module_name(path, PACKAGE)) not in {"app", "cli"}:
            assert "typer" not in path.read_text().lower(), path


def test_command_line_arguments_are_read_at_the_edge_alone() -> None:
    readers = {module_name(path, PACKAGE) for path in PACKAGE.rglob("*.py") if "sys.argv" in path.read_text()}
    assert {layer(module) for module in readers} <= {"app", "cli"}


def test_the_lower_layers_load_without_torch() -> None:
    modules = "movq_cli, movq_cli.settings, movq_cli.presets, movq_cli.errors, movq_cli.console, movq_cli.runs"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
