import gzip
import math
import types

import pytest
import sacrebleu
import torch
from torchmetrics.text import SacreBLEUScore

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.translation_data import (
    PairDataset,
    Sentences,
    ShuffledPairs,
    TranslationDataModule,
    dictionary,
    padded,
    read_sentences,
    split_pairs,
    spread,
    unigram_nats,
)
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Segment, SegmentSampler
from lightning_meta.sources import parallel_text
from lightning_meta.sources.parallel_text import ParallelText
from lightning_meta.sources.subwords import EOS, PAD, Subwords, train_subwords

SEGMENT = Segment(0, 0, 1, True)


@pytest.fixture(scope="module")
def numbers():
    return parallel_text.number_words(200, 10)


@pytest.fixture(scope="module")
def pieces(numbers):
    return Subwords(train_subwords(numbers.train, 90, byte_fallback=False))


def data_module(pieces=None, rank=0, world_size=1, **options):
    data = TranslationDataModule(**{"train_pairs": 200, "val_pairs": 7, "test_pairs": 10} | options)
    module = types.SimpleNamespace(vocabulary=pieces)
    data.trainer = types.SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=module)
    segments = MetaSchedule(horizon=1).segments
    data.train_batches = SegmentSampler(segments, lambda: 0, 20, data.batch_size, rank, world_size)
    return data


