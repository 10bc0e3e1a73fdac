"""What a person sees on stderr while stages run: a bar on a terminal, a line now and then elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stages.pipeline.plan import duration
from stages.shared import events
from stages.shared.events import Event

PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Reporter:
    """Turns the events of stages into a progress bar on a terminal, and into plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.last_line = 0.0
        logger = logging.getLogger("altopt")
        # In the place of an earlier reporter's, so that nothing is said twice.
        logger.handlers = [each for each in logger.handlers if not isinstance(each, _LogLines)] + [_LogLines(self)]

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case events.Started(stage, inputs, place, why):
                place, why = f" ({place})" if place else "", f": {why}" if why else ""
                made_of = f" from {', '.join(inputs)}" if inputs else ""
                self.line(f"{event.artifact}{place} {stage}{made_of}{why}")
                self.last_line = time.monotonic()
                if self.console.is_terminal:
                    self.bar = Progress(
                        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
                        console=self.console, transient=True)
                    self.task = self.bar.add_task(event.artifact, total=None, text="")
                    self.bar.start()
            case events.TrainingProgress():
                losses = " ".join(f"{name} {value:.4f}" for name, value in event.losses.items())
                text = (f"{losses}  lr {event.lr:.2g}  {event.images_per_second:.1f} images/s  "
                        f"data wait {event.wait_share:.0%}")
                self._advance(event.artifact, event.iteration, event.iterations, text, event.seconds)
            case events.ImagesDone(done, total, what):
                self._advance(event.artifact, done, total, what, None)
            case events.Finished():
                self.close()
                self.line(f"{event.artifact}: done in {duration(event.seconds)}")
            case events.Resumed(iteration):
                self.line(f"{event.artifact}: goes on after iteration {iteration}")
            case events.Reason(text):
                self.line(f"{event.artifact}: {text}")
            case events.Note(text):
                self.line(text)
            case events.WeightsDrawn(drawn) if drawn:
                self.line(f"{event.artifact}: re-initialised: {', '.join(drawn)}")
            case events.Caution(text):
                self.line(f"warning: {text}")

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, artifact: str, done: int, total: int, text: str, seconds: float | None) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, text=text)
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL:  # a log is not to fill with lines
            self.last_line = time.monotonic()
            left = f"  {duration(seconds / done * (total - done))} left" if seconds else ""
            self.line(f"{artifact}: {done}/{total}  {text}{left}")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _LogLines(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.line(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def download_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Give a callback (done bytes, total bytes) that draws a bar on a terminal, and a line now and then elsewhere."""
    if console.is_terminal:
        columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = [0.0]

    def line(done: int, total: int) -> None:
        if time.monotonic() - last[0] >= PLAIN_INTERVAL or done == total:
            last[0] = time.monotonic()
            console.print(f"fetching: {done / 1e6:.0f} of {total / 1e6:.0f} MB", highlight=False)

    yield line
