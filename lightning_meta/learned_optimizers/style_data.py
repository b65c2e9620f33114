"""Pictures to be painted in the style of another (Andrychowicz et al. 2016, section 3.4), or the user's own.

Shapes: pictures (3, H, W), uint8 until they are on the device; problems of n = 3 * H * W coordinates.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.features import Features, load_features, targets
from lightning_meta.learned_optimizers.learning_to_learn_data import InnerProblemsDataModule
from lightning_meta.learned_optimizers.problem_sets import Drawn, ProblemSet
from lightning_meta.learned_optimizers.problems import StyleTransfers
from lightning_meta.running.data_module import Source
from lightning_meta.running.segments import Segment
from lightning_meta.sources import image_files


class StyleSet(ProblemSet):
    """Random crops of content pictures, all in one style, from noise around grey."""

    def __init__(
        self,
        name: str,
        seed: int,
        features: Features,
        contents: list[Tensor],
        style: Tensor,
        size: int,
        scaling: float = 0.0,
    ):
        super().__init__(name, seed, 3 * size * size, None, scaling)
        self.features, self.contents, self.size = features, contents, size
        self.style = _square(style, size)[None]

    def draw_start(self, random: np.random.Generator) -> np.ndarray:
        return 0.5 + 0.05 * random.standard_normal(self.coordinates)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        picture = self.contents[random.integers(len(self.contents))]
        side = int(min(picture.shape[1:]) * random.uniform(0.5, 1))
        top, left = (random.integers(length - side + 1) for length in picture.shape[1:])
        crop = picture[:, top : top + side, left : left + side]
        return [resize(crop if random.random() < 0.5 else crop.flip(2), [self.size, self.size]).numpy()]

    def problems(self, drawn: Drawn) -> StyleTransfers:
        contents = drawn.arrays[0].to(drawn.start) / 255
        self.features, self.style = self.features.to(drawn.start), self.style.to(drawn.start)
        content_targets, style_targets = targets(self.features, contents, self.style)
        return StyleTransfers(self.features, contents, self.style, content_targets, style_targets, *drawn[2:])


class OwnPicture(StyleSet):
    """A user's picture, whole, in a user's style."""

    def __init__(self, features: Features, content: Tensor, style: Tensor, size: int):
        super().__init__("predict", 0, features, [content], style, size)
        self.content = resize(content, _within(content, size))
        self.coordinates = self.content.numel()

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        return [self.content.numpy()]


class StyleDataModule(InnerProblemsDataModule):
    """Section 3.4: pictures to be painted in the style of another, or the user's own.

    With ``source: paper`` the pictures are those of ``<root>/art/content`` (1,800 to train, 20 to validate and 100 to
    test on) and of ``<root>/art/style`` (by name, the first to train on, the second new in the test).

    Args:
        root: Folder with ``art/content/``, ``art/style/`` and, for the feature network, ``weights/``.
        source: ``paper`` insists on 1,920 content pictures and two styles; ``stand-in`` takes photographs that come
            with installed packages; ``auto`` takes what lies in ``art/`` (two of each at least), else the stand-in.
        download: Whether to fetch the feature network's weights where they are not on this machine.
        features: The feature network: ``squeezenet1_1``, ``vgg16`` or ``vgg19`` (paper: VGG).
        weights: Its weights, a ``.safetensors`` or ``.pth`` file. None: those in ``<root>/weights``, torch's cache or
            downloaded; without any, a fixed random initialisation.
        size: Side of the pictures in pixels (paper: 64); with ``content`` the longer side.
        content: Picture that ``predict`` paints. None: test pictures.
        style: Picture whose style ``predict`` takes. None: the one trained on.
        options: Of ``InnerProblemsDataModule``.
    """

    unit = "content, style and smoothness"

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        features: Literal["squeezenet1_1", "vgg16", "vgg19"] = "squeezenet1_1",
        weights: str | None = None,
        size: int = 64,
        content: str | None = None,
        style: str | None = None,
        **options,
    ):
        super().__init__(**options)
        self.save_hyperparameters()

    @property
    def pictures(self) -> tuple[list[Path], list[Path]]:
        """The content pictures and the style pictures below ``root``."""
        folders = (Path(self.hparams.root) / "art" / name for name in ("content", "style"))
        contents, styles = (image_files.picture_paths(f) if f.is_dir() else [] for f in folders)
        return contents, styles

    @property
    def present(self) -> bool:
        return all(len(paths) >= 2 for paths in self.pictures)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if h.size < 32:
            raise InputError(f"data.size: {h.size} pixels are too few for the feature network: take 32 at least")
        self.splits, self.styles = self.read()
        self.features, sentence = load_features(h.features, h.root, h.weights, h.download)
        if "random" in sentence:
            rank_zero_warn(f"{sentence}: the losses are real, the pictures will hardly show the style")
        self.data_name, self.test_name = f"{self.data_name}; {sentence}", "new contents"
        self.add_sets()
        if stage == "predict" and (h.content or h.style):
            content = image_files.read_picture(h.content) if h.content else self.splits["test"][0]
            style = image_files.read_picture(h.style) if h.style else self.styles["training"]
            self.sets["predict"] = OwnPicture(self.features, content, style, h.size)

    def read(self) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Content pictures of each split, the training style and a new one."""
        h, art = self.hparams, Path(self.hparams.root) / "art"
        contents, styles = self.pictures
        if h.source == "paper" and (len(contents) < 1920 or len(styles) < 2):
            raise InputError(
                f"{art}: {len(contents)} pictures in content and {len(styles)} in style, the paper has 1,920 and two: "
                "put pictures of ImageNet and two paintings there"
            )
        stand_in = "bundled photographs, a stand-in for ImageNet and paintings"
        if not self.use_papers_data("two pictures and two styles", art, stand_in):
            pictures = image_files.bundled_photographs()
            contents, new = [pictures["china"]], [pictures["grace_hopper"]]
            styles = {"training": pictures["minduka"], "new": pictures["flower"]}
            splits = {"train": contents, "tune": contents, "val": contents, "test": new, "predict": new}
            return splits, styles
        held_out = 120 if len(contents) >= 1920 else max(1, len(contents) // 6)
        contents = [image_files.read_picture(path) for path in contents]
        train, test = contents[:-held_out], contents[-held_out:]
        val, test = (test[:20], test[20:]) if held_out == 120 else (train, test)
        splits = {"train": train, "tune": train, "val": val, "test": test, "predict": test}
        style, new = (image_files.read_picture(path) for path in styles[:2])
        self.data_name = f"{len(contents)} pictures, style of {styles[0].name}"
        return splits, {"training": style, "new": new}

    def problem_set(self, name: str, style: str = "training", size: int | None = None) -> StyleSet:
        h, split = self.hparams, name.split("/")[0]
        if style not in self.styles:
            raise InputError(f"data.tests: style {style!r}: it is 'training' or 'new'")
        scaling = h.random_scaling if split == "train" else 0.0
        return StyleSet(name, h.seed, self.features, self.splits[split], self.styles[style], size or h.size, scaling)


def _square(picture: Tensor, size: int) -> Tensor:
    """The middle of a picture (3, H, W), scaled to (3, size, size), 0 to 1."""
    side = min(picture.shape[1:])
    return resize(center_crop(picture, [side, side]), [size, size]) / 255


def _within(picture: Tensor, size: int) -> list[int]:
    """Height and width of a picture (3, H, W) whose longer side is to be ``size``, but none below 32."""
    return [max(32, round(length * size / max(picture.shape[1:]))) for length in picture.shape[1:]]
