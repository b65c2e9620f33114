import gzip
import hashlib
import io
import lzma
import socket
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from lightning_meta.errors import InputError
from lightning_meta.sources import text
from lightning_meta.sources.text import (
    TextSplits,
    compressed_bits,
    download_penn_treebank,
    download_wikipedia,
    has_penn_treebank,
    has_wikipedia,
    help_text,
    own_text,
    penn_treebank,
    unigram_bits,
    vocabulary,
    wikipedia,
)
from tests.conftest import refused

SPLITS = ("train", "valid", "test")
SENTENCES = {
    "train": ["the <unk> fell N N to $ N", "it 's a u.s. co."],
    "valid": ["no it was n't"],
    "test": ["mr. b/c \\ & co #", "end"],
}
WORDS = {split: "".join(f" {line} \n" for line in lines) for split, lines in SENTENCES.items()}
CHARACTERS = {
    split: "".join(" ".join(line.replace(" ", "_")) + " \n" for line in lines) for split, lines in SENTENCES.items()
}
PLAIN = {split: "".join(f"{line}\n" for line in lines) for split, lines in SENTENCES.items()}


def joined(symbols):
    return "".join(map(chr, symbols))


def zipped(*members, how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def put_treebank(root, contents=WORDS, infix="", packed=False):
    (root / "ptb").mkdir(parents=True, exist_ok=True)
    for split, content in contents.items():
        path = root / "ptb" / f"ptb.{infix}{split}.txt{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    return root


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("contents", "infix"), [(WORDS, ""), (CHARACTERS, "char.")], ids=["words", "characters"])
def test_reads_penn_treebank_from_words_or_characters_and_writes_nothing(tmp_path, contents, infix, packed):
    put_treebank(tmp_path, contents, infix, packed)
    assert has_penn_treebank(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    treebank = penn_treebank(str(tmp_path))
    assert [joined(part) for part in treebank] == [PLAIN[split] for split in SPLITS]
    assert {part.dtype for part in treebank} == {np.dtype(np.uint32)}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("contents", "infix"), [(WORDS, ""), (CHARACTERS, "char.")], ids=["words", "characters"])
def test_penn_treebank_on_other_systems_and_with_other_blanks(tmp_path, contents, infix):
    changed = {split: "\ufeff" + content.replace("\n", "\r\n") for split, content in contents.items()}
    changed["test"] = contents["test"].replace(" \n", "\n")
    treebank = penn_treebank(put_treebank(tmp_path, changed, infix))
    assert [joined(part) for part in treebank] == [PLAIN[split] for split in SPLITS]


def test_prefers_words_and_plain_files(tmp_path):
    put_treebank(tmp_path, dict.fromkeys(SPLITS, "c h a r s\n"), "char.")
    put_treebank(tmp_path, dict.fromkeys(SPLITS, "packed\n"), packed=True)
    assert joined(penn_treebank(tmp_path).val) == "packed\n"
    put_treebank(tmp_path)
    assert joined(penn_treebank(tmp_path).val) == PLAIN["valid"]


@pytest.mark.parametrize("split", SPLITS)
def test_names_the_missing_file_of_penn_treebank(tmp_path, split):
    put_treebank(tmp_path)
    (tmp_path / "ptb" / f"ptb.{split}.txt").unlink()
    assert not has_penn_treebank(tmp_path)
    refused(lambda: penn_treebank(tmp_path), f"ptb.{split}.txt", "missing", "simple-examples.tgz", tmp_path / "ptb")
    refused(lambda: penn_treebank(tmp_path / "none"), "missing", tmp_path / "none" / "ptb")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ptb.train.txt", b"", ("empty",)),
        ("ptb.train.txt", b" the last line has no", ("truncated",)),
        ("ptb.train.txt", b" caf\xe9 \n", ("byte 4", "0xe9")),
        ("ptb.char.train.txt", b"t h e _ l", ("truncated",)),
        ("ptb.train.txt.gz", b"no gzip file", ("damaged", ".gz")),
        ("ptb.train.txt.gz", gzip.compress(b" a b \n")[:-3], ("damaged",)),
        ("ptb.train.txt.gz", gzip.compress(b" a b \n")[:-8] + bytes(8), ("damaged", "CRC")),
    ],
)
def test_refuses_a_broken_file_of_penn_treebank_by_name(tmp_path, name, content, words):
    put_treebank(tmp_path)
    (tmp_path / "ptb" / "ptb.train.txt").unlink()
    (tmp_path / "ptb" / name).write_bytes(content)
    assert has_penn_treebank(tmp_path)  # a broken file exists
    refused(lambda: penn_treebank(tmp_path), tmp_path / "ptb" / name, *words)


