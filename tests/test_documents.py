"""The documents: links lead somewhere, command lines parse, and the README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from movq_cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "NOTES.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    """The targets of a document's links and pictures."""
    return [match[2] for match in LINK.finditer(prose(document))]


def broken_links(document: Path) -> list[str]:
    """The relative links of a document that lead nowhere."""
    broken = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def command_lines(document: Path) -> list[str]:
    """The command lines of movq in a document's fenced blocks."""
    lines = []
    for _, block in FENCE.findall(document.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            called = re.match(r"(?:\$ )?(?:movq|torchrun .* -m movq_cli --) (.+)", line)
            if called:
                lines.append(called[1])
    return lines


def parse(line: str) -> None:
    """Parse the arguments of movq as the command line does, and run nothing."""
    command, arguments = typer.main.get_command(app), shlex.split(line, comments=True)
    context = command.make_context("movq", list(arguments), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        # A group leaves the name of a command and its arguments unparsed.
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    assert broken_links(document) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("# A `b` c\n[1](#a-b-c) [2](#other) [3](none.md) [4](document.md#x) [5](https://a.b/c)\n")
    assert broken_links(document) == ["#other", "none.md", "document.md#x"]


LINES = [(document.name, line) for document in DOCUMENTS for line in command_lines(document)]


@pytest.mark.parametrize(("document", "line"), LINES, ids=[f"{name}: {line}" for name, line in LINES])
def test_every_command_line_in_a_document_parses(document: str, line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["sample --no-such-option out", "no-such-command", "sample --n many out", "evaluate"])
def test_a_wrong_command_line_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid integer|missing"):
        parse(line)


def test_the_readme_shows_the_commands_of_the_paper() -> None:
    lines = command_lines(ROOT / "README.md")
    assert "train-vq --preset ffhq" in lines
    assert "sample --steps 8 --n 60000 out/" in lines
    assert "evaluate --fid real/ fake/" in lines


def test_the_readme_tells_a_developer_what_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in ("make demo", "make test", "make lint"):
        assert re.search(rf"^{target}\b", text, re.MULTILINE), target


def test_the_readme_has_about_900_words() -> None:
    lines = [line for line in prose(ROOT / "README.md").splitlines() if not line.startswith("|")]
    words = re.findall(r"\S+", LINK.sub(r"\1", "\n".join(lines)))
    assert 700 <= len(words) <= 1000, len(words)


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in reached or document.suffix != ".md":
            continue
        reached.add(document)
        paths = [link.partition("#")[0] for link in links(document) if not link.startswith("http")]
        waiting += [(document.parent / path).resolve() for path in paths if path]
    assert {document.resolve() for document in DOCUMENTS} <= {document.resolve() for document in reached}
