"""Reading weights from any file or folder in which people publish them; nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from movq_cli.errors import BadRequestError
from movq_cli.files import sha256
from movq_cli.interop import configs, torch_files
from movq_cli.interop.hub import Repository

_DOWNLOAD = "Download the weights again."
_HEAD_BYTES = 512
_WEB_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_MAX_INDEX_BYTES = 2**24
_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")

_INDEX = re.compile(r".*\.index(\.\w+)?\.json")
"""Names of the index of several weight files; the part before `.json` is the variant, such as fp16."""

_NAMES_IN_FOLDERS = tuple(
    f"{stem}.{suffix}"
    for suffix in ("safetensors", "safetensors.index.json", "bin", "bin.index.json", "safetensors.index.fp16.json")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
)
"""Names of weight files in the folders of diffusers and transformers; the first one that exists is read."""

_NESTED_CONFIGS = tuple(f"{part}/config.json" for part in ("first_stage", "movq", "vqgan", "vqvae"))
"""Configs of tokenizers in the folder of a pipeline, which an error then names."""


@dataclass(frozen=True)
class Contents:
    """The content of a weight file, or of the weight files of a folder."""

    path: Path
    """The file that was read; of several files, their index."""
    values: Mapping[Any, Any]
    """Tensors by name, or what a training program stored: dictionaries of them beside other values."""
    sha256: str
    """SHA-256 of the file; of several files, that of the lines `NAME SHA-256`."""

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path.parent


def read(source: Path) -> Contents:
    """Read a weight file, or the weight files of a folder, with all tensors on the CPU.

    Args:
        source: File of torch.save or safetensors, index of several such files, or a folder that holds one of these.

    Raises:
        BadRequestError: The source is missing or damaged, is something else than weights, or could run code.
    """
    if not source.exists():
        raise BadRequestError(f"there are no weights at {source}", "Name a weight file, or the folder of one.")
    path = _file_in_folder(source) if source.is_dir() else source
    if not path.is_file():
        raise BadRequestError(f"{path} is not a regular file", "Name a weight file.")
    try:
        if _INDEX.fullmatch(path.name):
            return _read_shards(path)
        values = _read_file(path)
        return Contents(path, values, sha256(path))
    except OSError as error:
        raise BadRequestError(f"{path} cannot be read: {error.strerror or error}", _DOWNLOAD) from None


def download(repository: Repository) -> Path:
    """Download the files of a repository that an import reads, and no others: weights and the config beside them.

    Returns:
        The path of the weight file, or of the index of several ones.

    Raises:
        BadRequestError: The folder holds no weights, or several among which it has to be chosen.
        FailureError: A download fails.
    """
    name = repository.file or _choose(repository.files, str(repository.address))
    path = repository.download(name)
    shards = set(_places(path).values()) if _INDEX.fullmatch(name) else set()
    for shard in sorted(shards & repository.files.keys()):
        repository.download(shard)
    config = next((beside for beside in configs.names_beside(name) if beside in repository.files), None)
    if config is not None:
        repository.download(config)
    return path


def _file_in_folder(folder: Path) -> Path:
    """Return the weight file or index in a folder."""
    files = [path.name for path in folder.iterdir() if path.is_file()]
    files += [name for name in _NESTED_CONFIGS if (folder / name).is_file()]
    return folder / _choose(files, str(folder))


def _choose(files: Collection[str], folder: str) -> str:
    """Return the name of the weight file or index among the files of a folder, which are relative to it."""
    for name in _NAMES_IN_FOLDERS:
        if name in files:
            return name
    weights = sorted(name for name in files if "/" not in name and name.endswith(_SUFFIXES))
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise BadRequestError(
            f"{folder} holds {len(weights)} weight files", f"Name one of them, for example {folder}/{weights[0]}."
        )
    nested = [name for name in _NESTED_CONFIGS if name in files]
    hint = f"Name {folder}/{Path(nested[0]).parent}." if nested else "Name a weight file, or the folder of one."
    raise BadRequestError(f"{folder} holds no weight file", hint)


def _places(index: Path) -> dict[str, str]:
    """Return the names of the files that hold the tensors, by the names of the tensors, as an index says."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: str(shard) for name, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadRequestError(f"{index} is not an index of weight files ({reason})", _DOWNLOAD) from None


def _read_shards(index: Path) -> Contents:
    """Read the files that an index names, and check that they hold what it says."""
    places = _places(index)
    shards = sorted(set(places.values()))
    values: dict[str, Tensor] = {}
    lines = []
    for shard in shards:
        path = index.parent / shard
        if Path(shard).name != shard:
            raise BadRequestError(f"{index} names {shard!r}, which is not in its folder", _DOWNLOAD)
        if not path.is_file():
            raise BadRequestError(f"{path} is missing, which {index.name} names", _DOWNLOAD)
        part = _read_file(path)
        wrong = [str(name) for name in part if places.get(name) != shard]
        if wrong:
            raise BadRequestError(f"{path} holds {wrong[0]}, which {index.name} does not say", _DOWNLOAD)
        values |= part
        lines.append(f"{shard} {sha256(path)}\n")
    missing = [name for name in places if name not in values]
    if missing:
        raise BadRequestError(f"{index} names {missing[0]}, which no file holds", _DOWNLOAD)
    return Contents(index, values, hashlib.sha256("".join(lines).encode()).hexdigest())


def _read_file(path: Path) -> dict[Any, Any]:
    """Read a file by the format that its first bytes show; its name does not matter."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    text = head.lstrip().lower()
    if not head:
        raise BadRequestError(f"{path} is empty", _DOWNLOAD)
    if head.startswith(b"version https://git-lfs"):
        raise BadRequestError(
            f"{path} is a pointer of Git LFS, not the weights", "Run `git lfs pull` in its repository, or download it."
        )
    if text.startswith(_WEB_PAGE_STARTS):  # A weight file can start with spaces and "<": they are its header's length.
        raise BadRequestError(f"{path} is a web page, not the weights", _DOWNLOAD)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((b"PK", b"\x80")):
        values = torch_files.read(path)
        if not isinstance(values, Mapping):
            raise BadRequestError(f"{path} holds {_describe(values)}, not weights by name", "Save the state dict.")
        return dict(values)
    raise BadRequestError(
        f"{path} is neither a file of torch.save nor a safetensors file", "Name the weights, or download them again."
    )


def _read_safetensors(path: Path) -> dict[Any, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if "movq" in (file.metadata() or {}):
                raise BadRequestError(f"{path} is a weight file of movq", "Use it as it is, for example with --run.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise BadRequestError(f"{path} is not a complete safetensors file: {error}", _DOWNLOAD) from None


def usable(name: str, tensor: object, path: Path) -> Tensor:
    """Return a copy of a tensor of a file as contiguous float32, which shares memory with no other one.

    Args:
        name: Name of the tensor, for the error.
        tensor: Value that the file has under this name.
        path: The file, for the error.

    Raises:
        BadRequestError: The value is no dense tensor of finite floating-point numbers, or is larger than its memory.
    """
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise BadRequestError(f"{path}: {name} is {_describe(tensor)}, not a dense tensor of floats", _DOWNLOAD)
    if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BadRequestError(f"{path}: {name} is larger than what is stored of it", _DOWNLOAD)
    copy = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not copy.isfinite().all():
        raise BadRequestError(f"{path}: {name} holds NaN or infinite values", _DOWNLOAD)
    return copy


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    return f"a value of type {type(value).__name__}"
