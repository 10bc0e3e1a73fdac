"""One process per run folder: the lock that keeps a second one out and says who holds it."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from altopt.errors import BusyError
from cache.files import file_error

LOCK_NAME = ".lock"

_held: set[int] = set()


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process as long as the block runs; the folder is made when it is missing.

    Raises BusyError when another holds it, naming its process, host, command and start.
    """
    # The lock is the kernel's (flock), not the file: it ends with the process, however that ends, and the file stays.
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(folder, error, "made a folder") from error
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise file_error(path, error, "opened") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(_busy_message(descriptor, folder)) from error
        except OSError as error:
            raise file_error(path, error, "locked") from error
        holder = {"pid": os.getpid(), "host": socket.gethostname(),
                  "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                  "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")}
        with contextlib.suppress(OSError):  # the lock holds without a name in it, on a full disk for one
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which let go of it already
            _held.discard(descriptor)
            os.close(descriptor)


def _busy_message(descriptor: int, folder: Path) -> str:
    remedy = "wait until it has finished, stop it, or use another run folder"
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        command = " ".join(str(holder["command"]).split())
        process = f"process {holder['pid']} on {holder['host']}"
        return f"{folder} is busy: {process} holds it since {holder['since']} ({command}): {remedy}"
    except (OSError, ValueError, TypeError, KeyError):  # it has the lock and has not yet written its name
        return f"{folder} is busy: another process holds it: {remedy}"


def _close_in_child() -> None:
    """Let go of the locks in a forked worker, or a worker that outlives a killed parent would keep the folder busy."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
