import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.cli import main
from lightning_meta.dynamic_filters.frame_scores import squared_error
from lightning_meta.dynamic_filters.steerable import (
    FilterGenerator,
    SteerableFilters,
    apply,
    fixed_filters,
    signed_image,
    steepest,
    steered_filter,
)
from lightning_meta.dynamic_filters.steerable_data import Patches, RandomPatches, SteerablePatchesDataModule
from lightning_meta.running.segments import Segment
from tests.conftest import arguments

SEGMENT = Segment(0, 0, 1, last=True)
NAME = "dfn_steerable"
ANGLES = torch.tensor([0.0, 0.3, math.pi / 2, 2.5, math.pi, 4.0, 6.2], dtype=torch.float64)


def gaussian(x, y):
    return torch.exp(-(x**2 + y**2) / 2)


@pytest.mark.parametrize("angle", ANGLES.tolist())
def test_a_steered_filter_is_the_continuous_kernel_turned(angle):
    """The x derivative at coordinates rotated back by the angle."""
    t = torch.arange(-4.0, 5.0, dtype=torch.float64)
    y, x = torch.meshgrid(t, t, indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = -math.sin(angle) * x + math.cos(angle) * y
    found = steered_filter(torch.tensor([angle], dtype=torch.float64))[0]
    torch.testing.assert_close(found, -u * gaussian(u, v))


def test_steered_filters_are_all_of_one_size_and_zero_on_average():
    angles = torch.arange(360, dtype=torch.float64) * (math.pi / 180)
    filters = steered_filter(angles)
    sizes = filters.square().sum((1, 2))
    torch.testing.assert_close(sizes, sizes[:1].expand(360))
    assert filters.mean(0).abs().max() < 1e-15
    assert filters.sum((1, 2)).abs().max() < 1e-14  # it ignores how bright an image is


def test_the_target_is_the_authors_pairs_of_convolutions_with_zeros_outside():
    torch.manual_seed(0)
    image, (angle,) = torch.rand(12, 11, dtype=torch.float64), ANGLES[1:2]
    taps = {"g": lambda t: math.exp(-(t**2) / 2), "d": lambda t: -t * math.exp(-(t**2) / 2)}

    def along(image, dim, name):
        out = torch.zeros_like(image)
        for i in range(image.shape[dim]):
            for t in range(-4, 5):
                if 0 <= i + t < image.shape[dim]:
                    out.select(dim, i).add_(image.select(dim, i + t), alpha=taps[name](t))
        return out

    to_x, to_y = along(along(image, 1, "d"), 0, "g"), along(along(image, 0, "d"), 1, "g")
    found = apply(steered_filter(angle[None]), image[None, None])[0, 0]
    torch.testing.assert_close(found, angle.cos() * to_x + angle.sin() * to_y)


@pytest.mark.parametrize("centred", [False, True])
def test_the_network_is_the_authors_1x1_convolutions_of_a_plane_of_angles(centred):
    torch.manual_seed(0)
    net = FilterGenerator(centred).double()
    assert sum(p.numel() for p in net.parameters()) == 18_897
    linear = list(net.layers[::2])
    assert all(not layer.bias.any() for layer in linear)
    for layer in linear:
        assert layer.weight.abs().max() <= math.sqrt(3 / layer.in_features)
    torch.nn.init.normal_(linear[0].bias)
    x = (ANGLES / math.pi - 1 if centred else ANGLES)[:, None, None, None].expand(-1, 1, 2, 3)
    for i, layer in enumerate(linear):
        x = torch.nn.functional.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        x = x if i == 2 else torch.where(x > 0, x, 0.01 * x)
    torch.testing.assert_close(net(ANGLES), x[..., 1, 2].unflatten(1, (9, 9)))


def test_gradients_reach_the_weights_through_the_filtered_images():
    torch.manual_seed(0)
    model = SteerableFilters().double()
    images = torch.rand(2, 1, 10, 11, dtype=torch.float64)
    layer = model.generator.layers[4]

    def error(bias):
        filters = torch.func.functional_call(model.generator, {"layers.4.bias": bias}, ANGLES[1:3])
        return squared_error(apply(filters, images), apply(steered_filter(ANGLES[1:3]), images))

    assert torch.autograd.gradcheck(error, layer.bias.detach().clone().requires_grad_())
    torch.testing.assert_close(error(layer.bias), model.step(Patches(images, ANGLES[1:3], SEGMENT)))


def test_the_squared_error_is_a_sum_over_each_patch():
    ones = torch.ones(3, 1, 64, 64)
    torch.testing.assert_close(squared_error(ones, -ones), torch.full((3,), 4 * 4096.0))


def test_the_fixed_filters_are_zero_and_the_nearest_of_eight():
    zero, nearest = fixed_filters(ANGLES).values()
    assert not zero.any()
    torch.testing.assert_close(nearest[[0, 1, 2, 6]], steered_filter(ANGLES[[0, 0, 2, 0]]))
    torch.testing.assert_close(nearest[3], steered_filter(torch.tensor([3 * math.pi / 4], dtype=torch.float64))[0])
    model = SteerableFilters()
    with torch.no_grad():
        errors = model.filter_errors()
    assert errors["mean filter (zero)"].item() == pytest.approx(100)
    eighth = math.pi / 8  # the mean of 2 - 2 cos over angles up to this
    assert errors["nearest of 8 filters"].item() == pytest.approx(200 * (1 - math.sin(eighth) / eighth), rel=0.01)


def test_the_steepest_response_is_the_largest_of_all_angles():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 20, 20, dtype=torch.float64)
    angles = torch.arange(3600, dtype=torch.float64) * (math.pi / 1800)
    responses = apply(steered_filter(angles), image.expand(3600, -1, -1, -1))
    torch.testing.assert_close(steepest(image)[0], responses[..., 4:-4, 4:-4].max(), rtol=1e-5, atol=0)
    small = image[..., :8]  # nothing but border
    responses = apply(steered_filter(angles), small.expand(3600, -1, -1, -1))
    torch.testing.assert_close(steepest(small)[0], responses.max(), rtol=1e-5, atol=0)
    picture = signed_image(torch.tensor([[[-2.0, 0.0, 2.0, math.nan]]]), torch.tensor(2.0))
    assert picture.tolist() == [[[0, 0.5, 1, 0.5]]] * 3


