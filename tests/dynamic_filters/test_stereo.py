import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.dynamic_filters.frame_scores import squared_error
from lightning_meta.dynamic_filters.layers import eager_local_filter
from lightning_meta.dynamic_filters.stereo import (
    StereoPrediction,
    ViewPredictor,
    block_matching,
    disparities,
    disparity_image,
    entropies,
)
from lightning_meta.dynamic_filters.stereo_data import Example, FixedPairs, StereoBatch, StereoPairsDataModule
from lightning_meta.errors import InputError
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Segment
from lightning_meta.sources.seeding import generator
from lightning_meta.sources.stereo import Views, textured_layers
from tests.conftest import arguments

SEGMENT = Segment(0, 0, 1, last=True)
NAME = "dfn_stereo"


@pytest.mark.parametrize(("dynamic", "count"), [(True, 464_494), (False, 464_509)])
def test_the_papers_number_of_parameters(dynamic, count):
    assert sum(p.numel() for p in ViewPredictor(dynamic=dynamic).parameters()) == count


def literal(net, left):
    """The published network layer by layer."""

    def conv(layer, x, stride=1):
        return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=layer.weight.shape[-1] // 2)

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    e, d = net.encoder, net.decoder
    x = leaky(conv(e[0], left))
    x = leaky(conv(e[2], x, stride=2))
    x = leaky(conv(e[6], leaky(conv(e[4], x))))
    x = leaky(conv(e[8], x) + e[9].bias)  # a bias for every channel and place
    x = leaky(conv(d[0][2], leaky(conv(d[0][0], x))))
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = leaky(conv(d[2][2], leaky(conv(d[2][0], x))))
    planes = conv(d[5], leaky(conv(d[3], x)))
    if not net.filtered.dynamic:
        return conv(net.filtered.convolution, planes), planes[:, :-1]
    filters, bias = planes[:, :-1], planes[:, -1:]
    return eager_local_filter(left + bias, filters, (1, filters.shape[1])), filters


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_network_is_the_papers(dynamic):
    torch.manual_seed(0)
    net = ViewPredictor(width=2, kernel_width=5, dynamic=dynamic).double()
    torch.nn.init.normal_(net.encoder[9].bias)
    left = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    for found, expected in zip(net(left), literal(net, left), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_reach_the_weights_through_the_filtered_view():
    torch.manual_seed(0)
    net = ViewPredictor(width=2, kernel_width=3, untied_bias=False, gain=1.4).double()
    left, right = torch.rand(2, 2, 1, 6, 8, dtype=torch.float64)

    def error(bias):
        return squared_error(torch.func.functional_call(net, {"decoder.5.bias": bias}, left)[0], right)

    assert torch.autograd.gradcheck(error, torch.randn(4, dtype=torch.float64, requires_grad=True))


def one_hot(disparity, taps):
    """Logits (1, K, H, W) of filters that read x + disparity, interpolated between two pixels."""
    offsets = torch.arange(taps) - taps // 2
    weights = (1 - (offsets[:, None, None] - disparity).abs()).clamp(min=0)
    return weights.log()[None]


def test_filters_that_warp_give_the_right_view_and_the_true_disparity():
    y, x = np.mgrid[:100, :100]
    smooth = (128 + 60 * np.sin(x / 3 + y / 9) + 60 * np.sin(x / 7 - y / 5)).astype(np.uint8)
    net = ViewPredictor(width=2, dynamic_bias=False)
    for i in range(3):
        views = textured_layers([smooth], 64, generator(i))
        truth = torch.from_numpy(views.right_disparity)
        filters = one_hot(truth, 13)
        found = disparities(filters)
        torch.testing.assert_close(found[0, 0], truth, atol=1e-4, rtol=0)
        left, right = (torch.from_numpy(view)[None, None].float() for view in views[:2])
        warped = net.filtered(left, filters)[0, 0, :, :-7]
        assert (warped - right[0, 0, :, :-7]).abs().median() < 1
        assert (left - right)[..., :-7].abs().median() > 3
    whole = one_hot(truth.round(), 13)
    assert entropies(whole).nan_to_num(0).max() == 0


def test_the_entropy_is_between_one_tap_and_all_alike():
    filters = torch.zeros(1, 13, 2, 2)
    filters[0, 3, 0, 0] = 1000
    filters[0, :2, 0, 1] = 1000
    found = entropies(filters)
    torch.testing.assert_close(found[0, 0], torch.tensor([[0, math.log(2) / math.log(13)], [1, 1]]))


def test_block_matching_finds_the_right_views_disparity():
    y, x = np.mgrid[:100, :100]
    wavy = (128 + 60 * np.sin(x / 2 + y / 9) + 60 * np.sin(x / 3 - y / 5)).astype(np.uint8)
    for i in range(3):
        views = textured_layers([wavy], 64, generator(i))
        left, right = (torch.from_numpy(view)[None] / 255 for view in views[:2])
        found = block_matching(left, right)
        assert found.shape == (1, 64, 64)
        assert found.dtype == torch.float32
        errors = (found[0] - torch.from_numpy(views.right_disparity)).abs()
        assert errors.median() < 0.2
        assert (errors > 1).float().mean() < 0.1
        assert (errors[:, -3:] < 1).float().mean() > 0.5  # where it would not look without a border
    plain = block_matching(torch.zeros(1, 64, 64), torch.zeros(1, 64, 64))
    assert plain.isfinite().all()


def drawn(count=3, size=16):
    pictures = [np.random.default_rng(0).integers(0, 256, (80, 80), dtype=np.uint8)]
    return [Example(f"{i}", textured_layers(pictures, size, generator(i))) for i in range(count)]


class FixedData(StereoPairsDataModule):
    """A data module of given examples."""

    def __init__(self, examples):
        super().__init__(batch_size=2, test_pairs=99)
        self.given = examples

    def make_sets(self, stage):
        self._evaluate_on(self.given, self.given)
        self.sets = {
            "train": FixedPairs(self.given * 200),
            "val": FixedPairs(self.given),
            "test": FixedPairs(self.given),
        }
        self.counts = {"val": len(self.given), "test": len(self.given)}
        self.data_name = self.test_name = "drawn"


def metrics_of(model, examples):
    trainer = Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False
    )
    trainer.test(model, FixedData(examples), verbose=False)
    return trainer.callback_metrics


