"""Export a trained video predictor as a program of PyTorch's own operators, which runs without this package.

Shapes: B sequences, T frames, H x W pixels; for the operator see ``local_filter.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_meta.dynamic_filters.ops.local_filter  # noqa: F401 - registers the operator


class Forecaster(nn.Module):
    """Predicts the frames that follow the given ones.

    Args:
        predictor: A ``FramePredictor``, such as ``VideoPrediction.predictor``.
        predictions: Number of frames to predict.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.export import Forecaster
        >>> from lightning_meta.dynamic_filters.video import FramePredictor
        >>> Forecaster(FramePredictor(width=4), predictions=5)(torch.rand(2, 3, 1, 16, 16)).shape
        torch.Size([2, 5, 1, 16, 16])
    """

    def __init__(self, predictor: nn.Module, predictions: int):
        super().__init__()
        self.predictor, self.predictions = predictor, predictions

    def forward(self, frames: Tensor) -> Tensor:
        """Return the frames (B, predictions, 1, H, W) that follow ``frames`` (B, T, 1, H, W), values in [0, 1]."""
        T = frames.shape[1]
        return self.predictor(frames, 0, T + self.predictions - 1, T)[0]


def export(forecaster: Forecaster, frames: Tensor) -> torch.export.ExportedProgram:
    """Export a forecaster for any number of sequences with the number and size of frames of an example.

    ``torch.export.save`` writes the program to a file; ``torch.onnx.export(program, dynamo=True)`` converts it to ONNX.

    Args:
        forecaster: Forecaster in evaluation mode.
        frames: Example (B, T, 1, H, W) with B at least 2.
    """
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(forecaster, (frames,), dynamic_shapes={"frames": {0: batch}})
        return program.run_decompositions({torch.ops.lightning_meta.local_filter.default: _by_one_hot_filters})


def _by_one_hot_filters(x: Tensor, filters: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Compute ``local_filter`` as the authors do: one-hot filters cut out the windows. ``stats`` is left empty."""
    B, G, kh, kw, H, W = filters.shape
    C, taps = x.shape[2], kh * kw
    p = filters.flatten(2, 3)
    p = p.softmax(2, dtype=torch.float32).to(x.dtype) if softmax else p.to(x.dtype)
    one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, kh, kw)
    windows = F.conv2d(x.reshape(B * G * C, 1, H + kh - 1, W + kw - 1), one_hot).view(B, G, C, taps, H, W)
    return (windows * p[:, :, None]).sum(3), x.new_zeros(0)
