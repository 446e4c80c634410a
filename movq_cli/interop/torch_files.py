"""Reading a file that torch.save wrote, in today's zip format or the older one, without running code that is in it.

Such a file is a pickle, which names classes and functions and can call them. Checkpoints of training programs name
classes of Lightning or omegaconf that need not be installed here. Three things together read all of these files safely:
the names in the file are listed without loading it, and a name outside of a short list is an error; the names on the
list stand for `Inert`, whose objects store what they are given and do nothing; and torch loads the file with
`weights_only=True`, which calls nothing but `Inert` and torch's own constructors of tensors.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from movq_cli.errors import BadRequestError

_MAX_PICKLE_BYTES = 2**28
"""Largest size of the pickle in a zip file; it holds names and shapes, whereas the numbers have files of their own."""

_LEGACY_PICKLES = 5
"""Number of pickles at the start of a file in the older format; the fourth one holds the object."""

_KNOWN_TO_TORCH = re.compile(
    r"torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter|serialization\._get_layout|"
    r"storage\.\w+Storage|cuda\.\w+(Storage|Tensor)|\w+Storage|\w*Tensor|Size|device|b?float\d*|double|half|u?int\d+|"
    r"long|short|bool)|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|complex|bytearray)"
)
"""Names that torch.load accepts with `weights_only=True`, and that cannot run code."""

_INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|diffusers|taming|ldm|movqgan|main)\.([a-z0-9_]+\.)*_?[A-Z]\w*|"
    r"argparse\.Namespace|typing\.[A-Z]\w*|collections\.(defaultdict|deque)|copyreg\._reconstructor|"
    r"builtins\.(object|dict|list|tuple|str|int|float|bool|bytes|slice)|"
    r"pathlib\.(Pure)?(Posix|Windows)?Path|datetime\.(datetime|timedelta|date)|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|(dtypes\.\w+DType))|"
    r"torch\.(optim\.([a-z0-9_]+\.)*[A-Z]\w*|torch_version\.TorchVersion)"
)
"""Names in checkpoints of training programs, apart from tensors; their objects are not needed."""

_DICTIONARIES = re.compile(r".*\.(AttributeDict|FrozenDict|defaultdict|dict)")
"""Those of these names whose objects are dictionaries, whose items the reader adds."""


_PYTHON_3 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules that have another name in a pickle of torch.save, which has Python 2's names, than in the lists above."""


class Inert:
    """Stands for an object of any class; it stores what the file gives it, and does nothing.

    Attributes:
        state: State of the object in the file, for most classes a dictionary of its attributes.
    """

    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.state = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _InertDictionary:
    """Stands for a class of dictionaries; its objects are plain ones."""

    def __new__(cls, *arguments: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        """Return an empty dictionary."""
        return OrderedDict()


def read(path: Path) -> object:
    """Return the object in a file that torch.save wrote, with its tensors on the CPU.

    Raises:
        BadRequestError: The file is damaged, or names a function or class that a weight file has no use for.
    """
    names, error = _list_names(path)
    refused = sorted(name for name in names if not _INERT.fullmatch(name))
    if refused:
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise BadRequestError(
            f"{path} is refused, because its pickle names {refused[0]}{more}, which could run code; nothing was run",
            "Save its state dict alone, on a machine on which you trust it.",
        )
    if error is not None:
        raise _damaged(path, error)
    stubs = [(_InertDictionary if _DICTIONARIES.fullmatch(name) else Inert, name) for name in names]
    try:
        _require_intact(path)
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # A damaged pickle can raise any exception.
        raise _damaged(path, reason) from None


def _require_intact(path: Path) -> None:
    """Compare a zip file with its checksums, which torch.load does not; an option of torch.save writes zeros for them.

    Raises:
        ValueError: A member has another checksum.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(member.CRC for member in archive.infolist()) else None
        if damaged is not None:
            raise ValueError(f"{damaged} in it has another checksum")


def _list_names(path: Path) -> tuple[set[str], Exception | None]:
    """Return the functions and classes that the pickles of a file name, but that are not needed for tensors.

    Returns:
        The names, and the error that ended the search for them; None if all pickles were read.
    """
    names: set[str] = set()
    try:
        for name in _names(path):
            if not _KNOWN_TO_TORCH.fullmatch(name):
                names.add(name)
    except (zipfile.BadZipFile, ValueError, EOFError, IndexError, NotImplementedError, RuntimeError) as error:
        return names, error
    return names, None


def _names(path: Path) -> Iterator[str]:
    """Yield the functions and classes that the pickles of a file name, without loading them."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(2) == b"PK":
                raise ValueError("the end of the zip file is missing")
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                yield from _names_in_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.split("/", 1)[-1]: member for member in archive.infolist()}
        if "constants.pkl" in members or "data.pkl" not in members:
            raise _other_zip(path, list(members))
        if members["data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is too large")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("it is compressed")  # It could inflate to any size.
        yield from _names_in_pickle(io.BytesIO(archive.read(members["data.pkl"])))


def _names_in_pickle(file: BinaryIO) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in {"GLOBAL", "INST"}:
            module, _, name = str(argument).partition(" ")
            yield f"{_PYTHON_3.get(module, module)}.{name}"
        elif operation.name in {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}:
            raise ValueError("its pickle names classes in a way that torch.save does not use")


def _other_zip(path: Path, members: list[str]) -> BadRequestError:
    """Return the error of a zip file that torch.save did not write."""
    if "constants.pkl" in members:
        return BadRequestError(f"{path} is a TorchScript program, not weights", "Name the checkpoint it was made from.")
    weights = [name for name in members if name.endswith((".ckpt", ".pt", ".pth", ".bin", ".safetensors"))]
    hint = f"Extract it, and name {weights[0]}." if weights else "Download the weights again."
    return BadRequestError(f"{path} is a zip file that torch.save did not write", hint)


def _damaged(path: Path, error: Exception) -> BadRequestError:
    # torch's own texts advise to load the file in a way that runs its code.
    reason = str(error).splitlines()[0] if type(error) is ValueError and str(error) else type(error).__name__
    return BadRequestError(
        f"{path} is damaged or incomplete, or torch.save did not write it ({reason})", "Download it again."
    )
