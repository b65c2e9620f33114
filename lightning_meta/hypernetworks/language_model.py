"""Language models on characters of Penn Treebank or bytes of Wikipedia (Ha et al. 2016, sections 4.3 and 4.4).

Letters: B readers, T steps, V symbols in the vocabulary, Y = 4 gates in the order i, f, g, o.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.layers import HyperLSTM
from lightning_meta.hypernetworks.recurrent import Network, generated_scales, recurrent_network, weight_changes
from lightning_meta.hypernetworks.text_data import Prompt, TextBatch
from lightning_meta.hypernetworks.trace_figures import annotated_text, histogram
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean
from lightning_meta.sources.seeding import seed_of
from lightning_meta.sources.text import compressed_bits, unigram_bits

State = tuple[Tensor, Tensor]
NO_SYMBOL = torch.iinfo(torch.int64).max


class SymbolPredictor(nn.Module):
    """Predicts the next symbol: one-hot inputs, a recurrent network and a linear layer.

    Args:
        symbols: V.
        dropout: Dropout probability of input symbols, of outputs, and between layers.
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of each layer.
        options: See ``recurrent_network``.

    >>> import torch
    >>> predictor = SymbolPredictor(10, 0.0, "lstm", 8, layer_norm=True)
    >>> logits, (h, c) = predictor(torch.randint(10, (5, 3)))
    >>> logits.shape
    torch.Size([5, 3, 10])
    """

    def __init__(self, symbols: int, dropout: float, network: Network, hidden_size: int, **options):
        super().__init__()
        self.symbols, self.dropout = symbols, dropout
        self.recurrent = recurrent_network(network, symbols, hidden_size, dropout=dropout, **options)
        self.output = nn.Linear(hidden_size, symbols)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return logits (T, B, V) of the symbol after each of x (T, B), and the last state."""
        one_hot = F.one_hot(x, self.symbols).to(self.output.weight.dtype)
        h, state = self.recurrent(F.dropout(one_hot, self.dropout, self.training), state)
        return self.output(F.dropout(h, self.dropout, self.training)), state


class Trace(NamedTuple):
    """A text of n symbols, and what the model computed at each."""

    symbols: list[int]  # n code points or bytes
    bits: list[float | None]  # n: cost of each symbol; None: not predicted
    cells: Tensor  # (n, H): tanh(c) of the last layer
    changes: Tensor | None  # (n, Y): change of the last layer's weights W_h; None: they are fixed


