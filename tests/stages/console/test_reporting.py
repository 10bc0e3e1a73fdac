import io
import logging

import pytest
from rich.console import Console
from tiny_runs import open_tiny

from stages.console import progress as module
from stages.console.progress import Reporter
from stages.console.reporting import number, recall_table, score_table, summary_tables
from stages.pipeline.evaluation import summary
from stages.shared.events import (
    Caution,
    Event,
    Finished,
    ImagesDone,
    Note,
    Reason,
    Resumed,
    Started,
    TrainingProgress,
    WeightsDrawn,
)

PROGRESS = TrainingProgress(40, 80, 0.001, {"rpn_cls": 0.5, "rpn_box": 0.25}, 12.34, 0.02, 20.0, artifact="M1")


@pytest.fixture
def logger():
    logger = logging.getLogger("altopt")
    before = list(logger.handlers)
    yield logger
    logger.handlers[:] = before


@pytest.fixture
def plain(logger):
    return Reporter(Console(file=io.StringIO(), width=200))


def text_of(reporter):
    return reporter.console.file.getvalue()


def printed(*tables, width=160):
    file = io.StringIO()
    console = Console(file=file, width=width)
    for table in tables:
        console.print(table)
    return file.getvalue()


def test_number():
    assert (number(0.12345), number(1), number(None)) == ("0.123", "1.000", "-")


@pytest.mark.parametrize(("event", "line"), [
    (Started("train_fast_rcnn", ("M0", "P1"), artifact="M2"), "M2 train_fast_rcnn from M0, P1"),
    (Started("pretrain_on_crops", (), "1 of 8", "not made yet", artifact="M0"),
     "M0 (1 of 8) pretrain_on_crops: not made yet"),
    (Started("train_rpn", ("M0",), "2 of 8", 'freeze was ["conv1"], is [/x] [bold]', artifact="M1"),
     'M1 (2 of 8) train_rpn from M0: freeze was ["conv1"], is [/x] [bold]'),
    (Finished({"iterations": 4}, 8.4, artifact="M2"), "M2: done in 8.4 s"),
    (Resumed(7, artifact="M2"), "M2: goes on after iteration 7"),
    (Reason("taken over from runs/a", artifact="M2"), "M2: taken over from runs/a"),
    (Note("nothing to do"), "nothing to do"),
    (WeightsDrawn(("fc", "head"), artifact="M2"), "M2: re-initialised: fc, head"),
    (Caution("a.xml: one pixel"), "warning: a.xml: one pixel"),
])
def test_events_become_lines(plain, event, line):
    plain(event)
    assert text_of(plain) == line + "\n"


def test_events_without_a_line(plain):
    plain(WeightsDrawn((), artifact="M2"))
    plain(Event())
    assert text_of(plain) == ""


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(plain, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    plain(Started("train_rpn", ("M0",), artifact="M1"))
    for now[0] in (9.9, 10.0, 19.9):
        plain(PROGRESS)
    now[0] = 30.0
    plain(ImagesDone(3, 6, artifact="P1"))
    assert text_of(plain).splitlines()[1:] == [
        "M1: 40/80  rpn_cls 0.5000 rpn_box 0.2500  lr 0.001  12.3 images/s  data wait 2%  20.0 s left",
        "P1: 3/6  images",
    ]


def test_progress_is_a_bar_on_a_terminal(logger):
    reporter = Reporter(Console(file=io.StringIO(), width=120, force_terminal=True))
    reporter(Started("train_rpn", ("M0",), artifact="M1"))
    reporter(PROGRESS)
    assert reporter.bar.tasks[0].completed == 40
    assert reporter.bar.tasks[0].total == 80
    reporter(Finished({}, 3.0, artifact="M1"))
    assert reporter.bar is None
    assert "M1: done in 3.0 s" in text_of(reporter)


def test_log_of_the_library_is_shown(plain, logger):
    logger.warning("M1.json is not a record (%s)", "[/x]")
    assert text_of(plain) == "warning: M1.json is not a record ([/x])\n"


def test_two_reporters_do_not_say_it_twice(plain, logger):
    again = Reporter(Console(file=io.StringIO(), width=200))
    logger.warning("once")
    assert text_of(plain) + text_of(again) == "warning: once\n"


def test_summary_shows_scores_recall_and_times(copied):
    result = summary(open_tiny(copied), "voc07")
    text = printed(*summary_tables(result))
    for words in ("M1+M2 (unshared)", "M5 (shared)", "P1", "P2", "train_rpn_frozen_conv", "total",
                  number(result["scores"][1]["map"])):
        assert words in text
    result["stages"]["M1"]["given"] = "a test"
    assert any(line.split() == ["M1", "train_rpn", "given"] for line in printed(*summary_tables(result)).splitlines())


def test_summary_of_nothing_is_shown_too():
    assert "total" in printed(*summary_tables(
        {"recipe": "tiny", "folder": "runs/tiny", "scores": [], "recall": {}, "stages": {}}))


def test_scores_by_class():
    text = printed(score_table({"protocol": "voc07", "convention": "",
                                "classes": {"dog": {"ap": 0.5}, "[/cat]": {"ap": None}}, "map": 0.5}))
    assert [line.split() for line in text.splitlines()] == [
        ["class", "AP"], ["dog", "0.500"], ["[/cat]", "-"], ["mean", "0.500"]]


def test_recall_by_threshold_and_number(copied):
    result = stages_recall(copied)
    text = printed(recall_table(result))
    assert "P1.h5 on shapes train:6" in text
    rows = [line.split() for line in text.splitlines()]
    for limit in ("5", "20"):
        values = result["limits"][limit]["areas"]["all"]
        expected = [limit, *map(number, values["recall"]), number(values["average_recall"])]
        assert expected in rows


def stages_recall(folder):
    from stages.pipeline.evaluation import recall

    return recall(open_tiny(folder), "P1", (5, 20))
