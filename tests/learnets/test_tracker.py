import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_meta.errors import InputError
from lightning_meta.learnets.tracker import (
    LearnetTracker,
    SiameseNetwork,
    StillTracker,
    context_side,
    crops,
    labels,
    logistic_loss,
    peaks,
    places,
    upsample,
)

VARIANTS = ("siamese", "unshared", "factorised", "learnet")


def network(variant: str = "learnet") -> SiameseNetwork:
    torch.manual_seed(0)
    return SiameseNetwork(variant, "D", "D", gain=1e-2).eval()


@pytest.mark.parametrize(
    ("variant", "pupil", "learnet", "parameters"),
    [
        ("siamese", "A", "A", 2_336_321),
        ("siamese", "B", "B", 421_025),
        ("siamese", "C", "C", 261_729),
        ("unshared", "B", "B", 842_049),
        ("factorised", "B", "B", 586_561),
        ("learnet", "B", "B", 8_087_233),
        ("learnet", "B", "A", 32_121_313),
        ("learnet", "C", "C", 4_082_177),
        ("learnet", "D", "D", 780_929),
    ],
)
def test_number_of_parameters(variant, pupil, learnet, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in SiameseNetwork(variant, pupil, learnet).parameters()) == parameters


def test_sizes_are_the_papers():
    for variant in VARIANTS:
        net = network(variant)
        with torch.no_grad():
            target = net.describe(torch.rand(1, 3, 127, 127))
            assert target.embedding.shape == (1, 16, 6, 6)
            assert net.pupil(torch.rand(1, 3, 255, 255), target.filters).shape == (1, 16, 22, 22)
            assert net(target, torch.rand(1, 3, 255, 255)).shape == (1, 1, 17, 17)
            assert net(target, torch.rand(2, 3, 239, 239)).shape == (1, 2, 15, 15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_scored_as_one_after_another(variant):
    """Equal to one convolution for each exemplar; place (i, j) is the window that begins at pixel (8 i, 8 j)."""
    net = network(variant).double()
    z, x = torch.rand(2, 3, 127, 127).double(), torch.rand(4, 3, 255, 255).double()
    with torch.no_grad():
        scores = net(net.describe(z), x)
        for i in range(2):
            target = net.describe(z[i : i + 1])
            for j in range(2):
                embedding = net.pupil(x[2 * i + j][None], target.filters)
                expected = net.gain * F.conv2d(embedding, target.embedding)[0, 0] + net.bias
                torch.testing.assert_close(scores[i, j], expected)
        window = x[:1, :, 8 * 5 : 8 * 5 + 127, 8 * 3 : 8 * 3 + 127]
        target = net.describe(z[:1])
        torch.testing.assert_close(net(target, window)[0, 0, 0, 0], scores[0, 0, 5, 3])


def test_only_the_learnets_filters_depend_on_the_exemplar():
    z = torch.rand(2, 3, 127, 127)
    with torch.no_grad():
        predicted, learned = (network(variant).describe(z).filters for variant in ("learnet", "factorised"))
    assert not torch.equal(predicted[0], predicted[1])
    assert torch.equal(learned[0], learned[1])


def test_every_parameter_learns():
    for variant in VARIANTS:
        net = network(variant).train()
        scores = net(net.describe(torch.rand(2, 3, 127, 127)), torch.rand(2, 3, 239, 239))
        logistic_loss(scores[:, 0], labels(scores[:, 0], torch.tensor([1, -1]), torch.zeros(2, 2))).backward()
        convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
        shifts = {layer.bias for layer in convolutions}  # batch normalisation removes most of these
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(p.grad.abs().max() > 1e-5 for p in net.parameters() if p not in shifts)


def test_labels_are_positive_around_the_object():
    scores = torch.zeros(2, 17, 17)
    offset = torch.tensor([[16.0, -8.0], [0.0, 0.0]])
    map_, negative = labels(scores, torch.tensor([1.0, -1.0]), offset)
    assert (negative == -1).all()
    centre = places(scores)
    for i in range(17):  # row: y
        for j in range(17):
            near = ((centre[j] - 16) ** 2 + (centre[i] + 8) ** 2) ** 0.5 <= 16
            assert (map_[i, j] > 0) == near
    assert labels(scores, torch.ones(2), torch.zeros(2, 2), radius=8)[0].gt(0).sum() == 5


def test_logistic_loss_is_the_literal_one():
    torch.manual_seed(0)
    scores = torch.randn(3, 5, 5, dtype=torch.float64)
    signs = torch.where(torch.rand(3, 5, 5) < 0.3, 1.0, -1.0).double()
    signs[2] = -1
    literal = torch.log(1 + torch.exp(-signs * scores))
    torch.testing.assert_close(logistic_loss(scores, signs), literal.mean())
    halves = [(m[s > 0].mean() + m[s < 0].mean()) / 2 for m, s in zip(literal[:2], signs[:2], strict=True)]
    expected = torch.stack([*halves, literal[2].mean()]).mean()
    torch.testing.assert_close(logistic_loss(scores, signs, balanced=True), expected)


def test_the_peak_of_an_upsampled_map_is_where_it_was():
    scores = torch.zeros(2, 17, 17)
    scores[0, 8, 8] = scores[1, 4, 11] = 1
    found = peaks(upsample(scores))
    assert (found - torch.tensor([[0.0, 0.0], [3 * 8.0, -4 * 8.0]])).abs().max() <= 0.5


def test_a_crop_of_its_own_size_is_the_picture():
    frame = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    crop = crops(frame, (30, 20), [20], 20)[0]
    torch.testing.assert_close(crop, frame[:, 10:30, 20:40] / 255, atol=1e-5, rtol=0)


def test_crops_scale_about_their_centre_and_have_the_mean_colour_outside():
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(300.0), indexing="ij")
    frame = torch.stack([x, y, x + y]) / 500
    small, large = crops(frame, (100, 80), [40, 100], 20)
    at = (torch.arange(20) + 0.5) / 20 - 0.5
    torch.testing.assert_close(small[0, 0] * 500, 100 + 40 * at - 0.5, atol=1e-2, rtol=0)
    torch.testing.assert_close(large[1, :, 0] * 500, 80 + 100 * at - 0.5, atol=1e-2, rtol=0)
    outside = crops(frame, (0, 0), [100], 20)[0]
    torch.testing.assert_close(outside[:, :9, :9], frame.mean((1, 2))[:, None, None].expand(-1, 9, 9))


