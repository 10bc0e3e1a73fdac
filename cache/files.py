"""Files that appear whole or not at all, and hashes that are not computed twice."""
# A file is written under a temporary name in its own folder, flushed to the disk and renamed: whoever finds it, finds
# it complete, also after a crash or a power cut. The temporary name is always the same for the same file, so what a
# killed process left behind is removed by the next one that writes the file; the run lock sees to it that there is only
# one.

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.errors import AltoptError, ArtifactError, DataError, ResourceError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

logger = logging.getLogger("altopt")

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "it grows too large"}
FOLDER_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # what some network file systems answer
SETTLED_SECONDS = 2.0  # the coarsest time stamps in use (FAT) come in steps of two seconds
MEMO_VERSION = 1
MEMO_ENTRIES = 256  # of each kind; the latest are kept


def file_error(path: Path, error: OSError, action: str) -> AltoptError:
    """Return what to raise when ``path`` cannot be ``action`` ("read", "written"): thing, cause, remedy."""
    if error.errno in NO_ROOM:
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        cause = f"{NO_ROOM[error.errno]} ({shutil.disk_usage(folder).free:,} bytes free)"
        return ResourceError(f"{path} cannot be {action}: {cause}: make room, then run the same command again")
    if isinstance(error, FileNotFoundError) and action == "read":
        return ArtifactError(f'{path} is missing: "altopt plan" says which stage makes it')
    cause = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    return ArtifactError(f"{path} cannot be {action}: {cause}: check the permissions and the disk")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it becomes ``path`` when the block ends without an error.

    Missing parent folders are made. After an error the temporary file is gone and ``path`` is what it was.
    Raises ResourceError when there is no room, ArtifactError when the file cannot be written for another reason;
    an OSError of the block that is about other files passes through.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
        try:
            yield temporary
        except OSError as error:
            if error.errno in NO_ROOM or error.filename in (temporary, str(temporary)):
                raise file_error(path, error, "written") from error
            raise
        publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Make ``path`` the same file as ``source``, or a copy where the file system has no links."""
    # Both stay whole when one of them is made anew: files are replaced, never written into.
    with atomic_path(path) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)


def publish(temporary: Path, path: Path) -> None:
    """Make a complete file in the same folder become ``path``, on the disk too. Errors: as ``atomic_path``."""
    with _translated(path):
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - beside os.fsync, as the recipe for it is known
        _sync_folder(path.parent)


class DeferringFile(io.FileIO):
    """A file for a library that cannot bear a failed write: it seems to work, and the first error waits in ``error``.

    HDF5 is one: it cannot close a file that it cannot write, tries again when Python ends, and crashes.
    """

    error: OSError | None = None

    def write(self, data: "ReadableBuffer") -> int:
        """Write all of ``data``, or keep the error; returns its size in bytes either way."""
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self.error = self.error or error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, or keep the error."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 by way of ``atomic_path``."""
    # Exclusive creation, so that two writers that no lock keeps apart (of the memo) cannot mix their text.
    with atomic_path(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        file.write(text)


def write_json_atomic(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON with sorted keys by way of ``atomic_path``; NaN and infinity are ValueErrors."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def canonical_json(value: object) -> str:
    """Return the one compact JSON text of ``value``: sorted keys, no spaces; NaN and infinity are ValueErrors."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Return the SHA-256 of ``text`` in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits; raises ArtifactError when it cannot be read."""
    try:
        return _hash(path)
    except OSError as error:
        raise file_error(path, error, "read") from error


class Memo:
    """Remembers the hashes of files by their size and time of modification, in a JSON file."""
    # It only saves hashing: without it every answer is the same, so a damaged one counts as empty. A file that changed
    # within the last two seconds is hashed anew: it could change again within one tick of its time stamp.

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, tuple[int, int, str]] = {}  # path: size, time in ns, SHA-256
        self.lists: dict[str, str] = {}  # of a whole list of files, by a key of paths, sizes and times: its digest
        self.changed = False
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            memo = json.loads(path.read_text(encoding="utf-8"))
            if memo["version"] == MEMO_VERSION:
                files = {name: (int(size), int(mtime), str(sha256))
                         for name, (size, mtime, sha256) in memo["files"].items()}
                self.lists = {key: str(digest) for key, digest in memo["lists"].items()}
                self._files = files  # last, so that a memo damaged anywhere counts for nothing

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file; raises ArtifactError when it cannot be read."""
        name = str(path.absolute())
        before = _signature(path)
        if before is not None and name in self._files and self._files[name][:2] == before:
            return self._files[name][2]
        sha256 = sha256_file(path)
        if before is not None and before == _signature(path):
            self._files[name] = (*before, sha256)
            self.changed = True
        return sha256

    def save(self) -> None:
        """Write what is new; a memo that cannot be written is no failure, since nothing depends on it."""
        if not self.changed:
            return
        files, lists = (dict(list(part.items())[-MEMO_ENTRIES:]) for part in (self._files, self.lists))
        try:
            # One line and in order of age, unlike the JSON that people read.
            write_text_atomic(self._path, json.dumps({"version": MEMO_VERSION, "files": files, "lists": lists}))
            self.changed = False
        except AltoptError as error:
            logger.debug("the memo of hashes is not saved: %s", error)


def digest_files(files: Iterable[Path], description: Mapping[str, object], memo: Memo, root: Path | None = None) -> str:
    """Return the SHA-256 that stands for a data set: its description, and the name and the content of every file.

    A file is named by its path under ``root``, or by its last part when it lies elsewhere; the order of ``files`` does
    not count. Raises DataError when a file cannot be read.
    """
    # So that the same data set has the same digest wherever it lies; when no file changed, this takes one stat for
    # each.
    names = sorted(set(map(str, files)))
    try:
        context = canonical_json([description, str(root), str(Path.cwd())])
        key = _list_key(names, context)
        if key in memo.lists:
            return memo.lists[key]
        entries = sorted((path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name,
                          _hash(path)) for path in map(Path, names))
        digest = sha256_text(canonical_json({"description": description, "files": entries}))
        if key and key == _list_key(names, context):
            memo.lists[key], memo.changed = digest, True
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror}: complete the data set") from error
    return digest


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_error(path, error, "written") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in FOLDER_CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _signature(path: Path) -> tuple[int, int] | None:
    """Return (size, mtime in ns), or None when the file is missing or too young to be known by them."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if time.time() - status.st_mtime > SETTLED_SECONDS else None


def _list_key(names: list[str], context: str) -> str:
    """Return a hash over (path, size, mtime) of all files; empty when one of them is too young."""
    lines = [context]
    for name in names:
        status = os.stat(name)  # noqa: PTH116 - Path.stat takes three times as long, and there may be 100,000
        if time.time() - status.st_mtime <= SETTLED_SECONDS:
            return ""
        lines.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}")
    return sha256_text("\n".join(lines))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
