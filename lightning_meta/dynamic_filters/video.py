"""Video prediction with dynamic local filters (De Brabandere et al. 2016, sections 3, 4.1 and 4.2).

Shapes: B sequences, T frames, H rows, W columns, K*K taps; one grey channel.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_meta.drawing.sheets import film_strip
from lightning_meta.dynamic_filters import flow_head
from lightning_meta.dynamic_filters.figures import animation, flow_figure
from lightning_meta.dynamic_filters.frame_scores import SCORES, end_point_error, frame_scores, squared_error
from lightning_meta.dynamic_filters.layers import expected_displacement
from lightning_meta.dynamic_filters.moving_mnist_data import SIZE, Clips
from lightning_meta.dynamic_filters.networks import Convolution, FilteredImage, convolutions, decoder, initialise
from lightning_meta.errors import InputError
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, halved
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean

EPSILON = torch.finfo(torch.float32).eps  # the paper clips predictions to [eps, 1 - eps] before the cross-entropy

# The recurrent state: hidden (B, C, H/2, W/2) and the newest frames, true or predicted, (B, F, H, W) with F at most the
# number that the encoder reads. It is a plain tuple because checkpoints, which are loaded without classes, contain it.
FrameState = tuple[Tensor, Tensor]


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy in nats per frame: summed over pixels, averaged over frames, (B,).

    As in the paper, predictions are clipped to [eps, 1 - eps] with float32's epsilon. Computed in float32 or better.

    Args:
        prediction: Predicted frames (B, T, C, H, W).
        target: True frames of the same shape, values in [0, 1].

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.video import cross_entropy
        >>> cross_entropy(torch.full((1, 3, 1, 2, 2), 0.5), torch.ones(1, 3, 1, 2, 2))  # 4 log 2
        tensor([2.7726])
    """
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).clamp(EPSILON, 1 - EPSILON)
    # F.binary_cross_entropy would raise an obscure error for NaN; here it reaches the loss, which reports it.
    loss = -(target * prediction.log() + (1 - target) * (1 - prediction).log())
    return loss.sum((2, 3, 4)).mean(1)


LOSSES = {
    "cross_entropy": cross_entropy,
    "squared_error": lambda prediction, target: squared_error(prediction, target).mean(1),
}
UNITS = {"cross_entropy": ("cross-entropy", "nats a frame"), "squared_error": ("squared error", "sum over a frame")}
BASELINES = {"copy the last frame": "copy_last_frame_", "mean frame": "mean_frame_"}


class Architecture(NamedTuple):
    """Number of input frames, and channels of the layers as multiples of the network's width."""

    frames: int  # newest frames that the encoder reads at once
    encoder: tuple[int, ...]  # the second layer halves the resolution
    before: tuple[int, ...]  # layers of the decoder before it restores the resolution
    after: tuple[int, ...]  # and after


ARCHITECTURES = {
    "moving_mnist": Architecture(frames=1, encoder=(1, 1, 2, 2, 4), before=(2, 2), after=(2, 2)),
    "highway": Architecture(frames=2, encoder=(1, 1, 2, 2), before=(2,), after=(1, 2)),
}


