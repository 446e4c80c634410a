"""Checkpoints of training programs are read without their programs, and no pickle runs code."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from movq_cli.errors import BadRequestError
from movq_cli.interop import containers
from movq_cli.interop.torch_files import Inert, read


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def framework() -> Iterator[types.SimpleNamespace]:
    """Classes of Lightning, omegaconf and taming that exist while a file is written, and not while it is read."""
    made = {}
    for path, base in {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": object,
        "pytorch_lightning.utilities.parsing.AttributeDict": dict,
        "omegaconf.dictconfig.DictConfig": object,
        "main.ImageLogger": object,
    }.items():
        module, _, name = path.rpartition(".")
        parent = ""
        for part in module.split("."):
            parent = f"{parent}.{part}" if parent else part
            sys.modules.setdefault(parent, types.ModuleType(parent))
        made[name] = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    yield types.SimpleNamespace(**made)
    forget("pytorch_lightning", "omegaconf", "main")


def forget(*names: str) -> None:
    for module in list(sys.modules):
        if module.partition(".")[0] in names:
            del sys.modules[module]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older than zip"])
def test_a_checkpoint_is_read_without_the_programs_that_its_pickle_names(
    tmp_path: Path, framework: types.SimpleNamespace, legacy: bool
) -> None:
    config = framework.DictConfig()
    config.__dict__ = {"_content": {"lr": 1.0}}
    values = {
        "callbacks": {framework.ModelCheckpoint: {"best": torch.tensor(1.0)}, framework.ImageLogger: {}},
        "hyper_parameters": framework.AttributeDict(lr=0.5),
        "config": config,
        "args": argparse.Namespace(size=3),
        "defaults": collections.defaultdict(list, a=[1]),
        "number": np.float64(0.5),
        "array": np.arange(3),
        "path": pathlib.PurePosixPath("a/b"),
        "time": datetime.datetime(2026, 1, 1),
        "state_dict": {"a": torch.arange(3.0)},
    }
    path = tmp_path / "a.ckpt"
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    forget("pytorch_lightning", "omegaconf", "main")
    result = read(path)
    assert isinstance(result, dict)
    assert torch.equal(result["state_dict"]["a"], torch.arange(3.0))
    assert result["hyper_parameters"]["lr"] == 0.5
    assert result["defaults"]["a"] == [1]
    assert isinstance(result["args"], Inert)
    assert result["args"].state == {"size": 3}
    assert "pytorch_lightning" not in sys.modules


HOSTILE = {
    "os.system": lambda: Runs(os.system, "touch ran"),
    "eval": lambda: Runs(eval, "open('ran', 'w')"),
    "exec": lambda: Runs(exec, "open('ran', 'w')"),
    "getattr": lambda: Runs(getattr, "text", "upper"),
    "subprocess": lambda: Runs(subprocess.call, ["touch", "ran"]),
    "a nested load": lambda: Runs(torch.load, "other.pt"),
    "numpy": lambda: Runs(np.load, "other.npy"),
    "a class": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("container", ["zip", "older than zip", "pickle", "newest pickle"])
def test_a_pickle_that_could_run_code_is_refused_and_nothing_runs(
    tmp_path: Path, make: Any, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    values = {"state_dict": {"a": torch.zeros(3)}, "callbacks": make()}
    if container in {"zip", "older than zip"}:
        torch.save(values, path, _use_new_zipfile_serialization=container == "zip")
    else:
        path.write_bytes(pickle.dumps({"callbacks": make()}, protocol=2 if container == "pickle" else 5))
    with pytest.raises(BadRequestError, match=r"a\.ckpt") as caught:
        containers.read(path)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)
    if container in {"zip", "older than zip"}:
        assert "nothing was run" in str(caught.value)


def test_names_that_hide_behind_a_known_program_are_refused(tmp_path: Path) -> None:
    for name in ("pytorch_lightning.callbacks.os.system", "omegaconf._utils.eval", "main.run", "numpy.load"):
        module, _, function = name.rpartition(".")
        data = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X\x04\x00\x00\x00echo\x85R."
        path = tmp_path / "a.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        with pytest.raises(BadRequestError, match="could run code"):
            read(path)


def saved(values: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older than zip"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float, legacy: bool) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.randn(100, 100)}, whole, _use_new_zipfile_serialization=not legacy)
    data = whole.read_bytes()
    path = tmp_path / "a.pt"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadRequestError, match=r"a\.pt .*(damaged or incomplete|neither)"):
        containers.read(path)


def test_a_changed_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    data = bytearray(saved({"a": torch.full((1000,), 0.123)}))
    position = data.index(torch.tensor(0.123).numpy().tobytes())
    data[position + 400] ^= 1
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(BadRequestError, match="damaged"):
        containers.read(path)


def test_a_compressed_file_is_refused_before_it_inflates(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(3)}))) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(BadRequestError, match="it is compressed"):
        containers.read(path)


OTHER_FILES = {
    "empty": (b"", "is empty"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", r"pointer of Git LFS.*git lfs pull"),
    "text": (b"Entry not found", "neither a file of torch.save nor"),
    "json": (b'{"error": "not found"}', "neither"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither"),
    "zeros": (bytes(4096), "neither"),
    "safetensors": ((10**9).to_bytes(8, "little") + b'{"a": 1}', "not a complete safetensors file"),
}


@pytest.mark.parametrize(("data", "reason"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_another_file_in_place_of_the_weights_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(data)
    with pytest.raises(BadRequestError, match=reason):
        containers.read(path)


def test_zip_files_that_are_not_of_torch_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vq-f4.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vq-f4/model.ckpt", b"...")
    with pytest.raises(BadRequestError, match=r"Extract it, and name model\.ckpt"):
        containers.read(path)
    script = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(script))
    with pytest.raises(BadRequestError, match="TorchScript"):
        containers.read(script)


@pytest.mark.parametrize("values", [torch.zeros(3), [torch.zeros(3)], "text"], ids=["tensor", "list", "text"])
def test_a_file_without_names_is_refused(tmp_path: Path, values: object) -> None:
    path = tmp_path / "a.pt"
    torch.save(values, path)
    with pytest.raises(BadRequestError, match="not weights by name"):
        containers.read(path)


def test_folders_without_one_weight_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="no weights at"):
        containers.read(tmp_path / "none")
    with pytest.raises(BadRequestError, match="holds no weight file"):
        containers.read(tmp_path)
    (tmp_path / "movq").mkdir()
    (tmp_path / "movq" / "config.json").write_text("{}")
    with pytest.raises(BadRequestError, match=r"Name .*movq\."):
        containers.read(tmp_path)
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(saved({"a": torch.zeros(1)}))
    with pytest.raises(BadRequestError, match=r"2 weight files.*a\.ckpt"):
        containers.read(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../outside.bin"}}, "not in its folder"),
        ({"weight_map": {"a": "missing.bin"}}, "is missing"),
        ({"weight_map": {"a": "part.bin", "b": "part.bin"}}, "names b, which no file holds"),
        ({"weight_map": {}}, ""),
        ({"weight_map": ["part.bin"]}, "not an index"),
        ({}, "not an index"),
        ([], "not an index"),
    ],
)
def test_an_index_that_its_files_contradict_is_refused(tmp_path: Path, index: object, reason: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "part.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path.parent / "outside.bin")
    (tmp_path / "model.bin.index.json").write_text(json.dumps(index))
    if reason:
        with pytest.raises(BadRequestError, match=reason):
            containers.read(tmp_path)
    else:
        assert containers.read(tmp_path).values == {}


@pytest.mark.parametrize("length", [0x3C20, 0x3C0A20])
def test_a_header_whose_length_looks_like_the_start_of_a_web_page_is_read(tmp_path: Path, length: int) -> None:
    # The first bytes of a safetensors file are the length of its header: here spaces, and then "<".
    values = np.arange(6, dtype="<f4")
    header = {"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, values.nbytes]}}
    path = tmp_path / "model.safetensors"
    data = json.dumps(header).encode().ljust(length) + values.tobytes()
    path.write_bytes(length.to_bytes(8, "little") + data)
    contents = containers.read(path)
    assert torch.equal(contents.values["weight"], torch.from_numpy(values).view(2, 3))
