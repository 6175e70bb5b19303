"""Files that are read whole and within limits, written whole or not at all, and locked.

Nothing here knows what is in a file.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kaf_study import InputError

MAX_RECORD_BYTES = 64 * 1024**2  # far above 10,000 rows, far below what fills a memory


def read_bytes(path: Path) -> bytes:
    """What a file holds; refused is what is no regular file (a device has no end), or too large."""
    check_file(path, MAX_RECORD_BYTES)
    try:
        with open(path, "rb") as file:
            return file.read(MAX_RECORD_BYTES)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror})") from None


def check_file(path: Path, limit: int) -> None:
    """Refuse what is not there, is no regular file, or is larger than `limit` bytes."""
    if not path.is_file():
        reason = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{str(path)!r} {reason}; give a file that was written by this program")
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{str(path)!r} has {size:,} bytes; at most {limit:,} are accepted")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name to write to; the file there takes the place of `path` once it is whole.

    The name is always the same, so what a killed process left is overwritten by the next.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {str(path)!r} ({error.strerror or error}); make room, or choose "
                "another place, and give the command again"
            ) from None
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there complete or not at all, also if the process is killed."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def make_writable(directory: Path) -> None:
    """Create a folder, or say in one line why nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to {str(directory)!r} ({error.strerror}); choose another --out"
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`; its folder is made, and removed again if it stays empty.

    The operating system frees the lock of a process that ends, however it ends; the file says who
    holds it.

    Raises:
        InputError: if another process holds it.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    make_writable(path.parent)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace")[:80] if path.is_file() else ""
        raise InputError(
            f"{str(path.parent)!r} is in use by {holder or 'another process'}; wait for its end, "
            "or choose another --out"
        ) from None
    try:
        with suppress(OSError):  # on a full disk it is held all the same
            path.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
