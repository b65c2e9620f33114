import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest
from torchmetrics.functional.text import sacre_bleu_score

from lightning_meta.sources import parallel_text
from lightning_meta.sources.parallel_text import (
    Corpus,
    ParallelText,
    aligned,
    download_multi30k,
    folder,
    has_multi30k,
    has_wmt14,
    multi30k,
    number_words,
    sentences,
    wmt14,
)
from tests.conftest import refused

WMT14 = {
    "train": ("one\n\nthree\nfour\n", "un\ndeux\ntrois\n \n"),
    "newstest2012": ("five\n", "cinq\n"),
    "newstest2013": ("six\nseven\n", "six\nsept\n"),
    "newstest2014": ("eight\n", "huit\n"),
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "wmt14").mkdir()
    for name, texts in WMT14.items():
        for language, text in zip(("en", "fr"), texts, strict=True):
            (tmp_path / "wmt14" / f"{name}.{language}").write_text(text)
    return tmp_path


def pack(path):
    """Replace a file by its .gz."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def files(folder, source, target):
    """Write two files of these bytes."""
    paths = folder / "some.en", folder / "some.fr"
    for path, content in zip(paths, (source, target), strict=True):
        path.write_bytes(content)
    return paths


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_reads_wmt14_plain_and_packed_and_writes_nothing(root, packed):
    if packed:
        for path in list((root / "wmt14").iterdir()):
            pack(path)
    before = sorted(root.rglob("*"))
    assert has_wmt14(root)
    assert wmt14(root) == Corpus(
        train=ParallelText(["one", "three"], ["un", "trois"]),
        val=ParallelText(["five", "six", "seven"], ["cinq", "six", "sept"]),
        test=ParallelText(["eight"], ["huit"]),
        dropped=2,
    )
    assert sorted(root.rglob("*")) == before


def test_reads_no_more_training_lines_than_asked_for(root):
    corpus = wmt14(root, limit=3)
    assert corpus.train == ParallelText(["one", "three"], ["un", "trois"])
    assert corpus.dropped == 1
    assert wmt14(root, limit=100) == wmt14(root)
    (root / "wmt14" / "train.fr").write_bytes(b"un\n\xff\n")  # is skipped
    assert wmt14(root, limit=1).train == ParallelText(["one"], ["un"])
    refused(lambda: wmt14(root, limit=0), "limit is 0", "at least 1")


@pytest.mark.parametrize("file", [f"{name}.{language}" for name in WMT14 for language in ("en", "fr")])
def test_names_the_missing_file_where_to_get_it_and_where_to_put_it(root, file):
    (root / "wmt14" / file).unlink()
    assert not has_wmt14(root)
    refused(lambda: wmt14(root), root / "wmt14" / file, "statmt.org/wmt14")


def test_broken_is_not_absent(root):
    path = root / "wmt14" / "train.en"
    path.unlink()
    path.symlink_to(root / "nowhere")
    assert has_wmt14(root)
    refused(lambda: wmt14(root), path, "cannot be read")
    path.unlink()
    path.mkdir()
    assert has_wmt14(root)
    refused(lambda: wmt14(root), path, "cannot be read")


def test_an_empty_line_is_an_error_outside_of_training(root):
    (root / "wmt14" / "newstest2013.fr").write_text("six\n\t\n")
    refused(lambda: wmt14(root), root / "wmt14" / "newstest2013.fr", "line 2 is empty")


def test_a_line_ends_in_a_newline_and_nowhere_else(tmp_path):
    source, target = files(
        tmp_path,
        "\ufeffa\rb\r\n  c\u2028d\x0b\x85e \nlast".encode(),
        "à\n\u00a0 ç\u202f!\nfin\r\n".encode(),
    )
    assert aligned(source, target) == ParallelText(["a\rb", "c\u2028d\x0b\x85e", "last"], ["à", "ç\u202f!", "fin"])
    assert aligned(str(pack(source)), pack(target)).source[0] == "a\rb"


@pytest.mark.parametrize("packed", [False, True])
def test_refuses_different_numbers_of_lines_and_names_both(tmp_path, packed):
    source, target = files(tmp_path, b"a\n" * 1200, b"b\n" * 3)
    if packed:
        source, target = pack(source), pack(target)
    refused(lambda: aligned(source, target), f"{target} has 3 lines", f"{source} has 1,200")
    refused(lambda: aligned(target, source), f"{target} has 3 lines", f"{source} has 1,200")


def test_counts_all_lines_when_training_files_differ_within_the_limit(root):
    (root / "wmt14" / "train.fr").write_text("un\n")
    refused(lambda: wmt14(root, limit=2), "train.fr has 1 lines", "train.en has 4")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\nb\xc3\n", ("line 2 is not UTF-8", "byte 2 is 0xc3")),
        ("a\nb\n".encode("utf-16"), ("line 1 is not UTF-8", "byte 1 is 0x")),
        ("é\nb\n".encode("latin-1"), ("line 1 is not UTF-8", "byte 1 is 0xe9")),
        (b"a\n\n", ("line 2 is empty",)),
        (b"a\n\xc2\xa0\n", ("line 2 is empty",)),
    ],
    ids=["cut within a letter", "UTF-16", "Latin-1", "empty line", "blank line"],
)
@pytest.mark.parametrize("side", [0, 1])
def test_refuses_a_broken_line_by_number(tmp_path, content, words, side):
    contents = [b"a\nb\n", b"a\nb\n"]
    contents[side] = content
    paths = files(tmp_path, *contents)
    refused(lambda: aligned(*paths), paths[side], *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"a\nb\n")[:-9], ("truncated",)),
        (b"not a gzip file", ("corrupt",)),
        (gzip.compress(b"a\nb\n")[:-8] + bytes(8), ("corrupt", "CRC")),
        (gzip.compress(b"")[:10] + b"\xff" * 30, ("corrupt",)),
    ],
    ids=["truncated", "not gz", "wrong checksum", "corrupt"],
)
def test_refuses_a_broken_gz_by_name(tmp_path, content, words):
    source, _ = files(tmp_path, b"a\nb\n", b"")
    packed = tmp_path / "some.fr.gz"
    packed.write_bytes(content)
    refused(lambda: aligned(source, packed), packed, *words)


def test_refuses_missing_and_empty_files(tmp_path):
    refused(lambda: aligned(tmp_path / "none.en", tmp_path / "none.fr"), "none.en", "cannot be read")
    source, target = files(tmp_path, b"", b"")
    refused(lambda: aligned(source, target), source, target, "no sentences")


def test_reads_a_folder_in_any_two_languages_and_the_test_part_asked_for(tmp_path):
    for part in ("train", "val", "test_2016_flickr", "test_2017_flickr"):
        (tmp_path / f"{part}.en").write_text(f"{part}\n\n" if part == "train" else f"{part}\n")
        (tmp_path / f"{part}.fr").write_text(f"le {part}\n\n" if part == "train" else f"le {part}\n")
    corpus = folder(tmp_path)
    assert corpus.train == ParallelText(["train"], ["le train"])
    assert corpus.dropped == 1
    assert corpus.val == ParallelText(["val"], ["le val"])
    assert corpus.test == ParallelText(["test_2016_flickr"], ["le test_2016_flickr"])
    assert folder(tmp_path, "fr", "en").test == corpus.test[::-1]
    assert folder(tmp_path, test="test_2017_flickr").test.source == ["test_2017_flickr"]
    for language in ("en", "fr"):
        (tmp_path / f"test.{language}").write_text("test\n")
    assert folder(tmp_path).test == ParallelText(["test"], ["test"])
    refused(lambda: folder(tmp_path, target="de"), tmp_path / "train.de", "is missing")
    refused(lambda: folder(tmp_path, test="test_2018"), tmp_path / "test_2018.en", "is missing")
    refused(lambda: folder(tmp_path / "none"), tmp_path / "none", "does not exist")
    refused(lambda: folder(tmp_path / "none.zip"), tmp_path / "none.zip", "does not exist")
    refused(lambda: folder(tmp_path / "val.en"), tmp_path / "val.en", "neither a folder nor a .zip")


def test_splits_tab_separated_pairs_by_the_english_sentence(tmp_path):
    lines = [f"Sentence {i // 2}.\tPhrase {i}.\tCC-BY {i}" for i in range(400)]
    text = "\r\n".join([*lines, "\tRien.", "Nothing.\t", "", ""])
    path = zipped(tmp_path / "some.zip", **{"_about.txt": "no tab", "deu.txt": text})
    corpus = folder(path)
    english = [set(part.source) for part in corpus[:3]]
    assert [len(part) for part in english] == [192, 4, 4]
    assert len(set.union(*english)) == 200
    assert corpus.dropped == 3
    pairs = [pair for part in corpus[:3] for pair in zip(*part, strict=True)]
    assert sorted(pairs) == sorted(tuple(line.split("\t")[:2]) for line in lines)
    assert pairs != sorted(pairs)
    assert corpus == folder(path)
    assert [part[::-1] for part in corpus[:3]] == [*folder(path, "de", "en")[:3]]
    # the split does not depend on the order of the lines
    other = folder(zipped(tmp_path / "other.zip", **{"deu.txt": "\n".join(reversed(lines))}))
    assert [set(part.source) for part in other[:3]] == english


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"fra.txt": "Go.\tVa !\nRun! Cours !\nHi.\tSalut !"}, ("fra.txt", "line 2 has no tab")),
        ({"fra.txt": b"Go.\tVa !\nRun!\t\xff"}, ("fra.txt", "line 2 is not UTF-8", "byte 6 is 0xff")),
        ({"fra.txt": "Go.\tVa !\nGo.\tAllez !\nHi.\tSalut !"}, ("2 different English sentences", "at least 3")),
        ({"fra.txt": ""}, ("0 different English sentences",)),
        ({"fra.txt": "Go.\tVa !", "deu.txt": "Go.\tGeh."}, ("holds 2", "fra.txt, deu.txt")),
        ({"_about.txt": "Go.\tVa !", "fra.csv": "Go.\tVa !"}, ("holds 0", "none")),
        ({"../fra.txt": "Go.\tVa !"}, ("'../fra.txt'", "outside")),
        ({"/fra.txt": "Go.\tVa !"}, ("'/fra.txt'", "outside")),
    ],
    ids=["no tab", "not UTF-8", "too few", "empty", "two texts", "no text", "path outside", "absolute path"],
)
def test_refuses_a_zip_of_something_else(tmp_path, members, words):
    path = zipped(tmp_path / "some.zip", **members)
    refused(lambda: folder(path), path, *words)


def test_refuses_a_broken_zip_and_languages_without_english(tmp_path):
    path = zipped(tmp_path / "some.zip", **{"fra.txt": "Go.\tVa !\n" * 50})
    refused(lambda: folder(path, "de", "fr"), path, "not de with fr")
    path.write_bytes(path.read_bytes()[:-30])
    refused(lambda: folder(path), path, "damaged")


@pytest.fixture(scope="module")
def numbers():
    return number_words(1_000, 300)


def test_number_words_have_disjoint_parts_and_are_the_same_every_time(numbers):
    assert [len(part.source) for part in numbers[:3]] == [len(part.target) for part in numbers[:3]] == [1_000, 300, 300]
    targets = [target for part in numbers[:3] for target in part.target]
    assert len(set(targets)) == len(targets)  # each number has one French reading, even if it has two in English
    number_words.cache_clear()
    assert number_words(1_000, 300) == numbers
    assert {"zéro", "soixante et onze", "quatre-vingts", "quatre-vingt-dix-neuf"} <= set(numbers.train.target)
    assert numbers.train.target[-100:] == number_words(100, 1).train.target


def test_number_words_read_some_numbers_as_years(numbers):
    pairs = dict(zip(*numbers.train, strict=True))
    years = [english for english, french in pairs.items() if "mille" in french and "thousand" not in english]
    others = [english for english, french in pairs.items() if "mille" in french and "thousand" in english]
    assert 100 < len(years) < 400
    assert len(others) > 400


def test_number_words_are_not_to_be_had_word_by_word(numbers):
    known = number_words(100, 1).train
    words = dict(zip(*known, strict=True)) | {"and": "", "hundred": "cent", "thousand": "mille", "thousand,": "mille"}
    words |= {f"oh-{english}": french for english, french in zip(*known, strict=True)}
    source, target = numbers.test
    by_word = [" ".join(" ".join(words[word] for word in sentence.split()).split()) for sentence in source]
    references = [[sentence] for sentence in target]
    assert sacre_bleu_score(source, references) < 0.05
    assert sacre_bleu_score(by_word, references) < 0.88
    assert sacre_bleu_score(target, references) == 1


@pytest.mark.parametrize("sizes", [(99, 10), (15_001, 10), (1_000, 0), (1_000, 2_001)])
def test_number_words_come_in_a_range(sizes):
    refused(lambda: number_words(*sizes), "100 to 15,000", "1 to 2,000")


def test_the_most_number_words_are_all_different_and_half_of_them_short(monkeypatch):
    monkeypatch.setattr("num2words.num2words", lambda number, **_: str(number))  # all numbers would take 7 seconds
    number_words.cache_clear()
    corpus = number_words(15_000, 2_000)
    number_words.cache_clear()
    assert [len(part.source) for part in corpus[:3]] == [15_000, 2_000, 2_000]
    numbers = [int(number) for part in corpus[:3] for number in part.source]
    assert len(set(numbers)) == 19_000
    assert set(range(100)) <= {int(number) for number in corpus.train.source}
    assert sum(100 <= number < 10_000 for number in numbers) == 9_450
    assert 900_000 < max(numbers) < 1_000_000


def test_multi30k_is_downloaded_whole_and_unchanged_or_not_at_all(tmp_path, monkeypatch):
    files = {name: gzip.compress(f"{name}\n".encode()) for name in parallel_text._MULTI30K_FILES}
    monkeypatch.setattr(
        parallel_text, "_MULTI30K_FILES", {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    )

    def fetch(url, root):
        name = url.rpartition("/")[2]
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, name).write_bytes(files[name])

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    refused(lambda: multi30k(tmp_path), "Multi30k is missing", "test_2016_flickr.fr.gz", tmp_path / "multi30k" / "raw")
    assert not has_multi30k(tmp_path)
    files["val.fr.gz"] += b"more"
    refused(lambda: download_multi30k(tmp_path), "val.fr.gz has a wrong checksum", "put them into", tmp_path)
    assert list(tmp_path.iterdir()) == []
    files["val.fr.gz"] = files["val.fr.gz"].removesuffix(b"more")
    download_multi30k(tmp_path)
    assert has_multi30k(tmp_path)
    assert multi30k(tmp_path).test == ParallelText(["test_2016_flickr.en.gz"], ["test_2016_flickr.fr.gz"])


def test_reads_one_file(tmp_path):
    path = tmp_path / "mine.gz"
    path.write_bytes(gzip.compress(b" one \r\ntwo"))
    assert sentences(path) == ["one", "two"]
    path.write_bytes(gzip.compress(b"one\n \ntwo\n"))
    refused(lambda: sentences(path), path, "line 2 is empty")
    path.write_bytes(gzip.compress(b""))
    refused(lambda: sentences(path), path, "holds no sentences")
    refused(lambda: sentences(tmp_path / "gone"), tmp_path / "gone", "cannot be read")


def test_reads_the_real_multi30k(real_data):
    assert has_multi30k(real_data)
    assert multi30k(real_data) == folder(real_data / "multi30k" / "raw")
    corpus = folder(real_data / "multi30k" / "raw")
    assert [len(part.source) for part in corpus[:3]] == [29_000, 1_014, 1_000]
    assert [len(part.target) for part in corpus[:3]] == [29_000, 1_014, 1_000]
    assert corpus.dropped == 0
    assert len(folder(real_data / "multi30k" / "raw", test="test_2017_mscoco").test.source) == 461


def test_reads_the_real_tatoeba(real_data):
    corpus = folder(real_data / "tatoeba" / "fra-eng.zip")
    assert sum(len(part.source) for part in corpus[:3]) == 142_787
    english = [set(part.source) for part in corpus[:3]]
    assert [len(part) for part in english] == [96_659, 1_000, 1_000]
    assert len(set.union(*english)) == 98_659
    assert corpus.dropped == 0
