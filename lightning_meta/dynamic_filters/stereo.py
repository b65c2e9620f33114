"""Predicting the right view from the left one with horizontal local filters (De Brabandere et al. 2016, section 4).

Shapes: B pairs, H rows, W columns, K horizontal taps; one grey channel.
"""

import math

import torch
from torch import Tensor, nn

from lightning_meta.drawing.sheets import image_sheet
from lightning_meta.dynamic_filters.frame_scores import squared_error
from lightning_meta.dynamic_filters.layers import expected_displacement
from lightning_meta.dynamic_filters.networks import Convolution, FilteredImage, convolutions, decoder, initialise
from lightning_meta.dynamic_filters.stereo_data import SIZE, StereoBatch
from lightning_meta.errors import InputError
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, halved
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

BAD = 1.0  # largest error of a disparity in pixels that does not count as bad
SHOWN = 4  # number of pairs in a figure
SCORES = ("model", "copy the left view", "mean view")
DISPARITIES = ("model", "block matching (sees both views)", "one mean everywhere", "mean of each place")


class ViewPredictor(nn.Module):
    """Predicts the right view by filtering the left one along its rows, with a generated filter for every pixel.

    Args:
        width: Channels of the first layers (paper: 32); later layers have 2 or 4 times as many.
        kernel_width: K, odd (paper: 13). The largest disparity is half of it.
        dynamic: False gives the paper's baseline: the same network with a convolution in place of the filters.
        dynamic_bias: Also generate a plane that is added to the left view before filtering.
        untied_bias: Give every pixel its own bias in the last layer of the encoder, as the paper does. Views must then
            have 64x64 pixels.
        gain: Scale of the initial weights, see ``networks.initialise`` (paper: 1).

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.stereo import ViewPredictor, disparities
        >>> predictor = ViewPredictor(width=4, untied_bias=False)
        >>> right, filters = predictor(torch.rand(2, 1, 16, 24))
        >>> right.shape, filters.shape, disparities(filters).shape
        (torch.Size([2, 1, 16, 24]), torch.Size([2, 13, 16, 24]), torch.Size([2, 1, 16, 24]))
    """

    def __init__(
        self,
        width: int = 32,
        kernel_width: int = 13,
        dynamic: bool = True,
        dynamic_bias: bool = True,
        untied_bias: bool = True,
        gain: float = 1.0,
    ):
        super().__init__()
        self.filtered = FilteredImage((1, kernel_width), dynamic, dynamic_bias)
        self.encoder = convolutions(
            1,
            Convolution(width),
            Convolution(width, stride=2),
            Convolution(2 * width),
            Convolution(2 * width),
            Convolution(4 * width, untied=(SIZE // 2, SIZE // 2) if untied_bias else None),
        )
        twice = [2 * width, 2 * width]
        self.decoder = decoder(4 * width, before=twice, after=twice, hidden=4 * width, planes=self.filtered.planes)
        initialise(self, gain)

    def forward(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the right view (B, 1, H, W), in float32 or better, and the filters' logits (B, K, H, W)."""
        planes = self.decoder(self.encoder(left))
        right = self.filtered(left, planes)
        return right.to(torch.promote_types(right.dtype, torch.float32)), planes[:, : self.filtered.taps]


def disparities(filters: Tensor) -> Tensor:
    """Return disparities of the right view in pixels, (B, 1, H, W): the centres of mass of filters (B, K, H, W).

    The pixel at x of the right view is at x + disparity in the left view.
    """
    return expected_displacement(filters, (1, filters.shape[1]))[:, :1]


def entropies(filters: Tensor) -> Tensor:
    """Return the entropy of filters (B, K, H, W), divided by its maximum, (B, 1, H, W): 0 one tap, 1 uniform."""
    logs = filters.log_softmax(1, dtype=torch.promote_types(filters.dtype, torch.float32))
    return -(logs.exp() * logs).sum(1, keepdim=True) / math.log(filters.shape[1])


def block_matching(left: Tensor, right: Tensor) -> Tensor:
    """Return the disparity of the right view, (1, H, W), by OpenCV's semi-global matching of both views.

    Blocks have 3x3 pixels and penalties are those that OpenCV recommends; of the settings that we tried on rendered
    scenes these were best. OpenCV matches left views, so it is given the mirrored pair. A pixel without a match takes
    the disparity of the nearest matched pixel in its row.

    Args:
        left: Left view (1, H, W), values in [0, 1].
        right: Right view of the same shape.
    """
    import cv2
    import numpy as np

    block, levels, steps = 3, 16, 16  # side of a block, number of disparities, steps per pixel in the result
    border = ((block, block), (levels + block, block))  # pad by repetition: OpenCV does not match pixels at the border
    views = (np.rint(255 * view[0].cpu().float().numpy()).astype(np.uint8) for view in (right, left))
    views = (np.pad(view[:, ::-1], border, "edge") for view in views)
    penalties = {"P1": 8 * block**2, "P2": 32 * block**2}
    matcher = cv2.StereoSGBM.create(0, levels, block, **penalties, mode=cv2.StereoSGBM_MODE_HH)
    found = matcher.compute(*views)[block:-block, levels + block : -block][:, ::-1] / steps
    columns = np.arange(found.shape[1])
    for row in found:
        known = np.flatnonzero(row >= 0)
        row[:] = row[known[np.abs(columns[:, None] - known).argmin(1)]] if len(known) else 0
    return torch.from_numpy(found)[None].to(right)


class StereoPrediction(Experiment):
    """Trains a ``ViewPredictor`` on pairs of views, without any disparity.

    Args:
        width: Channels of the first layers (paper: 32).
        kernel_width: Width of the generated filters (paper: 13).
        dynamic: False trains the paper's baseline of equal size, which generates no filters.
        dynamic_bias: Also generate a plane that is added to the left view before filtering (paper: true).
        untied_bias: Give every pixel its own bias in one layer, for views of 64x64 (paper: true).
        gain: Scale of the initial weights (paper: 1).
        lr: Learning rate of Adam (paper: 1e-3).
        lr_halved_every: Halve the learning rate after every so many optimizer steps (paper: 4000). None: let it fall to
            zero along a cosine over ``trainer.max_steps``.
        beta2: Decay rate of Adam's average of squared gradients (paper: 0.999).
        compile: Compile the network with ``torch.compile``.
    """

    def __init__(
        self,
        width: int = 32,
        kernel_width: int = 13,
        dynamic: bool = True,
        dynamic_bias: bool = True,
        untied_bias: bool = True,
        gain: float = 1.0,
        lr: float = 1e-3,
        lr_halved_every: int | None = 4000,
        beta2: float = 0.999,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.predictor = ViewPredictor(width, kernel_width, dynamic, dynamic_bias, untied_bias, gain)
        self.predictor.to(memory_format=torch.channels_last)
        self.val_error = Mean()
        self.scores = nn.ModuleDict({name: Values() for name in SCORES})
        self.end_point, self.bad = (nn.ModuleDict({name: Mean() for name in DISPARITIES}) for _ in range(2))

    def setup(self, stage: str) -> None:
        if self.hparams.kernel_width % 2 == 0:
            raise InputError(f"model.kernel_width is {self.hparams.kernel_width}: choose an odd number, such as 13")

    def configure_model(self) -> None:
        if self.hparams.compile:
            self.predictor.forward = torch.compile(self.predictor.forward)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr, betas=(0.9, self.hparams.beta2))
        every = self.hparams.lr_halved_every
        return by_step(optimizer, halved(every) if every else cosine(self.trainer.max_steps))

    def forward(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ViewPredictor.forward``."""
        if self.hparams.untied_bias and left.shape[2:] != (SIZE, SIZE):
            raise InputError(
                f"the views have {left.shape[3]}x{left.shape[2]} pixels, but untied biases need {SIZE}x{SIZE}: "
                "scale the views, or set --model.untied_bias false"
            )
        return self.predictor(left)

    def training_step(self, batch: StereoBatch, batch_idx: int) -> Tensor:
        loss = squared_error(self(batch.left)[0], batch.right).mean()
        self.log("train/squared_error", loss, prog_bar=True)
        return loss / batch.left[0].numel()  # the paper minimises the mean over pixels

    def validation_step(self, batch: StereoBatch, batch_idx: int) -> None:
        self.val_error.update(squared_error(self(batch.left)[0], batch.right))
        self.log("val/squared_error", self.val_error, prog_bar=True)

    def on_test_start(self) -> None:
        data = self.trainer.datamodule
        self.mean_view = data.mean_view().to(self.device)
        self.measures_disparity = self.hparams.dynamic and len(data.truths) > 0
        if self.measures_disparity:
            self.mean_disparities = [mean.to(self.device) for mean in data.mean_disparities()]

    def test_step(self, batch: StereoBatch, batch_idx: int) -> None:
        right, filters = self(batch.left)
        predictions = right, batch.left, self.mean_view.to(right).expand_as(right)
        for name, prediction in zip(SCORES, predictions, strict=True):
            self.scores[name].update(squared_error(prediction, batch.right)[batch.scored])
        if self.measures_disparity:
            self._score_disparities(batch, disparities(filters))

    def _score_disparities(self, batch: StereoBatch, found: Tensor) -> None:
        """Score every pixel whose true disparity is known."""
        known = batch.disparity.isfinite()
        matched = torch.zeros_like(batch.disparity)
        for i in known.flatten(1).any(1).nonzero()[:, 0].tolist():
            matched[i] = block_matching(batch.left[i], batch.right[i])
        means = (mean.expand_as(batch.disparity) for mean in self.mean_disparities)
        for name, disparity in zip(DISPARITIES, (found, matched, *means), strict=True):
            errors = (disparity - batch.disparity).abs()[known]
            if len(errors):
                self.end_point[name].update(errors)
                self.bad[name].update(100 * ~(errors <= BAD))  # NaN counts as bad

    def on_test_epoch_end(self) -> None:
        measures = [("squared error", "sum over an image", "squared_error", self.scores)]
        if self.measures_disparity:
            measures += [
                ("end-point error of the disparity", "pixels", "end_point_error", self.end_point),
                ("bad disparities", f"% wrong by more than {BAD:g} pixel", "bad_pixels", self.bad),
            ]
        for _, _, log, metrics in measures:
            for name, metric in metrics.items():
                if isinstance(metric, Values):
                    self.log_mean(f"test/{log}/{name}", metric.compute())
                else:
                    self.log(f"test/{log}/{name}", metric.compute())
        self.measure, *self.further_measures = (
            Measure(name, unit, f"test/{log}/model", {other: f"test/{log}/{other}" for other in list(metrics)[1:]})
            for name, unit, log, metrics in measures
        )

    def pictures(self, batch: StereoBatch) -> dict[str, Tensor]:
        """Draw the paper's figure 7 for the first pairs of a batch: uint8 (3, H', W') by name."""
        first = StereoBatch(*(part[:SHOWN] for part in batch[:4]), batch.segment)
        return {"pairs": image_sheet(self._draw(first))}

    def predict_step(self, batch: StereoBatch, batch_idx: int) -> dict[str, Tensor]:
        """Draw a figure of every pair, by file name."""
        examples = self.trainer.datamodule.examples["predict"]
        numbers = range(batch.segment.problem, len(examples), self.trainer.world_size)
        rows = self._draw(batch)
        return {f"{examples[i].name}.png": image_sheet([row], scale=4) for i, row in zip(numbers, rows, strict=False)}

    def _draw(self, batch: StereoBatch) -> list[dict[str, Tensor]]:
        """Return the images (3, H, W) of each pair by name."""
        predictions, filters = self(batch.left)
        rows = []
        for i, (left, right, prediction) in enumerate(zip(batch.left, batch.right, predictions, strict=True)):
            greys = {"left": left, "prediction": prediction, "right": right, "|error|": (prediction - right).abs()}
            rows.append({name: image.expand(3, -1, -1) for name, image in greys.items()})
            if not self.hparams.dynamic:
                continue
            reach = self.hparams.kernel_width // 2
            rows[i]["disparity"] = disparity_image(disparities(filters[i : i + 1])[0], reach)
            if batch.disparity.isfinite().any():
                rows[i]["true disparity"] = disparity_image(batch.disparity[i], reach)
            rows[i]["entropy"] = entropies(filters[i : i + 1])[0].expand(3, -1, -1)
            scale = torch.linspace(reach, 0, left.shape[1])[None, :, None].expand(1, -1, left.shape[2] // 8)
            rows[i][f"0 to {reach} px"] = disparity_image(scale, reach)
        return rows


def disparity_image(disparity: Tensor, largest: float) -> Tensor:
    """Return a disparity (1, H, W) as colours for 0 to ``largest``, (3, H, W); unknown values are grey."""
    from matplotlib import colormaps

    values = disparity[0].detach().float().cpu()
    colours = torch.from_numpy(colormaps["viridis"](values.nan_to_num(0).numpy() / largest)[..., :3]).float()
    return torch.where(values.isnan()[..., None], 0.6, colours).movedim(-1, 0)
