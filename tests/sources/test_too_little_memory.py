"""An image that the memory does not suffice to decode is named, and is not taken for a damaged one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from movq_cli.data.images import encode_png

# A new process, because one that has freed much memory decodes the large image in that.
SCRIPT = """
import json, resource, sys
from pathlib import Path
from movq_cli.commands.prepare import PrepareRequest, prepare
from movq_cli.commands.prepare_plan import Preprocessing
from movq_cli.console import Console
from movq_cli.data.images import ImageOutOfMemoryError
from movq_cli.errors import FailureError
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.sources import stream
from movq_cli.sources.open import open_source

pictures, out, quiet = sys.argv[1], Path(sys.argv[2]), Console(quiet=True)
list(stream.decoded(open_source(pictures), [0, 2]))  # The stacks of the decoding threads are not part of the limit.
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20,) * 2)  # The large image takes 396 MB.

def message_of(work):
    try:
        work()
    except FailureError as error:
        return str(error)

streamed = [isinstance(image, ImageOutOfMemoryError) for _, image in stream.decoded(open_source(pictures), range(3))]
images = ImageSet("real", pictures, "train", console=quiet)
evaluated = message_of(lambda: list(images.read(range(3))))
prepared = message_of(lambda: prepare(PrepareRequest(pictures, out / "all", val="1"), quiet))
prepare(PrepareRequest(pictures, out / "small", Preprocessing(max_pixels=10**6), "1"), quiet)
rejects = (out / "small" / "rejects.jsonl").read_text()
print(json.dumps([streamed, images.unreadable, evaluated, prepared, rejects]))
"""


@pytest.mark.slow
def test_a_large_image_is_named_and_the_remedy_works(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "c"):
        (folder / f"{name}.png").write_bytes(encode_png(Image.new("RGB", (9, 9))))
    Image.new("P", (11000, 12000)).save(folder / "b.gif")
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    streamed, unreadable, evaluated, prepared, rejects = json.loads(done.stdout.splitlines()[-1])
    assert streamed == [False, True, False]  # The others are decoded.
    assert unreadable == {}  # Another machine could decode the image, so that no metric is computed without it.
    assert "real: out of memory at b.gif" in evaluated
    assert "out of memory at the image b.gif" in prepared
    assert "--max-pixels" in prepared
    assert "b.gif" in rejects
