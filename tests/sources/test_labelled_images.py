import pytest
import torch
from PIL import Image

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.classification_data import CIFAR10DataModule, MNISTDataModule
from lightning_meta.learned_optimizers.learning_to_learn_data import DigitProblemsDataModule, ImageProblemsDataModule
from lightning_meta.sources import cifar, digits
from lightning_meta.sources.labelled_images import own_images

KINDS = {
    "MNIST": (MNISTDataModule, DigitProblemsDataModule, digits, "mnist", (1, 28, 28)),
    "CIFAR-10": (CIFAR10DataModule, ImageProblemsDataModule, cifar, "cifar10", (3, 32, 32)),
}
KIND = pytest.mark.parametrize(("kind", "which"), [(kind, which) for kind in KINDS for which in (0, 1)])


def module(kind, which, root, source, pictures=None, download=True):
    return KINDS[kind][which](root=str(root), source=source, pictures=pictures, download=download)


def paint(folder, classes, count, first=0):
    """Save images of one colour each: red encodes the class, green the number."""
    for red in range(classes):
        (folder / f"class {red}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (100 * red, first + 20 * red + i, 30)).save(folder / f"class {red}" / f"{i}.png")


@KIND
def test_stand_ins_say_so(kind, which, tmp_path):
    *_, shape = KINDS[kind]
    with pytest.warns(UserWarning, match=f"{kind} not found in {tmp_path}"):
        found = module(kind, which, tmp_path, "auto").read()
    assert "stand-in" in found.name
    assert kind in found.name
    assert found.images.shape[1:] == found.test_images.shape[1:] == shape
    assert found.images.dtype == torch.uint8
    assert found.classes == list("0123456789")
    assert len(found.labels) == len(found.images)
    assert set(found.test_labels.tolist()) == set(range(10))
    with pytest.raises(InputError, match=kind):
        module(kind, which, tmp_path, "paper").read()


@KIND
def test_what_is_there_is_taken(kind, which, tmp_path, monkeypatch):
    _, _, source, name, shape = KINDS[kind]
    pictures = torch.zeros(4, *shape[kind == "MNIST" :], dtype=torch.uint8)
    monkeypatch.setattr(source, f"has_{name}", lambda root: True)
    monkeypatch.setattr(source, name, lambda root, train: (pictures + train, torch.full((4,), int(train))))
    data = module(kind, which, tmp_path, "auto")
    found = data.read()
    assert found.name == data.data_name == kind
    assert found.images.shape == (4, *shape)
    assert found.images.all()
    assert not found.test_images.any()
    assert len(found.classes) == 10
    assert found.test_labels.tolist() == [0] * 4


@KIND
def test_downloads_only_what_is_wanted(kind, which, tmp_path, monkeypatch):
    _, _, source, name, _ = KINDS[kind]
    fetched = []

    def download(root):
        fetched.append(root)
        raise InputError("no network")

    monkeypatch.setattr(source, f"download_{name}", download)
    module(kind, which, tmp_path, "auto", download=False).prepare_data()
    module(kind, which, tmp_path, "stand-in").prepare_data()
    module(kind, which, tmp_path, "auto", "pictures").prepare_data()
    assert not fetched
    module(kind, which, tmp_path, "auto").prepare_data()
    module(kind, which, tmp_path, "paper").prepare_data()
    assert fetched == [str(tmp_path)] * 2
    monkeypatch.setattr(source, f"has_{name}", lambda root: True)
    module(kind, which, tmp_path, "paper").prepare_data()
    assert len(fetched) == 2


def seen(images):
    assert (images == images[:, :, :1, :1]).all()
    return images[:, 1, 0, 0].tolist()


def test_own_pictures_without_a_test_folder(tmp_path):
    paint(tmp_path, 2, 9)
    images, labels, test, test_labels, *_ = own_images(str(tmp_path), 8)
    assert images.shape == (15, 3, 8, 8)
    assert test.shape == (3, 3, 8, 8)
    numbers = seen(images) + seen(test)
    assert sorted(numbers) == [*range(9), *range(20, 29)]
    assert numbers != sorted(numbers), "shuffled"
    assert [n // 20 for n in numbers] == [*labels.tolist(), *test_labels.tolist()]
    assert torch.equal(own_images(str(tmp_path), 8)[0], images)


def test_own_pictures_with_train_and_test_folders(tmp_path):
    paint(tmp_path / "train", 3, 4)
    paint(tmp_path / "test", 3, 2, first=100)
    images, labels, test, test_labels, *_ = own_images(str(tmp_path), 8)
    assert sorted(seen(images)) == [*range(4), *range(20, 24), *range(40, 44)]
    assert [n // 20 for n in seen(images)] == labels.tolist()
    assert sorted(seen(test)) == [100, 101, 120, 121, 140, 141]
    assert test_labels.tolist() != sorted(test_labels.tolist()), "shuffled"
    assert [n // 20 - 5 for n in seen(test)] == test_labels.tolist()


def test_own_pictures_that_cannot_be_used(tmp_path):
    paint(tmp_path / "few", 2, 3)
    with pytest.raises(InputError, match="too few"):
        own_images(str(tmp_path / "few"), 8)
    paint(tmp_path / "differ" / "train", 3, 4)
    paint(tmp_path / "differ" / "test", 2, 4)
    with pytest.raises(InputError, match="train and test differ"):
        own_images(str(tmp_path / "differ"), 8)
    with pytest.raises(InputError, match="none"):
        own_images(str(tmp_path / "none"), 8)


@KIND
def test_own_pictures_in_the_place_of_a_data_set(kind, which, tmp_path):
    *_, shape = KINDS[kind]
    paint(tmp_path / "own", 2, 9)
    found = module(kind, which, "nowhere", "paper", str(tmp_path / "own")).read()
    assert found.classes == ["class 0", "class 1"]
    assert found.name == f"pictures of own, {shape[1]}x{shape[2]}" + " in grey" * (kind == "MNIST")
    assert found.images.shape == (15, *shape)
    if kind == "MNIST":
        greys = [round((100 * (n // 20) + n + 30) / 3) for n in [*range(9), *range(20, 29)]]
        values = found.images[:, 0, 0, 0].tolist() + found.test_images[:, 0, 0, 0].tolist()
        assert sorted(values) == pytest.approx(sorted(greys), abs=1)
