"""Perceptual features and the losses of neural art (Gatys et al. 2015; Andrychowicz et al. 2016, section 3.4).

Letters: B pictures of H x W pixels, C channels of a feature map of h x w pixels. Pictures are RGB (B, 3, H, W), float,
0 black to 1 white; values outside are taken as they are.
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


class Network(NamedTuple):
    """What is taken from one of torchvision's networks.

    Args:
        title: Its name in a sentence.
        layers: Names of the feature maps, each with the index in torchvision's ``.features`` of the layer it leaves.
        content: Feature maps of the content loss.
        style: Feature maps of the style loss.
    """

    title: str
    layers: dict[str, int]
    content: tuple[str, ...]
    style: tuple[str, ...]


_VGG_STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")

# VGG: the layers of Gatys et al. 2015. SqueezeNet: ours, tried by eye at 64x64, where fire5 is down to 7x7 pixels; with
# content from fire4 or fire5 a face is hard to make out in a picture that started as noise. Names as in Iandola et al.
# 2016, table 1; relu1 follows conv1.
NETWORKS = {
    "squeezenet1_1": Network(
        "SqueezeNet 1.1",
        {"relu1": 1, "fire2": 3, "fire3": 4, "fire4": 6, "fire5": 7},
        content=("fire3",),
        style=("relu1", "fire2", "fire3", "fire4", "fire5"),
    ),
    "vgg16": Network(
        "VGG-16",
        {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 18, "relu4_2": 20, "relu5_1": 25},
        content=("relu4_2",),
        style=_VGG_STYLE,
    ),
    "vgg19": Network(
        "VGG-19",
        {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu4_2": 22, "relu5_1": 29},
        content=("relu4_2",),
        style=_VGG_STYLE,
    ),
}

# Weights of content, style and smoothness. The paper gives none. Tried by eye with SqueezeNet's ImageNet weights.
ALPHA, BETA, GAMMA = 1.0, 5.0, 3.0

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what torchvision's weights were trained with


class Features(nn.Module):
    """Feature maps of an image classifier, frozen: its convolutions up to the last map that the losses need.

    Gradients reach the pictures, not the weights. Normalises with torchvision's mean and standard deviation. Computes
    in the dtype of its weights, under autocast too. The state dict has torchvision's names.

    The weights are drawn here (He et al. 2015, biases 0), the same every time and on every machine up to rounding,
    without a draw from PyTorch's global generator. :func:`load_features` puts trained ones in their place.

    Args:
        name: A key of ``NETWORKS``.

    Raises:
        InputError: If there is no such network.
    """

    def __init__(self, name: str):
        from torchvision import models

        super().__init__()
        if name not in NETWORKS:
            raise InputError(f"no network {name!r} to take features from: choose one of {', '.join(NETWORKS)}")
        self.name, self.network = name, NETWORKS[name]
        with torch.device("meta"):  # neither fills VGG's large classifier nor draws from the global generator
            layers = models.get_model(name, weights=None).features[: max(self.network.layers.values()) + 1]
        self.features = layers.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.ReLU):
                module.inplace = False  # in place it would overwrite a map taken in front of it
        for key, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Feature maps by name, in the order of the layers.

        Args:
            pictures: (B, 3, H, W), float.

        Returns:
            One (B, C, h, w) for each of the network's ``layers``.

        Raises:
            ValueError: ``pictures`` are not of that shape or not float.
        """
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
            raise ValueError(
                f"expected float pictures (B, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}: "
                "give RGB between 0 and 1"
            )
        names = {index: name for name, index in self.network.layers.items()}
        maps = {}
        with torch.autocast(pictures.device.type, enabled=False):  # optimizers are compared by small differences
            x = (pictures - self.mean) / self.std
            for index, layer in enumerate(self.features):
                x = layer(x)
                if index in names:
                    maps[names[index]] = x
        return maps


def load_features(
    name: str, root: str | Path, weights: str | None = None, download: bool = True
) -> tuple[Features, str]:
    """A network with the best weights at hand, and a sentence that says which.

    Looks, in this order, at the file ``weights``; in ``<root>/weights/`` for ``<name>.safetensors``, ``<name>.pth`` or
    ``<name>-*.pth``; in the cache of PyTorch's hub; at torchvision's server. Otherwise the weights stay random. A file
    that is there but broken is an error, and so is a missing ``weights``: nobody gets other weights unawares.

    Args:
        name: A key of ``NETWORKS``.
        root: Folder of the data; need not exist.
        weights: A file of tensors (``.safetensors``) or of a state dict (any other name, as ``torch.save`` writes it),
            of the whole torchvision model or of its ``.features``.
        download: Whether to download missing weights, into the hub's cache. A failure (a server silent for 10 seconds
            counts) is no error.

    Returns:
        The network on the CPU, and a sentence such as "SqueezeNet 1.1 with ImageNet weights
        (squeezenet1_1.safetensors)" or "SqueezeNet 1.1 with a fixed random initialisation, no ImageNet weights".

    Raises:
        InputError: If there is no such network, or if a file is missing, unreadable, not a state dict, of another
            network, or holds values that are not finite.
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
    r"""Gram matrices of feature maps: which channels are active together, wherever that is (Gatys et al. 2015).

    .. math:: G[b,c,d] = \frac{1}{C h w} \sum_{i,j} F[b,c,i,j] \, F[b,d,i,j]

    Differs from the paper: the division, which makes pictures of different sizes comparable.

    Args:
        features: (B, C, h, w).

    Returns:
        (B, C, C).
    """
    flat = features.flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        return flat @ flat.mT / flat[0].numel()


def smoothness(pictures: Tensor) -> Tensor:
    """Mean squared difference of horizontal neighbours plus that of vertical ones: a rough picture has a large one.

    Args:
        pictures: (B, C, H, W), at least 2 x 2 pixels.

    Returns:
        (B,).
    """
    across, down = pictures.diff(dim=3), pictures.diff(dim=2)
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def targets(features: Features, content: Tensor, style: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What :func:`style_transfer_loss` compares with. Without gradients.

    Args:
        features: The network.
        content: (B, 3, H, W).
        style: (B or 1, 3, H', W'): one for each picture or one for all, of any size.

    Returns:
        Feature maps (B, C, h, w) of the content layers and Gram matrices (B or 1, C, C) of the style layers, by layer.
    """
    with torch.no_grad():
        content_maps, style_maps = features(content), features(style)
        return (
            {name: content_maps[name] for name in features.network.content},
            {name: gram(style_maps[name]) for name in features.network.style},
        )


