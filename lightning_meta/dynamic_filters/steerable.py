r"""Learning steerable filters: a network generates the filter of an angle (De Brabandere et al. 2016, section 4).

Shapes: B samples, A angles, H rows, W columns, K x K = 9 x 9 taps; one grey channel. Angles are in radians.
"""

import math

import torch
from torch import Tensor, nn

from lightning_meta.drawing.sheets import image_sheet
from lightning_meta.dynamic_filters.frame_scores import squared_error
from lightning_meta.dynamic_filters.layers import dynamic_convolution
from lightning_meta.dynamic_filters.steerable_data import Patches
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, halved
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

K = 9
DIRECTIONS = 8  # number of filters of the baseline with fixed filters
SHOWN = 6  # number of patches in a figure


def steered_filter(angles: Tensor) -> Tensor:
    r"""Return the derivative of a Gaussian of standard deviation 1 in the given directions, as taps of a correlation.

    .. math:: F_\theta[dy, dx] = \cos\theta \, g(dy) g'(dx) + \sin\theta \, g'(dy) g(dx),
              \quad g(t) = e^{-t^2 / 2}, \quad g'(t) = -t e^{-t^2 / 2}

    Like the authors' filter it is not normalised. Its mean over all angles is zero.

    Args:
        angles: Angles (B,) in radians, from the x axis (to the right) towards the y axis (down).

    Returns:
        Filters (B, K, K), in float32 or better.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.steerable import steered_filter
        >>> steered_filter(torch.zeros(1))[0, 4, 3:6]  # the central row: positive on the left, negative on the right
        tensor([ 0.6065, -0.0000, -0.6065])
    """
    angles = angles.to(torch.promote_types(angles.dtype, torch.float32))
    t = torch.arange(K, dtype=angles.dtype, device=angles.device) - K // 2
    g = torch.exp(-(t**2) / 2)
    along_x, along_y = torch.outer(g, -t * g), torch.outer(-t * g, g)
    return angles.cos()[:, None, None] * along_x + angles.sin()[:, None, None] * along_y


def apply(filters: Tensor, images: Tensor) -> Tensor:
    """Filter each image (B, 1, H, W) with its own filter (B, K, K), with zero padding."""
    return dynamic_convolution(images, filters[:, None, None])


class FilterGenerator(nn.Module):
    """The filter-generating network: from an angle over 64 and 128 leaky ReLUs to K * K taps; 18,897 parameters.

    Differs from the paper: the paper uses 1 x 1 convolutions of a plane that holds the angle in every pixel, which is
    equivalent.

    Args:
        centred: Scale the input to angle / pi - 1, from -1 to 1, instead of the angle, from 0 to 2 pi.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.steerable import FilterGenerator
        >>> FilterGenerator()(torch.tensor([0.0, 3.1])).shape
        torch.Size([2, 9, 9])
    """

    def __init__(self, centred: bool = False):
        super().__init__()
        self.centred = centred
        self.layers = nn.Sequential(
            nn.Linear(1, 64), nn.LeakyReLU(0.01), nn.Linear(64, 128), nn.LeakyReLU(0.01), nn.Linear(128, K * K)
        )
        for layer in self.layers[::2]:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)

    def forward(self, angles: Tensor) -> Tensor:
        """Return filters (B, K, K), in float32 or better, for angles (B,) from 0 to 2 pi."""
        x = angles / math.pi - 1 if self.centred else angles
        taps = self.layers(x[:, None])
        return taps.to(torch.promote_types(taps.dtype, torch.float32)).unflatten(1, (K, K))