def test_refuses_what_is_no_penn_treebank_a_folder_and_a_dangling_link(tmp_path):
    put_treebank(tmp_path)
    path = tmp_path / "ptb" / "ptb.test.txt"
    path.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789\n")
    refused(lambda: penn_treebank(tmp_path), tmp_path / "ptb", "different symbols", "50")
    path.unlink()
    path.mkdir()
    assert has_penn_treebank(tmp_path)
    refused(lambda: penn_treebank(tmp_path), path, "directory")
    path.rmdir()
    path.symlink_to(tmp_path / "nowhere")
    assert has_penn_treebank(tmp_path)
    refused(lambda: penn_treebank(tmp_path), path, "cannot be read")


PAGE = bytes(range(97, 117)) * 10  # 200 bytes, 20 different ones


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(text, "_WIKIPEDIA_SIZE", len(PAGE))


PACKED = [("", PAGE), (".gz", gzip.compress(PAGE)), (".zip", zipped(("enwik8", PAGE)))]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("suffix", "content"), PACKED, ids=["plain", "gz", "zip"])
@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_reads_wikipedia_and_writes_nothing(tmp_path, name, suffix, content):
    assert not has_wikipedia(tmp_path, name)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / f"{name}{suffix}").write_bytes(content)
    assert has_wikipedia(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    train, val, test = wikipedia(tmp_path, name)
    assert [len(part) for part in (train, val, test)] == [180, 10, 10]
    assert np.concatenate([train, val, test]).tobytes() == PAGE
    assert {part.dtype for part in (train, val, test)} == {np.dtype(np.uint8)}
    assert np.shares_memory(train.base, test.base)  # no copies
    assert sorted(tmp_path.rglob("*")) == before


def test_wikipedia_has_exactly_100_million_bytes(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "enwik8"
    path.write_bytes(PAGE)
    refused(lambda: wikipedia(tmp_path, "enwik8"), path, "200 bytes", "100,000,000")
    for size in (199, 201):
        monkeypatch.setattr(text, "_WIKIPEDIA_SIZE", size)
        refused(lambda: wikipedia(tmp_path, "enwik8"), path, "200 bytes", size)


@pytest.mark.usefixtures("_small")
def test_refuses_other_wikipedias(tmp_path):
    refused(lambda: wikipedia(tmp_path, "enwik8"), "enwik8 is missing", "enwik8.zip", tmp_path / "text")
    for call in (wikipedia, has_wikipedia, download_wikipedia):
        refused(lambda call=call: call(tmp_path, "enwik9"), "enwik9", "enwik8 or text8")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text8").write_bytes(bytes(range(50, 100)) * 4)
    refused(lambda: wikipedia(tmp_path, "text8"), tmp_path / "text" / "text8", "50 different symbols", "27")
    (tmp_path / "text" / "enwik8.zip").write_bytes(zipped(("enwik8", PAGE), ("more", b"")))
    refused(lambda: wikipedia(tmp_path, "enwik8"), "enwik8.zip", "2 files")


LINES = "Grüße, мир — 你好 🙂\n" * 10  # 180 characters, 1 to 4 bytes each


@pytest.mark.parametrize("suffix", ["", ".txt", ".gz", ".zip", ".GZ", ".ZIP"])
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_reads_a_users_own_text(tmp_path, suffix, kind):
    content, path = LINES.encode(), tmp_path / f"own{suffix}"
    packed = {".gz": gzip.compress(content), ".zip": zipped(("folder/", ""), ("folder/own.txt", content))}
    path.write_bytes(packed.get(suffix.lower(), content))
    parts = own_text(str(path), kind)
    whole = np.concatenate(parts)
    N = len(whole)
    assert [len(part) for part in parts] == [N * 90 // 100, N * 95 // 100 - N * 90 // 100, N - N * 95 // 100]
    assert whole.dtype == (np.uint8 if kind == "bytes" else np.uint32)
    assert (whole.tobytes() == content) if kind == "bytes" else (joined(whole) == LINES)
    assert (whole.astype(np.int64) == whole).all()


def test_characters_have_universal_newlines_and_no_byte_order_mark_and_bytes_stay(tmp_path):
    path = tmp_path / "own.txt"
    content = b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n\r\n" * 3
    path.write_bytes(content)
    assert joined(np.concatenate(own_text(path, "characters"))) == "one\ntwo\nthree\n\n" * 3
    assert np.concatenate(own_text(path, "bytes")).tobytes() == content


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"0123456789" * 150 + b"\xff rest", "1,500 is 0xff"),
        (b"\xef\xbb\xbfabc\x80" + b"d" * 30, "6 is 0x80"),
        ("é".encode() * 20 + b"\xc3", "40 is 0xc3"),
        (b"a" * 30 + b"\xed\xa0\x80", "30 is 0xed"),
        ("text as Windows calls it Unicode".encode("utf-16"), "0 is 0xff"),
    ],
    ids=["in the middle", "behind a byte order mark", "cut short", "a surrogate", "UTF-16"],
)
def test_names_the_first_byte_that_is_not_utf8(tmp_path, content, offset):
    for name, packed in (("own.txt", content), ("own.gz", gzip.compress(content)), ("own.zip", zipped(("a", content)))):
        path = tmp_path / name
        path.write_bytes(packed)
        refused(lambda path=path: own_text(path, "characters"), path, "not UTF-8", f"byte {offset}")
        assert np.concatenate(own_text(path, "bytes")).tobytes() == content


