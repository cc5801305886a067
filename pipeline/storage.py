"""Whole files in a folder, local or on an object store, written so that nobody ever sees half of
one.

Locally a file is written under a temporary name, synced and renamed. An object store has no rename
and commits an interrupted stream as half an object, so there a file is one put of all its bytes.
"""

import contextlib
import errno
import fcntl
import functools
import importlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"
"""What the names of unfinished files begin with."""

TRIES = 5
"""Attempts at a call to an object store, with 1, 2, 4, ... seconds between them."""

T = TypeVar("T")


class StorageError(RuntimeError):
    """Storage failed, not the file: another try may well succeed."""


def is_remote(address: str) -> bool:
    """Say whether the address names an object store, such as s3://bucket/folder."""
    return "://" in address and not address.startswith("file://")


def absolute(address: str) -> str:
    """Make a local path independent of the working folder; object stores' addresses are already."""
    return address if is_remote(address) else str(Path(_local(address)).absolute())


def join(folder: str, name: str) -> str:
    """Append a name to a folder's address."""
    return f"{folder.rstrip('/')}/{name}"


def write_file(folder: str, name: str, data: bytes) -> None:
    """Put a whole file in place at once. Raises StorageError, and leaves nothing, when it can't
    be."""
    if is_remote(folder):
        filesystem, root = _filesystem(folder)
        _patiently(
            f"write {join(folder, name)}", lambda: filesystem.pipe_file(join(root, name), data)
        )
        return
    try:
        _write_local(Path(_local(folder)), name, data)
    except OSError as error:
        raise StorageError(
            f"Can't write {join(folder, name)}: {error.strerror or error}."
        ) from error


def _write_local(folder: Path, name: str, data: bytes) -> None:
    """Write under a temporary name, sync, rename, and sync the folder so that the name lasts
    too."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{name}-{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
    """Read a file, or num_bytes of it from start. Raises FileNotFoundError, or StorageError."""
    if is_remote(folder):
        filesystem, root = _filesystem(folder)
        # Without a start, an end would be taken for a number of bytes from the file's end.
        span = {} if num_bytes is None else {"start": start, "end": start + num_bytes}
        call = functools.partial(filesystem.cat_file, join(root, name), **span)
        data = _patiently(f"read {join(folder, name)}", call)
        assert isinstance(data, bytes)
        return data if span else data[start:]
    with (Path(_local(folder)) / name).open("rb") as file:
        file.seek(start)
        return file.read(-1 if num_bytes is None else num_bytes)


def read_parts(folder: str, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read parts of a file, given as offset and size; shorter ones where the file ends before.

    Raises as read_file does.
    """
    first = min(offset for offset, _ in spans)
    num_bytes = max(offset + size for offset, size in spans) - first
    if is_remote(folder):  # one request takes less time than many
        data = read_file(folder, name, first, num_bytes)
        return [data[offset - first : offset - first + size] for offset, size in spans]
    descriptor = os.open(Path(_local(folder)) / name, os.O_RDONLY)
    try:
        if len(spans) > 1 and sys.platform == "linux":  # or a slow disk is waited for at each part
            os.posix_fadvise(descriptor, first, num_bytes, os.POSIX_FADV_WILLNEED)
        return [os.pread(descriptor, size, offset) for offset, size in spans]
    finally:
        os.close(descriptor)


def list_files(folder: str) -> dict[str, int]:
    """Name the files directly in a folder with their sizes; empty when there is no such folder."""
    if is_remote(folder):
        filesystem, root = _filesystem(folder)
        try:
            found = _patiently(
                f"list {folder}", lambda: filesystem.ls(root, detail=True, refresh=True)
            )
        except FileNotFoundError:
            return {}
        return {f["name"].rsplit("/", 1)[1]: f["size"] for f in found if f["type"] == "file"}
    path = Path(_local(folder))
    if not path.is_dir():
        return {}
    sizes = {}
    for entry in os.scandir(path):
        with contextlib.suppress(FileNotFoundError):  # another process may just have renamed it
            if entry.is_file():
                sizes[entry.name] = entry.stat().st_size
    return sizes


def remove_file(folder: str, name: str) -> None:
    """Delete a file if it is there."""
    if is_remote(folder):
        filesystem, root = _filesystem(folder)
        with contextlib.suppress(FileNotFoundError):
            _patiently(f"delete {join(folder, name)}", lambda: filesystem.rm_file(join(root, name)))
        return
    (Path(_local(folder)) / name).unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: str, flag: str = "--output") -> Iterator[None]:
    """Keep a local folder to this process, and make it; ValueError when another process has it.

    The kernel locks the folder itself, and lets go when the process ends in whatever way: no file
    is left, and no lock. A network file system may see to this machine alone. An object store has
    no locks, and needs none: nothing there is unfinished.
    """
    if is_remote(folder):
        yield
        return
    try:
        Path(_local(folder)).mkdir(parents=True, exist_ok=True)
        handle = os.open(_local(folder), os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"Can't write to {folder}: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is at work in {folder}. Wait until it has ended, or give another "
                f"{flag}."
            ) from None
        except OSError:  # some network file systems can't lock a folder
            pass
        yield
    finally:
        os.close(handle)


def sweep(folder: str) -> None:
    """Delete the unfinished files that a killed run left. Whoever does must `hold` the folder."""
    for name in list_files(folder):
        if name.startswith(TEMPORARY):
            remove_file(folder, name)


def open_file(address: str) -> Any:
    """Open a remote file for reading, as a file object that can seek."""
    filesystem, path = _filesystem(address)
    return filesystem.open(path, "rb", block_size=1 << 20)


def find_files(folder: str) -> list[str]:
    """List every file below a remote folder, relative to it."""
    filesystem, root = _filesystem(folder)
    found = _patiently(f"list {folder}", lambda: filesystem.find(root))
    return [path.removeprefix(root.rstrip("/") + "/") for path in found]


def _local(folder: str) -> str:
    return folder.removeprefix("file://")


@functools.lru_cache(maxsize=64)
def _filesystem(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Connect to the store of an address: its filesystem, and the path inside it."""
    options: dict[str, Any] = {}
    if address.startswith("s3://"):
        # s3fs and botocore multiply each other's retries, to minutes for one dead connection.
        options["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"total_max_attempts": 2},
        }
    try:
        filesystem, path = fsspec.core.url_to_fs(address, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"Can't use the address {address}: {error}") from error
    assert not isinstance(filesystem, LocalFileSystem)
    if address.startswith("s3://"):
        filesystem.retries = 1
    return filesystem, path


# A connection can't be used on the other side of a fork: a reader's workers open their own.
os.register_at_fork(after_in_child=_filesystem.cache_clear)


@functools.cache
def store_errors() -> tuple[type[Exception], ...]:
    """List what object stores raise when they fail; botocore's own errors are no OSErrors."""
    try:
        errors = importlib.import_module("botocore.exceptions")
    except ImportError:
        return (OSError,)
    return (OSError, errors.BotoCoreError)


def _patiently(what: str, call: Callable[[], T]) -> T:
    """Call, and call again with growing pauses where the store failed. Missing files fail at
    once."""
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except store_errors() as error:
            if attempt == TRIES - 1:
                raise StorageError(f"Can't {what} after {TRIES} tries: {error}") from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.ECONNRESET}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO}
    | {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
)
"""Errors of reading that speak of the machine or its storage, never of the file's content."""
