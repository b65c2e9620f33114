import multiprocessing
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.learning_to_learn_data import (
    DigitProblemsDataModule,
    ImageProblemsDataModule,
    QuadraticDataModule,
    only,
)
from lightning_meta.learned_optimizers.problem_sets import ClassificationSet, OneQuadratic, QuadraticSet
from lightning_meta.learned_optimizers.unroll import loss_and_gradient
from lightning_meta.running.segments import Segment
from lightning_meta.sources import cifar, digits

WHOLE = Segment(0, 0, 40, True)
CPU = torch.empty(0)  # float32 there


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def fail(*_):
        raise AssertionError("a test wants to download")

    monkeypatch.setattr(digits, "download_mnist", fail)
    monkeypatch.setattr(cifar, "download_cifar10", fail)


def quadratics(name="train", seed=0, **options):
    return QuadraticSet(name, seed, 4, "normal", 0.1, **options)


def classifications(name="train", seed=0, **options):
    images = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 1, 2, 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return ClassificationSet(name, seed, network, images, torch.arange(30) % 3, 5, 0.1, **options)


def equal(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


SETS = pytest.mark.parametrize("make", [quadratics, classifications])
SCALED = pytest.mark.parametrize("scaling", [0.0, 2.0])


def in_another_process(make, scaling, queue):
    queue.put(make(scaling=scaling)[7, WHOLE][0])


@SETS
@SCALED
def test_a_problem_is_a_function_of_seed_split_and_number(make, scaling):
    problems = make(scaling=scaling)
    first = [problems[i, WHOLE][0] for i in range(8)]
    assert all(equal(problems[i, WHOLE][0], first[i]) for i in reversed(range(8)))
    assert equal(make(scaling=scaling)[7, WHOLE][0], first[7])
    for other in (problems[6, WHOLE], make("train", 1)[7, WHOLE], make("val")[7, WHOLE], make("test/a")[7, WHOLE]):
        assert not any(np.array_equal(a, b) for a, b in zip(other[0], first[7], strict=False))


def test_a_problem_is_the_same_in_another_process():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(classifications, 2.0, queue))
    process.start()
    assert equal(queue.get(timeout=20), classifications(scaling=2.0)[7, WHOLE][0])
    process.join()


@SETS
@pytest.mark.parametrize("split", ["val", "test/100 steps", "tune/100 steps", "predict"])
def test_only_training_problems_depend_on_the_seed(make, split):
    assert equal(make(split, 0)[3, WHOLE][0], make(split, 1)[3, WHOLE][0])
    assert not equal(make("train", 0)[3, WHOLE][0], make("train", 1)[3, WHOLE][0])


@SETS
def test_test_cases_start_alike_and_no_other_split_does(make):
    starts = {name: make(name)[2, WHOLE][0][0] for name in ("train", "val", "test/a", "test/b", "tune/a")}
    assert np.array_equal(starts["test/a"], starts["test/b"])
    assert len({start.tobytes() for start in starts.values()}) == 4


@SCALED
def test_chunks_of_a_problem_line_up(scaling):
    problems = classifications(scaling=scaling)
    *whole, indices = problems[3, WHOLE][0]
    assert indices.shape == (41, 5)
    assert len(whole) == 2 - (scaling == 0)
    for start, stop in ((0, 20), (20, 40), (33, 40)):
        *drawn, part = problems[3, Segment(0, start, stop, stop == 40)][0]
        assert equal(drawn, whole)
        assert np.array_equal(part, indices[start : stop + 1])
    chunk = problems.problems(problems.collate([problems[i, Segment(0, 20, 40, True)] for i in (3, 4)]))
    full = problems.problems(problems.collate([problems[i, WHOLE] for i in (3, 4)]))
    for t in (20, 31, 40):
        torch.testing.assert_close(chunk.loss(chunk.start, t), full.loss(full.start, t))


def test_minibatches_are_drawn_from_all_images():
    indices = np.concatenate([classifications()[i, WHOLE][0][-1].ravel() for i in range(5)])
    assert set(indices) == set(range(30))


