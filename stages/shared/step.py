"""One step of a scheme: a stage function, the artifact it makes, and the artifacts it makes it from."""
# A stage is an ordinary function ``stage(input, ..., *, out, config, runtime)`` that writes one file and returns a dict
# of facts for its record. The class of its ``config`` stands in its signature; its fields are the fingerprint. Stage
# functions import torch when they run, not when they are imported, so that ``altopt plan`` answers at once.

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import cast

from altopt.errors import ArtifactError, UsageError
from altopt.machine.distributed import SingleProcess
from cache.records import JSON
from stages.shared.events import Report, ignore_event
from stages.shared.stage_config import Split, StageConfig

Facts = Mapping[str, JSON]  # what a stage says of its output, for its record


class Kind(Enum):
    """What an artifact is: the letter that its name begins with, and how the name of its file ends."""

    NETWORK = "M", ".safetensors"
    PROPOSALS = "P", ".h5"  # of the training split
    TEST_PROPOSALS = "T", ".h5"
    FEATURES = "F", ".safetensors"  # of images or of regions
    SVMS = "S", ".safetensors"
    REGRESSORS = "R", ".safetensors"
    DETECTIONS = "D", ".detections.json"

    def __init__(self, letter: str, suffix: str) -> None:
        self.letter, self.suffix = letter, suffix

    @classmethod
    def of(cls, artifact: str) -> "Kind":
        """Return the kind of M1, P0, D5, ... Raises ``UsageError`` for what is not the name of an artifact."""
        for kind in cls:
            if re.fullmatch(rf"{kind.letter}\d+", artifact):
                return kind
        raise UsageError(f"{artifact!r} must be a letter and a number, such as M1 or P0: letters are "
                         f"{', '.join(kind.letter for kind in cls)}")

    def check(self, path: Path, network: str) -> None:
        """Raise ``ArtifactError`` unless a file can be of this kind, and of the network of this name."""
        if self in (Kind.PROPOSALS, Kind.TEST_PROPOSALS):
            from cache.proposals import ProposalFile

            ProposalFile(path).close()
        elif self is Kind.FEATURES:
            from cache.preallocated import PreallocatedFile

            PreallocatedFile(path)
        elif self is not Kind.DETECTIONS:
            from cache.checkpoints import read_description

            description = read_description(path)
            if self is not Kind.NETWORK and "model" not in description:
                raise ArtifactError(f"{path.name} does not hold SVMs or box regressors: give a file that train_svms or "
                                    "train_regressors made")
            held = description.get("network", {}).get("name")
            if held != network:
                raise ArtifactError(f"{path.name} holds {held or 'no network known to altopt'}, and the recipe speaks "
                                    f"of {network}: choose the recipe that it was made with")


class Step:
    """``Step("M2", train_fast_rcnn, "M0", "P1")``: M2 is made by train_fast_rcnn from M0 and P1."""

    def __init__(self, output: str, stage: Callable[..., Facts], *inputs: str, label: str = "") -> None:
        self.output, self.stage, self.inputs = output, stage, inputs
        self.label = label  # what sets detections apart from others of the same run

    @property
    def kind(self) -> Kind:
        """What the output is."""
        return Kind.of(self.output)

    @property
    def name(self) -> str:
        """The stage function's name."""
        return self.stage.__name__

    @property
    def table(self) -> str:
        """The table of a recipe that the config comes from: the stage's name, unless its class names another."""
        return self.config_class.table or self.name

    @cached_property
    def config_class(self) -> type[StageConfig]:
        """The dataclass of the stage's config."""
        # Not get_type_hints: that resolves the result's type too, whose names are those of another module.
        return cast(type, self.stage.__annotations__["config"])

    @property
    def summary(self) -> str:
        """The first line of the stage's docstring."""
        return (self.stage.__doc__ or "").strip().splitlines()[0]

    def inputs_for(self, config: StageConfig) -> tuple[str, ...]:
        """Return the inputs, with the initial weights that the config's ``init`` asks for in place of the list's."""
        return (config.init, *self.inputs[1:]) if config.init else self.inputs


def file_name(artifact: str) -> str:
    """Return the name of an artifact's file in a run folder: M1.safetensors, P1.h5, D5.detections.json."""
    return f"{artifact}{Kind.of(artifact).suffix}"


def split_of(artifact: str) -> Split:
    """Return the split that proposals are of: P0, P1, ... train, T0 test. Raises ``UsageError`` for others."""
    if re.fullmatch(r"[PT]\d", artifact):
        return "train" if Kind.of(artifact) is Kind.PROPOSALS else "test"
    raise UsageError(f"{artifact!r} is not a name for proposals: P0, P1, ... are those of the training split, T0 of "
                     "the test split")


MOST_READERS = 8  # beside a GPU


@dataclass(kw_only=True)
class Runtime:
    """Everything a stage needs that does not change its result."""

    device: str = "auto"
    workers: int | None = None  # None: as ``readers`` and ``searchers`` have it
    data_root: Path | None = None
    snapshot_seconds: float = 30.0  # between two snapshots, at least
    report_every: int = 20  # iterations
    feature_store: str = "auto"  # or "on", "off": whether maps of frozen layers are stored
    deterministic: bool = False  # sums in a fixed order on CUDA too (altopt/machine/determinism.py)
    inputs_key: str = ""  # hashes of the inputs: a snapshot made from others is not resumed
    data_digest: str = ""  # of the split that the stage reads, for what it writes down
    report: Report = ignore_event
    ranks: SingleProcess = field(default_factory=SingleProcess)

    @property
    def readers(self) -> int:
        """Return how many threads read images ahead; 0: they are read when they are needed.

        One, unless workers are given, on the CPU, where more would take it from the training; beside a GPU as many as
        this process has processors, up to 8.
        """
        if self.workers is not None:
            return self.workers
        import torch

        on_cpu = self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available())
        return 1 if on_cpu else max(1, min(MOST_READERS, processors() // self.ranks.count))

    @property
    def searchers(self) -> int:
        """Return how many processes search images: one for each processor that there is, unless workers are given."""
        return processors() if self.workers is None else self.workers


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
