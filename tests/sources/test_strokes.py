import io
import os
import pickle
import resource
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from lightning_meta.errors import InputError
from lightning_meta.sources import strokes
from lightning_meta.sources.strokes import (
    from_lines,
    has_iam_online,
    hershey_line,
    hershey_words,
    iam_online,
    offset_scale,
    own_strokes,
    read_line,
    stroke_file,
    to_lines,
)
from tests.conftest import refused

HEAD = '<?xml version="1.0" encoding="ISO-8859-1"?>\n'
LISTS = {  # a01 to a04 with 1, 2, 3 and 4 lines
    "trainset.txt": "a01-000u\n",
    "testset_f.txt": "a02-000u\r\n",
    "testset_v.txt": "a04-000u\n\n",
    "testset_t.txt": "a03-000\n",
}


def xml(lines, head=HEAD):
    """Return the content of a file of IAM-OnDB."""
    text = f'{head}<WhiteboardCaptureSession>\n  <WhiteboardDescription><SensorLocation corner="top_left"/>\n'
    text += "  </WhiteboardDescription>\n  <StrokeSet>\n"
    for line in lines:
        text += '    <Stroke colour="black" start_time="769.05" end_time="769.64">\n'
        text += "".join(f'      <Point x="{x}" y="{y}" time="769.05"/>\n' for x, y in line) + "    </Stroke>\n"
    return text + "  </StrokeSet>\n</WhiteboardCaptureSession>\n"


def walk(i, points=6):
    """Return two strokes that start at (1000 + i, 500)."""
    steps = np.random.default_rng(i).integers(-9, 10, (points - 1, 2))
    points = np.array([[0, 0], *steps.cumsum(0)]) + np.array([1000 + i, 500])
    return [points[:2], points[2:]]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "iam-ondb"
    folder.mkdir()
    for name, text in LISTS.items():
        (folder / name).write_text(text)
    # a05 is on no list
    for form, name in enumerate(["a01-000u", "a02-000u", "a03-000", "a04-000u", "a05-000u"], 1):
        place = folder / "lineStrokes" / name[:3] / name[:7]
        place.mkdir(parents=True)
        for i in range(form):
            (place / f"{name}-{i + 1:02d}.xml").write_text(xml(walk(10 * form + i, 6 + i)))
    return tmp_path


def pack(root, name, *paths):
    with tarfile.open(root / "iam-ondb" / name, f"w:{name[-2:]}") as archive:
        for path in paths:
            archive.add(root / "iam-ondb" / path, path)
    for path in paths:
        (root / "iam-ondb" / path).rename(root / path)


def same(part, expected):
    assert len(part) == len(expected)
    for sequence, other in zip(part, expected, strict=True):
        assert sequence.dtype == np.float32
        np.testing.assert_array_equal(sequence, other)


def random_part(count, seed=0, kind=np.int16):
    random = np.random.default_rng(seed)
    part = np.empty(count, object)
    for i in range(count):
        sequence = random.integers(-100, 100, (random.integers(2, 9), 3))
        sequence[:, 2] = np.arange(len(sequence)) % 2
        part[i] = sequence.astype(kind)
    return part


def write(path, **parts):
    np.savez_compressed(path, **parts)
    return path


def three(**other):
    return {"train": random_part(5), "valid": random_part(2, 1), "test": random_part(1, 2)} | other


def with_member(path, content, key="train"):
    """Write a stroke file with a member of these bytes."""
    write(path, **three())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name == f"{key}.npy" else old)
    return path


def npy(pickled, shape="(1,)"):
    header = f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled


def test_lines_become_offsets_and_lines_again():
    lines = [np.array([[5, 7], [6, 7], [6, 9]]), np.array([[1, 1]]), np.array([[0.5, 2], [3, 3]])]
    sequence = from_lines(lines)
    assert sequence.dtype == np.float32
    expected = [[0, 0, 0], [1, 0, 0], [0, 2, 1], [-5, -8, 1], [-0.5, 1, 0], [2.5, 1, 1]]
    np.testing.assert_array_equal(sequence, np.array(expected))
    for line, again in zip(lines, to_lines(sequence), strict=True):
        np.testing.assert_allclose(again, line - [5, 7])
    for line, again in zip(lines, to_lines(sequence, scale=(2, 3)), strict=True):
        np.testing.assert_allclose(again, (line - [5, 7]) * [2, 3])
    sequence[-1, 2] = 0  # a sequence that ends with the pen down
    assert [len(line) for line in to_lines(sequence)] == [3, 1, 2]