class SteerableFilters(Experiment):
    """Trains a ``FilterGenerator`` on images, angles and filtered images; it never sees the true filter.

    Args:
        centred: Scale the angle to -1 to 1 (paper: no; the authors' notebook with the published numbers: yes).
        lr: Learning rate of Adam (paper: 1e-3).
        lr_halved_every: Halve the learning rate after every so many optimizer steps (paper: 1000). None: let it fall to
            zero along a cosine over ``trainer.max_steps``.
        beta2: Decay rate of Adam's average of squared gradients (paper: 0.999).
    """

    def __init__(
        self,
        centred: bool = False,
        lr: float = 1e-3,
        lr_halved_every: int | None = 1000,
        beta2: float = 0.999,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.generator = FilterGenerator(centred)
        self.val_error = Mean()
        self.scores = nn.ModuleDict({name: Values() for name in ("model", *fixed_filters(torch.zeros(1)))})

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr, betas=(0.9, self.hparams.beta2))
        every = self.hparams.lr_halved_every
        return by_step(optimizer, halved(every) if every else cosine(self.trainer.max_steps))

    def forward(self, images: Tensor, angles: Tensor) -> Tensor:
        """Filter images (B, 1, H, W) in the directions of angles (B,)."""
        return apply(self.generator(angles), images)

    def step(self, batch: Patches) -> Tensor:
        """Return the squared error of each sample, (B,)."""
        return squared_error(self(batch.images, batch.angles), apply(steered_filter(batch.angles), batch.images))

    def training_step(self, batch: Patches, batch_idx: int) -> Tensor:
        loss = self.step(batch).mean() / batch.images[0].numel()
        self.log("train/mean_squared_error", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Patches, batch_idx: int) -> None:
        self.val_error.update(self.step(batch))
        self.log("val/squared_error", self.val_error, prog_bar=True)
        self.log("val/filter_error", self.filter_errors()["model"], batch_size=1, sync_dist=True)

    def filter_errors(self) -> dict[str, Tensor]:
        """Return the squared error of the taps in % of the true filters' squares, over 360 angles."""
        angles = torch.arange(360, device=self.device, dtype=self.dtype) * (math.pi / 180)
        truth = steered_filter(angles)
        filters = {"model": self.generator(angles), **fixed_filters(angles)}
        return {name: 100 * (f - truth).square().sum() / truth.square().sum() for name, f in filters.items()}

    def test_step(self, batch: Patches, batch_idx: int) -> None:
        target = apply(steered_filter(batch.angles), batch.images)
        filters = {"model": self.generator(batch.angles), **fixed_filters(batch.angles)}
        for name, metric in self.scores.items():
            metric.update(squared_error(apply(filters[name], batch.images), target))

    def on_test_epoch_end(self) -> None:
        for name, metric in self.scores.items():
            self.log_mean(f"test/squared_error/{name}", metric.compute())
        for name, value in self.filter_errors().items():
            self.log(f"test/filter_error/{name}", value, sync_dist=True)
        self.measure, *self.further_measures = (
            Measure(
                name,
                unit,
                f"test/{measure}/model",
                {baseline: f"test/{measure}/{baseline}" for baseline in self.scores if baseline != "model"},
            )
            for name, unit, measure in (
                ("squared error", "sum over a patch", "squared_error"),
                ("error of the taps", "% of the true filter's squares", "filter_error"),
            )
        )

    def pictures(self, batch: Patches) -> dict[str, Tensor]:
        """Draw the paper's figure 3, filters around the circle, and filtered patches; uint8 (3, H', W') by name."""
        angles, images = batch.angles[:SHOWN], batch.images[:SHOWN]
        outputs, targets = self(images, angles), apply(steered_filter(angles), images)
        rows = []
        for image, target, output, largest in zip(images, targets, outputs, steepest(images), strict=True):
            filtered = {"target": target, "output": output, "difference": output - target}
            rows.append({"input": _rgb(image)} | {name: signed_image(y, largest) for name, y in filtered.items()})
        circle = torch.arange(0, 360, 30).tolist()
        return {"filters": self._draw_filters(circle), "patches": image_sheet(rows)}

    def _draw_filters(self, degrees: list[float]) -> Tensor:
        """Draw true filters, generated filters and their difference, one row each."""
        angles = torch.tensor(degrees, device=self.device, dtype=self.dtype) * (math.pi / 180)
        truth, filters = steered_filter(angles), self.generator(angles)
        largest = truth.abs().max()
        names = [f"{d:g}°" for d in degrees]
        return image_sheet(
            [
                {name: signed_image(f[None], largest) for name, f in zip(names, row, strict=True)}
                for row in (truth, filters, filters - truth)
            ],
            scale=6,
        )

    def predict_step(self, batch: Patches, batch_idx: int) -> dict[str, Tensor | str]:
        """Return the filtered image and the taps for each direction, and a figure of all filters, by file name."""
        degrees, first = self.trainer.datamodule.degrees, batch.segment.problem
        written: dict[str, Tensor | str] = {} if first else {"filters.png": self._draw_filters(degrees)}
        filters = self.generator(batch.angles)
        outputs = apply(filters, batch.images)
        for i, (taps, output, largest) in enumerate(zip(filters, outputs, steepest(batch.images), strict=True)):
            name = f"{degrees[first + i * self.trainer.world_size]:g}"
            written[f"filtered_{name}.png"] = (255 * signed_image(output, largest)).round().to(torch.uint8)
            lines = [" ".join(f"{tap:9.6f}" for tap in row) for row in taps.tolist()]
            written[f"filter_{name}.txt"] = "\n".join([*lines, ""])
        return written


def fixed_filters(angles: Tensor) -> dict[str, Tensor]:
    """Return the baselines' filters (B, K, K): the mean over all angles, which is zero, and the nearest of a few."""
    turn = 2 * math.pi / DIRECTIONS
    nearest = steered_filter((angles / turn).round() * turn)
    return {"mean filter (zero)": torch.zeros_like(nearest), f"nearest of {DIRECTIONS} filters": nearest}


def steepest(images: Tensor) -> Tensor:
    """Return the largest response of images (B, 1, H, W) over all directions and pixels, (B,).

    The border is left out, unless nothing else is left, because zero padding creates a steep edge there.
    """
    x, y = (apply(steered_filter(angle.expand(len(images))), images) for angle in images.new_tensor([0, math.pi / 2]))
    responses, border = torch.hypot(x, y), K // 2
    inner = responses[..., border:-border, border:-border]
    return (inner if inner.numel() else responses).amax((1, 2, 3))


def signed_image(values: Tensor, largest: Tensor) -> Tensor:
    """Return values (1, H, W) as grey levels (3, H, W) from 0 to 1: black is -largest, middle grey is zero."""
    return _rgb(0.5 + values.nan_to_num(0) / (2 * largest.clamp(min=1e-3))).clamp(0, 1)


def _rgb(grey: Tensor) -> Tensor:
    return grey.detach().float().cpu().expand(3, -1, -1)
