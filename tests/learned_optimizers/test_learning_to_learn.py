import json
import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers import learning_to_learn as module
from lightning_meta.learned_optimizers.learning_to_learn import LearningToLearn
from lightning_meta.learned_optimizers.learning_to_learn_data import QuadraticDataModule
from lightning_meta.learned_optimizers.problem_sets import QuadraticSet
from lightning_meta.learned_optimizers.unroll import optimize, unroll
from lightning_meta.running.schedule import MetaSchedule
from tests.conftest import arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
CPU = torch.empty(0)  # float32 there


class Notes(Callback):
    """What is left and logged at the end of each outer step."""

    def __init__(self):
        self.carries, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.carries.append(pl_module.carry)
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def model_of(**options):
    torch.manual_seed(0)
    defaults = {"hidden_size": 3, "p": None, "output_scale": 1.0, "lr_decay": False, "baselines": {"SGD": [0.01]}}
    return LearningToLearn(**defaults | options)


def data_of(**options):
    sizes = {"batch_size": 3, "steps": 4, "val_problems": 5, "test_problems": 4, "tune_problems": 3}
    return QuadraticDataModule(**{"dimension": 3, "start_std": 0.5} | sizes | options)


def trainer_of(folder, steps=6, notes=None, **options):
    """Segments of 2 in 4 inner steps."""
    callbacks = [notes or Notes(), MetaSchedule(unroll=2, horizon=4)]  # notes first: the schedule drops the carry
    defaults = {"limit_val_batches": 0, "enable_checkpointing": False, "logger": CSVLogger(folder)}
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **defaults | options,
    )


def fit(folder, model, steps=6, ckpt=None, **options):
    notes = Notes()
    trainer = trainer_of(folder, steps, notes)
    trainer.fit(model, data_of(**options), ckpt_path=ckpt)
    return notes, trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spy(monkeypatch, *names):
    calls = []

    def noted(name, function):
        def call(*args):
            calls.append(name)
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    return calls


def spoil(monkeypatch, *which):
    """Makes these problems of each batch so steep that their losses overflow."""
    original = QuadraticSet.problems

    def problems(self, drawn):
        made = original(self, drawn)
        made.W[list(which)] *= 1e30
        return made

    monkeypatch.setattr(QuadraticSet, "problems", problems)


def test_outer_steps_are_adam_on_the_chunks_losses(tmp_path):
    model = model_of(lr=0.02)
    reference = model_of(lr=0.02)
    notes, trainer = fit(tmp_path, model, 4)
    adam = torch.optim.Adam(reference.parameters(), 0.02)
    trainer.callbacks[1].batch = 0  # the sampler begins where the schedule is
    batches = iter(trainer.datamodule.train_batches)
    for step in range(4):
        problems = trainer.datamodule.sets["train"]
        batch = problems.problems(problems.collate([problems[key] for key in next(batches)]))
        assert batch.segment[:3] == (step // 2, step % 2 * 2, step % 2 * 2 + 2)
        if step % 2 == 0:
            theta, state = batch.start, reference.rule.start(3, batch.shapes)
        total = 0
        for t in range(batch.segment.start, batch.segment.stop + 1):
            x = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(batch.loss(x, t).sum(), x)
            total = total + batch.loss(theta, t).mean()
            if t < batch.segment.stop:
                update, state = reference.rule(gradient[None], state, batch.shapes)
                theta = theta + update[0]
        adam.zero_grad()
        total.backward()
        adam.step()
        state = {name: [(h.detach(), c.detach()) for h, c in layers] for name, layers in state.items()}
        theta = theta.detach()
        torch.testing.assert_close(notes.carries[step]["theta"], theta, rtol=1e-4, atol=1e-5)
        assert notes.logged[step]["train/loss"] == pytest.approx(total.item() / 3, rel=1e-4)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
def test_every_weight_changes_in_one_step(tmp_path, second_order):
    model = model_of(second_order=second_order, p=10.0)
    before = [p.detach().clone() for p in model.parameters()]
    fit(tmp_path, model, 1)
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "called"), [({}, "first_order_loss"), ({"second_order": True}, "second_order_loss")]
)
def test_imitation_comes_first(tmp_path, monkeypatch, options, called):
    calls = spy(monkeypatch, "imitation_loss", called)
    notes, _ = fit(tmp_path, model_of(imitation_steps=3, **options), 7)
    assert calls == ["imitation_loss"] * 4 + [called] * 3, "a problem that began with the teacher ends with it"
    assert ["teacher" in carry for carry in notes.carries] == [True] * 4 + [False] * 3