def test_the_scale_of_offsets():
    train = [walk_offsets * [3, 1, 1] for walk_offsets in (from_lines(walk(n, 30)) for n in range(20))]
    scale = offset_scale(train)
    np.testing.assert_allclose(scale, np.concatenate(train)[:, :2].std(0), rtol=1e-5)
    assert scale.dtype == np.float32
    assert scale[0] > 2 * scale[1]
    flat = [np.array([[1, 0, 0], [2, 0, 1]], np.float32)]
    refused(lambda: offset_scale(flat), "one axis")


def test_one_line_from_a_file(tmp_path):
    path = tmp_path / "line.xml"
    path.write_text(xml([[(1, 2), (3, 5)], [(4, 4)]]))
    np.testing.assert_allclose(read_line(path), [[0, 0, 0], [2, 3, 1], [1, -1, 1]])
    refused(lambda: read_line(tmp_path / "none.xml"), "none.xml cannot be read")


@pytest.mark.parametrize("packed", ["", "lines", "lines by xz", "lists", "zip"])
def test_reads_iam_with_the_split_of_graves(root, packed):
    folder = root / "iam-ondb"
    assert has_iam_online(root)
    if packed == "lines":
        pack(root, "lineStrokes-all.tar.gz", "lineStrokes")
    if packed == "lines by xz":
        pack(root, "lineStrokes-all.tar.xz", "lineStrokes")
    if packed == "lists":
        pack(root, "task1.tar.gz", *LISTS)
    if packed == "zip":
        with zipfile.ZipFile(folder / "task1.zip", "w") as archive:
            for name in LISTS:
                archive.write(folder / name, f"task1/{name}")
                (folder / name).unlink()
    assert has_iam_online(str(root))
    before = sorted(root.rglob("*"))
    train, val, test = iam_online(root, shortest=1)
    assert sorted(root.rglob("*")) == before
    lines = {form: [from_lines(walk(10 * form + i, 6 + i)) for i in range(form)] for form in (1, 2, 3, 4)}
    same(train, lines[1] + lines[2] + lines[4])  # testset_v is the larger one here
    same(val, lines[3])
    same(test, lines[3])
    points = np.concatenate(to_lines(val[0]))
    np.testing.assert_array_equal(np.array([1030, 500]) + points, np.concatenate(walk(30)))


def test_short_lines_are_removed_after_the_validation_sets_are_compared(root):
    (root / "iam-ondb" / "testset_v.txt").write_text("a02-000u\n")
    (root / "iam-ondb" / "testset_f.txt").write_text("a04-000u\n")
    train, val, _ = iam_online(root, shortest=7)
    assert [len(line) for line in val] == [7]
    assert [len(line) for line in train] == [7, 8, 9, 7, 8]
    refused(lambda: iam_online(root), "300 points")
    refused(lambda: iam_online(root, shortest=8), "8 points", "test on")


def test_what_is_missing_of_iam_is_named(root, tmp_path):
    refused(lambda: iam_online(tmp_path / "none"), "trainset.txt is missing", "fki")
    (root / "iam-ondb" / "testset_f.txt").unlink()
    refused(lambda: iam_online(root), "testset_f.txt is missing")
    (root / "iam-ondb" / "testset_f.txt").write_text("a02-000u\na09-999z\n")
    refused(lambda: iam_online(root), "testset_f.txt", "a09-999z", "no lines")
    (root / "iam-ondb" / "lineStrokes").rename(root / "elsewhere")
    refused(lambda: iam_online(root), "lineStrokes-all.tar.gz is missing")
    assert not has_iam_online(root)


def test_an_archive_of_iam_cut_short_is_refused(root):
    pack(root, "lineStrokes-all.tar.gz", "lineStrokes")
    path = root / "iam-ondb" / "lineStrokes-all.tar.gz"
    content = path.read_bytes()
    for length in [*range(0, len(content), 199), len(content) - 4]:
        path.write_bytes(content[:length])
        refused(lambda: iam_online(root, 1), "lineStrokes-all.tar.gz", "damaged")


