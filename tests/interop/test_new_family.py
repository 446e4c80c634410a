"""A family of public weights is one file: these tests perform the recipe of `docs/extending.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from movq_cli.api import Tokenizer
from movq_cli.commands.import_weights import ImportRequest, import_weights
from movq_cli.console import Console
from movq_cli.interop import families, importer
from movq_cli.interop.importer import ImportOptions
from tests.interop import peers

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of the recipe, in a folder in which families are searched."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## A family of public weights")[1]
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "paperclip.py").write_text(section.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    importer.all_families.cache_clear()
    yield
    importer.all_families.cache_clear()


@pytest.mark.usefixtures("recipe")
def test_the_recipe_of_a_family_imports_its_weights(tmp_path: Path) -> None:
    model = peers.tokenizer(peers.varied(image_range="0,1"))
    state = {
        re.sub(r"\bdown\.", "levels.", re.sub(r"\bup\.", "levels.", name)).replace(".nin_shortcut.", ".skip."): tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "config.yaml").write_text("clip_size: 16\nentries: 20\n")
    request = ImportRequest(tmp_path / "weights.safetensors", tmp_path / "run", ImportOptions())
    import_weights(request, Console(quiet=True))
    again = Tokenizer.load(tmp_path / "run")
    assert again.settings == model.settings
    assert torch.equal(again.encode(peers.images()), model.encode(peers.images()))