def test_without_imitation_there_is_no_teacher(tmp_path, monkeypatch):
    calls = spy(monkeypatch, "imitation_loss")
    notes, _ = fit(tmp_path, model_of(), 3)
    assert not calls
    assert [set(carry) for carry in notes.carries] == [{"theta", "state"}] * 3


def test_the_teacher_is_adam_along_its_own_path(tmp_path):
    notes, trainer = fit(tmp_path, model_of(imitation_steps=2, imitation_lr=0.05), 2)
    batch = trainer.datamodule.sets["train"].batch(3, 4, CPU)
    x = batch.start.clone().requires_grad_()
    adam = torch.optim.Adam([x], 0.05)
    for _ in range(4):
        adam.zero_grad()
        batch.loss(x, 0).sum().backward()
        adam.step()
    torch.testing.assert_close(notes.carries[-1]["theta"], x.detach())


def test_imitating_brings_the_rule_near_the_teacher(tmp_path, monkeypatch):
    losses, original = [], module.imitation_loss

    def noted(*args):
        loss, state = original(*args)
        losses.append(loss.item())
        return loss, state

    monkeypatch.setattr(module, "imitation_loss", noted)
    fit(tmp_path, model_of(imitation_steps=150, imitation_lr=0.1, hidden_size=8, p=10.0, lr=0.02), 150)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_resumes_exactly(tmp_path, stop):
    """In the middle of a problem, with the teacher and without."""
    whole, first, second = (model_of(imitation_steps=3, averaging_cells=1) for _ in range(3))
    fit(tmp_path, whole, 8)
    _, trainer = fit(tmp_path, first, stop)
    assert ("teacher" in first.carry) == (stop < 4) if first.carry else stop % 2 == 0
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, second, 8, tmp_path / "half.ckpt")
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(first), weights(whole))


@pytest.mark.parametrize(
    "options", [{}, {"second_order": True}, {"averaging_cells": 2}, {"objective": "log"}, {"late": 2}]
)
def test_training_goes_on_without_problems_that_overflow(tmp_path, monkeypatch, options):
    spoil(monkeypatch, 1)
    model = model_of(**options)
    before = weights(model)
    notes, _ = fit(tmp_path, model, 5)
    assert [logged["train/dropped_problems"] for logged in notes.logged] == [1] * 5
    assert all(0 < logged["train/loss"] < 1e4 for logged in notes.logged)
    assert weights(model).isfinite().all()
    assert (weights(model) != before).all()


@pytest.mark.parametrize("second_order", [False, True])
def test_training_outlives_batches_without_any_finite_problem(tmp_path, monkeypatch, second_order):
    spoil(monkeypatch, 0, 1, 2)
    model = model_of(second_order=second_order)
    before = weights(model)
    notes, _ = fit(tmp_path, model, 3)
    assert [logged["train/dropped_problems"] for logged in notes.logged] == [3] * 3
    assert torch.equal(weights(model), before)


def test_no_problem_is_dropped_as_a_rule(tmp_path):
    notes, _ = fit(tmp_path, model_of(), 4)
    assert [logged["train/dropped_problems"] for logged in notes.logged] == [0] * 4


def test_a_huge_output_is_dropped_too(tmp_path):
    notes, _ = fit(tmp_path, model_of(output_scale=1e30), 2)
    assert [logged["train/dropped_problems"] for logged in notes.logged] == [3, 3]


def validated(folder, model, data):
    trainer = trainer_of(folder, limit_val_batches=1.0)
    (results,) = trainer.validate(model, data, verbose=False)
    return results


def test_validation_is_a_mean_over_problems(tmp_path):
    model, data = model_of(), data_of()
    results = validated(tmp_path, model, data)
    losses, _ = optimize(model.rule, data.sets["val"].batch(5, 4, CPU), 4)
    assert results["val/final_loss"] == pytest.approx(losses[-1].mean().item(), rel=1e-5)
    assert results["val/summed_loss"] == pytest.approx(losses[1:].sum(0).mean().item(), rel=1e-5)


def test_validation_does_not_pass_over_problems_that_diverge(tmp_path, monkeypatch):
    """Or an optimizer that loses the hard ones would be the best."""
    spoil(monkeypatch, 0)
    results = validated(tmp_path, model_of(), data_of())
    assert not math.isfinite(results["val/final_loss"])
    assert not math.isfinite(results["val/summed_loss"])


