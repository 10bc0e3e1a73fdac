"""What commands share: their options, and the run folder that the options speak of."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from stages.console.output import reporter

if TYPE_CHECKING:
    from stages.pipeline.recipe import Recipe
    from stages.pipeline.run import Run
    from stages.shared.step import Runtime

FC = TypeVar("FC", bound=Callable[..., object] | click.Command)


def option(*names: str, **settings: object) -> Callable[[FC], FC]:
    """Return a click option that shows its default."""
    return click.option(*names, **({"show_default": True} | settings))  # type: ignore[arg-type]


def _a_number(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which is in every range of click's
        raise click.BadParameter("nan is not a number of seconds", ctx, param)
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``RUN_OPTIONS`` and ``WORK_OPTIONS`` say, with the values of those that a command lacks."""

    scheme: str | None = None
    recipe: str | None = None
    run_name: str | None = None
    sets: tuple[str, ...] = ()
    data_root: Path | None = None
    device: str = ""  # so for a command without WORK_OPTIONS
    workers: int | None = None
    snapshot_seconds: float = 30.0
    log_every: int = 20
    feature_store: str = "auto"
    processes: int = 1
    deterministic: bool = False

    def runtime(self) -> "Runtime":
        """Return the runtime that they ask for; that of a command which works reports to stderr."""
        from altopt.machine.distributed import SingleProcess
        from stages.shared.step import Runtime

        if not self.device:
            return Runtime()
        return Runtime(device=self.device, workers=self.workers, snapshot_seconds=self.snapshot_seconds,
                       report_every=self.log_every, feature_store=self.feature_store, report=reporter(),
                       deterministic=self.deterministic,
                       ranks=click.get_current_context().find_object(SingleProcess) or SingleProcess())

    def open_run(self) -> "Run":
        """Return the run that they speak of."""
        from stages.pipeline.run import open_folder

        return open_folder(self.recipe, self.run_name, self.sets, self.data_root, self.runtime(), self.scheme)


RUN_OPTIONS = [
    option("--scheme", metavar="NAME", help="The way to train. Default: the recipe's, which is alternating."),
    option("--recipe", metavar="NAME|FILE", help="The experiment. Default: the run folder's own, or shapes."),
    option("--run", "run_name", metavar="NAME", help="The folder runs/NAME. Default: the recipe's name."),
    option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting, e.g. train_rpn.lr=0.01."),
    option("--data-root", type=click.Path(path_type=Path), help="Where the data set lies. Default: the recipe's."),
]


def start_processes(ctx: click.Context, parameter: click.Parameter, count: int) -> int:
    """Run the command as several processes in the place of this one, which ends with their exit code."""
    if count > 1 and "WORLD_SIZE" not in os.environ and not ctx.resilient_parsing:
        from stages.console.launching import launch

        ctx.exit(launch(count, sys.argv[1:]))
    return count


WORK_OPTIONS = [
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."),
    option("--workers", type=click.IntRange(0, 64), default=None,
           help="Threads that read images ahead, or processes of selective search. Default: one thread (beside a GPU "
                "up to 8), and a process for each processor."),
    option("--snapshot-seconds", type=click.FloatRange(0), default=30.0, callback=_a_number,
           help="Between snapshots inside a stage."),
    option("--log-every", type=click.IntRange(1), default=20, help="Iterations between reports."),
    option("--feature-store", type=click.Choice(["auto", "on", "off"]), default="auto",
           help="Keep on disk what frozen conv layers make of the images; auto: where it pays and fits."),
    option("--processes", type=click.IntRange(1), default=1, callback=start_processes,
           help="Work as so many processes, on the CPU or with a GPU each; the same as starting with torchrun."),
    option("--deterministic", is_flag=True,
           help="Add up in a fixed order on CUDA too, so that a run can be repeated to the last bit; slower there."),
]
FROM_OPTION = option("--from", "given", multiple=True, metavar="M1[=FILE]",
                     help="Take an artifact as given, from this run or from a file, and go on behind it; given several "
                          "times, take each, and go on behind the latest.")
JSON_OPTION = option("--json", "as_json", is_flag=True, help="Print JSON.")
AS_OPTION = option("--as", "artifact", metavar="P0|T0", required=True,
                   help="What they are in the run: P0, P1, ... on the training split, T0 on the test split.")
BOX_FORMATS = ("xyxy", "inclusive-0", "inclusive-1", "yxyx-inclusive-1", "xywh")


class Command(click.Command):
    """A command that gets the values of ``RUN_OPTIONS`` and ``WORK_OPTIONS`` as one argument, ``options``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, and put those values together."""
        left = super().parse_args(ctx, args)
        if {"scheme", "device"} & ctx.params.keys():  # one stands in each of the two lists
            known = {each.name for each in fields(Options)} & ctx.params.keys()
            ctx.params["options"] = Options(**{name: ctx.params.pop(name) for name in known})
        return left


def with_options(*groups: Sequence[Callable[[FC], FC]]) -> Callable[[FC], FC]:
    """Return a decorator that adds the options of all groups."""

    def decorate(command: FC) -> FC:
        for each in reversed(list(chain(*groups))):
            command = each(command)
        return command

    return decorate


def find_recipe(arguments: Sequence[str]) -> "Recipe":
    """Return the recipe of the run that the arguments of a command speak of, whatever else they say."""
    from stages.pipeline.recipe import choose_recipe

    look = with_options(RUN_OPTIONS)(click.Command("", add_help_option=False))
    # Whatever else is wrong with them: the command itself will say so.
    parsed = look.make_context("", list(arguments), resilient_parsing=True, ignore_unknown_options=True,
                               allow_extra_args=True).params
    return choose_recipe(parsed["recipe"], parsed["run_name"], parsed["sets"] or (), parsed["scheme"])[1]


@contextmanager
def working_in(run: "Run") -> Iterator[None]:
    """Hold the run folder, made if need be, and leave the recipe there for later commands.

    A folder that was made for a command which then makes nothing, for what it lacks, goes again.
    """
    from altopt.errors import AltoptError
    from cache.lock import LOCK_NAME, run_lock

    new = not run.folder.is_dir()
    with run_lock(run.folder):
        run.keep_recipe()
        try:
            yield
        except AltoptError:
            left = [run.folder / name for name in ("recipe.toml", LOCK_NAME)]
            if new and sorted(run.folder.iterdir()) == sorted(left):
                for path in left:
                    path.unlink()
                run.folder.rmdir()
                with suppress(OSError):  # other runs
                    run.folder.parent.rmdir()
            raise


def locked(run: "Run") -> AbstractContextManager[None]:
    """Return the lock on a run folder; one process at a time works in it."""
    from cache.lock import run_lock

    return run_lock(run.folder) if run.folder.is_dir() else nullcontext()
