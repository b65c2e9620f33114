"""Meta-training of an optimizer (Andrychowicz et al. 2016) and comparison with tuned hand-made optimizers.

Shapes: B inner problems of n coordinates each; T inner steps.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_meta.drawing.files import write_png
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.baselines import RULES, best_rate, descend
from lightning_meta.learned_optimizers.figures import loss_curves
from lightning_meta.learned_optimizers.layers import LearnedRule
from lightning_meta.learned_optimizers.unroll import (
    Problems,
    Trajectory,
    first_order_loss,
    imitation_loss,
    loss_and_gradient,
    optimize,
    second_order_loss,
    unroll,
)
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, constant, cosine
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values
from lightning_meta.running.options import Numbers

OURS = "learned optimizer"


class LearningToLearn(Experiment):
    """Train a recurrent network to be an optimizer; the segments of ``MetaSchedule`` are chunks of a trajectory.

    An outer step runs one chunk of the inner optimization and updates the network by the gradient of the chunk's outer
    loss. The next chunk starts from the parameters and states at the end of this one; gradients stop there.

    The module computes in full precision under mixed precision too: with 20 units it would not be faster, and it would
    lose small updates.

    Args:
        hidden_size: Units of each LSTM layer (paper: 20).
        num_layers: Number of LSTM layers (paper: 2).
        p: Parameter of the gradients' preprocessing (paper: 10). None: no preprocessing, as for the quadratics.
        output_scale: Factor on the network's output (paper: 0.1 for MNIST, 1 elsewhere).
        averaging_cells: Number of units in each layer that are averaged over all coordinates: the LSTM+GAC of
            appendix D.
        separate_convolutions: Whether convolution kernels have a network of their own (paper: for CIFAR-10).
        second_order: Whether to differentiate the inner gradients too (paper: no).
        objective: ``sum`` of the losses of the trajectory (paper), or sum of their logarithms, ``log`` (Wichrowska et
            al. 2017), in which a loss that halves counts the same at every size.
        late: Exponent k of the weights w_t = (t / ``data.steps``)^k of the losses: the larger it is, the more late
            losses count (paper: 0, all weights equal).
        imitation_steps: Trajectories that begin before this outer step imitate Adam on Adam's own trajectory (Chen et
            al. 2020).
        imitation_lr: Learning rate of that Adam.
        lr: Learning rate of the outer Adam.
        lr_decay: Whether ``lr`` falls to zero along a cosine over ``trainer.max_steps``.
        baselines: Hand-made rules to compare with (SGD, momentum, NAG, RMSprop, Adam), each with the grid from which
            its best learning rate is chosen.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        p: float | None = 10.0,
        output_scale: float = 0.1,
        averaging_cells: int = 0,
        separate_convolutions: bool = False,
        second_order: bool = False,
        objective: Literal["sum", "log"] = "sum",
        late: float = 0.0,
        imitation_steps: int = 0,
        imitation_lr: float = 0.01,
        lr: float = 1e-2,
        lr_decay: bool = True,
        baselines: dict[str, Numbers] = {  # noqa: B006 - never changed
            "SGD": [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
            "momentum": [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
            "NAG": [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
            "RMSprop": [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3],
            "Adam": [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0],
        },
    ):
        super().__init__()
        self.save_hyperparameters()
        if unknown := [rule for rule, grid in baselines.items() if rule not in RULES or not grid]:
            raise InputError(
                f"model.baselines: {unknown[0]}: give some of {', '.join(RULES)}, each with learning rates"
            )
        if averaging_cells > hidden_size:
            raise InputError(
                f"model.averaging_cells: {averaging_cells} of {hidden_size} units: use {hidden_size} at most"
            )
        self.rule = LearnedRule(
            separate_convolutions,
            hidden_size=hidden_size,
            num_layers=num_layers,
            p=p,
            output_scale=output_scale,
            averaging_cells=averaging_cells,
        )
        self.final_loss, self.summed_loss = Mean(), Mean()  # with NaN, or a rule that diverges would look better
        self.rates: dict[str, dict[str, float]] = {}  # by test case: the chosen rate of each baseline

    def configure_optimizers(self):
        factor = cosine(self.trainer.max_steps) if self.hparams.lr_decay else constant
        return by_step(torch.optim.Adam(self.parameters(), self.hparams.lr), factor)

    def training_step(self, batch: Problems, batch_idx: int) -> Tensor:
        if self.carry is None:
            self.carry = {"theta": batch.start, "state": self.rule.start(len(batch.start), batch.shapes)}
            if self.trainer.global_step < self.hparams.imitation_steps:
                self.carry["teacher"] = self._teacher(batch.start.clone()).state_dict()
        with torch.autocast(self.device.type, enabled=False):
            loss, losses, finite = self._imitate(batch) if "teacher" in self.carry else self._unroll(batch)
        self.log("train/dropped_problems", (~finite).sum().float(), reduce_fx="sum")
        self.log("train/loss", losses[:, finite].mean() if finite.any() else loss.detach(), prog_bar=True)
        return loss

    def _unroll(self, batch: Problems) -> tuple[Tensor, Tensor, Tensor]:
        """Run a chunk; return its outer loss, its inner losses (T + 1, B) and which problems are finite (B,)."""
        theta, state, log = self.carry["theta"], self.carry["state"], self.hparams.objective == "log"
        run = unroll(self.rule, batch, theta, state, batch.segment.start, batch.segment.stop)
        self.carry = {"theta": run.theta, "state": run.state}
        # A problem that has diverged is dropped: it counts as zero until its horizon ends
        times = torch.arange(batch.segment.start, batch.segment.stop + 1).to(run.losses)[:, None]
        weights = (times / self.trainer.datamodule.hparams.steps) ** self.hparams.late  # 0 ** 0 is 1
        if self.hparams.second_order:
            loss = second_order_loss(self.rule, batch, run, theta, state, log, weights)
        else:
            loss = first_order_loss(self.rule, run, state, batch.shapes, log, weights)
        return loss, run.losses, run.finite

    def _imitate(self, batch: Problems) -> tuple[Tensor, Tensor, Tensor]:
        """Run a chunk of the teacher's trajectory; return the same as ``_unroll``."""
        theta = self.carry["theta"].clone()
        teacher = self._teacher(theta)
        teacher.load_state_dict(self.carry["teacher"])
        losses, gradients, updates = [], [], []
        for t in range(batch.segment.start, batch.segment.stop):
            before = theta.clone()
            loss, theta.grad = loss_and_gradient(batch, theta, t)
            teacher.step()
            losses.append(loss)
            gradients.append(theta.grad)
            updates.append(theta - before)
        run = Trajectory(torch.stack(losses), torch.stack(gradients), theta, self.carry["state"])
        gradients, updates = (
            torch.where(run.finite[:, None], values, 0.0) for values in (run.gradients, torch.stack(updates))
        )
        loss, state = imitation_loss(self.rule, gradients, updates, run.state, batch.shapes)
        self.carry = {"theta": theta, "state": state, "teacher": teacher.state_dict()}
        return loss, run.losses, run.finite

    def _teacher(self, theta: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([theta], self.hparams.imitation_lr)

    def validation_step(self, batch: Problems, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            losses, _ = optimize(self.rule, batch, batch.segment.stop)
        self.final_loss.update(losses[-1])
        self.summed_loss.update(losses[1:].sum(0))
        self.log("val/final_loss", self.final_loss, prog_bar=True)
        self.log("val/summed_loss", self.summed_loss)

    def on_test_start(self) -> None:
        self.curves = {case: {} for case in self.trainer.datamodule.cases}
        for case in self.curves:
            self._tune(case)

    def _tune(self, case: str) -> None:
        """Choose every baseline's learning rate for a test case, on problems from the training data."""
        if case in self.rates:
            return
        problems = self.trainer.datamodule.tuning_problems(case, next(self.parameters()))
        grids = self.hparams.baselines
        self.rates[case] = {
            rule: best_rate(rule, grid, problems, problems.segment.stop) for rule, grid in grids.items()
        }
        for rule, rate in self.rates[case].items():
            if rate in (min(grids[rule]), max(grids[rule])) and len(grids[rule]) > 1:
                rank_zero_warn(
                    f"{case}: {rule} is best at {rate:g}, the edge of its grid: widen model.baselines.{rule}"
                )

    def test_step(self, batch: Problems, batch_idx: int, dataloader_idx: int = 0) -> None:
        case = list(self.curves)[dataloader_idx]
        for rule, (losses, _) in self.compare(batch, case).items():
            metric = self.curves[case].setdefault(rule, Values().to(self.device))
            metric.update(losses.T)

    def compare(self, batch: Problems, case: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Minimise with the learned optimizer and with the baselines, from the same starting points.

        Args:
            batch: The problems.
            case: The test case for which the baselines' learning rates were chosen. None: the first.

        Returns:
            By rule, the learned optimizer first: losses (T + 1, B) and the last theta (B, n).
        """
        steps, case = batch.segment.stop, case or next(iter(self.trainer.datamodule.cases))
        self._tune(case)
        with torch.autocast(self.device.type, enabled=False):
            return {OURS: optimize(self.rule, batch, steps)} | {
                f"{rule} {rate:g}": descend(rule, rate, batch, steps) for rule, rate in self.rates[case].items()
            }

    def on_test_epoch_end(self) -> None:
        measures, figures = [], {}
        for case, metrics in self.curves.items():
            curves = {rule: metric.compute() for rule, metric in metrics.items()}  # (problems, T + 1) each
            last = {rule: losses[:, -1] for rule, losses in curves.items()}
            measures.append(self._measure(f"{case}, last loss", last | {"no step": curves[OURS][:, 0]}))
            rival = min(list(last)[1:], key=lambda rule: last[rule].nan_to_num(math.inf, math.inf).mean(), default=OURS)
            measures.append(self._measure(f"{case}, last loss less that of {rival}", {OURS: last[OURS] - last[rival]}))
            if len(measures) == 2:  # the first case has the problems of the training
                summed = {rule: losses[:, 1:].sum(1) for rule, losses in curves.items()}
                measures.append(self._measure(f"{case}, sum of the losses", summed))
                measures.append(self._measure(f"{case}, median last loss", last, torch.Tensor.median))
            figures[case] = self._draw(case, curves)
        self.measure, *self.further_measures = measures
        self._show(figures)

    def _measure(self, name: str, values: dict[str, Tensor], statistic: Any = torch.Tensor.mean) -> Measure:
        """Log a statistic of each rule's values (problems,), ours first, and for means their 95 % intervals."""
        for rule, value in values.items():
            if statistic is torch.Tensor.mean:
                self.log_mean(f"test/{name}/{rule}", value)
            else:
                self.log(f"test/{name}/{rule}", statistic(value))
        ours, *others = values
        return Measure(
            name, self.trainer.datamodule.unit, f"test/{name}/{ours}", {r: f"test/{name}/{r}" for r in others}
        )

    def _draw(self, case: str, curves: dict[str, Tensor]) -> Tensor:
        horizon = self.trainer.datamodule.hparams.steps
        steps = len(next(iter(curves.values()))[0]) - 1
        return loss_curves(curves, case, marks=[horizon] if steps > horizon else [])

    @rank_zero_only
    def _show(self, figures: dict[str, Tensor]) -> None:
        """Write the figures of the test to the run's folder and to TensorBoard."""
        for case, figure in figures.items() if not self.trainer.fast_dev_run else ():
            write_png(Path(self.logger.log_dir) / f"{case.replace(' ', '_').replace('/', '_')}.png", figure)
            for logger in self.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"test/{case}", figure, self.global_step)

    def pictures(self, batch: Problems) -> dict[str, Tensor]:
        """Draw the loss curves of the learned optimizer and the baselines on the batch, uint8 (3, H', W')."""
        return {"curves": self._draw("validation", {rule: run[0].T for rule, run in self.compare(batch).items()})}

    def predict_step(self, batch: Problems, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss curves of the learned optimizer and the baselines, by file name."""
        curves = {rule: losses.T for rule, (losses, _) in self.compare(batch).items()}
        return {f"{batch.segment.problem:03d}_curves.png": self._draw("prediction", curves)}