@pytest.mark.parametrize(("decay", "factors"), [(True, [1, 0.5, 0, 0]), (False, [1, 1, 1, 1])])
def test_learning_rates(tmp_path, decay, factors):
    model = model_of(lr_decay=decay, lr=0.3)
    model.trainer = trainer_of(tmp_path, 100)
    schedule = model.configure_optimizers()["lr_scheduler"]
    assert schedule["interval"] == "step"
    rates = [schedule["scheduler"].lr_lambdas[0](step) for step in (0, 50, 100, 120)]
    assert rates == pytest.approx(factors, abs=1e-9)


@pytest.mark.parametrize("baselines", [{"Adagrad": [0.1]}, {"Adam": [0.1], "sgd": [0.1]}, {"SGD": []}])
def test_baselines_that_are_not_there(baselines):
    with pytest.raises(InputError, match=rf"model.baselines: {list(baselines)[-1]}: give some of SGD, momentum, NAG"):
        LearningToLearn(baselines=baselines)


def test_more_averaging_cells_than_units():
    with pytest.raises(InputError, match="averaging_cells: 4 of 3"):
        model_of(averaging_cells=4)
    model_of(averaging_cells=3)


def compared(folder, baselines):
    model = model_of(baselines=baselines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(folder).test(model, data_of(tests={"long": {"steps": 6}}), verbose=False)
    return model, [str(warning.message) for warning in caught if "edge of its grid" in str(warning.message)]


def test_a_rate_at_the_edge_of_its_grid_is_pointed_out(tmp_path):
    grids = {"SGD": [1e-6, 1e-5, 1e-4], "NAG": [1e-9, 0.01, 1e9], "Adam": [1e-7]}
    model, warned = compared(tmp_path, grids)
    assert model.rates == {case: {"SGD": 1e-4, "NAG": 0.01, "Adam": 1e-7} for case in ("4 steps", "long")}
    assert len(warned) == 2
    for case, line in zip(("4 steps", "long"), warned, strict=True):
        assert f"{case}: SGD is best at 0.0001, the edge of its grid: widen model.baselines.SGD" in line


@pytest.mark.filterwarnings("ignore:.*the edge of its grid")
def test_rules_are_compared_from_the_same_points(tmp_path):
    model = model_of(baselines={"SGD": [0.0, 1e9], "Adam": [0.0]})
    trainer = trainer_of(tmp_path)
    trainer.test(model, data_of(), verbose=False)
    batch = trainer.datamodule.sets["test/4 steps"].batch(4, 4, CPU)
    compared = model.compare(batch)
    assert list(compared) == [module.OURS, "SGD 0", "Adam 0"]
    starts = batch.loss(batch.start, 0)
    for losses, _ in compared.values():
        assert losses.shape == (5, 4)
        torch.testing.assert_close(losses[0], starts)
    assert torch.equal(compared["SGD 0"][1], batch.start)
    run = unroll(model.rule, batch, batch.start, model.rule.start(4, batch.shapes), 0, 4)
    assert torch.equal(compared[module.OURS][0], run.losses)
    logged = trainer.callback_metrics
    ours = [value for name, value in logged.items() if name.endswith(f"last loss/{module.OURS}")]
    torch.testing.assert_close(ours[0], run.losses[-1].double().mean())


def test_the_record_holds_every_case_with_intervals_and_its_figure(tmp_path):
    main(["fit", *arguments("l2l_quadratic", tmp_path)])
    folder = tmp_path / "l2l_quadratic"
    record = json.loads((folder / "results.json").read_text())
    rules = record["baselines"].keys()
    assert {rule.split()[0] for rule in rules} == {"SGD", "Adam", "no"}
    assert record["interval"] > 0
    assert record["baseline_intervals"].keys() == rules
    further = {values["measure"]: values for values in record["further"]}
    assert [name.split(",")[0] for name in further] == ["10 steps"] * 3 + ["longer"] * 2 + ["larger"] * 2
    best = min((rule for rule in rules if rule != "no step"), key=lambda rule: record["baselines"][rule])
    lead = further[f"10 steps, last loss less that of {best}"]
    assert lead["value"] == pytest.approx(record["value"] - record["baselines"][best], abs=1e-5)
    assert {path.name for path in folder.glob("*.png")} == {"10_steps.png", "longer.png", "larger.png"}
