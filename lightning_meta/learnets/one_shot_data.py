"""Episodes of characters (Bertinetto et al. 2016, section 4.1), drawn by their number.

Shapes: C characters of D drawings, P x P pixels; E episodes of W ways and S shots, X queries.
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
from lightning_meta.seeding import generator, seed_of
from lightning_meta.sources import characters

VALIDATION = {  # of Omniglot those of Vinyals et al. (2016), 172 characters; then of the fonts
    *("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"),
    *("Armenian capitals", "Armenian small letters", "Lisu"),
}
VINYALS_TRAINING = 1200  # characters by number; all others are their test's


Alphabets = dict[str, characters.Alphabet]


class Episodes(NamedTuple):
    """E episodes."""

    exemplars: Tensor  # (E, W, S, 1, P, P), ink 1
    queries: Tensor  # (E, X, 1, P, P), in random order
    labels: Tensor  # (E, X): the class of each query, 0 <= l < W; -1: not known
    segment: Segment
    choose: Literal["candidate", "class"] = "class"


class Drawn(NamedTuple):
    """Episodes as the loader brings them: which pictures, and how they are turned."""

    set_name: str
    exemplars: Tensor  # (E, W, S): number of the drawing
    queries: Tensor  # (E, X)
    turns: Tensor  # (E, W): quarter turns of each class
    labels: Tensor  # (E, X)
    segment: Segment


class Characters(NamedTuple):
    """Characters in groups: episodes take all their classes from one."""

    images: Tensor  # (C * D, P, P), uint8
    drawings: int  # D
    groups: dict[str, np.ndarray]  # numbers of the characters of each alphabet


class EpisodeSet(Dataset):
    """Random episodes.

    Args:
        name: What batches carry; its first word says which random numbers are drawn.
        characters: What they are made of; groups smaller than an episode's ways are passed over.
        rotations: Take every quarter turn of a character for a class of its own.
        seed: Of the random numbers.
    """

    def __init__(self, name: str, characters: Characters, rotations: bool, seed: int):
        self.key = (seed, SPLITS[name.split("/")[0]])
        self.name, self.characters, self.turns = name, characters, 4 if rotations else 1

    def too_small(self, episode: Episode) -> list[str]:
        """The groups that have fewer classes than the episode.

        Raises:
            InputError: If all have, or there are too few drawings of a character.
        """
        groups, needed = self.characters.groups, episode.shots + episode.queries
        if needed > self.characters.drawings:
            raise InputError(
                f"{episode.shots} shots and {episode.queries} queries of the {self.characters.drawings} drawings of a "
                "character: choose fewer"
            )
        small = [name for name, group in groups.items() if len(group) * self.turns < episode.ways]
        if len(small) == len(groups):
            most = max(len(group) * self.turns for group in groups.values())
            raise InputError(f"no alphabet has {episode.ways} characters, the largest {most}: choose fewer ways")
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

    def collate(self, samples: list[tuple[list[np.ndarray], Segment]]) -> Drawn:
        """Joins samples of one shape."""
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*(s for s, _ in samples), strict=True)]
        return Drawn(self.name, *columns, samples[0][1])

    def episodes(self, drawn: Drawn, choose: Literal["candidate", "class"]) -> Episodes:
        """The pictures, on the device where ``drawn`` is; they stay there."""
        images = self.characters.images.to(drawn.labels.device)
        self.characters = self.characters._replace(images=images)
        exemplars = turned(images[drawn.exemplars], drawn.turns)[:, :, :, None] / 255
        queries = turned(images[drawn.queries], drawn.turns.gather(1, drawn.labels))[:, :, None] / 255
        return Episodes(exemplars, queries, drawn.labels, drawn.segment, choose)


class OfficialRuns(EpisodeSet):
    """Lake et al.'s twenty runs: 20 characters of an alphabet, one exemplar and one query of each."""

    def __init__(self, name: str, runs: Sequence[characters.Run]):
        self.name, self.turns, self.answers = name, 1, [run.answers.numpy() for run in runs]
        images = torch.cat([torch.cat([run.training, run.test]) for run in runs])
        self.characters = Characters(images, 1, {})

    def __getitem__(self, key: Key) -> tuple[list[np.ndarray], Segment]:
        index, segment = key
        answers, ways = self.answers[index], len(self.answers[index])
        start = index * 2 * ways
        return [start + np.arange(ways)[:, None], start + ways + np.arange(ways), 0 * answers, answers], segment


