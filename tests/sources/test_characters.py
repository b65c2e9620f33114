import contextlib
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from lightning_meta.sources.characters import (
    _FONTS,
    download_omniglot,
    font_alphabets,
    has_omniglot,
    omniglot,
    one_shot_runs,
    own_alphabets,
)
from tests.conftest import refused

# alphabet: number of its first character, characters; numbers do not follow the names
LAYOUT = {
    "images_background": {"Zeta": (1, 11), "Alpha": (12, 2)},
    "images_evaluation": {"Angelic": (965, 3)},
}


def write(path, ink):
    """A 1-bit image with black ink on white paper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(~np.asarray(ink, bool)).convert("1").save(path)


def ink(number, drawing):
    """A black block of 15 x 15 in 105 x 105 pixels, at a position of its own for each character and drawing."""
    picture = np.zeros((105, 105), bool)
    row, column = divmod(number % 25, 5)
    picture[15 * row : 15 * row + 15, 15 * (column + drawing) : 15 * (column + drawing) + 15] = True
    return picture


def block(number, drawing):
    """The same in 14 x 14 pixels: where ``omniglot(size=14)`` must have ink."""
    return ink(number, drawing)[7::15, 7::15].repeat(2, 0).repeat(2, 1)


@pytest.fixture
def root(tmp_path):
    for name, alphabets in LAYOUT.items():
        for alphabet, (first, characters) in alphabets.items():
            for i in range(characters):
                for drawing in (1, 2, 10):
                    file = f"character{i + 1:02}/{first + i:04}_{drawing:02}.png"
                    write(tmp_path / "omniglot-py" / name / alphabet / file, ink(first + i, drawing % 5))
    return tmp_path


def pack(root, name, top=True):
    """Replace a folder by an archive."""
    folder = root / "omniglot-py" / name
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder.parent if top else folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_reads_omniglot_in_order_and_writes_nothing(root, packed):
    if packed:
        for name in LAYOUT:
            pack(root, name)
    before = sorted(root.rglob("*"))
    for evaluation, name in enumerate(LAYOUT):
        alphabets = omniglot(root, bool(evaluation), size=14)
        assert list(alphabets) == sorted(LAYOUT[name])
        for alphabet, (images, numbers) in alphabets.items():
            first, characters = LAYOUT[name][alphabet]
            assert numbers == list(range(first, first + characters))
            assert images.shape == (characters, 3, 14, 14)
            assert images.dtype == torch.uint8
            for k, number in enumerate(numbers):
                for n, drawing in enumerate((1, 2, 10)):
                    expected = torch.from_numpy(block(number, drawing % 5))
                    assert torch.equal(images[k, n] > 127, expected)
    assert sorted(root.rglob("*")) == before


def test_prefers_the_folder_and_passes_other_files_over(root):
    images = omniglot(root, True)["Angelic"].images
    folder = root / "omniglot-py" / "images_evaluation"
    for name in (".DS_Store", "Angelic/.hidden.png", "Angelic/notes.txt"):
        (folder / name).touch()
    folder.with_suffix(".zip").write_bytes(b"never read")
    assert torch.equal(omniglot(root, True)["Angelic"].images, images)


def test_thin_strokes_survive_the_shrinking(tmp_path):
    stroke = np.zeros((105, 105), bool)
    stroke[:, 50] = stroke[np.arange(105), np.arange(105)] = True
    write(tmp_path / "omniglot-py/images_evaluation/A/character01/0965_01.png", stroke)
    image = omniglot(tmp_path, True)["A"].images[0, 0].double()
    assert (image.max(0).values > 20).all()
    assert (image.max(1).values > 20).all()
    assert image.mean() / 255 == pytest.approx(stroke.mean(), rel=0.02)


def test_names_what_is_missing(root):
    place = root / "omniglot-py"
    assert has_omniglot(root)
    pack(root, "images_background")
    assert has_omniglot(root)
    (place / "images_background.zip").unlink()
    assert not has_omniglot(root)
    refused(lambda: omniglot(root, False), "images_background.zip is missing", "github.com/brendenlake/omniglot", place)
    refused(lambda: one_shot_runs(root), "all_runs.zip is missing", "python/one-shot-classification", place)
    refused(lambda: omniglot(root / "none", True), "images_evaluation.zip is missing")
    assert not has_omniglot(root / "none")
    (place / "images_background").mkdir()
    refused(lambda: omniglot(root, False), place / "images_background", "holds no images")


@pytest.mark.parametrize("packed", [False, True])
def test_refuses_strange_contents_by_name(root, packed):
    folder = root / "omniglot-py" / "images_evaluation"
    first = folder / "Angelic/character01"

    def check(*words):
        if packed:
            pack(root, "images_evaluation")
        refused(lambda: omniglot(root, True), *words)
        if packed:
            with zipfile.ZipFile(folder.with_suffix(".zip")) as archive:
                archive.extractall(folder.parent)

    (first / "0965_10.png").rename(root / "kept.png")
    check("Angelic", "2 drawings of character 1, 3 of")
    (root / "kept.png").rename(first / "0965_10.png")
    for name in ("strange.png", "Angelic/0965_11.png", "Angelic/character01/965_11.png", "Angelic/a/character01/1.png"):
        write(folder / name, ink(0, 0))
        check(name, "<alphabet>/character01/0709_01.png")
        (folder / name).unlink()
    content = (first / "0965_02.png").read_bytes()
    (first / "0965_02.png").write_bytes(content[:-30])
    check("0965_02.png cannot be decoded")
    (first / "0965_02.png").write_bytes(b"no picture")
    check("0965_02.png is not an image")


def test_refuses_a_damaged_or_treacherous_archive(root):
    pack(root, "images_evaluation")
    path = root / "omniglot-py" / "images_evaluation.zip"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:120] + b"????" + content[124:]):
        path.write_bytes(damaged)
        assert has_omniglot(root)  # broken, but not absent
        refused(lambda: omniglot(root, True), path, "damaged")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside.png", b"")
    refused(lambda: omniglot(root, True), path, "outside")


@pytest.mark.parametrize("read", [lambda root: omniglot(root, True, 7), lambda root: one_shot_runs(root, 0)])
def test_refuses_a_size_that_holds_no_character(root, read):
    refused(lambda: read(root), "at least 8")


@pytest.fixture
def runs(tmp_path):
    """Twenty runs. In run r test image j shows the character of training image (7 j + r) mod 20."""
    folder = tmp_path / "omniglot-py" / "all_runs"
    for r in range(20):
        run, lines = f"run{r + 1:02}", []
        for j in range(20):
            write(folder / run / f"training/class{j + 1:02}.png", ink(j, 0))
            write(folder / run / f"test/item{j + 1:02}.png", ink((7 * j + r) % 20, 0))
            lines.append(f"{run}/test/item{j + 1:02}.png {run}/training/class{(7 * j + r) % 20 + 1:02}.png\n")
        (folder / run / "class_labels.txt").write_text("".join(reversed(lines)))
    return tmp_path


@pytest.mark.parametrize("packed", [None, "without a folder around them, as published", "with one"])
def test_reads_the_runs(runs, packed):
    if packed:
        pack(runs, "all_runs", top=packed == "with one")
    read = one_shot_runs(runs, size=21)
    assert len(read) == 20
    for r, run in enumerate(read):
        assert run.training.shape == run.test.shape == (20, 21, 21)
        assert run.training.dtype == torch.uint8
        assert run.answers.tolist() == [(7 * j + r) % 20 for j in range(20)]
        assert torch.equal(run.training[run.answers], run.test)
        assert len(run.training.flatten(1).unique(dim=0)) == 20


def test_refuses_incomplete_runs(runs):
    run = runs / "omniglot-py" / "all_runs" / "run07"
    labels = (run / "class_labels.txt").read_text()
    for wrong in (labels.replace("run07/test/item03", "run07/test/item33"), labels.replace("class20", "class21"), "\0"):
        (run / "class_labels.txt").write_text(wrong)
        refused(lambda: one_shot_runs(runs), run / "class_labels.txt", "names no training image")
    (run / "class_labels.txt").unlink()
    refused(lambda: one_shot_runs(runs), "no run07/class_labels.txt")
    (run / "test" / "item20.png").unlink()
    refused(lambda: one_shot_runs(runs), "no run07/test/item20.png")


class Server:
    """Replaces torchvision's download: each call writes a file; the last one can fail."""

    def __init__(self, error=None):
        self.error, self.asked = error, {}

    def __call__(self, url, folder, file, md5):
        self.asked[file] = url, md5
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(url)
        if self.error and len(self.asked) == 3:
            raise self.error


