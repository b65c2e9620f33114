import os
import signal
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Episode, Segment
from lightning_meta.storage.checkpoints import LastCheckpoint


def reaches(count, **schedule):
    return [segment[:4] for segment in islice(MetaSchedule(**schedule).segments(), count)]


def test_a_horizon_is_cut_into_unrolls_and_what_is_left():
    assert reaches(4, unroll=2, horizon=5) == [(0, 0, 2, False), (0, 2, 4, False), (0, 4, 5, True), (1, 0, 2, False)]


def test_without_an_unroll_a_segment_is_the_whole_horizon():
    assert reaches(2, horizon=7) == [(0, 0, 7, True), (1, 0, 7, True)]


def test_without_a_horizon_the_state_runs_on():
    assert reaches(3, unroll=4) == [(0, 0, 4, False), (0, 4, 8, False), (0, 8, 12, False)]


def test_curricula_change_at_their_outer_step_but_never_within_a_problem():
    spans = [(start, stop) for _, start, stop, _ in reaches(7, unroll=[[0, 1], [3, 4]], horizon=[[0, 2], [1, 5]])]
    # step 1 belongs to problem 0, whose horizon was 2; problem 1 begins at step 2, still with an unroll of 1
    assert spans == [(0, 1), (1, 2), (0, 1), (1, 5), (0, 4), (4, 5), (0, 4)]


def test_every_outer_step_is_a_batch_of_whole_episodes():
    segments = list(islice(MetaSchedule(ways=5, shots=2, queries=3).segments(), 4))
    assert segments == [Segment(i, 0, 1, True, Episode(ways=5, shots=2, queries=3)) for i in range(4)]
    assert next(MetaSchedule(ways=20).segments()).episode == (20, 1, 1)
    assert next(MetaSchedule(unroll=2).segments()).episode is None


def test_each_size_of_an_episode_has_its_curriculum():
    schedule = MetaSchedule(ways=[[0, 20], [2, 5], [4, 3]], shots=[[0, 1], [3, 5]], queries=[[0, 2], [1, 4]])
    episodes = [segment.episode for segment in islice(schedule.segments(), 6)]
    assert episodes == [(20, 1, 2), (20, 1, 4), (5, 1, 4), (5, 5, 4), (3, 5, 4), (3, 5, 4)]


WRONG = [0, -1, [], [[5, 1]], [[0, 1], [0, 2]], [[0, 3], [4, 0]], [[0, 1], [9, 2], [5, 3]], [[0]]]


@pytest.mark.parametrize("value", WRONG)
def test_impossible_values_are_refused(value):
    with pytest.raises(InputError, match=r"schedule.unroll: .* is not a positive number or a rising list"):
        MetaSchedule(unroll=value, horizon=10)


@pytest.mark.parametrize("name", ["ways", "shots", "queries"])
@pytest.mark.parametrize("value", WRONG)
def test_impossible_episodes_are_refused(name, value):
    with pytest.raises(InputError, match=rf"schedule.{name}: .* is not a positive number or a rising list"):
        MetaSchedule(**{"ways": 5} | {name: value})


@pytest.mark.parametrize("options", [{}, {"shots": 5}, {"unroll": 1, "ways": 5}, {"horizon": 1, "ways": 5}])
def test_a_schedule_must_end_its_outer_steps_in_one_way(options):
    with pytest.raises(InputError, match=r"set schedule.unroll and/or schedule.horizon .*, or schedule.ways"):
        MetaSchedule(**options)


class Batch(NamedTuple):
    x: torch.Tensor
    segment: Segment


class Numbers(Dataset):
    def __getitem__(self, key):
        index, segment = key
        return torch.tensor([[float(index), float(segment.start)]]), segment


class Data(LightningDataModule):
    batch_size = 1

    def train_dataloader(self):
        return DataLoader(
            Numbers(), batch_sampler=self.train_batches, collate_fn=lambda samples: Batch(samples[0][0], samples[0][1])
        )


