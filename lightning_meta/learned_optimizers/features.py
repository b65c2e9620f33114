"""Image features and the losses of style transfer (Gatys et al. 2015; Andrychowicz et al. 2016, section 3.4).

Shapes: B images of H x W pixels; feature maps of C channels and h x w pixels. Images are RGB (B, 3, H, W), float, from
0 (black) to 1 (white); values outside this range are not clipped.
"""

import contextlib
import io
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_meta.errors import InputError


class FeatureNetwork(NamedTuple):
    """Which feature maps of a torchvision network the losses use.

    Args:
        title: Name of the network in a sentence.
        layers: Index in torchvision's ``.features`` of the layer that outputs each feature map, by name.
        content: Names of the feature maps in the content loss.
        style: Names of the feature maps in the style loss.
    """

    title: str
    layers: dict[str, int]
    content: tuple[str, ...]
    style: tuple[str, ...]


_VGG_STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")

# VGG: the layers of Gatys et al. 2015. SqueezeNet: chosen by eye on images of 64x64 pixels, where fire5 has 7x7 pixels;
# with content from fire4 or fire5 faces were hard to recognise. Names are those of Iandola et al. 2016, table 1; relu1
# follows conv1.
NETWORKS = {
    "squeezenet1_1": FeatureNetwork(
        "SqueezeNet 1.1",
        {"relu1": 1, "fire2": 3, "fire3": 4, "fire4": 6, "fire5": 7},
        content=("fire3",),
        style=("relu1", "fire2", "fire3", "fire4", "fire5"),
    ),
    "vgg16": FeatureNetwork(
        "VGG-16",
        {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 18, "relu4_2": 20, "relu5_1": 25},
        content=("relu4_2",),
        style=_VGG_STYLE,
    ),
    "vgg19": FeatureNetwork(
        "VGG-19",
        {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu4_2": 22, "relu5_1": 29},
        content=("relu4_2",),
        style=_VGG_STYLE,
    ),
}

# Weights of content, style and smoothness. The paper gives none; chosen by eye with SqueezeNet's ImageNet weights.
ALPHA, BETA, GAMMA = 1.0, 5.0, 3.0

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the training of torchvision's weights


class Features(nn.Module):
    """Compute feature maps with the convolutions of an image classifier, up to the last map that the losses need.

    The weights are frozen; gradients reach the images. The module normalises images with torchvision's mean and
    standard deviation, and computes in the dtype of its weights, under autocast too. Its state dict has torchvision's
    names.

    The weights are initialised at random (He et al. 2015, biases 0) from a fixed seed, without PyTorch's global
    generator; they are the same on every machine up to rounding. :func:`load_features` loads trained ones.

    Args:
        name: A key of ``NETWORKS``.

    Raises:
        InputError: If there is no such network.

    >>> import torch
    >>> {name: tuple(x.shape) for name, x in Features("squeezenet1_1")(torch.rand(1, 3, 64, 64)).items()}
    {'relu1': (1, 64, 31, 31), 'fire2': (1, 128, 15, 15), ..., 'fire5': (1, 256, 7, 7)}
    """

    def __init__(self, name: str):
        from torchvision import models

        super().__init__()
        if name not in NETWORKS:
            raise InputError(f"no network {name!r} to take features from: choose one of {', '.join(NETWORKS)}")
        self.name, self.network = name, NETWORKS[name]
        with torch.device("meta"):  # allocates no memory for VGG's classifier and does not use the global generator
            layers = models.get_model(name, weights=None).features[: max(self.network.layers.values()) + 1]
        self.features = layers.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.ReLU):
                module.inplace = False  # in place, it would overwrite the feature map before it
        for key, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps.

        Args:
            images: (B, 3, H, W), float.

        Returns:
            By name, in the order of the network's ``layers``: (B, C, h, w).

        Raises:
            ValueError: If ``images`` are not of that shape or not float.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"expected float images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}: "
                "give RGB between 0 and 1"
            )
        names = {index: name for name, index in self.network.layers.items()}
        maps = {}
        with torch.autocast(images.device.type, enabled=False):  # losses of two optimizers can be very close
            x = (images - self.mean) / self.std
            for index, layer in enumerate(self.features):
                x = layer(x)
                if index in names:
                    maps[names[index]] = x
        return maps


