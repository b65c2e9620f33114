"""A page to draw on, its font and colours, and the conversion between tensors and Pillow images."""

import torch
from torch import Tensor

INK, PALE, RED, GREEN = (40, 40, 40), (120, 120, 120), (220, 40, 40), (40, 170, 70)


GAP = 3  # pixels between two pictures


def blank_page(width: int, height: int):
    """Return a white Pillow image and a pen that draws on it."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), "white")
    return page, ImageDraw.Draw(page)


def default_font(size: int):
    """Return Pillow's own font, which needs no file."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def to_image(picture: Tensor, scale: int = 1):
    """Turn uint8 (H, W) or (3, H, W) into a Pillow image with pixels of ``scale`` x ``scale``."""
    from PIL import Image

    image = Image.fromarray((picture if picture.ndim == 2 else picture.movedim(0, -1)).cpu().contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def grey_image(frame: Tensor, scale: int):
    """Turn a frame (H, W), 0 black to 1 white, into a Pillow image with pixels of ``scale`` x ``scale``."""
    frame = frame.detach().float().cpu().nan_to_num(0).clamp(0, 1)  # drawing must not fail if the model has diverged
    return to_image((frame * 255).round().to(torch.uint8), scale)


def to_tensor(page) -> Tensor:
    """Turn an RGB Pillow image, or an array (H, W, 3), into uint8 (3, H, W)."""
    import numpy as np

    return torch.from_numpy(np.array(page)).movedim(-1, 0).contiguous()
