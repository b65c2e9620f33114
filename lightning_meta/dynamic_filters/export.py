"""A trained video predictor as a program of PyTorch's own operators, which runs where this package is not installed.

Shapes: B sequences, T frames, H x W pixels; letters of the operator as in ``local_filter.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_meta.dynamic_filters.ops.local_filter  # noqa: F401 - the operator has to be known


class Forecaster(nn.Module):
    """Frames in, the frames that follow out.

    Args:
        predictor: A ``FramePredictor``, such as ``VideoPrediction.predictor``.
        predictions: How many frames to predict.
    """

    def __init__(self, predictor: nn.Module, predictions: int):
        super().__init__()
        self.predictor, self.predictions = predictor, predictions

    def forward(self, frames: Tensor) -> Tensor:
        """The frames (B, predictions, 1, H, W) after these (B, T, 1, H, W), values in [0, 1]."""
        T = frames.shape[1]
        return self.predictor(frames, 0, T + self.predictions - 1, T)[0]


def export(forecaster: Forecaster, frames: Tensor) -> torch.export.ExportedProgram:
    """The forecaster for as many frames of that size, and any number of sequences.

    ``torch.export.save`` writes the program, ``torch.onnx.export(program, dynamo=True)`` makes ONNX of it.

    Args:
        forecaster: In its evaluation mode.
        frames: (B, T, 1, H, W), B at least 2.
    """
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(forecaster, (frames,), dynamic_shapes={"frames": {0: batch}})
        return program.run_decompositions({torch.ops.lightning_meta.local_filter.default: _as_the_authors_do})


def _as_the_authors_do(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """``local_filter`` as a convolution with K * K one-hot filters, and a sum; without what the gradient needs."""
    B, G, kh, kw, H, W = filters.shape
    C, taps = x.shape[2], kh * kw
    p = filters.flatten(2, 3)
    p = p.softmax(2, dtype=torch.float32).to(x.dtype) if softmax else p.to(x.dtype)
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, kh, kw)
    windows = F.conv2d(x.reshape(B * G * C, 1, H + kh - 1, W + kw - 1), one_hot).view(B, G, C, taps, H, W)
    return (windows * p[:, :, None]).sum(3), x.new_zeros(0)