def load_features(
    name: str, root: str | Path, weights: str | None = None, download: bool = True
) -> tuple[Features, str]:
    """Load a feature network with trained weights if there are any.

    The function uses the first that it finds: the file ``weights``; ``<name>.safetensors``, ``<name>.pth`` or
    ``<name>-*.pth`` in ``<root>/weights/``; the cache of PyTorch's hub; torchvision's server. If there are none, the
    weights are the random ones of :class:`Features`. A file that exists but is broken is an error, not skipped.

    Args:
        name: A key of ``NETWORKS``.
        root: Folder of the data; it need not exist.
        weights: A ``.safetensors`` file, or a state dict written by ``torch.save``, of the whole torchvision model or
            of its ``.features``. The file must exist.
        download: Whether to download missing weights into the hub's cache. If the download fails, or the server does
            not answer for 10 seconds, the weights stay random.

    Returns:
        The network on the CPU, and a description such as "SqueezeNet 1.1 with ImageNet weights
        (squeezenet1_1.safetensors)" or "SqueezeNet 1.1 with a fixed random initialisation, no ImageNet weights".

    Raises:
        InputError: If there is no such network, or if a file is missing, unreadable, not a state dict, of another
            network, or has values that are not finite.
    """
    features = Features(name)
    title = features.network.title
    if weights is not None:
        _fill(features, _read(Path(weights)), weights)
        return features, f"{title} with the weights of {Path(weights).name}"
    found = next(_candidates(name, root), None)
    if found is not None:
        _fill(features, _read(found), found)
        return features, f"{title} with ImageNet weights ({found.name})"
    downloaded = _download(features) if download else None
    if downloaded is not None:
        return features, f"{title} with ImageNet weights ({downloaded})"
    return features, f"{title} with a fixed random initialisation, no ImageNet weights"


def gram(features: Tensor) -> Tensor:
    r"""Compute Gram matrices of feature maps: the correlations of their channels (Gatys et al. 2015).

    .. math:: G[b,c,d] = \frac{1}{C h w} \sum_{i,j} F[b,c,i,j] \, F[b,d,i,j]

    Differs from the paper: the division by C h w, which makes images of different sizes comparable.

    Args:
        features: (B, C, h, w).

    Returns:
        (B, C, C).

    >>> import torch
    >>> gram(torch.tensor([[[[1.0, 1.0]], [[1.0, -1.0]]]]))
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.5000]]])
    """
    flat = features.flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        return flat @ flat.mT / flat[0].numel()


