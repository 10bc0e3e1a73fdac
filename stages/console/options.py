"""What commands share: their options, and the run folder that the options speak of."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.console.output import reporter

if TYPE_CHECKING:
    from stages.pipeline.run import Run
    from stages.shared.step import Runtime


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return a click option that shows its default."""
    return click.option(*names, **({"show_default": True} | settings))


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
           help="Threads that read images ahead, or processes of selective search. Default: one thread, and a "
                "process for each processor."),
    option("--snapshot-seconds", type=click.FloatRange(0), default=30.0, help="Between snapshots inside a stage."),
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
FRAMES = ("xyxy", "inclusive-0", "inclusive-1", "yxyx-inclusive-1", "xywh")


def with_options(*groups: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of all groups, in their order."""

    def decorate(function: Any) -> Any:
        for each in reversed([each for group in groups for each in group]):
            function = each(function)
        return function

    return decorate


def open_run(options: dict[str, Any]) -> "Run":
    """Return the run that the options speak of."""
    from stages.pipeline.run import open_folder
    from stages.shared.step import Runtime

    runtime = work_runtime(options) if "device" in options else Runtime()
    return open_folder(options["recipe"], options["run_name"], options["sets"], options["data_root"], runtime,
                       options["scheme"])


def work_runtime(options: dict[str, Any]) -> "Runtime":
    """Return the runtime that ``WORK_OPTIONS`` ask for; it reports to stderr."""
    from altopt.machine.distributed import SingleProcess
    from stages.shared.step import Runtime

    return Runtime(device=options["device"], workers=options.get("workers"),
                   snapshot_seconds=options.get("snapshot_seconds", 30.0), report_every=options.get("log_every", 20),
                   feature_store=options.get("feature_store", "auto"), report=reporter(),
                   deterministic=options.get("deterministic", False),
                   ranks=click.get_current_context().find_object(SingleProcess) or SingleProcess())


@contextmanager
def working_in(run: "Run") -> Iterator[None]:
    """Hold the run folder, made if need be, and leave the recipe there for later commands."""
    from cache.lock import run_lock

    with run_lock(run.folder):
        run.keep_recipe()
        yield


def locked(run: "Run") -> AbstractContextManager[None]:
    """Return the lock on a run folder; one process at a time works in it."""
    from cache.lock import run_lock

    return run_lock(run.folder) if run.folder.is_dir() else nullcontext()
