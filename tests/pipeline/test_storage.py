"""Files appear whole or not at all."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from pipeline import storage


def test_write_replaces_whole_files(tmp_path):
    folder = str(tmp_path / "new" / "folder")
    storage.write_file(folder, "a.bin", b"one")
    storage.write_file(folder, "a.bin", b"second")
    assert storage.list_files(folder) == {"a.bin": 6}
    assert storage.read_file(folder, "a.bin", 1, 3) == b"eco"


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    storage.write_file(str(tmp_path), "a.bin", b"one")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match=r"a\.bin: No space left on device"):
        storage.write_file(str(tmp_path), "a.bin", b"second")
    assert storage.list_files(str(tmp_path)) == {"a.bin": 3}


def test_sweep_removes_only_unfinished_files(tmp_path):
    (tmp_path / ".tmp-train-000000.tar-1234").write_bytes(b"half")
    (tmp_path / "train-000000.tar").write_bytes(b"whole")
    storage.sweep(str(tmp_path))
    assert storage.list_files(str(tmp_path)) == {"train-000000.tar": 5}


HOLDER = """
import subprocess, sys
from pipeline.storage import hold
with hold(sys.argv[1]):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_ends_in_any_way(tmp_path):
    folder = str(tmp_path / "new" / "shards")
    command = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(ValueError, match="Another process is at work in"), storage.hold(folder):
            pass
        holder.kill()
    try:  # what the holder has started may live on
        for _ in range(2):
            with storage.hold(folder):
                assert storage.list_files(folder) == {}
    finally:
        os.kill(child, 9)


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch):
    with storage.hold("memory://bucket/held"), storage.hold("memory://bucket/held"):
        assert storage.list_files("memory://bucket/held") == {}

    def none(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with storage.hold(str(tmp_path)), storage.hold(str(tmp_path)):
        pass


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    with pytest.raises(storage.StorageError, match="/file: File exists"), storage.hold(file):
        pass


def test_unknown_store_is_named():
    with pytest.raises(ValueError, match="Can't use the address nowhere://bucket"):
        storage.list_files("nowhere://bucket/folder")


def test_store_of_objects(tmp_path):
    folder = "memory://bucket/shards"
    storage.write_file(folder, "a.bin", b"abcdef")
    storage.write_file(folder, "b/c.bin", b"x")
    assert storage.list_files(folder) == {"a.bin": 6}
    assert storage.read_file(folder, "a.bin") == b"abcdef"
    assert storage.read_file(folder, "a.bin", 2, 3) == b"cde"
    assert sorted(storage.find_files(folder)) == ["a.bin", "b/c.bin"]
    with storage.open_file(storage.join(folder, "a.bin")) as file:
        assert file.read() == b"abcdef"
    with pytest.raises(FileNotFoundError):
        storage.read_file(folder, "none.bin")
    storage.remove_file(folder, "a.bin")
    assert storage.list_files(folder) == {}
    assert storage.list_files("memory://bucket/none") == {}


@pytest.mark.parametrize("remote", [False, True])
def test_parts_of_a_file(tmp_path, remote):
    folder = "memory://bucket/parts" if remote else str(tmp_path)
    storage.write_file(folder, "a.bin", b"abcdefgh")
    assert storage.read_parts(folder, "a.bin", [(5, 2), (1, 3)]) == [b"fg", b"bcd"]
    assert storage.read_parts(folder, "a.bin", [(6, 4)]) == [b"gh"]
    with pytest.raises(FileNotFoundError):
        storage.read_parts(folder, "none.bin", [(0, 1)])