def test_the_test_scores_a_model_its_baselines_and_its_disparities():
    torch.manual_seed(0)
    model = StereoPrediction(width=2, untied_bias=False)
    examples = drawn(5)
    examples[1] = examples[1]._replace(scored=False)
    unknown = examples[2].views._replace(right_disparity=None)
    partly = examples[3].views.right_disparity.copy()
    partly[:, :10] = np.nan
    examples[2] = examples[2]._replace(views=unknown)
    examples[3] = examples[3]._replace(views=examples[3].views._replace(right_disparity=partly))
    metrics = metrics_of(model, examples)

    batch = StereoBatch.collate([(example, SEGMENT) for example in examples])
    with torch.no_grad():
        right, filters = model(batch.left)
    scored = [0, 2, 3, 4]
    mean_view = torch.from_numpy(np.mean([e.views.right / 255 for e in (examples * 100)[:500]], 0)).float()
    for name, prediction in (("model", right), ("copy the left view", batch.left), ("mean view", mean_view)):
        errors = (prediction - batch.right).square().sum((1, 2, 3))[scored]
        assert metrics[f"test/squared_error/{name}"] == pytest.approx(errors.mean().item(), rel=1e-5)
        interval = 3.1824 * errors.std().item() / 2  # the 97.5 % quantile of t with 3 degrees of freedom
        assert metrics[f"test/squared_error/{name}/interval"] == pytest.approx(interval, rel=1e-4)
    known = batch.disparity.isfinite()
    assert known.sum() == 4 * 256 - 160
    matched = torch.stack([block_matching(*views) for views in zip(batch.left, batch.right, strict=True)])
    mean = batch.disparity[known].mean()
    for name, found in (
        ("model", disparities(filters)),
        ("block matching (sees both views)", matched),
        ("one mean everywhere", mean.expand_as(matched)),
        ("mean of each place", batch.disparity.nanmean(0).expand_as(matched)),
    ):
        errors = (found - batch.disparity)[known].abs()
        assert metrics[f"test/end_point_error/{name}"] == pytest.approx(errors.mean().item(), rel=1e-4)
        bad = 100 * (errors > 1).float().mean().item()
        assert metrics[f"test/bad_pixels/{name}"] == pytest.approx(bad, rel=1e-4, abs=1e-4)
    assert [measure.name for measure in model.further_measures] == [
        "end-point error of the disparity",
        "bad disparities",
    ]
    for measure in (model.measure, *model.further_measures):
        assert {measure.metric, *measure.baselines.values()} <= metrics.keys()