def test_downloads_both_sets_and_the_runs(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr("torchvision.datasets.utils.download_url", server)
    download_omniglot(tmp_path / "data")
    assert has_omniglot(tmp_path / "data")
    home = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
    assert {file: url.removeprefix(home) for file, (url, _) in server.asked.items()} == {
        "images_background.zip": "images_background.zip",
        "images_evaluation.zip": "images_evaluation.zip",
        "all_runs.zip": "one-shot-classification/all_runs.zip",
    }
    assert server.asked["images_background.zip"][1] == "68d2efa1b9178cc56df9314c21c6e718"
    place = tmp_path / "data" / "omniglot-py"
    assert {path.name: path.read_text() for path in place.iterdir()} == {f: url for f, (url, _) in server.asked.items()}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["omniglot-py"]


@pytest.mark.parametrize("error", [RuntimeError("File not found\nor corrupted."), KeyboardInterrupt()])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr("torchvision.datasets.utils.download_url", Server(error))
    if isinstance(error, RuntimeError):
        refused(lambda: download_omniglot(tmp_path), "could not be downloaded", "brendenlake", tmp_path / "omniglot-py")
    else:
        with contextlib.suppress(KeyboardInterrupt):
            download_omniglot(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own(tmp_path):
    for alphabet in ("runes", "marks"):
        for i, name in enumerate(("k1", "k2", "k10")):
            write(tmp_path / alphabet / "examples" / f"{name}.png", ink(3 * i, 0)[:75, :75])
        write(tmp_path / alphabet / "queries" / "a picture.png", ink(3, 0)[:75, :75])
        (tmp_path / alphabet / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").touch()
    return tmp_path


def test_reads_a_users_alphabets(own):
    marks, runes = own_alphabets(own, size=15)
    assert (marks.name, runes.name) == ("marks", "runes")
    assert marks.classes == ["k1", "k2", "k10"]
    assert marks.query_names == ["a picture.png"]
    assert marks.examples.shape == (3, 15, 15)
    assert marks.examples.dtype == marks.queries.dtype == torch.uint8
    assert torch.equal(marks.queries[0], marks.examples[1])
    assert [tuple(image.nonzero()[:, 0].unique().tolist()) for image in marks.examples > 127] == [
        (0, 1, 2),
        (0, 1, 2),
        (3, 4, 5),
    ]


def test_any_picture_of_a_character_reads_the_same(own):
    """Wide, coloured and faint images, photographs of paper and chalk on a board give the same ink."""
    cross = np.zeros((60, 60), bool)
    cross[27:33, 10:50] = cross[10:50, 27:33] = True
    queries = own / "marks" / "queries"
    colours = {"plain": (255, 0), "photograph": (180, 60), "faint": (230, 190), "chalk": (30, 220)}
    for name, (paper, pen) in colours.items():
        Image.fromarray(np.where(cross, pen, paper).astype(np.uint8)).save(queries / f"{name}.png")
    coloured = np.where(cross[..., None], np.uint8([200, 0, 0]), np.uint8([250, 250, 160]))
    Image.fromarray(coloured).save(queries / "red.png")
    clear = np.where(cross[..., None], np.uint8([0, 0, 0, 255]), np.uint8([0, 0, 0, 0]))
    Image.fromarray(clear).save(queries / "clear.png")
    Image.fromarray(np.where(cross, 0, 255).astype(np.uint8)[:, 10:50]).save(queries / "narrow.png")
    Image.fromarray(np.where(cross, 0, 255).astype(np.uint8)[10:50]).resize((120, 80), 0).save(queries / "large.png")
    read = own_alphabets(own)[0]
    pictures = dict(zip(read.query_names, read.queries.int(), strict=True))
    assert pictures["plain.png"].max() == 255
    assert pictures["plain.png"][0].max() == 0
    for name in (*(f"{name}.png" for name in colours), "red.png", "clear.png", "narrow.png", "large.png"):
        assert (pictures[name] - pictures["plain.png"]).abs().max() <= 3, name


def test_refuses_what_is_no_alphabet(own):
    marks = own / "marks"

    def check(*words):
        refused(lambda: own_alphabets(own), *words)

    refused(lambda: own_alphabets(own / "none"), own / "none", "cannot be read", "<alphabet>/examples/<class>.png")
    (own / "empty").mkdir()
    refused(lambda: own_alphabets(own / "empty"), own / "empty", "holds no alphabets")
    check(own / "empty", "no folder examples")
    (own / "empty").rmdir()

    shutil.copy(marks / "examples/k1.png", marks / "examples/k1.jpg")
    check(marks / "examples/k1", "another image of the class k1")
    (marks / "examples/k1.jpg").unlink()
    Image.new("L", (40, 40), 200).save(marks / "queries/blank.png")
    check(marks / "queries/blank.png", "blank")
    (marks / "queries/blank.png").write_bytes(b"no picture")
    check(marks / "queries/blank.png", "not an image")
    for path in (marks / "queries").iterdir():
        path.unlink()
    check(marks / "queries", "no PNG, JPG or WebP")
    (marks / "queries").rmdir()
    check(marks, "no folder queries")
    (marks / "queries").mkdir()
    write(marks / "queries/a.png", ink(1, 0))
    for name in ("k2", "k10"):
        (marks / "examples" / f"{name}.png").unlink()
    check(marks / "examples", "only the class k1")


@pytest.fixture(scope="module")
def fonts():
    return font_alphabets()


def test_the_fonts_give_enough_alphabets_and_share_no_script(fonts):
    train, test = fonts
    assert len(train) + len(test) >= 10
    assert 1 / 4 < len(test) / (len(train) + len(test)) < 1 / 2
    for name, (images, numbers) in [*train.items(), *test.items()]:
        assert len(numbers) >= 20, name
        assert images.shape == (len(numbers), 20, 28, 28)
        assert images.dtype == torch.uint8
        assert (images.flatten(2).max(2).values > 60).all(), name
    scripts = [{unicodedata.name(chr(c)).split()[0] for a in part.values() for c in a.numbers} for part in fonts]
    assert not scripts[0] & scripts[1]
    assert {"LATIN", "GREEK", "CYRILLIC"} <= scripts[0]


def test_no_character_of_the_fonts_is_the_missing_glyph_or_looks_like_another(fonts):
    from matplotlib import get_data_path

    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / f"{_FONTS[0]}.ttf", 40)

    def look(letter):
        mask = font.getmask(letter)
        drawn = Image.frombytes("L", mask.size, bytes(mask))
        drawn = drawn.crop(drawn.getbbox())
        return drawn.size, drawn.tobytes()

    for name, (images, numbers) in [*fonts[0].items(), *fonts[1].items()]:
        looks = {look(chr(number)) for number in numbers}
        assert len(looks) == len(numbers), name
        assert look("\uffff") not in looks, name
        assert len(images.flatten(0, 1).flatten(1).unique(dim=0)) == len(numbers) * 20, name


def test_hands_differ_but_can_be_read(fonts):
    """20-way nearest neighbour of blurred images: its error is about 65 %, as on Omniglot; chance is 95 %."""
    random = torch.Generator().manual_seed(0)
    wrong = 0
    alphabets = [*fonts[0].values(), *fonts[1].values()]
    for alphabet in alphabets:
        blurred = torch.nn.functional.avg_pool2d(alphabet.images.float(), 5, stride=1, padding=2).flatten(2)
        blurred = torch.nn.functional.normalize(blurred, dim=-1)
        for _ in range(50):
            ways = torch.randperm(len(blurred), generator=random)[:20]
            one, other = torch.randperm(20, generator=random)[:2]
            wrong += int((blurred[ways, one] @ blurred[ways[0], other]).argmax() != 0)
    assert 0.5 < wrong / (50 * len(alphabets)) < 0.8


def test_the_fonts_are_the_same_every_time_at_any_size():
    first, again = font_alphabets(size=12, drawings=3), font_alphabets(size=12, drawings=3)
    for part, same in zip(first, again, strict=True):
        for name, (images, numbers) in part.items():
            assert images.shape == (len(numbers), 3, 12, 12)
            assert torch.equal(images, same[name].images)
            assert numbers == same[name].numbers
    refused(lambda: font_alphabets(drawings=0), "drawings is 0")
    refused(lambda: font_alphabets(size=4), "size is 4")


@pytest.mark.slow
def test_the_real_omniglot(real_data):
    train, test = omniglot(real_data, False), omniglot(real_data, True)
    assert (len(train), sum(len(alphabet.numbers) for alphabet in train.values())) == (30, 964)
    assert (len(test), sum(len(alphabet.numbers) for alphabet in test.values())) == (20, 659)
    assert len(test["Angelic"].numbers) == 20
    assert len(train["Blackfoot_(Canadian_Aboriginal_Syllabics)"].numbers) == 14
    assert test["Angelic"].images.shape == (20, 20, 28, 28)
    numbers = [number for part in (train, test) for alphabet in part.values() for number in alphabet.numbers]
    assert sorted(numbers) == list(range(1, 1624))
    validation = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli")
    assert sum(len(a.numbers) for name, a in train.items() if name.split("_(")[0] in validation) == 172
    ink = torch.cat([alphabet.images.flatten() for alphabet in train.values()])
    assert ink.double().mean().item() / 255 == pytest.approx(0.078, abs=0.002)


@pytest.mark.slow
def test_the_real_runs(real_data):
    """Every image is in the evaluation set, and each answer is the same character by another person."""
    characters = {}
    for name, (images, numbers) in omniglot(real_data, True).items():
        for number, drawings in zip(numbers, images, strict=True):
            for hand, image in enumerate(drawings):
                characters[image.numpy().tobytes()] = name, number, hand
    for run in one_shot_runs(real_data):
        training = [characters[image.numpy().tobytes()] for image in run.training]
        test = [characters[image.numpy().tobytes()] for image in run.test]
        assert len({name for name, _, _ in training + test}) == 1
        assert [training[answer][:2] for answer in run.answers] == [found[:2] for found in test]
        assert run.answers.sort().values.tolist() == list(range(20))