@pytest.mark.parametrize(("entries", "mean", "std"), [("normal", 0, 1), ("uniform", 0.5, 1 / 12**0.5)])
def test_quadratics_have_the_entries_asked_for(entries, mean, std):
    batch = QuadraticSet("train", 0, 20, entries, 0.1).batch(20, 5, CPU)
    for values, m, s in ((batch.W, mean, std), (batch.y, mean, std), (batch.start, 0, 0.1)):
        assert values.mean().item() == pytest.approx(m, abs=0.2 * s)
        assert values.std().item() == pytest.approx(s, rel=0.1)


@SETS
def test_scaled_coordinates_are_the_same_problem_in_other_units(make):
    scaled, plain = make(scaling=1.5).batch(6, 5, CPU), make().batch(6, 5, CPU)
    torch.testing.assert_close(scaled.scale * scaled.start, plain.start)
    seen, _ = loss_and_gradient(scaled, scaled.start, 0)
    torch.testing.assert_close(seen, scaled._replace(scale=None).loss(plain.start, 0))
    stretch = scaled.scale.log()
    assert -1.5 <= stretch.min() < -0.8
    assert 0.8 < stretch.max() <= 1.5
    assert len(set(stretch.flatten().tolist())) == stretch.numel()


@pytest.mark.parametrize("make", [QuadraticDataModule, DigitProblemsDataModule, ImageProblemsDataModule])
def test_only_training_is_in_other_units(make, small_sources):
    data = make(random_scaling=3.0, **({} if make is QuadraticDataModule else {"source": "stand-in"}))
    data.setup("fit")
    assert {name: problems.scaling for name, problems in data.sets.items() if problems.scaling} == {"train": 3.0}


@pytest.fixture
def small_sources(monkeypatch):
    """Stand-ins whose images all differ."""
    monkeypatch.setattr(cifar, "coloured_digits", lambda train: coloured(60, 0) if train else coloured(20, 60))
    monkeypatch.setattr(digits, "small_digits", lambda: (coloured(1460, 0)[0][:, 0, :28, :28], coloured(1460, 0)[1]))


