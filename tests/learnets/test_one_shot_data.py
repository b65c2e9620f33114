from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, Precision
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.learnets.one_shot import OneShotRecognition
from lightning_meta.learnets.one_shot_data import (
    CharacterGroups,
    EpisodeSet,
    OfficialRuns,
    OneShotDataModule,
    group_characters,
    rotate,
    vinyals_split,
)
from lightning_meta.running.schedule import MetaSchedule
from lightning_meta.running.segments import Episode, Segment, SegmentSampler
from lightning_meta.sources import characters as omniglot
from tests.conftest import arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

# alphabet: number of its first character, characters
BACKGROUND = {"Armenian": (1, 6), "Greek": (7, 12), "Korean": (19, 3), "Latin": (22, 9)}  # Armenian is for validation
EVALUATION = {"Angelic": (1196, 8), "Tibetan": (1204, 6)}
TRAIN, VAL, TEST = set(range(7, 31)), set(range(1, 7)), set(range(1196, 1210))
ALPHABET = {
    number: name for name, (first, count) in (BACKGROUND | EVALUATION).items() for number in range(first, first + count)
}


def picture(number, drawing):
    """A character that encodes its number and drawing in the grey of squares; its upper left corner is white."""
    image = torch.full((28, 28), number % 200, dtype=torch.uint8)
    image[8:20, 8:20] = number // 200
    image[12:16, 12:16] = drawing
    image[0, 0] = 255
    return image


def read(pictures):
    """Decode number, drawing and quarter turns of images (..., 28, 28), ink 1."""
    levels = (255 * pictures).round().int()
    numbers = levels[..., 4, 4] + 200 * levels[..., 9, 9]
    corners = torch.stack([levels[..., i, j] for i, j in ((0, 0), (-1, 0), (-1, -1), (0, -1))], -1)
    return numbers, levels[..., 14, 14], corners.argmax(-1)


def alphabets(layout, drawings=20):
    def alphabet(first, characters):
        numbers = list(range(first, first + characters))
        images = [torch.stack([picture(number, drawing) for drawing in range(drawings)]) for number in numbers]
        return omniglot.Alphabet(torch.stack(images), numbers)

    return {name: alphabet(*place) for name, place in layout.items()}


@pytest.fixture(scope="module")
def sets():
    return alphabets(BACKGROUND), alphabets(EVALUATION)


@pytest.fixture(autouse=True)
def sources(monkeypatch, sets):
    """Replace Omniglot, in the folder ``omniglot``, and the fonts by small alphabets."""

    def fail(*_):
        raise AssertionError("a test wants to download")

    monkeypatch.setattr(omniglot, "has_omniglot", lambda root: root == "omniglot")
    monkeypatch.setattr(omniglot, "omniglot", lambda root, evaluation: sets[evaluation])
    monkeypatch.setattr(omniglot, "font_alphabets", lambda: ({"Lisu": sets[0]["Armenian"]} | sets[0], sets[1]))
    monkeypatch.setattr(omniglot, "download_omniglot", fail)


def data_of(stage="fit", rank=0, world_size=1, precision=None, **options):
    data = OneShotDataModule(**{"root": "omniglot", "ways": 4, "batch_size": 2} | options)
    plugin = precision or Precision()
    data.trainer = SimpleNamespace(
        training=stage == "fit", global_rank=rank, world_size=world_size, precision_plugin=plugin
    )
    data.setup(stage)
    return data


def training(data, steps=100, **schedule):
    """The training batches of a schedule."""
    data.train_batches = SegmentSampler(
        MetaSchedule(**schedule).segments,
        first=lambda: 0,
        length=steps,
        batch_size=data.batch_size,
        rank=data.trainer.global_rank,
        world_size=data.trainer.world_size,
    )
    return pictured(data, islice(data.train_dataloader(), steps))


def pictured(data, batches):
    return [data.on_after_batch_transfer(batch, 0) for batch in batches]


def shape(ways, shots=1, queries=1):
    return Segment(0, 0, 1, True, Episode(ways, shots, queries))


def episode_set(name="train", rotations=False, seed=0, layout=BACKGROUND, within_alphabet=True):
    return EpisodeSet(name, group_characters(alphabets(layout), within_alphabet), rotations, seed)


def draw(episodes, indices, segment):
    return episodes.episodes(episodes.collate([episodes[i, segment] for i in indices]), "class")