class FramePredictor(nn.Module):
    """Predicts the next frame by filtering the newest one; a recurrent network generates a filter for every pixel.

    Args:
        layout: Architecture, a key of ``ARCHITECTURES``: the paper's network for Moving MNIST or for highways.
        width: Channels of the first layers (paper: 32).
        kernel_size: Size of the generated filters, odd. A pixel can move by at most half of it.
        dynamic: False gives the paper's baseline: the same network with a convolution in place of the filters.
        dynamic_bias: Also generate a plane that is added to the frame before filtering.
        untied_bias: Height and width of the frames, to give every pixel its own bias in the first layer. None: one bias
            per channel.
        gain: Initial weights are uniform within gain * sqrt(3 / fan-in). With the paper's gain of 1, signals fade from
            layer to layer; sqrt(2) preserves them.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.video import FramePredictor
        >>> predictor = FramePredictor(width=4, kernel_size=5)
        >>> frames = torch.rand(2, 3, 1, 16, 16)  # three given frames
        >>> predictions, filters, state = predictor(frames, start=0, stop=4, inputs=3)
        >>> predictions.shape, filters.shape
        (torch.Size([2, 2, 1, 16, 16]), torch.Size([2, 25, 16, 16]))
    """

    def __init__(
        self,
        layout: str = "moving_mnist",
        width: int = 32,
        kernel_size: int = 9,
        dynamic: bool = True,
        dynamic_bias: bool = False,
        untied_bias: tuple[int, int] | None = None,
        gain: float = 1.0,
    ):
        super().__init__()
        newest, encoder, before, after = ARCHITECTURES[layout]
        first, second, *others = (width * multiple for multiple in encoder)
        self.newest, self.hidden_channels = newest, others[-1]
        self.encoder = convolutions(
            newest, Convolution(first, untied=untied_bias), Convolution(second, stride=2), *map(Convolution, others)
        )
        self.transition = convolutions(self.hidden_channels, *2 * [Convolution(self.hidden_channels)])
        self.output = FilteredImage((kernel_size, kernel_size), dynamic, dynamic_bias)
        before, after = ([width * multiple for multiple in part] for part in (before, after))
        self.decoder = decoder(self.hidden_channels, before, after, 4 * width, self.output.planes)
        initialise(self, gain)

    def encode(self, frames: Tensor) -> Tensor:
        """Return the code (B, C, H/2, W/2) of the newest frames (B, F, H, W)."""
        return self.encoder(frames)

    def advance(self, code: Tensor, hidden: Tensor) -> Tensor:
        """Return the next hidden state (B, C, H/2, W/2)."""
        return code + self.transition(hidden)

    def predict(self, hidden: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frame that follows ``frame`` (B, 1, H, W), and the filters' logits (B, K*K, H, W)."""
        planes = self.decoder(hidden)
        return self.output(frame, planes), planes[:, : self.output.taps]

    def forward(
        self, frames: Tensor, start: int, stop: int, inputs: int, state: FrameState | None = None
    ) -> tuple[Tensor, Tensor, FrameState]:
        """Run steps ``start <= t < stop``. Step t reads frame t: the true one if t < inputs, else its own prediction.

        Steps before ``inputs - 1`` only update the state: the frame that they would predict is given, so nothing is
        decoded. Steps that would have to read frames before the first one are skipped.

        Args:
            frames: (B, T, 1, H, W), beginning with frame ``start``. Frames from ``inputs`` on are not read.
            start: First step.
            stop: One past the last step.
            inputs: Number of true frames at the beginning of a sequence.
            state: State after step ``start - 1``; None at the beginning of a sequence.

        Returns:
            Predictions of frames ``max(start + 1, inputs)`` to ``stop``, (B, T', 1, H, W); the filters' logits of the
            first of them, (B, K*K, H, W); the state after the last step.
        """
        B, _, _, H, W = frames.shape
        hidden, recent = state or (
            frames.new_zeros(B, self.hidden_channels, H // 2, W // 2),
            frames.new_empty(B, 0, H, W),
        )
        known = frames[:, : max(inputs - start, 0), 0][:, : stop - start]
        # The encoder does not depend on the state, so it encodes all true frames at once.
        joined = torch.cat([recent[:, max(recent.shape[1] - self.newest + 1, 0) :], known], 1)
        windows = joined.unfold(1, self.newest, 1).movedim(-1, 2) if joined.shape[1] >= self.newest else joined[:, :0]
        codes = self.encode(windows.flatten(0, 1)).unflatten(0, (B, -1)).unbind(1) if windows.shape[1] else ()
        first = start + known.shape[1] - len(codes)
        predictions, first_filters = [], None
        for t in range(start, stop):
            if t < inputs:
                recent = torch.cat([recent, known[:, t - start, None]], 1)[:, -self.newest :]
                if t < first:
                    continue
                code = codes[t - first]
            else:
                code = self.encode(recent)
            hidden = self.advance(code, hidden)
            if t >= inputs - 1:
                frame, filters = self.predict(hidden, recent[:, -1:])
                recent = torch.cat([recent, frame], 1)[:, -self.newest :]
                predictions.append(frame)
                first_filters = filters if first_filters is None else first_filters
        return torch.stack(predictions, 1) if predictions else frames[:, :0], first_filters, (hidden, recent)


class VideoPrediction(Experiment):
    """Trains a ``FramePredictor`` to predict the frames that follow the given ones, up to the end of a segment.

    After its first prediction the network reads its own predictions, and gradients pass through all of them. Given
    frames have no loss.

    Args:
        layout: Architecture of the network: the paper's for Moving MNIST or the paper's for highways.
        width: Channels of the first layers (paper: 32).
        kernel_size: Size of the generated filters (paper: 9; highways: 11).
        dynamic: False trains the paper's baseline of equal size, which generates no filters.
        dynamic_bias: Also generate a plane that is added to the frame before filtering (paper: for highways).
        untied_bias: Give every pixel its own bias in the first layer, for frames of 64x64 (paper: for highways).
        loss: ``cross_entropy`` (paper: Moving MNIST) or ``squared_error`` (paper: highways).
        gain: Scale of the initial weights (paper: 1).
        input_frames: Number of given frames (paper: 10; highways: 3).
        lr: Learning rate of Adam (paper: 1e-3; its baseline on Moving MNIST was trained with 1e-4).
        lr_halved_every: Halve the learning rate after every so many optimizer steps (paper: 4000). None: let it fall to
            zero along a cosine over ``trainer.max_steps``.
        beta2: Decay rate of Adam's average of squared gradients (paper: 0.999).
        flow_head_steps: Number of steps, in the test, that train a head for optical flow on the trained network and on
            an untrained one (see ``flow_head``). 0: train none.
        compile: Compile the network's parts with ``torch.compile``.
    """

    def __init__(
        self,
        layout: Literal["moving_mnist", "highway"] = "moving_mnist",
        width: int = 32,
        kernel_size: int = 9,
        dynamic: bool = True,
        dynamic_bias: bool = False,
        untied_bias: bool = False,
        loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
        gain: float = 1.0,
        input_frames: int = 10,
        lr: float = 1e-3,
        lr_halved_every: int | None = 4000,
        beta2: float = 0.999,
        flow_head_steps: int = 0,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.predictor = self.new_predictor()
        if input_frames < self.predictor.newest:
            raise InputError(
                f"model.input_frames is {input_frames}, but the {layout} network reads {self.predictor.newest} frames "
                f"at once: raise it to {self.predictor.newest} or more"
            )
        self.measure = _measure(loss, *UNITS[loss])
        self.further_measures = tuple(_measure(score, *unit) for score, unit in SCORES.items()) + flow_head.MEASURES
        names = [f"{who}{score}" for who in ("", *BASELINES.values()) for score in (loss, *SCORES)]
        names += ["flow_error", "flow_error_no_motion", "flow_head", "flow_head_fresh"]
        self.means = nn.ModuleDict({name: Mean() for name in names})
        self.val_loss = Mean()

    def new_predictor(self) -> FramePredictor:
        """Return a network with initial weights."""
        h = self.hparams
        untied = (SIZE, SIZE) if h.untied_bias else None
        predictor = FramePredictor(h.layout, h.width, h.kernel_size, h.dynamic, h.dynamic_bias, untied, h.gain)
        return predictor.to(memory_format=torch.channels_last)

    def configure_model(self) -> None:
        if self.hparams.compile:  # nn.Sequential.compile() would compile nothing: torch.compile skips torch's own code
            for name in ("encode", "advance", "predict"):
                setattr(self.predictor, name, torch.compile(getattr(self.predictor, name)))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr, betas=(0.9, self.hparams.beta2))
        every = self.hparams.lr_halved_every
        return by_step(optimizer, halved(every) if every else cosine(self.trainer.max_steps))

    def forward(self, batch: Clips, state: FrameState | None = None) -> tuple[Tensor, Tensor, FrameState]:
        """Run the segment of a batch; see ``FramePredictor.forward``."""
        start, stop = batch.segment.start, batch.segment.stop
        if stop < self.hparams.input_frames:
            raise InputError(
                f"steps {start} to {stop - 1} predict nothing because the first {self.hparams.input_frames} frames are "
                f"given: schedule.unroll and schedule.horizon must be at least {self.hparams.input_frames}"
            )
        return self.predictor(batch.frames, start, stop, self.hparams.input_frames, state)

    def training_step(self, batch: Clips, batch_idx: int) -> Tensor:
        predictions, _, self.carry = self(batch, self.carry)
        loss = LOSSES[self.hparams.loss](predictions, batch.frames[:, -predictions.shape[1] :]).mean()
        self.log(f"train/{self.hparams.loss}", loss, prog_bar=True)
        return loss / batch.frames[0, 0].numel()  # the paper minimises the mean over pixels

    def validation_step(self, batch: Clips, batch_idx: int) -> None:
        predictions, _, _ = self(batch)
        loss = LOSSES[self.hparams.loss](predictions, batch.frames[:, self.hparams.input_frames :])
        self.val_loss.update(loss)
        self.log(f"val/{self.hparams.loss}", self.val_loss, prog_bar=True)

    def on_test_start(self) -> None:
        self.mean_frame = self.trainer.datamodule.mean_frame().to(self.device)
        self.flow_heads = flow_head.train_heads(self) if self.hparams.flow_head_steps else {}

    def test_step(self, batch: Clips, batch_idx: int) -> None:
        inputs = self.hparams.input_frames
        predictions, filters, _ = self(batch)
        target = batch.frames[:, inputs:]
        compared = {
            "": predictions,
            "copy_last_frame_": batch.frames[:, inputs - 1, None].expand_as(target),
            "mean_frame_": self.mean_frame.expand_as(target),
        }
        for who, frames in compared.items():
            scores = {self.hparams.loss: LOSSES[self.hparams.loss](frames, target), **frame_scores(frames, target)}
            for name, score in scores.items():
                self._average(f"{who}{name}", score)
        if batch.flow is not None:
            truth = batch.flow[:, inputs]
            guesses = {name: head(batch.frames[:, :inputs]).float() for name, head in self.flow_heads.items()}
            if self.hparams.dynamic:
                guesses["flow_error"] = expected_displacement(filters, self.hparams.kernel_size)
            for name, guess in {**guesses, "flow_error_no_motion": torch.zeros_like(truth)}.items():
                self._average(name, *end_point_error(guess, truth))

    def _average(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        self.means[name].update(values, weights)
        self.log(f"test/{name}", self.means[name])

    def pictures(self, batch: Clips) -> dict[str, Tensor]:
        """Draw the paper's figures 5 and 7 for the first sequence of a batch: uint8 (3, H', W') by name."""
        first = Clips(batch.frames[:1], batch.segment)
        return {name: image for name, image in self._draw(first)[0].items() if image.ndim == 3}

    def predict_step(self, batch: Clips, batch_idx: int) -> dict[str, Tensor]:
        """Draw a film strip, an animation and the flow of every sequence, by file name."""
        if batch.frames.shape[1] < self.hparams.input_frames:
            raise InputError(
                f"the clip gives {batch.frames.shape[1]} frames, but the model needs {self.hparams.input_frames}: "
                "give a longer one"
            )
        files = {}
        for j, images in enumerate(self._draw(batch)):
            number = batch.segment.problem + j * self.trainer.world_size
            for name, image in images.items():
                files[f"{number:03d}_{name}.{'png' if image.ndim == 3 else 'gif'}"] = image
        return files

    def _draw(self, batch: Clips) -> list[dict[str, Tensor]]:
        """Return the figures of each sequence by name; an animation is (T, 3, H', W')."""
        inputs = self.hparams.input_frames
        predictions, filters, _ = self(batch)
        flows = expected_displacement(filters, self.hparams.kernel_size) if self.hparams.dynamic else filters
        drawings = []
        for frames, prediction, flow in zip(batch.frames, predictions, flows, strict=True):
            frames, prediction = frames[:, 0].float().cpu(), prediction[:, 0].float().clamp(0, 1).cpu()
            given, truth = frames[:inputs], frames[inputs:]
            times = range(inputs + 1, inputs + 1 + len(prediction))
            rows, columns = {"input": given, "prediction": prediction}, {"input": range(1, inputs + 1)}
            if len(truth):  # a user's clip may end with the given frames
                rows |= {"truth": truth, "|error|": (prediction[: len(truth)] - truth).abs()}
            columns |= {name: times[: len(rows[name])] for name in rows if name != "input"}
            images = {
                "frames": film_strip(rows, columns),
                "animation": animation(given, prediction, truth if len(truth) else None),
            }
            if self.hparams.dynamic:
                images["flow"] = flow_figure(
                    given[-1],
                    flow.float().cpu(),
                    prediction[0],
                    truth[0] if len(truth) else None,
                    max_flow=self.hparams.kernel_size // 2,
                )
            drawings.append(images)
        return drawings


def _measure(score: str, name: str, unit: str) -> Measure:
    return Measure(name, unit, f"test/{score}", {who: f"test/{prefix}{score}" for who, prefix in BASELINES.items()})