def coloured(count, first):
    numbers = torch.arange(first, first + count)
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = (numbers % 256)[:, None], (numbers // 256)[:, None]
    return images, (numbers % 10).to(torch.uint8)


def numbers_of(images):
    return set((images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()).tolist())


@pytest.mark.parametrize(("make", "count"), [(DigitProblemsDataModule, 1460), (ImageProblemsDataModule, 80)])
def test_splits_have_images_of_their_own(make, count, small_sources):
    data = make(source="stand-in", download=False)
    data.prepare_data()
    data.setup("fit")
    images = {name.split("/")[0]: numbers_of(problems.images) for name, problems in data.sets.items()}
    assert images["train"] == images["tune"]
    assert images["test"] == images["predict"]
    parts = [images["train"], images["val"], images["test"]]
    assert sum(map(len, parts)) == len(set.union(*parts)) == count
    assert len(images["train"]) == 5 * len(images["val"]) or make is DigitProblemsDataModule


def test_the_real_stand_ins_have_the_shapes_of_the_paper():
    digit, picture = (
        make(source="stand-in", minibatch=2) for make in (DigitProblemsDataModule, ImageProblemsDataModule)
    )
    for data, shape, n in ((digit, (1, 28, 28), 15_910), (picture, (3, 32, 32), 22_682)):
        data.setup("fit")
        problems = data.sets["val"].batch(1, 3, CPU)
        assert problems.images.shape[1:] == shape
        assert problems.start.shape == (1, n)
        assert problems.indices.shape == (1, 4, 2)
        assert problems.loss(problems.start, 3).isfinite().all()


def test_auto_says_that_it_uses_a_stand_in(tmp_path, small_sources):
    for make, wanted in ((DigitProblemsDataModule, "MNIST"), (ImageProblemsDataModule, "CIFAR-10")):
        data = make(root=str(tmp_path), download=False)
        data.prepare_data()
        with pytest.warns(UserWarning, match=f"{wanted} not found in {tmp_path}"):
            data.setup("fit")
        assert "stand-in" in data.data_name
        with pytest.raises(InputError, match=wanted):
            make(root=str(tmp_path), download=False, source="paper").setup("fit")


def test_only_takes_some_classes_and_renumbers_them():
    images, labels = torch.arange(12), torch.arange(12, dtype=torch.uint8) % 4
    some, renumbered = only(images, labels, [3, 1])
    assert some.tolist() == [1, 3, 5, 7, 9, 11]
    assert renumbered.tolist() == [0, 1] * 3
    with pytest.raises(InputError, match=r"no class 4 .*0 to 3"):
        only(images, labels, [1, 4])


def test_label_subsets_for_training_and_for_a_test_case(small_sources):
    cases = {"held out": {"labels": [0, 9]}, "all": {"labels": list(range(10))}}
    data = ImageProblemsDataModule(source="stand-in", labels=[1, 2, 5], tests=cases)
    data.setup("fit")
    wanted = {"train": [1, 2, 5], "val": [1, 2, 5], "test/held out": [0, 9], "tune/held out": [0, 9]}
    for name, labels in (wanted | {"test/100 steps": [1, 2, 5], "test/all": list(range(10))}).items():
        problems = data.sets[name]
        original = problems.images[:, 0, 0, 0].long() % 10
        assert torch.equal(torch.tensor(labels)[problems.labels.long()], original), name
        assert sorted(set(original.tolist())) == labels
        assert list(problems.network.parameters())[-1].shape == (len(labels),)
        assert problems.coordinates == sum(p.numel() for p in problems.network.parameters())


def test_test_cases_change_the_network(small_sources):
    cases = {
        "longer": {"steps": 7},
        "wide": {"hidden": [40]},
        "deep": {"hidden": [20, 20], "steps": 3},
        "ReLU": {"activation": "relu"},
    }
    data = DigitProblemsDataModule(source="stand-in", steps=5, tests=cases)
    data.setup("test")
    assert list(data.cases) == ["5 steps", *cases]
    counts = {"5 steps": 15_910, "longer": 15_910, "wide": 31_810, "deep": 16_330, "ReLU": 15_910}
    for case, count in counts.items():
        assert data.sets[f"test/{case}"].coordinates == data.sets[f"tune/{case}"].coordinates == count
        kinds = {type(layer) for layer in data.sets[f"test/{case}"].network} & {nn.ReLU, nn.Sigmoid}
        assert kinds == {nn.ReLU if case == "ReLU" else nn.Sigmoid}
    assert [data.case_steps(case) for case in counts] == [5, 7, 5, 3, 5]
    assert data.sets["train"].coordinates == 15_910


def test_tuning_problems_are_like_the_test_cases_but_of_training_images(small_sources):
    data = DigitProblemsDataModule(source="stand-in", tune_problems=3, tests={"short": {"steps": 4, "hidden": [5]}})
    data.setup("test")
    problems = data.tuning_problems("short", CPU)
    assert problems.segment == Segment(0, 0, 4, True)
    assert problems.start.shape == (3, 785 * 5 + 60)
    assert numbers_of(problems.images) == numbers_of(data.sets["train"].images)


@pytest.mark.parametrize(
    ("make", "case", "message"),
    [
        (QuadraticDataModule, {"hidden": [20]}, r"data.tests: odd: .*'hidden'"),
        (DigitProblemsDataModule, {"width": 3}, r"data.tests: odd: .*'width'"),
        (DigitProblemsDataModule, {"labels": [3, 11]}, "no class 11"),
        (DigitProblemsDataModule, {"activation": "tanh"}, r"data.tests: odd: .*'tanh'"),
        (ImageProblemsDataModule, {"activation": "relu"}, r"data.tests: odd: .*'activation'"),
    ],
)
def test_an_unknown_option_of_a_test_case(make, case, message, small_sources):
    data = make(tests={"odd": case}, **({} if make is QuadraticDataModule else {"source": "stand-in"}))
    with pytest.raises(InputError, match=message):
        data.setup("fit")


def test_options_have_their_defaults_outside_of_the_command_line():
    data = QuadraticDataModule(dimension=3)
    data.setup("fit")
    assert (data.hparams.val_problems, data.hparams.num_workers, data.hparams.dimension) == (20, 0, 3)
    with pytest.raises(InputError, match="MetaSchedule"):
        data.train_dataloader()


W, Y = np.arange(9.0).reshape(3, 3), np.ones(3)


def test_a_quadratic_of_the_users_own(tmp_path):
    np.savez(tmp_path / "own.npz", W=W, y=Y, more=1)
    data = QuadraticDataModule(problem=str(tmp_path / "own.npz"), start_std=0.5)
    data.setup("predict")
    problems = data.sets["predict"].batch(4, 6, CPU)
    assert problems.W.tolist() == [W.tolist()] * 4
    assert problems.y.tolist() == [Y.tolist()] * 4
    assert problems.segment.stop == 6
    assert len({tuple(start) for start in problems.start.tolist()}) == 4
    assert 0.1 < problems.start.std() < 1
    data.setup("test")
    assert data.sets["predict"].coordinates == 10


def save_cut(path):
    np.savez(path, W=W, y=Y)
    path.write_bytes(path.read_bytes()[:300])


def save_flipped(path):
    np.savez(path, W=W, y=Y)
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)


