"""Files of unknown origin: size limits, archives that cannot write elsewhere, and hashes."""

import hashlib
import shutil
import stat
import zipfile
from pathlib import Path

from kaf_study import InputError
from kaf_study.files import file_sha256

# Far above any classifier of 32x32 images (ResNet-18 is 45 MB), far below what fills a disk.
MAX_UNPACKED_BYTES = 2 * 1024**3
MAX_UNPACKED_FILES = 10_000


def refuse_oversized(path: Path) -> None:
    """Refuse what is no regular file or folder of such (devices, pipes), or too large for a model.

    A `.zip` or `.keras` is held to what it says it unpacks to. Links are followed: what they lead
    to counts. A folder's `robustness/` holds results, and is not looked at.
    """
    sizes = []
    for file in _files(path):
        if not file.is_file():
            raise InputError(
                f"{str(file)!r} is no regular file (a device, a pipe or a broken link); "
                "give the model's own file"
            )
        sizes.append(file.stat().st_size)
    _refuse_size(path, sizes)
    if path.is_file() and path.suffix.lower() in (".zip", ".keras") and zipfile.is_zipfile(path):
        with _readable(path) as archive:
            _refuse_size(path, [entry.file_size for entry in archive.infolist()])


def _files(path):
    if not path.is_dir():
        return [path]
    inside = (p for p in path.rglob("*") if p.relative_to(path).parts[0] != "robustness")
    return [p for p in inside if not p.is_dir()]


def _refuse_size(path, sizes):
    if sum(sizes) > MAX_UNPACKED_BYTES or len(sizes) > MAX_UNPACKED_FILES:
        raise InputError(
            f"{str(path)!r} holds {len(sizes)} files of {sum(sizes):,} bytes; at most "
            f"{MAX_UNPACKED_FILES} files of {MAX_UNPACKED_BYTES:,} bytes are accepted"
        )


class _readable:
    """`with _readable(path) as archive`: a ZipFile, whatever it raises in one line."""

    def __init__(self, path):
        self.path, self.archive = path, None

    def __enter__(self):
        try:
            self.archive = zipfile.ZipFile(self.path)
        except Exception as error:
            self.__exit__(type(error), error, None)
        return self.archive

    def __exit__(self, _, error, __):
        if self.archive is not None:
            self.archive.close()
        # zipfile and zlib raise several types for a bad file
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise InputError(
                f"{str(self.path)!r} is not a zip archive that can be read ({one_line(error)})"
            ) from None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, or refuse it before anything has been written.

    Refused: absolute paths, `..`, drive letters, symbolic links and other special files, encrypted
    entries, and archives that say they are larger than a model can be.
    """
    with _readable(archive) as file:
        entries = file.infolist()
        for entry in entries:
            _refuse_unsafe(archive, entry)
        _refuse_size(archive, [entry.file_size for entry in entries])
        for entry in entries:
            _extract(file, entry, folder)


def _refuse_unsafe(archive, entry):
    name = entry.filename.replace("\\", "/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]:
        reason = "points outside the archive's own folder"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "is a symbolic link or a special file"
    elif entry.flag_bits & 1:
        reason = "is encrypted"
    else:
        return
    raise InputError(
        f"{str(archive)!r} is refused: its entry {entry.filename!r} {reason}; "
        "pack the model's files alone"
    )


def _extract(file, entry, folder):
    target = folder / entry.filename.replace("\\", "/")
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # zipfile stops at the size the entry declares, so the limit above is kept.
    with file.open(entry) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def folder_sha256(folder: Path | str) -> str:
    """One hash for a folder: of its files' relative paths and contents, in sorted order.

    `robustness/` is left out: results written beside a model do not make it another model.
    """
    digest = hashlib.sha256()
    for file in sorted(_files(Path(folder))):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def one_line(error: BaseException | str, width: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."
