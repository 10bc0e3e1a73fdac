"""Fetching one file over an unreliable network: mirrors in order, resumed by byte ranges, accepted by size and hash.

The bytes collect in ``destination.part``, which survives an interruption; ``destination`` appears by rename once the
content is verified, so a partial file is never taken for the whole one. No mirror is trusted: whoever serves the right
bytes will do, and bytes of several mirrors may be joined.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit
from urllib.response import addinfourl

from altopt.errors import BusyError, DownloadError, ResourceError

# Called with (bytes done, bytes in all); the first number falls when a transfer has to start over.
Progress = Callable[[int, int], None]

SCHEMES = ("http", "https", "file")
NAMES = {"sha256": "SHA-256", "md5": "MD5"}
CHUNK = 1 << 18
TRIES = 3
PAUSE = 1.0  # seconds before the first of the other tries, twice that before the next
# A connection that brought this part of the file before it broke was worth having and does not count as a failure.
USEFUL_PART = 0.01
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class _BrokenError(Exception):
    """The connection failed in a way that may pass: the same mirror deserves another try."""


class _UnusableError(Exception):
    """This mirror does not serve the file."""


class _CannotResumeError(_UnusableError):
    """This mirror may serve the file, but only from its beginning."""


def fetch(urls: Sequence[str], destination: Path, *, size: int | None, checksum: str, progress: Progress | None = None,
          remedy: str | None = None, timeout: float = 20.0) -> Path:
    """Return ``destination`` once it holds the ``size`` bytes with this hash, from the first mirror that can.

    ``checksum`` is "sha256:" or "md5:" and the hash's hexadecimal digits, or the first of them. Where nobody knows the
    size (None), each mirror's word for it is taken until the hash is checked.
    A destination that is already right is left alone, a wrong one is replaced when the right bytes are there.
    ``timeout`` (seconds) limits each wait for the network.
    Raises DownloadError with the reason of every mirror and ``remedy``, ResourceError when the disk has no room,
    BusyError when another process fetches the same file.
    """
    if matches(destination, size, checksum):
        return destination
    part_path = destination.with_name(destination.name + ".part")
    with writing(part_path):
        destination.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(part_path) as part:
        download = _Download(part, part_path, size, checksum, progress or (lambda done, total: None), timeout)
        need_space(destination.parent, (size or 0) - download.length, destination.name)
        try:
            reasons = None if download.verified(size) else download.from_mirrors(urls)
            if reasons is None:
                with writing(destination):
                    os.fsync(part.fileno())  # first the content, then the name: a power cut leaves no empty file
                    part_path.replace(destination)
                return destination
        finally:
            if part_path.exists() and download.length == 0:
                part_path.unlink()
    remedy = remedy or f"bring the file ({describe(size, checksum)}) as {destination}"
    raise DownloadError(f"{destination.name} could not be fetched ({'; '.join(reasons) or 'no mirror'}): {remedy}")


def matches(path: Path, size: int | None, checksum: str) -> bool:
    """Return whether the file is there, whole and the right one."""
    algorithm, _, digits = checksum.partition(":")
    right_size = path.is_file() and size in (None, path.stat().st_size)
    return right_size and hash_of(path, algorithm).startswith(digits)


def hash_of(path: Path, algorithm: str) -> str:
    """Return the hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def describe(size: int | None, checksum: str) -> str:
    """Return what a file is known by, such as ``5 bytes, SHA-256 ab12...``."""
    algorithm, _, digits = checksum.partition(":")
    return (f"{size} bytes, " if size is not None else "") + f"{NAMES[algorithm]} {digits}"


def need_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise ResourceError when the file system of an existing folder has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{purpose} needs {needed / 1e6:,.1f} MB in {folder}, which has {free / 1e6:,.1f} MB free: "
                            "make room there, or choose another folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there and start again" if full else "choose another folder"
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}: {remedy}") from error