def turned(pictures: Tensor, turns: Tensor) -> Tensor:
    """Pictures (E, n, ..., P, P), each turned by its quarter turns (E, n)."""
    for quarters in turns.unique().tolist():
        which = turns == quarters
        pictures[which] = pictures[which].rot90(quarters, (-2, -1))
    return pictures


class Names(NamedTuple):
    """What the pictures of an episode are called."""

    alphabet: str
    classes: list[str]
    queries: list[str]


class Case(NamedTuple):
    """A test: the shape of its episodes, and who chooses among what."""

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
    """Omniglot in episodes, and the user's own alphabets for ``predict``.

    A test case differs from the first in what is given: ``{"ways": 5, "within_alphabet": false}``. Its ``choose`` is
    ``candidate`` (paper: each exemplar has to be found among queries of all classes) or ``class`` (as is usual today:
    each query gets the class of the exemplars that it is most like). ``{"official_runs": true}`` is Lake et al.'s
    twenty runs.

    Args:
        root: Folder with ``omniglot-py/``.
        source: ``paper`` is Omniglot, ``stand-in`` letters of the fonts that matplotlib brings; ``auto`` the first of
            them that is there.
        download: Download Omniglot where it is missing.
        split: ``lake`` trains on the 30 background alphabets but five, which are for validation, and tests on the 20
            evaluation alphabets (paper); ``vinyals`` divides the characters by their number.
        within_alphabet: Take an episode's classes from one alphabet (paper), in training, validation and the first
            test case.
        rotations: Quarter turns of a character are classes of their own in training (paper: no); a test case has its
            own such option.
        ways: Of validation and test episodes (paper: 20).
        shots: Exemplars of a class in validation and test.
        tests: Further test cases by name.
        batch_size: Episodes a process and step.
        val_episodes: To validate on.
        test_episodes: To test on, for each case but the official runs.
        predict_episodes: Test episodes that ``predict`` shows where there are no alphabets of the user's.
        alphabets: Folder of the user's own, one folder each with ``examples/NAME.png`` and ``queries/*.png``.
        augment: Turn and shear half of the training pictures by up to so many degrees, scale and shift them by as many
            per cent (paper: 0).
        num_workers: Processes that draw episodes; 0 draws them in the training process.
        seed: Of the training episodes.

    Raises:
        InputError: Where files are missing or damaged, an alphabet has fewer characters than a test episode, or a case
            has options that there are not.
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
                raise InputError(f"data.tests: {name}: no option {min(unknown)}: there are {', '.join(Case._fields)}")
            self.cases[name] = case = first._replace(**options)
            if case.choose == "candidate" and case.shots > 1:
                raise InputError(f"data.tests: {name}: one exemplar chooses its candidate: shots 1, or choose: class")

    @property
    def present(self) -> bool:
        return characters.has_omniglot(self.hparams.root)

    def fetch(self) -> None:
        characters.download_omniglot(self.hparams.root)

    def make_sets(self, stage: str) -> None:
        h, folder = self.hparams, f"{self.hparams.root}/omniglot-py"
        if h.split == "vinyals" and h.source != "paper" and not (h.source == "auto" and self.present):
            raise InputError(
                f"data.split: vinyals divides Omniglot's characters by number, and Omniglot is not in {folder}: put it "
                "there, or choose lake"
            )
        self.official = self.use_papers_data(
            "Omniglot", folder, "letters of matplotlib's fonts, a stand-in for Omniglot"
        )
        if self.official:
            background, evaluation = (characters.omniglot(h.root, evaluation=part) for part in (False, True))
        else:
            background, evaluation = characters.font_alphabets()
        if h.split == "vinyals":
            background, evaluation = by_number(background | evaluation)
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
        characters = gather(self.alphabets[split], within_alphabet)
        return EpisodeSet(name, characters, rotations, self.hparams.seed if split == "train" else 0)

    def _add_cases(self) -> None:
        for name, case in list(self.cases.items()):
            if not case.official_runs:
                self.sets[f"test/{name}"] = cases = self._set(f"test/{name}", case.within_alphabet, case.rotations)
                if small := cases.too_small(case.episode):
                    raise InputError(
                        f"{name}: {small[0]} has fewer than {case.ways} characters among the test's: choose fewer ways "
                        "or within_alphabet: false"
                    )
            elif self.official:
                self.sets[f"test/{name}"] = OfficialRuns(f"test/{name}", characters.one_shot_runs(self.hparams.root))
            else:
                rank_zero_warn(f"{name}: left out, it is made of Omniglot, which is not there")
                del self.cases[name]

    def train_dataloader(self) -> DataLoader:
        shapes = {segment.episode for segment in islice(self.scheduled().segments(), len(self.scheduled()))}
        if None in shapes:
            raise InputError("schedule.ways: say how many classes an episode has, e.g. --schedule.ways 5")
        small = {name for shape in shapes for name in self.sets["train"].too_small(shape)}
        if small:
            rank_zero_warn(f"too small for some training episodes and left out of those: {', '.join(sorted(small))}")
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

    def names(self, number: int, labels: list[int]) -> Names:
        """What the classes and queries of a ``predict`` episode are called."""
        if self.own:
            own = self.own[number]
            return Names(own.name, own.classes, own.query_names)
        return Names(f"{number:03d}", [f"class {w}" for w in range(max(labels) + 1)], [f"of class {w}" for w in labels])

    def on_after_batch_transfer(self, batch: Drawn | Episodes, dataloader_idx: int) -> Episodes:
        if isinstance(batch, Drawn):
            case = self.cases.get(batch.set_name.removeprefix("test/"), next(iter(self.cases.values())))
            batch = self.sets[batch.set_name].episodes(batch, case.choose)
        if self.trainer.training and self.hparams.augment:
            # as MetaSchedule does for a step's random numbers, but it comes after this hook
            with torch.random.fork_rng():
                torch.manual_seed(seed_of(self.hparams.seed, self.trainer.global_rank, batch.segment.problem))
                batch = self._augmented(batch)
        return self.trainer.precision_plugin.convert_input(batch)  # Lightning's turn was before there were pictures

    def _augmented(self, batch: Episodes) -> Episodes:
        exemplars, queries = batch.exemplars, batch.queries
        return batch._replace(
            exemplars=self.augmentation(exemplars.flatten(0, 2)).view_as(exemplars),
            queries=self.augmentation(queries.flatten(0, 1)).view_as(queries),
        )


def gather(alphabets: dict[str, characters.Alphabet], within_alphabet: bool) -> Characters:
    """The characters of all alphabets in one row; one group an alphabet, or one of all."""
    images = torch.cat([alphabet.images for alphabet in alphabets.values()])
    ends = np.cumsum([len(alphabet.images) for alphabet in alphabets.values()])
    groups = np.split(np.arange(len(images)), ends[:-1])
    names = list(alphabets) if within_alphabet else ["all alphabets together"]
    groups = groups if within_alphabet else [np.arange(len(images))]
    return Characters(images.flatten(0, 1), images.shape[1], dict(zip(names, groups, strict=True)))


def by_number(alphabets: Alphabets) -> tuple[Alphabets, Alphabets]:
    """The split of Vinyals et al. (2016): characters up to number 1,200, and those after it."""
    parts: tuple[dict, dict] = {}, {}
    for name, (images, numbers) in alphabets.items():
        numbers = torch.tensor(numbers)
        for part, chosen in zip(parts, (numbers <= VINYALS_TRAINING, numbers > VINYALS_TRAINING), strict=True):
            if chosen.any():
                part[name] = characters.Alphabet(images[chosen], numbers[chosen].tolist())
    return parts
