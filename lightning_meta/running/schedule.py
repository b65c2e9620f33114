"""``MetaSchedule``: how many inner steps each meta-training step covers."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.running.segments import Episode, Segment, SegmentSampler
from lightning_meta.sources.seeding import seed_of

Curriculum = int | list[list[int]]


class MetaSchedule(Callback):
    """Cut inner problems into segments, one for each outer step (one ``training_step``).

    A module reads the segment from its batch, starts from ``self.carry`` (None: from the beginning), and stores there
    what the next segment starts from. The callback detaches the carry between segments and drops it at the end of a
    horizon.

    Any value may be a curriculum: ``[[0, 5], [1000, 20]]`` is 5 at first and 20 from outer step 1000. Outer steps
    count training batches, from 0.

    Args:
        unroll: Number of inner steps that one outer step differentiates through: the truncation of back-propagation.
            None: the whole horizon.
        horizon: Number of inner steps after which a new inner problem is drawn. None: the state is carried on without
            end, as along a text.
        ways: Number of classes of an episode. If given, every outer step is one batch of whole episodes.
        shots: Number of exemplars of each class.
        queries: Number of further examples of each class.
        seed: Seed of the random numbers that modules draw in training (dropout, noise).

    Raises:
        InputError: If a value is below 1, a curriculum does not rise from outer step 0, none of unroll, horizon and
            ways is given, ways is given beside unroll or horizon, or a loss is not finite.

    >>> from itertools import islice
    >>> schedule = MetaSchedule(unroll=20, horizon=50)
    >>> [(s.problem, s.start, s.stop, s.last) for s in islice(schedule.segments(), 4)]
    [(0, 0, 20, False), (0, 20, 40, False), (0, 40, 50, True), (1, 0, 20, False)]
    """

    def __init__(
        self,
        unroll: Curriculum | None = None,
        horizon: Curriculum | None = None,
        ways: Curriculum | None = None,
        shots: Curriculum = 1,
        queries: Curriculum = 1,
        seed: int = 0,
    ):
        if (unroll is None and horizon is None) == (ways is None):
            raise InputError(
                "set schedule.unroll and/or schedule.horizon (sequences), or schedule.ways (episodes), not both"
            )
        self.unroll = None if unroll is None else _stages("unroll", unroll)
        self.horizon = None if horizon is None else _stages("horizon", horizon)
        self.episode: list[list[list[int]]] = []
        if ways is not None:
            self.episode = [_stages("ways", ways), _stages("shots", shots), _stages("queries", queries)]
        self.seed = seed
        self.batch = 0  # number of finished training batches: the only state of the data
        self.carries: list[Any] = []  # from a checkpoint, one for each rank

    def segments(self) -> Iterator[Segment]:
        """Yield the segments of outer steps 0, 1, 2, ..., without end."""
        step = problem = 0
        while self.episode:
            yield Segment(step, 0, 1, True, Episode(*(_value(stages, step) for stages in self.episode)))
            step += 1
        while True:
            start, end = 0, None if self.horizon is None else _value(self.horizon, step)
            while end is None or start < end:
                stops = [] if end is None else [end]
                if self.unroll is not None:
                    stops.append(start + _value(self.unroll, step))
                stop = min(stops)
                yield Segment(problem, start, stop, last=stop == end)
                start, step = stop, step + 1
            problem += 1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.max_steps < 0:
            raise InputError("trainer.max_steps: say how many outer steps to train for, e.g. --trainer.max_steps 1000")
        pl_module.carry = None
        trainer.datamodule.train_batches = SegmentSampler(
            self.segments,
            first=lambda: self.batch,
            length=trainer.max_steps * trainer.accumulate_grad_batches,
            batch_size=trainer.datamodule.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.carries:
            if len(self.carries) != trainer.world_size:
                raise InputError(
                    f"the checkpoint was written in the middle of a horizon by {len(self.carries)} processes; "
                    f"resume it with as many devices (now {trainer.world_size})"
                )
            pl_module.carry = move_data_to_device(self.carries[trainer.global_rank], pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Random numbers too are a function of (seed, rank, i), so that a resumed run draws what it would have drawn.
        torch.manual_seed(seed_of(self.seed, trainer.global_rank, self.batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        _refuse_unless_finite("loss", loss, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        pl_module.log("train/gradient_norm", norm)
        if trainer.precision != "16-mixed":  # there the scaler meets infinities by skipping the step
            _refuse_unless_finite("gradient", norm, trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch += 1
        ended = batch.segment.last
        pl_module.carry = None if ended else apply_to_collection(pl_module.carry, Tensor, Tensor.detach)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        carry = apply_to_collection(getattr(pl_module, "carry", None), Tensor, Tensor.cpu)
        carries = [carry]
        if trainer.world_size > 1:
            carries = [None] * trainer.world_size
            torch.distributed.all_gather_object(carries, carry)
        checkpoint["schedule"] = {"batch": self.batch, "carries": [] if carry is None else carries}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.batch, self.carries = checkpoint["schedule"]["batch"], checkpoint["schedule"]["carries"]


def _refuse_unless_finite(name: str, value: Tensor, trainer: Trainer) -> None:
    if not math.isfinite(value.item()):  # before the weights change, so that no checkpoint can hold the damage
        raise InputError(
            f"the {name} is {value.item()} at step {trainer.global_step}: lower --model.lr or set "
            "--trainer.gradient_clip_val; the checkpoints on disk are from before it"
        )


def _stages(name: str, value: Curriculum) -> list[list[int]]:
    stages = [[0, value]] if isinstance(value, int) else value
    steps = [stage[0] for stage in stages]
    if not stages or steps[0] != 0 or steps != sorted(set(steps)) or any(len(s) != 2 or s[1] < 1 for s in stages):
        raise InputError(
            f"schedule.{name}: {value} is not a positive number or a rising list of [outer step, value] from step 0, "
            "such as [[0, 5], [1000, 20]]"
        )
    return stages


def _value(stages: list[list[int]], step: int) -> int:
    return next(value for start, value in reversed(stages) if start <= step)
