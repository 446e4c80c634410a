"""`movq prepare`: the same bytes for any number of workers and after any kill, and every fault in one line."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from movq_cli.commands import prepare as command
from movq_cli.commands import prepare_plan
from movq_cli.console import Console
from movq_cli.data.images import encode_png
from movq_cli.data.shards import PreparedSet, SplitName
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.sources import duplicates

PREPROCESSING = {field.name for field in dataclasses.fields(prepare_plan.Preprocessing)}


def prepare(source: Path | str, out: Path, **options: Any) -> None:
    """Run the command with options of the request and of its preprocessing."""
    preprocessing = prepare_plan.Preprocessing(**{name: options.pop(name) for name in PREPROCESSING & options.keys()})
    command.prepare(command.PrepareRequest(str(source), out, preprocessing, **options), Console(as_json=True))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four images, so that a few dozen images make many."""
    monkeypatch.setattr(prepare_plan, "SHARD_IMAGES", 4)


def images(folder, count, side=12, suffix="png"):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side + i % 5, 3), dtype=np.uint8)).save(path)
    return folder


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def labels_of(prepared: PreparedSet, split: SplitName) -> list[int]:
    labels = prepared.split(split).labels
    assert labels is not None
    return [int(label) for label in labels]


def sources(out, split):
    """Original name to pixels."""
    found = {}
    for path in sorted((out / split).iterdir()):
        with zipfile.ZipFile(path) as archive:
            for name, source in json.loads(archive.read("dataset.json"))["sources"].items():
                found[source] = np.asarray(Image.open(io.BytesIO(archive.read(name))))
    return found


# What is made


def test_the_result_is_one_json_object_and_the_set_opens(tmp_path, capsys):
    prepare(images(tmp_path / "in", 20), tmp_path / "out")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": str(tmp_path / "out"), "train": 18, "val": 2, "rejected": 0, "classes": 2}
    assert "20 images, 2 classes" in err and "18 train, 2 val" in err and "lanczos" in err
    prepared = PreparedSet.open(tmp_path / "out")
    assert prepared.manifest.counts == {"train": 18, "val": 2}
    assert (prepared.manifest.min_side, prepared.manifest.max_side) == (12, 16)
    assert set(sources(tmp_path / "out", "train")) | set(sources(tmp_path / "out", "val")) == {
        f"{'ab'[i % 2]}/{i:04d}.png" for i in range(20)
    }


def test_pixels_are_pillows_and_names_and_labels_stay_together(tmp_path, small_shards):
    folder = images(tmp_path / "in", 11, side=30)
    prepare(folder, tmp_path / "out", size=16, square=True)
    for split in ("train", "val"):
        for name, pixels in sources(tmp_path / "out", split).items():
            image = Image.open(folder / name)
            resized = image.resize((round(image.width * 16 / 30), 16), Image.Resampling.LANCZOS)
            left = (resized.width - 16) // 2
            assert np.array_equal(pixels, np.asarray(resized.crop((left, 0, left + 16, 16))))
    read = PreparedSet.open(tmp_path / "out").split("train")
    stored = list(sources(tmp_path / "out", "train").items())
    assert len(read) == len(stored) == 10 and read.labels is not None
    for i, (name, pixels) in enumerate(stored):
        assert read.labels[i] == "ab".index(name[0]) and np.array_equal(read.pixels(i), pixels)


def test_without_a_size_images_keep_their_own_up_to_256(tmp_path):
    for name, size in {"small": (20, 300), "exact": (256, 400), "large": (512, 1000), "dot": (1, 1)}.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "in" / f"{name}.png")
    prepare(tmp_path / "in", tmp_path / "out", val="1")
    shapes = {n: p.shape[1::-1] for s in ("train", "val") for n, p in sources(tmp_path / "out", s).items()}
    assert shapes == {"small.png": (20, 300), "exact.png": (256, 400), "large.png": (256, 500), "dot.png": (1, 1)}
    prepare(tmp_path / "in", tmp_path / "square", val="1", square=True)
    shapes = {n: p.shape[1::-1] for s in ("train", "val") for n, p in sources(tmp_path / "square", s).items()}
    assert shapes == {"small.png": (20, 20), "exact.png": (256,) * 2, "large.png": (256,) * 2, "dot.png": (1, 1)}


