"""docs/formats.md names every file that the commands write, and every field in these files."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors import safe_open

from movq_cli.checkpoints import DiscriminatorHeader, PriorHeader, TokenizerHeader
from movq_cli.console import Console
from movq_cli.data.code_cache import CodeCacheHeader
from movq_cli.data.sample_files import SampleManifest
from movq_cli.data.shards import DatasetManifest
from movq_cli.evaluation.feature_cache import cached_features
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.evaluation.pretrained import WEIGHTS
from movq_cli.run_manifest import ImportRecord, RunManifest
from movq_cli.settings import Preset, SampleSettings
from tests.conftest import run_movq

DOCUMENT = Path(__file__).parents[1] / "docs" / "formats.md"


def sections() -> dict[str, str]:
    """The text below each heading of the second level, with its subsections."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def missing(names: Iterable[str], section: str) -> list[str]:
    """The names that stand in no code span of a section."""
    named = {part for span in re.findall(r"`([^`\n]+)`", sections()[section]) for part in (span, Path(span).name)}
    return sorted(set(names) - named)


def documented_fields(section: str, heading: str) -> set[str]:
    """The names in the first column of the table with this heading in its first cell."""
    lines = iter(sections()[section].splitlines())
    assert any(line.startswith(f"| {heading} |") for line in lines), heading
    next(lines)
    found: set[str] = set()
    for line in lines:
        if not line.startswith("|"):
            break
        found |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


