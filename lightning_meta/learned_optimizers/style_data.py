"""Style transfer problems (Andrychowicz et al. 2016, section 3.4), of the user's images too.

Shapes: images (3, H, W), uint8 until they are on the device; problems of n = 3 * H * W coordinates.
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
from lightning_meta.learned_optimizers.problem_sets import DrawnProblems, ProblemSet
from lightning_meta.learned_optimizers.problems import StyleTransfers
from lightning_meta.running.data_module import Source
from lightning_meta.running.segments import Segment
from lightning_meta.sources import image_files


class StyleSet(ProblemSet):
    """Style transfers of random crops of content images, all to one style, that start as noise around grey.

    Args:
        name: As for ``ProblemSet``.
        seed: As for ``ProblemSet``.
        features: The feature network.
        contents: Content images, uint8 (3, H, W).
        style: Style image, uint8 (3, H, W).
        size: Side of the crops in pixels, after scaling.
        scaling: As for ``ProblemSet``.
    """

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
        side = min(style.shape[1:])  # the middle of the style image, (1, 3, size, size), 0 to 1
        self.style = resize(center_crop(style, [side, side]), [size, size])[None] / 255

    def draw_start(self, random: np.random.Generator) -> np.ndarray:
        return 0.5 + 0.05 * random.standard_normal(self.coordinates)

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        image = self.contents[random.integers(len(self.contents))]
        side = int(min(image.shape[1:]) * random.uniform(0.5, 1))
        top, left = (random.integers(length - side + 1) for length in image.shape[1:])
        crop = image[:, top : top + side, left : left + side]
        return [resize(crop if random.random() < 0.5 else crop.flip(2), [self.size, self.size]).numpy()]

    def problems(self, drawn: DrawnProblems) -> StyleTransfers:
        contents = drawn.arrays[0].to(drawn.start) / 255
        self.features, self.style = self.features.to(drawn.start), self.style.to(drawn.start)
        content_targets, style_targets = targets(self.features, contents, self.style)
        return StyleTransfers(self.features, contents, self.style, content_targets, style_targets, *drawn[2:])


class UsersStyleSet(StyleSet):
    """Style transfers of a user's whole image to a user's style. Arguments as for ``StyleSet``."""

    def __init__(self, features: Features, content: Tensor, style: Tensor, size: int):
        super().__init__("predict", 0, features, [content], style, size)
        height, width = (max(32, round(length * size / max(content.shape[1:]))) for length in content.shape[1:])
        self.content = resize(content, [height, width])  # the longer side is ``size``, both are at least 32
        self.coordinates = self.content.numel()

    def draw(self, random: np.random.Generator, segment: Segment) -> list[np.ndarray]:
        return [self.content.numpy()]


class StyleDataModule(InnerProblemsDataModule):
    """Section 3.4: images to be given the style of another image; ``predict`` can use the user's images.

    With ``source: paper`` the contents are the images in ``<root>/art/content`` (1,800 for training, 20 for validation,
    100 for the test). The styles are the first two images, by name, in ``<root>/art/style``: the first for training,
    the second for the test case ``new style``.

    Args:
        root: Folder with ``art/content/``, ``art/style/`` and, for the feature network, ``weights/``.
        source: ``paper`` requires 1,920 content images and two style images; ``stand-in`` uses photographs that ship
            with installed packages; ``auto`` uses the images in ``art/`` if there are at least two of each, else the
            stand-in.
        download: Whether to download the feature network's weights if they are not on this machine.
        features: The feature network: ``squeezenet1_1``, ``vgg16`` or ``vgg19`` (paper: VGG).
        weights: Weights of the feature network, a ``.safetensors`` or ``.pth`` file. None: look in ``<root>/weights``
            and in torch's cache, then download; if all fail, use a fixed random initialisation.
        size: Side of the images in pixels (paper: 64); with ``content`` the longer side.
        content: Content image for ``predict``. None: test images.
        style: Style image for ``predict``. None: the style of the training.
        options: Options of ``InnerProblemsDataModule``.
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
    def image_paths(self) -> tuple[list[Path], list[Path]]:
        """The content images and the style images below ``root``."""
        folders = (Path(self.hparams.root) / "art" / name for name in ("content", "style"))
        contents, styles = (image_files.image_paths(f) if f.is_dir() else [] for f in folders)
        return contents, styles

    @property
    def present(self) -> bool:
        return all(len(paths) >= 2 for paths in self.image_paths)

    def make_sets(self, stage: str) -> None:
        h = self.hparams
        if h.size < 32:
            raise InputError(f"data.size: {h.size} pixels are too few for the feature network: use at least 32")
        self.splits, self.styles = self.read()
        self.features, sentence = load_features(h.features, h.root, h.weights, h.download)
        if "random" in sentence:
            rank_zero_warn(f"{sentence}: losses can be compared, but the images will hardly show the style")
        self.data_name, self.test_name = f"{self.data_name}; {sentence}", "new contents"
        self.add_sets()
        if stage == "predict" and (h.content or h.style):
            content = image_files.read_image(h.content) if h.content else self.splits["test"][0]
            style = image_files.read_image(h.style) if h.style else self.styles["training"]
            self.sets["predict"] = UsersStyleSet(self.features, content, style, h.size)

    def read(self) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Read the content images of each split, the style of the training and a new one.

        Raises:
            InputError: If an image cannot be read, or with ``source: paper`` if images are missing.
        """
        h, art = self.hparams, Path(self.hparams.root) / "art"
        contents, styles = self.image_paths
        if h.source == "paper" and (len(contents) < 1920 or len(styles) < 2):
            raise InputError(
                f"{art}: {len(contents)} images in content and {len(styles)} in style, the paper has 1,920 and two: "
                "put images of ImageNet and two paintings there"
            )
        stand_in = "bundled photographs, a stand-in for ImageNet and paintings"
        if not self.use_papers_data("two images and two styles", art, stand_in):
            photographs = image_files.bundled_photographs()
            contents, new = [photographs["china"]], [photographs["grace_hopper"]]
            styles = {"training": photographs["minduka"], "new": photographs["flower"]}
            splits = {"train": contents, "tune": contents, "val": contents, "test": new, "predict": new}
            return splits, styles
        held_out = 120 if len(contents) >= 1920 else max(1, len(contents) // 6)
        contents = [image_files.read_image(path) for path in contents]
        train, test = contents[:-held_out], contents[-held_out:]
        val, test = (test[:20], test[20:]) if held_out == 120 else (train, test)
        splits = {"train": train, "tune": train, "val": val, "test": test, "predict": test}
        style, new = (image_files.read_image(path) for path in styles[:2])
        self.data_name = f"{len(contents)} pictures, style of {styles[0].name}"
        return splits, {"training": style, "new": new}

    def problem_set(self, name: str, style: str = "training", size: int | None = None) -> StyleSet:
        h, split = self.hparams, name.split("/")[0]
        if style not in self.styles:
            raise InputError(f"data.tests: no style {style!r}: choose 'training' or 'new'")
        scaling = h.random_scaling if split == "train" else 0.0
        return StyleSet(name, h.seed, self.features, self.splits[split], self.styles[style], size or h.size, scaling)