def check(episodes, within_alphabet=True):
    """Classes are different characters of one alphabet, labels are right, and no drawing occurs twice."""
    numbers, drawings, turns = read(episodes.exemplars[:, :, :, 0])
    query_numbers, query_drawings, query_turns = read(episodes.queries[:, :, 0])
    for e, labels in enumerate(episodes.labels):
        assert (numbers[e] == numbers[e, :, :1]).all(), "the shots of a class show one character"
        assert (turns[e] == turns[e, :, :1]).all()
        classes = list(zip(numbers[e, :, 0].tolist(), turns[e, :, 0].tolist(), strict=True))
        assert len(set(classes)) == len(classes)
        if within_alphabet:
            assert len({ALPHABET[number] for number, _ in classes}) == 1
        shown = [classes[label] for label in labels]
        assert shown == list(zip(query_numbers[e].tolist(), query_turns[e].tolist(), strict=True))
        assert len(set(Counter(labels.tolist()).values())) == 1
        assert set(labels.tolist()) == set(range(len(classes)))
        seen = [*zip(classes, drawings[e].tolist(), strict=True)]
        for w, (of_class, exemplars) in enumerate(seen):
            used = exemplars + query_drawings[e][labels == w].tolist()
            assert len(set(used)) == len(used), f"a drawing of {of_class} is among exemplars and queries"


SIZES = pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 1, 1), (3, 4, 2), (9, 1, 19), (12, 2, 3)])


@SIZES
@pytest.mark.parametrize("rotations", [False, True])
def test_episodes_are_right_by_construction(ways, shots, queries, rotations):
    episodes = draw(episode_set(rotations=rotations), range(30), shape(ways, shots, queries))
    assert episodes.exemplars.shape == (30, ways, shots, 1, 28, 28)
    assert episodes.queries.shape == (30, ways * queries, 1, 28, 28)
    assert episodes.labels.shape == (30, ways * queries)
    assert episodes.exemplars.dtype == episodes.queries.dtype == torch.float32
    assert episodes.segment == shape(ways, shots, queries)
    check(episodes)


def test_across_alphabets_classes_mix():
    episodes = draw(episode_set(within_alphabet=False), range(20), shape(20))
    check(episodes, within_alphabet=False)
    assert {len({ALPHABET[n] for n in row.tolist()}) for row in read(episodes.exemplars)[0][:, :, 0, 0]} >= {3, 4}


def test_the_right_query_is_at_no_place_of_its_own():
    episodes = draw(episode_set(), range(400), shape(4))
    places = (episodes.labels == 0).int().argmax(1).bincount(minlength=4)
    assert (places > 60).all()
    assert len({tuple(row) for row in episodes.labels.tolist()}) == 24


def test_all_characters_and_drawings_are_drawn():
    for rotations, seen in ((False, 30 * 20), (True, 4 * 30 * 20)):
        episodes = draw(episode_set(rotations=rotations), range(1500), shape(3, 2, 3))
        names = zip(*(part.flatten().tolist() for part in read(episodes.queries)), strict=True)
        assert len(set(names)) > 0.95 * seen
        assert {turn for *_, turn in names} <= set(range(4 if rotations else 1))


def test_quarter_turns_are_classes_of_their_own():
    """Korean has 3 characters, so 12 classes with rotations; no alphabet has 40."""
    korean = {"Korean": BACKGROUND["Korean"]}
    episodes = draw(episode_set(rotations=True, layout=korean), range(20), shape(12))
    check(episodes)
    numbers, _, turns = read(episodes.exemplars)
    for row in zip(numbers[:, :, 0, 0].tolist(), turns[:, :, 0, 0].tolist(), strict=True):
        assert set(zip(*row, strict=True)) == {(n, t) for n in (19, 20, 21) for t in range(4)}
    check(episodes := draw(episode_set(rotations=True), range(20), shape(40)))
    assert {ALPHABET[n] for n in read(episodes.queries)[0].flatten().tolist()} == {"Greek"}