BOMB = '<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">\n'
BOMB += "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">\n' for i in range(1, 12)) + "]>\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (xml([]), ["no strokes"]),
        (xml([[], []]), ["no strokes"]),
        (HEAD, ["no element"]),
        ("", ["no element"]),
        ("not XML", ["syntax error"]),
        (xml([[("1", "2"), ("three", "4")]]), ["three"]),
        (xml([[("1", "2"), ("nan", "4")]]), ["not finite"]),
        (xml([[("1", "2"), ("inf", "4")]]), ["not finite"]),
        (xml([[("1", "2"), ("1e200", "4")]]), ["not finite"]),
        (xml([[("1", "2")]]).replace(' y="2"', ""), ["without a stroke, x or y"]),
        ('<StrokeSet><Point x="1" y="2"/></StrokeSet>', ["without a stroke, x or y"]),
        (xml([[("1", "2")]], '<?xml version="1.0" encoding="no-such"?>'), ["unknown encoding"]),
        (xml([[("1", "2")]]).replace("ISO", "<!--"), ["not well-formed"]),
        (xml([[("1", "2")]], HEAD + BOMB), ["document type"]),
        (xml([[("1", "2")]], HEAD + '<!DOCTYPE a SYSTEM "file:///etc/passwd">'), ["document type"]),
    ],
)
def test_refuses_broken_and_malicious_xml(root, content, words):
    path = root / "iam-ondb" / "lineStrokes" / "a02" / "a02-000" / "a02-000u-01.xml"
    path.write_text(content)
    refused(lambda: iam_online(root, 1), path, *words)


def test_refuses_xml_cut_short_and_too_large(root, monkeypatch):
    path = root / "iam-ondb" / "lineStrokes" / "a02" / "a02-000" / "a02-000u-01.xml"
    content = path.read_text().rstrip()
    for length in range(0, len(content), 7):
        path.write_text(content[:length])
        refused(lambda: iam_online(root, 1), path)
    path.write_text(content)
    monkeypatch.setattr(strokes, "_LARGEST_TEXT", 500)
    refused(lambda: iam_online(root, 1), "bytes, more than 500")


def test_own_folder_is_split_in_the_order_of_its_names(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:03d}.xml").write_text(xml(walk(i)))
    (tmp_path / "notes.txt").write_text("no strokes")
    (tmp_path / ".hidden.xml").write_text("no strokes")
    train, val, test = own_strokes(tmp_path)
    same(train, [from_lines(walk(i)) for i in range(36)])
    same(val, [from_lines(walk(i)) for i in (36, 37)])
    same(test, [from_lines(walk(i)) for i in (38, 39)])
    for i in range(3, 40):
        (tmp_path / f"{i:03d}.xml").unlink()
    assert [len(part) for part in own_strokes(str(tmp_path))] == [1, 1, 1]
    (tmp_path / "002.xml").unlink()
    refused(lambda: own_strokes(tmp_path), "2 XML files", "at least 3")
    refused(lambda: own_strokes(tmp_path / "notes.txt"), "neither a folder nor")
    refused(lambda: own_strokes(tmp_path / "none.npz"), "none.npz", "No such file")
    (tmp_path / "a").mkdir()
    same(own_strokes(write(tmp_path / "a" / "own.npz", **three())).train, random_part(5))


@pytest.mark.parametrize("kind", ["i1", "<i2", ">i2", "i4", "i8", "<f4", ">f4", "f8"])
def test_reads_object_arrays_of_numbers(tmp_path, kind):
    parts = three(train=random_part(5, kind=kind))
    parts["train"][0] = np.asfortranarray(parts["train"][0])
    train, val, test = stroke_file(write(tmp_path / "a.npz", **parts))
    same(train, parts["train"])
    same(val, parts["valid"])
    same(test, parts["test"])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_reads_pickles_old_and_new(tmp_path, protocol):
    part = random_part(5)
    content = npy(pickle.dumps(part, protocol=protocol), "(5,)")
    same(stroke_file(with_member(tmp_path / "a.npz", content)).train, part)
    old = npy(pickle.dumps(part, protocol=protocol).replace(b"numpy._core", b"numpy.core"), "(5,)")
    if protocol < 4:  # later versions count the bytes of a name
        same(stroke_file(with_member(tmp_path / "b.npz", old)).train, part)