def test_a_large_crop_averages_and_does_not_skip():
    frame = (torch.arange(320) % 2).float().expand(3, 320, 320)  # stripes of one pixel
    assert (crops(frame, (160, 160), [300], 30) - 0.5).abs().max() < 0.05


class Blob:
    """Stands in for a network: its scores peak where the search is red."""

    gain, bias = 1.0, torch.zeros(())

    def describe(self, exemplars):
        self.seen = exemplars
        return None

    def __call__(self, target, searches):
        red = F.avg_pool2d(searches[:, 0] - searches[:, 1], 61, stride=1, padding=30)
        return red[:, 63:192:8, 63:192:8][None] - 5  # scores may be negative


@pytest.mark.parametrize("scales", [1, 3, 5])
def test_a_tracker_follows_what_scores_highest(scales):
    def frame(x, y):
        picture = torch.full((3, 240, 320), 100, dtype=torch.uint8)
        picture[0, y - 15 : y + 15, x - 20 : x + 20] = 200
        return picture

    tracker = LearnetTracker(Blob(), scales)
    tracker.start(frame(100, 90), torch.tensor([80.0, 75, 40, 30]))
    assert tracker.network.seen.shape == (1, 3, 127, 127)
    for x, y in ((105, 92), (112, 90), (118, 99), (118, 105), (110, 110)):
        left, top, width, height = tracker.track(frame(x, y)).tolist()
        assert abs(left + width / 2 - x) < 4
        assert abs(top + height / 2 - y) < 4
        assert width / height == pytest.approx(4 / 3)
    assert 30 < width < 50


def test_a_tracker_takes_over_a_part_of_the_scale_that_fits_best():
    class Larger(Blob):
        def __call__(self, target, searches):
            scores = torch.zeros(1, len(searches), 17, 17)
            scores[0, :, 8, 8] = torch.arange(len(searches)) + 1.0
            return scores

    tracker = LearnetTracker(Larger(), 3)
    frame = torch.zeros(3, 100, 100, dtype=torch.uint8)
    tracker.start(frame, torch.tensor([40.0, 40, 20, 20]))
    box = tracker.track(frame)
    torch.testing.assert_close(box[2:], torch.full((2,), 20 * (0.41 + 0.59 * 1.0375)))
    for _ in range(200):
        box = tracker.track(frame)
    torch.testing.assert_close(box[2:], torch.full((2,), 100.0))  # at most five times its first size


def test_a_tracker_stays_within_the_frame():
    class Away(Blob):
        def __call__(self, target, searches):
            scores = torch.zeros(1, len(searches), 17, 17)
            scores[..., 16, 16] = 1
            return scores

    tracker = LearnetTracker(Away(), 1)
    frame = torch.zeros(3, 80, 100, dtype=torch.uint8)
    tracker.start(frame, torch.tensor([40.0, 30, 20, 20]))
    for _ in range(20):
        left, top, width, height = tracker.track(frame).tolist()
    assert (left + width / 2, top + height / 2) == (100, 80)


def test_the_baseline_stays():
    tracker, box = StillTracker(), torch.tensor([1.0, 2, 3, 4])
    tracker.start(torch.zeros(3, 9, 9), box)
    assert torch.equal(tracker.track(torch.ones(3, 9, 9)), box)


def test_the_context_is_about_twice_a_square_box():
    assert context_side(30, 30) == 60


def test_an_unknown_number_of_scales_is_refused():
    with pytest.raises(InputError, match="scales is 2: use 1, 3, 5"):
        LearnetTracker(network(), 2)
