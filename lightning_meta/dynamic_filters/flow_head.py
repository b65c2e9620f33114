"""Frame prediction as pretraining for optical flow (De Brabandere et al. 2016, section 5).

The paper suggests that its networks can be pretrained for optical flow without labels, but does not measure it. Here a
head that predicts the flow of the next frame is trained with true flow, on a trained network and on an untrained one.
"""

import torch
from torch import Tensor, nn

from lightning_meta.dynamic_filters.frame_scores import end_point_error
from lightning_meta.errors import InputError
from lightning_meta.running.learning_rates import cosine
from lightning_meta.running.measures import Measure

_UNIT = "px, first predicted frame"
MEASURES = (
    Measure("flow error", _UNIT, "test/flow_error", {"no motion": "test/flow_error_no_motion"}),
    Measure(
        "flow error of a trained head",
        _UNIT,
        "test/flow_head",
        {"of one on a fresh network": "test/flow_head_fresh", "no motion": "test/flow_error_no_motion"},
    ),
)


class FlowNetwork(nn.Module):
    """A ``FramePredictor`` with a last layer that predicts flow instead of filters."""

    def __init__(self, predictor: nn.Module):
        super().__init__()
        self.predictor = predictor
        *_, last = predictor.decoder
        self.head = nn.Conv2d(last.in_channels, 2, 1)
        nn.init.zeros_(self.head.weight)  # predict no motion at first
        nn.init.zeros_(self.head.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Return where each pixel of the frame after ``frames`` (B, T, 1, H, W) comes from, (B, 2, H, W) in pixels."""
        T = frames.shape[1]
        _, _, (hidden, _) = self.predictor(frames, 0, T, T + 1)  # stops before the first prediction: nothing is decoded
        return self.head(self.predictor.decoder[:-1](hidden))


def train_heads(model) -> dict[str, FlowNetwork]:
    """Train one ``FlowNetwork`` from the trained network of a ``VideoPrediction`` and one from an untrained network.

    Adam minimises the mean end-point error over all layers. Both see the same ``flow_head_steps`` batches of training
    sequences; the learning rate, 1e-3, falls along a cosine.

    Raises:
        InputError: If the true flow of the training sequences is not known.
    """
    steps, data = model.hparams.flow_head_steps, model.trainer.datamodule
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(data.hparams.seed)
        trained, fresh = model.new_predictor(), model.new_predictor()
        trained.load_state_dict(model.predictor.state_dict())
        networks = {"flow_head": FlowNetwork(trained), "flow_head_fresh": FlowNetwork(fresh)}
        for network in networks.values():
            network.to(model.device, model.dtype)
            optimizer = torch.optim.Adam(network.parameters(), 1e-3)
            for step, batch in enumerate(data.flow_batches(steps, model.hparams.input_frames)):
                if batch.flow is None:
                    raise InputError(
                        "model.flow_head_steps: the true flow of these sequences is not known: set it to 0, or use "
                        "--data.source stand-in"
                    )
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * cosine(steps)(step)
                frames, flow = (x.to(model.device, model.dtype) for x in (batch.frames, batch.flow))
                errors, _ = end_point_error(network(frames[:, :-1]), flow[:, -1])
                optimizer.zero_grad()
                errors.mean().backward()
                optimizer.step()
    return networks
