import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.classification_data import CIFAR10DataModule, ImageDataset, MNISTDataModule, crop
from lightning_meta.running.segments import Segment
from lightning_meta.sources import cifar, digits

ONE = Segment(0, 0, 1, True)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def fail(*_):
        raise AssertionError("a test wants to download")

    monkeypatch.setattr(digits, "download_mnist", fail)
    monkeypatch.setattr(cifar, "download_cifar10", fail)


def numbered(count, shape=(1, 28, 28), first=0):
    """ImageBatch that all differ, and their labels."""
    numbers = torch.arange(first, first + count)
    images = torch.zeros(count, *shape, dtype=torch.uint8)
    images[:, 0, 5, 5], images[:, 0, 5, 6] = numbers % 256, numbers // 256
    return images, (numbers % 10).to(torch.uint8)


@pytest.fixture
def small_sources(monkeypatch):
    shape = (3, 32, 32)
    monkeypatch.setattr(
        cifar, "coloured_digits", lambda train: numbered(80, shape) if train else numbered(20, shape, 80)
    )
    monkeypatch.setattr(digits, "small_digits", lambda: (numbered(1797)[0][:, 0], numbered(1797)[1]))


def set_up(make, stage="fit", **options):
    data = make(**{"source": "stand-in"} | options)
    data.prepare_data()
    data.setup(stage)
    data.trainer = SimpleNamespace(
        training=stage == "fit",
        global_rank=0,
        world_size=1,
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch),
    )
    return data


def numbers_of(images):
    return (images[:, 0, 5, 5].long() + 256 * images[:, 0, 5, 6].long()).tolist()


def batch_of(data, name, *indices):
    pictures = data.sets[name]
    return data.on_after_batch_transfer(pictures.collate([pictures[i, ONE] for i in indices]), 0)


@pytest.mark.parametrize(("make", "count", "held_out"), [(MNISTDataModule, 1797, 140), (CIFAR10DataModule, 100, 8)])
def test_splits_have_pictures_of_their_own_and_the_same_for_every_seed(make, count, held_out, small_sources):
    parts = []
    for seed in (0, 1):
        data = set_up(make, seed=seed)
        parts.append({name: numbers_of(pictures.images) for name, pictures in data.sets.items()})
    assert parts[0] == parts[1]
    everything = [number for part in parts[0].values() for number in part]
    assert sorted(everything) == list(range(count))
    assert len(parts[0]["val"]) == held_out
    assert parts[0]["val"] != sorted(parts[0]["val"]), "drawn at random"
    for pictures in data.sets.values():
        assert [n % 10 for n in numbers_of(pictures.images)] == pictures.labels.tolist()


def test_the_papers_splits(real_data):
    data = set_up(MNISTDataModule, root=str(real_data), source="paper")
    assert {name: len(pictures) for name, pictures in data.sets.items()} == {
        "train": 55_000,
        "val": 5_000,
        "test": 10_000,
    }
    assert data.data_name == "MNIST"
    assert data.classes == list("0123456789")


def test_all_training_pictures_come_once_before_any_comes_again(small_sources):
    pictures = set_up(CIFAR10DataModule).sets["train"]
    laps = [[int(pictures[i, ONE][0][0]) for i in range(72 * lap, 72 * (lap + 1))] for lap in range(2)]
    assert sorted(laps[0]) == sorted(laps[1]) == list(range(72))
    assert laps[0] != laps[1]


@pytest.mark.parametrize("make", [MNISTDataModule, CIFAR10DataModule])
def test_a_sample_is_a_function_of_seed_and_number(make, small_sources):
    one, again, other = (set_up(make, seed=seed) for seed in (3, 3, 4))
    whole = batch_of(one, "train", *range(8))
    assert torch.equal(whole.x, batch_of(again, "train", *range(8)).x)
    alone = [batch_of(again, "train", i) for i in reversed(range(8))]
    assert torch.equal(whole.x, torch.cat([batch.x for batch in reversed(alone)])), "whatever else is in the batch"
    assert torch.equal(whole.labels, torch.cat([batch.labels for batch in reversed(alone)]))
    assert not torch.equal(whole.x, batch_of(other, "train", *range(8)).x)
    val = [batch_of(data, "val", *range(5)).x for data in (one, other)]
    assert torch.equal(*val)


def test_crops_pixel_by_pixel():
    padded = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    found = crop(padded, 4, torch.tensor([[2, 0, 0], [1, 2, 1]]))
    for y in range(4):
        for x in range(4):
            assert torch.equal(found[0, :, y, x], padded[0, :, 2 + y, x])
            assert torch.equal(found[1, :, y, x], padded[1, :, 1 + y, 2 + 3 - x])


@pytest.mark.parametrize(("padding", "flip"), [(1, False), (2, True)])
def test_crops_and_mirrors_are_all_drawn(padding, flip):
    images = torch.full((1, 1, 8, 8), 9, dtype=torch.uint8)
    images[0, 0, 3, 2] = 200
    pictures = ImageDataset("train", images, torch.zeros(1), padding, flip, seed=0)
    found, _ = pictures.load(pictures.collate([pictures[i, ONE] for i in range(600)]))
    places = (found[:, 0] == 200).flatten(1).int().argmax(1)
    shifts = range(-padding, padding + 1)
    columns = {2 + shift for shift in shifts} | ({7 - 2 + shift for shift in shifts} if flip else set())
    assert set(places.tolist()) == {8 * (3 + dy) + x for dy in shifts for x in columns}
    assert set(found.unique().tolist()) == {0, 9, 200}, "zeros around"
    still = ImageDataset("val", images, torch.zeros(1))
    assert torch.equal(still.load(still.collate([still[0, ONE]]))[0], images)


