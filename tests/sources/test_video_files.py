import errno

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_meta.drawing.files import write_gif, write_mp4
from lightning_meta.errors import InputError
from lightning_meta.sources.video_files import read_clip, read_frames


def moving_square(T=6, H=32, W=48):
    """Draw a white square that moves right over black, above bars of grey 128 and white."""
    frames = torch.zeros(T, H, W, dtype=torch.uint8)
    frames[:, 16:24] = 128
    frames[:, 24:] = 255
    for t in range(T):
        frames[t, 4:12, 4 * t : 4 * t + 8] = 255
    return frames


def write_video(path, frames, pix_fmt="yuv420p", degrees=0):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if pix_fmt == "yuv420p" else "mjpeg", rate=10)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = pix_fmt
        stream.bit_rate = 4_000_000
        if degrees:
            stream.set_display_rotation(degrees)
        for frame in frames.numpy():
            rgb = np.repeat(frame[..., None], 3, -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())


def refused(path, *words):
    for read in (read_clip, lambda path: list(read_frames(path))):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert "\n" not in message
        for word in (str(path), *words):
            assert word in message


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p"])  # limited and full range
def test_a_video_comes_back_in_full_range(tmp_path, pix_fmt):
    frames = moving_square()
    path = tmp_path / ("clip.mp4" if pix_fmt == "yuv420p" else "clip.mkv")
    write_video(path, frames, pix_fmt)
    read = read_clip(path)
    assert read.shape == frames.shape
    assert read.dtype == torch.uint8
    assert read[:, 28:].float().mean() > 252  # limited range without conversion would give 235
    assert read[:, :2].float().mean() < 3  # and 16
    assert abs(read[:, 18:22].float().mean() - 128) < 3
    error = (read.float() - frames.float()).abs()
    assert error.mean() < 4  # an offset of one frame would give 9 or more
    assert (read[0].float() - frames[1].float()).abs().mean() > 2 * error.mean()


def test_a_turned_phone_video_comes_back_upright(tmp_path):
    frames = moving_square()
    write_video(tmp_path / "clip.mp4", frames, degrees=90)  # rotate counter-clockwise
    read = read_clip(tmp_path / "clip.mp4")
    assert read.shape == (6, 48, 32)
    assert (read.float() - frames.rot90(1, (1, 2)).float()).abs().mean() < 4


def test_what_a_video_says_of_itself_need_not_be_text(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, [torch.zeros(3, 16, 16, dtype=torch.uint8)], fps=10)
    assert b"Lavf" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"La\xf6f"))
    assert read_clip(path).shape == (1, 16, 16)


