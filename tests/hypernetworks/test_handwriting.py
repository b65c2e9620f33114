import math
import types

import numpy as np
import pytest
import torch

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.handwriting import Handwriting
from lightning_meta.hypernetworks.mixture import Mixture
from lightning_meta.hypernetworks.stroke_baselines import last_offset, one_mixture
from lightning_meta.hypernetworks.stroke_data import StrokeBatch
from lightning_meta.hypernetworks.trace_figures import GATES, annotated_line
from lightning_meta.running.segments import Segment
from tests.conftest import arguments


def model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 7, "hyper_size": 4, "embedding_size": 2, "mixtures": 3, "dropout": 0.0}
    return Handwriting(**sizes | {"recurrent_dropout": 0.0, "sample_length": 20} | options).double()


def points(*lengths):
    torch.manual_seed(1)
    batch = torch.zeros(len(lengths), max(lengths), 3, dtype=torch.float64)
    for row, n in zip(batch, lengths, strict=True):
        row[:n, :2] = torch.randn(n, 2)
        row[:n, 2] = (torch.rand(n) < 0.3).double()
    scored = torch.arange(1, max(lengths)) < torch.tensor(lengths)[:, None]
    return StrokeBatch(batch, scored, Segment(0, 0, max(lengths) - 1, True))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"network": "lstm"}, 3_363_421),  # table 5
        ({"network": "lstm", "hidden_size": 1000}, 4_137_121),
        ({"network": "lstm", "hidden_size": 400, "num_layers": 3}, 3_258_121),
        ({"network": "lstm", "hidden_size": 650, "num_layers": 2}, 5_161_771),
        ({"network": "lstm", "layer_norm": True}, 3_367_921),  # printed as 3.37 M
        ({"network": "lstm", "hidden_size": 1000, "layer_norm": True}, 4_142_121),  # as 4.14 M
        ({}, 3_941_181),
        ({"layer_norm": True}, 3_951_461),
    ],
)
def test_as_many_parameters_as_the_paper_prints(options, count):
    with torch.device("meta"):
        module = Handwriting(**options)
    assert sum(p.numel() for p in module.parameters()) == count


def by_formula(outputs, point):
    """One point's log-loss, component by component; the densities are torch's own."""
    M = len(outputs) // 6
    pi = outputs[1 : M + 1].softmax(0)
    density = 0.0
    for j in range(M):
        mu, sigma = outputs[[1 + M + j, 1 + 2 * M + j]], outputs[[1 + 3 * M + j, 1 + 4 * M + j]].exp()
        rho = 0.999 * torch.tanh(outputs[1 + 5 * M + j])
        cross = rho * sigma[0] * sigma[1]
        covariance = torch.stack([torch.stack([sigma[0] ** 2, cross]), torch.stack([cross, sigma[1] ** 2])])
        gaussian = torch.distributions.MultivariateNormal(mu, covariance)
        density = density + pi[j] * gaussian.log_prob(point[:2]).exp()
    lifted = torch.sigmoid(outputs[0])
    return -torch.log(density) - torch.log(lifted if point[2] else 1 - lifted)


def test_the_mixture_is_gravess():
    torch.manual_seed(0)
    outputs, points = torch.randn(6, 4 * 6 + 1, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    points[:, 2] = (points[:, 2] > 0).double()
    losses = Mixture.of(outputs).log_loss(points)
    for loss, output, point in zip(losses, outputs, points, strict=True):
        torch.testing.assert_close(loss, by_formula(output, point))
    outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda outputs: Mixture.of(outputs).log_loss(points), outputs)


def test_no_density_is_infinite():
    outputs = torch.full((1, 7), -1e4)
    outputs[:, 6] = 1e4  # sigma of 0 and rho of 1
    outputs[:, 1:4] = 0
    outputs.requires_grad_()
    loss = Mixture.of(outputs).log_loss(torch.zeros(1, 3))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(outputs.grad).all()


def test_samples_are_of_the_mixture():
    torch.manual_seed(0)
    outputs = torch.randn(1, 13).expand(20_000, -1)
    mixture, random = Mixture.of(outputs), torch.Generator().manual_seed(0)
    drawn = mixture.sample(1.0, random)
    pi = mixture.log_pi[0].exp()
    mean = (pi[:, None] * mixture.mu[0]).sum(0)
    torch.testing.assert_close(drawn[:, :2].mean(0), mean, rtol=0, atol=0.05)
    sigma, rho, off = mixture.log_sigma[0].exp(), mixture.rho[0], mixture.mu[0] - mean
    covariance = (pi * (rho * sigma.prod(1) + off.prod(1))).sum()
    torch.testing.assert_close(torch.cov(drawn[:, :2].T)[0, 1], covariance, rtol=0, atol=0.1)
    assert drawn[:, 2].mean().item() == pytest.approx(torch.sigmoid(outputs[0, 0]).item(), abs=0.02)
    cold = mixture.sample(1e-4, random)
    likeliest = mixture.mu[0, pi.argmax()]
    torch.testing.assert_close(cold[:, :2], likeliest.expand(20_000, -1), rtol=0, atol=0.2)
    assert set(cold[:, 2].tolist()) == {float(outputs[0, 0] > 0)}


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
def test_a_sequences_score_is_the_sum_over_its_points(network):
    module, batch = model(network=network), points(4, 9)
    module.scale.copy_(torch.tensor([2.0, 0.5]))
    losses, _ = module.score(batch, None)
    for row, n, loss in zip(batch.points, (4, 9), losses, strict=True):
        x = row[:n] / torch.tensor([2.0, 0.5, 1.0])
        hidden, _ = module.predictor.recurrent(x[:-1])
        outputs = module.predictor.output(hidden)
        wanted = sum(by_formula(output, point) for output, point in zip(outputs, x[1:], strict=True))
        torch.testing.assert_close(loss, wanted)
    state, pieces = None, 0.0
    for start in range(0, 8, 4):
        part = StrokeBatch(batch.points[:, start : start + 5], batch.scored[:, start : start + 4], batch.segment)
        some, state = module.score(part, state)
        pieces = pieces + some
    torch.testing.assert_close(pieces, losses)