def test_turning_is_by_each_class():
    pictures = torch.rand(3, 4, 2, 1, 5, 5, dtype=torch.float64)
    turns = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 0, 0]])
    got = rotate(pictures.clone(), turns)
    for e in range(3):
        for w in range(4):
            for s in range(2):
                wanted = np.rot90(pictures[e, w, s, 0].numpy(), turns[e, w].item())
                assert np.array_equal(got[e, w, s, 0].numpy(), wanted)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_an_episode_is_a_function_of_seed_split_and_number():
    episodes, segment = episode_set(), shape(3, 2, 2)
    first = [episodes[i, segment] for i in range(8)]
    assert all(same(episodes[i, segment], first[i]) for i in reversed(range(8)))
    assert same(episode_set()[7, segment], first[7])
    assert same(episodes[7, Segment(99, 0, 1, True, segment.episode)], first[7])
    others = [episode_set(seed=1), episode_set("val"), episode_set("test/a"), episode_set("predict")]
    assert not any(same(other[7, segment], first[7]) for other in [*others, {(7, segment): first[6]}])
    assert same(episode_set("test/a")[7, segment], episode_set("test/b")[7, segment])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_same_with_workers(workers):
    schedule = {"steps": 6, "ways": [[0, 2], [4, 3]], "queries": 2}
    batches, again = training(data_of(num_workers=workers), **schedule), training(data_of(), **schedule)
    for batch, other in zip(batches, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3], strict=True))
    assert [batch.segment.problem for batch in batches] == list(range(6))
    assert [batch.exemplars.shape[:3] for batch in batches] == [(2, 2, 1)] * 4 + [(2, 3, 1)] * 2
    assert len({batch.queries.sum().item() for batch in batches}) == 6


def test_only_training_depends_on_the_seed():
    one, two = data_of(seed=1), data_of(seed=2)
    for name in ("val", "predict"):
        assert same(one.sets[name][3, shape(4)], two.sets[name][3, shape(4)])
    assert not same(one.sets["train"][3, shape(4)], two.sets["train"][3, shape(4)])


def test_processes_draw_different_episodes_that_are_those_of_a_larger_batch():
    schedule = {"steps": 3, "ways": 3}
    whole = training(data_of(batch_size=4), **schedule)
    parts = [training(data_of(rank=rank, world_size=2), **schedule) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([half.queries for half in halves]), batch.queries)
        assert not torch.equal(halves[0].queries, halves[1].queries)
    whole = pictured(data_of("validate", val_episodes=5), data_of("validate", val_episodes=5).val_dataloader())
    assert [len(batch.labels) for batch in whole] == [2, 2, 1]
    for rank in range(2):
        data = data_of("validate", rank, 2, val_episodes=5)
        part = torch.cat([batch.queries for batch in pictured(data, data.val_dataloader())])
        assert torch.equal(part, torch.cat([batch.queries for batch in whole])[rank::2])


def numbers_in(batches):
    """The numbers of the characters in batches."""
    shown = [read(part)[0].flatten() for batch in batches for part in (batch.exemplars, batch.queries)]
    return set(torch.cat(shown).tolist())


@pytest.mark.parametrize("within_alphabet", [True, False])
@pytest.mark.parametrize("source", ["omniglot", "fonts"])
@pytest.mark.filterwarnings("ignore:Omniglot not found in fonts")
@pytest.mark.filterwarnings("ignore:too small for some")
def test_no_pair_of_a_test_alphabet_is_ever_trained_on(within_alphabet, source):
    data = data_of("test", root=source, within_alphabet=within_alphabet, test_episodes=100)
    data.trainer.training = True
    batches = training(data, 400, ways=[[0, 2], [100, 3], [200, 7]], shots=[[0, 1], [300, 3]], queries=2)
    for batch in batches[::20]:
        check(batch, within_alphabet)
    assert numbers_in(batches) == TRAIN
    data.trainer.training = False
    (cases,) = data.test_dataloader()
    assert numbers_in(pictured(data, cases)) == TEST
    assert numbers_in(pictured(data, data.val_dataloader())) == VAL
    assert numbers_in(pictured(data, data.predict_dataloader())) <= TEST
    # characters that were not sampled are not in the set
    assert set(read(data.sets["train"].characters.images / 255)[0].tolist()) == TRAIN


