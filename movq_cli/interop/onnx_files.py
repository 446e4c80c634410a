"""Exporting a tokenizer to ONNX: one graph from images to codes, and one from codes to images."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from movq_cli.errors import BadRequestError, FailureError
from movq_cli.files import atomic_write
from movq_cli.interop.exporter import example_pictures, require_same
from movq_cli.models.tokenizer import Tokenizer

OPSET = 18
"""Version of ONNX's operators in the graphs."""


class _Encode(nn.Module):
    """Images [B, 3, H, W] to codes [B, h, w, c], as `Tokenizer.encode`, which cannot be traced in inference mode."""

    def __init__(self, model: Tokenizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        return model.quantize.encode(model.quant_conv(model.encoder(images)))


class _Decode(nn.Module):
    """Codes [B, h, w, c] to images [B, 3, H, W], as `Tokenizer.decode`."""

    def __init__(self, model: Tokenizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        vectors = self.model.quantize.decode(codes)
        return self.model.decoder(self.model.post_quant_conv(vectors), vectors).clamp(-1, 1)


def export_onnx(model: Tokenizer, folder: Path) -> list[str]:
    """Write `encoder.onnx`, `decoder.onnx` and `config.json`, the settings of the tokenizer.

    Args:
        model: Tokenizer in eval mode on the CPU.
        folder: Folder for the files.

    Returns:
        What a user of the graphs has to know, in words.

    Raises:
        BadRequestError: The packages that this needs are not installed.
        FailureError: The graphs cannot be made.
    """
    _require_packages()
    settings = model.settings
    images = example_pictures(settings, settings.image_size)
    codes = model.encode(images).clone()  # A tensor of inference mode cannot be traced.
    _write(_Encode(model), images, "images", "codes", folder / "encoder.onnx")
    _write(_Decode(model), codes, "codes", "images", folder / "decoder.onnx")
    atomic_write(folder / "config.json", settings.model_dump_json(indent=2).encode() + b"\n")
    size, shape = settings.image_size, settings.code_shape
    return [
        f"ONNX opset {OPSET}; images are float32 [batch, 3, {size.height}, {size.width}] in [-1, 1], "
        f"and codes int64 [batch, {shape.height}, {shape.width}, {shape.chunks}]; the batch has any size"
    ]


def verify_onnx(model: Tokenizer, folder: Path) -> float:
    """Run the graphs in onnxruntime with batches of another size than the traced one, and compare.

    Returns:
        The largest difference of a pixel in [-1, 1].

    Raises:
        FailureError: The graphs do not compute the same.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors only; warnings about the graph would go to stderr.
    encoder, decoder = (
        onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
        for name in ("encoder.onnx", "decoder.onnx")
    )
    images = example_pictures(model.settings, model.settings.image_size)
    codes = model.encode(images)
    batches = [images[:1], torch.cat([images, images])[1:]]  # one image, and three
    again = [torch.from_numpy(encoder.run(None, {"images": batch.numpy()})[0]) for batch in batches]

    def decode(codes: Tensor) -> Tensor:
        parts = [codes[:1], codes[1:]]
        return torch.cat([torch.from_numpy(decoder.run(None, {"codes": part.numpy()})[0]) for part in parts])

    order = [0, 1, 0, 1]
    return require_same(codes[order], torch.cat(again), model, decode, folder)


def _write(graph: nn.Module, example: Tensor, source: str, result: str, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                (example,),
                dynamo=True,
                input_names=[source],
                output_names=[result],
                dynamic_shapes={source: {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        program.save(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FailureError(f"cannot make {path.name}: {reason}") from None
    finally:
        logger.setLevel(level)


def _require_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BadRequestError(
            f"the format onnx needs the package {error.name}", "Install it: pip install 'movq[onnx]'"
        ) from None