def test_the_scale_is_that_of_the_first_training():
    module = model()
    module._trainer = types.SimpleNamespace(datamodule=types.SimpleNamespace(scale=torch.tensor([3.0, 4.0])))
    module.on_fit_start()
    assert module.scale.tolist() == [3, 4]
    module._trainer.datamodule.scale = torch.tensor([5.0, 6.0])
    module.on_fit_start()
    assert module.scale.tolist() == [3, 4]


def test_lines_go_on_from_the_prime():
    module = model()
    module.scale.copy_(torch.tensor([2.0, 0.5]))
    prime = points(6).points[0]
    lines, cells, changes = module.generate(prime, 3, 10, 1.0, torch.Generator().manual_seed(0))
    assert lines.shape == (3, 16, 3)
    assert cells.shape == (15, 7)
    assert changes.shape == (15, 4)
    for line in lines:
        torch.testing.assert_close(line[:6], prime.float(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(lines[0, 6:], lines[1, 6:])
    again, *_ = module.generate(prime, 3, 10, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(lines, again)
    assert model(network="lstm").generate(prime, 1, 2, 1.0, None)[2] is None


def test_the_trivial_baselines():
    """On points of one Gaussian and one pen both know what there is to know."""
    random = np.random.default_rng(0)
    train = [np.concatenate([random.normal(size=(50, 2)), random.random((50, 1)) < 0.2], 1) for _ in range(100)]
    entropy = math.log(2 * math.pi) + 1 - 0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    mixture, around = one_mixture(train, 2), last_offset(train)
    assert np.mean([mixture(s) for s in train]) / 49 == pytest.approx(entropy, abs=0.05)
    assert np.mean([around(s) for s in train]) / 49 == pytest.approx(entropy + math.log(2), abs=0.05), (
        "twice the variance"
    )


def test_options_that_do_not_fit():
    for options in ({"temperatures": [0.0]}, {"temperatures": []}, {"mixtures": 0}, {"dropout": 1.0}, {"init": "x"}):
        with pytest.raises(InputError, match=r"choose|dropped"):
            model(**options)


def test_the_picture_of_the_weights():
    points = np.array([[0, 0], [10, 0], [10, 5], [20, 5]], float)
    changes = torch.zeros(4, 4)
    changes[1, 0], changes[3, 0], changes[3, 3] = 2.0, 2.0, 1.0
    picture = annotated_line(points, np.array([False, True, False, True]), changes)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 450, 16 + 24 + 4 * 20 + 24)
    rows = picture.unflatten(1, (5, 90))
    colours = {tuple(colour) for colour in rows[:, 1].flatten(1).T.tolist()}
    assert GATES["i"][1] in colours
    colours = {tuple(colour) for colour in rows[:, 4].flatten(1).T.tolist()}
    half = tuple(round(255 - 0.54 * (255 - channel)) for channel in GATES["o"][1])
    assert half in colours


def test_prediction_from_a_line_of_the_users(tmp_path):
    options = arguments("hyper_handwriting", tmp_path, "--model.temperatures=[0.5,1]")
    main(["fit", *options])
    line = tmp_path / "line.xml"
    stroke = '<Stroke><Point x="1" y="2"/><Point x="3" y="5"/></Stroke>'
    line.write_text(f"<WhiteboardCaptureSession><StrokeSet>{stroke}</StrokeSet></WhiteboardCaptureSession>")
    main(["predict", *options, f"--data.prime={line}"])
    written = {path.name for path in (tmp_path / "hyper_handwriting" / "predictions").iterdir()}
    names = [f"temperature_{t}" for t in ("0.5", "1")]
    assert written == {f"{n}{end}" for n in names for end in (".png", ".svg", "_cells.png", "_weights.png")}
    assert (tmp_path / "hyper_handwriting" / "predictions" / "temperature_1.svg").read_text().startswith("<svg")
    line.write_text("<WhiteboardCaptureSession/>")
    with pytest.raises(SystemExit, match=r"error: .*line.xml holds no strokes"):
        main(["predict", *options, f"--data.prime={line}"])
