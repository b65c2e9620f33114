import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.errors import InputError
from lightning_meta.sources.image_files import bundled_photographs, grey, image_paths, read_image


def refused(read, path, *words):
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def noise(height=6, width=9):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def palette():
    picture = Image.new("P", (5, 4), 1)
    picture.putpalette([0, 0, 0, 9, 99, 199, 255, 255, 255])
    return picture


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tiff", "webp"])
def test_a_lossless_picture_comes_back_exactly(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise()).save(path, lossless=True)
    for given in (path, str(path)):
        picture = read_image(given)
        assert picture.shape == (3, 6, 9)
        assert picture.dtype == torch.uint8
        assert picture.is_contiguous()
        assert torch.equal(picture.movedim(0, -1), torch.from_numpy(noise()))


def test_a_jpg_comes_back_nearly(tmp_path):
    pixels = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg", quality=95)
    assert (read_image(tmp_path / "picture.jpg")[:, 5, 5] - torch.tensor([200, 100, 50])).abs().max() < 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_turned_phone_picture_comes_back_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate clockwise
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(tmp_path / f"picture.{suffix}", exif=exif)
    picture = read_image(tmp_path / f"picture.{suffix}")
    assert picture.shape == (3, 16, 8)
    assert picture[:, :7].min() > 245
    assert picture[:, 9:].max() < 10


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (Image.new("L", (5, 4), 77), {}, [77, 77, 77]),
        (Image.new("1", (5, 4), 1), {}, [255, 255, 255]),
        (palette(), {}, [9, 99, 199]),
        (palette(), {"transparency": 1}, [255, 255, 255]),
        (palette(), {"transparency": bytes([255, 51, 255])}, [206, 224, 244]),
        (Image.new("RGB", (5, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}, [255, 255, 255]),
        (Image.new("RGBA", (5, 4), (255, 0, 0, 51)), {}, [255, 204, 204]),
        (Image.new("LA", (5, 4), (0, 51)), {}, [204, 204, 204]),
        (Image.fromarray(np.full((4, 5), 0x80FF, np.uint16)), {}, [128, 128, 128]),
        (Image.fromarray(np.full((4, 5), 0xFFFF, np.uint16)), {}, [255, 255, 255]),
    ],
    ids=[
        "grey",
        "1 bit",
        "palette",
        "clear palette",
        "half clear palette",
        "clear colour",
        "alpha",
        "grey alpha",
        "16 bits",
        "16 bits white",
    ],
)
def test_every_kind_of_picture_becomes_rgb_on_white(tmp_path, picture, options, expected):
    picture.save(tmp_path / "picture.png", **options)
    read = read_image(tmp_path / "picture.png")
    assert read.shape == (3, 4, 5)
    assert read[:, 0, 0].tolist() == expected
    assert read.flatten(1).unique(dim=1).shape == (3, 1)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    first, *others = (Image.new("RGB", (5, 4), (grey,) * 3) for grey in (40, 90, 200))
    path = tmp_path / f"picture.{suffix}"
    first.save(path, save_all=True, append_images=others)
    with Image.open(path) as opened:
        assert opened.n_frames == 3
    assert (read_image(path).int() - 40).abs().max() < 3


def test_refuses_a_missing_file_a_folder_and_what_is_no_picture(tmp_path):
    refused(read_image, tmp_path / "none.png", "does not exist")
    refused(read_image, tmp_path, "is a folder")
    for content in (b"", b"no picture"):
        (tmp_path / "text.png").write_bytes(content)
        refused(read_image, tmp_path / "text.png", "not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp"])
def test_refuses_a_truncated_picture(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise(40, 40)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    refused(read_image, path, "replace or remove it")


def test_refuses_a_damaged_picture(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "picture.png").write_bytes(content[:50] + b"????" + content[54:])
    refused(read_image, tmp_path / "picture.png", "cannot be decoded")


def test_refuses_a_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(noise()).save(tmp_path / "picture.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses twice as many
    refused(read_image, tmp_path / "picture.png", "suspiciously large", "54 pixels")


def test_picture_paths_are_in_natural_order(tmp_path):
    names = ["a2.png", "a9.JPG", "a010.png", "a10.png", "a100.jpeg", "a101.webp", "B1.Png"]
    for name in [*names[::-1], ".a1.png", "notes.txt", "a1.gif"]:
        (tmp_path / name).touch()
    assert image_paths(tmp_path) == [tmp_path / name for name in names]
    assert image_paths(str(tmp_path)) == image_paths(tmp_path)


def test_picture_paths_refuses_what_is_no_folder_of_pictures(tmp_path):
    refused(image_paths, tmp_path, "holds no PNG, JPG or WebP")
    refused(image_paths, tmp_path / "none", "No such file")
    (tmp_path / "file.png").touch()
    refused(image_paths, tmp_path / "file.png", "Not a directory")


def test_the_bundled_photographs():
    pictures = bundled_photographs()
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == {
        "china": (3, 427, 640),
        "flower": (3, 427, 640),
        "grace_hopper": (3, 600, 512),
        "minduka": (3, 128, 128),
    }
    assert all(picture.dtype == torch.uint8 and picture.is_contiguous() for picture in pictures.values())
    red, green, blue = pictures["flower"][:, 160, 400].tolist()  # the flower is orange
    assert red > green > blue
    assert pictures["minduka"][:, 0, 0].tolist() == [255, 255, 255]  # transparent, so blended with white
    pictures["china"].zero_()
    assert bundled_photographs()["china"].any()


def test_grey_is_luma():
    picture = torch.tensor([[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255]], dtype=torch.uint8)[:, None]
    assert grey(picture).tolist() == [[76, 150, 29, 255]]