def test_batches_are_normalised():
    data = set_up(CIFAR10DataModule, train_pictures=3, augment=False)
    batch = batch_of(data, "train", 0, 1, 2)
    order = [int(data.sets["train"][i, ONE][0][0]) for i in range(3)]
    image = data.sets["train"].images[order].double() / 255
    for c, (mean, std) in enumerate(zip((0.491, 0.482, 0.447), (0.247, 0.243, 0.262), strict=True)):
        torch.testing.assert_close(batch.x[:, c].double(), (image[:, c] - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.unnormalised(batch.x).double(), image, rtol=1e-5, atol=1e-5)
    digit = batch_of(set_up(MNISTDataModule), "val", 0).x
    assert digit.min() == 0
    assert digit.max() == 1


def test_fewer_pictures(small_sources):
    data = set_up(CIFAR10DataModule, train_pictures=11, val_pictures=3, test_pictures=7)
    whole = set_up(CIFAR10DataModule)
    for name, count in (("train", 11), ("val", 3), ("test", 7)):
        assert torch.equal(data.sets[name].images, whole.sets[name].images[:count])
    assert data.test_samples == 7
    for option, there in (("train_pictures", 72), ("val_pictures", 8), ("test_pictures", 20)):
        for wrong in (0, there + 1):
            with pytest.raises(InputError, match=f"data.{option} is {wrong}, but there are {there} images"):
                set_up(CIFAR10DataModule, **{option: wrong})


def test_the_data_are_read_once_for_fit_and_test(small_sources, monkeypatch):
    data = set_up(CIFAR10DataModule)
    monkeypatch.setattr(cifar, "coloured_digits", None)
    data.setup("test")


def paint(folder, classes, count):
    for red in range(classes):
        (folder / f"class {red}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (100 * red, i, 30)).save(folder / f"class {red}" / f"{i}.png")


def test_class_folders_of_the_users_own(tmp_path):
    paint(tmp_path / "own", 3, 8)
    for make in (MNISTDataModule, CIFAR10DataModule):
        data = set_up(make, pictures=str(tmp_path / "own"), source="auto")
        assert data.classes == ["class 0", "class 1", "class 2"]
        assert {name: len(pictures) for name, pictures in data.sets.items()} == {"train": 18, "val": 2, "test": 4}
        assert batch_of(data, "train", 0, 1).x.shape == (2, *data.shape)
        assert data.data_name.startswith("pictures of own")


def test_the_first_test_pictures_are_of_all_classes(tmp_path):
    for split, count in (("train", 40), ("test", 30)):
        paint(tmp_path / "own" / split, 3, count)
    data = set_up(CIFAR10DataModule, pictures=str(tmp_path / "own"), source="auto", test_pictures=30)
    pictures = data.sets["test"]
    assert torch.equal(pictures.images[:, 0, 0, 0], 100 * pictures.labels), "each with its own label"
    assert pictures.labels.bincount(minlength=3).min() > 5


def test_pictures_to_predict(tmp_path, small_sources):
    ink = np.full((56, 70, 3), 250, np.uint8)
    ink[20:36, 30:40] = 10
    (tmp_path / "mine").mkdir()
    Image.fromarray(ink).save(tmp_path / "mine" / "two.png")
    Image.fromarray(255 - ink).save(tmp_path / "mine" / "ten.png")
    data = set_up(MNISTDataModule, "predict", images=str(tmp_path / "mine"))
    assert data.names == ["ten.png", "two.png"]
    batch = batch_of(data, "predict", 0, 1)
    assert batch.labels.tolist() == [-1, -1]
    torch.testing.assert_close(batch.x[0], batch.x[1])  # dark ink on light paper is turned
    assert batch.x[0, 0, 0, 0] < 0.05
    assert batch.x[0, 0, 14, 14] > 0.9
    data = set_up(CIFAR10DataModule, "predict", images=str(tmp_path / "mine" / "two.png"))
    assert data.sets["predict"].images.shape == (1, 3, 32, 32)
    assert data.sets["predict"].images[0, 0, 0, 0] == 250
    for wrong in ("nothing.png", "nowhere"):
        with pytest.raises(InputError, match=wrong):
            set_up(MNISTDataModule, "predict", images=str(tmp_path / wrong))


def damaged_archive(root):
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in ("data_batch_1", "data_batch_2"):
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = 5
            archive.addfile(info, io.BytesIO(b"wrong"))


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "damaged").mkdir()
    damaged_archive(tmp_path / "damaged")
    paint(tmp_path / "one class", 1, 20)
    paint(tmp_path / "few", 2, 2)
    cases = [
        ({"root": str(tmp_path / "damaged"), "source": "auto"}, "cifar-10-python.tar.gz"),
        ({"root": str(tmp_path / "none"), "source": "paper", "download": False}, "none"),
        ({"pictures": str(tmp_path / "one class")}, "give at least 2 classes"),
        ({"pictures": str(tmp_path / "few")}, "too few"),
    ]
    for options, words in cases:
        with pytest.raises(InputError, match=words) as error:
            set_up(CIFAR10DataModule, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="MetaSchedule"):
        set_up(MNISTDataModule).train_dataloader()
