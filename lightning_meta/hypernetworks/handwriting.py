"""Handwriting as a sequence of points with mixture densities (Ha et al. 2016, section 4.5; Graves 2013, section 4).

Letters: B sequences, T steps, M components of a mixture, H hidden units.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks import stroke_figures
from lightning_meta.hypernetworks.layers import HyperLSTM
from lightning_meta.hypernetworks.mixture import Mixture
from lightning_meta.hypernetworks.recurrent import Network, generated_scales, recurrent_network, weight_changes
from lightning_meta.hypernetworks.stroke_baselines import last_offset, one_mixture
from lightning_meta.hypernetworks.stroke_data import Prime, StrokeBatch
from lightning_meta.hypernetworks.trace_figures import annotated_line, histogram
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values
from lightning_meta.running.options import Numbers
from lightning_meta.sources.seeding import seed_of

State = tuple[Tensor, Tensor]


class PointPredictor(nn.Module):
    """Predicts a mixture for the next point: a recurrent network and a linear layer.

    Args:
        mixtures: M.
        dropout: Dropout probability of outputs and between layers.
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: H, of each layer.
        options: See ``recurrent_network``.

    >>> import torch
    >>> predictor = PointPredictor(4, 0.0, "lstm", 8, layer_norm=True)
    >>> mixture, (h, c) = predictor(torch.randn(7, 3, 3))
    >>> mixture.mu.shape
    torch.Size([7, 3, 4, 2])
    """

    def __init__(self, mixtures: int, dropout: float, network: Network, hidden_size: int, **options):
        super().__init__()
        self.dropout = dropout
        self.recurrent = recurrent_network(network, 3, hidden_size, dropout=dropout, **options)
        self.output = nn.Linear(hidden_size, 6 * mixtures + 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Mixture, State]:
        """Return the mixture of the point after each of x (T, B, 3), and the last state."""
        h, state = self.recurrent(x, state)
        return Mixture.of(self.output(F.dropout(h, self.dropout, self.training))), state


class Handwriting(Experiment):
    """Trains a recurrent network to predict the next offset of the pen.

    Offsets are divided by their standard deviations, which are stored in checkpoints. Log-losses in nats are those of
    the normalised offsets.

    Args:
        network: ``lstm`` or ``hyper_lstm``.
        hidden_size: Units of each layer.
        num_layers: Number of stacked layers.
        layer_norm: Use layer norm in all cells, including a HyperLSTM's small LSTM (paper: worse for handwriting).
        hyper_size: Units of a HyperLSTM's small LSTM.
        embedding_size: Size of each embedding z of a HyperLSTM.
        init: Initialisation of a HyperLSTM, ``paper`` or ``broken-symmetry``.
        mixtures: Number of components of the mixture.
        dropout: Dropout probability of outputs and between layers (paper: 0.05).
        recurrent_dropout: Dropout probability of a cell's tanh(g) (paper: 0.05).
        lr: Adam's learning rate.
        lr_decay: Decay the learning rate to zero along a cosine (paper: no).
        temperatures: ``predict`` generates a page of lines at each of these temperatures.
        samples: Lines per page.
        sample_length: Points per line.

    Raises:
        InputError: If an option is out of range.
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
                f"model.temperatures is {temperatures}: choose positive numbers (1: the model's own distribution)"
            )
        if mixtures < 1 or samples < 1 or sample_length < 2:
            raise InputError(
                f"model.mixtures is {mixtures}, model.samples {samples}, model.sample_length {sample_length}: "
                "choose at least 1, 1 and 2"
            )
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
        if (self.scale == 1).all():  # otherwise it comes from a checkpoint
            self.scale.copy_(self.trainer.datamodule.scale)

    def normalised(self, points: Tensor) -> Tensor:
        """Normalise points (..., 3) in pen units for the network."""
        return torch.cat([points[..., :2] / self.scale, points[..., 2:]], -1)

    def score(self, batch: StrokeBatch, state: State | None) -> tuple[Tensor, State]:
        """Return the loss (B,) in nats of each sequence's points in the segment, and the last state."""
        x = self.normalised(batch.points).transpose(0, 1)
        mixture, state = self.predictor(x[:-1], state)
        return (mixture.log_loss(x[1:]) * batch.scored.t()).sum(0), state

    def training_step(self, batch: StrokeBatch, batch_idx: int) -> Tensor:
        losses, self.carry = self.score(batch, self.carry)
        points = batch.scored.sum().clamp(min=1)
        self.log("train/nats_a_point", losses.sum() / points, prog_bar=True, batch_size=len(losses))
        # A mean over sequences, divided by the same number in all processes.
        return losses.mean() / (batch.segment.stop - batch.segment.start)

    def validation_step(self, batch: StrokeBatch, batch_idx: int) -> None:
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

    def test_step(self, batch: StrokeBatch, batch_idx: int) -> None:
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

    def generate(
        self, prime: Tensor, samples: int, length: int, temperature: float, random: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Generate lines that continue a given beginning.

        Args:
            prime: The beginning, (n, 3), in pen units.
            samples: Number of lines.
            length: Number of points to generate for each.
            temperature: See ``Mixture.sample``.
            random: Generator on the CPU that points are sampled with.

        Returns:
            The lines (samples, n + length, 3) in pen units on the CPU; tanh(c) of the first line (n + length - 1, H);
            the change of the weights at each of its steps (n + length - 1, 4), or None if they are fixed.
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
                scales.append(generated_scales(recurrent, state))
        lines = torch.stack(lines, 1)
        lines[..., :2] *= self.scale.cpu()
        changes = weight_changes(recurrent, torch.stack(scales)) if scales else None
        return lines, torch.stack(cells).float().cpu(), changes

    def pictures(self, batch: StrokeBatch) -> dict[str, Tensor]:
        """Draw four generated lines, and the paper's figures 5 and 7 for the first one, uint8 (3, H', W')."""
        random = torch.Generator().manual_seed(seed_of(self.trainer.datamodule.hparams.seed))
        start = torch.zeros(1, 3)
        lines, cells, changes = self.generate(start, 4, min(150, self.hparams.sample_length), 0.5, random)
        return {"samples": stroke_figures.draw(lines.numpy())} | self._traces(lines[0].numpy(), cells, changes)

    def predict_step(self, batch: Prime, batch_idx: int) -> dict[str, Tensor | str]:
        """Return files: a page of lines for each temperature (PNG and SVG), and the same figures for its first line."""
        h, files = self.hparams, {}
        for temperature in h.temperatures:
            random = torch.Generator().manual_seed(seed_of(self.trainer.datamodule.hparams.seed))
            lines, cells, changes = self.generate(batch.points, h.samples, h.sample_length, temperature, random)
            name, lines = f"temperature_{temperature:g}", lines.numpy()
            files[f"{name}.png"] = stroke_figures.draw(lines, 2, (480, 96))
            files[f"{name}.svg"] = stroke_figures.svg(lines, 2, (480, 96), title=f"temperature {temperature:g}")
            traces = self._traces(lines[0], cells, changes)
            files |= {f"{name}_{trace}.png": image for trace, image in traces.items()}
        return files

    def _traces(self, line: np.ndarray, cells: Tensor, changes: Tensor | None) -> dict[str, Tensor]:
        images = {"cells": histogram(cells.flatten())}
        if changes is not None:
            points = np.cumsum(line[:, :2], axis=0, dtype=np.float64)
            images["weights"] = annotated_line(points[1:], line[1:, 2] > 0.5, changes)
        return images
