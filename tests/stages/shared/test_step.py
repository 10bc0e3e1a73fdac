import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.shared.step import Runtime, Step, file_name


@dataclass(frozen=True)
class Config:
    init: str = ""


@dataclass(frozen=True)
class NoInit:
    pass


def train_something(init: Path, proposals: Path, *, out: Path, config: Config, runtime: Runtime) -> dict[str, int]:
    """Train something.

    And more about it.
    """
    return {}


def test_step_knows_its_stage():
    step = Step("M7", train_something, "M0", "P1")
    assert (step.output, step.name, step.inputs) == ("M7", "train_something", ("M0", "P1"))
    assert step.table == "train_something"
    assert step.config_class is Config
    assert step.summary == "Train something."


def test_init_takes_the_place_of_the_first_input():
    step = Step("M7", train_something, "M0", "P1")
    assert step.inputs_for(Config()) == ("M0", "P1")
    assert step.inputs_for(Config(init="M1")) == ("M1", "P1")
    assert step.inputs_for(NoInit()) == ("M0", "P1")


@pytest.mark.parametrize(("artifact", "name"), [
    ("M1", "M1.safetensors"), ("P2", "P2.h5"), ("D5", "D5.detections.json"),
])
def test_file_names(artifact, name):
    assert file_name(artifact) == name


def test_runtime_reports_to_nobody_by_default():
    Runtime().report({"event": "note"})


def test_reading_and_searching_have_defaults_of_their_own():
    runtime = Runtime()
    assert runtime.readers == 1
    assert 1 <= runtime.searchers <= os.cpu_count()
    assert Runtime(workers=3).searchers == Runtime(workers=3).readers == 3
    assert Runtime(workers=0).searchers == Runtime(workers=0).readers == 0
