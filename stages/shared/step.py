"""One step of a scheme: a stage function, the artifact it makes, and the artifacts it makes it from.

A stage is an ordinary function ``stage(input, ..., *, out, config, runtime)`` that writes one file and returns a dict
of facts for its record. The class of its ``config`` stands in its signature; its fields are the staleness key.
Stage functions import torch when they run, not when they are imported, so that ``altopt plan`` answers at once.
"""

import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from altopt.errors import UsageError
from altopt.machine.distributed import SingleProcess

Split = Literal["train", "test"]
SUFFIXES = {
    "M": ".safetensors", "P": ".h5", "D": ".json",
    "F": ".safetensors",  # features, of images or of regions
    "S": ".safetensors", "R": ".safetensors",  # SVMs and box regressors
    "T": ".h5",  # proposals of the test split
}


class Step:
    """``Step("M2", train_fast_rcnn, "M0", "P1")``: M2 is made by train_fast_rcnn from M0 and P1."""

    def __init__(self, output: str, stage: Callable[..., dict[str, Any]], *inputs: str) -> None:
        self.output, self.stage, self.inputs = output, stage, inputs

    @property
    def name(self) -> str:
        """The stage function's name."""
        return self.stage.__name__

    @property
    def table(self) -> str:
        """The table of a recipe that the config comes from: the stage's name, unless its class names another."""
        return getattr(self.config_class, "table", self.name)

    @cached_property
    def config_class(self) -> type:
        """The dataclass of the stage's config."""
        return typing.cast(type, typing.get_type_hints(self.stage)["config"])

    @property
    def divided(self) -> bool:
        """Whether several processes work on the stage together; if not, rank 0 does it alone."""
        return getattr(self.config_class, "divided", False)

    @property
    def summary(self) -> str:
        """The first line of the stage's docstring."""
        return (self.stage.__doc__ or "").strip().splitlines()[0]

    def inputs_for(self, config: Any) -> tuple[str, ...]:
        """Return the inputs, with the initial weights that the config's ``init`` asks for in place of the list's."""
        init = getattr(config, "init", "")
        return (init, *self.inputs[1:]) if init else self.inputs


def file_name(artifact: str) -> str:
    """Return the name of an artifact's file in a run folder: M1.safetensors, P1.h5, D5.detections.json."""
    kind = SUFFIXES[artifact[0]]
    return f"{artifact}.detections{kind}" if artifact[0] == "D" else f"{artifact}{kind}"


def split_of(artifact: str) -> Split:
    """Return the split that an artifact is about: P0, P1, ... train, T0 test. Raises ``UsageError``."""
    if not re.fullmatch(r"[PT]\d", artifact):
        raise UsageError(f"{artifact!r} is no name for proposals: P0, P1, ... are those of the training split, T0 of "
                         "the test split")
    return "train" if artifact.startswith("P") else "test"


def ignore_event(event: dict[str, Any]) -> None:
    """Take a report that nobody wants to see."""


@dataclass(kw_only=True)
class Runtime:
    """Everything a stage needs that does not change its result."""

    device: str = "auto"
    workers: int | None = None  # None: as ``readers`` and ``searchers`` have it
    data_root: Path | None = None
    snapshot_seconds: float = 30.0
    report_every: int = 20
    feature_store: str = "auto"  # or "on", "off": whether maps of frozen layers are stored
    deterministic: bool = False  # sums in a fixed order on CUDA too (altopt/machine/determinism.py)
    inputs_key: str = ""  # hashes of the inputs: a snapshot made from others is not resumed
    data_digest: str = ""  # of the split that the stage reads, for what it writes down
    report: Callable[[dict[str, Any]], None] = ignore_event
    ranks: SingleProcess = field(default_factory=SingleProcess)

    @property
    def readers(self) -> int:
        """Return how many threads read images ahead; 0: they are read when they are needed."""
        return 1 if self.workers is None else self.workers

    @property
    def searchers(self) -> int:
        """Return how many processes search images: one for each processor that there is, unless workers are given."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
