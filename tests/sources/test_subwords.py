import hashlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys

import pytest
import sentencepiece
import torch

from lightning_meta.errors import InputError
from lightning_meta.sources.parallel_text import ParallelText, folder
from lightning_meta.sources.subwords import BOS, EOS, PAD, UNKNOWN, Subwords, train_subwords
from tests.conftest import ROOT, refused

ANIMALS = {"cat": "chat", "dog": "chien", "cow": "vache", "bird": "oiseau", "fish": "poisson"}
DEEDS = {"sees": "voit", "follows": "suit", "hears": "entend", "fears": "craint"}
# all sentences of these words
TEXTS = ParallelText(
    [f"the {a} {deed} the {b}." for a in ANIMALS for deed in DEEDS for b in ANIMALS],
    [f"le {a} {deed} le {b}\u202f!" for a in ANIMALS.values() for deed in DEEDS.values() for b in ANIMALS.values()],
)


@pytest.fixture(scope="module")
def pieces():
    return Subwords(train_subwords(TEXTS, 330))


@pytest.fixture(scope="module")
def small():
    return Subwords(train_subwords(TEXTS, 60, byte_fallback=False))


@pytest.mark.parametrize("which", ["pieces", "small"])
def test_decodes_what_it_encodes(which, request):
    vocabulary = request.getfixturevalue(which)
    for sentences in TEXTS:
        encoded = vocabulary.encode(sentences)
        assert vocabulary.decode(encoded) == sentences
        assert all(UNKNOWN < piece < len(vocabulary) for sentence in encoded for piece in sentence)
        assert sum(map(len, encoded)) < 0.6 * sum(map(len, sentences))  # fewer subwords than characters
    assert len(vocabulary) == {"pieces": 330, "small": 60}[which]


def test_knows_every_character_with_bytes_and_no_special_piece_by_name(pieces):
    sentences = ["<s> </s> <pad> <unk> <0x41>", "日本 Ж 🙂 \x07", "tab\tand\u00a0blanks"]
    encoded = pieces.encode(sentences)
    assert pieces.decode(encoded) == sentences
    assert all(piece > UNKNOWN for sentence in encoded for piece in sentence)


def test_has_one_number_for_what_is_unknown_without_bytes(small):
    [encoded] = small.encode(["the Ж cat"])
    assert encoded.count(UNKNOWN) == 1
    assert "⁇" in small.decode([encoded])[0]


def test_passes_over_special_pieces_blanks_and_nothing(pieces):
    assert (PAD, BOS, EOS, UNKNOWN) == (0, 1, 2, 3)
    [cat] = pieces.encode(["the cat"])
    assert pieces.decode([[BOS, *cat, EOS, PAD, PAD], [PAD], []]) == ["the cat", "", ""]
    assert pieces.encode(["  the   cat ", ""]) == [cat, []]
    assert pieces.encode([]) == pieces.decode([]) == []


def test_is_the_same_from_a_tensor_and_from_a_pickle(pieces):
    tensor = torch.frombuffer(bytearray(pieces.model), dtype=torch.uint8)
    for other in (Subwords(tensor.numpy().tobytes()), pickle.loads(pickle.dumps(pieces))):
        assert other.model == pieces.model
        assert other.encode(TEXTS.source) == pieces.encode(TEXTS.source)
        assert len(other) == len(pieces)


def test_learns_the_same_in_any_process():
    program = """if True:
        import hashlib, json
        from lightning_meta.sources.subwords import train_subwords
        print(hashlib.md5(train_subwords(json.loads(input()), 330)).hexdigest())
    """
    expected = hashlib.md5(train_subwords(TEXTS, 330)).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(TEXTS),
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
    assert done.stderr == ""


def test_reads_texts_of_millions_in_evenly_spread_lines(monkeypatch):
    monkeypatch.setattr("lightning_meta.sources.subwords._LINES", 50)
    thinned = train_subwords([TEXTS.source[::2], TEXTS.target[::2]], 300)
    assert len(TEXTS.source) == 100
    assert train_subwords(TEXTS, 300) == thinned
    assert train_subwords(TEXTS, 300) != train_subwords([TEXTS.source[:50], TEXTS.target[:50]], 300)


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_names_the_largest_and_the_smallest_size(byte_fallback, capfd):
    def learn(size):
        return train_subwords(TEXTS, size, byte_fallback)

    limits = []
    for size, words in ((5_000, ("too small for 5,000 pieces", "at most")), (5, ("5 pieces are too few", "at least"))):
        with pytest.raises(InputError) as caught:
            learn(size)
        assert all(word in str(caught.value) for word in words)
        limits.append(int(str(caught.value).split()[-1].replace(",", "")))
    largest, smallest = limits
    assert len(Subwords(learn(largest))) == largest
    assert len(Subwords(learn(smallest))) == smallest
    refused(lambda: learn(largest + 1), f"at most {largest}")
    refused(lambda: learn(smallest - 1), f"at least {smallest}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("texts", [[], [[]], [["", " "]]], ids=["no texts", "no sentences", "blank sentences"])
def test_refuses_texts_of_nothing(texts):
    refused(lambda: train_subwords(texts, 300), "no subwords can be learned")


@pytest.mark.parametrize("model", [b"", b"not a model", bytes(100)])
def test_refuses_what_is_no_vocabulary(model):
    refused(lambda: Subwords(model), "no vocabulary")


def test_refuses_a_vocabulary_with_other_special_pieces_and_a_damaged_one(pieces):
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS.source), model_writer=other, vocab_size=30, model_type="bpe", minloglevel=2
    )
    refused(lambda: Subwords(other.getvalue()), "no vocabulary")
    refused(lambda: Subwords(pieces.model[: len(pieces.model) // 2 + 1]), "no vocabulary")


def test_spells_pieces_with_their_blanks(pieces):
    (encoded,) = pieces.encode(["the cat sees"])
    assert "".join(pieces.spell(encoded)) == "\u2581the\u2581cat\u2581sees"
    assert pieces.spell([PAD, BOS, EOS]) == ["<pad>", "<s>", "</s>"]


def test_reads_the_real_multi30k(real_data):
    train = folder(real_data / "multi30k" / "raw").train
    pieces = Subwords(train_subwords(train, 4_000))
    sample = random.Random(0).sample(train.target, 1_000)
    assert pieces.decode(pieces.encode(sample)) == [re.sub(" +", " ", sentence) for sentence in sample]
    assert len(pieces) == 4_000
