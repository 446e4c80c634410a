"""`movq sample` writes the same images in any form, with any number of processes, and after any interruption."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from movq_cli import app, files
from movq_cli.api import Prior
from movq_cli.commands import sample as command
from movq_cli.data import sample_files
from movq_cli.data.images import encode_png
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.models import masked_prior
from movq_cli.settings import SampleSettings
from movq_cli.sources.open import open_source
from tests.conftest import edit_header
from tests.forked_movq import ForkedMovq

if TYPE_CHECKING:
    from tests.conftest import Movq

FORMS = ("", ".zip", ".npz")
Draw = Callable[..., dict[str, Any]]


@pytest.fixture
def draw(
    trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Draw:
    """Return a function that runs `movq sample` in this process and returns its result, with stderr as `stderr`."""
    monkeypatch.chdir(tmp_path)

    def run(
        out: str, *more: str | int, n: int = 7, prior: Path = trained_once / "runs" / "tiny-prior"
    ) -> dict[str, Any]:
        capfd.readouterr()
        arguments = ["sample", out, "-n", n, "--run", prior, "--device", "cpu", "--json", *more]
        app.app(list(map(str, arguments)), standalone_mode=False)
        stdout, stderr = capfd.readouterr()
        return {**json.loads(stdout), "stderr": stderr}

    return run


def content(path: Path) -> dict[str, bytes]:
    """Return the contents of a set's files by name; a packed set is one file, with its manifest beside it."""
    found = path.parent.glob(f"{path.name}*") if path.is_file() else path.iterdir()
    return {file.name.removeprefix(path.name): file.read_bytes() for file in found}


def manifest_of(path: Path) -> dict[str, Any]:
    file = path / "manifest.json" if path.is_dir() else path.with_name(f"{path.name}.manifest.json")
    return json.loads(file.read_text())


def png_files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


# --- the images and their manifest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_batch_sizes_give_the_same_bytes(draw: Draw, tmp_path: Path, form: str) -> None:
    for size in (1, 3, 64):
        assert draw(f"of-{size}{form}", "--batch-size", size)["made"] == 7
    assert content(tmp_path / f"of-1{form}") == content(tmp_path / f"of-3{form}") == content(tmp_path / f"of-64{form}")
    assert len(list(tmp_path.glob("of-1*"))) == (1 if form == "" else 2)  # no temporary file remains