class LanguageModel(Experiment):
    """Trains a recurrent network to predict the next symbol of a text.

    The vocabulary is that of the first training text. It is stored in checkpoints.

    Args:
        symbols: Size of the vocabulary: at least the text's number of different symbols (paper: 50 on Penn Treebank,
            205 on enwik8).
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of each layer.
        num_layers: Number of stacked layers.
        layer_norm: Use layer norm in all cells, including a HyperLSTM's small LSTM.
        hyper_size: Units of a HyperLSTM's small LSTM.
        embedding_size: Size of each embedding z of a HyperLSTM.
        init: Initialisation of a HyperLSTM, ``paper`` or ``broken-symmetry``.
        dropout: Dropout probability of input symbols, of outputs, and between layers (paper: 0.1 for one layer on Penn
            Treebank).
        recurrent_dropout: Dropout probability of a cell's tanh(g) (paper: the same).
        hyper_recurrent_dropout: The same in the small LSTM (paper: 0.15, only for 2,048 units on enwik8).
        lr: Adam's learning rate.
        lr_decay: Decay the learning rate to zero along a cosine (paper: no).
        dynamic_evaluation: Also test a copy that learns from each segment after it has been scored on it (Graves 2013;
            not in the paper), by gradient descent with this learning rate. None: no such test.
        sample_length: Number of symbols that ``predict`` generates.
        temperature: Temperature of the softmax that symbols are sampled from.

    Raises:
        InputError: If an option is out of range.
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
                    f"{self.trainer.datamodule.data_name} has {len(found)} different symbols, but model.symbols is "
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
                f"the model does not know {len(unknown)} of the text's symbols: {names}"
                f"{', ...' if len(unknown) > 10 else ''}; remove them or train on a text that has them"
            )

    def encode(self, symbols: Tensor) -> Tensor:
        """Convert code points or bytes of the vocabulary to indices from 0 to V - 1."""
        return torch.searchsorted(self.vocabulary, symbols)

    def score(
        self, batch: TextBatch, state: State | None, weights: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Return the mean cross-entropy of the scored symbols in bits, and the next state.

        Args:
            batch: B readers and T steps.
            state: State before the batch. None: the initial state.
            weights: Parameters to use instead of the predictor's own, by name.
        """
        x = self.encode(batch.symbols).t()
        logits, state = functional_call(self.predictor, weights or {}, (x[:-1], state))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), x[1:].flatten(), reduction="none") / math.log(2)
        scored = batch.scored.t().flatten()
        return (losses * scored).sum() / scored.sum().clamp(min=1), state

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        bits, self.carry = self.score(batch, self.carry)
        self.log("train/bits", bits, prog_bar=True, batch_size=len(batch.symbols))
        return bits * math.log(2)

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        bits, self.state = self.score(batch, None if batch_idx == 0 else self.state)
        self._log_bits("val", bits, batch)

    def _log_bits(self, name: str, bits: Tensor, batch: TextBatch) -> None:
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

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        bits, self.state = self.score(batch, None if batch_idx == 0 else self.state)
        self._log_bits("test", bits, batch)
        for name, value in self.trivial.items():
            self.log(f"test/{name}", value, batch_size=len(batch.symbols))
        if self.hparams.dynamic_evaluation is not None:
            self.learning_state = self._learn(batch, None if batch_idx == 0 else self.learning_state)

    def _learn(self, batch: TextBatch, state: State | None) -> State:
        """Score ``self.weights`` on the batch, then update them by a step of gradient descent on it."""
        with torch.enable_grad():
            weights = {name: weight.requires_grad_() for name, weight in self.weights.items()}
            bits, state = self.score(batch, state, weights)
            gradients = torch.autograd.grad(bits * math.log(2), list(weights.values()))
        self._log_bits("dynamic", bits, batch)
        count = batch.scored.sum()
        total = self.trainer.strategy.reduce(
            count.clone(), reduce_op="sum"
        )  # over all processes, so that all make the same update
        self.weights = {
            name: weight.detach() - self.hparams.dynamic_evaluation * self._sum(gradient * count) / total.clamp(min=1)
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        return tuple(part.detach() for part in state)

    def _sum(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x, reduce_op="sum")

    def generate(self, prompt: Tensor, length: int, random: torch.Generator | None = None) -> Trace:
        """Read a prompt and generate symbols that follow it.

        Args:
            prompt: Code points or bytes, (n,).
            length: Number of symbols to generate; 0 only reads the prompt.
            random: Generator on the CPU that symbols are sampled with.

        Returns:
            The n + length symbols and what the model computed at each.
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
                scales.append(generated_scales(recurrent, state))
        n = len(prompt) + length
        changes = weight_changes(recurrent, torch.stack(scales)) if scales else None
        symbols = self.vocabulary[torch.tensor(numbers[:n], device=self.device)].tolist()
        return Trace(symbols, bits[:n], torch.stack(cells).float().cpu(), changes)

    def pictures(self, batch: TextBatch) -> dict[str, Tensor]:
        """Draw the paper's figures 4 and 5 for the first reader's segment, uint8 (3, H', W')."""
        return self._draw(self.generate(batch.symbols[0], 0), len(batch.symbols[0]))

    def predict_step(self, batch: Prompt, batch_idx: int) -> dict[str, Tensor | str]:
        """Return files: the prompt and its continuation, and the same figures for it."""
        seed = seed_of(self.trainer.datamodule.hparams.seed)
        random = torch.Generator().manual_seed(seed)
        trace = self.generate(batch.symbols, self.hparams.sample_length, random)
        images = self._draw(trace, len(batch.symbols))
        text = self.trainer.datamodule.decode(trace.symbols)
        return {"text.txt": f"{text}\n"} | {f"{name}.png": image for name, image in images.items()}

    def _draw(self, trace: Trace, given: int) -> dict[str, Tensor]:
        characters = [self.trainer.datamodule.decode([symbol]) for symbol in trace.symbols]
        return {
            "text": annotated_text(characters, trace.bits, trace.changes, given),
            "cells": histogram(trace.cells.flatten()),
        }
