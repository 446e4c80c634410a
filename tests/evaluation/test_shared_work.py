"""Work whose result is shared by several commands: one does it, the others wait for it and use the result."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from movq_cli import folder_locks
from movq_cli.console import Console
from movq_cli.data.shards import PreparedSet
from movq_cli.evaluation import feature_cache
from movq_cli.evaluation.image_sets import ImageSet
from movq_cli.files import locked
from movq_cli.ranks import SINGLE_PROCESS, Ranks
from movq_cli.settings import Preset
from tests.conftest import on_ranks, start_ranks
from tests.data.test_code_cache import encode, make, untrained
from tests.evaluation.test_feature_cache import COUNT, CPU, Means, compute, expected, see, write


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_BLOCK_IMAGES", 3)


def started(work: Any, given: object, folder: Path) -> Any:
    """Start shared work in another process, and return the process once its first block is there."""
    (process,) = start_ranks(work, given, folder, 1)
    while not list(folder.glob("parts/*/blocks/*.npz")):
        assert process.is_alive()
        time.sleep(0.001)
    return process


def test_features_that_another_process_computes_are_waited_for_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, network = write(tmp_path / "images"), Means()
    process = started(compute, (folder, tmp_path / "parts", 0.05), tmp_path)
    np.testing.assert_allclose(see(folder, tmp_path / "parts", network).rows, expected(folder), rtol=1e-6)
    assert network.seen == 0
    process.join()
    assert process.exitcode == 0
    warning = f"warning: waiting for another movq evaluate (process {process.pid}), which is at work in {tmp_path}"
    assert capsys.readouterr().err.count(warning) == 1


def test_features_of_a_process_that_dies_are_completed_by_the_one_that_waits(tmp_path: Path) -> None:
    folder, network = write(tmp_path / "images"), Means()
    process = started(compute, (folder, tmp_path / "parts", 0.1), tmp_path)
    threading.Timer(0.3, process.kill).start()
    np.testing.assert_allclose(see(folder, tmp_path / "parts", network).rows, expected(folder), rtol=1e-6)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert 0 < network.seen < COUNT


def test_codes_that_another_process_encodes_are_waited_for_and_used(
    tmp_path: Path, tiny: Preset, prepared: PreparedSet, capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(encode, (tiny, prepared, tmp_path / "parts", 0.005), tmp_path)
    assert encode(SINGLE_PROCESS, (tiny, prepared, tmp_path / "parts", 0.0)) == 0  # no progress: nothing was encoded
    process.join()
    assert process.exitcode == 0
    assert f"waiting for another movq train-prior (process {process.pid})" in capsys.readouterr().err


def test_a_tokenizer_waits_for_another_one_in_its_folder_and_then_encodes_anew(
    tmp_path: Path, tiny: Preset, prepared: PreparedSet, capsys: pytest.CaptureFixture[str]
) -> None:
    model, split = untrained(tiny), prepared.split("val")
    cache = tmp_path / "tokens"
    make(cache, model, split)
    (folder,) = cache.iterdir()
    lock = locked(folder, "movq train-prior")
    lock.__enter__()
    threading.Timer(0.3, lambda: lock.__exit__(None, None, None)).start()
    assert make(cache, model, split, tokenizer="u" * 64).header.tokenizer == "u" * 64
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("movq ")[0].partition(str(cache))[0] for line in lines] == [
        "warning: waiting for another ",
        "warning: the codes in ",
    ]


def test_a_process_that_waits_can_be_interrupted(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    see(folder, tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    (place / "set.json").unlink()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with locked(place, "movq evaluate"), pytest.raises(KeyboardInterrupt):
        see(folder, tmp_path / "cache")
    see(folder, tmp_path / "cache")


def waited(ranks: Ranks, given: tuple[Path, Path]) -> int:
    """Return the number of images from which a rank computes features in a cache that is locked at first."""
    folder, cache = given
    network = Means()
    images = ImageSet("real", str(folder), "val", console=Console(quiet=True))
    feature_cache.cached_features(
        images, network, cache, batch_size=4, device=CPU, ranks=ranks, console=Console(mute=not ranks.is_first)
    )
    return network.seen


def test_all_ranks_wait_with_the_first_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "images")
    see(folder, tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    (place / "set.json").rename(tmp_path / "set.json")
    lock = locked(place, "movq evaluate")
    lock.__enter__()

    def complete() -> None:
        (tmp_path / "set.json").rename(place / "set.json")
        lock.__exit__(None, None, None)

    threading.Timer(0.5, complete).start()
    assert on_ranks(waited, (folder, tmp_path / "cache"), tmp_path, world=2) == [0, 0]


def test_a_folder_that_its_last_holder_removes_is_locked_anew(tmp_path: Path) -> None:
    lock = locked(tmp_path / "a" / "b", "movq evaluate")
    lock.__enter__()
    threading.Timer(0.2, lambda: lock.__exit__(None, None, None)).start()
    with locked(tmp_path / "a" / "b", "movq evaluate", while_waiting=lambda _: None):
        assert folder_locks.try_lock(tmp_path / "a" / "b", shared=False) is None
        shutil.rmtree(tmp_path / "a")  # A lock of a folder that is gone locks nothing.
        descriptor = folder_locks.try_lock(tmp_path / "a" / "b", shared=False)
        assert descriptor is not None
        os.close(descriptor)


def test_the_process_that_holds_a_lock_is_named_in_the_refusal(tmp_path: Path) -> None:
    message = re.escape(f"another movq train-vq (process {os.getpid()}) is at work in {tmp_path}")
    with (
        locked(tmp_path, "movq train-vq"),
        pytest.raises(Exception, match=message),
        locked(tmp_path, "movq train-vq"),
    ):
        pass