def test_a_zip_and_an_npz_hold_the_images_of_the_folder(draw: Draw, tmp_path: Path) -> None:
    draw("a", "--grid", "a.png")
    for form in (".zip", ".npz"):
        assert draw(f"a{form}", "--grid", f"a{form}.png")["grid"] == f"a{form}.png"
        assert (tmp_path / f"a{form}.png").read_bytes() == (tmp_path / "a.png").read_bytes()
        assert manifest_of(tmp_path / f"a{form}") == manifest_of(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {name: archive.read(name) for name in archive.namelist()} == content(tmp_path / "a")
    with np.load(tmp_path / "a.npz") as arrays:
        assert set(arrays.files) == {"arr_0", "arr_1"}
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert (pixels.dtype, pixels.shape, labels.dtype) == (np.uint8, (7, 16, 16, 3), np.int64)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for index in range(7):
        assert np.array_equal(pixels[index], np.asarray(Image.open(tmp_path / "a" / f"{index:06d}.png")))


def test_every_form_can_be_evaluated(draw: Draw, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for form in FORMS:
        draw(f"a{form}")
    names = {open_source(str(tmp_path / f"a{form}")).names for form in FORMS}
    assert names == {tuple(f"{index:06d}.png" for index in range(7))}
    for form in FORMS[1:]:
        app.app(["evaluate", "--psnr", "a", f"a{form}", "--json", "--quiet", "--device", "cpu"], standalone_mode=False)
        assert json.loads(capfd.readouterr().out)["protocol"]["pairs"]["identical"] == 7


def test_the_manifest_says_how_the_images_were_drawn(draw: Draw, trained_once: Path, tmp_path: Path) -> None:
    draw("a", "--steps", 8, "--seed", 40)
    manifest = manifest_of(tmp_path / "a")
    run = trained_once / "runs" / "tiny-prior"
    expected = SampleSettings(steps=8).model_dump()
    for name in command._OMITTED_AT_DEFAULT:  # A folder from before these settings can still be resumed.
        del expected[name]
    assert manifest["settings"] == {
        **expected,
        "seed": 40,
        "mode": "mask",
        "revealed": masked_prior.revealed(256, 8),
        "prior": files.sha256(run / "prior.safetensors"),
        "tokenizer": files.sha256(run / "tokenizer.safetensors"),
    }
    assert manifest["made_with"].keys() == {"movq", "torch", "device"}
    assert manifest["images"][4] == {"file": "000004.png", "seed": 44, "class": "dot"}
    draw("one", "--steps", 8, "--seed", 44, "--class", "dot", n=1)
    assert png_files(tmp_path / "one") == png_files(tmp_path / "a")[4:5]


def test_the_options_reach_the_sampler(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[SampleSettings] = []
    original = Prior.sample

    def spy(self: Prior, **arguments: Any) -> Any:
        received.append(arguments["settings"])
        return original(self, **arguments)

    monkeypatch.setattr(Prior, "sample", spy)
    draw("a", n=1)
    assert received.pop() == SampleSettings(steps=4)
    options = {
        **{"steps": 3, "temperature": 0.9, "choice_temperature": 2.0, "top_k": 5, "top_p": 0.8},
        **{"guidance": 1.5, "guidance_schedule": "linear"},
    }
    draw("b", *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)), n=1)
    assert received.pop() == SampleSettings.model_validate(options)


def assert_equal_but_for_rounding(first: Path, second: Path) -> None:
    """Check that two folders hold the same images, up to a level in at most one value of a hundred."""
    images, others = (
        np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in sorted(folder.glob("*.png"))])
        for folder in (first, second)
    )
    difference = np.abs(images - others)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("mode", ["auto", "depth"])
