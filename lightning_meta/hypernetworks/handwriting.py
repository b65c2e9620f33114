"""Handwriting point by point (Ha et al. 2016, section 4.5; Graves 2013, section 4): mixture densities of pen strokes.

Letters: B sequences, T steps, M components of a mixture, H hidden units.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.command_options import Numbers
from lightning_meta.errors import InputError
from lightning_meta.hypernetworks import stroke_figures
from lightning_meta.hypernetworks.layers import HyperLSTM
from lightning_meta.hypernetworks.mixture import Mixture
from lightning_meta.hypernetworks.recurrent import Network, recurrent_network, weight_changes, written_scales
from lightning_meta.hypernetworks.stroke_baselines import last_offset, one_mixture
from lightning_meta.hypernetworks.stroke_data import Points, Prime
from lightning_meta.hypernetworks.trace_figures import annotated_line, histogram
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values
from lightning_meta.seeding import seed_of

State = tuple[Tensor, Tensor]


class PointPredictor(nn.Module):
    """A recurrent network on points, and a linear layer to the mixture of the next.

    Args:
        mixtures: M.
        dropout: Of the network's output, and between layers.
        network: See ``recurrent_network``.
        hidden_size: H, of each layer.
        options: Of ``recurrent_network``.
    """

    def __init__(self, mixtures: int, dropout: float, network: Network, hidden_size: int, **options):
        super().__init__()
        self.dropout = dropout
        self.recurrent = recurrent_network(network, 3, hidden_size, dropout=dropout, **options)
        self.output = nn.Linear(hidden_size, 6 * mixtures + 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Mixture, State]:
        """What follows upon each of the points x (T, B, 3), and the state after them."""
        h, state = self.recurrent(x, state)
        return Mixture.of(self.output(F.dropout(h, self.dropout, self.training))), state


class Handwriting(Experiment):
    """Trains a recurrent network to foretell where the pen goes next.

    Offsets are divided by their standard deviations, which are part of the checkpoints; a log-loss in nats is that of
    these numbers.

    Args:
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of a layer.
        num_layers: Layers.
        layer_norm: Layer norm in all cells, the small ones too (paper: better without it here).
        hyper_size: Units of a HyperLSTM's small LSTM.
        embedding_size: Numbers of each of its embeddings.
        init: Its start, ``paper`` or ``broken-symmetry``.
        mixtures: Components of the mixture.
        dropout: Of the output, and between layers (paper: 0.05).
        recurrent_dropout: Of what enters a cell (paper: 0.05).
        lr: Adam's learning rate.
        lr_decay: Whether it falls to zero along a cosine (paper: no).
        temperatures: ``predict`` writes a page at each of them.
        samples: Lines of a page.
        sample_length: Points of a line.
    """

    def __init__(
        self,
        network: Network = "hyper_lstm",
        hidden_size: int = 900,
        num_layers: int = 1,
        layer_norm: bool = False,
        hyper_size: int = 128,
        embedding_size: int = 4,
        init: str = "paper",
        mixtures: int = 20,
        dropout: float = 0.05,
        recurrent_dropout: float = 0.05,
        lr: float = 1e-4,
        lr_decay: bool = False,
        temperatures: Numbers = [0.25, 0.5, 1.0],  # noqa: B006 - never changed
        samples: int = 8,
        sample_length: int = 600,
    ):
        super().__init__()
        self.save_hyperparameters()
        if not temperatures or min(temperatures) <= 0:
            raise InputError(
                f"model.temperatures is {temperatures}: choose positive numbers, 1 for the model's own odds"
            )
        if mixtures < 1 or samples < 1 or sample_length < 2:
            raise InputError("model: choose at least 1 of mixtures and samples, and a sample_length of at least 2")
        self.measure = Measure(
            "log-loss",
            "nats a sequence",
            "test/log_loss",
            {
                "one mixture for all points": "test/log_loss_one_mixture",
                "Gaussian around the last offset": "test/log_loss_last_offset",
            },
        )
        try:
            self.predictor = PointPredictor(
                mixtures,
                dropout,
                network,
                hidden_size,
                num_layers=num_layers,
                layer_norm=layer_norm,
                hyper_size=hyper_size,
                embedding_size=embedding_size,
                init=init,
                recurrent_dropout=recurrent_dropout,
            )
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        self.register_buffer("scale", torch.ones(2))
        self.val_loss = Mean()
        self.test_losses = nn.ModuleDict(
            {n: Values() for n in ("log_loss", "log_loss_one_mixture", "log_loss_last_offset")}
        )

    def configure_optimizers(self):
        factor = cosine(self.trainer.max_steps) if self.hparams.lr_decay else constant
        return by_step(torch.optim.Adam(self.parameters(), self.hparams.lr), factor)

    def on_fit_start(self) -> None:
        if (self.scale == 1).all():  # else it is that of the checkpoint that is gone on from
            self.scale.copy_(self.trainer.datamodule.scale)

    def normalised(self, points: Tensor) -> Tensor:
        """Points (..., 3) in pen units as the network sees them."""
        return torch.cat([points[..., :2] / self.scale, points[..., 2:]], -1)

    def score(self, batch: Points, state: State | None) -> tuple[Tensor, State]:
        """Nats (B,) of each sequence's part in the segment, and the state after it."""
        x = self.normalised(batch.points).transpose(0, 1)
        mixture, state = self.predictor(x[:-1], state)
        return (mixture.log_loss(x[1:]) * batch.scored.t()).sum(0), state

    def training_step(self, batch: Points, batch_idx: int) -> Tensor:
        losses, self.carry = self.score(batch, self.carry)
        points = batch.scored.sum().clamp(min=1)
        self.log("train/nats_a_point", losses.sum() / points, prog_bar=True, batch_size=len(losses))
        # A mean over sequences; the number that it is divided by is the same in all processes.
        return losses.mean() / (batch.segment.stop - batch.segment.start)

    def validation_step(self, batch: Points, batch_idx: int) -> None:
        losses, _ = self.score(batch, None)
        self.val_loss.update(losses)
        self.log("val/log_loss", self.val_loss, prog_bar=True, batch_size=len(losses))

    def on_test_start(self) -> None:
        train = [
            self.normalised(torch.from_numpy(s).to(self.device)).cpu().numpy() for s in self.trainer.datamodule.train
        ]
        self.baselines = {
            "log_loss_one_mixture": one_mixture(train, self.hparams.mixtures),
            "log_loss_last_offset": last_offset(train),
        }

    def test_step(self, batch: Points, batch_idx: int) -> None:
        losses, _ = self.score(batch, None)
        self.test_losses["log_loss"].update(losses)
        for points, scored in zip(self.normalised(batch.points).cpu(), batch.scored.cpu(), strict=True):
            sequence = points[: 1 + int(scored.sum())].numpy()
            for name, baseline in self.baselines.items():
                self.test_losses[name].update(losses.new_tensor(baseline(sequence)))

    def on_test_epoch_end(self) -> None:
        for name, metric in self.test_losses.items():
            self.log_mean(f"test/{name}", metric.compute())
            metric.reset()

    def write(
        self, prime: Tensor, samples: int, length: int, temperature: float, random: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Lines that go on from a first one.

        Args:
            prime: (n, 3), in pen units.
            samples: How many lines.
            length: Points of each besides the prime's.
            temperature: See ``Mixture.sample``.
            random: What they are drawn with, on the CPU.

        Returns:
            The lines (samples, n + length, 3), in pen units on the CPU; tanh(c) of the first (n + length - 1, H); how
            far the weights moved at each of these steps (n + length - 1, 4), or None where they are fixed.
        """
        recurrent, state = self.predictor.recurrent, None
        lines = list(self.normalised(prime.to(self.device)).cpu().float()[:, None].expand(-1, samples, -1))
        cells, scales = [], []
        for t in range(len(prime) + length - 1):
            mixture, state = self.predictor(lines[t][None].to(self.scale), state)
            if t + 1 == len(lines):
                lines.append(Mixture(*(part[0] for part in mixture)).sample(temperature, random))
            cells.append(torch.tanh(state[1][-1, 0, : recurrent.hidden_size]))
            if isinstance(recurrent, HyperLSTM):
                scales.append(written_scales(recurrent, state))
        lines = torch.stack(lines, 1)
        lines[..., :2] *= self.scale.cpu()
        changes = weight_changes(recurrent, torch.stack(scales)) if scales else None
        return lines, torch.stack(cells).float().cpu(), changes

    def pictures(self, batch: Points) -> dict[str, Tensor]:
        """A few lines that are written with the seed's numbers, and figures 5 and 7 along the first one."""
        random = torch.Generator().manual_seed(seed_of(self.trainer.datamodule.hparams.seed))
        start = torch.zeros(1, 3)
        lines, cells, changes = self.write(start, 4, min(150, self.hparams.sample_length), 0.5, random)
        return {"samples": stroke_figures.draw(lines.numpy())} | self._traces(lines[0].numpy(), cells, changes)

    def predict_step(self, batch: Prime, batch_idx: int) -> dict[str, Tensor | str]:
        """A page of lines at each temperature as PNG and SVG, and the same figures of its first line, by file name."""
        h, written = self.hparams, {}
        for temperature in h.temperatures:
            random = torch.Generator().manual_seed(seed_of(self.trainer.datamodule.hparams.seed))
            lines, cells, changes = self.write(batch.points, h.samples, h.sample_length, temperature, random)
            name, lines = f"temperature_{temperature:g}", lines.numpy()
            written[f"{name}.png"] = stroke_figures.draw(lines, 2, (480, 96))
            written[f"{name}.svg"] = stroke_figures.svg(lines, 2, (480, 96), title=f"temperature {temperature:g}")
            traces = self._traces(lines[0], cells, changes)
            written |= {f"{name}_{trace}.png": picture for trace, picture in traces.items()}
        return written

    def _traces(self, line: np.ndarray, cells: Tensor, changes: Tensor | None) -> dict[str, Tensor]:
        pictures = {"cells": histogram(cells.flatten())}
        if changes is not None:
            points = np.cumsum(line[:, :2], axis=0, dtype=np.float64)
            pictures["weights"] = annotated_line(points[1:], line[1:, 2] > 0.5, changes)
        return pictures