def test_characters_by_number_are_never_in_both(sets):
    train, test = vinyals_split(sets[0] | sets[1])
    assert {name: alphabet.numbers for name, alphabet in train.items() if name not in BACKGROUND} == {
        "Angelic": [1196, 1197, 1198, 1199, 1200]
    }
    assert {name: alphabet.numbers for name, alphabet in test.items()} == {
        "Angelic": [1201, 1202, 1203],
        "Tibetan": [1204, 1205, 1206, 1207, 1208, 1209],
    }
    for part in (train, test):
        for images, numbers in part.values():
            assert read(images[:, 3] / 255)[0].tolist() == numbers
    data = data_of("test", split="vinyals", ways=3, test_episodes=60, within_alphabet=False)
    data.trainer.training = True
    trained = numbers_in(training(data, 200, ways=6))
    assert trained == TRAIN | set(range(1196, 1201))
    data.trainer.training = False
    assert numbers_in(pictured(data, data.val_dataloader())) == VAL
    assert numbers_in(pictured(data, *data.test_dataloader())) == set(range(1201, 1210))


@pytest.mark.parametrize("source", ["auto", "stand-in"])
def test_the_fonts_have_no_such_numbers(source):
    with pytest.raises(InputError, match=r"Omniglot is not in nowhere/omniglot-py.* use data.split: lake"):
        data_of(root="nowhere", source=source, split="vinyals")


def test_where_the_characters_come_from_is_said():
    with pytest.warns(UserWarning, match=r"Omniglot not found in nowhere/omniglot-py: .* a stand-in for Omniglot"):
        data = data_of(root="nowhere")
    assert "stand-in" in data.data_name
    assert "stand-in" in data.hparams.data_name
    assert data_of(source="paper").data_name == "Omniglot"
    assert data_of().test_name == "episodes of 2 test alphabets, lake split"
    assert "stand-in" in data_of(source="stand-in").data_name


def test_only_what_is_missing_is_downloaded(monkeypatch):
    asked = []

    def fails(root):
        asked.append(root)
        raise InputError("Omniglot could not be downloaded")

    monkeypatch.setattr(omniglot, "download_omniglot", fails)
    for options in ({"root": "omniglot"}, {"download": False}, {"source": "stand-in"}, {}, {"source": "paper"}):
        OneShotDataModule(**{"root": "nowhere"} | options).prepare_data()
    assert asked == ["nowhere", "nowhere"]


def test_alphabets_that_are_too_small_for_training_are_passed_over():
    with pytest.warns(UserWarning, match="too few characters for some training episodes: Korean, Latin$"):
        batches = training(data_of(), 60, ways=[[0, 3], [30, 10]])
    assert {ALPHABET[n] for n in numbers_in(batches[:30])} == {"Greek", "Korean", "Latin"}
    assert {ALPHABET[n] for n in numbers_in(batches[30:])} == {"Greek"}


@pytest.mark.parametrize(
    ("options", "schedule", "message"),
    [
        ({}, {"ways": 13}, "13 ways, but the largest alphabet has 12 characters: lower the ways"),
        ({}, {"ways": [[0, 5], [99, 13]]}, "13 ways, but the largest"),
        ({"rotations": True}, {"ways": 49}, "49 ways, but the largest alphabet has 48"),
        ({"within_alphabet": False}, {"ways": 25}, "25 ways, but the largest alphabet has 24"),
        (
            {},
            {"ways": 4, "shots": 18, "queries": 3},
            r"shots \+ queries = 21, but each character has only 20 drawings",
        ),
        ({}, {"unroll": 4}, "schedule.ways is not set: .* --schedule.ways 5"),
    ],
)
def test_training_episodes_that_cannot_be(options, schedule, message):
    with pytest.raises(InputError, match=message):
        training(data_of(**options), **schedule)
    with pytest.raises(InputError, match="no schedule: add "):
        data_of(**options).train_dataloader()


def test_validation_that_cannot_be():
    with pytest.raises(InputError, match="7 ways, but the largest alphabet has 6 characters"):
        data_of(ways=7)
    with pytest.raises(InputError, match=r"shots \+ queries = 21, but .* only 20 drawings"):
        data_of(shots=20)


def test_a_test_alphabet_is_never_passed_over():
    tests = {"many": {"ways": 7}}
    data_of("fit", tests=tests)
    with pytest.raises(InputError, match=r"^data.tests: many: 7 ways, but the test alphabet Tibetan has fewer"):
        data_of("test", tests=tests)
    data_of("test", tests={"many": {"ways": 7, "within_alphabet": False}})
    data_of("test", tests={"many": {"ways": 24, "rotations": True}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 5}, "data.tests: mine: unknown option way; use ways, shots, within_alphabet, choose, "),
        ({"ways": 5, "shots": 5}, "data.tests: mine: choose: candidate needs shots: 1; use choose: class"),
    ],
)
def test_cases_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        OneShotDataModule(tests={"mine": options})