def test_autoregressive_priors_sample_too(draw: Draw, ordered_once: Path, tmp_path: Path, mode: str) -> None:
    prior = ordered_once / mode
    draw("a", "--top-k", 3, n=4, prior=prior)
    draw("b", "--top-k", 3, "--batch-size", 1, n=4, prior=prior)
    assert manifest_of(tmp_path / "a") == manifest_of(tmp_path / "b")
    # A matrix product of one row is summed in another order than one of four rows, on most processors.
    assert_equal_but_for_rounding(tmp_path / "a", tmp_path / "b")
    settings = manifest_of(tmp_path / "a")["settings"]
    assert settings["mode"] == mode
    assert not {"steps", "choice_temperature", "revealed"} & settings.keys()
    for option in ("--steps", "--choice-temperature"):
        with pytest.raises(BadRequestError, match=f"{option} has no meaning.*mode {mode}"):
            draw("c", option, 3, prior=prior)
    assert not (tmp_path / "c").exists()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_samples_of_other_settings_are_not_mixed(draw: Draw, tmp_path: Path, form: str) -> None:
    draw(f"out{form}", n=2)
    before = content(tmp_path / f"out{form}")
    others = ["--seed", 1], ["--steps", 3], ["--class", "dot"], ["--guidance", 2], ["--top-k", 3], ["--top-p", 0.5]
    for other in others:
        with pytest.raises(BadRequestError, match=r"samples of other .*Name another"):
            draw(f"out{form}", *other, n=2)
    assert content(tmp_path / f"out{form}") == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "0"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--guidance-schedule", "steep"], "--guidance-schedule.*'steep'"),
        (["--class", "cat"], "'cat'"),
    ],
)
def test_a_bad_setting_is_one_line(draw: Draw, tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        draw("out", *options)
    assert not (tmp_path / "out").exists()


def test_files_of_another_program_are_not_changed(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "another.png").write_bytes(encode_png(Image.new("RGB", (4, 4))))
    (tmp_path / "folder.zip").mkdir()
    for folder in ("damaged", "new.npz.images"):
        (tmp_path / folder).mkdir()
    for name in ("other.zip", "file", "new.npz.images/notes"):
        (tmp_path / name).write_bytes(b"another's")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    refused = {
        "other": "did not make",
        "other.zip": "did not make",
        "new.npz": "did not make",
        "file": "is a file",
        "folder.zip": "is a folder",
        "damaged": "is damaged, or movq did not write it",
    }
    for name, words in refused.items():
        with pytest.raises(BadRequestError, match=words):
            draw(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_process_in_the_same_folder_is_refused(draw: Draw, tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "out.zip.images", "movq sample"),
        pytest.raises(BadRequestError, match="is at work in"),
    ):
        draw("out.zip")


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_folder_grows_and_only_what_is_missing_is_made(draw: Draw, tmp_path: Path) -> None:
    draw("complete")
    draw("out", n=3)
    (tmp_path / "out" / "000001.png").unlink()
    grown = draw("out")
    assert grown["made"] == 5
    assert "2 of 7 images are already in out" in grown["stderr"]
    assert content(tmp_path / "out") == content(tmp_path / "complete")
    assert draw("out", n=3)["made"] == 0  # its manifest still lists all seven
    assert content(tmp_path / "out") == content(tmp_path / "complete")


@pytest.mark.parametrize("form", [".zip", ".npz"])
def test_a_finished_file_is_not_changed_and_another_number_of_images_refused(
    draw: Draw, tmp_path: Path, form: str
) -> None:
    draw(f"out{form}")
    before = (tmp_path / f"out{form}").stat()
    again = draw(f"out{form}")
    assert again["made"] == 0
    assert "is already finished" in again["stderr"]
    after = (tmp_path / f"out{form}").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for count in (6, 8):
        with pytest.raises(BadRequestError, match=f"holds 7 images, not {count}"):
            draw(f"out{form}", n=count)


def test_a_run_can_be_resumed_with_other_versions_and_devices(draw: Draw, tmp_path: Path) -> None:
    draw("out", n=2)
    path = tmp_path / "out" / "manifest.json"
    edit_header(path, made_with={"movq": "0", "torch": "0", "device": "cuda"})
    assert draw("out", n=3)["made"] == 1


def _kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(count: int, act: Callable[[], object]) -> Callable[..., None]:
    """Return a function that writes images, and calls `act` before it writes image number `count`."""
    written: list[int] = []
    write = command._write

    def counted(target: sample_files.SampleFiles, index: int, image: Any) -> None:
        if len(written) == count:
            act()
        written.append(index)
        write(target, index, image)

    return counted


MOMENTS: dict[str, tuple[object, str, Callable[[], Callable[..., None]]]] = {
    "drawing": (command, "_write", lambda: _after(4, _kill)),
    "packing": (zipfile.ZipFile, "close", lambda: _kill),
    "packed": (sample_files.SampleFiles, "_clear", lambda: _kill),
}


def in_child(work: Callable[[], object]) -> int:
    """Return the wait status of a forked process that calls a function."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("form", "moment"), [("", "drawing"), *((f, m) for f in FORMS[1:] for m in MOMENTS)])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, moment: str
) -> None:
    draw(f"complete{form}")
    with monkeypatch.context() as patch:
        owner, name, make = MOMENTS[moment]
        patch.setattr(owner, name, make())
        assert os.WTERMSIG(in_child(lambda: draw(f"out{form}", "--batch-size", 2))) == signal.SIGKILL
    folder = tmp_path / ("out" if form == "" else f"out{form}.images")
    there = {path.name: path.stat().st_ino for path in folder.glob("*.png")}
    assert (4 <= len(there) < 7) if moment == "drawing" else len(there) == 7
    assert (tmp_path / f"out{form}").is_file() == (moment == "packed")
    kept: dict[str, int] = {}
    with monkeypatch.context() as patch:
        clear = sample_files.SampleFiles._clear

        def look(self: sample_files.SampleFiles) -> None:
            kept.update({path.name: path.stat().st_ino for path in self.folder.glob("*.png")})
            clear(self)

        patch.setattr(sample_files.SampleFiles, "_clear", look)
        assert draw(f"out{form}")["made"] == 7 - len(there)
    kept |= {path.name: path.stat().st_ino for path in folder.glob("*.png")}
    assert there.items() <= kept.items()
    assert content(tmp_path / f"out{form}") == content(tmp_path / f"complete{form}")
    assert form == "" or not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_at_once_and_keeps_what_it_made(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, trained_once: Path
) -> None:
    def main() -> None:
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        run = trained_once / "runs" / "tiny-prior"
        sys.argv = ["movq", "sample", "out", "-n", "100000", "--batch-size", "2", "--run", str(run), "--device", "cpu"]
        try:
            app.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    with monkeypatch.context() as patch:
        patch.setattr(command, "_write", _after(4, lambda: os.kill(os.getpid(), number)))
        assert os.waitstatus_to_exitcode(in_child(main)) == 130
    errors = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: interrupted; the images made so far are kept. Run the same command again to resume."]
    made = len(png_files(tmp_path / "out"))
    assert made >= 4
    assert draw("out", n=made + 1)["made"] == 1


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sample_files, "_pack_array", full)
        with pytest.raises(FailureError, match=r"cannot write out\.npz: No space"):
            draw("out.npz")
    assert [path.name for path in tmp_path.glob("out.npz*") if path.is_dir()] == ["out.npz.images"]
    assert not (tmp_path / "out.npz").exists()
    assert draw("out.npz")["made"] == 0


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [".zip", ".npz"])
def test_two_processes_write_the_same_files_as_one(
    draw: Draw, movq: Movq, trained_once: Path, tmp_path: Path, form: str
) -> None:
    draw(f"one{form}")
    arguments = ["sample", f"two{form}", "-n", "7", "--batch-size", "2", "--json", "--device", "cpu", "--gpus", "2"]
    done = movq(*arguments, "--run", trained_once / "runs" / "tiny-prior")
    assert json.loads(done.stdout) == {"path": f"two{form}", "images": 7, "made": 7}
    assert done.stderr.count("prior: ") == 1
    assert "sampling: 7/7" in done.stderr
    assert content(tmp_path / f"two{form}") == content(tmp_path / f"one{form}")


@pytest.fixture
def two_at_work(trained_once: Path, tmp_path: Path) -> Iterator[ForkedMovq]:
    """Yield a command whose two processes draw into the folder `out`, after both have written some images."""
    arguments = ["sample", "out", "-n", "100000", "--batch-size", "2", "--device", "cpu", "--gpus", "2"]
    arguments += ["--run", str(trained_once / "runs" / "tiny-prior")]
    process = ForkedMovq(arguments, tmp_path, os.environ | {"OMP_NUM_THREADS": "1"}, new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "000002.png").exists() or not (tmp_path / "out" / "050002.png").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_interrupted_ranks_end_with_one_line_and_one_process_resumes(
    two_at_work: ForkedMovq, draw: Draw, tmp_path: Path
) -> None:
    os.killpg(two_at_work.pid, signal.SIGINT)  # as a terminal sends it
    _, stderr = two_at_work.communicate(timeout=60)
    assert two_at_work.returncode == 130, stderr
    rest = [line for line in stderr.splitlines() if not line.startswith(("prior: ", "sampling: "))]
    assert rest == ["error: interrupted; the images made so far are kept. Run the same command again to resume."]
    there = sum(path.name <= "000019.png" for path in (tmp_path / "out").glob("*.png"))
    assert draw("out", n=20)["made"] == 20 - there
    draw("complete", n=20)
    assert png_files(tmp_path / "out")[:20] == png_files(tmp_path / "complete")


def test_when_a_rank_is_killed_only_the_launcher_prints_an_error(two_at_work: ForkedMovq) -> None:
    children = Path(f"/proc/{two_at_work.pid}/task/{two_at_work.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = two_at_work.communicate(timeout=60)
    assert two_at_work.returncode == 1, stderr
    rest = [line for line in stderr.splitlines() if not line.startswith(("prior: ", "sampling: "))]
    assert len(rest) == 1
    assert rest[0].startswith("error: rank 1 was ended by signal 9")
