"""Fetching one file over an unreliable network: mirrors in order, resumed by byte ranges, accepted by size and SHA-256.

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
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from altopt.errors import BusyError, DownloadError, ResourceError

# Called with (bytes done, bytes in all); the first number falls when a transfer has to start over.
Progress = Callable[[int, int], None]

SCHEMES = ("http", "https", "file")
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


@dataclass(frozen=True)
class _Wanted:
    size: int
    sha256: str
    progress: Progress | None
    timeout: float


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    size: int,
    sha256: str,
    progress: Progress | None = None,
    remedy: str | None = None,
    timeout: float = 20.0,
) -> Path:
    """Return ``destination`` once it holds the ``size`` bytes with this SHA-256, from the first mirror that can.

    A destination that is already right is left alone, a wrong one is replaced when the right bytes are there.
    ``timeout`` (seconds) limits each wait for the network.
    Raises DownloadError with the reason of every mirror and ``remedy``, ResourceError when the disk has no room,
    BusyError when another process fetches the same file.
    """
    if matches(destination, size, sha256):
        return destination
    wanted = _Wanted(size, sha256, progress, timeout)
    part_path = destination.with_name(destination.name + ".part")
    with writing(part_path):
        destination.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(part_path) as part:
        need_space(destination.parent, size - _length(part), destination.name)
        try:
            reasons = [] if _verified(part, wanted) else _from_mirrors(urls, part, wanted)
            if _length(part) == size:
                _publish(part, part_path, destination)
                return destination
        finally:
            if part_path.exists() and _length(part) == 0:
                part_path.unlink()
    remedy = remedy or f"bring the file ({size} bytes, SHA-256 {sha256}) as {destination}"
    raise DownloadError(f"{destination.name} could not be fetched ({'; '.join(reasons) or 'no mirror'}): {remedy}")


def matches(path: Path, size: int, sha256: str) -> bool:
    """Return whether the file is there, whole and the right one."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise ResourceError when the file system of an existing folder has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{purpose} needs {needed / 1e6:,.1f} MB in {folder}, which has {free / 1e6:,.1f} MB free: "
            "make room there, or choose another folder"
        )


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


def _from_mirrors(urls: Sequence[str], part: FileIO, wanted: _Wanted) -> list[str]:
    """Complete the part from the first mirror that can; return why the others could not."""
    opener = _opener()
    reasons: list[str] = []
    waiting = list(urls)
    for start_over in (False, True):  # first nobody may cost us what is there, then those that cannot continue it may
        candidates, waiting = waiting, []
        for url in candidates:
            if start_over:
                part.truncate(0)
            try:
                _from_mirror(opener, url, part, wanted)
            except _CannotResumeError as error:
                waiting.append(url)
                reasons += [f"{url}: {error}"] if start_over else []
            except _UnusableError as error:
                reasons.append(f"{url}: {error}")
            else:
                return reasons
    return reasons


def _from_mirror(opener: urllib.request.OpenerDirector, url: str, part: FileIO, wanted: _Wanted) -> None:
    """Complete and verify the part from one mirror, again where its connection breaks; raise _UnusableError if not."""
    failures, best = 0, _length(part)
    foreign = best > 0  # bytes of another mirror or another day: a wrong sum may be their fault
    while True:
        try:
            foreign = _transfer(opener, url, part, wanted) > 0 and foreign
        except _BrokenError as error:
            useful = _length(part) - best >= USEFUL_PART * wanted.size
            failures, best = 1 if useful else failures + 1, max(best, _length(part))
            if failures == TRIES:
                raise _UnusableError(f"{error} ({TRIES} times)") from error
            time.sleep(PAUSE * failures)
            continue
        if _verified(part, wanted):
            return
        if not foreign:
            raise _UnusableError("serves a file of the right size with another SHA-256")
        failures, best, foreign = 0, 0, False