@pytest.mark.parametrize("dynamic", [True, False])
def test_without_true_disparities_or_filters_they_are_not_measured(dynamic):
    model = StereoPrediction(width=2, untied_bias=False, dynamic=dynamic)
    examples = drawn()
    if dynamic:
        examples = [e._replace(views=Views(e.views.left, e.views.right)) for e in examples]
    metrics = metrics_of(model, examples)
    assert model.further_measures == []
    assert not any("end_point" in name for name in metrics)
    assert model.measure.metric in metrics


def test_a_model_that_diverged_has_no_score():
    model = StereoPrediction(width=2, untied_bias=False)
    with torch.no_grad():
        model.predictor.decoder[5].bias[0] = math.nan
    metrics = metrics_of(model, drawn())
    assert metrics["test/squared_error/model"].isnan()
    assert metrics["test/end_point_error/model"].isnan()
    assert metrics["test/bad_pixels/model"] == 100
    assert metrics["test/squared_error/copy the left view"].isfinite()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_losses_are_float32_at_least(precision, dynamic):
    model, types = StereoPrediction(width=2, untied_bias=False, dynamic=dynamic), []

    class Look(MetaSchedule):
        def on_before_backward(self, trainer, pl_module, loss):
            types.append(loss.dtype)
            super().on_before_backward(trainer, pl_module, loss)

    trainer = Trainer(
        max_steps=1,
        precision=precision,
        callbacks=[Look(horizon=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, FixedData(drawn()))
    assert types == [torch.float64 if precision == "64-true" else torch.float32]


@pytest.mark.parametrize("dynamic", [True, False])
def test_pictures_show_views_disparities_and_their_scale(dynamic):
    model = StereoPrediction(width=2, untied_bias=False, dynamic=dynamic).eval()
    examples = drawn(6)
    batch = StereoBatch.collate([(example, SEGMENT) for example in examples])
    with torch.no_grad():
        row = model._draw(batch)[0]
        sheets = model.pictures(batch)
    names = ["left", "prediction", "right", "|error|"]
    names += ["disparity", "true disparity", "entropy", "0 to 6 px"] if dynamic else []
    assert list(row) == names
    assert {picture.shape[1] for picture in row.values()} == {16}
    assert sheets["pairs"].dtype == torch.uint8
    assert sheets["pairs"].shape[0] == 3
    if dynamic:
        scale = row["0 to 6 px"]
        torch.testing.assert_close(scale[:, 0, 0], disparity_image(torch.full((1, 1, 1), 6.0), 6)[:, 0, 0])
        nothing = StereoBatch.collate([(examples[0]._replace(views=Views(*examples[0].views[:2])), SEGMENT)])
        with torch.no_grad():
            assert "true disparity" not in model._draw(nothing)[0]


def test_colours_rise_with_the_disparity_and_the_unknown_is_grey():
    found = disparity_image(torch.tensor([[[0.0, 3.0, 6.0, 9.0, math.nan]]]), 6)
    assert found.shape == (3, 1, 5)
    assert len({tuple(colour) for colour in found[:, 0].T[:3].tolist()}) == 3
    assert found[:, 0, 2].tolist() == found[:, 0, 3].tolist()
    assert found[:, 0, 4].tolist() == pytest.approx([0.6] * 3)


def test_untied_biases_say_which_size_they_fit():
    with pytest.raises(InputError, match=r"views have 18x16 pixels, but untied biases need 64x64: scale the views"):
        StereoPrediction(width=2)(torch.rand(1, 1, 16, 18))


def test_a_compiled_network_gives_the_same_loss_and_gradients(monkeypatch):
    compiler, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    results, left = [], torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        torch.manual_seed(0)
        model = StereoPrediction(width=2, untied_bias=False, compile=compiled)
        model.configure_model()
        loss = squared_error(model(left)[0], left.flip(3)).mean()
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
        assert len(graphs) == compiled
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_record_has_the_disparities_and_predict_draws_the_views(tmp_path):
    common = arguments(NAME, tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    main(["fit", *common])
    record = json.loads((tmp_path / NAME / "results.json").read_text())
    assert record["measure"] == "squared error"
    assert set(record["baselines"]) == {"copy the left view", "mean view"}
    assert [values["unit"] for values in record["further"]] == ["pixels", "% wrong by more than 1 pixel"]
    assert record["samples"] == 5
    main(["predict", *common])
    folder = tmp_path / NAME / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png", "002.png"]
    assert Image.open(folder / "001.png").width > 7 * 16 * 4
