"""Subword tokenization by SentencePiece (Kudo and Richardson 2018).

A subword is a frequent character sequence: a character, a part of a word or a word. Both languages share one
vocabulary, as in GNMT (Wu et al. 2016, section 4.1), so that names and numbers can be copied.
"""

import io
import re
from collections.abc import Iterable, Sequence

from lightning_meta.errors import InputError

PAD, BOS, EOS, UNKNOWN = range(4)  # special tokens: the first four of every vocabulary
_LINES = 2_000_000  # number of sentences of each text to train on


def train_subwords(texts: Iterable[Sequence[str]], size: int, byte_fallback: bool = True) -> bytes:
    """Train a vocabulary by byte pair encoding (Sennrich et al. 2016). The result is deterministic.

    Args:
        texts: Lists of sentences, for example ``Pairs``. At most two million evenly spaced sentences of each are used.
        size: Number of subwords, including the four special tokens.
        byte_fallback: Include a token for each of the 256 bytes and encode rare characters as bytes, so that nothing is
            unknown. Without it, which suits small vocabularies, every character of the texts is a subword, and other
            characters are unknown.

    Returns:
        SentencePiece's model, for ``Pieces``.

    Raises:
        InputError: If the texts are too small for this size or have too many characters; the error gives the limit.

    Example:
        >>> pieces = Subwords(train_subwords([["the cat", "the dog", "a cat"]], size=20, byte_fallback=False))
        >>> len(pieces), pieces.decode(pieces.encode(["the cat"]))
        (20, ['the cat'])
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
            normalization_rule_name="identity",  # decoding gives the original sentence
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
        raise InputError(f"no subwords can be learned from these texts ({error}): give other texts") from error
    return model.getvalue()


class Subwords:
    """A subword vocabulary, which encodes and decodes sentences.

    Args:
        model: Result of ``train_subwords``, stored as ``model`` for checkpoints (130 kB for 8,000 subwords).

    Raises:
        InputError: If ``model`` is something else.
    """

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        self.model = model
        wrong = "this is no vocabulary made by train_subwords: train it again"
        try:
            self._processor = learned = SentencePieceProcessor(model_proto=model, num_threads=1)
        except (RuntimeError, UnicodeDecodeError) as error:  # the second comes from decoding the error message
            raise InputError(wrong) from error
        if (learned.pad_id(), learned.bos_id(), learned.eos_id(), learned.unk_id()) != (PAD, BOS, EOS, UNKNOWN):
            raise InputError(wrong)

    def __len__(self) -> int:
        """Return the number of subwords."""
        return self._processor.get_piece_size()

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Return the subword indices of each sentence, without special tokens. Whitespace is collapsed and stripped."""
        return self._processor.encode(sentences)

    def decode(self, pieces: list[list[int]]) -> list[str]:
        """Return the sentences. Special tokens are skipped, except unknown ones, which become ``⁇``."""
        return [self._processor.decode(sentence) for sentence in pieces]

    def spell(self, pieces: list[int]) -> list[str]:
        """Return the text of each subword, with ``▁`` for a space."""
        return self._processor.id_to_piece(pieces)