def lying(size):
    """Return a zip whose directory gives this size for its file."""
    content = bytearray(zipped(("a", PAGE)))
    where = content.index(b"PK\1\2") + 24
    content[where : where + 4] = size.to_bytes(4, "little")
    return bytes(content)


def encrypted():
    content = bytearray(zipped(("a", PAGE)))
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("own.txt", b"", ("empty",)),
        ("own.gz", gzip.compress(b""), ("empty",)),
        ("own.zip", zipped(("a", "")), ("empty",)),
        ("own.txt", b"nineteen characters", ("19", "at least 20")),
        ("own.gz", b"", ("empty",)),
        ("own.gz", PAGE, ("damaged",)),
        ("own.gz", gzip.compress(PAGE)[:-1], ("damaged",)),
        ("own.gz", gzip.compress(PAGE)[:20] + b"\xff" * 30, ("damaged",)),
        ("own.gz", gzip.compress(PAGE) + b"more", ("damaged",)),
        ("own.zip", b"", ("damaged",)),
        ("own.zip", PAGE, ("damaged", "zip")),
        ("own.zip", zipped(("a", PAGE))[:-1], ("damaged",)),
        ("own.zip", zipped(("a", PAGE)).replace(b"PK\3\4", b"PK\3\5"), ("damaged",)),
        ("own.zip", zipped(("a", PAGE), how=zipfile.ZIP_STORED).replace(b"abc", b"abd"), ("damaged", "CRC")),
        ("own.zip", encrypted(), ("encrypted",)),
        ("own.zip", zipped(), ("0 files",)),
        ("own.zip", zipped(("a", PAGE), ("b", PAGE)), ("2 files", "exactly one")),
        ("own.zip", zipped(("../a", PAGE)), ("'../a'", "outside")),
        ("own.zip", zipped(("/etc/a", PAGE)), ("'/etc/a'", "outside")),
        ("own.zip", lying(2**31), ("2,147,483,648", "1,073,741,824")),
        ("own.zip", lying(100), ("damaged", "CRC")),
    ],
)
def test_refuses_a_broken_text_by_name(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    for kind in ("characters", "bytes"):
        refused(lambda kind=kind: own_text(path, kind), path, *words)


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LARGEST", 2**21)
    huge = bytes(2**21 + 1)
    for name, content in (("own.gz", gzip.compress(huge)), ("own.zip", zipped(("a", huge))), ("own.txt", huge)):
        path = tmp_path / name
        path.write_bytes(content)
        refused(lambda path=path: own_text(path, "bytes"), path, "more than 2,097,152")


def test_refuses_a_missing_file_a_folder_and_another_kind(tmp_path):
    for name in ("own.txt", "own.gz", "own.zip"):
        refused(lambda name=name: own_text(tmp_path / name, "bytes"), tmp_path / name, "No such file")
        (tmp_path / name).mkdir()
        refused(lambda name=name: own_text(tmp_path / name, "bytes"), tmp_path / name, "directory")
    refused(lambda: own_text(tmp_path, "words"), "'words'", "characters or bytes")
    refused(lambda: help_text("words"), "'words'", "characters or bytes")


@pytest.mark.usefixtures("_small")
def test_cut_or_changed_files_are_a_text_or_an_input_error(tmp_path):
    put_treebank(tmp_path)
    (tmp_path / "ptb" / "ptb.train.txt").unlink()
    (tmp_path / "text").mkdir()
    lines = LINES[:36].encode()
    treebank = [
        ("ptb.train.txt", WORDS["train"].encode()),
        ("ptb.char.train.txt", CHARACTERS["train"].encode()),
        ("ptb.train.txt.gz", gzip.compress(WORDS["train"].encode())),
    ]
    own = [("own.txt", lines), ("own.gz", gzip.compress(lines)), ("own.zip", zipped(("a", lines)))]
    cases = [
        *((f"ptb/{name}", content, lambda: penn_treebank(tmp_path)) for name, content in treebank),
        *((f"text/enwik8{suffix}", content, lambda: wikipedia(tmp_path, "enwik8")) for suffix, content in PACKED),
        *((name, content, lambda name=name: own_text(tmp_path / name, "characters")) for name, content in own),
        *((name, content, lambda name=name: own_text(tmp_path / name, "bytes")) for name, content in own[:1]),
    ]
    random = np.random.default_rng(0)
    for name, content, read in cases:
        broken = [content, *(content[:length] for length in range(len(content)))]
        for _ in range(50):
            changed = bytearray(content)
            changed[random.integers(len(content))] = random.integers(256)
            broken.append(bytes(changed))
        texts = []
        for one in broken:
            (tmp_path / name).write_bytes(one)
            try:
                texts.append(read())
            except InputError as error:
                assert len(str(error).splitlines()) == 1, name  # noqa: PT017 - not every one is refused
        (tmp_path / name).unlink()
        assert 0 < len(texts) < len(broken), name  # the whole file is valid, the empty one is not
        assert all(len(part) for result in texts for part in result), name


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_help_text_is_english_and_always_the_same(kind):
    parts = help_text(kind)
    N = sum(map(len, parts))
    assert 300_000 < N < 700_000  # Python 3.11: 412,398 and 466,273
    assert [len(part) / N for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=1e-5)
    assert all(np.array_equal(one, other) for one, other in zip(parts, help_text(kind), strict=True))
    assert 3.5 < unigram_bits(parts.train, parts.test) < 5  # English has about 4.2
    assert 1.5 < compressed_bits(parts.test, "xz") < 3


def test_help_text_as_bytes_is_utf8_as_it_comes():
    from pydoc_data.topics import topics

    whole = np.concatenate(help_text("bytes")).tobytes().decode()
    assert whole.startswith(topics[min(topics)])
    assert whole.endswith(topics[max(topics)])


def test_help_text_as_characters_is_like_penn_treebank():
    symbols = np.concatenate(help_text("characters"))
    assert symbols.dtype == np.uint32
    whole = joined(symbols)
    assert set("abcdefghijklmnopqrstuvwxyzN \n") < set(whole)
    assert len(set(whole)) <= 50
    assert not set(whole) & set("ABCDEFGHIJKLMOPQRSTUVWXYZ0123456789\r\t\0")
    for pair in ("  ", " \n", "\n ", "\n\n", "NN", "----", "****"):
        assert pair not in whole
    assert whole.endswith("\n")
    assert not whole.startswith(("\n", " "))
    lines = whole.splitlines()
    assert 'the "assert" statement' in lines
    assert "assert statements are a convenient way to insert debugging assertions into a program:" in lines


def test_vocabulary_is_of_all_parts():
    parts = TextSplits(np.frombuffer(b"abba", np.uint8), np.array([0x10FFFF, 97], np.uint32), np.array([0], np.int64))
    assert vocabulary(parts).tolist() == [0, 97, 98, 0x10FFFF]
    assert vocabulary(parts).dtype == np.int64
    assert vocabulary(TextSplits(*[np.repeat(np.uint8(7), 2**22 + 1)] * 3)).tolist() == [7]


def test_unigram_bits_by_hand():
    uniform = np.tile(np.arange(48, 48 + 32, dtype=np.uint32), 5)
    assert unigram_bits(uniform, uniform[::-1]) == pytest.approx(5, abs=1e-12)
    # counts plus one, of 8: 3 + 1 for a, 1 + 1 for b, 0 + 1 for c and d
    train, test = np.frombuffer(b"abaa", np.uint8), np.frombuffer(b"abcd", np.uint8)
    assert unigram_bits(train, test) == pytest.approx((1 + 2 + 3 + 3) / 4, abs=1e-12)
    # compared with a loop, over more than one chunk
    random = np.random.default_rng(0)
    train, test = random.binomial(20, 0.3, 2**22 + 5).astype(np.uint8), random.binomial(20, 0.4, 1000).astype(np.uint8)
    counts = {symbol: int((train == symbol).sum()) + 1 for symbol in {*train.tolist(), *test.tolist()}}
    expected = -np.mean([np.log2(counts[symbol] / sum(counts.values())) for symbol in test.tolist()])
    assert unigram_bits(train, test) == pytest.approx(expected, rel=1e-12)


def test_compressed_bits_of_bytes_and_of_characters_as_utf8():
    content = LINES.encode()
    sizes = {"gzip": len(zlib.compress(content, 9)), "xz": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))}
    for how, size in sizes.items():
        assert compressed_bits(np.frombuffer(content, np.uint8), how) == 8 * size / len(content)
        code_points = np.array([ord(character) for character in LINES])
        assert compressed_bits(code_points.astype(np.uint32), how) == 8 * size / len(LINES)
        assert compressed_bits(code_points, how) == 8 * size / len(LINES)
    noise = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
    assert 8 < compressed_bits(noise, "gzip") < 8.1
    refused(lambda: compressed_bits(noise, "bz2"), "'bz2'", "gzip or xz")