def style_transfer_loss(
    features: Features,
    pictures: Tensor,
    content_targets: dict[str, Tensor],
    style_targets: dict[str, Tensor],
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
) -> Tensor:
    r"""How far pictures are from one picture's content in another's style (Andrychowicz et al. 2016, section 3.4).

    .. math:: f = \alpha L_{content} + \beta L_{style} + \gamma L_{smoothness}

    Content is the squared error of feature maps, style that of Gram matrices, each the mean over its layers and each
    relative to the target's own squares: 0 for the target, 1 for empty features.

    Differs from the paper of Gatys et al. (2015): absolute errors there. The mean square of SqueezeNet's features grows
    400-fold from relu1 to fire5; relative to their targets all layers count, and one set of weights fits all networks.

    Keep ``gamma`` above 0 with SqueezeNet: its first layer has stride 2 and no padding, so at even sizes the last row
    and column of pixels are in no feature and only their neighbours hold them.

    Args:
        features: The network.
        pictures: (B, 3, H, W).
        content_targets: The first of what :func:`targets` returns, of pictures of this size.
        style_targets: The second.
        alpha: Weight of the content.
        beta: Weight of the style.
        gamma: Weight of the smoothness.

    Returns:
        (B,), differentiable in ``pictures`` any number of times.

    Raises:
        ValueError: The content is of another size than ``pictures``.
    """
    maps = features(pictures)
    for name, target in content_targets.items():
        if target.shape[1:] != maps[name].shape[1:]:
            raise ValueError(
                f"expected {name} of shape {tuple(target.shape[1:])} as in the content, got "
                f"{tuple(maps[name].shape[1:])}: give pictures of the content's size"
            )
    content = sum(_relative_error(maps[name], target) for name, target in content_targets.items())
    style = sum(_relative_error(gram(maps[name]), target) for name, target in style_targets.items())
    return alpha / len(content_targets) * content + beta / len(style_targets) * style + gamma * smoothness(pictures)


def _relative_error(value: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's squares, (B,); features that are empty in the target give no division by 0."""
    squares = target.square().flatten(1).sum(1)
    return (value - target).square().flatten(1).sum(1) / squares.clamp(min=1e-6)


def _candidates(name: str, root: str | Path) -> Iterator[Path]:
    # not <name>*: vgg16_bn and vgg16_features, for other preprocessing, are named alike
    own, hub = Path(root) / "weights", Path(torch.hub.get_dir()) / "checkpoints"
    for folder, pattern in (
        (own, f"{name}.safetensors"),
        (own, f"{name}.pth"),
        (own, f"{name}-*.pth"),
        (hub, f"{name}-*.pth"),
    ):
        yield from sorted(folder.glob(pattern))


def _download(features: Features) -> str | None:
    """Fills the network with torchvision's weights and returns their file's name, None where that fails."""
    from torchvision import models

    weights = models.get_model_weights(features.name).IMAGENET1K_V1
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # torchvision sets none and would wait for ever behind a silent firewall
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        _fill(features, state, weights.url)
    except Exception:  # no network, a full disk, a cache that cannot be written: there are always random weights
        return None
    finally:
        socket.setdefaulttimeout(timeout)
    return weights.url.rpartition("/")[2]


def _read(path: Path) -> Any:
    """What is in a file of weights; no code in it can run."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file: name a file of weights, or none to have them searched for")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a different exception for every way in which a file can be broken
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise InputError(f"{path}: cannot be read as weights ({reason}): copy or download it again") from error


def _fill(features: Features, state: Any, source: str | Path) -> None:
    """Puts a state dict, of the whole model or of its ``.features``, into the network: all of it or nothing."""
    title, which = features.network.title, f"give torchvision's weights of {features.name}"
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{source}: not a state dict, that is tensors by name: save model.state_dict()")
    whole = any(str(key).startswith("features.") for key in state)
    fitting = {}
    for key, own in features.state_dict().items():
        theirs = key if whole else key.removeprefix("features.")
        if theirs not in state:
            raise InputError(f"{source}: has no tensor {theirs}, so it is not of {title}: {which}")
        tensor = state[theirs]
        if tensor.shape != own.shape or not tensor.is_floating_point():
            raise InputError(f"{source}: {theirs} is {_kind(tensor)}, {title} has {_kind(own)} there: {which}")
        fitting[key] = tensor.to(own.dtype)
        if not fitting[key].isfinite().all():
            raise InputError(f"{source}: {theirs} holds values that are not finite: copy or download it again")
    features.load_state_dict(fitting)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"
