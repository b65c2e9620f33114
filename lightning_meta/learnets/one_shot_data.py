"""Episodes of characters (Bertinetto et al. 2016, section 4.1). Each is a function of a seed and its number.

Shapes: C characters with D drawings each, P x P pixels; E episodes of W ways and S shots, X queries.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from kornia.augmentation import RandomAffine
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meta.errors import InputError
from lightning_meta.running.data_module import SPLITS, MetaDataModule, Source
from lightning_meta.running.segments import Episode, Key, Segment
from lightning_meta.sources import characters
from lightning_meta.sources.seeding import generator, seed_of

VALIDATION = {  # alphabets: Omniglot's as in Vinyals et al. (2016), 172 characters; then those of the fonts
    *("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"),
    *("Armenian capitals", "Armenian small letters", "Lisu"),
}
VINYALS_TRAINING = 1200  # characters up to this number are for training, all others for test

Alphabets = dict[str, characters.Alphabet]


class Episodes(NamedTuple):
    """A batch of episodes."""

    exemplars: Tensor  # (E, W, S, 1, P, P), ink 1, paper 0
    queries: Tensor  # (E, X, 1, P, P), in random order
    labels: Tensor  # (E, X): class of each query, 0 <= l < W; -1 if unknown
    segment: Segment
    choose: Literal["candidate", "class"] = "class"  # see ``OneShotDataModule``


class EpisodeIndices(NamedTuple):
    """A batch of episodes as the loader returns it: numbers of drawings instead of images."""

    set_name: str
    exemplars: Tensor  # (E, W, S): numbers of the drawings
    queries: Tensor  # (E, X)
    turns: Tensor  # (E, W): quarter turns of each class
    labels: Tensor  # (E, X)
    segment: Segment


class CharacterGroups(NamedTuple):
    """Drawings of characters, in groups. An episode takes all of its classes from one group."""

    images: Tensor  # (C * D, P, P), uint8
    drawings: int  # D
    groups: dict[str, np.ndarray]  # numbers of the characters of each group


class EpisodeSet(Dataset):
    """Random episodes.

    Args:
        name: ``SPLIT`` or ``SPLIT/CASE``. Batches carry it, and each split has random numbers of its own.
        characters: Characters to draw from. Groups with fewer classes than the episode has ways are skipped.
        rotations: Make each rotation of a character by 0, 90, 180 and 270 degrees a class.
        seed: Seed of the random numbers.
    """

    def __init__(self, name: str, characters: CharacterGroups, rotations: bool, seed: int):
        self.key = (seed, SPLITS[name.split("/")[0]])
        self.name, self.characters, self.turns = name, characters, 4 if rotations else 1

    def too_small(self, episode: Episode) -> list[str]:
        """Return the names of the groups that have fewer classes than the episode.

        Raises:
            InputError: If all groups do, or the characters have too few drawings.
        """
        groups, needed = self.characters.groups, episode.shots + episode.queries
        if needed > self.characters.drawings:
            raise InputError(
                f"shots + queries = {needed}, but each character has only {self.characters.drawings} drawings: "
                "schedule.queries or the number of shots"
            )
        small = [name for name, group in groups.items() if len(group) * self.turns < episode.ways]
        if len(small) == len(groups):
            most = max(len(group) * self.turns for group in groups.values())
            raise InputError(f"{episode.ways} ways, but the largest alphabet has {most} characters: lower the ways")
        return small

    def __getitem__(self, key: Key) -> tuple[list[np.ndarray], Segment]:
        index, segment = key
        ways, shots, queries = segment.episode
        random, (_, drawings, groups) = generator(*self.key, index), self.characters
        fitting = [group for group in groups.values() if len(group) * self.turns >= ways]
        group = fitting[random.integers(len(fitting))]
        classes = random.choice(len(group) * self.turns, ways, replace=False)
        chosen = np.stack([random.choice(drawings, shots + queries, replace=False) for _ in range(ways)])
        chosen += group[classes // self.turns, None] * drawings
        labels = random.permutation(np.repeat(np.arange(ways), queries))
        order = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
        arrays = [chosen[:, :shots], chosen[:, shots:].flatten()[order], classes % self.turns, labels]
        return arrays, segment

    def collate(self, samples: list[tuple[list[np.ndarray], Segment]]) -> EpisodeIndices:
        """Join samples of one shape."""
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*(s for s, _ in samples), strict=True)]
        return EpisodeIndices(self.name, *columns, samples[0][1])

    def episodes(self, indices: EpisodeIndices, choose: Literal["candidate", "class"]) -> Episodes:
        """Look up the images. All images of the set move to the device of ``indices`` and stay there."""
        images = self.characters.images.to(indices.labels.device)
        self.characters = self.characters._replace(images=images)
        exemplars = rotate(images[indices.exemplars], indices.turns)[:, :, :, None] / 255
        queries = rotate(images[indices.queries], indices.turns.gather(1, indices.labels))[:, :, None] / 255
        return Episodes(exemplars, queries, indices.labels, indices.segment, choose)


class OfficialRuns(EpisodeSet):
    """The twenty runs of Lake et al. (2015): 20 characters of one alphabet, with one exemplar and one query each."""

    def __init__(self, name: str, runs: Sequence[characters.OneShotRun]):
        self.name, self.turns, self.answers = name, 1, [run.answers.numpy() for run in runs]
        images = torch.cat([torch.cat([run.training, run.test]) for run in runs])
        self.characters = CharacterGroups(images, 1, {})

    def __getitem__(self, key: Key) -> tuple[list[np.ndarray], Segment]:
        index, segment = key
        answers, ways = self.answers[index], len(self.answers[index])
        start = index * 2 * ways
        return [start + np.arange(ways)[:, None], start + ways + np.arange(ways), 0 * answers, answers], segment


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate images (E, n, ..., P, P) in place by quarter turns (E, n), counter-clockwise.

    >>> import torch
    >>> rotate(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[1]])).tolist()
    [[[[2, 4], [1, 3]]]]
    """
    for quarters in turns.unique().tolist():
        chosen = turns == quarters
        images[chosen] = images[chosen].rot90(quarters, (-2, -1))
    return images