def tgz(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


EXAMPLES = [(f"./simple-examples/data/ptb.{split}.txt", WORDS[split].encode()) for split in SPLITS]
MORE = ("./simple-examples/data/README", b"not wanted")


@pytest.fixture
def serve(monkeypatch):
    """Replace torchvision's download by a function that writes this content, or raises it."""
    seen = {}

    def install(content):
        def download_url(url, root):
            seen.update(url=url, timeout=socket.getdefaulttimeout())
            print("100%|####|")
            Path(root).mkdir(exist_ok=True)
            if isinstance(content, BaseException):
                raise content
            (Path(root) / url.rpartition("/")[2]).write_bytes(content)

        monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
        return seen

    known = {f"ptb.{split}.txt": hashlib.md5(WORDS[split].encode()).hexdigest() for split in SPLITS}
    monkeypatch.setattr(text, "_PTB_FILES", known)
    return install


def test_downloads_penn_treebank_quietly_and_only_its_three_files(tmp_path, serve, capfd):
    seen = serve(tgz(MORE, *EXAMPLES))
    root = tmp_path / "new" / "data"
    download_penn_treebank(root)
    assert joined(penn_treebank(root).test) == PLAIN["test"]
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    assert files == ["ptb", "ptb/ptb.test.txt", "ptb/ptb.train.txt", "ptb/ptb.valid.txt"]
    assert seen == {"url": "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz", "timeout": 10}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (RuntimeError("Error downloading x:\nTried y"), ("Tried y",)),
        (TimeoutError("timed out"), ("timed out",)),
        (b"<html>moved</html>", ("damaged",)),
        (tgz(*EXAMPLES)[:-20], ("damaged",)),
        (tgz(*EXAMPLES[:2]), ("no ptb.test.txt",)),
        (tgz(*EXAMPLES[:2], (EXAMPLES[2][0], b" another \n")), ("ptb.test.txt", "known")),
        (tgz(*EXAMPLES, ("../../evil", b"x")), ("outside",)),
        (tgz(*EXAMPLES, ("/tmp/evil", b"x")), ("outside",)),
    ],
)
def test_a_failed_download_of_penn_treebank_is_one_line_and_leaves_nothing(tmp_path, serve, content, words):
    serve(content)
    refused(lambda: download_penn_treebank(tmp_path / "data"), "could not be downloaded", "simple-examples.tgz", *words)
    assert not has_penn_treebank(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.usefixtures("_small")
def test_downloads_wikipedia_as_a_zip(tmp_path, serve, capfd):
    seen = serve(zipped(("text8", PAGE)))
    download_wikipedia(tmp_path, "text8")
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["text8.zip"]
    assert np.concatenate(wikipedia(tmp_path, "text8")).tobytes() == PAGE
    assert not has_wikipedia(tmp_path, "enwik8")
    assert seen == {"url": "http://mattmahoney.net/dc/text8.zip", "timeout": 10}
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (RuntimeError("Error downloading x:\nTried y"), ("Tried y",)),
        (zipped(("enwik8", PAGE[:-1])), ("199 bytes",)),
        (zipped(("enwik8", PAGE))[:-5], ("damaged",)),
    ],
)
def test_a_failed_download_of_wikipedia_is_one_line_and_leaves_nothing(tmp_path, serve, content, words):
    serve(content)
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        download_wikipedia(tmp_path, "enwik8")
    assert ".download-" not in str(caught.value)  # it has been removed
    for word in ("mattmahoney.net/dc/enwik8.zip", tmp_path / "text", *words):
        assert str(word) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_real_penn_treebank(real_data):
    assert has_penn_treebank(real_data)
    treebank = penn_treebank(real_data)
    assert [len(part) for part in treebank] == [5_017_482, 393_042, 442_423]
    assert len(vocabulary(treebank)) == 50
    assert joined(treebank.val[:60]) == "consumers may want to move their telephones a little closer "
    assert unigram_bits(treebank.train, treebank.test) == pytest.approx(4.346, abs=1e-3)
    for name, md5 in text._PTB_FILES.items():
        assert hashlib.md5((real_data / "ptb" / name).read_bytes()).hexdigest() == md5


def test_the_real_penn_treebank_as_characters(real_data, tmp_path):
    for split in SPLITS:
        lines = (real_data / "ptb" / f"ptb.{split}.txt").read_text().splitlines()
        spelt = "".join(" ".join(line.strip().replace(" ", "_")) + " \n" for line in lines)
        put_treebank(tmp_path, {split: spelt}, "char.")
    for one, other in zip(penn_treebank(tmp_path), penn_treebank(real_data), strict=True):
        assert np.array_equal(one, other)


def test_the_first_megabytes_of_the_real_enwik8(real_data):
    parts = own_text(real_data / "text" / "enwik8.first4154064.gz", "bytes")
    assert sum(map(len, parts)) == 4_154_064
    assert parts.train[:10].tobytes() == b"<mediawiki"
    assert len(vocabulary(parts)) == 200
    assert 4.8 < unigram_bits(parts.train, parts.test) < 5.4
    characters = own_text(real_data / "text" / "enwik8.first4154064.gz", "characters")
    assert sum(map(len, characters)) < 4_154_064
    assert joined(characters.train[:10]) == "<mediawiki"
