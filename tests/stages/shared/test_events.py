import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stages.shared import events
from stages.shared.events import Event, Finished, ImagesDone, Started, TrainingProgress, WeightsDrawn, ignore_event

KINDS = [each for each in vars(events).values()
         if isinstance(each, type) and issubclass(each, Event) and each is not Event]


def test_every_event_has_a_kind_of_its_own():
    assert len(KINDS) == 9
    assert len({each.kind for each in KINDS} - {""}) == len(KINDS)


@pytest.mark.parametrize(("event", "line"), [
    (Started("train_rpn", ("M0",), "2 of 8", "not made yet"),
     {"event": "started", "stage": "train_rpn", "inputs": ("M0",), "place": "2 of 8", "why": "not made yet"}),
    (Finished({"iterations": 4, "train_seconds": 1.0}, 2.0),
     {"event": "finished", "iterations": 4, "train_seconds": 1.0, "seconds": 2.0}),
    (TrainingProgress(1, 2, 0.1, {"cls": 0.5}, 9.0, 0.25, 3.0),
     {"event": "progress", "iteration": 1, "iterations": 2, "lr": 0.1, "cls": 0.5, "images_per_second": 9.0,
      "wait_share": 0.25, "seconds": 3.0}),
    (ImagesDone(1, 2), {"event": "images", "done": 1, "total": 2, "what": "images"}),
    (WeightsDrawn(("fc",)), {"event": "weights", "drawn": ("fc",)}),
])
def test_lines_of_the_log_are_flat(event, line):
    assert replace(event, artifact="M1").as_dict() == {"artifact": "M1", **line}


def test_nobody_has_to_listen():
    ignore_event(Event())


def test_no_torch_and_nothing_of_ours():
    tree = ast.parse(Path(events.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names) | {"collections.abc"}
