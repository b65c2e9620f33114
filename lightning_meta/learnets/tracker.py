"""A fully convolutional tracker (Bertinetto et al. 2016, section 4.2), whose second layer may be predicted.

Shapes: B exemplars, n searches an exemplar; C channels; K places along a side of a score map. Pictures are RGB from 0
to 1, boxes are left, top, width, height in pixels, 0-based: (0, 0, W, H) is a whole frame of H x W.
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
UPSAMPLING = 16  # of the score map before its peak is sought
MEAN, SPREAD = 0.45, 0.25  # about those of all pixels

TrackerVariant = Literal["siamese", "unshared", "factorised", "learnet"]
Network = Literal["A", "B", "C", "D"]


class NetworkSizes(NamedTuple):
    """Channels of the five convolutions, and the groups of the second, fourth and fifth."""

    channels: tuple[int, int, int, int, int]
    groups: int = 1


NETWORKS = {
    "A": NetworkSizes((96, 256, 384, 384, 256), groups=2),
    "B": NetworkSizes((48, 128, 96, 96, 64)),
    "C": NetworkSizes((48, 128, 48, 48, 32)),
    "D": NetworkSizes((24, 48, 24, 24, 16)),  # ours: learns something within minutes on a CPU
}


class SearchSettings(NamedTuple):
    """How a tracker looks for its object (values of the authors' later tracker, SiamFC)."""

    scales: int
    step: float  # from one scale to the next
    penalty: float  # factor of the score where the scale changes
    damping: float  # share of a new scale that is taken over
    window: float  # weight of the cosine window


SEARCH_SETTINGS = {
    1: SearchSettings(1, 1.0, 1.0, 0.0, 0.176),
    3: SearchSettings(3, 1.0375, 0.9745, 0.59, 0.176),
    5: SearchSettings(5, 1.0255, 0.962, 0.34, 0.168),
}


class TrackerPupil(nn.Module):
    """The network that embeds crops, phi: five convolutions without padding, (S, S) pixels to about (S / 8, S / 8).

    Args:
        network: Its sizes.
        factorised: Has M' w M with filters from outside in place of the second convolution.
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
        """Embeddings (B * n, C, S', S') of crops (B * n, 3, S, S), seen with filters (B, d, f, f)."""
        x = self.first((x - MEAN) / SPREAD)
        if filters is None:
            return self.rest(self.second(x))
        return self.rest(self.second(x.unflatten(0, (len(filters), -1)), filters).flatten(0, 1))


class TrackerLearnet(nn.Module):
    """The network w that looks at an exemplar and writes filters.

    The paper does not say how the last map, 6x6, becomes one vector: here by a convolution over all of it.

    Args:
        network: NetworkSizes of its first five layers.
        filter_shape: Of what it writes, (d, f, f).
    """

    def __init__(self, network: Network, filter_shape: tuple[int, int, int]):
        super().__init__()
        channels = NETWORKS[network].channels[-1]
        self.filter_shape = filter_shape
        self.trunk = nn.Sequential(TrackerPupil(network), BatchNorm2d(channels), nn.ReLU())
        self.write_filters = nn.Conv2d(channels, math.prod(filter_shape), 6)
        initialise_as_filters(self.write_filters, filter_shape[-1])

    def forward(self, z: Tensor) -> Tensor:
        """Filters (B, d, f, f) for exemplars (B, 3, 127, 127)."""
        return self.write_filters(self.trunk(z)).view(-1, *self.filter_shape)


class Target(NamedTuple):
    """All that is kept of an exemplar: the object to be found."""

    embedding: Tensor  # (B, C, 6, 6)
    filters: Tensor | None  # (B, d, f, f), of the pupil that reads searches


class SiameseNetwork(nn.Module):
    """Scores how much each place of a search looks like an exemplar (section 4.2).

    Args:
        variant: ``siamese`` (one phi for both), ``unshared`` (two), ``factorised`` (two, with M' w M in second place)
            or ``learnet`` (one phi, whose second layer is predicted from the exemplar for both).
        pupil: NetworkSizes of phi.
        learnet: NetworkSizes of the learnet.
        gain: Fixed factor of the correlation (the authors' later tracker: 1e-3).
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
        """What an exemplar (B, 3, 127, 127) leaves for the search: one evaluation, after which it is not needed."""
        if hasattr(self, "learnet"):
            filters = self.learnet(exemplars)
            return Target(self.pupil(exemplars, filters), filters)
        if hasattr(self, "filters"):
            own, filters = (f.expand(len(exemplars), -1, -1, -1) for f in (self.exemplar_filters, self.filters))
            return Target(self.exemplar_pupil(exemplars, own), filters)
        return Target(self.exemplar_pupil(exemplars), None)

    def forward(self, target: Target, searches: Tensor) -> Tensor:
        """Score maps (B, n, K, K), in float32 or better.

        Args:
            target: Of ``describe``.
            searches: (B * n, 3, S, S); K is 17 at S = 255 and 15 at 239.
        """
        z, x = target.embedding, self.pupil(searches, target.filters)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            # Channel by channel and then summed: a convolution of few groups is many times slower on a CPU.
            x = depthwise_conv2d(x.to(wide).unflatten(0, (len(z), -1)), z.to(wide))
            return self.gain * x.sum(2) + self.bias


def places(scores: Tensor) -> Tensor:
    """Where the places of a score map (..., K, K) lie, (K,), in pixels of a crop from its centre."""
    K = scores.shape[-1]
    return (torch.arange(K, dtype=scores.dtype, device=scores.device) - (K - 1) / 2) * STRIDE


def labels(scores: Tensor, label: Tensor, offset: Tensor, radius: float = 16) -> Tensor:
    """Which places match: those at most ``radius`` pixels from the object's centre, where the label is +1.

    The paper: the central 2x2 of all windows, which a map of 17x17 does not have. The authors' later tracker: 16.

    Args:
        scores: (B, K, K).
        label: (B,), +1 or -1.
        offset: Of the object's centre from the crop's, (B, 2), in pixels to the right and downwards.
        radius: In pixels.

    Returns:
        (B, K, K), +1 or -1.
    """
    there = places(scores)
    dx, dy = (there - offset[:, i, None] for i in (0, 1))
    near = dx[:, None, :] ** 2 + dy[:, :, None] ** 2 <= radius**2
    return torch.where(near & (label > 0)[:, None, None], 1.0, -1.0).to(scores)


def logistic_loss(scores: Tensor, labels: Tensor, balanced: bool = False) -> Tensor:
    """log(1 + exp(-l s)), averaged over the score maps.

    Args:
        scores: (B, K, K).
        labels: The same shape, +1 or -1.
        balanced: Matches and others count for a half each in a map that has both.
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
    """Score maps (B, K, K), sixteen times as fine: (B, 16 K, 16 K)."""
    return F.interpolate(scores[:, None], scale_factor=UPSAMPLING, mode="bicubic")[:, 0]


def peaks(fine: Tensor) -> Tensor:
    """Places of the highest values of upsampled maps (B, L, L) in pixels of a crop from its centre: (B, 2), x and y."""
    L = fine.shape[-1]
    best = fine.flatten(1).argmax(1)
    return (torch.stack([best % L, best // L], 1) - (L - 1) / 2) * (STRIDE / UPSAMPLING)


def context_side(width: float, height: float) -> float:
    """Side of the square around a box that becomes an exemplar: about twice that of the box, in pixels of the frame."""
    context = (width + height) / 2
    return math.sqrt((width + context) * (height + context))


def crops(frame: Tensor, centre: Sequence[float], sides: Sequence[float], size: int) -> Tensor:
    """Cuts squares out of a frame and scales them; what lies outside has the frame's mean colour.

    Args:
        frame: (3, H, W), uint8, or floating from 0 to 1.
        centre: x and y of all squares, in pixels of the frame; (W / 2, H / 2) is its centre.
        sides: Their sides, in pixels of the frame.
        size: Side of the crops.

    Returns:
        (n, 3, size, size), from 0 to 1.
    """
    frame = frame / 255 if frame.dtype == torch.uint8 else frame
    mean = frame.mean((1, 2))[:, None, None]
    # bilinear sampling would skip pixels where it shrinks to less than half
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
    """Follows one object through a video, from its box in the first frame, which is the only one it learns from.

    Differs from the authors' later tracker: scores count from the lowest of all scales, so that the penalty lowers them
    whatever their sign.

    Args:
        network: Trained; in evaluation mode.
        scales: NetworkSizes at which the object is sought in each frame: 1, 3 or 5 (paper).

    Raises:
        InputError: For another number of scales.
    """

    def __init__(self, network: SiameseNetwork, scales: int = 3):
        if scales not in SEARCH_SETTINGS:
            raise InputError(f"scales is {scales}: choose {', '.join(map(str, SEARCH_SETTINGS))}")
        self.network, self.search = network, SEARCH_SETTINGS[scales]

    @torch.no_grad()
    def start(self, frame: Tensor, box: Tensor) -> None:
        """Looks at the object.

        Args:
            frame: (3, H, W), uint8.
            box: (4,).
        """
        left, top, width, height = box.tolist()
        self.centre, self.box_size = [left + width / 2, top + height / 2], [width, height]
        self.scale = 1.0  # of the object, relative to this frame
        self.side = context_side(width, height)
        self.target = self.network.describe(crops(self._ready(frame), self.centre, [self.side], EXEMPLAR_SIZE))
        self.window: Tensor | None = None

    @torch.no_grad()
    def track(self, frame: Tensor) -> Tensor:
        """The object's box (4,) in the next frame (3, H, W), uint8."""
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
    """The trivial baseline: the object stays where it was."""

    def start(self, frame: Tensor, box: Tensor) -> None:
        self.box = box

    def track(self, frame: Tensor) -> Tensor:
        return self.box