def test_each_case_has_its_episodes():
    tests = {
        "across": {"within_alphabet": False},
        "few": {"ways": 2, "shots": 5, "choose": "class"},
        "turned": {"rotations": True, "choose": "class"},
    }
    data = data_of("test", tests=tests, test_episodes=30, rotations=True)
    assert list(data.cases) == ["4-way 1-shot within an alphabet", *tests]
    assert data.test_samples == 30
    plain, across, few, turns = (pictured(data, loader) for loader in data.test_dataloader())
    for batches, within_alphabet in ((plain, True), (across, False), (few, True), (turns, True)):
        assert sum(len(batch.labels) for batch in batches) == 30
        for batch in batches:
            check(batch, within_alphabet)
    assert plain[0].exemplars.shape[:3] == across[0].exemplars.shape[:3] == (2, 4, 1)
    assert few[0].exemplars.shape[:3] == (2, 2, 5)
    assert {batches[0].choose for batches in (plain, across)} == {"candidate"}
    assert {batches[0].choose for batches in (few, turns)} == {"class"}
    classes = [row.tolist() for batch in across for row in read(batch.exemplars)[0][:, :, 0, 0]]
    assert any(len({ALPHABET[number] for number in row}) == 2 for row in classes)
    assert {turn for batch in turns for turn in read(batch.queries)[2].flatten().tolist()} == set(range(4))
    assert not any(read(batch.queries)[2].any() for batch in plain), "turns are for training, and for cases that ask"


def test_several_shots_are_for_queries_that_choose():
    (case,) = data_of("test", shots=3, within_alphabet=False).cases.items()
    assert case[0] == "4-way 3-shot across alphabets"
    assert case[1].choose == "class"


def runs():
    """Three runs of five characters. Drawing r is the exemplar in run r, drawing r + 10 the query."""
    made, random = [], torch.Generator().manual_seed(0)
    for run in range(3):
        answers, numbers = torch.randperm(5, generator=random), range(1196 + run, 1201 + run)
        training = torch.stack([picture(number, run) for number in numbers])
        made.append(
            omniglot.OneShotRun(training, torch.stack([picture(numbers[a], run + 10) for a in answers]), answers)
        )
    return made


def test_the_official_runs_are_episodes():
    official = OfficialRuns("test/runs", runs())
    episodes = draw(official, [2, 0], shape(20))
    check(episodes)
    assert read(episodes.exemplars)[1].flatten(1).tolist() == [[2] * 5, [0] * 5]
    assert read(episodes.queries)[1].flatten(1).tolist() == [[12] * 5, [10] * 5]
    assert read(episodes.exemplars)[0].flatten(1).tolist() == [list(range(1198, 1203)), list(range(1196, 1201))]
    assert torch.equal(episodes.labels, torch.stack([runs()[2].answers, runs()[0].answers]))


def test_the_official_runs_are_a_case_where_omniglot_is(monkeypatch):
    monkeypatch.setattr(omniglot, "one_shot_runs", lambda root: runs())
    options = {"tests": {"Lake's": {"official_runs": True, "choose": "class"}}, "test_episodes": 4, "rotations": True}
    data = data_of("test", **options)
    first, lakes = (pictured(data, loader) for loader in data.test_dataloader())
    assert [len(batch.labels) for batch in first] == [2, 2]
    assert [len(batch.labels) for batch in lakes] == [2, 1]
    assert lakes[0].choose == "class"
    for batch in lakes:
        check(batch)
    with pytest.warns(UserWarning, match="test case Lake's is skipped: official_runs needs Omniglot"):
        data = data_of("test", source="stand-in", **options)
    assert list(data.cases) == ["4-way 1-shot within an alphabet"]
    assert len(data.test_dataloader()) == 1


