"""Language models on symbols: characters of Penn Treebank, bytes of Wikipedia (Ha et al. 2016, sections 4.3 and 4.4).

Letters: B readers, T steps, V symbols that the model knows, Y = 4 gates in the order i, f, g, o.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.layers import HyperLSTM
from lightning_meta.hypernetworks.recurrent import Network, recurrent_network, weight_changes, written_scales
from lightning_meta.hypernetworks.text_data import Lines, Prompt
from lightning_meta.hypernetworks.trace_figures import annotated_text, histogram
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean
from lightning_meta.seeding import seed_of
from lightning_meta.sources.text import compressed_bits, unigram_bits

State = tuple[Tensor, Tensor]
NO_SYMBOL = torch.iinfo(torch.int64).max


class SymbolPredictor(nn.Module):
    """One-hot symbols, a recurrent network, and a linear layer to the next symbol's logits.

    Args:
        symbols: V.
        dropout: Of the one-hot input, of the output, and between layers; a dropped input is a dropped symbol.
        network: See ``recurrent_network``.
        hidden_size: Of each layer.
        options: Of ``recurrent_network``.
    """

    def __init__(self, symbols: int, dropout: float, network: Network, hidden_size: int, **options):
        super().__init__()
        self.symbols, self.dropout = symbols, dropout
        self.recurrent = recurrent_network(network, symbols, hidden_size, dropout=dropout, **options)
        self.output = nn.Linear(hidden_size, symbols)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) of what follows upon x (T, B), and the state after it."""
        one_hot = F.one_hot(x, self.symbols).to(self.output.weight.dtype)
        h, state = self.recurrent(F.dropout(one_hot, self.dropout, self.training), state)
        return self.output(F.dropout(h, self.dropout, self.training)), state


class Trace(NamedTuple):
    """A text of n symbols, and what a model did along it."""

    symbols: list[int]  # n: code points or bytes
    bits: list[float | None]  # n: of each symbol; None: not predicted
    cells: Tensor  # (n, H): tanh(c) of the last layer
    changes: Tensor | None  # (n, Y): by how much its weights W_h changed; None: they are fixed