class EpisodeNames(NamedTuple):
    """Names of an episode's alphabet, classes and queries."""

    alphabet: str
    classes: list[str]
    queries: list[str]


class Case(NamedTuple):
    """A test case: the shape of its episodes and the task."""

    ways: int
    shots: int
    within_alphabet: bool
    choose: Literal["candidate", "class"]
    rotations: bool = False
    official_runs: bool = False

    @property
    def episode(self) -> Episode:
        return Episode(self.ways, self.shots, 1)


class OneShotDataModule(MetaDataModule):
    """Episodes of Omniglot's characters, and of the user's own alphabets for ``predict``.

    The first test case has the options below. Each further case in ``tests`` lists its differences from the first, such
    as ``{"ways": 5, "within_alphabet": false}``. Its option ``choose`` sets the task: in ``candidate`` (paper) each
    exemplar chooses one of the queries; in ``class`` (usual today) each query chooses one of the classes.
    ``{"official_runs": true}`` tests on the twenty runs of Lake et al. (2015).

    Args:
        root: Folder that contains ``omniglot-py/``.
        source: ``paper`` (Omniglot), ``stand-in`` (letters of matplotlib's fonts), or ``auto`` (Omniglot if it is in
            ``root`` or can be downloaded, else the letters).
        download: Download Omniglot if it is missing.
        split: ``lake`` (paper) tests on the 20 evaluation alphabets and trains on the 30 background alphabets, except
            five for validation. ``vinyals`` splits the characters by their number.
        within_alphabet: Take all classes of an episode from one alphabet (paper), in training, validation and the
            first test case.
        rotations: In training, make each rotation of a character by 0, 90, 180 and 270 degrees a class (paper: no).
            Test cases have their own option ``rotations``.
        ways: Number of classes of a validation or test episode (paper: 20).
        shots: Number of exemplars of each class in validation and test.
        tests: Further test cases by name.
        batch_size: Number of episodes of each process in each step.
        val_episodes: Number of episodes to validate on.
        test_episodes: Number of episodes of each test case except the official runs.
        predict_episodes: Number of test episodes that ``predict`` draws if ``alphabets`` is not set.
        alphabets: Folder with the user's alphabets, each a folder with ``examples/CLASS.png`` and ``queries/*.png``.
        augment: Strength of augmentation (paper: 0). Half of the training images are rotated and sheared by up to this
            many degrees, and scaled and shifted by up to this many per cent.
        num_workers: Number of processes that sample episodes; 0 samples them in the training process.
        seed: Seed of the training episodes.

    Raises:
        InputError: If files are missing or damaged, an alphabet has fewer characters than a test episode has ways, or a
            test case has an unknown option.

    >>> list(OneShotDataModule(tests={"5-way": {"ways": 5}}).cases)
    ['20-way 1-shot within an alphabet', '5-way']
    """

    def __init__(
        self,
        root: str = "data",
        source: Source = "auto",
        download: bool = True,
        split: Literal["lake", "vinyals"] = "lake",
        within_alphabet: bool = True,
        rotations: bool = False,
        ways: int = 20,
        shots: int = 1,
        tests: dict[str, dict[str, Any]] | None = None,
        batch_size: int = 4,
        val_episodes: int = 50,
        test_episodes: int = 250,
        predict_episodes: int = 4,
        alphabets: str | None = None,
        augment: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        share = augment / 100
        self.augmentation = RandomAffine(augment, (share, share), (1 - share, 1 + share), augment)
        first = Case(ways, shots, within_alphabet, "candidate" if shots == 1 else "class")
        where = "within an alphabet" if within_alphabet else "across alphabets"
        self.cases = {f"{ways}-way {shots}-shot {where}": first}
        for name, options in (tests or {}).items():
            if unknown := options.keys() - set(Case._fields):
                raise InputError(f"data.tests: {name}: unknown option {min(unknown)}; use {', '.join(Case._fields)}")
            self.cases[name] = case = first._replace(**options)
            if case.choose == "candidate" and case.shots > 1:
                raise InputError(
                    f"data.tests: {name}: choose: candidate needs shots: 1; use choose: class for more shots"
                )

    @property
    def present(self) -> bool:
        return characters.has_omniglot(self.hparams.root)

    def fetch(self) -> None:
        characters.download_omniglot(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h, folder = self.hparams, f"{self.hparams.root}/omniglot-py"
        if h.split == "vinyals" and h.source != "paper" and not (h.source == "auto" and self.present):
            raise InputError(
                f"data.split: vinyals needs Omniglot's character numbers, but Omniglot is not in {folder}: put it "
                "there or use data.split: lake"
            )
        self.official = self.use_papers_data(
            "Omniglot", folder, "letters of matplotlib's fonts, a stand-in for Omniglot"
        )
        if self.official:
            background, evaluation = (characters.omniglot(h.root, evaluation=part) for part in (False, True))
        else:
            background, evaluation = characters.font_alphabets()
        if h.split == "vinyals":
            background, evaluation = vinyals_split(background | evaluation)
        val = {name: alphabet for name, alphabet in background.items() if name in VALIDATION}
        train = {name: alphabet for name, alphabet in background.items() if name not in VALIDATION}
        self.alphabets = {"train": train, "val": val, "test": evaluation, "predict": evaluation}
        first = next(iter(self.cases.values()))
        self.sets = {name: self._set(name, h.within_alphabet) for name in ("val", "predict")}
        self.sets["train"] = self._set("train", h.within_alphabet, h.rotations)
        for name in ("val", "predict"):
            self.sets[name].too_small(first.episode)
        if stage == "test":
            self._add_cases()
        self.own = characters.own_alphabets(h.alphabets) if stage == "predict" and h.alphabets else []
        self.counts = {"val": h.val_episodes, "test": h.test_episodes, "predict": h.predict_episodes}
        self.test_name = f"episodes of {len(evaluation)} test alphabets, {h.split} split"

    def _set(self, name: str, within_alphabet: bool, rotations: bool = False) -> EpisodeSet:
        split = name.split("/")[0]
        characters = group_characters(self.alphabets[split], within_alphabet)
        return EpisodeSet(name, characters, rotations, self.hparams.seed if split == "train" else 0)

    def _add_cases(self) -> None:
        for name, case in list(self.cases.items()):
            if not case.official_runs:
                self.sets[f"test/{name}"] = cases = self._set(f"test/{name}", case.within_alphabet, case.rotations)
                if small := cases.too_small(case.episode):
                    raise InputError(
                        f"data.tests: {name}: {case.ways} ways, but the test alphabet {small[0]} has fewer characters: "
                        "lower the ways or set within_alphabet: false"
                    )
            elif self.official:
                self.sets[f"test/{name}"] = OfficialRuns(f"test/{name}", characters.one_shot_runs(self.hparams.root))
            else:
                rank_zero_warn(f"test case {name} is skipped: official_runs needs Omniglot, which is missing")
                del self.cases[name]

    def train_dataloader(self) -> DataLoader:
        shapes = {segment.episode for segment in islice(self.scheduled().segments(), len(self.scheduled()))}
        if None in shapes:
            raise InputError(
                "schedule.ways is not set: set the number of classes of an episode, e.g. --schedule.ways 5"
            )
        small = {name for shape in shapes for name in self.sets["train"].too_small(shape)}
        if small:
            rank_zero_warn(f"alphabets with too few characters for some training episodes: {', '.join(sorted(small))}")
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("val", episode=next(iter(self.cases.values())).episode)

    def test_dataloader(self) -> list[DataLoader]:
        counts = {
            name: len(self.sets[f"test/{name}"].answers) if case.official_runs else self.counts["test"]
            for name, case in self.cases.items()
        }
        return [
            self.evaluation_loader(f"test/{name}", counts[name], episode=case.episode)
            for name, case in self.cases.items()
        ]

    def predict_dataloader(self) -> DataLoader:
        if self.own:
            return DataLoader([self._own_episode(i) for i in range(len(self.own))], batch_size=None)
        first = next(iter(self.cases.values())).episode
        return self.evaluation_loader("predict", episode=first)

    def _own_episode(self, index: int) -> Episodes:
        own = self.own[index]
        exemplars, queries = own.examples[None, :, None, None] / 255, own.queries[None, :, None] / 255
        unknown = torch.full((1, len(own.queries)), -1)
        return Episodes(exemplars, queries, unknown, Segment(index, 0, 1, True))

    def names(self, number: int, labels: list[int]) -> EpisodeNames:
        """Return the names that ``predict`` writes for an episode with these labels."""
        if self.own:
            own = self.own[number]
            return EpisodeNames(own.name, own.classes, own.query_names)
        return EpisodeNames(
            f"{number:03d}", [f"class {w}" for w in range(max(labels) + 1)], [f"of class {w}" for w in labels]
        )

    def on_after_batch_transfer(self, batch: EpisodeIndices | Episodes, dataloader_idx: int) -> Episodes:
        if isinstance(batch, EpisodeIndices):
            case = self.cases.get(batch.set_name.removeprefix("test/"), next(iter(self.cases.values())))
            batch = self.sets[batch.set_name].episodes(batch, case.choose)
        if self.trainer.training and self.hparams.augment:
            # like MetaSchedule, which seeds a step only after this hook
            with torch.random.fork_rng():
                torch.manual_seed(seed_of(self.hparams.seed, self.trainer.global_rank, batch.segment.problem))
                batch = self._augmented(batch)
        return self.trainer.precision_plugin.convert_input(batch)  # Lightning converted the batch before it had images

    def _augmented(self, batch: Episodes) -> Episodes:
        exemplars, queries = batch.exemplars, batch.queries
        return batch._replace(
            exemplars=self.augmentation(exemplars.flatten(0, 2)).view_as(exemplars),
            queries=self.augmentation(queries.flatten(0, 1)).view_as(queries),
        )


def group_characters(alphabets: dict[str, characters.Alphabet], within_alphabet: bool) -> CharacterGroups:
    """Join the characters of all alphabets. Each alphabet is a group, or all together are one."""
    images = torch.cat([alphabet.images for alphabet in alphabets.values()])
    ends = np.cumsum([len(alphabet.images) for alphabet in alphabets.values()])
    groups = np.split(np.arange(len(images)), ends[:-1])
    names = list(alphabets) if within_alphabet else ["all alphabets together"]
    groups = groups if within_alphabet else [np.arange(len(images))]
    return CharacterGroups(images.flatten(0, 1), images.shape[1], dict(zip(names, groups, strict=True)))


def vinyals_split(alphabets: Alphabets) -> tuple[Alphabets, Alphabets]:
    """Split by number as Vinyals et al. (2016): characters 1 to 1,200 for training, the others for test."""
    parts: tuple[dict, dict] = {}, {}
    for name, (images, numbers) in alphabets.items():
        numbers = torch.tensor(numbers)
        for part, chosen in zip(parts, (numbers <= VINYALS_TRAINING, numbers > VINYALS_TRAINING), strict=True):
            if chosen.any():
                part[name] = characters.Alphabet(images[chosen], numbers[chosen].tolist())
    return parts