def test_characters_are_gathered_in_order(sets):
    images, drawings, groups = group_characters(sets[0], within_alphabet=True)
    assert isinstance(group_characters(sets[0], True), CharacterGroups)
    assert (images.shape, drawings) == ((600, 28, 28), 20)
    numbers, which, _ = read(images / 255)
    assert numbers.tolist() == [n for n in range(1, 31) for _ in range(20)]
    assert which.tolist() == list(range(20)) * 30
    assert {name: (group[0] + 1, len(group)) for name, group in groups.items()} == BACKGROUND
    (everything,) = group_characters(sets[0], within_alphabet=False).groups.values()
    assert everything.tolist() == list(range(30))


def augmented(data, step=3):
    segment = Segment(step, 0, 1, True, Episode(5, 2, 2))
    drawn = data.sets["train"].collate([data.sets["train"][i, segment] for i in range(2)])
    return data.on_after_batch_transfer(drawn, 0)


def test_training_pictures_are_augmented_alike_at_the_same_step():
    data, plain = data_of(augment=10.0), data_of()
    state = torch.get_rng_state()
    one = augmented(data)
    assert torch.equal(torch.get_rng_state(), state), "the module's random numbers are not touched"
    torch.rand(7)
    for name in ("exemplars", "queries"):
        pictures, before = getattr(one, name), getattr(augmented(plain), name)
        assert torch.equal(getattr(augmented(data), name), pictures)
        assert torch.equal(getattr(augmented(data_of(augment=10.0)), name), pictures)
        assert pictures.shape == before.shape
        assert (pictures != before).flatten(-3).any(-1).float().mean() > 0.25
        assert 0 < (pictures - before).abs().mean() < 0.15, "a little"
        for other in (augmented(data, 4), augmented(data_of(augment=10.0, rank=1))):
            assert not torch.equal(getattr(other, name), pictures)
    assert torch.equal(one.labels, augmented(plain).labels)


def test_no_two_drawings_are_augmented_alike():
    """About half of the images stay unchanged."""
    data = data_of(augment=10.0)
    episodes = augmented(data)
    alike = picture(1000, 5).expand_as(episodes.exemplars) / 255
    torch.manual_seed(0)
    changes = data._augmented(episodes._replace(exemplars=alike)).exemplars.flatten(0, 2) - alike[0, 0, 0]
    changes = [tuple(change.flatten().tolist()) for change in changes if change.any()]
    assert len(set(changes)) == len(changes) > 5


def test_only_training_pictures_are_augmented():
    data, plain = data_of(augment=10.0), data_of()
    data.trainer.training = False
    for one, other in zip(*(pictured(d, d.val_dataloader()) for d in (data, plain)), strict=True):
        assert torch.equal(one.queries, other.queries)
        assert torch.equal(one.exemplars, other.exemplars)


def test_pictures_have_the_trainers_precision():
    data = data_of(precision=DoublePrecision())
    batch = training(data, 1, ways=3)[0]
    assert batch.exemplars.dtype == batch.queries.dtype == torch.float64
    assert batch.labels.dtype == torch.int64


