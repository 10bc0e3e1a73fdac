"""A recipe that runs all seven stages in about a second, and what tests do with its run folders."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cache.files import sha256_file
from stages.pipeline.recipe import Recipe, read_recipe
from stages.pipeline.run import Run
from stages.shared.events import Event
from stages.shared.step import Runtime, Step, file_name

Kind = TypeVar("Kind")
SomeEvent = TypeVar("SomeEvent", bound=Event)

ARTIFACTS = ("M0", "M1", "P1", "M2", "M3", "P2", "M4", "M5")
STAGES = ("pretrain_on_crops", "train_rpn", "generate_proposals", "train_fast_rcnn", "train_rpn_frozen_conv",
          "generate_proposals", "train_fast_rcnn_frozen_conv", "add_rpn_layers")

TINY = """\
title = "tiny"
data_root = "."

[network]
name = "small"              # nine convolutions
short_side = 80             # the images' own size
max_side = 96               # the images' own size
anchor_scales = [1.5, 3]    # squares of 24 and 48 px
rpn_channels = 8            # few

[data]
format = "shapes"           # drawn on the spot
train = ["train:6"]         # few
test = ["test:4"]           # few
width = 96                  # small
height = 80                 # small

[all]
iterations = 4              # few
images_per_batch = 2        # more than one
lr = 0.001                  # low
lr_steps = [3]              # before the last one
min_side = 4                # px
post_nms = 40               # few
proposals = 40              # few

[pretrain_on_crops]
crop_side = 32              # small
"""


@dataclass
class Reports:
    """What a run reported, and something to do at a certain report."""

    events: list[Event] = field(default_factory=list)
    at: Callable[[Event], bool] = lambda event: False
    act: Callable[[], None] = lambda: None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.at(event):
            self.act()

    def texts(self) -> list[str]:
        return [text for event in self.events if (text := getattr(event, "text", "") or getattr(event, "why", ""))]

    def of(self, kind: type[SomeEvent]) -> list[SomeEvent]:
        return [event for event in self.events if isinstance(event, kind)]


def write_recipe(path: Path, text: str = TINY) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def open_tiny(folder: Path, *sets: str, recipe: Path | None = None, report: Any = None, **runtime: Any) -> Run:
    """The run in this folder, on the CPU; the recipe lies beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe or folder.parent / "tiny.toml"
    if not recipe.exists():
        write_recipe(recipe)
    settings: dict[str, Any] = {"device": "cpu", "snapshot_seconds": 1000, "report_every": 1} | runtime
    return Run(folder, read_recipe(str(recipe), sets), Runtime(report=report or Reports(), **settings))


def config_as(kind: type[Kind], recipe: Recipe, step: Step) -> Kind:
    """The config of a step, which is of this kind."""
    config = recipe.config(step)
    assert isinstance(config, kind)
    return config


def make_all(run: Run) -> list[str]:
    """Bring all steps up to date and name those that were made."""
    return [step.output for step in run.bring_up_to_date(run.recipe.steps)]


def hashes(folder: Path, *artifacts: str) -> dict[str, str]:
    paths = {name: folder / file_name(name) for name in artifacts or ARTIFACTS}
    return {name: _sha256(path, path.stat().st_ino, path.stat().st_mtime_ns) for name, path in paths.items()}


@cache
def _sha256(path: Path, inode: int, changed: int) -> str:
    return sha256_file(path)


def link_or_copy(source: str, target: str) -> None:
    """Link an artifact, which altopt replaces and never writes into; copy everything else."""
    if source.endswith((".safetensors", ".h5")):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def verdicts(run: Run) -> dict[str, str]:
    return {each.step.output: each.state for each in run.survey(run.recipe.steps)}


def reasons(run: Run, artifact: str) -> str:
    return "; ".join(next(each for each in run.survey(run.recipe.steps) if each.step.output == artifact).reasons)


def work_until_killed(folder: Path, artifact: str, event: str, count: int, feature_store: str = "auto") -> None:
    """Work in a folder, and die by SIGKILL at the count-th report of this kind from this step."""
    seen = 0

    def at(report: Event) -> bool:
        nonlocal seen
        seen += (report.artifact, report.kind) == (artifact, event)
        return seen == count

    reports = Reports(at=at, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
    make_all(open_tiny(folder, report=reports, snapshot_seconds=0, feature_store=feature_store,
                       data_root=folder.parent / "data"))


def work(folder: Path, started: Any) -> None:
    """Work in a folder; ``started`` is an event to set when it begins."""
    run = open_tiny(folder, snapshot_seconds=0)
    started.set()
    make_all(run)
