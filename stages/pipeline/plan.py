"""The plan as lines of text, and not as a table of rich's: to import that takes half as long again as all the rest."""

import textwrap
from itertools import starmap

import click

from stages.pipeline.run import Run, Verdict
from stages.shared.feature_plan import foreseen, store_line

COLOURS = {"done": "green", "given": "cyan", "waits": "yellow", "stale": "yellow"}
HEADINGS = ("", "output", "stage", "from", "verdict", "why")
LEAST_WIDTH = 20  # of the last column, however narrow the terminal
NOT_LOOKED_AT = ("not looked at here: each image and object (altopt check-data looks), device, optional packages, "
                 "memory, room on the disk; run-all looks at all of them before its first stage")


class Survey:
    """The verdicts on a run's steps, what each took, and what the feature stores of those to come will take."""

    def __init__(self, run: Run, verdicts: list[Verdict], plan: bool = False) -> None:
        self.run, self.verdicts = run, verdicts
        self.left = [NOT_LOOKED_AT] if plan and not all(each.valid for each in verdicts) else []
        records = {each.step.output: run.record(each.step.output) for each in verdicts}
        self.seconds = {output: record.seconds for output, record in records.items() if record}
        stores = {each.step.output: foreseen(run.folder, run.recipe.config(each.step), run.runtime.data_root)
                  for each in verdicts if not each.valid}
        self.stores = {output: store for output, store in stores.items() if store}

    def as_dict(self) -> dict[str, object]:
        """Return it JSON-able."""
        recipe = self.run.recipe
        return {"folder": str(self.run.folder), "recipe": recipe.name, "scheme": recipe.scheme, "steps": [
            {"output": each.step.output, "stage": each.step.name, "inputs": list(each.step.inputs),
             "verdict": each.state, "reasons": list(each.reasons), "seconds": self.seconds.get(each.step.output),
             "feature_store": self.stores.get(each.step.output)}
            for each in self.verdicts]}

    def text(self, width: int | None = None) -> str:
        """Return it as lines for a person, folded to a terminal's ``width`` where there is one."""
        recipe = self.run.recipe
        return "\n".join([
            f"{self.run.folder}: recipe {recipe.name}, scheme {recipe.scheme}",
            *plan_lines(self.verdicts, self.seconds, width), *starmap(store_line, self.stores.items()),
            *self.left])


def duration(seconds: float) -> str:
    """Return a time as people say it: 8.4 s, 3 min 20 s, 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plan_lines(verdicts: list[Verdict], seconds: dict[str, float], width: int | None = None) -> list[str]:
    """Return the steps with their verdicts and the reasons, folded to a terminal's ``width`` where there is one."""
    rows = [HEADINGS]
    for number, each in enumerate(verdicts):
        step, why = each.step, "; ".join(each.reasons) or duration(seconds.get(each.step.output, 0.0))
        rows.append((str(number), step.output, step.name, ", ".join(step.inputs), each.state, why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *cells, verdict = (cell.ljust(longest) for cell, longest in zip(row[:-1], widths[:-1], strict=True))
        left = sum(widths[:-1]) + 2 * len(row[:-1])
        folded = [row[-1]] if not width else textwrap.wrap(
            row[-1], max(LEAST_WIDTH, width - left), break_on_hyphens=False)
        coloured = click.style(verdict, fg=COLOURS.get(verdict.strip()))
        lines += ["  ".join([*cells, coloured, folded[0]]), *(" " * left + rest for rest in folded[1:])]
    return lines