def paint(path, column, dark=True):
    """A vertical stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((60, 50), 250 if dark else 5, np.uint8)
    pixels[10:50, column : column + 5] = 5 if dark else 250
    Image.fromarray(pixels).save(path)


@pytest.fixture
def own(tmp_path):
    """Two alphabets of strokes at different positions; a query has the position of its class."""
    for name, columns in (("strokes", (5, 20, 35)), ("two", (10, 30))):
        for column in columns:
            paint(tmp_path / "own" / name / "examples" / f"at {column}.png", column)
            paint(tmp_path / "own" / name / "queries" / f"near {column}.png", column + 1, dark=False)
    paint(tmp_path / "own" / "two" / "queries" / "again.png", 11)
    return tmp_path / "own"


def test_own_alphabets_are_episodes_without_labels(own):
    data = data_of("predict", alphabets=str(own))
    strokes, two = pictured(data, data.predict_dataloader())
    assert strokes.exemplars.shape == (1, 3, 1, 1, 28, 28)
    assert two.exemplars.shape[:3] == (1, 2, 1)
    assert two.queries.shape == (1, 3, 1, 28, 28)
    assert (two.labels == -1).all()
    assert [batch.segment.problem for batch in (strokes, two)] == [0, 1]
    names = data.names(1, two.labels[0].tolist())
    assert names == ("two", ["at 10", "at 30"], ["again.png", "near 10.png", "near 30.png"])
    columns = two.exemplars[0, :, 0, 0].sum(1).argmax(1).tolist()
    assert columns[0] < 14 < columns[1], "in the order of their names"
    assert data_of("fit", alphabets=str(own / "nowhere")).own == [], "they are for predict"


def test_episodes_have_names_where_there_are_no_own_alphabets():
    data = data_of("predict", predict_episodes=3)
    batches = pictured(data, data.predict_dataloader())
    assert [len(batch.labels) for batch in batches] == [2, 1]
    names = data.names(7, batches[0].labels[0].tolist())
    assert (names.alphabet, names.classes) == ("007", ["class 0", "class 1", "class 2", "class 3"])
    assert names.queries == [f"of class {label}" for label in batches[0].labels[0].tolist()]


@pytest.mark.filterwarnings("ignore:Omniglot not found in")
@pytest.mark.filterwarnings("ignore:too small for some")
def test_own_alphabets_are_answered_on_the_command_line(tmp_path, own, capsys):
    main(["fit", *arguments("learnet_omniglot", tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")])
    main(["predict", *arguments("learnet_omniglot", tmp_path, f"--data.alphabets={own}")])
    folder = tmp_path / "learnet_omniglot" / "predictions"
    pictures = {f"{name}_{what}.png" for name in ("strokes", "two") for what in ("answers", "responses")}
    assert {path.name for path in folder.iterdir()} == {"strokes.txt", "two.txt"} | pictures
    checkpoint = tmp_path / "learnet_omniglot" / "checkpoints" / "best.ckpt"
    model = OneShotRecognition.load_from_checkpoint(checkpoint, weights_only=True).eval()
    _, two = pictured(data := data_of("predict", alphabets=str(own)), data.predict_dataloader())
    with torch.no_grad():
        best, places = model.class_scores(two.exemplars, two.queries)[0].max(0)
    header, *lines = (folder / "two.txt").read_text().splitlines()
    assert header.split("\t") == ["query", "answer", "score"]
    for line, query, place, score in zip(lines, ("again", "near 10", "near 30"), places, best, strict=True):
        assert line.split("\t")[:2] == [f"{query}.png", ("at 10", "at 30")[place]]
        assert float(line.split("\t")[2]) == pytest.approx(score.item(), abs=2e-3)
    for name in pictures:
        with Image.open(folder / name) as image:
            assert min(image.size) > 60
    with pytest.raises(SystemExit, match=r"error: .*own/nothing cannot be read"):
        main(["predict", *arguments("learnet_omniglot", tmp_path, f"--data.alphabets={own / 'nothing'}")])


@pytest.mark.slow
def test_the_real_omniglot_and_its_runs(real_data, monkeypatch):
    monkeypatch.undo()
    data = OneShotDataModule(
        root=str(real_data), source="paper", tests={"runs": {"official_runs": True, "choose": "class"}}
    )
    data.trainer = SimpleNamespace(training=False, global_rank=0, world_size=1, precision_plugin=Precision())
    data.setup("test")
    counts = {
        name: (len(part), sum(len(alphabet.numbers) for alphabet in part.values()))
        for name, part in data.alphabets.items()
    }
    assert counts == {"train": (25, 792), "val": (5, 172), "test": (20, 659), "predict": (20, 659)}
    by = vinyals_split(data.alphabets["train"] | data.alphabets["val"] | data.alphabets["test"])
    assert [sum(len(alphabet.numbers) for alphabet in part.values()) for part in by] == [1200, 423]
    random, official = (pictured(data, loader) for loader in data.test_dataloader())
    assert [sum(len(batch.labels) for batch in batches) for batches in (random, official)] == [250, 20]
    for batch in official:
        assert batch.exemplars.shape[1:] == (20, 1, 1, 28, 28)
        assert (batch.labels.sort(1).values == torch.arange(20)).all()
    # each image of a run is a drawing of a test alphabet, where exemplar and query are of the same character
    place = {
        image.numpy().tobytes(): (name, k)
        for name, (images, _) in data.alphabets["test"].items()
        for k, drawings in enumerate(images)
        for image in drawings
    }
    for run, answers in zip(omniglot.one_shot_runs(real_data), data.sets["test/runs"].answers, strict=True):
        training = [place[image.numpy().tobytes()] for image in run.training]
        assert len({name for name, _ in training}) == 1
        assert [place[image.numpy().tobytes()] for image in run.test] == [training[a] for a in answers]
