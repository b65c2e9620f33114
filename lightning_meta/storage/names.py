"""Short names: of classes in configurations, checkpoints and weights, and of the packaged configurations."""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_meta.errors import InputError

PACKAGE = Path(__file__).parents[1]

CLASSES = {  # class: the module below lightning_meta that defines it
    "VideoPrediction": "dynamic_filters.video",
    "StereoPrediction": "dynamic_filters.stereo",
    "SteerableFilters": "dynamic_filters.steerable",
    "MovingMNISTDataModule": "dynamic_filters.moving_mnist_data",
    "DrivingVideoDataModule": "dynamic_filters.driving_data",
    "StereoPairsDataModule": "dynamic_filters.stereo_data",
    "SteerablePatchesDataModule": "dynamic_filters.steerable_data",
    "OneShotRecognition": "learnets.one_shot",
    "LearnetTracking": "learnets.tracking",
    "OneShotDataModule": "learnets.one_shot_data",
    "TrackingDataModule": "learnets.tracking_data",
    "PictureClassification": "hypernetworks.classification",
    "LanguageModel": "hypernetworks.language_model",
    "Handwriting": "hypernetworks.handwriting",
    "Translation": "hypernetworks.translation",
    "MNISTDataModule": "hypernetworks.classification_data",
    "CIFAR10DataModule": "hypernetworks.classification_data",
    "TextDataModule": "hypernetworks.text_data",
    "PenStrokesDataModule": "hypernetworks.stroke_data",
    "TranslationDataModule": "hypernetworks.translation_data",
    "LearningToLearn": "learned_optimizers.learning_to_learn",
    "LearningStyle": "learned_optimizers.style",
    "QuadraticDataModule": "learned_optimizers.learning_to_learn_data",
    "DigitProblemsDataModule": "learned_optimizers.learning_to_learn_data",
    "ImageProblemsDataModule": "learned_optimizers.learning_to_learn_data",
    "StyleDataModule": "learned_optimizers.style_data",
    "AtomicCheckpointIO": "storage.checkpoints",
}
FORMER = {  # names that classes once had; configurations, checkpoints and weights may still have them
    "MovingMNIST": "MovingMNISTDataModule",
    "DrivingVideo": "DrivingVideoDataModule",
    "StereoPairs": "StereoPairsDataModule",
    "SteerablePatches": "SteerablePatchesDataModule",
    "OneShotCharacters": "OneShotDataModule",
    "TrackingVideos": "TrackingDataModule",
    "PenStrokes": "PenStrokesDataModule",
    "Translations": "TranslationDataModule",
    "QuadraticProblems": "QuadraticDataModule",
    "DigitProblems": "DigitProblemsDataModule",
    "PictureProblems": "ImageProblemsDataModule",
    "StyleProblems": "StyleDataModule",
    "Text": "TextDataModule",
    "MNIST": "MNISTDataModule",
    "CIFAR10": "CIFAR10DataModule",
}


def full_path(class_path: str) -> str:
    """The import path of a class of ``CLASSES``, given by its name or by a path that it has or once had.

    Any other class path is returned as it is.

    >>> full_path("VideoPrediction")
    'lightning_meta.dynamic_filters.video.VideoPrediction'
    >>> full_path("lightning_meta.a_former_place.VideoPrediction")
    'lightning_meta.dynamic_filters.video.VideoPrediction'
    """
    name = short_name(class_path)
    return f"lightning_meta.{CLASSES[name]}.{name}" if name in CLASSES else class_path


def short_name(class_path: str) -> str:
    """The name alone, if it is a class of ``CLASSES``; any other class path is returned as it is."""
    package, _, name = class_path.rpartition(".")
    name = FORMER.get(name, name)
    ours = name in CLASSES and (not package or package.startswith("lightning_meta."))
    return name if ours else class_path


def rename_classes(content: Any, rename: Callable[[str], str]) -> Any:
    """A copy of nested dictionaries and lists with every ``class_path`` renamed."""
    if isinstance(content, list):
        return [rename_classes(item, rename) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        key: rename(value) if key == "class_path" and isinstance(value, str) else rename_classes(value, rename)
        for key, value in content.items()
    }


def configurations() -> Path:
    """The folder of the configurations: inside an installed package, or at the top of a checkout."""
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def experiments() -> dict[str, Path]:
    """The configuration file of each experiment, by name."""
    return {path.stem: path for path in sorted(configurations().glob("*.yaml")) if path.stem != "defaults"}


def find_configuration(name: str) -> str:
    """The file that ``--config`` names: a path, or the name of a packaged one (``dfn_mnist``, ``paper/dfn_mnist``).

    Raises:
        InputError: If it is neither.
    """
    if Path(name).is_file() or not re.fullmatch(r"[\w./-]+", name):  # an address, or the configuration itself
        return name
    packaged = configurations() / f"{name.removesuffix('.yaml')}.yaml"
    if not packaged.is_file():
        raise InputError(f"--config {name}: no such file, and no packaged configuration: {', '.join(experiments())}")
    return str(packaged)


_RENAMED = {
    **dict.fromkeys(("-c", "--config"), find_configuration),
    **{f"--{part}{end}": full_path for part in ("model", "data") for end in ("", ".class_path", ".help")},
}


def expand(arguments: list[str]) -> Iterator[str]:
    """Command-line arguments, with the names of configurations and classes in full.

    Raises:
        InputError: For a configuration that does not exist.
    """
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in _RENAMED:
            yield argument
        elif equals:
            yield f"{option}={_RENAMED[option](value)}"
        else:
            yield option
            yield from map(_RENAMED[option], islice(rest, 1))