def test_a_length_that_no_memory_holds_is_damage(tmp_path, monkeypatch):
    import av

    def out_of_memory(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    (tmp_path / "clip.mp4").touch()
    monkeypatch.setattr(av, "open", out_of_memory)
    with pytest.raises(InputError, match=r"clip\.mp4 cannot be read as a video \(a length in the file is damaged\)"):
        read_clip(tmp_path / "clip.mp4")


def test_a_gif_round_trip_is_exact(tmp_path, monkeypatch):
    frames = torch.randint(0, 256, (5, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[1:, 10:] = frames[0, 10:]  # a static part, which GIF stores once
    monkeypatch.chdir(tmp_path)
    write_gif("a:b.gif", frames, fps=20)  # looks like an address
    assert torch.equal(read_clip("a:b.gif"), frames)
    with Image.open(tmp_path / "a:b.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 50, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a:b.gif"]


def test_a_gif_of_partial_frames_is_composed(tmp_path):
    frames = moving_square()
    first, *rest = [Image.fromarray(frame) for frame in frames.numpy()]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=rest, duration=50, disposal=2, optimize=True)
    assert torch.equal(read_clip(tmp_path / "clip.gif"), frames)


def test_write_gif_in_colour(tmp_path):
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for t in range(3):
        frames[t, t] = 255
    write_gif(tmp_path / "clip.gif", frames)
    with Image.open(tmp_path / "clip.gif") as gif:
        for t in range(3):
            gif.seek(t)
            assert gif.convert("RGB").getpixel((4, 4)) == tuple(255 if t == c else 0 for c in range(3))


def test_write_gif_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "clip.gif"
    path.write_bytes(b"old")
    write_gif(path, moving_square(3))
    assert read_clip(path).shape == (3, 32, 48)
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder\.gif"):
        write_gif(tmp_path / "folder.gif", moving_square(3))
    with pytest.raises(InputError, match="cannot write"):
        write_gif(tmp_path / "none" / "clip.gif", moving_square(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.gif", "folder.gif"]


@pytest.mark.parametrize("max_frames", [1, 4, 99])
def test_max_frames(tmp_path, max_frames):
    frames = moving_square()
    write_gif(tmp_path / "clip.gif", frames)
    for t, frame in enumerate(frames.numpy()):
        Image.fromarray(frame).save(tmp_path / f"{t}.png")
    for path in (tmp_path / "clip.gif", tmp_path):
        assert torch.equal(read_clip(path, max_frames), frames[:max_frames])
    with pytest.raises(InputError, match="max_frames is 0"):
        read_clip(tmp_path, 0)


def test_a_folder_is_read_in_natural_order(tmp_path):
    names = ["frame2.png", "frame9.JPG", "frame010.png", "frame10.png", "frame100.jpeg"]
    for i, name in enumerate(names):
        Image.new("RGB", (6, 4), (40 * i,) * 3).save(tmp_path / name)
    (tmp_path / "._frame2.png").write_bytes(b"what a Mac leaves behind")
    (tmp_path / "notes.txt").write_text("not a frame")
    read = read_clip(tmp_path)
    assert read.shape == (5, 4, 6)
    assert read[:, 0, 0].tolist() == [0, 40, 80, 120, 160]
    assert [frame[0, 0, 0] for frame in read_frames(tmp_path)] == [0, 40, 80, 120, 160]


def test_colour_and_16_bit_pictures_become_grey(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "1.png")
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "2.png")
    assert read_clip(tmp_path)[:, 0, 0].tolist() == [76, 128]  # 0.299 of 255; half of white


def in_colour(T=6, H=33, W=47):
    """Draw gradients from left to right: red in the first frame, green in the next, and so on."""
    frames = torch.zeros(T, 3, H, W, dtype=torch.uint8)
    for t in range(T):
        frames[t, t % 3] = torch.linspace(0, 255, W)
    return frames


def test_colour_frames_of_a_folder_and_a_gif_come_back(tmp_path):
    frames = in_colour()
    for t, frame in enumerate(frames):
        Image.fromarray(frame.movedim(0, -1).numpy()).save(tmp_path / f"{t}.png")
    read = list(read_frames(tmp_path))
    assert all(frame.is_contiguous() and frame.dtype == torch.uint8 for frame in read)
    assert torch.equal(torch.stack(read), frames)
    write_gif(tmp_path / "clip.gif", frames)
    assert torch.equal(torch.stack(list(read_frames(tmp_path / "clip.gif"))), frames)


@pytest.mark.parametrize("h264", [True, False])
def test_an_mp4_round_trip_keeps_colours_and_order(tmp_path, monkeypatch, h264):
    import av

    if not h264:
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    frames = in_colour()
    monkeypatch.chdir(tmp_path)
    write_mp4("a:b.mp4", iter(frames), fps=12.5)  # looks like an address
    with av.open(str(tmp_path / "a:b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == ("h264" if h264 else "mpeg4")
        assert container.streams.video[0].average_rate == 12.5
    read = torch.stack(list(read_frames("a:b.mp4")))
    assert read.shape == (6, 3, 34, 48)  # padded to even numbers
    assert (read[..., :33, :47].float() - frames.float()).abs().mean() < 4
    assert (read[..., 33, :].float() - read[..., 32, :].float()).abs().mean() < 4  # with the last row and column
    assert (read[..., 47].float() - read[..., 46].float()).abs().mean() < 4
    assert [path.name for path in tmp_path.iterdir()] == ["a:b.mp4"]


def test_frames_are_read_one_after_another(tmp_path):
    for t in range(3):
        Image.new("RGB", (6, 4), (40 * t,) * 3).save(tmp_path / f"{t}.png")
    frames = read_frames(tmp_path)
    next(frames)
    (tmp_path / "2.png").write_bytes(b"no picture")
    assert next(frames)[0, 0, 0] == 40
    with pytest.raises(InputError, match=r"2\.png"):
        next(frames)


def test_write_mp4_replaces_whole_or_not_at_all(tmp_path):
    def failing():
        yield from in_colour()
        raise InputError("the sixth frame is broken")

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="sixth"):
        write_mp4(path, failing(), fps=10)
    with pytest.raises(InputError, match="no frames"):
        write_mp4(path, [], fps=10)
    assert path.read_bytes() == b"old"
    write_mp4(path, in_colour(), fps=10)
    assert len(list(read_frames(path))) == 6
    with pytest.raises(InputError, match="cannot write"):
        write_mp4(tmp_path / "none" / "clip.mp4", in_colour(), fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_turned_phone_video_comes_back_upright_in_colour(tmp_path):
    frames = moving_square()
    write_video(tmp_path / "clip.mp4", frames, degrees=90)
    read = torch.stack(list(read_frames(tmp_path / "clip.mp4")))
    assert read.shape == (6, 3, 48, 32)
    assert (read[:, 1].float() - frames.rot90(1, (1, 2)).float()).abs().mean() < 4


def test_refuses_what_is_no_clip(tmp_path):
    refused(tmp_path / "none.mp4", "does not exist")
    refused(tmp_path, "no PNG, JPG or WebP")
    for suffix in ("png", "jpg", "bmp"):
        Image.new("L", (8, 8)).save(tmp_path / f"one.{suffix}")
        refused(tmp_path / f"one.{suffix}", "single image", "folder")
    (tmp_path / "text.txt").write_text("hello\n" * 99)
    refused(tmp_path / "text.txt", "text file")
    for name, content in (("empty.mp4", b""), ("noise.mp4", bytes(range(256)) * 9)):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "cannot be read as a video")


def test_refuses_a_truncated_gif_or_video(tmp_path):
    noise = torch.randint(0, 256, (9, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_gif(tmp_path / "clip.gif", noise)
    (tmp_path / "clip.gif").write_bytes((tmp_path / "clip.gif").read_bytes()[:500])  # inside the first frame's palette
    refused(tmp_path / "clip.gif", "cannot be read as a video")
    write_video(tmp_path / "clip.avi", noise)
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "clip.avi", "truncated")
    write_video(tmp_path / "clip.mp4", noise)  # the table of frames is at the end
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "clip.mp4", "cannot be read as a video")


def test_refuses_sound_without_pictures(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    refused(tmp_path / "sound.wav", "no video")


def test_refuses_a_video_without_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        container.start_encoding()
    refused(tmp_path / "clip.avi", "no frames")


def test_refuses_a_folder_with_a_broken_or_an_odd_picture(tmp_path):
    Image.new("L", (8, 6)).save(tmp_path / "1.png")
    Image.new("L", (9, 6)).save(tmp_path / "2.png")
    refused(tmp_path, "1.png is 8x6", "2.png is 9x6")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(noise).save(tmp_path / "2.png")
    content = (tmp_path / "2.png").read_bytes()
    for broken in (content[:60], content[:50] + b"????" + content[54:], b"no picture"):
        (tmp_path / "2.png").write_bytes(broken)
        refused(tmp_path, "2.png", "replace or remove it")
