"""Scores of frames and flow, and the heads that are trained on flow."""

import json

import numpy as np
import pytest
import skimage.metrics
import torch

from lightning_meta.cli import main
from lightning_meta.dynamic_filters.flow_head import FlowNetwork, train_heads
from lightning_meta.dynamic_filters.frame_scores import end_point_error, frame_scores, structural_similarity
from lightning_meta.dynamic_filters.moving_mnist_data import Clips, MovingMNISTDataModule
from lightning_meta.dynamic_filters.video import FramePredictor, VideoPrediction
from lightning_meta.errors import InputError
from tests.conftest import arguments


@pytest.mark.parametrize("data_range", [1, 2])
def test_ssim_is_that_of_scikit_image(data_range):
    x, y = np.random.default_rng(0).random((2, 4, 12, 10))
    y[0], y[1] = x[0], x[1] + 0.01 * y[1]  # equal and nearly equal
    (found,) = structural_similarity(torch.from_numpy(x), torch.from_numpy(y), [data_range])
    wanted = [skimage.metrics.structural_similarity(*pair, data_range=data_range) for pair in zip(x, y, strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=0, abs=1e-12)
    assert found[0] == 1


def test_frame_scores_are_those_of_the_tables():
    torch.manual_seed(0)
    prediction, target = 1.2 * torch.rand(2, 3, 1, 12, 10), torch.rand(2, 3, 1, 12, 10)
    scores = {name: score.mean() for name, score in frame_scores(prediction, target).items()}
    error, clipped = (prediction - target).double(), prediction.clamp(0, 1)
    assert scores["mse"].item() == pytest.approx(error.square().sum().item() / 6)
    assert scores["mae"].item() == pytest.approx(error.abs().sum().item() / 6)
    pairs = [(x.numpy(), y.numpy()) for x, y in zip(clipped.flatten(0, 2), target.flatten(0, 2), strict=True)]
    psnr = [-10 * np.log10(np.mean((x - y) ** 2)) for x, y in pairs]
    assert scores["psnr"].item() == pytest.approx(np.mean(psnr), rel=1e-5)
    for name, data_range in (("ssim", 1), ("ssim_range_2", 2)):
        assert scores[name].item() == pytest.approx(
            np.mean([skimage.metrics.structural_similarity(*pair, data_range=data_range) for pair in pairs]), rel=1e-4
        )


def test_a_frame_met_exactly_has_a_finite_psnr():
    assert 80 < frame_scores(torch.ones(1, 1, 1, 8, 8), torch.ones(1, 1, 1, 8, 8))["psnr"].item() < 100


def test_end_point_error_is_of_known_places():
    truth = torch.full((1, 2, 2, 2), torch.nan)
    truth[0, :, 0, 0], truth[0, :, 1, 1] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    error, places = end_point_error(torch.zeros(1, 2, 2, 2), truth)
    assert error.item() == pytest.approx((5 + 1) / 2)
    assert places.item() == 2
    error, places = end_point_error(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2, 2), torch.nan))
    assert (error.item(), places.item()) == (0, 0)


def test_a_head_starts_with_no_motion_and_all_layers_learn():
    network = FlowNetwork(FramePredictor(width=2, kernel_size=3))
    frames = torch.rand(2, 4, 1, 8, 8)
    assert network(frames).equal(torch.zeros(2, 2, 8, 8))
    torch.nn.init.ones_(network.head.weight)
    network(frames).square().sum().backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    unused = {"predictor.decoder.5.weight", "predictor.decoder.5.bias"}  # what wrote filters
    assert reached == {name for name, _ in network.named_parameters()} - unused


class Bound(VideoPrediction):
    """A model with a data module and nothing else around it."""

    def __init__(self, data, **options):
        super().__init__(**options)
        self._data = data

    trainer = property(lambda self: self)
    datamodule = property(lambda self: self._data)


def test_heads_learn_flow_and_leave_the_model_as_it_was(tmp_path):
    data = MovingMNISTDataModule(root=str(tmp_path), source="stand-in", batch_size=2)
    data.setup("test")
    model = Bound(data, width=8, kernel_size=3, input_frames=2, flow_head_steps=100, gain=1.4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    heads = train_heads(model)
    assert torch.random.get_rng_state().equal(state)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    batch = next(data.flow_batches(1, 2))
    untrained = end_point_error(torch.zeros_like(batch.flow[:, -1]), batch.flow[:, -1])[0].mean()
    for head in heads.values():
        assert end_point_error(head(batch.frames[:, :-1]), batch.flow[:, -1])[0].mean() < 0.95 * untrained
    model.hparams.flow_head_steps = 2
    one, other = train_heads(model), train_heads(model)
    for name, head in one.items():
        assert all(v.equal(other[name].state_dict()[k]) for k, v in head.state_dict().items())


def test_heads_need_true_flow(tmp_path):
    data = MovingMNISTDataModule(root=str(tmp_path), source="stand-in", batch_size=1)
    data.setup("test")
    data.flow_batches = lambda batches, frames: iter([Clips(torch.rand(1, 4, 1, 64, 64), None)])
    with pytest.raises(InputError, match=r"model\.flow_head_steps: the true flow of these sequences is not known"):
        train_heads(Bound(data, width=2, kernel_size=3, input_frames=3, flow_head_steps=1))


def test_a_record_has_flow_where_it_is_known(tmp_path):
    main(["fit", *arguments("dfn_highway", tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")])
    record = json.loads((tmp_path / "dfn_highway" / "results.json").read_text())
    further = {values["measure"]: values for values in record["further"]}
    assert further["flow error"]["baselines"]["no motion"] > 0
    assert set(further["flow error of a trained head"]["baselines"]) == {"of one on a fresh network", "no motion"}
    assert further["mean squared error"]["value"] == pytest.approx(record["value"], rel=1e-5)
