"""How predicted frames are judged today (the protocol of OpenSTL's tables), and how flow is.

Shapes: B sequences, T frames, H x W pixels; one grey channel; values in [0, 1].
"""

import torch
from torch import Tensor

SCORES = {
    "mse": ("mean squared error", "sum over a frame"),
    "mae": ("mean absolute error", "sum over a frame"),
    "ssim": ("SSIM", "at range 1"),
    "ssim_range_2": ("SSIM as older tables have it", "at range 2"),
    "psnr": ("PSNR", "dB, mean over frames"),
}


def frame_scores(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The scores of ``SCORES``, each a mean over frames, (B,).

    Squared and absolute errors are of predictions as they are; the others of predictions clipped to [0, 1]. SSIM is
    scikit-image's of uniform windows of 7x7. Tables made with its older versions took the range of the values to be 2,
    from -1 to 1, which raises the SSIM; both are given.

    Args:
        prediction: (B, T, 1, H, W).
        target: The same shape.
    """
    from skimage.metrics import structural_similarity

    prediction, target = prediction.detach().float(), target.float()
    error = prediction - target
    clipped = prediction.clamp(0, 1)
    pairs = list(zip(*(x.flatten(0, 2).cpu().numpy() for x in (clipped, target)), strict=True))
    # a frame met exactly has no PSNR: the smallest error counted is a hundredth of a grey level
    psnr = -10 * (clipped - target).square().mean((2, 3, 4)).clamp(min=(0.01 / 255) ** 2).log10()

    def ssim(data_range: float) -> Tensor:
        values = [structural_similarity(x, y, data_range=data_range) for x, y in pairs]
        return prediction.new_tensor(values).unflatten(0, prediction.shape[:2]).mean(1)

    return {
        "mse": error.square().sum((2, 3, 4)).mean(1),
        "mae": error.abs().sum((2, 3, 4)).mean(1),
        "ssim": ssim(1.0),
        "ssim_range_2": ssim(2.0),
        "psnr": psnr.mean(1),
    }


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Of each picture (..., C, H, W), summed over it: (...,), in float32 or better."""
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    return (prediction - target).square().sum((-3, -2, -1))


def end_point_error(flow: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distance in pixels between two flows, and at how many places the true one is known: (B,) each.

    Args:
        flow: (B, 2, H, W).
        truth: The same shape; NaN where it is not known.
    """
    known = ~truth.isnan().any(1)
    # not of NaN - x, whose gradient would be NaN, too, whatever came of it
    distance = torch.linalg.vector_norm(torch.where(known[:, None], flow - truth.nan_to_num(), 0), dim=1)
    places = known.sum((1, 2))
    return distance.sum((1, 2)) / places.clamp(min=1), places
