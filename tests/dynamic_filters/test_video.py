import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lightning_meta.dynamic_filters.frame_scores import squared_error
from lightning_meta.dynamic_filters.layers import eager_local_filter
from lightning_meta.dynamic_filters.moving_mnist_data import Clips
from lightning_meta.dynamic_filters.video import FramePredictor, VideoPrediction, cross_entropy
from lightning_meta.errors import InputError
from lightning_meta.running.segments import Segment


def small(**options):
    torch.manual_seed(0)
    return FramePredictor(width=3, kernel_size=3, **options).double()


def small_highway(**options):
    """A highway network with biases other than the initial zeros."""
    net = small(layout="highway", dynamic_bias=True, untied_bias=(6, 8), **options)
    torch.nn.init.normal_(net.encoder[1].bias)
    return net


def literal_step(net, frame, hidden):
    """One step of the published network, layer by layer."""

    def conv(layer, x, stride=1):
        return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=layer.weight.shape[-1] // 2)

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    e, t, d = net.encoder, net.transition, net.decoder
    x = leaky(conv(e[0], frame))
    x = leaky(conv(e[2], x, stride=2))
    for layer in (e[4], e[6], e[8]):
        x = leaky(conv(layer, x))
    hidden = x + leaky(conv(t[2], leaky(conv(t[0], hidden))))
    x = leaky(conv(d[0][2], leaky(conv(d[0][0], hidden))))
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = leaky(conv(d[2][2], leaky(conv(d[2][0], x))))
    taps = conv(d[5], leaky(conv(d[3], x)))
    if not net.output.dynamic:
        return conv(net.output.convolution, taps), hidden
    return eager_local_filter(frame, taps, 3), hidden


