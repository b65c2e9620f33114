"""Is what predicts frames a start for flow? (De Brabandere et al. 2016, section 5)

The paper closes with the claim that its networks can be pretrained without labels for optical flow, and measures
nothing. Here a head for the flow of the next frame is trained with true flow, on a trained network and on a fresh one.
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
    """A ``FramePredictor`` whose last layer, which writes filters, gives way to one that writes flow."""

    def __init__(self, predictor: nn.Module):
        super().__init__()
        self.predictor = predictor
        *_, last = predictor.decoder
        self.head = nn.Conv2d(last.in_channels, 2, 1)
        nn.init.zeros_(self.head.weight)  # no motion
        nn.init.zeros_(self.head.bias)

    def forward(self, frames: Tensor) -> Tensor:
        """Where each pixel of the frame after these (B, T, 1, H, W) comes from, (B, 2, H, W) in pixels."""
        T = frames.shape[1]
        _, _, (hidden, _) = self.predictor(frames, 0, T, T + 1)  # one frame more is to come, so nothing is decoded
        return self.head(self.predictor.decoder[:-1](hidden))


def train_heads(model) -> dict[str, FlowNetwork]:
    """``FlowNetwork`` on the trained network of a ``VideoPrediction`` and on a fresh one, both trained alike.

    All layers are trained with Adam on the mean end-point error, over the same ``flow_head_steps`` batches of the
    model's training sequences; the learning rate, 1e-3, falls along a cosine.

    Raises:
        InputError: There is no true flow.
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
