"""Video prediction with dynamic local filters (De Brabandere et al. 2016, sections 3 and 4.1).

Shapes: B sequences, T frames, H rows, W columns, K*K taps; one grey channel.
"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_meta import figures
from lightning_meta.dynamic_filters.data import Clips
from lightning_meta.dynamic_filters.layers import dynamic_local_filter, expected_displacement
from lightning_meta.errors import InputError
from lightning_meta.learning_rate import by_step, cosine
from lightning_meta.reports import Measure

EPSILON = torch.finfo(torch.float32).eps  # where the paper clips predictions before the cross-entropy


# What one step leaves to the next: hidden (B, 4*width, H/2, W/2); the newest prediction (B, 1, H, W). A plain tuple,
# since checkpoints hold it and are loaded without classes.
FrameState = tuple[Tensor, Tensor]


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy in nats a frame: summed over a frame's pixels, averaged over the rest.

    Predictions are clipped to [eps, 1 - eps] with float32's epsilon, as published; in float32 whatever the precision.

    Args:
        prediction: (..., C, H, W).
        target: The same shape, values in [0, 1].
    """
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).clamp(EPSILON, 1 - EPSILON)
    # Not F.binary_cross_entropy, which stops at a NaN before anyone can say what to do about it.
    loss = -(target * prediction.log() + (1 - target) * (1 - prediction).log())
    return loss.sum((-3, -2, -1)).mean()


