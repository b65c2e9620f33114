import os

import pytest

from lightning_meta.errors import InputError
from lightning_meta.storage.atomic import atomic_write, lost_worker


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")
    with atomic_write(path) as part:
        part.write_text("half")
        assert path.read_text() == "former"
        part.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_a_failure_leaves_the_former_file_and_no_litter(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("former")

    def fail():
        with atomic_write(path) as part:
            part.write_text("half")
            raise failure

    with pytest.raises(InputError, match=r"cannot write .*file \(.*\): free the disk"):
        fail()
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == ["file"]


def test_a_lost_worker_is_known_by_what_it_leaves():
    assert lost_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    assert lost_worker(ConnectionResetError(104, "Connection reset by peer"))
    assert not lost_worker(RuntimeError("out of memory"))
    assert not lost_worker(OSError(28, "No space left on device"))
