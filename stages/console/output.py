"""What commands print: results to stdout, as tables or as JSON, progress and messages to stderr."""

import json
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click

from stages.shared.events import Note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altopt.evaluation.undefined import ScoreDict
    from stages.console.progress import Reporter
    from stages.pipeline.run import Run
    from stages.shared.step import Step

Shown = TypeVar("Shown")


def reporter() -> "Reporter":
    """Return what shows the events of stages on stderr."""
    from stages.console.progress import Reporter

    return Reporter(stderr())


def stderr() -> "Console":
    """Return a console on stderr, where progress and messages go."""
    from rich.console import Console

    return Console(stderr=True)


def show(*tables: "Table") -> None:
    """Print tables to stdout; wide enough for them when it is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


def note_if_nothing(made: "list[Step]", run: "Run", what: object) -> None:
    """Say on stderr that there was nothing to do, if nothing was made."""
    if not made:
        run.runtime.report(Note(f"{what} is up to date: nothing to do"))


def print_result(value: Shown, as_json: bool, table: "Callable[[Shown], Table]") -> None:
    """Print a result as JSON, or as the table that is made of it."""
    if as_json:
        print_json(value)
    else:
        show(table(value))


def print_json(value: object) -> None:
    """Print JSON and nothing else to stdout."""
    click.echo(json.dumps(value, indent=1))


def print_score(result: "ScoreDict", as_json: bool) -> None:
    """Print a score with its convention."""
    if as_json:
        print_json(result)
        return
    from stages.console.reporting import score_table

    click.echo(f"{result['protocol']}: {result['convention']}")
    for name, value in result.get("numbers", {}).items():
        click.echo(f"{name:<8}{value if value is None else format(value, '.3f')}")
    show(score_table(result))


def print_survey(run: "Run", as_json: bool, *, all_steps: bool) -> None:
    """Print a verdict on every stage, and what the stores of those to come will take."""
    from stages.pipeline.plan import Survey

    survey = Survey(run, run.survey(run.recipe.steps, demand=not all_steps))
    if as_json:
        print_json(survey.as_dict())
    else:
        click.echo(survey.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
