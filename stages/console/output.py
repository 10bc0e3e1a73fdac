"""What commands print: results to stdout, as tables or as JSON, progress and messages to stderr."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

from stages.shared.events import Note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stages.console.progress import Reporter
    from stages.pipeline.run import Run
    from stages.shared.step import Step

T = TypeVar("T")


def reporter() -> "Reporter":
    """Return what shows the events of stages on stderr."""
    from stages.console.progress import Reporter

    return Reporter(stderr())


def stderr() -> "Console":
    """Return a console on stderr, where progress and messages go."""
    from rich.console import Console

    return Console(stderr=True)


def note_if_nothing(made: "list[Step]", run: "Run", what: object) -> None:
    """Say on stderr that there was nothing to do, if nothing was made."""
    if not made:
        run.runtime.report(Note(f"{what} is up to date: nothing to do"))


def print_result(value: T, as_json: bool, *parts: "Callable[[T], str | Table | list[Table]]") -> None:
    """Print a result to stdout as JSON and nothing else, or as the lines and tables that are made of it."""
    if as_json:
        click.echo(json.dumps(value, indent=1))
        return
    for part in parts:
        made = part(value)
        if isinstance(made, str):
            click.echo(made)
        else:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 160)  # wide enough for any table
            for table in made if isinstance(made, list) else [made]:
                console.print(table)


def score_lines(result: "Mapping[str, object]") -> str:
    """Return the convention of a score, and COCO's numbers."""
    lines = [f"{result['protocol']}: {result['convention']}"]
    numbers = result.get("numbers")
    for name, value in numbers.items() if isinstance(numbers, dict) else ():
        lines.append(f"{name:<9}{'-' if value is None else format(value, '.3f')}")
    return "\n".join(lines)


def print_survey(run: "Run", as_json: bool, *, all_steps: bool) -> None:
    """Print a verdict on every stage, and what the stores of those to come will take."""
    from stages.pipeline.plan import Survey

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    survey = Survey(run, run.survey(run.recipe.steps, demand=not all_steps), plan=not all_steps)
    print_result(survey.as_dict(), as_json, lambda _: survey.text(width))