def save_one_array(path):
    with path.open("wb") as file:
        np.save(file, W)


def save_bomb(path):
    """An archive that says of itself that it unpacks to 2 GiB."""
    np.savez(path, W=W, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", "")  # so that the list of members is written anew
        archive.getinfo("W.npy").file_size = 2**31


BAD = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("W = 1\ny = 2\n"),
    "cut": save_cut,
    "flipped": save_flipped,
    "one array": save_one_array,
    "no y": lambda path: np.savez(path, W=W),
    "words": lambda path: np.savez(path, W=np.array([["a"]]), y=np.ones(1)),
    "objects": lambda path: np.savez(path, W=np.array([[{}]]), y=np.ones(1)),
    "not square": lambda path: np.savez(path, W=W[:2], y=Y),
    "of two sizes": lambda path: np.savez(path, W=W, y=Y[:2]),
    "a column": lambda path: np.savez(path, W=W, y=Y[:, None]),
    "a number": lambda path: np.savez(path, W=1.0, y=1.0),
    "nothing": lambda path: np.savez(path, W=W[:0, :0], y=Y[:0]),
    "NaN": lambda path: np.savez(path, W=W * np.nan, y=Y),
    "infinite": lambda path: np.savez(path, W=W, y=Y / 0),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_quadratic_that_cannot_be_used(tmp_path, kind):
    BAD[kind](tmp_path / "own.npz")
    with pytest.raises(InputError, match=r"own\.npz") as error:
        OneQuadratic("predict", str(tmp_path / "own.npz"), 0.1)
    assert "\n" not in str(error.value)


def test_a_quadratic_that_would_fill_the_memory(tmp_path):
    save_bomb(tmp_path / "own.npz")
    with pytest.raises(InputError, match=r"own\.npz .* unpacks to more than 1 GiB"):
        OneQuadratic("predict", str(tmp_path / "own.npz"), 0.1)


def paint(folder, classes, count, first=0):
    """Pictures in one colour: the class in red and a number in green."""
    for red in range(classes):
        (folder / f"class {red}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (100 * red, first + 20 * red + i, 30)).save(folder / f"class {red}" / f"{i}.png")


def test_problems_from_own_pictures(tmp_path):
    paint(tmp_path, 2, 9)
    for make, shape in ((DigitProblemsDataModule, (1, 28, 28)), (ImageProblemsDataModule, (3, 32, 32))):
        data = make(pictures=str(tmp_path), minibatch=4)
        data.prepare_data()
        data.setup("fit")
        train, val, test = (data.sets[name] for name in ("train", "val", "test/100 steps"))
        assert [len(problems.images) for problems in (train, val, test)] == [12, 3, 3]
        assert train.images.shape[1:] == shape
        assert tmp_path.name in data.data_name
        problems = train.batch(2, 3, CPU)
        assert problems.loss(problems.start, 0).isfinite().all()
    paint(tmp_path / "grey", 2, 9)
    data = DigitProblemsDataModule(pictures=str(tmp_path / "grey"))
    data.setup("fit")
    greens = sorted(round((100 * (n // 20) + n + 30) / 3) for n in [*range(9), *range(20, 29)])
    greys = sorted(
        value for name in ("train", "val", "test/100 steps") for value in data.sets[name].images[:, 0, 0, 0].tolist()
    )
    assert greys == pytest.approx(greens, abs=1)
