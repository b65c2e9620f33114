import os

import pytest
import torch

from lightning_meta.errors import InputError
from lightning_meta.storage.checkpoints import AtomicCheckpointIO, read_checkpoint


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


FULL = [OSError(28, "No space left on device"), RuntimeError("write failed")]  # torch raises the second one


@pytest.mark.parametrize("failure", FULL)
def test_a_full_disk_leaves_the_former_checkpoint_and_no_litter(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(checkpoint, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"cannot write .*last.ckpt .*: free the disk"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_writing_goes_through_a_file_beside_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append((os.path.getsize(source) > 0, str(target))))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "new" / "last.ckpt")
    assert seen == [(True, str(tmp_path / "new" / "last.ckpt"))]


def test_reading_refuses_what_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, cut, text, evil, other = (tmp_path / f"{name}.ckpt" for name in ("good", "cut", "text", "evil", "other"))
    torch.save({"state_dict": {"w": torch.ones(1000)}, "global_step": 3}, good)
    cut.write_bytes(good.read_bytes()[:-200])
    text.write_text("hello")
    torch.save({"state_dict": Evil(), "global_step": 3}, evil)
    torch.save([1, 2], other)
    assert read_checkpoint(good)["global_step"] == 3
    for path in (cut, text, evil, other):
        with pytest.raises(InputError, match=f"{path.name} is not a checkpoint of this application or is damaged") as e:
            read_checkpoint(path)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "evil").exists()
    for missing in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(InputError, match="no checkpoint"):
            read_checkpoint(missing)
