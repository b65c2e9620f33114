import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.features import Features
from lightning_meta.learned_optimizers.style_data import StyleDataModule, StyleSet, UsersStyleSet
from lightning_meta.learned_optimizers.unroll import loss_and_gradient
from lightning_meta.running.segments import Segment
from tests.conftest import arguments


def picture(seed, height=48, width=64):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save(path, seed, *size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, *size).movedim(0, 2).numpy()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def features():
    return Features("squeezenet1_1")


def test_problem_i_is_a_crop_that_depends_on_i_alone(features):
    sets = [StyleSet("train", 5, features, [picture(0), picture(1)], picture(2), 32) for _ in range(2)]
    whole, chunk = sets[0][3, Segment(3, 0, 8, True)][0], sets[1][3, Segment(3, 4, 8, True)][0]
    assert all(np.array_equal(a, b) for a, b in zip(whole, chunk, strict=True))
    start, content = whole
    assert start.shape == (3 * 32 * 32,)
    assert abs(start.mean() - 0.5) < 0.01
    assert content.shape == (3, 32, 32)
    assert not np.array_equal(content, sets[0][4, Segment(4, 0, 8, True)][0][1])


def test_the_loss_is_the_same_for_one_picture_as_in_a_batch(features):
    problems = StyleSet("test", 0, features, [picture(0)], picture(2), 32).batch(3, 2, torch.empty(0))
    losses, gradients = loss_and_gradient(problems, problems.start, 0)
    one = problems.select(torch.tensor([False, True, False]))
    loss, gradient = loss_and_gradient(one, one.start, 0)
    torch.testing.assert_close(loss, losses[1:2])
    torch.testing.assert_close(gradient, gradients[1:2], rtol=1e-4, atol=1e-7)
    assert problems.shapes == [(3, 32, 32)]


def test_a_users_picture_keeps_its_shape(features):
    own = UsersStyleSet(features, picture(0, 40, 80), picture(1, 30, 30), 64)
    problems = own.batch(1, 2, torch.empty(0))
    assert problems.contents.shape == (1, 3, 32, 64)
    assert problems.start.shape == (1, 3 * 32 * 64)


def test_pictures_below_the_root_are_taken_and_held_out(tmp_path):
    for i in range(7):
        save(tmp_path / "art" / "content" / f"{i}.png", i)
    for i, name in enumerate(("b.png", "a.png")):
        save(tmp_path / "art" / "style" / name, 10 + i)
    data = StyleDataModule(root=str(tmp_path), download=False)
    (splits, styles), name = data.read(), data.data_name
    assert [len(splits[split]) for split in ("train", "val", "test")] == [6, 6, 1]
    assert torch.equal(splits["test"][0], picture(6))
    assert torch.equal(styles["training"], picture(11))
    assert "a.png" in name
    assert "stand-in" not in name
    with pytest.raises(InputError, match="7 images in content and 2 in style"):
        StyleDataModule(root=str(tmp_path), source="paper").read()


def test_too_small_and_unknown_are_refused(tmp_path):
    with pytest.raises(InputError, match="16 pixels are too few"):
        StyleDataModule(root=str(tmp_path), size=16).setup("fit")
    data = StyleDataModule(root=str(tmp_path), download=False, size=32, tests={"other": {"style": "old"}})
    with pytest.warns(UserWarning, match="stand-in"), pytest.raises(InputError, match="'training' or 'new'"):
        data.setup("fit")


@pytest.mark.filterwarnings("ignore")
def test_predict_paints_the_users_picture_and_names_a_corrupt_one(tmp_path):
    options = arguments(
        "l2l_style", tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.tests=null"
    )
    main(["fit", *options])
    own = [f"--data.content={save(tmp_path / 'me.png', 0, 40, 80)}", f"--data.style={save(tmp_path / 's.png', 1)}"]
    main(["predict", *options, *own, "--data.size=64"])
    folder = tmp_path / "l2l_style" / "predictions"
    assert {path.name for path in folder.iterdir()} == {"000.png", "000.gif", "000_curves.png", "000_sheet.png"}
    assert Image.open(folder / "000.png").size == (64, 32)
    assert Image.open(folder / "000.gif").n_frames > 2
    painted = (folder / "000.png").read_bytes()
    for option, seed in (("content", 2), ("style", 3)):  # both count
        other = [*own, f"--data.{option}={save(tmp_path / 'other.png', seed, 40, 80)}"]
        main(["predict", *options, *other, "--data.size=64"])
        assert (folder / "000.png").read_bytes() != painted
    (tmp_path / "me.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"me\.png"):
        main(["predict", *options, *own])