class FramePredictor(nn.Module):
    """The next frame is the newest one, filtered with filters that a recurrent network writes for every pixel.

    Args:
        width: Channels of the first layers; the others have 2 and 4 times as many. The paper: 32.
        kernel_size: Of the generated filters, odd; the farthest that a pixel can come is half of it.
        dynamic: False gives the paper's baseline: the same network with one convolution in the filters' place.
        gain: Of the weights' start, uniform within gain * sqrt(3 / fan-in). The paper: 1, with which signals fade from
            layer to layer; sqrt(2) keeps them up.
    """

    def __init__(self, width: int = 32, kernel_size: int = 9, dynamic: bool = True, gain: float = 1.0):
        super().__init__()
        taps = kernel_size**2
        self.hidden_channels, self.kernel_size, self.dynamic = 4 * width, kernel_size, dynamic
        self.encoder = _convolutions(1, width, (width, 2), 2 * width, 2 * width, 4 * width)
        self.transition = _convolutions(4 * width, 4 * width, 4 * width)
        self.decoder = nn.Sequential(
            _convolutions(4 * width, 2 * width, 2 * width),
            nn.Upsample(scale_factor=2),
            _convolutions(2 * width, 2 * width, 2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.LeakyReLU(0.01),
            nn.Conv2d(4 * width, taps, 1),
        )
        self.output = nn.Identity() if dynamic else nn.Conv2d(taps, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                module.weight.data *= gain
                nn.init.zeros_(module.bias)

    def encode(self, frames: Tensor) -> Tensor:
        """What a frame (B, 1, H, W) has to say to the state, (B, 4*width, H/2, W/2)."""
        return self.encoder(frames)

    def advance(self, code: Tensor, hidden: Tensor) -> Tensor:
        """The state after the frame of that code."""
        return code + self.transition(hidden)

    def predict(self, hidden: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """The frame after ``frame`` (B, 1, H, W), and the filters' logits (B, K*K, H, W) that make it."""
        planes = self.decoder(hidden)
        if self.dynamic:
            return dynamic_local_filter(frame, planes, self.kernel_size), planes
        return self.output(planes), planes

    def forward(
        self, frames: Tensor, start: int, stop: int, inputs: int, state: FrameState | None = None
    ) -> tuple[Tensor, Tensor, FrameState]:
        """Runs steps ``start <= t < stop``. Step t reads frame t: a true one where t < inputs, else its own last.

        Steps before ``inputs - 1`` only fill the state: what they would predict is known, so nothing is decoded.

        Args:
            frames: (B, T, 1, H, W), frame ``start`` first; what lies past the inputs is not read.
            start: First step.
            stop: One past the last step.
            inputs: Number of true frames at the head of a sequence.
            state: From the step before; None at a sequence's head.

        Returns:
            Predictions of frames ``max(start + 1, inputs)`` to ``stop``, (B, T', 1, H, W); the filters' logits of
            the first of them, (B, K*K, H, W); the state after the last step.
        """
        B, _, _, H, W = frames.shape
        known = frames[:, : max(inputs - start, 0)][:, : stop - start]
        # All true frames through the encoder at once: it does not depend on the state.
        codes = self.encode(known.flatten(0, 1)).unflatten(0, (B, -1)).unbind(1) if known.shape[1] else ()
        hidden, frame = state or (frames.new_zeros(B, self.hidden_channels, H // 2, W // 2), None)
        predictions, first_filters = [], None
        for t in range(start, stop):
            if t < inputs:
                code, frame = codes[t - start], frames[:, t - start]
            else:
                code = self.encode(frame)
            hidden = self.advance(code, hidden)
            if t >= inputs - 1:
                frame, filters = self.predict(hidden, frame)
                predictions.append(frame)
                first_filters = filters if first_filters is None else first_filters
        return torch.stack(predictions, 1), first_filters, (hidden, frame)


class VideoPrediction(LightningModule):
    """Trains a ``FramePredictor`` to go on with a video for as long as a segment of ``MetaSchedule`` reaches.

    From its first prediction on it reads its own frames; gradients run through all of them; there is no loss on the
    frames that it is given.

    Args:
        width: Channels of the first layers (paper: 32).
        kernel_size: Of the generated filters (paper: 9).
        dynamic: False trains the paper's baseline of equal size, without generated filters.
        gain: Of the weights' start (paper: 1).
        input_frames: Frames that the model is given (paper: 10).
        lr: Adam's learning rate (paper: 1e-3; its baseline was trained with 1e-4).
        lr_halved_every: Optimizer steps after which the learning rate is halved (paper: 4000). None: it falls to zero
            along a cosine over ``trainer.max_steps``.
        beta2: Adam's average of squared gradients (paper: 0.999).
        compile: Compile the network's parts with ``torch.compile``.
    """

    def __init__(
        self,
        width: int = 32,
        kernel_size: int = 9,
        dynamic: bool = True,
        gain: float = 1.0,
        input_frames: int = 10,
        lr: float = 1e-3,
        lr_halved_every: int | None = 4000,
        beta2: float = 0.999,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.measure = Measure(
            "cross-entropy",
            "nats a frame",
            metric="test/cross_entropy",
            baselines={
                "copy the last frame": "test/cross_entropy_copy_last_frame",
                "mean frame": "test/cross_entropy_mean_frame",
            },
        )
        self.predictor = FramePredictor(width, kernel_size, dynamic, gain)
        self.predictor.to(memory_format=torch.channels_last)
        self.carry: FrameState | None = None
        self.losses = nn.ModuleDict({name: MeanMetric() for name in ("val", "test", "copy_last_frame", "mean_frame")})

    def configure_model(self) -> None:
        if self.hparams.compile:  # methods: nn.Sequential.compile() compiles nothing, its frames being torch's own
            for name in ("encode", "advance", "predict"):
                setattr(self.predictor, name, torch.compile(getattr(self.predictor, name)))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr, betas=(0.9, self.hparams.beta2))
        return by_step(optimizer, self._lr_factor)

    def _lr_factor(self, step: int) -> float:
        if self.hparams.lr_halved_every:
            return 0.5 ** (step // self.hparams.lr_halved_every)
        return cosine(step, self.trainer.max_steps)

    def forward(self, batch: Clips, state: FrameState | None = None) -> tuple[Tensor, Tensor, FrameState]:
        """Runs the batch's segment; see ``FramePredictor.forward``."""
        start, stop = batch.segment.start, batch.segment.stop
        if stop < self.hparams.input_frames:
            raise InputError(
                f"steps {start} to {stop - 1} predict nothing, the first {self.hparams.input_frames} frames being "
                f"given: schedule.unroll and schedule.horizon must be at least {self.hparams.input_frames}"
            )
        return self.predictor(batch.frames, start, stop, self.hparams.input_frames, state)

    def training_step(self, batch: Clips, batch_idx: int) -> Tensor:
        predictions, _, self.carry = self(batch, self.carry)
        loss = cross_entropy(predictions, batch.frames[:, -predictions.shape[1] :])
        self.log("train/cross_entropy", loss, prog_bar=True)
        return loss / batch.frames[0, 0].numel()  # the paper's: a mean over pixels

    def validation_step(self, batch: Clips, batch_idx: int) -> None:
        predictions, _, _ = self(batch)
        self._score("val", "val/cross_entropy", predictions, batch)

    def on_test_start(self) -> None:
        self.mean_frame = self.trainer.datamodule.mean_frame().to(self.device)

    def test_step(self, batch: Clips, batch_idx: int) -> None:
        predictions, _, _ = self(batch)
        last_frame = batch.frames[:, self.hparams.input_frames - 1, None].expand_as(predictions)
        self._score("test", "test/cross_entropy", predictions, batch)
        self._score("copy_last_frame", "test/cross_entropy_copy_last_frame", last_frame, batch)
        self._score("mean_frame", "test/cross_entropy_mean_frame", self.mean_frame.expand_as(predictions), batch)

    def _score(self, metric: str, name: str, predictions: Tensor, batch: Clips) -> None:
        loss = cross_entropy(predictions, batch.frames[:, self.hparams.input_frames :])
        self.losses[metric].update(loss, weight=len(predictions))
        self.log(name, self.losses[metric], prog_bar=metric == "val")

    def pictures(self, batch: Clips) -> dict[str, Tensor]:
        """The paper's figures 5 and 7 for the batch's first sequence, uint8 (3, H', W')."""
        first = Clips(batch.frames[:1], batch.segment)
        return {name: picture for name, picture in self._draw(first)[0].items() if picture.ndim == 3}

    def predict_step(self, batch: Clips, batch_idx: int) -> dict[str, Tensor]:
        """A film strip, an animation and the flow of every sequence, by file name."""
        if batch.frames.shape[1] < self.hparams.input_frames:
            raise InputError(
                f"the clip has {batch.frames.shape[1]} frames; the model goes on from {self.hparams.input_frames}: "
                "give a longer one"
            )
        drawn = {}
        for j, pictures in enumerate(self._draw(batch)):
            number = batch.segment.problem + j * self.trainer.world_size
            for name, picture in pictures.items():
                drawn[f"{number:03d}_{name}.{'png' if picture.ndim == 3 else 'gif'}"] = picture
        return drawn

    def _draw(self, batch: Clips) -> list[dict[str, Tensor]]:
        inputs = self.hparams.input_frames
        predictions, filters, _ = self(batch)
        flows = expected_displacement(filters, self.hparams.kernel_size) if self.hparams.dynamic else filters
        drawn = []
        for frames, prediction, flow in zip(batch.frames, predictions, flows, strict=True):
            frames, prediction = frames[:, 0].float().cpu(), prediction[:, 0].float().clamp(0, 1).cpu()
            given, truth = frames[:inputs], frames[inputs:]
            times = range(inputs + 1, inputs + 1 + len(prediction))
            rows = {"input": given, "prediction": prediction, "truth": truth}
            columns = {"input": range(1, inputs + 1), "prediction": times, "truth": times[: len(truth)]}
            if not len(truth):  # a clip that ends where the prediction begins
                del rows["truth"], columns["truth"]
            pictures = {
                "frames": figures.film_strip(rows, columns),
                "animation": figures.animation(given, prediction, truth if len(truth) else None),
            }
            if self.hparams.dynamic:
                pictures["flow"] = figures.flow_figure(
                    given[-1],
                    flow.float().cpu(),
                    prediction[0],
                    truth[0] if len(truth) else None,
                    max_flow=self.hparams.kernel_size // 2,
                )
            drawn.append(pictures)
        return drawn


def _convolutions(channels: int, *outputs: int | tuple[int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for output in outputs:
        out_channels, stride = output if isinstance(output, tuple) else (output, 1)
        layers += [nn.Conv2d(channels, out_channels, 3, stride, padding=1), nn.LeakyReLU(0.01)]
        channels = out_channels
    return nn.Sequential(*layers)
