"""An image that the memory does not suffice to decode is named, and is not taken for a damaged one."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.images import ImageOutOfMemoryError, encode_png
from movq_cli.errors import FailureError
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.sources import stream
from movq_cli.sources.open import open_source


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit this process to 200 MiB more than it has; the large image of the tests takes 396 MB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small images, and one of 132 megapixels between them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("a", "c"):
        (folder / f"{name}.png").write_bytes(encode_png(Image.new("RGB", (9, 9))))
    Image.new("P", (11000, 12000)).save(folder / "b.gif")
    return folder


def test_a_large_image_of_a_stream_is_named_and_the_others_are_decoded(pictures: Path) -> None:
    with little_memory():
        found = [image for _, image in stream.decoded(open_source(str(pictures)), range(3))]
    assert [isinstance(image, ImageOutOfMemoryError) for image in found] == [False, True, False]


def test_a_metric_is_not_computed_without_an_image_that_another_machine_could_decode(pictures: Path) -> None:
    images = ImageSet("real", str(pictures), "train", console=Console(quiet=True))
    with little_memory(), pytest.raises(FailureError, match=r"real: out of memory at b\.gif"):
        list(images.read(range(3)))
    assert images.unreadable == {}


def test_a_set_is_not_prepared_without_it_and_the_remedy_works(pictures: Path, tmp_path: Path) -> None:
    request = PrepareRequest(str(pictures), tmp_path / "data", val="1")
    with little_memory(), pytest.raises(FailureError, match=r"out of memory at the image b\.gif.*--max-pixels"):
        prepare(request, Console(quiet=True))
    small = PrepareRequest(str(pictures), tmp_path / "small", Preprocessing(max_pixels=10**6), "1")
    with little_memory():
        prepare(small, Console(quiet=True))
    assert "b.gif" in (tmp_path / "small" / "rejects.jsonl").read_text()
