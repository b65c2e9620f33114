"""A fully convolutional tracker (Bertinetto et al. 2016, section 4.2) whose second layer can be predicted.

Shapes: B exemplars with n searches each; C channels; S pixels along a side of a search; K places along a side of a
score map. Images are RGB from 0 to 1. A box is (left, top, width, height) in pixels, counted from 0: (0, 0, W, H) is a
whole frame of H x W pixels.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.errors import InputError
from lightning_meta.learnets.layers import FactorisedConv2d, depthwise_conv2d, initialise_as_filters
from lightning_meta.nn.batch_norm import BatchNorm2d

EXEMPLAR_SIZE, SEARCH_SIZE = 127, 255  # sides of the crops in pixels
STRIDE = 8  # pixels of a crop from one place of the score map to the next
UPSAMPLING = 16  # factor by which a score map is enlarged before its peak is located
MEAN, SPREAD = 0.45, 0.25  # approximate mean and standard deviation of pixels

TrackerVariant = Literal["siamese", "unshared", "factorised", "learnet"]
Network = Literal["A", "B", "C", "D"]


class NetworkSizes(NamedTuple):
    """Channels of the five convolutions, and groups of the second, fourth and fifth."""

    channels: tuple[int, int, int, int, int]
    groups: int = 1


NETWORKS = {
    "A": NetworkSizes((96, 256, 384, 384, 256), groups=2),
    "B": NetworkSizes((48, 128, 96, 96, 64)),
    "C": NetworkSizes((48, 128, 48, 48, 32)),
    "D": NetworkSizes((24, 48, 24, 24, 16)),  # not in the paper: small enough to train on a CPU within minutes
}


class SearchSettings(NamedTuple):
    """Settings of the search in each frame (values of the authors' later tracker, SiamFC)."""

    scales: int
    step: float  # ratio of neighbouring scales
    penalty: float  # factor of the scores of all scales but the current one
    damping: float  # weight of the new scale in the update of the scale
    window: float  # weight of the cosine window


SEARCH_SETTINGS = {
    1: SearchSettings(1, 1.0, 1.0, 0.0, 0.176),
    3: SearchSettings(3, 1.0375, 0.9745, 0.59, 0.176),
    5: SearchSettings(5, 1.0255, 0.962, 0.34, 0.168),
}


class TrackerPupil(nn.Module):
    """The network phi, which embeds crops: five convolutions without padding with a total stride of 8.

    Args:
        network: Sizes of the layers.
        factorised: Replace the second convolution by M' w M, whose filters w are passed to ``forward``.
    """

    def __init__(self, network: Network, factorised: bool = False):
        super().__init__()
        (c1, c2, c3, c4, c5), groups = NETWORKS[network]
        self.first = nn.Sequential(nn.Conv2d(3, c1, 11, stride=2), BatchNorm2d(c1), nn.ReLU(), nn.MaxPool2d(3, 2))
        self.second = FactorisedConv2d(c1, c2, 5) if factorised else nn.Conv2d(c1, c2, 5, groups=groups)
        self.rest = nn.Sequential(
            *(BatchNorm2d(c2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(c2, c3, 3), BatchNorm2d(c3), nn.ReLU()),
            *(nn.Conv2d(c3, c4, 3, groups=groups), BatchNorm2d(c4), nn.ReLU()),
            nn.Conv2d(c4, c5, 3, groups=groups),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, filters: Tensor | None = None) -> Tensor:
        """Embed crops (B * n, 3, S, S) as (B * n, C, S', S'), with filters (B, d, f, f) if ``factorised``."""
        x = self.first((x - MEAN) / SPREAD)
        if filters is None:
            return self.rest(self.second(x))
        return self.rest(self.second(x.unflatten(0, (len(filters), -1)), filters).flatten(0, 1))


class TrackerLearnet(nn.Module):
    """The network w, which predicts filters from an exemplar.

    The paper does not say how the last map of 6x6 places becomes a vector. Here a convolution covers all of it.

    Args:
        network: Sizes of the first five layers.
        filter_shape: (d, f, f).
    """

    def __init__(self, network: Network, filter_shape: tuple[int, int, int]):
        super().__init__()
        channels = NETWORKS[network].channels[-1]
        self.filter_shape = filter_shape
        self.trunk = nn.Sequential(TrackerPupil(network), BatchNorm2d(channels), nn.ReLU())
        self.write_filters = nn.Conv2d(channels, math.prod(filter_shape), 6)
        initialise_as_filters(self.write_filters, filter_shape[-1])

    def forward(self, z: Tensor) -> Tensor:
        """Predict filters (B, d, f, f) from exemplars (B, 3, 127, 127)."""
        return self.write_filters(self.trunk(z)).view(-1, *self.filter_shape)


class Target(NamedTuple):
    """The object to find, computed once from its exemplar."""

    embedding: Tensor  # (B, C, 6, 6)
    filters: Tensor | None  # (B, d, f, f), for embedding searches


class SiameseNetwork(nn.Module):
    """Network that scores the similarity of each place of a search to an exemplar (section 4.2).

    Args:
        variant: ``siamese`` (one phi for exemplars and searches), ``unshared`` (two), ``factorised`` (two, with M' w M
            as the second layer) or ``learnet`` (one phi, whose second layer is predicted from the exemplar).
        pupil: Sizes of phi.
        learnet: Sizes of the learnet.
        gain: Fixed factor of the correlation (the authors' later tracker: 1e-3).

    >>> import torch
    >>> network = SiameseNetwork("learnet", pupil="D", learnet="D").eval()
    >>> target = network.describe(torch.rand(1, 3, 127, 127))
    >>> network(target, torch.rand(2, 3, 255, 255)).shape
    torch.Size([1, 2, 17, 17])
    """

    def __init__(
        self, variant: TrackerVariant = "learnet", pupil: Network = "B", learnet: Network = "A", gain: float = 1e-3
    ):
        super().__init__()
        factorised = variant in ("factorised", "learnet")
        self.gain = gain
        self.pupil = TrackerPupil(pupil, factorised)
        self.exemplar_pupil = TrackerPupil(pupil, factorised) if variant in ("unshared", "factorised") else self.pupil
        if variant == "learnet":
            self.learnet = TrackerLearnet(learnet, self.pupil.second.filter_shape)
        if variant == "factorised":
            d, f, _ = self.pupil.second.filter_shape
            self.filters, self.exemplar_filters = (nn.Parameter(torch.randn(1, d, f, f) / f) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(()))

    def describe(self, exemplars: Tensor) -> Target:
        """Compute the target from exemplars (B, 3, 127, 127)."""
        if hasattr(self, "learnet"):
            filters = self.learnet(exemplars)
            return Target(self.pupil(exemplars, filters), filters)
        if hasattr(self, "filters"):
            own, filters = (f.expand(len(exemplars), -1, -1, -1) for f in (self.exemplar_filters, self.filters))
            return Target(self.exemplar_pupil(exemplars, own), filters)
        return Target(self.exemplar_pupil(exemplars), None)

    def forward(self, target: Target, searches: Tensor) -> Tensor:
        """Return score maps (B, n, K, K), in float32 or better.

        Args:
            target: From ``describe``.
            searches: (B * n, 3, S, S). K is 17 for S = 255 and 15 for S = 239.
        """
        z, x = target.embedding, self.pupil(searches, target.filters)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            # Depthwise, then summed: on a CPU this is many times faster than a convolution with few groups.
            x = depthwise_conv2d(x.to(wide).unflatten(0, (len(z), -1)), z.to(wide))
            return self.gain * x.sum(2) + self.bias


def places(scores: Tensor) -> Tensor:
    """Return the positions of a score map's rows or columns, (K,), in pixels from the centre of the crop.

    >>> import torch
    >>> places(torch.zeros(3, 3))
    tensor([-8.,  0.,  8.])
    """
    K = scores.shape[-1]
    return (torch.arange(K, dtype=scores.dtype, device=scores.device) - (K - 1) / 2) * STRIDE


def labels(scores: Tensor, label: Tensor, offset: Tensor, radius: float = 16) -> Tensor:
    """Return the label of each place: +1 up to ``radius`` pixels from the object's centre if ``label`` is +1, else -1.

    Differs from the paper: it labels the central 2x2 places, which do not exist in a map of 17x17. The authors' later
    tracker uses a radius of 16.

    Args:
        scores: (B, K, K).
        label: (B,), +1 or -1.
        offset: From the centre of the crop to that of the object, (B, 2), in pixels to the right and downwards.
        radius: In pixels.

    Returns:
        (B, K, K), +1 or -1.

    >>> import torch
    >>> (labels(torch.zeros(1, 17, 17), torch.ones(1), torch.zeros(1, 2)) > 0).sum()
    tensor(13)
    """
    there = places(scores)
    dx, dy = (there - offset[:, i, None] for i in (0, 1))
    near = dx[:, None, :] ** 2 + dy[:, :, None] ** 2 <= radius**2
    return torch.where(near & (label > 0)[:, None, None], 1.0, -1.0).to(scores)


def logistic_loss(scores: Tensor, labels: Tensor, balanced: bool = False) -> Tensor:
    """Return the mean of log(1 + exp(-l s)) over all places of all score maps.

    Args:
        scores: (B, K, K).
        labels: (B, K, K), +1 or -1.
        balanced: In a map with both labels, let each label contribute half of the mean.

    >>> import torch
    >>> logistic_loss(torch.zeros(1, 17, 17), -torch.ones(1, 17, 17))
    tensor(0.6931)
    """
    losses = F.softplus(-labels * scores)
    if not balanced:
        return losses.mean()
    match = labels > 0
    matches = match.sum((1, 2), keepdim=True)
    others = match[0].numel() - matches
    weight = torch.where(match, 1 / matches, 1 / others) / torch.where(matches > 0, 2, 1)
    return (weight * losses).sum((1, 2)).mean()


def upsample(scores: Tensor) -> Tensor:
    """Enlarge score maps (B, K, K) to (B, 16 K, 16 K), bicubically.

    >>> import torch
    >>> upsample(torch.zeros(1, 17, 17)).shape
    torch.Size([1, 272, 272])
    """
    return F.interpolate(scores[:, None], scale_factor=UPSAMPLING, mode="bicubic")[:, 0]


def peaks(fine: Tensor) -> Tensor:
    """Return where upsampled maps (B, L, L) have their maxima: (B, 2), x and y in pixels from the crop's centre.

    >>> import torch
    >>> peaks(torch.eye(4)[None])
    tensor([[-0.7500, -0.7500]])
    """
    L = fine.shape[-1]
    best = fine.flatten(1).argmax(1)
    return (torch.stack([best % L, best // L], 1) - (L - 1) / 2) * (STRIDE / UPSAMPLING)


def context_side(width: float, height: float) -> float:
    """Return the side, in pixels of the frame, of the square around a box that is cut out as an exemplar.

    >>> context_side(10, 10)
    20.0
    """
    context = (width + height) / 2
    return math.sqrt((width + context) * (height + context))


def crops(frame: Tensor, centre: Sequence[float], sides: Sequence[float], size: int) -> Tensor:
    """Cut n squares out of a frame and resize them. Parts outside the frame get its mean colour.

    Args:
        frame: (3, H, W), uint8, or float from 0 to 1.
        centre: x and y of the centre of all squares, in pixels of the frame; (W / 2, H / 2) is the frame's centre.
        sides: Sides of the n squares, in pixels of the frame.
        size: Side of the crops in pixels.

    Returns:
        (n, 3, size, size), from 0 to 1.

    >>> import torch
    >>> crops(torch.rand(3, 60, 80), centre=(40, 30), sides=(20, 40), size=16).shape
    torch.Size([2, 3, 16, 16])
    """
    frame = frame / 255 if frame.dtype == torch.uint8 else frame
    mean = frame.mean((1, 2))[:, None, None]
    # bilinear sampling skips pixels if it shrinks the frame to less than half
    shrink = max(1, min(int(min(sides) / size), *frame.shape[1:]))
    frame = F.avg_pool2d(frame - mean, shrink) if shrink > 1 else frame - mean
    H, W = frame.shape[1:]
    unit = (torch.arange(size, dtype=frame.dtype, device=frame.device) + 0.5) / size - 0.5
    along = torch.tensor(sides, dtype=frame.dtype, device=frame.device)[:, None] * unit / shrink  # (n, size)
    x, y = ((c / shrink + along) * 2 / length - 1 for c, length in zip(centre, (W, H), strict=True))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    with torch.autocast(frame.device.type, enabled=False):
        return F.grid_sample(frame.expand(len(sides), -1, -1, -1), grid, align_corners=False) + mean


class LearnetTracker:
    """Track one object through a video, given its box in the first frame. Later frames do not update the target.

    Differs from the authors' later tracker: the lowest score of all scales is subtracted before the scale penalty, so
    that the penalty lowers negative scores too.

    Args:
        network: A trained network in evaluation mode.
        scales: Number of scales to search in each frame: 1, 3 or 5 (paper).

    Raises:
        InputError: If ``scales`` is another number.

    >>> import torch
    >>> tracker = LearnetTracker(SiameseNetwork("siamese", pupil="D").eval(), scales=1)
    >>> frame = torch.zeros(3, 120, 160, dtype=torch.uint8)
    >>> tracker.start(frame, torch.tensor([60.0, 40, 40, 40]))
    >>> tracker.track(frame).shape
    torch.Size([4])
    """

    def __init__(self, network: SiameseNetwork, scales: int = 3):
        if scales not in SEARCH_SETTINGS:
            raise InputError(f"model.scales is {scales}: use {', '.join(map(str, SEARCH_SETTINGS))}")
        self.network, self.search = network, SEARCH_SETTINGS[scales]

    @torch.no_grad()
    def start(self, frame: Tensor, box: Tensor) -> None:
        """Compute the target from the first frame (3, H, W), uint8, and the object's box (4,)."""
        left, top, width, height = box.tolist()
        self.centre, self.box_size = [left + width / 2, top + height / 2], [width, height]
        self.scale = 1.0  # of the object, relative to the first frame
        self.side = context_side(width, height)
        self.target = self.network.describe(crops(self._ready(frame), self.centre, [self.side], EXEMPLAR_SIZE))
        self.window: Tensor | None = None

    @torch.no_grad()
    def track(self, frame: Tensor) -> Tensor:
        """Return the object's box (4,) in the next frame (3, H, W), uint8."""
        n, step, penalty, damping, weight = self.search
        sides = [self.side * self.scale * SEARCH_SIZE / EXEMPLAR_SIZE * step ** (i - n // 2) for i in range(n)]
        scores = self.network(self.target, crops(self._ready(frame), self.centre, sides, SEARCH_SIZE))[0]
        fine = upsample(scores)
        fine = fine - fine.amin()
        best = max(range(n), key=lambda i: fine[i].amax().item() * (penalty if i != n // 2 else 1))
        fine = fine[best] - fine[best].amin()
        fine = fine / fine.sum().clamp(min=torch.finfo(fine.dtype).tiny)
        if self.window is None:
            hann = torch.hann_window(len(fine), periodic=False, dtype=fine.dtype, device=fine.device)
            self.window = hann[:, None] * hann / hann.sum() ** 2
        moved = peaks(((1 - weight) * fine + weight * self.window)[None])[0].tolist()
        limits = [float(length) for length in frame.shape[:0:-1]]  # the centre stays within the frame
        self.centre = [
            min(max(c + d * sides[best] / SEARCH_SIZE, 0.0), limit)
            for c, d, limit in zip(self.centre, moved, limits, strict=True)
        ]
        self.scale = min(max(self.scale * (1 + damping * (step ** (best - n // 2) - 1)), 0.2), 5.0)
        width, height = (length * self.scale for length in self.box_size)
        return torch.tensor([self.centre[0] - width / 2, self.centre[1] - height / 2, width, height])

    def _ready(self, frame: Tensor) -> Tensor:
        parameter = self.network.bias
        return frame.to(parameter.device).to(parameter.dtype) / 255


class StillTracker:
    """Baseline that predicts the first box in every frame."""

    def start(self, frame: Tensor, box: Tensor) -> None:
        self.box = box

    def track(self, frame: Tensor) -> Tensor:
        return self.box
