"""Files appear whole or not at all."""

import errno
import os

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