def literal(net, frames, inputs, steps):
    """The literal network, which decodes at every step and reads its own predictions after the given frames."""
    hidden = frames.new_zeros(len(frames), net.hidden_channels, frames.shape[-2] // 2, frames.shape[-1] // 2)
    outputs, frame = [], None
    for t in range(steps):
        frame, hidden = literal_step(net, frames[:, t] if t < inputs else frame, hidden)
        outputs.append(frame)
    return torch.stack(outputs[inputs - 1 :], 1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_unrolled_network_is_the_papers_with_its_gradients(dynamic):
    net, frames = small(dynamic=dynamic), torch.rand(2, 5, 1, 6, 8, dtype=torch.float64)
    gradients = []
    for run in (lambda: net(frames, 0, 4, 2)[0], lambda: literal(net, frames, 2, 4)):
        prediction = run()
        assert prediction.shape == (2, 3, 1, 6, 8)
        (prediction - frames[:, 2:]).square().sum().backward()
        gradients.append([prediction.detach()] + [p.grad for p in net.parameters()])
        net.zero_grad()
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_segments_one_after_another_are_the_whole(cut):
    net, frames = small(), torch.rand(2, 6, 1, 6, 8, dtype=torch.float64)
    whole, filters, state = net(frames, 0, 5, 2)
    first, first_filters, carried = net(frames[:, : cut + 1], 0, cut, 2)
    second, _, end = net(frames[:, cut:], cut, 5, 2, carried)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(first_filters, filters)
    torch.testing.assert_close(end, state)


def literal_highway(net, frames, inputs, steps):
    """The highway network layer by layer: two frames in, untied biases, a bias of the image."""

    def conv(layer, x, stride=1):
        return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=layer.weight.shape[-1] // 2)

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    e, t, d = net.encoder, net.transition, net.decoder
    hidden = frames.new_zeros(len(frames), net.hidden_channels, 3, 4)
    seen, outputs = [frames[:, i, 0] for i in range(inputs)], []
    for step in range(1, steps):
        x = leaky(conv(e[0], torch.stack(seen[step - 1 : step + 1], 1)) + e[1].bias)
        x = leaky(conv(e[3], x, stride=2))
        x = leaky(conv(e[7], leaky(conv(e[5], x))))
        hidden = x + leaky(conv(t[2], leaky(conv(t[0], hidden))))
        x = leaky(conv(d[0][0], hidden)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = leaky(conv(d[2][2], leaky(conv(d[2][0], x))))
        planes = conv(d[5], leaky(conv(d[3], x)))
        frame = eager_local_filter((seen[step] + planes[:, 9])[:, None], planes[:, :9], 3)[:, 0]
        if step >= inputs - 1:
            seen.append(frame)
            outputs.append(frame)
    return torch.stack(outputs, 1)[:, :, None]


def test_the_unrolled_highway_network_is_the_papers_with_its_gradients():
    net, frames = small_highway(), torch.rand(2, 6, 1, 6, 8, dtype=torch.float64)
    gradients = []
    for run in (lambda: net(frames, 0, 5, 3)[0], lambda: literal_highway(net, frames, 3, 5)):
        prediction = run()
        assert prediction.shape == (2, 3, 1, 6, 8)
        (prediction - frames[:, 3:]).square().sum().backward()
        gradients.append([prediction.detach()] + [p.grad for p in net.parameters()])
        net.zero_grad()
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_highway_segments_one_after_another_are_the_whole(cut):
    net, frames = small_highway(), torch.rand(2, 6, 1, 6, 8, dtype=torch.float64)
    whole, filters, state = net(frames, 0, 5, 3)
    first, first_filters, carried = net(frames[:, : cut + 1], 0, cut, 3)
    second, later_filters, end = net(frames[:, cut:], cut, 5, 3, carried)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(first_filters if cut > 2 else later_filters, filters)
    torch.testing.assert_close(end, state)


def test_untied_biases_fit_one_size_and_two_frames_are_needed():
    with pytest.raises(ValueError, match="scale the images, or turn untied biases off"):
        small_highway()(torch.rand(1, 6, 1, 8, 8, dtype=torch.float64), 0, 5, 3)
    with pytest.raises(
        InputError, match=r"model\.input_frames is 1, but the highway network reads 2 frames at once: raise it to 2"
    ):
        VideoPrediction(layout="highway", input_frames=1)


def test_parameters_are_the_papers():
    highway = {"layout": "highway", "kernel_size": 11, "dynamic_bias": True, "untied_bias": (64, 64)}
    assert sum(p.numel() for p in FramePredictor(**highway).parameters()) == 368_122
    assert sum(p.numel() for p in FramePredictor(**highway, dynamic=False).parameters()) == 368_245
    assert sum(p.numel() for p in FramePredictor().parameters()) == 637_361
    assert sum(p.numel() for p in FramePredictor(dynamic=False).parameters()) == 637_443


def test_weights_start_as_the_authors_do():
    net = FramePredictor()
    for layer in (net.encoder[2], net.decoder[-1]):
        bound = math.sqrt(3 / layer.weight[0].numel())
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.count_nonzero() == 0
    torch.manual_seed(0)
    one = FramePredictor(width=2)
    torch.manual_seed(0)
    two = FramePredictor(width=2, gain=2.0)
    torch.testing.assert_close(two.decoder[-1].weight, 2 * one.decoder[-1].weight)


@pytest.mark.parametrize(
    ("halved", "factors"), [(4000, {0: 1, 3999: 1, 4000: 0.5, 8000: 0.25}), (None, {0: 1, 5000: 0.5, 10_000: 0})]
)
def test_learning_rates(halved, factors):
    model = VideoPrediction(width=2, lr_halved_every=halved)
    model.trainer = Trainer(max_steps=10_000, logger=False, enable_progress_bar=False, accelerator="cpu")
    schedule = model.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert [schedule.lr_lambdas[0](step) for step in factors] == pytest.approx(list(factors.values()), abs=1e-9)


def test_cross_entropy_is_in_nats_a_frame_with_the_published_clipping():
    target = torch.zeros(1, 1, 1, 64, 64)
    target[..., 0, 0] = 1  # white where the prediction is certain of black
    assert cross_entropy(torch.zeros_like(target), target).mean().item() == pytest.approx(15.94, abs=0.01)
    probability = torch.full((2, 10, 1, 64, 64), 0.3)
    expected = -4096 * (0.2 * math.log(0.3) + 0.8 * math.log(0.7))
    found = cross_entropy(probability, torch.full_like(probability, 0.2)).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)
    # 0.068914 a pixel is the authors' 282.3 a frame
    x = 0.5
    for _ in range(60):  # the probability whose cross-entropy with itself is that
        x -= (-(x * math.log(x) + (1 - x) * math.log(1 - x)) - 0.068914) / math.log((1 - x) / x) if x < 0.5 else 0.488
    probability = torch.full((1, 1, 1, 64, 64), x)
    assert cross_entropy(probability, probability).mean().item() == pytest.approx(282.27, abs=0.05)


def test_cross_entropy_stays_in_float32_under_autocast():
    prediction, target = torch.rand(1, 2, 1, 8, 8), torch.rand(1, 2, 1, 8, 8)
    expected = cross_entropy(prediction, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(prediction, target).equal(expected)
        assert cross_entropy(prediction.bfloat16(), target).dtype == torch.float32


def test_squared_error_is_a_sum_over_a_frame():
    prediction, target = torch.full((2, 3, 1, 4, 5), 0.5), torch.zeros(2, 3, 1, 4, 5)
    assert squared_error(prediction, target).tolist() == 2 * [3 * [20 * 0.25]]
    assert squared_error(prediction.bfloat16(), target).dtype == torch.float32


def batch(start, stop, sequences=2):
    torch.manual_seed(1)
    frames = torch.rand(sequences, 20, 1, 64, 64)
    return Clips(frames[:, start : stop + 1], Segment(0, start, stop, stop == 19))


def test_a_segment_without_a_prediction_is_refused():
    with pytest.raises(InputError, match=r"steps 0 to 8 predict nothing.*must be at least 10"):
        VideoPrediction(width=2)(batch(0, 9))


def test_pictures_of_the_filters_and_of_the_baseline():
    model = VideoPrediction(width=2, kernel_size=5)
    with torch.no_grad():
        assert sorted(model.pictures(batch(0, 19))) == ["flow", "frames"]
        pictures = VideoPrediction(width=2, dynamic=False).pictures(batch(0, 19))
    assert sorted(pictures) == ["frames"]
    assert all(p.dtype == torch.uint8 and p.shape[0] == 3 for p in pictures.values())


def test_compiled_parts_give_the_same_loss_and_gradients(monkeypatch):
    compiler, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = VideoPrediction(width=2, kernel_size=3, compile=compiled)
        model.configure_model()
        predictions, _, _ = model(batch(0, 12))
        loss = cross_entropy(predictions, batch(0, 12).frames[:, 10:]).mean()
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
        assert len(graphs) >= (3 if compiled else 0)
    assert any("local_filter" in str(graph.code) for graph in graphs)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
