import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from altopt.errors import UsageError
from stages import DETECTIONS, PRETRAINED, SCHEMES
from stages.shared.events import Note
from stages.shared.stage_config import StageConfig
from stages.shared.step import Kind, Runtime, Step, file_name, split_of


@dataclass(frozen=True)
class Config(StageConfig):
    init: str = ""


@dataclass(frozen=True)
class NoInit(StageConfig):
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
    ("M1", "M1.safetensors"), ("P2", "P2.h5"), ("D5", "D5.detections.json"), ("T0", "T0.h5"), ("F1", "F1.safetensors"),
    ("S1", "S1.safetensors"), ("R1", "R1.safetensors"), ("M10", "M10.safetensors"),
])
def test_file_names(artifact, name):
    assert file_name(artifact) == name


@pytest.mark.parametrize("artifact", ["", "M", "1", "m1", "X1", "M1.safetensors", "../M1"])
def test_what_names_no_artifact(artifact):
    with pytest.raises(UsageError, match="must be a letter and a number"):
        Kind.of(artifact)


def test_every_output_of_every_scheme_has_a_kind():
    steps = [*PRETRAINED, *(step for lists in (SCHEMES, DETECTIONS) for steps in lists.values() for step in steps)]
    kinds = {step.kind for step in steps}
    assert kinds == set(Kind)
    assert len({kind.letter for kind in Kind}) == len(Kind)


def test_splits_of_proposals():
    assert [split_of(name) for name in ("P0", "P2", "T0")] == ["train", "train", "test"]
    with pytest.raises(UsageError, match="'M1' is not a name for proposals"):
        split_of("M1")


def test_runtime_reports_to_nobody_by_default():
    Runtime().report(Note("a word"))


def test_reading_and_searching_have_defaults_of_their_own():
    runtime = Runtime()
    assert runtime.readers == 1
    assert 1 <= runtime.searchers <= os.cpu_count()
    assert Runtime(workers=3).searchers == Runtime(workers=3).readers == 3
    assert Runtime(workers=0).searchers == Runtime(workers=0).readers == 0


def test_readers_follow_the_device(monkeypatch):
    monkeypatch.setattr("stages.shared.step.processors", lambda: 16)
    assert Runtime(device="cpu").readers == 1
    assert (Runtime(device="cpu", workers=3).readers, Runtime(device="cuda", workers=0).readers) == (3, 0)
    assert Runtime(device="cuda:1").readers == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime().readers == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Runtime().readers == 1
    monkeypatch.setattr("stages.shared.step.processors", lambda: 2)
    assert Runtime(device="cuda").readers == 2
