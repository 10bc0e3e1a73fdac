"""Stopping on Ctrl-C and SIGTERM: at once, or held back until a snapshot is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from altopt.errors import LostError


class Terminated(BaseException):
    """SIGTERM as an exception; the command line exits with 143."""

    exit_code = 143


def raise_on_sigterm() -> None:
    """Make SIGTERM raise ``Terminated``, so that what is open is closed on the way out."""
    signal.signal(signal.SIGTERM, _raise_terminated)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


class Stop:
    """The signal that asked to stop, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def raise_it(self) -> None:
        """Raise what the signal stands for; do nothing if there was none."""
        if self.signal == signal.SIGTERM:
            raise Terminated
        if self.signal is not None:
            raise KeyboardInterrupt


@contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Hold Ctrl-C and SIGTERM back while the block looks at ``Stop``; a second one gets through at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            stop.raise_it()
        stop.signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except LostError:
        stop.raise_it()  # torchrun sends SIGTERM because a process died, and says so: no reason to say it twice
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.raise_it()