def test_small_images_are_refused_or_enlarged(tmp_path, capsys):
    folder = images(tmp_path / "in", 6, side=12)
    Image.new("RGB", (40, 50)).save(folder / "a" / "large.png")
    Image.new("RGB", (40, 50)).save(folder / "a" / "large2.png")
    (tmp_path / "list").write_text("large\n")
    prepare(folder, tmp_path / "out", size=16, val_list=tmp_path / "list")
    assert json.loads(capsys.readouterr().out)["rejected"] == 6
    prepare(folder, tmp_path / "up", size=16, val_list=tmp_path / "list", upscale=True)
    assert json.loads(capsys.readouterr().out)["rejected"] == 0
    assert {min(p.shape[:2]) for p in sources(tmp_path / "up", "train").values()} == {16}


def test_bad_images_are_skipped_listed_with_reasons_and_counted(tmp_path, capsys):
    folder = images(tmp_path / "in", 8)
    (folder / "a" / "empty.png").touch()
    (folder / "a" / "page.jpg").write_text("<html>not found</html>")
    whole = encode_png(Image.effect_noise((64, 64), 50).convert("RGB"))
    (folder / "b" / "cut 数.png").write_bytes(whole[: len(whole) // 2])
    prepare(folder, tmp_path / "out", val="2")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["rejected"] == 3 and result["train"] + result["val"] == 8
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(r["name"], r["reason"]) for r in rejects} == {
        ("a/empty.png", "empty file"),
        ("a/page.jpg", "not an image"),
        ("b/cut 数.png", "truncated"),
    }
    assert f"warning: 3 of 11 images were rejected: see {tmp_path / 'out' / 'rejects.jsonl'}" in err
    assert PreparedSet.open(tmp_path / "out").manifest.rejects == 3


def odd_images():
    """Files that people have, each with what Pillow makes of it; None where it cannot be used."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = noise.convert("P", palette=Image.Palette.ADAPTIVE)

    def saved(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    rotated = saved(noise, "JPEG", exif=exif)
    yield "rotated.jpg", rotated, ImageOps.exif_transpose(Image.open(io.BytesIO(rotated))).convert("RGB")
    for name, kind, image, options in [
        ("cmyk.jpg", "JPEG", noise.convert("CMYK"), {}),
        ("bits.png", "PNG", noise.convert("1"), {}),
        ("grey.jpeg", "JPEG", noise.convert("L"), {}),
        ("palette.gif", "GIF", clear, {"save_all": True, "append_images": [clear.rotate(90)]}),
        ("film.webp", "WEBP", noise, {"save_all": True, "append_images": [noise.rotate(180)], "lossless": True}),
        ("数字 " + "n" * 200 + ".png", "PNG", noise, {}),
    ]:
        data = saved(image, kind, **options)
        yield name, data, Image.open(io.BytesIO(data)).convert("RGB")
    seen_through = saved(clear, "PNG", transparency=bytes(range(256)))
    over = Image.new("RGBA", clear.size, (255, 255, 255, 255))
    over.alpha_composite(Image.open(io.BytesIO(seen_through)).convert("RGBA"))
    yield "alpha.png", seen_through, over.convert("RGB")
    deep = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    yield (
        "deep.png",
        saved(Image.fromarray(deep), "PNG"),
        Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB"),
    )
    yield "nothing.png", b"", None
    yield "cut.jpg", rotated[: len(rotated) // 2], None
    yield "page.jpg", b"<html><body>404</body></html>", None
    bomb = bytearray(saved(Image.new("1", (30_000, 1)), "PNG"))
    bomb[20:24] = (30_000).to_bytes(4)
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    yield "bomb.png", bytes(bomb), None


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_odd_images_under_hostile_names_are_right_or_refused_and_nothing_leaves_the_folder(tmp_path, kind, capsys):
    home = tmp_path / "home"
    home.mkdir()
    prefixes = ["", "../../etc/", "/absolute/", "A/", "a/"] if kind != "folder" else ["A/", "a/"]
    files = [(prefix + name, data, image) for prefix in prefixes for name, data, image in odd_images()]
    place = home / f"in.{kind}"
    if kind == "folder":
        for name, data, _ in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        (place / "a" / "loop").symlink_to(place)
        os.mkfifo(place / "a" / "pipe.png")
        files.append(("a/pipe.png", b"", None))
    elif kind == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, data, _ in files:
                archive.writestr(zipfile.ZipInfo(name), data)
    else:
        with tarfile.open(place, "w") as tar:
            for name, data, _ in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    prepare(place, home / "out", val="2", workers=2)
    assert [path for path in sorted(tmp_path.rglob("*")) if home / "out" not in (path, *path.parents)] == before
    found = sources(home / "out", "train") | sources(home / "out", "val")
    rejects = [json.loads(line)["name"] for line in (home / "out" / "rejects.jsonl").read_text().splitlines()]

    def safe(name):
        return name.replace("../", "").removeprefix("/")

    assert sorted(rejects) == sorted(safe(name) for name, _, image in files if image is None)
    assert found.keys() == {safe(name) for name, _, image in files if image is not None}
    for name, _, image in files:
        assert image is None or np.array_equal(found[safe(name)], np.asarray(image)), name
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_background_orientation_and_labels_are_those_of_the_request(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "b").mkdir()
    Image.new("RGBA", (4, 8), (0, 0, 0, 0)).save(tmp_path / "in" / "a" / "x.png", exif=exif)
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "b" / "y.png")
    (tmp_path / "list").write_text("b/y.png")
    one = {"val_list": tmp_path / "list", "background": (1, 2, 3)}
    prepare(tmp_path / "in", tmp_path / "out", **one)
    (pixels,) = sources(tmp_path / "out", "train").values()
    assert pixels.shape == (4, 8, 3) and (pixels == [1, 2, 3]).all()
    prepare(tmp_path / "in", tmp_path / "out2", **one, orientation=False, keep_labels=False)
    (pixels,) = sources(tmp_path / "out2", "train").values()
    assert pixels.shape == (8, 4, 3)
    assert PreparedSet.open(tmp_path / "out2").split("train").labels is None
    assert PreparedSet.open(tmp_path / "out2").manifest.classes == ()


def test_compressed_or_not_the_pixels_are_the_same_and_others_read_them(tmp_path, small_shards):
    folder = images(tmp_path / "in", 9, side=40)
    for compression in ("none", "zlib"):
        prepare(folder, tmp_path / compression, compression=compression)
        assert PreparedSet.open(tmp_path / compression).manifest.compression == compression
    for split in ("train", "val"):
        plain, packed = (sources(tmp_path / compression, split) for compression in ("none", "zlib"))
        assert plain.keys() == packed.keys() and all(np.array_equal(plain[name], packed[name]) for name in plain)


def test_a_prepared_set_prepares_again_with_its_split(tmp_path, small_shards):
    prepare(images(tmp_path / "in", 10, side=32), tmp_path / "one", val="3")
    prepare(tmp_path / "one", tmp_path / "two", size=16)
    one, two = (PreparedSet.open(tmp_path / name) for name in ("one", "two"))
    assert two.manifest.counts == {"train": 7, "val": 3} and two.manifest.min_side == 16
    assert labels_of(two, "val") == labels_of(one, "val")


# The split


def test_the_split_follows_from_the_names_alone(tmp_path, small_shards):
    folder = images(tmp_path / "in", 30)
    prepare(folder, tmp_path / "one", val="0.2")
    prepare(folder, tmp_path / "two", val="6", size=8)
    assert set(sources(tmp_path / "one", "val")) == set(sources(tmp_path / "two", "val"))
    assert len(sources(tmp_path / "one", "val")) == 6


@pytest.mark.parametrize(("val", "count"), [("0.1", 1), ("0.0001", 1), ("0.99999", 4), ("4", 4), (".5", 2)])
def test_at_least_one_image_is_held_out_and_one_is_left(tmp_path, val, count):
    prepare(images(tmp_path / "in", 5), tmp_path / "out", val=val)
    assert PreparedSet.open(tmp_path / "out").manifest.counts["val"] == count


@pytest.mark.parametrize("val", ["0", "0.0", "1.0", "-1", "5", "99", "nan", "ten", "", "1.5", "0.1%", "inf."])
def test_a_share_that_makes_no_split_is_a_bad_request(tmp_path, val):
    with pytest.raises(BadRequestError, match="--val"):
        prepare(images(tmp_path / "in", 5), tmp_path / "out", val=val)
    assert not (tmp_path / "out").exists()


def test_a_single_image_has_no_val_split(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    prepare(tmp_path / "one.png", tmp_path / "out")
    assert json.loads(capsys.readouterr().out)["val"] == 0
    assert len(PreparedSet.open(tmp_path / "out").split("val")) == 0


def test_a_list_names_images_by_path_name_or_stem(tmp_path):
    folder = images(tmp_path / "in", 8)
    (tmp_path / "list").write_text("a/0000.png\n0003.png\n\n0005\r\n0005\n")
    prepare(folder, tmp_path / "out", val_list=tmp_path / "list")
    assert set(sources(tmp_path / "out", "val")) == {"a/0000.png", "b/0003.png", "b/0005.png"}


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("9999.png\n", "names '9999.png', which is the name of no images"),
        ("same.png\n", "names 'same.png', which is the name of 2 images"),
        ("", "no image of .* is held out"),
        ("\n".join(["same.png", "a/same.png"]), "2 images"),
        ("\n".join(["a/0000.png", "b/0001.png", "a/same.png", "b/same.png"]), "none is left to train on"),
    ],
)
def test_a_list_that_does_not_fit_is_a_bad_request(tmp_path, lines, fault):
    folder = images(tmp_path / "in", 2)
    for part in "ab":
        shutil.copy(folder / "a" / "0000.png", folder / part / "same.png")
    (tmp_path / "list").write_text(lines)
    with pytest.raises(BadRequestError, match=fault):
        prepare(folder, tmp_path / "out", val_list=tmp_path / "list")
    with pytest.raises(BadRequestError, match="cannot read the list"):
        prepare(folder, tmp_path / "out", val_list=tmp_path / "nowhere")


def test_the_sources_own_split_wins_and_a_number_of_images_beside_it_is_said_to_have_no_effect(tmp_path, capsys):
    train = images(tmp_path / "in" / "train", 6)
    images(tmp_path / "in" / "val", 2)
    prepare(tmp_path / "in", tmp_path / "own")
    assert "no effect" not in capsys.readouterr().err
    prepare(tmp_path / "in", tmp_path / "out", val="3")
    assert PreparedSet.open(tmp_path / "out").manifest.counts == {"train": 6, "val": 2}
    assert "in has a val split of its own, beside which --val 3 has no effect" in capsys.readouterr().err
    assert train.exists()
    # What the warning recommends.
    prepare(train, tmp_path / "anew", val="3")
    assert PreparedSet.open(tmp_path / "anew").manifest.counts == {"train": 3, "val": 3}


def test_nvidias_rule_for_ffhq_goes_by_number(tmp_path):
    for number in (0, 59_999, 60_000, 69_999):
        path = tmp_path / "in" / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(path)
    prepare(tmp_path / "in", tmp_path / "out", val="nvidia", keep_labels=False)
    assert set(sources(tmp_path / "out", "val")) == {"60000/60000.png", "69000/69999.png"}
    with pytest.raises(BadRequestError, match=r"from 60000 on, but .* has none"):
        prepare(tmp_path / "in" / "00000", tmp_path / "none", val="nvidia")
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "face.png")
    with pytest.raises(BadRequestError, match="is called 'face'"):
        prepare(tmp_path / "in", tmp_path / "named", val="nvidia")


def test_imagenets_flat_val_folder_is_prepared_with_its_labels(tmp_path):
    images(tmp_path / "in" / "train", 6)
    for number in range(3):
        shutil.copy(tmp_path / "in" / "train" / "a" / "0000.png", tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "val").mkdir()
    for path in (tmp_path / "in").glob("*.png"):
        path.rename(tmp_path / "in" / "val" / path.name)
    (tmp_path / "labels").write_text("b\na\nb\n")
    prepare(tmp_path / "in", tmp_path / "out", val_labels=tmp_path / "labels")
    prepared = PreparedSet.open(tmp_path / "out")
    assert labels_of(prepared, "val") == [1, 0, 1]
    assert labels_of(prepared, "train") == [0, 0, 0, 1, 1, 1]


# Duplicates


@pytest.mark.parametrize("workers", [1, 2])
def test_of_duplicates_the_first_by_name_is_stored_whichever_process_reads_it(
    tmp_path, small_shards, monkeypatch, workers
):
    monkeypatch.setattr(duplicates, "_CHUNK_FILES", 5)
    folder = images(tmp_path / "in", 30)
    for copy, of in [("z/1", "b/0003"), ("z/0", "b/0003"), ("a/0001", "b/0029"), ("b/0031", "b/0029")]:
        (folder / f"{copy}.png").parent.mkdir(exist_ok=True)
        shutil.copy(folder / f"{of}.png", folder / f"{copy}.png")
    for name in ("x", "y"):
        (folder / "a" / f"{name}.png").symlink_to("nowhere")
    prepare(folder, tmp_path / "out", drop_duplicates=True, workers=workers)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(reject["name"], reject["reason"]) for reject in rejects} == {
        ("z/0.png", "the same file as b/0003.png"),
        ("z/1.png", "the same file as b/0003.png"),
        ("b/0029.png", "the same file as a/0001.png"),
        ("b/0031.png", "the same file as a/0001.png"),
        ("a/x.png", "cannot be read: No such file or directory"),
        ("a/y.png", "cannot be read: No such file or directory"),
    }
    kept = [*sources(tmp_path / "out", "train").values(), *sources(tmp_path / "out", "val").values()]
    assert len(kept) == len({pixels.tobytes() for pixels in kept}) == 30
    manifest = PreparedSet.open(tmp_path / "out").manifest
    assert manifest.drop_duplicates and manifest.rejects == 6
    for shard in [(1, 2), (2, 2)]:
        prepare(folder, tmp_path / "jobs", drop_duplicates=True, shard=shard)
    assert tree(tmp_path / "jobs") == tree(tmp_path / "out")


def test_a_duplicate_stays_in_one_split_and_may_take_the_place_of_the_only_held_out_image(tmp_path):
    folder = images(tmp_path / "in" / "train", 6)
    images(tmp_path / "in" / "val", 8)
    prepare(tmp_path / "in", tmp_path / "out", drop_duplicates=True)
    assert PreparedSet.open(tmp_path / "out").manifest.counts == {"train": 6, "val": 2}
    assert set(sources(tmp_path / "out", "val")) == {"val/a/0006.png", "val/b/0007.png"}
    for number in range(20):
        shutil.copy(folder / "a" / "0000.png", tmp_path / f"same{number}.png")
    shutil.copy(folder / "b" / "0001.png", tmp_path / "other.png")
    (tmp_path / "flat").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "flat" / path.name)
    prepare(tmp_path / "flat", tmp_path / "two", val="1", drop_duplicates=True)
    assert PreparedSet.open(tmp_path / "two").manifest.counts == {"train": 1, "val": 1}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_duplicates_lead_to_the_first(values):
    hashes = [hashlib.sha256(bytes([value])).digest() for value in values]
    expected = {i: values.index(value) for i, value in enumerate(values) if values.index(value) < i}
    assert duplicates.find_duplicates(hashes) == expected


# Any number of workers, any kill


def test_one_and_two_workers_make_the_same_bytes(tmp_path, small_shards):
    folder = images(tmp_path / "in", 30)
    (folder / "a" / "bad.png").write_bytes(b"no")
    for workers in (0, 1, 2):
        prepare(folder, tmp_path / str(workers), workers=workers)
    assert tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "2")
    assert len(list((tmp_path / "2" / "train").iterdir())) == 7


# Several jobs


@pytest.mark.parametrize(
    "jobs", [[(1, 3), (2, 3), (3, 3)], [(2, 3), (0, 3), (1, 3)], [(1, 1)], [(n, 20) for n in range(20)]]
)
def test_jobs_make_what_one_makes_and_the_last_one_ends_it(tmp_path, small_shards, capsys, jobs):
    folder = images(tmp_path / "in", 30)
    (folder / "a" / "bad.png").write_bytes(b"no")
    prepare(folder, tmp_path / "whole")
    whole = capsys.readouterr().out
    made = 0
    for number, shard in enumerate(jobs, start=1):
        prepare(folder, tmp_path / "jobs", shard=shard, workers=number % 3)
        out, err = capsys.readouterr()
        now = len(list((tmp_path / "jobs").rglob("*.zip")))
        if number < len(jobs) and now < 8:
            assert json.loads(out) == {"path": str(tmp_path / "jobs"), "shards": 8, "missing": 8 - now}
            assert f"{8 - now} of 8 shards are missing" in err and now - made <= -(-8 // len(jobs))
            assert not (tmp_path / "jobs" / "manifest.json").exists()
        made = now
    assert json.loads(out) == {**json.loads(whole), "path": str(tmp_path / "jobs")}
    assert tree(tmp_path / "jobs") == tree(tmp_path / "whole")


def test_a_whole_run_ends_what_jobs_began_and_a_job_what_a_whole_run_began(tmp_path, small_shards):
    folder = images(tmp_path / "in", 30)
    prepare(folder, tmp_path / "whole")
    prepare(folder, tmp_path / "one", shard=(1, 2))
    (tmp_path / "one" / "train" / "00000.zip.0f.partial").write_bytes(b"of a killed job")
    prepare(folder, tmp_path / "one", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    (tmp_path / "two" / "manifest.json").unlink()
    (tmp_path / "two" / "train" / "00001.zip").unlink()
    prepare(folder, tmp_path / "two", shard=(1, 2))
    assert tree(tmp_path / "two") == tree(tmp_path / "whole")


def test_jobs_of_different_plans_do_not_mix(tmp_path, small_shards):
    folder = images(tmp_path / "in", 30)
    prepare(folder, tmp_path / "out", shard=(1, 2))
    made = tree(tmp_path / "out")
    with pytest.raises(BadRequestError, match=r"another source or other settings"):
        prepare(folder, tmp_path / "out", shard=(2, 2), size=8)
    assert tree(tmp_path / "out") == made


# The folder


def test_a_finished_set_is_not_made_again(tmp_path, capsys):
    folder = images(tmp_path / "in", 6)
    prepare(folder, tmp_path / "out")
    first, made = capsys.readouterr().out, tree(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare(folder, tmp_path / "out", workers=2)
    out, err = capsys.readouterr()
    assert out == first and "is already prepared" in err and tree(tmp_path / "out") == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps


@pytest.mark.parametrize(
    "change",
    [
        *({"size": 8}, {"square": True}, {"val": "2"}, {"upscale": True}, {"background": (0, 0, 0)}),
        *(
            {"keep_labels": False},
            {"orientation": False},
            {"compression": "zlib"},
            {"drop_duplicates": True},
            "more images",
            "another folder",
        ),
    ],
)
def test_another_plan_in_the_same_folder_is_a_bad_request(tmp_path, change):
    folder = images(tmp_path / "in", 6)
    prepare(folder, tmp_path / "out")
    made = tree(tmp_path / "out")
    options = change if isinstance(change, dict) else {}
    if change == "more images":
        Image.new("RGB", (9, 9)).save(folder / "a" / "z.png")
    if change == "another folder":
        folder = shutil.copytree(folder, tmp_path / "in2")
    with pytest.raises(BadRequestError, match=r"out holds a prepared set of another .*remove that one"):
        prepare(folder, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == made


def test_the_same_folder_spelt_otherwise_is_the_same_plan(tmp_path, monkeypatch, capsys):
    prepare(images(tmp_path / "in", 6), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    prepare("./in", Path("out"))
    assert "is already prepared" in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    folder = images(tmp_path / "in", 6)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(BadRequestError, match="out is not empty and holds no prepared set"):
        prepare(folder, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadRequestError, match="file is a file"):
        prepare(folder, tmp_path / "file")
    for impossible in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(FailureError, match="cannot create"):
            prepare(folder, impossible)
    (tmp_path / "empty").mkdir()
    prepare(folder, tmp_path / "empty")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_good_image_is_a_bad_request_with_the_reasons(tmp_path, split):
    folder = images(tmp_path / "in" / ("val" if split == "train" else "train"), 3)
    bad = tmp_path / "in" / split
    bad.mkdir()
    for i in range(9):
        (bad / f"{i}.png").write_bytes(b"")
    with pytest.raises(BadRequestError) as caught:
        prepare(tmp_path / "in", tmp_path / "out")
    text = str(caught.value)
    assert "none of the 9 images" in text and f"for {split}" in text and f"{split}/0.png: empty file" in text
    assert "3.png" not in text and "rejects.jsonl" in text
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 9
    with pytest.raises(BadRequestError, match="unfinished"):
        PreparedSet.open(tmp_path / "out")
    assert folder.exists()


def test_a_damaged_shard_of_an_unfinished_set_is_made_again(tmp_path, small_shards):
    folder = images(tmp_path / "in", 12)
    prepare(folder, tmp_path / "out")
    shard, other = (tmp_path / "out" / "train" / name for name in ("00001.zip", "00000.zip"))
    complete = shard.read_bytes()
    flipped = bytearray(complete)
    flipped[len(complete) // 2] ^= 1
    for damaged in (b"", complete[:100], bytes(flipped), other.read_bytes()):
        shard.write_bytes(damaged)
        (tmp_path / "out" / "manifest.json").unlink()
        prepare(folder, tmp_path / "out", workers=2)
        assert shard.read_bytes() == complete


def test_a_small_set_whose_held_out_image_is_bad_still_gets_a_validation_split(tmp_path):
    """Whichever image is the bad one, one of the good ones is held out."""
    for bad in range(4):
        folder = tmp_path / f"pictures{bad}"
        folder.mkdir()
        for number in range(4):
            Image.new("RGB", (16, 16), (number * 40, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{bad}.png").write_bytes(b"no image")
        out = tmp_path / f"set{bad}"
        prepare(folder, out)
        manifest = PreparedSet.open(out).manifest
        assert (manifest.counts["train"], manifest.counts["val"], manifest.rejects) == (2, 1, 1)