@pytest.mark.parametrize("kind", [np.int16, np.float32, object])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_arrays_of_equally_long_sequences(tmp_path, kind, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, (4, 6, 3)), kind, order=order)
    same(stroke_file(write(tmp_path / "a.npz", **three(valid=array))).val, array.astype(np.float32))


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("key", ["train", "test"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol, key):
    trap = tmp_path / "trap"
    part = np.empty(2, object)
    part[:] = [random_part(1)[0], Malicious(os.system, f"mkdir {trap}")]
    pickled = pickle.dumps(part, protocol)
    pickle.loads(pickled)
    trap.rmdir()  # an unrestricted unpickler executes it
    path = with_member(tmp_path / "a.npz", npy(pickled, "(2,)"), key)
    refused(lambda: stroke_file(path), path, key, "system", "asks for")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy frombuffer", "numpy._core.multiarray scalar"])
def test_an_unpickler_that_knows_only_arrays(tmp_path, name):
    content = npy(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    refused(lambda: stroke_file(with_member(tmp_path / "a.npz", content)), name.replace(" ", "."))


@pytest.mark.parametrize(
    "instruction", [pickle.LONG_BINPUT + b"\xff\xff\xff\x3f", pickle.BYTEARRAY8 + (2**36).to_bytes(8, "little")]
)
def test_a_pickle_that_asks_for_gigabytes_does_not_get_them(tmp_path, instruction):
    path = with_member(tmp_path / "a.npz", npy(b"\x80\x05N" + instruction + b"."))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: stroke_file(path), "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**18  # KiB


def test_a_pickle_that_repeats_one_array_is_refused(tmp_path):
    part = np.empty(500, object)
    part[:] = [random_part(1)[0]] * 500  # pickled once
    refused(lambda: stroke_file(write(tmp_path / "a.npz", **three(test=part))), "test", "many places")


def test_what_is_wrong_with_a_sequence_is_named(tmp_path):
    def broken(change):
        parts = three()
        parts["valid"][1] = np.asarray(change(parts["valid"][1].astype(float)))
        return write(tmp_path / "a.npz", **parts)

    def put(row, column, value):
        def change(sequence):
            sequence[row, column] = value
            return sequence

        return lambda: stroke_file(broken(change))

    where = "a.npz: valid, sequence 1"
    refused(put(0, 0, np.nan), where, "not finite")
    refused(put(0, 1, -np.inf), where, "not finite")
    refused(put(0, 1, 1e300), where, "not finite")
    refused(put(1, 2, 0.5), where, "not 0 or 1")
    refused(lambda: stroke_file(broken(lambda sequence: sequence[:0])), where, "(0, 3)")
    refused(lambda: stroke_file(broken(lambda sequence: sequence[:, :2])), where, "2)")
    refused(lambda: stroke_file(broken(lambda sequence: sequence.ravel())), where, ",)")
    refused(lambda: stroke_file(broken(lambda sequence: sequence > 0)), "a.npz: valid", "not of numbers")
    refused(lambda: stroke_file(broken(lambda sequence: sequence.astype(str))), "a.npz: valid", "not of numbers")


def test_what_is_wrong_with_a_stroke_file_is_named(tmp_path):
    path = tmp_path / "a.npz"
    refused(lambda: stroke_file(write(path, train=random_part(2), test=random_part(1))), path, "no key valid")
    refused(lambda: stroke_file(write(path, **three(test=random_part(0)))), "test", "no sequences")
    refused(lambda: stroke_file(write(path, **three(test=np.array(["a"])))), "test", "not of numbers")
    refused(lambda: stroke_file(write(path, **three(test=np.array([{}, 1], object)))), "test", "not a list of arrays")
    refused(lambda: stroke_file(write(path, **three(test=np.array(3)))), "test")
    refused(lambda: stroke_file(write(path, **three(test=np.zeros((4, 3))))), "test, sequence 0", "(3,)")
    nested = np.empty(1, object)
    nested[0] = random_part(2)
    refused(lambda: stroke_file(write(path, **three(test=nested))), "test", "not of numbers")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros((2, 3)))
    refused(lambda: stroke_file(tmp_path / "one.npz"), "one.npz", "damaged")
    header = npy(b"", "(1000000000000, 2, 3)").replace(b"|O", b"i1")
    refused(lambda: stroke_file(with_member(path, header)), "train", "damaged")


def test_a_stroke_file_cut_short_is_refused(tmp_path):
    path = write(tmp_path / "a.npz", **three())
    content = path.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        refused(lambda: stroke_file(path), path)
    array = io.BytesIO()
    np.save(array, random_part(5), allow_pickle=True)
    for length in range(0, len(array.getvalue()), 23):
        with_member(path, array.getvalue()[:length])
        refused(lambda: stroke_file(path), path, "train")


def test_a_damaged_pickle_is_refused_or_read_but_nothing_else():
    file = io.BytesIO()
    np.save(file, random_part(5), allow_pickle=True)
    random = np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        content = bytearray(file.getvalue())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        try:
            assert strokes._part(bytes(content), "it")
        except InputError:
            refusals += 1
    assert refusals > 100


def test_a_stroke_file_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(strokes, "_LARGEST", 100)
    refused(lambda: stroke_file(write(tmp_path / "a.npz", **three())), "train", "more than 100")


def test_reads_the_real_iam(real_data, tmp_path):
    folder = tmp_path / "iam-ondb"
    folder.mkdir()
    (folder / "lineStrokes-all.tar.xz").symlink_to(real_data / "iam-ondb" / "lineStrokes-all.tar.xz")
    for name in LISTS:  # all 12,179 lines would take ten seconds
        forms = (real_data / "iam-ondb" / name).read_text().split()
        (folder / name).write_text("\n".join(forms[:5]))
    train, val, test = iam_online(tmp_path)
    assert (len(train), len(val)) == (102, 32)
    assert test is val
    for line in train + val:
        assert 300 <= len(line) < 3000
        assert np.abs(line[:, :2].sum(0)).argmax() == 0  # a line is written along x


@pytest.mark.parametrize(
    ("name", "counts", "longest"),
    [
        ("kanji/short_kanji", (10_000, 600, 500), 88),
        ("kanji/kanji.rdp100", (10_358, 600, 500), 80),
        ("aaron_sheep/aaron_sheep", (7_400, 300, 300), 250),
        ("omniglot/omniglot", (30_000, 1_000, 1_000), 157),
    ],
)
def test_reads_real_strokes(real_data, name, counts, longest):
    data = own_strokes(real_data / "strokes" / f"{name}.npz")
    assert tuple(map(len, data)) == counts
    assert max(len(sequence) for part in data for sequence in part) == longest
    assert (offset_scale(data.train) > 10).all()


def test_hershey_lines_are_a_function_of_their_key():
    for split in range(3):
        for i in range(3):
            text, sequence = hershey_line(7, split, i)
            again, same_sequence = hershey_line(7, split, i)
            assert text == again
            np.testing.assert_array_equal(sequence, same_sequence)
            other = hershey_line(8, split, i)[1]
            assert sequence.shape != other.shape or not np.array_equal(sequence, other)
    train, val, test = hershey_words(3, 2, 1, seed=7)
    same(train, [hershey_line(7, 0, i)[1] for i in range(3)])
    same(val, [hershey_line(7, 1, i)[1] for i in range(2)])
    same(test, [hershey_line(7, 2, 0)[1]])


def test_hershey_lines_are_of_the_promised_length_and_evenly_spaced():
    for i in range(200):
        text, sequence = hershey_line(0, 0, i)
        assert 1 <= len(text.split()) <= 3
        assert sequence.dtype == np.float32
        assert 60 <= len(sequence) <= 250
        assert np.isfinite(sequence).all()
        assert set(sequence[:, 2]) <= {0, 1}
        assert sequence[-1, 2] == 1
        lines = to_lines(sequence)
        assert len(lines) < 5 * len(text)
        ways = np.concatenate([np.hypot(*np.diff(line, axis=0).T) for line in lines if len(line) > 5])
        assert ways.std() < 0.4 * ways.mean()  # except the tremor and the rounded corners
        width, height = np.ptp(np.concatenate(lines), axis=0)
        assert 8 < height < 110
        assert 3 * len(text) < width < 40 * len(text)


def test_splits_of_hershey_lines_share_no_word():
    parts = strokes._words()
    assert all(len(part) > 50 for part in parts)
    assert not set(parts[0]) & set(parts[1]) | set(parts[1]) & set(parts[2]) | set(parts[0]) & set(parts[2])
    for split, part in enumerate(parts):
        written = {word.lower() for i in range(50) for word in hershey_line(0, split, i)[0].split()}
        assert len(written) > 25
        assert written <= set(part)


def test_letters_of_the_joined_style_are_joined():
    assert len(strokes._written("never", "scripts", np.random.default_rng(0))) == 1
    printed = strokes._written("never", "futural", np.random.default_rng(0))
    assert len(printed) == sum(len(strokes._letters("futural")[letter][0]) for letter in "never")


def test_a_missing_font_package_is_named(monkeypatch):
    strokes._letters.cache_clear()
    monkeypatch.setitem(sys.modules, "HersheyFonts", None)
    refused(lambda: hershey_line(0, 0, 0), "Hershey-Fonts", "requirements.txt")
