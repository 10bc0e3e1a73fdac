"""What stages report while they run: one small class for each kind of event. A run writes them to log.jsonl."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Something worth telling; ``kind`` is its name in log.jsonl."""

    kind: ClassVar[str] = ""  # programs that read logs know events by it: it does not change
    artifact: str = field(default="", kw_only=True)  # the output that is being made: a stage leaves it to the run

    def as_dict(self) -> dict[str, object]:
        """Return a line of log.jsonl, but for the time: what a mapping holds stands there beside the other fields."""
        line: dict[str, object] = {"event": self.kind}
        for name, value in asdict(self).items():
            line |= value if isinstance(value, dict) else {name: value}
        return line


@dataclass(frozen=True)
class Started(Event):
    """A stage begins to make its output from these artifacts."""

    kind = "started"
    stage: str
    inputs: tuple[str, ...]
    place: str = ""  # such as 1 of 8, among the run's steps
    why: str = ""


@dataclass(frozen=True)
class Finished(Event):
    """A stage has made its output in so many seconds."""

    kind = "finished"
    facts: Mapping[str, object]  # what its record keeps
    seconds: float


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on behind the iteration that a snapshot was taken after."""

    kind = "resumed"
    iteration: int


@dataclass(frozen=True)
class TrainingProgress(Event):
    """Training after so many iterations."""

    kind = "progress"
    iteration: int
    iterations: int
    lr: float
    losses: Mapping[str, float]  # means since the last report, as the speed is
    images_per_second: float
    wait_share: float  # of the time: the loop had no batch to work on
    seconds: float


@dataclass(frozen=True)
class ImagesDone(Event):
    """So many images of a split are done, or so many of ``what``."""

    kind = "images"
    done: int
    total: int
    what: str = "images"


@dataclass(frozen=True)
class WeightsDrawn(Event):
    """These parts of a network got new random weights."""

    kind = "weights"
    drawn: tuple[str, ...]  # empty: all have come from the initial ones


@dataclass(frozen=True)
class Reason(Event):
    """Why an output is not made, but taken from elsewhere."""

    kind = "reason"
    text: str


@dataclass(frozen=True)
class Note(Event):
    """A sentence for whoever watches."""

    kind = "note"
    text: str


@dataclass(frozen=True)
class Caution(Event):
    """A sentence about what looks wrong with a data set or a file."""

    kind = "warning"
    text: str


Report = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Take a report that nobody wants to see."""