@contextmanager
def exclusive(path: Path) -> Iterator[FileIO]:
    """Open a file for appending, without a buffer, while no other process may do so; else raise BusyError."""
    with writing(path):
        file = path.open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the former holder may have renamed or removed what was opened.
            current = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:
            raise BusyError(f"{path} is in use by another process: wait until it has finished, or end it")
        yield file


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for SCHEMES alone (urllib's own follows redirects to ftp), with the environment's proxies."""
    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "altopt")]
    proxies = {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in SCHEMES}
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    for handler in (urllib.request.UnknownHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.FileHandler, urllib.request.HTTPDefaultErrorHandler,
                    urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


@dataclass(frozen=True)
class _Download:
    """One file in the making: its part, open for appending, and what it is to become."""

    part: FileIO
    path: Path
    size: int | None
    checksum: str
    progress: Progress
    timeout: float
    opener: urllib.request.OpenerDirector = field(default_factory=_opener)

    @property
    def length(self) -> int:
        return os.fstat(self.part.fileno()).st_size

    def verified(self, size: int | None) -> bool:
        """Return whether the part is the whole file; empty a part of that size or more with another content."""
        if size is not None and self.length < size:
            return False
        if matches(self.path, self.size, self.checksum):
            return True
        if size is not None:
            self.part.truncate(0)
        return False

    def from_mirrors(self, urls: Sequence[str]) -> list[str] | None:
        """Complete the part from the first mirror that can; return why none could, if so."""
        reasons: list[str] = []
        waiting = list(urls)
        for start_over in (False, True):  # first nobody may cost us what is there, then who cannot continue it may
            candidates, waiting = waiting, []
            for url in candidates:
                if start_over:
                    self.part.truncate(0)
                try:
                    self.from_mirror(url)
                except _CannotResumeError as error:
                    waiting.append(url)
                    reasons += [f"{url}: {error}"] if start_over else []
                except _UnusableError as error:
                    reasons.append(f"{url}: {error}")
                else:
                    return None
        return reasons

    def from_mirror(self, url: str) -> None:
        """Complete and verify the part from one mirror, again where its connection breaks; else _UnusableError."""
        failures, best = 0, self.length
        foreign = best > 0  # bytes of another mirror or another day: a wrong sum may be their fault
        while True:
            try:
                start, size = self.transfer(url)
            except _BrokenError as error:
                useful = self.length - best >= max(1, USEFUL_PART * (self.size or 0))
                failures, best = 1 if useful else failures + 1, max(best, self.length)
                if failures == TRIES:
                    raise _UnusableError(f"{error} ({TRIES} times)") from error
                time.sleep(PAUSE * failures)
                continue
            foreign = start > 0 and foreign
            if self.verified(size):
                return
            if not foreign:
                named = NAMES[self.checksum.partition(":")[0]]
                right = " of the right size" if self.size is not None else ""
                raise _UnusableError(f"serves a file{right} with another {named}")
            failures, best, foreign = 0, 0, False  # from the beginning, with this mirror's bytes alone

    def transfer(self, url: str) -> tuple[int, int]:
        """Append what the mirror sends until the part is whole; return the offset where it began, and the size."""
        offset = self.length
        with _network():
            if urlsplit(url).scheme not in SCHEMES:
                raise _UnusableError(f"is not an address of the kind {', '.join(SCHEMES)}")
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            opened = self.opener.open(urllib.request.Request(url, headers=headers), timeout=self.timeout)
        with opened as response:
            start, stated = _beginning(response, offset, self.size)
            size = stated if self.size is None else self.size
            if self.size is None and size is not None:
                need_space(self.path.parent, size - start, self.path.stem)
            self.part.truncate(start)
            done = start
            while size is None or done < size:
                self.progress(done, size or done)
                with _network():
                    chunk = response.read(CHUNK if size is None else min(CHUNK, size - done))
                if not chunk and size is None:
                    break
                if not chunk:
                    raise _BrokenError(f"closed the connection after {done} of {size} bytes")
                with writing(self.path):
                    rest = memoryview(chunk)
                    while rest:  # without a buffer, a full disk takes some of the bytes and refuses the next
                        rest = rest[self.part.write(rest) :]
                done += len(chunk)
        self.progress(done, done)
        return start, done


@contextmanager
def _network() -> Iterator[None]:
    """Turn what goes wrong on the way to a mirror into what it means for that mirror."""
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            said = f"HTTP {error.code} {_said(error.reason)}"
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _CannotResumeError(said) from error
            raise (_BrokenError if error.code in TRANSIENT_STATUS else _UnusableError)(said) from error
    except urllib.error.URLError as error:
        # A name without address or a closed door stays so for the next seconds; a reset may not.
        reset = isinstance(error.reason, ConnectionResetError)
        raise (_BrokenError if reset else _UnusableError)(_said(error.reason)) from error
    except ValueError as error:
        raise _UnusableError(_said(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_said(error)) from error


def _beginning(response: addinfourl, offset: int, size: int | None) -> tuple[int, int | None]:
    """Return the offset at which a response begins and the size that it states; _UnusableError if not our file's."""
    if response.status == http.client.PARTIAL_CONTENT:
        stated = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
        if stated is None or int(stated[1]) != offset:
            raise _CannotResumeError("answers with other bytes than those asked for")
        start, total = offset, stated[2]
    elif response.status in (http.client.OK, None):  # None: a file has no status
        start, total = 0, response.headers.get("Content-Length", "*")
    else:
        raise _UnusableError(f"HTTP {response.status}")
    known = int(total) if total.isdecimal() else None
    if size is not None and known not in (None, size):
        raise _UnusableError(f"offers {total} bytes instead of {size}")
    if start < offset and known is None:  # it may be an error page: not worth the bytes that are there
        raise _CannotResumeError("ignores byte ranges and states no size")
    return start, known


def _said(error: object) -> str:
    """Return an error's own words on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())
