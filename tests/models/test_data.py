"""The data sets: real, split without overlap, the same for every run."""

import sys
import types

import pytest
import torch

from bigmodel_models import data
from bigmodel_models.errors import TrainingError


def test_digits():
    digits = data.digits()
    assert digits.train_x.shape == (1347, 1, 28, 28)
    assert digits.test_x.shape == (450, 1, 28, 28)
    assert digits.train_x.min() == 0
    assert digits.train_x.max() <= 1
    for labels in (digits.train_y, digits.test_y):
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert bool((share > 0.09).all() and (share < 0.11).all())


def test_no_test_image_is_a_training_image():
    digits = data.digits()
    train = {x.numpy().tobytes() for x in digits.train_x}
    assert not any(x.numpy().tobytes() in train for x in digits.test_x)


def test_the_split_is_the_same_every_time():
    torch.manual_seed(1)
    first = data.digits()
    torch.manual_seed(2)
    second = data.digits()
    assert torch.equal(first.test_x, second.test_x)
    assert torch.equal(first.train_y, second.train_y)


def test_standardised_by_the_training_part():
    digits = data.digits()
    train = digits.standardised(digits.train_x)
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, abs=1e-5)
    test = digits.standardised(digits.test_x)
    assert test.mean().item() != pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("make", [data.synthetic_images, data.synthetic_regression])
def test_synthetic_sets_are_fixed(make):
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    second = make()
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert bool(first.train_x.isfinite().all())


def test_random_shift():
    images = torch.zeros(200, 1, 9, 9)
    images[:, 0, 4, 4] = 1.0
    moved = data.random_shift(images, 2, torch.Generator().manual_seed(3))
    where = moved[:, 0].flatten(1).argmax(dim=1)
    assert bool((moved.sum(dim=(1, 2, 3)) == 1).all())
    rows, columns = where // 9 - 4, where % 9 - 4
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(data.random_shift(images, 0, torch.Generator()), images)


def test_text_is_what_it_was_made_of():
    text = data.text()
    assert len(text.train_x) > 20 * len(text.test_x) / 3
    for x, y in ((text.train_x, text.train_y), (text.test_x, text.test_y)):
        assert torch.equal(x[:, 1:], y[:, :-1])  # the target is the next character
        assert x.dtype == torch.int64
        assert x.min() >= 0
        assert x.max() < data.CHARACTERS
    assert "assert" in data.as_text(text.train_x[:20].flatten())
    assert torch.equal(text.train_x[1:, 0], text.train_y[:-1, -1])


def test_text_without_the_help_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TrainingError, match=r"pydoc_data.*apt-get install"):
        data.text()


def test_tones():
    tones = data.tones(6, 2, 100)
    assert tones.train_x.shape == (6, 100)
    assert tones.test_y.shape == (2, 100)
    assert torch.equal(tones.train_x[:, 1:], tones.train_y[:, :-1])
    assert tones.train_x.abs().max() <= 1
    assert torch.equal(tones.train_x, data.tones(6, 2, 100).train_x)


def test_unknown_data():
    with pytest.raises(TrainingError, match=r"digits, mnist, synthetic, got 'cifar'"):
        data.load("cifar")


class TestMnist:
    def test_without_torchvision_names_the_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(TrainingError, match="pip install torchvision"):
            data.mnist("somewhere")

    def test_without_files_names_the_remedy(self, monkeypatch):
        def mnist(root, train, download):
            assert not download
            raise RuntimeError("Dataset not found.")

        self.install(monkeypatch, mnist)
        with pytest.raises(TrainingError, match=r"'somewhere'(.|\n)*download=True(.|\n)*--data-dir"):
            data.mnist("somewhere")

    def test_with_files(self, monkeypatch):
        def mnist(root, train, download):
            count = 30 if train else 20
            images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
            return types.SimpleNamespace(data=images, targets=torch.arange(count) % 10)

        self.install(monkeypatch, mnist)
        loaded = data.load("mnist", "somewhere")
        assert loaded.train_x.shape == (30, 1, 28, 28)
        assert loaded.test_x.shape == (20, 1, 28, 28)
        assert loaded.train_x.dtype == torch.float32
        assert 0.9 < loaded.train_x.max() <= 1

    @staticmethod
    def install(monkeypatch, mnist):
        module = types.ModuleType("torchvision.datasets")
        module.MNIST = mnist
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_without_scikit_learn_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TrainingError, match=r"sklearn: pip install 'bigmodel_kernels\[models\]'"):
        data.digits()
