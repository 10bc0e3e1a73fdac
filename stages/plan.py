"""The plan as lines of text, and not as a table of rich's: to import that takes half as long again as all the rest."""

import textwrap

import click

from stages.run import Verdict

COLOURS = {"done": "green", "given": "cyan", "waits": "yellow", "stale": "yellow"}
HEADINGS = ("", "output", "stage", "from", "verdict", "why")
LEAST_WIDTH = 20  # of the last column, however narrow the terminal


def duration(seconds: float) -> str:
    """Return a time as people say it: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plan_lines(verdicts: list[Verdict], seconds: dict[str, float], width: int | None = None) -> list[str]:
    """Return the steps with their verdicts and the reasons, folded to a terminal's ``width`` where there is one."""
    rows = [HEADINGS, *(_row(number, each, seconds) for number, each in enumerate(verdicts))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *cells, verdict = (cell.ljust(longest) for cell, longest in zip(row[:-1], widths[:-1], strict=True))
        left = sum(widths[:-1]) + 2 * len(row[:-1])
        why = _folded(row[-1], max(LEAST_WIDTH, width - left)) if width else [row[-1]]
        lines += ["  ".join([*cells, _coloured(verdict), why[0]]), *(" " * left + rest for rest in why[1:])]
    return lines


def _row(number: int, verdict: Verdict, seconds: dict[str, float]) -> tuple[str, ...]:
    step = verdict.step
    why = "; ".join(verdict.reasons) or duration(seconds.get(step.output, 0.0))
    return str(number), step.output, step.name, ", ".join(step.inputs), verdict.state, why


def _coloured(verdict: str) -> str:
    return click.style(verdict, fg=COLOURS.get(verdict.strip()))


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
