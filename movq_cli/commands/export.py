"""`movq export`: write a tokenizer in the format of another project, with its config and a model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from movq_cli import checkpoints, files, runs
from movq_cli.console import Console
from movq_cli.files import atomic_write, link_or_copy
from movq_cli.interop import exporter, hub, model_card, onnx_files
from movq_cli.interop.families.compvis import FAMILY as COMPVIS
from movq_cli.models.tokenizer import Tokenizer
from movq_cli.version import __version__

Format = Literal["compvis", "diffusers", "safetensors", "onnx"]

_USE: dict[Format, str] = {
    "compvis": """```python
import yaml
from {module} import {name}

model = {name}(**yaml.safe_load(open("config.yaml"))["model"]["params"], ckpt_path="model.ckpt").eval()
```

`movq import THIS_FOLDER runs/NAME` makes a run folder of it again.""",
    "diffusers": """```python
from diffusers import VQModel

model = VQModel.from_pretrained("THIS_FOLDER")
```

`movq import THIS_FOLDER runs/NAME` makes a run folder of it again.""",
    "onnx": """```python
import onnxruntime

encoder, decoder = (onnxruntime.InferenceSession(f"{name}.onnx") for name in ("encoder", "decoder"))
(codes,) = encoder.run(None, {"images": images})
(images,) = decoder.run(None, {"codes": codes})
```""",
    "safetensors": """```python
from movq_cli import Tokenizer

tokenizer = Tokenizer.load("THIS_FOLDER")
```

`movq reconstruct IMAGES OUT --run THIS_FOLDER --metrics` writes reconstructions and measures them.""",
}
"""How an exported tokenizer is loaded; `{module}` and `{name}` stand for the class that its config names."""


@dataclass(frozen=True)
class ExportRequest:
    """The options of `movq export`."""

    run: Path
    """Run folder or weight file of the tokenizer."""
    out: Path
    """Folder to make."""
    to: Format
    """Format of the files."""


def export(request: ExportRequest, console: Console) -> None:
    """Write a tokenizer in another format, read it again, and compare both on pictures.

    Args:
        request: Options of the command.
        console: Console for the report and the result.

    Raises:
        BadRequestError: There is no such tokenizer, the format cannot hold it, or the folder has other files.
        FailureError: The files cannot be written, or what is read again computes something else.
    """
    existed = files.is_filled(request.out)
    weights = runs.find_weights(request.run, "vq")
    model = checkpoints.load_tokenizer(weights)
    with files.new_folder(request.out, "movq export") as folder:
        notes, difference = _write(model, weights, folder, request.to)
        run = hub.address_of(request.run) or weights.parent
        made = f"Exported by movq {__version__} (`movq export {run} OUT --to {request.to}`)."
        name = run.name if isinstance(run, Path) else run.repository
        card = model_card.of_tokenizer(model, weights, name, made, _use(model, request.to), notes)
        atomic_write(folder / "README.md", card.encode())
        names = sorted(path.name for path in folder.iterdir())
    for note in notes:
        console.log(f"note: {note}")
    if existed:
        console.log(f"{request.out} has the same files already; nothing was written")
    console.log(f"read again and compared: all codes are equal, and pixels in [-1, 1] differ by {difference:.1e}")
    result = {"path": str(request.out), "files": names, "notes": notes, "difference": difference}
    console.result(result, str(request.out))


def _write(model: Tokenizer, weights: Path, folder: Path, to: Format) -> tuple[list[str], float]:
    """Write the files, and return what differs from the tokenizer, in words, and the largest difference of a pixel."""
    if to == "safetensors":
        link_or_copy(weights, folder / weights.name)
        again = checkpoints.load_tokenizer(folder / weights.name)
        pictures = exporter.example_pictures(model.settings)
        codes = model.encode(pictures)
        return [], exporter.require_same(codes, again.encode(pictures), model, again.decode, folder)
    steps: dict[str, tuple[Callable[[Tokenizer, Path], list[str]], Callable[[Tokenizer, Path], float]]] = {
        "compvis": (exporter.export_compvis, exporter.verify),
        "diffusers": (exporter.export_diffusers, exporter.verify),
        "onnx": (onnx_files.export_onnx, onnx_files.verify_onnx),
    }
    write, verify = steps[to]
    return write(model, folder), verify(model, folder)


def _use(model: Tokenizer, to: Format) -> str:
    """Return the text of the model card that says how the tokenizer is loaded."""
    if to != "compvis":
        return _USE[to]
    module, _, name = COMPVIS.config(model.settings)["model"]["target"].rpartition(".")
    return _USE[to].replace("{module}", module).replace("{name}", name)