@pytest.mark.parametrize(
    ("model", "section"),
    [
        (DatasetManifest, "Prepared set"),
        (RunManifest, "Run folder"),
        (Preset, "Run folder"),
        (TokenizerHeader, "Weight files"),
        (DiscriminatorHeader, "Weight files"),
        (ImportRecord, "Run folder"),
        (PriorHeader, "Weight files"),
        (CodeCacheHeader, "Code cache"),
        (SampleSettings, "Samples"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_field_of_a_manifest_or_header_is_documented(model: type[BaseModel], section: str) -> None:
    assert missing(model.model_fields, section) == []


def test_no_documented_field_of_a_manifest_or_header_has_gone() -> None:
    assert documented_fields("Weight files", "field of a tokenizer") == set(TokenizerHeader.model_fields)
    assert documented_fields("Weight files", "field of a discriminator") == set(DiscriminatorHeader.model_fields)
    assert documented_fields("Weight files", "field of a prior") == set(PriorHeader.model_fields)
    assert documented_fields("Code cache", "field of `header.json`") == set(CodeCacheHeader.model_fields)
    assert documented_fields("Samples", "field of the manifest") == set(SampleManifest.model_fields)
    assert documented_fields("Prepared set", "field") == set(DatasetManifest.model_fields)
    assert documented_fields("Run folder", "field") == set(RunManifest.model_fields)


def test_a_field_that_is_not_documented_is_found() -> None:
    assert missing(["format", "no_such_field"], "Prepared set") == ["no_such_field"]


def test_every_file_and_field_of_a_prepared_set_is_documented(trained_once: Path) -> None:
    data = trained_once / "data"
    for name in ("plan.json", "manifest.json"):
        assert missing(keys(json.loads((data / name).read_text())), "Prepared set") == []
    with zipfile.ZipFile(data / "val" / "00000.zip") as archive:
        index = json.loads(archive.read("dataset.json"))
    assert documented_fields("Prepared set", "field of `dataset.json`") == set(index)
    assert missing([path.name for path in data.iterdir() if path.is_file()], "Prepared set") == []


def test_every_field_of_a_reject_is_documented(trained_once: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no image")
    for number in range(2):
        source = trained_once / "pictures" / "bar" / f"{number:03d}.png"
        (tmp_path / f"{number}.png").write_bytes(source.read_bytes())
    run_movq(tmp_path, "prepare", tmp_path, tmp_path / "set", "--size", "16", "--val", "1")
    (line,) = (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()
    assert missing(json.loads(line), "Prepared set") == []


@pytest.mark.parametrize("name", ["tiny-vq", "tiny-prior"])
def test_every_file_and_field_of_a_run_is_documented(trained_once: Path, name: str) -> None:
    run = trained_once / "runs" / name
    listed = [f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()]
    # A picture and an earlier checkpoint are named by their step, and are documented with an example.
    assert missing(listed, "Run folder") == [] or set(missing(listed, "Run folder")) <= {"pictures/", "checkpoints/"}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        nested = [key for part in ("training", "validation") for key in line.get(part, ())]
        assert missing([*line, *nested], "Run folder") == []
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert documented_fields("Run folder", "field") >= {"step"}
    assert missing([*state, *state["best"], *state["stage"]], "Run folder") == []
    assert missing([key for part in state["stage"].values() for key in part], "Run folder") == []


def test_the_metadata_of_a_weight_file_are_documented(trained_once: Path) -> None:
    for name in ("tokenizer", "prior"):
        with safe_open(trained_once / "runs" / "tiny-prior" / f"{name}.safetensors", framework="pt") as file:
            (entry,) = file.metadata().items()
        assert missing([entry[0], *json.loads(entry[1])], "Weight files") == []
    assert missing(json.loads(entry[1])["shape"], "Weight files") == []


def test_every_file_of_a_code_cache_is_documented_with_its_type(trained_once: Path) -> None:
    (cache,) = (trained_once / "runs" / "tiny-vq" / "tokens").glob("*-train")
    assert missing([path.name for path in cache.iterdir()], "Code cache") == []
    codes, labels = np.load(cache / "codes.npy"), np.load(cache / "labels.npy")
    assert (codes.dtype, codes.ndim, labels.dtype, labels.ndim) == (np.uint16, 4, np.int64, 1)
    assert "uint16 [V, h, w, c]" in sections()["Code cache"]
    assert "int64 [V]" in sections()["Code cache"]


def test_every_field_of_samples_is_documented(trained_once: Path, ordered_once: Path, tmp_path: Path) -> None:
    for run in (trained_once / "runs" / "tiny-prior", ordered_once / "auto"):
        run_movq(tmp_path, "sample", f"{run.name}.npz", "--n", "2", "--run", run)
        manifest = json.loads((tmp_path / f"{run.name}.npz.manifest.json").read_text())
        assert missing([*keys(manifest), *keys(manifest["images"][0])], "Samples") == []
    with np.load(tmp_path / "tiny-prior.npz") as arrays:
        assert {name: (array.dtype, array.ndim) for name, array in arrays.items()} == {
            "arr_0": (np.uint8, 4),
            "arr_1": (np.int64, 1),
        }
    assert missing(["arr_0", "arr_1"], "Samples") == []


def test_every_field_of_a_result_is_documented(trained_once: Path, tmp_path: Path) -> None:
    data, tokenizer = trained_once / "data", trained_once / "runs" / "tiny-vq"
    run_movq(tmp_path, "reconstruct", data, "fake", "--split", "val", "--run", tokenizer, "--codes", "codes")
    metrics = ("--psnr", "--ssim", "--codebook", "--preset", "ffhq", "--crop", "16", "--out", "result.json")
    run_movq(tmp_path, "evaluate", *metrics, "--run", tokenizer, data, "fake")
    result = json.loads((tmp_path / "result.json").read_text())
    assert missing(keys(result), "Results of evaluate") == []
    code_map = np.load(next((tmp_path / "codes").rglob("*.npy")))
    assert (code_map.dtype, code_map.ndim) == (np.uint16, 3)


def test_every_field_of_the_protocol_in_the_source_is_documented() -> None:
    """Metrics that need pretrained weights write fields that the results of these tests do not have."""
    source = "".join(path.read_text() for path in (DOCUMENT.parents[1] / "movq_cli" / "evaluation").rglob("*.py"))
    written = set(re.findall(r'protocol(?:\["|\.setdefault\(")(\w+)"', source))
    assert written, "the fields of the protocol are written in another way now"
    assert missing(written, "Results of evaluate") == []


class Brightness:
    """A feature extractor of two numbers."""

    name = "brightness"
    width = 2
    digest = "0" * 64

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))[:, :2]


def test_every_file_and_field_of_the_feature_cache_is_documented(trained_once: Path, tmp_path: Path) -> None:
    console = Console(quiet=True)
    images = ImageSet("real", str(trained_once / "data"), "val", console=console)
    device = torch.device("cpu")
    features = cached_features(images, Brightness(), tmp_path, batch_size=4, device=device, console=console)
    features.statistics(device)
    (folder,) = tmp_path.iterdir()
    assert missing([path.name for path in folder.iterdir()], "Feature cache") == []
    assert missing(json.loads((folder / "set.json").read_text()), "Feature cache") == []
    with np.load(folder / "statistics.npz") as arrays:
        assert missing(arrays, "Reference statistics") == []


def test_every_file_of_pretrained_weights_is_documented() -> None:
    assert missing([known.file for known in WEIGHTS.values()], "Pretrained weights") == []


def keys(record: dict[str, Any]) -> Iterator[str]:
    """The names of all fields, nested ones too; `settings` of a run are documented by the presets."""
    by_name = ("sizes", "counts", "shards", "averaged", "variants", "versions")
    for name, value in record.items():
        yield name
        if isinstance(value, dict) and name not in by_name:
            yield from keys(value)
