"""Scores of predicted frames, as OpenSTL's tables define them, and the error of optical flow.

Shapes: B sequences, T frames, H x W pixels; one grey channel; values in [0, 1].
"""

from collections.abc import Sequence

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
    """Return the scores of ``SCORES``, each averaged over the frames of a sequence, (B,).

    Squared and absolute errors use the predictions as they are; SSIM and PSNR use predictions clipped to [0, 1]. Older
    tables computed the SSIM for values between -1 and 1, a range of 2, which gives higher values; both are returned.

    Args:
        prediction: Predicted frames (B, T, 1, H, W), H and W at least 7.
        target: True frames of the same shape.

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.frame_scores import frame_scores
        >>> scores = frame_scores(torch.full((2, 3, 1, 8, 8), 0.5), torch.zeros(2, 3, 1, 8, 8))
        >>> {name: round(score[0].item(), 4) for name, score in scores.items()}
        {'mse': 16.0, 'mae': 32.0, 'ssim': 0.0004, 'ssim_range_2': 0.0016, 'psnr': 6.0206}
    """
    prediction, target = prediction.detach().float(), target.float()
    error = prediction - target
    clipped = prediction.clamp(0, 1)
    # A perfect frame has no PSNR, so the smallest error is taken to be a hundredth of a grey level.
    psnr = -10 * (clipped - target).square().mean((2, 3, 4)).clamp(min=(0.01 / 255) ** 2).log10()
    ssim, ssim_range_2 = structural_similarity(clipped, target, data_ranges=(1, 2))
    return {
        "mse": error.square().sum((2, 3, 4)).mean(1),
        "mae": error.abs().sum((2, 3, 4)).mean(1),
        "ssim": ssim.mean((1, 2)),
        "ssim_range_2": ssim_range_2.mean((1, 2)),
        "psnr": psnr.mean(1),
    }


def structural_similarity(x: Tensor, y: Tensor, data_ranges: Sequence[float]) -> list[Tensor]:
    r"""Return the SSIM of images for each range that their values may have (Wang et al. 2004).

    .. math:: \mathrm{SSIM} = \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
              {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}, \quad
              c_1 = (0.01 L)^2, \quad c_2 = (0.03 L)^2

    Means and sample covariances are those of uniform 7 x 7 windows; the result is the mean over all windows that lie
    within the image. These are scikit-image's defaults.

    Args:
        x: Images (..., H, W), H and W at least 7.
        y: Images of the same shape.
        data_ranges: Differences L between the largest and the smallest value possible.

    Returns:
        The SSIM of each image (...), for each range.
    """

    def window_means(images: Tensor) -> Tensor:
        return images.unfold(-1, 7, 1).mean(-1).unfold(-2, 7, 1).mean(-1)

    mean_x, mean_y = window_means(x), window_means(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    unbiased = 49 / 48  # for sample covariances
    covariance = unbiased * (window_means(x * y) - product)
    variances = unbiased * (window_means(x**2 + y**2) - squares)

    def ssim(data_range: float) -> Tensor:
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        values = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
        return values.mean((-2, -1))

    return [ssim(data_range) for data_range in data_ranges]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of each image (..., C, H, W), summed over the image: (...,), in float32 or better."""
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    return (prediction - target).square().sum((-3, -2, -1))


def end_point_error(flow: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean distance between two flows in pixels and the number of pixels whose true flow is known.

    Args:
        flow: Estimated flow (B, 2, H, W) in pixels.
        truth: True flow of the same shape, NaN where it is not known.

    Returns:
        Mean distance (B,), 0 if no true flow is known, and number of known pixels (B,).

    Example:
        >>> import torch
        >>> from lightning_meta.dynamic_filters.frame_scores import end_point_error
        >>> truth = torch.tensor([[[[3.0, torch.nan]], [[4.0, torch.nan]]]])
        >>> end_point_error(torch.zeros(1, 2, 1, 2), truth)
        (tensor([5.]), tensor([1]))
    """
    known = ~truth.isnan().any(1)
    # Replace NaN before the subtraction: torch.where stops values, but not gradients, that are NaN.
    distance = torch.linalg.vector_norm(torch.where(known[:, None], flow - truth.nan_to_num(), 0), dim=1)
    places = known.sum((1, 2))
    return distance.sum((1, 2)) / places.clamp(min=1), places