class Walker(LightningModule):
    """A state that runs through a weight and dropout, in one segment after another."""

    def __init__(self, break_at=None):
        super().__init__()
        self.layer, self.noise = nn.Linear(2, 2), nn.Dropout(0.5)
        self.break_at, self.seen, self.losses = break_at, [], []
        self.carry = None

    def training_step(self, batch, batch_idx):
        state = {"h": torch.zeros(1, 2)} if self.carry is None else self.carry
        self.seen.append((batch.segment, self.carry is None, state["h"].requires_grad))
        self.carry = {"h": self.noise(torch.tanh(self.layer(state["h"] + batch.x)))}
        loss = self.carry["h"].square().sum()
        if self.trainer.global_step == self.break_at:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def train(folder, steps, ckpt_path=None, break_at=None, **options):
    torch.manual_seed(0)
    module, last = Walker(break_at), LastCheckpoint(every_n_steps=1)
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[MetaSchedule(unroll=2, horizon=5), last],
        **options,
    )
    torch.manual_seed(len(str(folder)))  # the state of the generator before training does not matter
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def test_the_carry_is_detached_within_a_horizon_and_dropped_at_its_end(tmp_path):
    module, _ = train(tmp_path, 7)
    assert [segment for segment, _, _ in module.seen] == [Segment(*reach) for reach in reaches(7, unroll=2, horizon=5)]
    assert [fresh for _, fresh, _ in module.seen] == [True, False, False, True, False, False, True]
    assert not any(attached for _, _, attached in module.seen)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resuming_in_mid_horizon_is_exact_with_noise(tmp_path, stop):
    whole, _ = train(tmp_path / "whole", 8)
    train(tmp_path / "parts", stop)
    torch.rand(stop)  # another process would be anywhere in its random numbers
    rest, trainer = train(tmp_path / "parts", 8, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert rest.losses == whole.losses[stop:]
    assert trainer.global_step == 8
    for key, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[key], value)


def test_an_interrupt_waits_for_accumulated_gradients(tmp_path, monkeypatch):
    """They are not in a checkpoint, so a stop between the batches of one optimizer step would lose them."""
    whole, _ = train(tmp_path / "whole", 4, accumulate_grad_batches=2)
    step = Walker.training_step

    def interrupted_step(self, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Walker, "training_step", interrupted_step)
        train(tmp_path / "parts", 4, accumulate_grad_batches=2)
    assert torch.load(last, weights_only=True)["schedule"]["batch"] == 4
    rest, _ = train(tmp_path / "parts", 4, ckpt_path=last, accumulate_grad_batches=2)
    assert rest.losses == whole.losses[4:]
    assert all(torch.equal(rest.state_dict()[key], value) for key, value in whole.state_dict().items())


def test_a_run_in_several_epochs_goes_on_with_fresh_batches(tmp_path):
    whole, _ = train(tmp_path / "one", 6)
    parts, _ = train(tmp_path / "three", 6, limit_train_batches=2)
    assert [segment for segment, _, _ in parts.seen] == [segment for segment, _, _ in whole.seen]


def test_a_loss_that_is_not_a_number_stops_before_it_harms_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"the loss is nan at step 4: lower --model.lr"):
        train(tmp_path, 8, break_at=4)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_gradient_that_is_infinite_stops_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Walker, "on_after_backward", lambda self: self.layer.weight.grad.fill_(float("inf")))
    with pytest.raises(InputError, match="the gradient is inf at step 0"):
        train(tmp_path, 2)


def test_a_carry_of_two_processes_is_not_resumed_by_one(tmp_path):
    train(tmp_path, 1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["schedule"]["carries"] *= 2
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"by 2 processes; resume it with as many devices \(now 1\)"):
        train(tmp_path, 4, ckpt_path=path)


def test_training_without_a_number_of_steps_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_steps"):
        train(tmp_path, -1)