def _transfer(opener: urllib.request.OpenerDirector, url: str, part: FileIO, wanted: _Wanted) -> int:
    """Append what the mirror sends until the part is as long as the file; return the offset where it began."""
    offset = _length(part)
    with _request(opener, url, offset, wanted.timeout) as response:
        start = done = _beginning(response, offset, wanted.size)
        part.truncate(start)
        while done < wanted.size:
            _report(wanted, done)
            chunk = _receive(response, min(CHUNK, wanted.size - done))
            if not chunk:
                raise _BrokenError(f"closed the connection after {done} of {wanted.size} bytes")
            _append(part, chunk)
            done += len(chunk)
    _report(wanted, done)
    return start


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for SCHEMES alone (urllib's own follows redirects to ftp), with the environment's proxies."""
    opener = urllib.request.OpenerDirector()
    opener.addheaders = [("User-Agent", "altopt")]
    proxies = {scheme: url for scheme, url in urllib.request.getproxies().items() if scheme in SCHEMES}
    handlers = (
        urllib.request.ProxyHandler(proxies),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.FileHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _request(opener: urllib.request.OpenerDirector, url: str, offset: int, timeout: float) -> Any:
    """Return the open response to a request for the bytes from ``offset`` on."""
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        if urlsplit(url).scheme not in SCHEMES:
            raise _UnusableError(f"is not an address of the kind {', '.join(SCHEMES)}")
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error) from error
    except urllib.error.URLError as error:
        # A name without address or a closed door stays so for the next seconds; a reset may not.
        reset = isinstance(error.reason, ConnectionResetError)
        raise (_BrokenError if reset else _UnusableError)(_said(error.reason)) from error
    except ValueError as error:
        raise _UnusableError(_said(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_said(error)) from error


def _refusal(error: urllib.error.HTTPError) -> Exception:
    """Return what an HTTP error status means for this mirror."""
    said = f"HTTP {error.code} {_said(error.reason)}"
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        return _CannotResumeError(said)
    return _BrokenError(said) if error.code in TRANSIENT_STATUS else _UnusableError(said)


def _beginning(response: Any, offset: int, size: int) -> int:
    """Return the offset at which a response begins, or raise _UnusableError when it is not about our file."""
    if response.status == http.client.PARTIAL_CONTENT:
        stated = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
        if stated is None or int(stated[1]) != offset:
            raise _CannotResumeError("answers with other bytes than those asked for")
        start, total = offset, stated[2]
    elif response.status in (http.client.OK, None):  # None: a file has no status
        start, total = 0, response.headers.get("Content-Length", "*")
    else:
        raise _UnusableError(f"HTTP {response.status}")
    if total not in ("*", str(size)):
        raise _UnusableError(f"offers {total} bytes instead of {size}")
    if start < offset and total == "*":  # it may be an error page: not worth the bytes that are there
        raise _CannotResumeError("ignores byte ranges and states no size")
    return start


def _receive(response: IO[bytes], count: int) -> bytes:
    try:
        return response.read(count)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_said(error)) from error


def _append(part: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    with writing(Path(str(part.name))):
        while rest:
            rest = rest[part.write(rest) :]


def _verified(part: FileIO, wanted: _Wanted) -> bool:
    """Return whether the part is the whole file; empty a part that has the length but not the content."""
    if _length(part) < wanted.size:
        return False
    if matches(Path(str(part.name)), wanted.size, wanted.sha256):
        return True
    part.truncate(0)
    return False


def _publish(part: FileIO, part_path: Path, destination: Path) -> None:
    with writing(destination):
        os.fsync(part.fileno())
        part_path.replace(destination)
        folder = os.open(destination.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _length(part: FileIO) -> int:
    return os.fstat(part.fileno()).st_size


def _report(wanted: _Wanted, done: int) -> None:
    if wanted.progress is not None:
        wanted.progress(done, wanted.size)


def _said(error: object) -> str:
    """Return an error's own words on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())
