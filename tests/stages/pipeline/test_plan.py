import click
import pytest
from tiny_runs import open_tiny

from stages import ALTERNATING
from stages.pipeline.plan import duration, plan_lines
from stages.pipeline.run import Verdict


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0.0 s"), (8.44, "8.4 s"), (59.94, "59.9 s"), (59.99, "1 min 00 s"), (200, "3 min 20 s"),
    (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (360000, "100 h 00 min"),
])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plan_shows_verdicts_and_reasons(tmp_path):
    lines = [click.unstyle(line).split() for line in plan_lines(open_tiny(tmp_path / "tiny").survey(ALTERNATING), {})]
    assert lines[0] == ["output", "stage", "from", "verdict", "why"]
    assert lines[3] == ["2", "M2", "train_fast_rcnn", "M0,", "P1", "missing", "not", "made", "yet"]
    assert len(lines) == 8


def test_columns_stand_below_each_other(tmp_path):
    heading, *lines = map(click.unstyle, plan_lines(open_tiny(tmp_path / "tiny").survey(ALTERNATING), {}))
    for word, column in (("stage", "stage"), ("verdict", "missing"), ("why", "not made yet")):
        at = heading.index(word)
        assert all(line[at - 1] == " " != line[at] for line in lines)
        assert column == word or all(line[at:].startswith(column) for line in lines)


@pytest.mark.parametrize("why", ["given: --from M1=/a/[/b]/M1.safetensors", "given: [bold]", 'was ["a"], is [1, 2]'])
def test_plan_shows_brackets_as_they_are(why):
    assert plan_lines([Verdict(ALTERNATING[0], "given", (why,))], {})[1].endswith(why)


def test_reasons_are_folded_to_the_terminal_and_only_there():
    verdict = Verdict(ALTERNATING[0], "stale", tuple(f"setting-{number} was {number}" for number in range(9)))
    assert len(plan_lines([verdict], {})) == 2
    lines = [click.unstyle(line) for line in plan_lines([verdict], {}, width=80)]
    assert max(map(len, lines)) <= 80
    start = lines[0].index("why")
    assert " ".join(line[start:] for line in lines[1:]) == "; ".join(verdict.reasons)
    assert {line[:start].strip() for line in lines[2:]} == {""}
    assert all(len(line) >= start for line in plan_lines([verdict], {}, width=1))


def test_plan_shows_the_time_of_what_is_done():
    assert plan_lines([Verdict(ALTERNATING[0], "done")], {"M1": 200.0})[1].endswith("3 min 20 s")