def test_patches_and_angles_are_functions_of_seed_split_and_number():
    rows, columns = np.mgrid[:80, :90].astype(np.uint8)
    pictures = [rows, columns]
    one, same, split, seed = (
        RandomPatches(pictures, *key, size=16) for key in (("train", 1), ("train", 1), ("val", 1), ("train", 2))
    )
    for i in (5, 0, 5):
        assert (one[i, SEGMENT][0] == same[i, SEGMENT][0]).all()
        assert one[i, SEGMENT][1] == same[i, SEGMENT][1]
    assert len({data[0, SEGMENT][1] for data in (one, split, seed)}) == 3
    drawn = [one[i, SEGMENT] for i in range(300)]
    assert {patch.shape for patch, _, _ in drawn} == {(16, 16)}
    assert {int(patch[0, 0]) for patch, _, _ in drawn if patch[1, 0] > patch[0, 0]} > {0, 80 - 16}  # every place
    assert sum(patch[1, 0] > patch[0, 0] for patch, _, _ in drawn) == pytest.approx(150, abs=30)  # either picture
    assert np.histogram([angle for _, angle, _ in drawn], 4, (0, 2 * math.pi))[0].min() > 50
    batch = Patches.collate(drawn[:3])
    assert batch.images.shape == (3, 1, 16, 16)
    assert batch.images.dtype == batch.angles.dtype == torch.float32
    torch.testing.assert_close(batch.images[1, 0] * 255, torch.from_numpy(drawn[1][0]).float())


def pictures_in(folder, count, size=(70, 66)):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("L", size, 10 * i).save(folder / f"{i}.png")


def test_own_pictures_are_split_by_picture(tmp_path):
    pictures_in(tmp_path / "steerable", 20)
    data = SteerablePatchesDataModule(root=str(tmp_path), source="paper")
    data.setup("fit")
    levels = {name: [int(p[0, 0]) for p in patches.images] for name, patches in data.sets.items() if name != "predict"}
    assert levels == {"train": list(range(0, 160, 10)), "val": [160, 170], "test": [180, 190]}
    assert data.data_name == "20 pictures of steerable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.source=paper"], "steerable has 2 images: put at least three natural images"),
        (["--data.size=65"], "data.size is 65"),
        (["--data.angles=[]"], "give degrees from 0 to 360"),
        (["--data.angles=[0, 361]"], "give degrees from 0 to 360"),
        (["--data.angles=[.nan]"], "give degrees from 0 to 360"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path):
    (tmp_path / "no-data").mkdir()
    pictures_in(tmp_path / "no-data" / "steerable", 2)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments(NAME, tmp_path, *options)])
    assert str(stop.value).startswith("error: ")
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_pictures_smaller_than_a_patch_are_named(tmp_path):
    (tmp_path / "no-data").mkdir()
    pictures_in(tmp_path / "no-data" / "steerable", 3, size=(64, 63))
    with pytest.raises(SystemExit, match=r"0\.png is 64x63 pixels: replace it by one of 64x64 at least"):
        main(["fit", *arguments(NAME, tmp_path)])


def test_predict_filters_a_picture_of_any_size_in_the_angles_asked_for(tmp_path):
    common = arguments(NAME, tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    main(["fit", *common])
    values = np.zeros((30, 50, 3), np.uint8)
    values[:, 25:] = 200
    Image.fromarray(values).save(tmp_path / "edge.png")
    main(["predict", *common, f"--data.picture={tmp_path / 'edge.png'}", "--data.angles=[0, 22.5]"])
    folder = tmp_path / NAME / "predictions"
    names = {"filters.png", "filtered_0.png", "filtered_22.5.png", "filter_0.txt", "filter_22.5.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert Image.open(folder / "filtered_22.5.png").size == (50, 30)
    checkpoint = tmp_path / NAME / "checkpoints" / "best.ckpt"
    model = SteerableFilters.load_from_checkpoint(checkpoint, weights_only=True)
    taps = torch.from_numpy(np.loadtxt(folder / "filter_22.5.txt")).float()
    expected = model.generator(torch.tensor([math.pi / 8]))[0].detach()
    torch.testing.assert_close(taps, expected, atol=1e-6, rtol=0)
    image = torch.from_numpy(values[None, None, ..., 0]) / 255
    output = apply(expected[None], image)[0]
    grey_levels = (255 * signed_image(output, steepest(image)[0])).round()
    found = torch.from_numpy(np.array(Image.open(folder / "filtered_22.5.png"))).movedim(-1, 0)
    assert (found - grey_levels).abs().max() <= 1
    for bad in ("missing.png", "."):
        with pytest.raises(SystemExit, match=r"give (a|one) PNG, JPG or WebP image"):
            main(["predict", *common, f"--data.picture={tmp_path / bad}"])