def smoothness(images: Tensor) -> Tensor:
    """Compute the mean squared difference of horizontal neighbours plus that of vertical ones; 0 for a flat image.

    Args:
        images: (B, C, H, W), at least 2 x 2 pixels.

    Returns:
        (B,).

    >>> import torch
    >>> smoothness(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([1.])
    """
    across, down = images.diff(dim=3), images.diff(dim=2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def targets(features: Features, content: Tensor, style: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the targets of :func:`style_transfer_loss`, without gradients.

    Args:
        features: The feature network.
        content: (B, 3, H, W).
        style: (B or 1, 3, H', W'): one style for each image or one for all, of any size.

    Returns:
        By layer, feature maps (B, C, h, w) of the content and Gram matrices (B or 1, C, C) of the style.
    """
    with torch.no_grad():
        content_maps, style_maps = features(content), features(style)
        return (
            {name: content_maps[name] for name in features.network.content},
            {name: gram(style_maps[name]) for name in features.network.style},
        )


def style_transfer_loss(
    features: Features,
    images: Tensor,
    content_targets: dict[str, Tensor],
    style_targets: dict[str, Tensor],
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    r"""Compute the loss of style transfer (Andrychowicz et al. 2016, section 3.4).

    .. math:: f = \alpha L_{content} + \beta L_{style} + \gamma L_{smoothness}

    The content loss is the squared error of feature maps, the style loss that of Gram matrices. Each is divided by the
    sum of the target's squares and averaged over its layers: 0 for the target, 1 for features that are all zero.

    Differs from the paper of Gatys et al. (2015), which uses absolute errors. The mean square of SqueezeNet's features
    grows 400-fold from relu1 to fire5. With relative errors all layers count, and one set of weights fits all networks.

    Keep ``gamma`` above 0 with SqueezeNet: its first layer has stride 2 and no padding, so at even sizes no feature
    depends on the last row and column of pixels, and only the smoothness constrains them.

    Args:
        features: The feature network.
        images: (B, 3, H, W).
        content_targets: Feature maps from :func:`targets`, of a content of the same size.
        style_targets: Gram matrices from :func:`targets`.
        alpha: Weight of the content loss.
        beta: Weight of the style loss.
        gamma: Weight of the smoothness.

    Returns:
        (B,), differentiable with respect to ``images`` any number of times.

    Raises:
        ValueError: If the content is of another size than ``images``.

    >>> import torch
    >>> features, image = Features("squeezenet1_1"), torch.rand(2, 3, 64, 64)
    >>> style_transfer_loss(features, image, *targets(features, image, image), gamma=0)
    tensor([0., 0.])
    """
    maps = features(images)
    for name, target in content_targets.items():
        if target.shape[1:] != maps[name].shape[1:]:
            raise ValueError(
                f"expected {name} of shape {tuple(target.shape[1:])} as in the content, got "
                f"{tuple(maps[name].shape[1:])}: give images of the content's size"
            )
    content = sum(_relative_error(maps[name], target) for name, target in content_targets.items())
    style = sum(_relative_error(gram(maps[name]), target) for name, target in style_targets.items())
    return alpha / len(content_targets) * content + beta / len(style_targets) * style + gamma * smoothness(images)


def _relative_error(value: Tensor, target: Tensor) -> Tensor:
    """Return the squared error divided by the sum of the target's squares, (B,), without a division by zero."""
    squares = target.square().flatten(1).sum(1)
    return (value - target).square().flatten(1).sum(1) / squares.clamp(min=1e-6)


def _candidates(name: str, root: str | Path) -> Iterator[Path]:
    # <name>* would also match vgg16_bn and vgg16_features, which are other networks
    own, hub = Path(root) / "weights", Path(torch.hub.get_dir()) / "checkpoints"
    for folder, pattern in (
        (own, f"{name}.safetensors"),
        (own, f"{name}.pth"),
        (own, f"{name}-*.pth"),
        (hub, f"{name}-*.pth"),
    ):
        yield from sorted(folder.glob(pattern))


def _download(features: Features) -> str | None:
    """Load torchvision's weights from its server; return the name of their file, or None if that fails."""
    from torchvision import models

    weights = models.get_model_weights(features.name).IMAGENET1K_V1
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # torchvision sets none and would wait forever behind a silent firewall
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        _fill(features, state, weights.url)
    except Exception:  # no network, a full disk, a cache that cannot be written: the random weights remain
        return None
    finally:
        socket.setdefaulttimeout(timeout)
    return weights.url.rpartition("/")[2]


def _read(path: Path) -> Any:
    """Read a weight file; no code in it can run."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file: give a weight file, or none to use the first that is found")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise any exception
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise InputError(f"{path}: cannot be read as weights ({reason}): copy or download it again") from error


def _fill(features: Features, state: Any, source: str | Path) -> None:
    """Load a state dict, of the whole model or of its ``.features``; an error leaves the network unchanged."""
    title, which = features.network.title, f"give torchvision's weights of {features.name}"
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source}: not a state dict of tensors: save model.state_dict()")
    whole_model = any(str(key).startswith("features.") for key in state)
    fitting = {}
    for key, own in features.state_dict().items():
        theirs = key if whole_model else key.removeprefix("features.")
        if theirs not in state:
            raise InputError(f"{source}: has no tensor {theirs}, so these are not weights of {title}: {which}")
        tensor = state[theirs]
        if tensor.shape != own.shape or not tensor.is_floating_point():
            raise InputError(f"{source}: {theirs} is {_kind(tensor)}, in {title} it is {_kind(own)}: {which}")
        fitting[key] = tensor.to(own.dtype)
        if not fitting[key].isfinite().all():
            raise InputError(f"{source}: {theirs} has values that are not finite: copy or download it again")
    features.load_state_dict(fitting)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
