"""Machine translation with LSTMs and HyperLSTMs (Ha et al. 2016, section 4.6), after GNMT.

Letters as in ``translator.py``: B sentences, S subwords of a source sentence, T of a target sentence.
"""

from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.text import SacreBLEUScore

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.recurrent import Network
from lightning_meta.hypernetworks.translation_data import Sentences, dictionary, padded, spread, unigram_nats
from lightning_meta.hypernetworks.translation_figures import attention_image
from lightning_meta.hypernetworks.translator import Hypotheses, Translator
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import PRECISE, Mean
from lightning_meta.sources.subwords import EOS, PAD, UNKNOWN, Subwords

DRAWN = 8  # number of sentences whose attention ``predict`` draws
_BASELINE_PAIRS = 10_000  # number of training pairs that the baselines learn from


class Translated(NamedTuple):
    """A translation."""

    text: str
    source: list[str]  # S subwords of the source sentence
    target: list[str]  # T subwords of the translation
    attention: Tensor  # (T, S)


class Translation(Experiment):
    """Trains a translator on parallel text.

    The subwords are learned from the first training set and stored in checkpoints.

    Args:
        pieces: Size of the vocabulary of subwords, for both languages together (paper: 32,000).
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of each layer (paper: 1,024).
        encoder_layers: Number of encoder layers, at least 2; the first is bidirectional (paper: 8).
        decoder_layers: Number of decoder layers, at least 2 (paper: 8).
        piece_size: Size of a subword's embedding.
        layer_norm: Use layer norm in all cells, including a HyperLSTM's small LSTM.
        hyper_size: Units of a HyperLSTM's small LSTM.
        embedding_size: Size of each embedding z of a HyperLSTM.
        init: Initialisation of a HyperLSTM, ``paper`` or ``broken-symmetry``.
        dropout: Dropout probability at the input of each layer.
        lr: Adam's learning rate.
        lr_decay: Decay the learning rate to zero along a cosine.
        beam: Beam width in test and ``predict``; validation uses greedy search.
        length_penalty: Larger values favour longer translations (GNMT's alpha).
        coverage_penalty: Penalty for source subwords without attention (GNMT's beta).

    Raises:
        InputError: If an option is out of range.
    """

    def __init__(
        self,
        pieces: int = 32_000,
        network: Network = "hyper_lstm",
        hidden_size: int = 1024,
        encoder_layers: int = 8,
        decoder_layers: int = 8,
        piece_size: int = 1024,
        layer_norm: bool = True,
        hyper_size: int = 128,
        embedding_size: int = 32,
        init: str = "paper",
        dropout: float = 0.2,
        lr: float = 2e-4,
        lr_decay: bool = False,
        beam: int = 4,
        length_penalty: float = 0.2,
        coverage_penalty: float = 0.2,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name, least in (("pieces", 5), ("piece_size", 1), ("hidden_size", 1), ("beam", 1)):
            if self.hparams[name] < least:
                raise InputError(f"model.{name} is {self.hparams[name]}: choose at least {least}")
        try:
            self.translator = Translator(
                pieces,
                piece_size,
                hidden_size,
                encoder_layers,
                decoder_layers,
                dropout,
                network,
                layer_norm=layer_norm,
                hyper_size=hyper_size,
                embedding_size=embedding_size,
                init=init,
            )
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        self.vocabulary: Subwords | None = None
        self.costs = nn.ModuleDict({name: Mean() for name in ("val", "test")})
        self.bleu = nn.ModuleDict({name: SacreBLEUScore() for name in ("val", "beam", "greedy", "words", "copy")})

    def configure_optimizers(self):
        factor = cosine(self.trainer.max_steps) if self.hparams.lr_decay else constant
        return by_step(torch.optim.Adam(self.parameters(), self.hparams.lr), factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pieces"] = torch.frombuffer(bytearray(self.vocabulary.model), dtype=torch.uint8)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.vocabulary = Subwords(bytes(checkpoint["pieces"].tolist()))

    def on_fit_start(self) -> None:
        if self.vocabulary is None:
            self.vocabulary = self.trainer.datamodule.learn_subwords(self.hparams.pieces)

    def training_step(self, batch: Sentences, batch_idx: int) -> Tensor:
        nats = self.translator(batch.source, batch.target)
        self.log("train/log_perplexity", nats.sum() / (batch.target != PAD).sum(), prog_bar=True, batch_size=_n(batch))
        return nats.sum(0).mean()  # a mean over sentences: independent of how they are split over processes

    def validation_step(self, batch: Sentences, batch_idx: int) -> None:
        self._log_cost("val", batch)
        self._compare("val", self._texts(self._search(batch.source, 1)), batch)

    def on_validation_epoch_end(self) -> None:
        self._log_bleu("val", "val/bleu")

    def on_test_start(self) -> None:
        data, known = self.trainer.datamodule, spread(self.trainer.datamodule.train, _BASELINE_PAIRS)
        encoded = (self.vocabulary.encode(part.target) for part in (known, data.test))
        self.unigram = unigram_nats(*encoded, len(self.vocabulary))
        self.words = dictionary(known)
        names = {"unigram entropy": "test/unigram entropy"}
        self.measure = Measure("log-perplexity", "nats per word piece", "test/log_perplexity", names)
        names = {"greedy search": "greedy", "word by word": "words", "source copied": "copy"}
        names = {title: f"test/bleu/{name}" for title, name in names.items()}
        self.further_measures = [Measure(f"BLEU, beam of {self.hparams.beam}", "%", "test/bleu/beam", names)]

    def test_step(self, batch: Sentences, batch_idx: int) -> None:
        self._log_cost("test", batch)
        self.log("test/unigram entropy", self.unigram, batch_size=_n(batch))
        self._compare("beam", self._texts(self._search(batch.source)), batch)
        self._compare("greedy", self._texts(self._search(batch.source, 1)), batch)
        source = batch.texts.source
        self._compare(
            "words", [" ".join(self.words.get(word, word) for word in text.split()) for text in source], batch
        )
        self._compare("copy", source, batch)

    def on_test_epoch_end(self) -> None:
        for name in ("beam", "greedy", "words", "copy"):
            self._log_bleu(name, f"test/bleu/{name}")

    def _log_cost(self, name: str, batch: Sentences) -> None:
        nats, count = self.translator(batch.source, batch.target).to(PRECISE).sum(), (batch.target != PAD).sum()
        self.costs[name].update(nats / count, weight=count)
        self.log(f"{name}/log_perplexity", self.costs[name], prog_bar=name == "val", batch_size=_n(batch))

    def _compare(self, name: str, texts: list[str], batch: Sentences) -> None:
        self.bleu[name].update(texts, [[text] for text in batch.texts.target])

    def _log_bleu(self, name: str, key: str) -> None:
        self.log(key, 100 * self.bleu[name].compute(), prog_bar=name == "val")
        self.bleu[name].reset()

    def _search(self, source: Tensor, beam: int | None = None) -> Hypotheses:
        """Translate sentences (S, B), with at most 10 subwords more than twice those of the source."""
        h, longest = self.hparams, 2 * (source != PAD).sum(0) + 10
        return self.translator.beam_search(source, longest, beam or h.beam, h.length_penalty, h.coverage_penalty)

    def _texts(self, found: Hypotheses) -> list[str]:
        return self.vocabulary.decode([_before_end(subwords) for subwords in found.subwords.t().tolist()])

    @torch.no_grad()
    def translate(self, sentences: list[str], beam: int | None = None, batch_size: int = 32) -> list[Translated]:
        """Translate sentences. Call ``eval()`` first.

        Args:
            sentences: Source sentences, not empty.
            beam: Beam width. None: ``model.beam``.
            batch_size: Sentences per batch; sentences of similar lengths form a batch.
        """
        encoded = self.vocabulary.encode(sentences)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        done: dict[int, Translated] = {}
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            source = padded(encoded[i] for i in some).to(self.device)
            found = self._search(source, beam)
            columns = zip(some, self._texts(found), found.subwords.t().tolist(), found.attention, strict=True)
            for i, text, subwords, attention in columns:
                read, written = [*encoded[i], EOS], [*_before_end(subwords), EOS]
                names = self.vocabulary.spell(read), self.vocabulary.spell(written)
                done[i] = Translated(text, *names, attention[: len(written), : len(read)])
        return [done[i] for i in range(len(sentences))]

    def pictures(self, batch: Sentences) -> dict[str, Tensor]:
        """Draw the attention on the batch's first three sentences, uint8 (3, H', W')."""
        return self._draw(self.translate(batch.texts.source[:3], 1))

    def predict_step(self, batch: list[str], batch_idx: int) -> dict[str, Tensor | str]:
        """Return files: one line per sentence with its translation, separated by a tab, and images of the attention."""
        if any(UNKNOWN in sentence for sentence in self.vocabulary.encode(batch)):
            rank_zero_warn("some characters are unknown: they were in none of the training sentences")
        found = self.translate(batch, batch_size=self.trainer.datamodule.batch_size)
        lines = [f"{text}\t{translated.text}\n" for text, translated in zip(batch, found, strict=True)]
        pictures = {f"{name}.png": picture for name, picture in self._draw(found[:DRAWN]).items()}
        return {"translations.txt": "".join(lines)} | pictures

    def _draw(self, found: list[Translated]) -> dict[str, Tensor]:
        return {
            f"attention_{number}": attention_image(sentence.attention, sentence.source, sentence.target)
            for number, sentence in enumerate(found, 1)
        }


def _n(batch: Sentences) -> int:
    return batch.source.shape[1]


def _before_end(subwords: list[int]) -> list[int]:
    return subwords[: subwords.index(EOS)]