def write(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def test_batches_are_pieces_with_an_end_and_padding(numbers, pieces):
    dataset = PairDataset(numbers.val, pieces)
    batch = Sentences.collate([dataset[(i, SEGMENT)] for i in range(3)])
    assert batch.texts == ParallelText(numbers.val.source[:3], numbers.val.target[:3])
    for column, text in zip(batch.target.t(), numbers.val.target, strict=False):
        length = int((column != PAD).sum())
        assert column[length - 1] == EOS
        assert pieces.decode([column[: length - 1].tolist()]) == [text]
        assert column[length:].eq(PAD).all()
    assert (batch.target != PAD).sum(0).max() == len(batch.target)
    assert padded([[7, 8], []]).tolist() == [[7, EOS], [8, PAD], [EOS, PAD]]


def test_training_takes_each_pair_once_a_round_and_batches_of_one_length(numbers, pieces):
    order = ShuffledPairs(numbers.train, pieces, 0, batch=10, pool=5)
    places = [order.place(i) for i in range(400)]
    assert sorted(places[:200]) == sorted(places[200:]) == list(range(200))
    assert places[:200] != places[200:]
    lengths = torch.tensor([len(numbers.train.target[place]) for place in places[:200]]).view(20, 10)
    mixed = ShuffledPairs(numbers.train, pieces, 0, batch=10, pool=1)
    loose = torch.tensor([len(numbers.train.target[mixed.place(i)]) for i in range(200)]).view(20, 10)
    assert (lengths.amax(1) - lengths.amin(1)).sum() < 0.5 * (loose.amax(1) - loose.amin(1)).sum()
    assert lengths.double().mean(1).view(4, 5).diff(dim=1).lt(0).any(), "batches of a pool are not in order of length"
    again = ShuffledPairs(numbers.train, pieces, 0, batch=10, pool=5)
    assert [again.place(i) for i in reversed(range(120, 400))] == places[:119:-1], "whatever was asked before"
    assert [ShuffledPairs(numbers.train, pieces, 1, 10, 5).place(i) for i in range(20)] != places[:20]


def test_two_processes_see_what_one_sees(pieces):
    def batches(rank, world_size, batch_size):
        data = data_module(pieces, rank, world_size, source="stand-in", batch_size=batch_size, pool=3)
        data.setup("fit")
        loader = iter(data.train_dataloader())
        return [next(loader).texts.source for _ in range(5)], [batch.texts.source for batch in data.val_dataloader()]

    (train, val), (train_0, val_0), (train_1, val_1) = batches(0, 1, 4), batches(0, 2, 2), batches(1, 2, 2)
    assert train == [a + b for a, b in zip(train_0, train_1, strict=True)]
    val, shared = ([text for batch in part for text in batch] for part in (val, val_0 + val_1))
    assert sorted(val) == sorted(shared)
    assert len(val) == 7


def test_the_stand_in_says_what_it_is(tmp_path):
    data = data_module(root=str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"WMT'14 English to French not found in .*wmt14: this run uses numbers in words"
    ):
        data.setup("fit")
    assert data.data_name == "numbers in words, English to French, a stand-in for WMT'14 English to French"
    assert (len(data.train.source), len(data.val.source), data.test_samples) == (200, 7, 10)
    assert data.test_name == "the first 10 pairs of its test"
    assert data.text == data.test.source


def test_wmt14_is_read_where_it_lies(tmp_path):
    for name in ("train", "newstest2012", "newstest2013", "newstest2014"):
        for language in ("en", "fr"):
            write(tmp_path / "wmt14", f"{name}.{language}", [f"{name} {language} {i}" for i in range(9)])
    data = data_module(root=str(tmp_path), train_pairs=4, val_pairs=None, test_pairs=None)
    data.setup("test")
    assert data.data_name == "WMT'14 English to French"
    assert data.train.target == [f"train fr {i}" for i in range(4)]
    assert len(data.val.source) == 18
    assert data.test.source[0] == "newstest2014 en 0"
    assert data.test_name == "the test part"


def test_multi30k_is_downloaded_where_it_is_asked_for(tmp_path, monkeypatch):
    def fetch(root):
        for name in ("train", "val", "test_2016_flickr"):
            for language in ("en", "fr"):
                write(tmp_path / "multi30k" / "raw", f"{name}.{language}", [f"{name} {language}"])

    monkeypatch.setattr(parallel_text, "download_multi30k", fetch)
    options = {"corpus": "multi30k", "root": str(tmp_path), "source": "paper"}
    refused = data_module(**options, download=False)
    refused.prepare_data()
    with pytest.raises(InputError, match=r"Multi30k is missing: get train.en.gz, .* from"):
        refused.setup("fit")
    data = data_module(**options)
    data.prepare_data()
    data.setup("fit")
    assert data.data_name == "Multi30k English to French"
    assert data.test == ParallelText(["test_2016_flickr en"], ["test_2016_flickr fr"])


def test_the_users_folder_and_the_users_two_files(tmp_path):
    for name, count in (("train", 30), ("val", 9), ("test", 12)):
        for language in ("de", "en"):
            write(tmp_path / "mine", f"{name}.{language}", [f"{language} {i}" for i in range(count)])
    options = {"source_language": "de", "target_language": "en", "train_pairs": None}
    data = data_module(pairs=str(tmp_path / "mine"), **options)
    data.setup("fit")
    assert data.data_name == "mine, de to en"
    assert data.train == ParallelText([f"de {i}" for i in range(30)], [f"en {i}" for i in range(30)])
    assert len(data.val.source) == 7
    (tmp_path / "a.gz").write_bytes(gzip.compress("".join(f"a {i}\n" for i in range(40)).encode()))
    write(tmp_path, "b", [f"b {i}" for i in range(40)])
    files = {"source_file": str(tmp_path / "a.gz"), "target_file": str(tmp_path / "b")}
    data = data_module(**files, train_pairs=None)
    data.setup("fit")
    assert data.data_name == "a.gz and b, 90/5/5 %"
    assert [len(part.source) for part in (data.train, data.val, data.test)] == [36, 2, 2]
    assert data.test.target == ["b 38", "b 39"]


def test_files_that_do_not_fit(tmp_path):
    write(tmp_path, "a", [f"a {i}" for i in range(40)])
    write(tmp_path, "b", [f"b {i}" for i in range(39)])
    files = {"source_file": str(tmp_path / "a"), "target_file": str(tmp_path / "b")}
    with pytest.raises(InputError, match=r"b has 39 lines and .*a has 40"):
        data_module(**files).setup("fit")
    write(tmp_path, "b", ["b"] * 38 + ["", "b"])
    with pytest.raises(InputError, match="line 39 is empty: give its sentence or remove the line from both files"):
        data_module(**files).setup("fit")
    write(tmp_path, "b", ["b"] * 40)
    with (
        pytest.warns(UserWarning, match="36 of 36"),
        pytest.raises(InputError, match=r"no training pair has at most 1 characters on each side: raise data.longest"),
    ):
        data_module(**files, longest=1).setup("fit")
    with pytest.raises(InputError, match=r"19 pairs, too few to split: give at least 20"):
        split_pairs(ParallelText(["a"] * 19, ["b"] * 19), None, "these")
    with pytest.raises(InputError, match=r"set data.source_file and data.target_file"):
        data_module(source_file="a")
    with pytest.raises(InputError, match=r"or only data.pairs"):
        data_module(**files, pairs="a")
    with pytest.raises(InputError, match=r"data.pool is 0"):
        data_module(pool=0)


def test_long_training_pairs_are_left_out_and_counted(tmp_path):
    write(tmp_path, "a", ["a" * 5] * 30 + ["a" * 6] * 10)
    write(tmp_path, "b", ["b" * 7] + ["b"] * 39)
    data = data_module(
        source_file=str(tmp_path / "a"), target_file=str(tmp_path / "b"), longest=5, train_pairs=None, test_pairs=None
    )
    with pytest.warns(UserWarning, match="7 of 36 training pairs are left out: they are longer than data.longest"):
        data.setup("fit")
    assert len(data.train.source) == 29
    assert data.test.source == ["a" * 6] * 2, "those of the test stay"
    assert data.hparams.left_out == 7


def test_what_is_to_be_translated(tmp_path):
    write(tmp_path, "mine.en", ["one", " two "])
    assert read_sentences(str(tmp_path / "mine.en")) == ["one", "two"]
    assert read_sentences(" a sentence. ") == ["a sentence."]
    assert read_sentences("a" * 5000) == ["a" * 5000]
    write(tmp_path, "mine.en", ["one", "", "two"])
    with pytest.raises(InputError, match="line 2 is empty"):
        read_sentences(str(tmp_path / "mine.en"))
    write(tmp_path, "mine.en", [])
    with pytest.raises(InputError, match="holds no sentences"):
        read_sentences(str(tmp_path / "mine.en"))
    with pytest.raises(InputError, match=r"nowhere.txt cannot be read"):
        read_sentences("nowhere.txt")
    with pytest.raises(InputError, match=r"data.text is empty"):
        read_sentences("  ")
    data = data_module(root=str(tmp_path), source="paper", text="one")
    data.setup("predict")  # needs no corpus
    assert list(data.predict_dataloader()) == [["one"]]


def test_pieces_are_learned_from_the_training_part(pieces):
    data = data_module(source="stand-in")
    data.setup("fit")
    assert data.learn_subwords(90).model == pieces.model
    with pytest.raises(InputError, match=r"model.pieces: the texts are too small for 9,000 pieces: ask for at most"):
        data.learn_subwords(9000)


def test_unigram_entropy():
    train, test = [[5, 5, 4], [5]], [[5], []]
    odds = {5: 4 / 12, EOS: 3 / 12}  # 6 seen and one more of each of 6 pieces
    wanted = -(math.log(odds[5]) + 2 * math.log(odds[EOS])) / 3
    assert unigram_nats(train, test, 6) == pytest.approx(wanted)


def test_a_dictionary_of_what_comes_together():
    part = ParallelText(["the cat", "the dog", "a cat", "a dog"], ["le chat", "le chien", "un chat", "un chien"])
    assert dictionary(part) == {"the": "le", "a": "un", "cat": "chat", "dog": "chien"}
    assert spread(ParallelText([*"abcdefg"], [*"abcdefg"]), 3).source == [*"adg"]


def test_bleu_is_that_of_sacrebleu(numbers):
    words = dictionary(numbers.train)
    texts = [" ".join(words.get(word, word) for word in text.split()) + "." for text in numbers.test.source]
    references = [f"{text}, (« {text} »)." for text in numbers.test.target]
    ours = SacreBLEUScore()
    for start in (0, 4):
        ours.update(texts[start : start + 4], [[text] for text in references[start : start + 4]])
    ours.update(texts[8:], [[text] for text in references[8:]])
    wanted = sacrebleu.corpus_bleu(texts, [references]).score
    assert wanted > 5
    assert 100 * ours.compute().item() == pytest.approx(wanted, rel=1e-5)


def test_multi30k(real_data):
    data = data_module(corpus="multi30k", root=str(real_data), train_pairs=None, val_pairs=None, test_pairs=None)
    data.setup("fit")
    assert [len(part.source) for part in (data.train, data.val, data.test)] == [29_000, 1_014, 1_000]
    assert data.data_name == "Multi30k English to French"
