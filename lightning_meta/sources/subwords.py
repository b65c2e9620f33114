"""Sentences as pieces of words, by SentencePiece (Kudo and Richardson 2018).

A piece is what is frequent: a character, a part of a word, a word. Both languages share one vocabulary, as in GNMT (Wu
et al. 2016, section 4.1), so that names and numbers can be copied.
"""

import io
import re
from collections.abc import Iterable, Sequence

from lightning_meta.errors import InputError

PAD, BOS, EOS, UNKNOWN = range(4)  # the first four pieces of every vocabulary; none is found in a sentence
_LINES = 2_000_000  # of each text to learn pieces from


def train_pieces(texts: Iterable[Sequence[str]], size: int, byte_fallback: bool = True) -> bytes:
    """Learn a vocabulary by byte pair encoding (Sennrich et al. 2016): the same texts give the same bytes.

    Args:
        texts: Lists of sentences, ``Pairs`` for one. Of a list of millions, two million evenly spread ones are read.
        size: Pieces, with the four special ones.
        byte_fallback: Have a piece for each of the 256 bytes and spell rare characters in them: nothing is unknown.
            Without, every character of the texts has a piece, and others are unknown: for small vocabularies.

    Returns:
        SentencePiece's model, for ``Pieces``.

    Raises:
        InputError: If the texts have too few pieces for this size, or too many characters; it names the limit.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text[:: -(-len(text) // _LINES) or 1]),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=byte_fallback,
            character_coverage=0.9999 if byte_fallback else 1.0,
            normalization_rule_name="identity",  # decoded, a sentence is what it was
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNKNOWN,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if match := re.search(r"size too high.*<= (\d+)", str(error)):
            raise InputError(
                f"the texts are too small for {size:,} pieces: ask for at most {int(match[1]):,}"
            ) from error
        if match := re.search(r"smaller than required.* \d+ vs (\d+)", str(error)):
            raise InputError(f"{size:,} pieces are too few: ask for at least {int(match[1]):,}") from error
        raise InputError(f"no pieces can be learned from these texts ({error}): give others") from error
    return model.getvalue()


class Pieces:
    """A vocabulary that takes sentences apart and puts them together again.

    Args:
        model: What ``train_pieces`` returned. It is kept as ``model``, to go into checkpoints: 130 kB for 8,000 pieces.

    Raises:
        InputError: If it is something else.
    """

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model = model
        wrong = "this is no vocabulary of train_pieces: learn it again"
        try:
            self._processor = learned = SentencePieceProcessor(model_proto=model, num_threads=1)
        except (RuntimeError, UnicodeDecodeError) as error:  # the second over its own message
            raise InputError(wrong) from error
        if (learned.pad_id(), learned.bos_id(), learned.eos_id(), learned.unk_id()) != (PAD, BOS, EOS, UNKNOWN):
            raise InputError(wrong)

    def __len__(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Numbers of the pieces of each sentence, without special ones. Blanks count once, outer ones not at all."""
        return self._processor.encode(sentences)

    def decode(self, pieces: list[list[int]]) -> list[str]:
        """The sentences again; special pieces are passed over, but for unknown ones, which become ``⁇``."""
        return [self._processor.decode(sentence) for sentence in pieces]

    def spell(self, pieces: list[int]) -> list[str]:
        """How each piece is written, with ``▁`` for a blank."""
        return self._processor.id_to_piece(pieces)
