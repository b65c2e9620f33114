import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_meta.cli import main
from lightning_meta.drawing.files import write_gif, write_mp4
from lightning_meta.dynamic_filters.driving_data import DrivingVideoDataModule
from lightning_meta.errors import InputError
from lightning_meta.running.segments import Segment
from lightning_meta.sources import driving, image_files
from lightning_meta.sources.video_files import read_clip
from tests.conftest import arguments


def numbered(path, frames, height=64, width=64):
    """Write a GIF whose frame t has the value t everywhere."""
    write_gif(path, torch.arange(frames, dtype=torch.uint8)[:, None, None].repeat(1, height, width))
    return str(path)


def set_up(stage="fit", **options):
    data = DrivingVideoDataModule(**options)
    data.setup(stage)
    return data


def values(dataset, index, frames):
    return dataset[index, Segment(index, 0, frames - 1, True)][0][:, 0, 0].tolist()


def test_a_video_is_split_in_time_and_its_pieces_stay_in_their_part(tmp_path):
    data = set_up(video=numbered(tmp_path / "v.gif", 200), frames=5, frame_step=3)
    seen = [values(data.sets["train"], i, 5) for i in range(2000)]
    assert {v[0] for v in seen} == set(range(160 - 12))
    assert all(np.array_equal(np.diff(v), [3] * 4) for v in seen)
    assert [values(data.sets["val"], i, 5)[0] for i in range(data.counts["val"])] == list(range(160, 168))
    assert [values(data.sets["test"], i, 5)[0] for i in range(data.test_samples)] == list(range(180, 188))
    assert data.data_name == "v.gif"


def test_at_most_so_many_pieces_at_equal_distances(tmp_path):
    data = set_up(video=numbered(tmp_path / "v.gif", 200), frames=3, test_sequences=4, val_sequences=2)
    assert [values(data.sets["test"], i, 3)[0] for i in range(data.test_samples)] == [180, 186, 191, 197]
    assert data.counts == {"val": 2, "test": 4, "predict": 4}


def test_a_sample_is_a_function_of_seed_and_index(tmp_path):
    video = numbered(tmp_path / "v.gif", 200)
    one, same, other = (set_up(video=video, seed=seed).sets["train"] for seed in (0, 0, 1))
    assert [values(one, i, 6) for i in range(9)] == [values(same, i, 6) for i in range(9)]
    assert [values(one, i, 6) for i in range(9)] != [values(other, i, 6) for i in range(9)]


