"""ImageNet as it is distributed: the classes of its flat validation folder, from every file that people have."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from movq_cli.errors import BadRequestError
from movq_cli.sources.label_files import label_held_out
from movq_cli.sources.open import open_source
from movq_cli.sources.source import Source

SYNSETS = ("n03", "n01", "n02")
HELD_OUT = {f"ILSVRC2012_val_{number:08d}": SYNSETS[number * 2 % 3] for number in range(1, 8)}
FORMS = {
    "pairs": [f"{name}.JPEG {synset}" for name, synset in HELD_OUT.items()],
    "tabs": [f"val/{name}.JPEG\t{synset}" for name, synset in reversed(HELD_OUT.items())],
    "commas": [f"{name},{synset}" for name, synset in HELD_OUT.items()],
    "kaggle": ["ImageId,PredictionString", *(f"{n},{s} 85 1 499 272 {s} 3 4 5 6 " for n, s in HELD_OUT.items())],
    "bare": [*HELD_OUT.values(), ""],
}


@pytest.fixture
def imagenet(tmp_path: Path) -> Source:
    for synset in SYNSETS:
        (tmp_path / "in" / "train" / synset).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "in" / "train" / synset / f"{synset}_7.JPEG")
    (tmp_path / "in" / "val").mkdir()
    for name in HELD_OUT:
        Image.new("RGB", (9, 9)).save(tmp_path / "in" / "val" / f"{name}.JPEG")
    return open_source(str(tmp_path / "in"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels_in_sorted_order_of_the_synsets(
    imagenet: Source, tmp_path: Path, form: str
) -> None:
    assert imagenet.labels is None and imagenet.splits is not None
    (tmp_path / "labels").write_text("\ufeff" * (form == "kaggle") + "\r\n".join(FORMS[form]))
    labelled = label_held_out(imagenet, tmp_path / "labels")
    assert labelled.classes == ("n01", "n02", "n03") and labelled.labels is not None
    for name, label, split in zip(labelled.names, labelled.labels, imagenet.splits, strict=True):
        stem = Path(name).stem
        assert labelled.classes[label] == (HELD_OUT[stem] if split == "val" else stem[:3])


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["490", "361", "171"], "holds numbers"),
        ([f"{name}.JPEG {number}" for number, name in enumerate(HELD_OUT)], "holds numbers"),
        (["n01", "n02"], "2 lines for 7 images"),
        ([], "0 lines for 7 images"),
        (FORMS["pairs"][:-1], "no class for 1 of the 7 images in val, such as ILSVRC2012_val_00000007.JPEG"),
        ([*FORMS["pairs"][:-1], "ILSVRC2012_val_00000007 n09"], "1 classes without a train folder, such as n09"),
        (["a b c", "d e f"], "is not a list of labels"),
    ],
)
def test_a_file_that_does_not_fit_is_a_bad_request(
    imagenet: Source, tmp_path: Path, lines: list[str], fault: str
) -> None:
    (tmp_path / "labels").write_text("\n".join(lines))
    with pytest.raises(BadRequestError, match=fault):
        label_held_out(imagenet, tmp_path / "labels")


def test_numbers_are_classes_where_the_train_folders_are_called_so(tmp_path: Path) -> None:
    for name in ("train/10/a.png", "train/9/b.png", "val/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("x.png,9")
    labelled = label_held_out(open_source(str(tmp_path)), tmp_path / "labels.csv")
    assert labelled.classes == ("10", "9") and labelled.labels == (0, 1, 1)


def test_without_train_and_val_folders_or_a_readable_file_it_is_a_bad_request(imagenet: Source, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="cannot read the labels"):
        label_held_out(imagenet, tmp_path / "nowhere")
    with pytest.raises(BadRequestError, match="no train and val folders"):
        label_held_out(open_source(str(tmp_path / "in" / "train")), tmp_path / "nowhere")