class LanguageModel(Experiment):
    """Trains a recurrent network to predict the next symbol of a text, on and on.

    The symbols that it knows are those of the text that it is first trained on; they are part of its checkpoints.

    Args:
        symbols: V, at least as many as the text has different ones (paper: 50 on Penn Treebank, 205 on enwik8).
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of a layer.
        num_layers: Layers.
        layer_norm: Layer norm in all cells, the small ones too.
        hyper_size: Units of a HyperLSTM's small LSTM.
        embedding_size: Numbers of each of its embeddings.
        init: Its start, ``paper`` or ``broken-symmetry``.
        dropout: Of input and output, and between layers (paper: 0.1 for one layer on Penn Treebank).
        recurrent_dropout: Of what enters a cell (paper: the same).
        hyper_recurrent_dropout: The same in the small LSTM (paper: 0.15 for 2,048 units on enwik8 alone).
        lr: Adam's learning rate.
        lr_decay: Whether it falls to zero along a cosine (paper: no).
        dynamic_evaluation: Test a copy too that learns from each segment once it has been scored on it (Graves 2013;
            the paper does not), by gradient descent with this learning rate. None: no such test.
        sample_length: Symbols that ``predict`` writes.
        temperature: Of the soft-max that it draws them from.
    """

    def __init__(
        self,
        symbols: int = 50,
        network: Network = "hyper_lstm",
        hidden_size: int = 1000,
        num_layers: int = 1,
        layer_norm: bool = True,
        hyper_size: int = 128,
        embedding_size: int = 4,
        init: str = "paper",
        dropout: float = 0.1,
        recurrent_dropout: float = 0.1,
        hyper_recurrent_dropout: float = 0.0,
        lr: float = 1e-3,
        lr_decay: bool = False,
        dynamic_evaluation: float | None = None,
        sample_length: int = 500,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        if temperature <= 0:
            raise InputError(f"model.temperature is {temperature}: choose a positive number, such as 1")
        try:
            self.predictor = SymbolPredictor(
                symbols,
                dropout,
                network,
                hidden_size,
                num_layers=num_layers,
                layer_norm=layer_norm,
                hyper_size=hyper_size,
                embedding_size=embedding_size,
                init=init,
                recurrent_dropout=recurrent_dropout,
                hyper_recurrent_dropout=hyper_recurrent_dropout,
            )
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        self.register_buffer("vocabulary", torch.full((symbols,), NO_SYMBOL))  # sorted
        self.bits = nn.ModuleDict({name: Mean() for name in ("val", "test", "dynamic")})

    def configure_optimizers(self):
        factor = cosine(self.trainer.max_steps) if self.hparams.lr_decay else constant
        return by_step(torch.optim.Adam(self.parameters(), self.hparams.lr), factor)

    def on_fit_start(self) -> None:
        found = self.trainer.datamodule.vocabulary
        if self.vocabulary[0] == NO_SYMBOL:
            if len(found) > len(self.vocabulary):
                raise InputError(
                    f"{self.trainer.datamodule.data_name} has {len(found)} different symbols, more than model.symbols, "
                    f"{len(self.vocabulary)}: give --model.symbols {len(found)}"
                )
            self.vocabulary[: len(found)] = found.to(self.device)
        self._check(found)

    def on_validation_start(self) -> None:
        self._check(self.trainer.datamodule.vocabulary)

    def on_predict_start(self) -> None:
        self._check(torch.from_numpy(self.trainer.datamodule.prompt).unique())

    def _check(self, symbols: Tensor) -> None:
        unknown = symbols[~torch.isin(symbols.cpu(), self.vocabulary.cpu())].tolist()
        if unknown:
            names = ", ".join(repr(self.trainer.datamodule.decode([symbol])) for symbol in unknown[:10])
            raise InputError(
                f"the model was trained without {len(unknown)} of the text's symbols: {names}"
                f"{', ...' if len(unknown) > 10 else ''}; leave them out or train on a text that has them"
            )

    def encode(self, symbols: Tensor) -> Tensor:
        """Numbers 0 <= k < V for code points or bytes of the vocabulary."""
        return torch.searchsorted(self.vocabulary, symbols)

    def score(
        self, batch: Lines, state: State | None, weights: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """The mean cross-entropy in bits of the scored symbols, and the next state; with ``weights`` if given."""
        x = self.encode(batch.symbols).t()
        logits, state = functional_call(self.predictor, weights or {}, (x[:-1], state))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), x[1:].flatten(), reduction="none") / math.log(2)
        scored = batch.scored.t().flatten()
        return (losses * scored).sum() / scored.sum().clamp(min=1), state

    def training_step(self, batch: Lines, batch_idx: int) -> Tensor:
        bits, self.carry = self.score(batch, self.carry)
        self.log("train/bits", bits, prog_bar=True, batch_size=len(batch.symbols))
        return bits * math.log(2)

    def validation_step(self, batch: Lines, batch_idx: int) -> None:
        bits, self.state = self.score(batch, None if batch_idx == 0 else self.state)
        self._log_bits("val", bits, batch)

    def _log_bits(self, name: str, bits: Tensor, batch: Lines) -> None:
        self.bits[name].update(bits, weight=batch.scored.sum())
        self.log(f"{name}/bits", self.bits[name], prog_bar=name == "val", batch_size=len(batch.symbols))

    def on_test_start(self) -> None:
        data = self.trainer.datamodule
        self._check(data.vocabulary)
        self.trivial = {
            "unigram entropy": unigram_bits(data.train_text, data.test_text),
            "gzip": compressed_bits(data.test_text, "gzip"),
            "xz": compressed_bits(data.test_text, "xz"),
        }
        unit, names = f"bits per {data.unit}", {name: f"test/{name}" for name in self.trivial}
        self.measure, self.further_measures = Measure("cross-entropy", unit, "test/bits", names), []
        if self.hparams.dynamic_evaluation is not None:
            names = {"weights as trained": "test/bits"}
            self.further_measures = [Measure("cross-entropy, dynamic evaluation", unit, "dynamic/bits", names)]
            self.weights = {name: weight.detach().clone() for name, weight in self.predictor.named_parameters()}

    def test_step(self, batch: Lines, batch_idx: int) -> None:
        bits, self.state = self.score(batch, None if batch_idx == 0 else self.state)
        self._log_bits("test", bits, batch)
        for name, value in self.trivial.items():
            self.log(f"test/{name}", value, batch_size=len(batch.symbols))
        if self.hparams.dynamic_evaluation is not None:
            self.learning_state = self._learn(batch, None if batch_idx == 0 else self.learning_state)

    def _learn(self, batch: Lines, state: State | None) -> State:
        """Scores ``self.weights`` on the batch, then lets them make a step of gradient descent on it."""
        with torch.enable_grad():
            weights = {name: weight.requires_grad_() for name, weight in self.weights.items()}
            bits, state = self.score(batch, state, weights)
            gradients = torch.autograd.grad(bits * math.log(2), list(weights.values()))
        self._log_bits("dynamic", bits, batch)
        count = batch.scored.sum()
        total = self.trainer.strategy.reduce(count.clone(), reduce_op="sum")  # over all processes: they learn alike
        self.weights = {
            name: weight.detach() - self.hparams.dynamic_evaluation * self._sum(gradient * count) / total.clamp(min=1)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        return tuple(part.detach() for part in state)

    def _sum(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x, reduce_op="sum")

    def write(self, prompt: Tensor, length: int, random: torch.Generator | None = None) -> Trace:
        """Reads a prompt (n,) and writes so many symbols after it, with what happens on the way.

        Args:
            prompt: Code points or bytes.
            length: 0 reads alone.
            random: What symbols are drawn with, on the CPU.
        """
        recurrent, known = self.predictor.recurrent, int((self.vocabulary != NO_SYMBOL).sum())
        numbers, bits, cells, scales, state = self.encode(prompt).tolist(), [None], [], [], None
        for t in range(len(prompt) + length):
            logits, state = self.predictor(torch.tensor([[numbers[t]]], device=self.device), state)
            logits = logits[0, 0, :known].float().cpu()
            if len(numbers) == t + 1 and length:
                odds = (logits / self.hparams.temperature).softmax(0)
                numbers.append(int(torch.multinomial(odds, 1, generator=random)))
            if t + 1 < len(numbers):
                bits.append(-logits.log_softmax(0)[numbers[t + 1]].item() / math.log(2))
            cells.append(torch.tanh(state[1][-1, 0, : recurrent.hidden_size]))
            if isinstance(recurrent, HyperLSTM):
                scales.append(written_scales(recurrent, state))
        n = len(prompt) + length
        changes = weight_changes(recurrent, torch.stack(scales)) if scales else None
        symbols = self.vocabulary[torch.tensor(numbers[:n], device=self.device)].tolist()
        return Trace(symbols, bits[:n], torch.stack(cells).float().cpu(), changes)

    def pictures(self, batch: Lines) -> dict[str, Tensor]:
        """The paper's figures 4 and 5 along the first reader's segment, uint8 (3, H', W')."""
        return self._draw(self.write(batch.symbols[0], 0), len(batch.symbols[0]))

    def predict_step(self, batch: Prompt, batch_idx: int) -> dict[str, Tensor | str]:
        """The prompt gone on with, and the same figures along it, by file name."""
        seed = seed_of(self.trainer.datamodule.hparams.seed)
        random = torch.Generator().manual_seed(seed)
        trace = self.write(batch.symbols, self.hparams.sample_length, random)
        pictures = self._draw(trace, len(batch.symbols))
        text = self.trainer.datamodule.decode(trace.symbols)
        return {"text.txt": f"{text}\n"} | {f"{name}.png": picture for name, picture in pictures.items()}

    def _draw(self, trace: Trace, given: int) -> dict[str, Tensor]:
        letters = [self.trainer.datamodule.decode([symbol]) for symbol in trace.symbols]
        return {
            "text": annotated_text(letters, trace.bits, trace.changes, given),
            "cells": histogram(trace.cells.flatten()),
        }