def test_pieces_of_several_videos_do_not_mix(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, frames in (("a.gif", 60), ("b.gif", 240)):
        numbered(tmp_path / "videos" / name, frames)
    data = set_up(video=str(tmp_path / "videos"))
    assert data.data_name == "a.gif, b.gif"
    starts = [values(data.sets["test"], i, 6)[0] for i in range(data.test_samples)]
    assert starts == [54, *range(216, 235)]
    assert all(np.ptp(values(data.sets["train"], i, 6)) == 5 for i in range(100))


def test_a_video_is_seen_through_the_square_in_its_middle(tmp_path):
    frames = torch.arange(3, dtype=torch.uint8)[:, None, None].repeat(1, 128, 256)  # equal ones would be stored once
    frames[:, :, 64:192] = torch.arange(128, dtype=torch.uint8)
    write_gif(tmp_path / "wide.gif", frames)
    seen = driving.read_drive(tmp_path / "wide.gif")
    assert seen.shape == (3, 64, 64)
    assert np.abs(seen[0] - (2 * np.arange(64) + 0.5)).max() <= 0.5  # each pixel the mean of two columns


def test_a_drawn_drive_moves_as_its_flow_says():

    photograph = image_files.grey(image_files.bundled_photographs()["flower"])
    moved = []
    for seed in range(8):
        frames, flow = driving.drawn_drive(photograph, 5, np.random.default_rng(seed))
        assert (frames.dtype, frames.shape, flow.shape) == (np.uint8, (5, 64, 64), (5, 2, 64, 64))
        assert np.isnan(flow[0]).all()
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        for t in range(1, 5):
            dx, dy = torch.from_numpy(flow[t])
            known = ~dx.isnan()
            assert 0.7 < known.float().mean() <= 1
            place = (torch.stack([x + dx, y + dy], -1) / 31.5 - 1).nan_to_num(0)[None]
            before, now = torch.from_numpy(frames[t - 1 : t + 1]).float()
            warped = F.grid_sample(before[None, None], place, align_corners=True)[0, 0]
            warped, now, still = (v[known] / v[known].mean() for v in (warped, now, before))  # but for the light
            moved.append(((warped - now).abs().mean() / (still - now).abs().mean()).item())
    assert np.mean(moved) < 0.4  # what is left is interpolation


def test_flow_of_stand_ins_is_known_and_of_videos_is_not(tmp_path):
    with pytest.warns(UserWarning, match="stand-in"):
        data = set_up(root=str(tmp_path), batch_size=2)
    batch = next(data.flow_batches(1, 3))
    assert batch.frames.shape == (2, 4, 1, 64, 64)
    assert batch.flow.shape == (2, 4, 2, 64, 64)
    assert data.sets["test"][0, Segment(0, 0, 5, True)][2] is not None
    assert data.sets["train"][0, Segment(0, 0, 5, True)][2] is None  # training does not need it
    data = set_up(video=numbered(tmp_path / "v.gif", 100), batch_size=2)
    assert next(data.flow_batches(1, 3)).flow is None


def test_the_authors_files_in_their_layout(tmp_path):
    import h5py

    (tmp_path / "highway").mkdir()
    for split, count in (("train", 100), ("test", 20)):
        frames = np.arange(count * 64 * 64, dtype=np.uint32).reshape(count, 1, 64, 64).astype(np.uint8)
        with h5py.File(tmp_path / "highway" / f"highwayDriving_{split}.h5", "w") as file:
            file["highway_L"] = frames.swapaxes(2, 3)
    data = set_up(root=str(tmp_path), source="paper")
    assert data.data_name == "the authors' highway recording"
    assert [len(video) for video in data.sets["train"].videos] == [90]
    assert data.counts == {"val": 5, "test": 15, "predict": 4}
    assert np.array_equal(data.sets["train"].videos[0][0], np.arange(4096).reshape(64, 64).astype(np.uint8))
    (tmp_path / "highway" / "highwayDriving_test.h5").unlink()
    with pytest.raises(InputError, match=r"highwayDriving_test\.h5"):
        set_up(root=str(tmp_path), source="paper")


def test_a_video_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(InputError, match="has 40 frames, but a tenth of them must hold a sequence of 6"):
        set_up(video=numbered(tmp_path / "v.gif", 40))
    data = set_up(video=numbered(tmp_path / "v.gif", 100))
    with pytest.raises(InputError, match=r"has 80 frames, too few for a sequence of 90 at data\.frame_step 1"):
        data.sets["train"][0, Segment(0, 0, 89, True)]
    with pytest.raises(InputError, match="does not exist"):
        set_up(video=str(tmp_path / "nothing.mp4"))


def test_predict_goes_on_with_a_video_of_ones_own(tmp_path):
    main(["fit", *arguments("dfn_highway", tmp_path, "--trainer.max_steps=1", "--trainer.val_check_interval=1")])
    clip = tmp_path / "own.mp4"
    write_mp4(clip, (torch.full((3, 90, 160), 8 * t, dtype=torch.uint8) for t in range(30)), fps=25)
    main(["predict", *arguments("dfn_highway", tmp_path, f"--data.clip={clip}", "--data.predict_sequences=2")])
    written = sorted(path.name for path in (tmp_path / "dfn_highway" / "predictions").iterdir())
    assert written == [f"00{i}_{name}" for i in (0, 1) for name in ("animation.gif", "flow.png", "frames.png")]
    for i, grey in enumerate((0, 120)):  # every second frame of the clip is 16 levels brighter
        shown = read_clip(tmp_path / "dfn_highway" / "predictions" / f"00{i}_animation.gif")
        levels = [frame.flatten().mode().values.item() for frame in shown[:3]]
        assert levels == pytest.approx([grey, grey + 16, grey + 32], abs=2)
    numbered(tmp_path / "short.gif", 2)  # of which every second is read
    with pytest.raises(SystemExit, match="the clip gives 1 frames, but the model needs 3: give a longer one"):
        main(["predict", *arguments("dfn_highway", tmp_path, f"--data.clip={tmp_path / 'short.gif'}")])


def test_the_real_clip(real_data):
    data = set_up(root=str(real_data), frame_step=2)
    assert data.data_name == "solidWhiteRight.mp4"
    reference = np.load(real_data / "video" / "highway" / "solidWhiteRight_gray64.npz")["frames"]
    assert np.abs(data.sets["train"].videos[0][:50].astype(int) - reference[:50]).mean() < 2  # another way to grey
    assert data.test_samples == 13
