"""The command line: parse, one call, print. Heavy imports happen inside the commands that need them."""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stages.run import Run
    from stages.step import Step

EXIT_CODES = """\b
Exit codes: 0 done, 1 a bug, 2 usage or settings, 3 data set invalid, 4 artifact missing, foreign or corrupt,
5 training diverged, 6 disk or memory, 7 download, 75 the run folder is busy, 130 Ctrl-C, 141 closed pipe,
143 SIGTERM."""
PROTOCOLS = ("voc07", "voc10", "coco")


class Suggesting(click.Group):
    """A group that, for an unknown command, names the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Resolve as click does, with a suggestion in the error."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            close = difflib.get_close_matches(args[0], names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Commands are {', '.join(names)}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


class Stages(Suggesting):
    """The seven stages as commands, by number, output or function."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the numbers; outputs and function names are accepted too."""
        return [str(number) for number in range(8)]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Resolve any of a stage's names."""
        return args[0], self.get_command(ctx, args[0]), args[1:]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of one stage, with its inputs, output and settings as its help."""
        from altopt.errors import UsageError
        from stages import ALTERNATING, PRETRAINED
        from stages.run import find_step

        try:
            step = find_step([PRETRAINED[1], *ALTERNATING], cmd_name)
        except UsageError as error:
            ctx.fail(str(error))
        return stage_command(step)


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return a click option that shows its default."""
    return click.option(*names, **({"show_default": True} | settings))


RUN_OPTIONS = [
    option("--recipe", metavar="NAME|FILE", help="The experiment. Default: the run folder's own, or shapes."),
    option("--run", "run_name", metavar="NAME", help="The folder runs/NAME. Default: the recipe's name."),
    option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting, e.g. train_rpn.lr=0.01."),
    option("--data-root", type=click.Path(path_type=Path), help="Where the data set lies. Default: the recipe's."),
]
WORK_OPTIONS = [
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one."),
    option("--workers", type=click.IntRange(0, 64), default=1, help="Threads that read pictures ahead."),
    option("--snapshot-seconds", type=click.FloatRange(0), default=30.0, help="Between snapshots inside a stage."),
    option("--log-every", type=click.IntRange(1), default=20, help="Iterations between reports."),
]
FROM_OPTION = option("--from", "start", metavar="M1[=FILE]",
                     help="Take an artifact as given, from this run or from a file, and go on behind it.")


def with_options(*groups: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return a decorator that adds the options of all groups, in their order."""

    def decorate(function: Any) -> Any:
        for each in reversed([each for group in groups for each in group]):
            function = each(function)
        return function

    return decorate


@click.group(cls=Suggesting, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="altopt")
def main() -> None:
    """Train Faster R-CNN by alternating optimisation: seven stages, each a command, exchanging files in runs/NAME.

    \b
    altopt run-all                      all stages on synthetic pictures, in minutes
    altopt plan                         what would run, and why
    altopt stage 3 --from M1            make M2 from M0 and M1
    """


@main.command("run-all")
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@FROM_OPTION
@option("--until", metavar="P2", help="Stop after this stage.")
@option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run_all(start: str | None, until: str | None, as_json: bool, **options: Any) -> None:
    """Bring the whole run up to date, then score it.

    Stages that are up to date are left alone; an interrupted one goes on where it stopped.

    \b
    altopt run-all
    altopt run-all --recipe voc07-squeezenet-mini --data-root data --from M0=squeezenet.pth
    altopt run-all --from M2 --until P2
    """
    from stages.evaluation import summary
    from stages.run import find_step, take_from

    run = open_run(options)
    with working_in(run):
        steps = run.recipe.steps
        target = find_step(steps, until) if until else steps[-1]
        wanted = take_from(run, steps, start, target) if start else steps[: steps.index(target) + 1]
        made = run.bring_up_to_date(wanted)
        if not made:
            run.runtime.report({"event": "note", "text": f"{run.folder} is up to date: nothing to do"})
        if until:
            return
        result = summary(run, run.protocol)
    if as_json:
        print_json(result)
    else:
        from stages.reporting import summary_tables

        show(*summary_tables(result))


@main.group("stage", cls=Stages, invoke_without_command=False)
def stage_group() -> None:
    """Run one stage: 1 to 7, or its output (M2), or its function; 0 makes M0.

    \b
    altopt stage 3                      M2, from M0 and P1 as they are
    altopt stage 3 --from M1            P1 if it is stale, then M2
    altopt stage M3 --help              its inputs, output and settings
    """


def stage_command(step: "Step") -> click.Command:
    """Return the command of one stage."""

    @with_options(RUN_OPTIONS, WORK_OPTIONS)
    @FROM_OPTION
    @option("--init", metavar="M1", help="Start this stage's weights from another network than the list's.")
    @option("--force", is_flag=True, help="Make the output anew even if it is up to date.")
    def run_stage(start: str | None, init: str | None, force: bool, **options: Any) -> None:
        from stages.run import find_step, run_one, take_from

        if init:
            options["sets"] = (*options["sets"], f"{step.table}.init={init.upper()}")
        run = open_run(options)
        with working_in(run):
            target = find_step(run.recipe.steps, step.output)
            if start:
                made = run.bring_up_to_date(take_from(run, run.recipe.steps, start, target), force=force)
            else:
                made = run_one(run, target, force)
            if not made:
                run.runtime.report({"event": "note", "text": f"{step.output} is up to date: nothing to do"})

    from stages.recipe import describe_config

    inputs = ", ".join(step.inputs) or "nothing"
    text = f"{step.summary}\n\n\b\nInputs: {inputs}\nOutput: {step.output}\n\n\b\n{describe_config(step)}"
    return click.command(step.output, help=text, short_help=f"{step.output}: {step.summary}")(run_stage)


@main.command()
@with_options(RUN_OPTIONS)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(as_json: bool, **options: Any) -> None:
    """Show what run-all would do, stage by stage, and why.

    \b
    altopt plan --set train_rpn.lr=0.01
    """
    print_survey(open_run(options), as_json, all_steps=False)


@main.command()
@with_options(RUN_OPTIONS)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool, **options: Any) -> None:
    """Show what a run folder holds: each artifact, whether it is up to date, what it took.

    \b
    altopt status --run shapes
    """
    print_survey(open_run(options), as_json, all_steps=True)


@main.command()
@click.argument("network", default="M5")
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--protocol", type=click.Choice(PROTOCOLS), help="Default: the recipe's.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(network: str, protocol: str | None, as_json: bool, **options: Any) -> None:
    """Detect on the test split and score: M5, or M1+M2 for the pair that shares nothing.

    \b
    altopt evaluate M5 --protocol voc10
    """
    from stages.evaluation import detection_step
    from stages.evaluation import evaluate as score_network

    run = open_run(options)
    with locked(run):
        result = score_network(run, detection_step(network), protocol or run.protocol)
    print_score(result, as_json)


@main.command()
@click.argument("ground_truth", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("detections", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--protocol", type=click.Choice(PROTOCOLS), required=True, help="11 points, area, or COCO's twelve numbers.")
@option("--iou", default=0.5, help="The overlap that counts as found (VOC).")
@option("--match", type=click.Choice(["gt", "ge"]), default="gt", help="IoU above the threshold, or at least (VOC).")
@option("--plus-one", is_flag=True, help="Box edges are inclusive pixels: width is x2 - x1 + 1 (VOC).")
@option("--devkit-rounding", is_flag=True, help="Round as the devkit's result files do, before scoring (VOC).")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(ground_truth: Path, detections: Path, protocol: Any, match: str, as_json: bool, **rules: Any) -> None:
    """Score detections of any origin: COCO json files in, VOC or COCO rules.

    \b
    altopt score instances.json results.json --protocol voc07
    """
    from altopt.evaluation.scoring import score_files

    print_score(score_files(protocol, ground_truth, detections, strict=match == "gt", **rules).as_dict(), as_json)


@main.command()
@click.argument("proposals", default="P1")
@with_options(RUN_OPTIONS)
@option("--limit", "limits", type=click.IntRange(1), multiple=True, default=(50, 100, 300, 1000, 2000),
        help="Numbers of proposals.")
@option("--json", "as_json", is_flag=True, help="Print JSON, by area range too.")
def recall(proposals: str, limits: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Show how many objects of the training split the proposals cover, against IoU and their number.

    \b
    altopt recall P2 --limit 300
    """
    from stages.evaluation import recall as recall_of

    result = recall_of(open_run(options), proposals.upper(), limits)
    if as_json:
        print_json(result)
    else:
        from stages.reporting import recall_table

        show(recall_table(result))


@main.command()
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes(as_json: bool) -> None:
    """List the recipes that come with altopt.

    \b
    altopt recipes
    """
    from stages.recipe import describe_recipes

    known = describe_recipes()
    if as_json:
        print_json(known)
    else:
        for name, text in known.items():
            click.echo(f"{name:<24}{text}")


@main.command()
@click.argument("name")
@option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting first.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipe(name: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every setting resolved, and the source of each value.

    \b
    altopt recipe voc07-vgg16 > mine.toml
    """
    from stages.recipe import read_recipe

    resolved = read_recipe(name, sets)
    if as_json:
        print_json(resolved.as_dict())
    else:
        click.echo(resolved.text(), nl=False)


@main.command("fetch-voc07")
@option("--data-root", type=click.Path(path_type=Path), default=Path("data"), help="Where to put VOCdevkit.")
@option("--archive", "archives", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="An archive you already have; give both.")
@option("--mirror", "mirrors", multiple=True, metavar="URL", help="A place to try before the known ones.")
def fetch_voc07(data_root: Path, archives: tuple[Path, ...], mirrors: tuple[str, ...]) -> None:
    """Fetch PASCAL VOC 2007, trainval and test, checked by size and SHA-256; goes on where it was interrupted.

    \b
    altopt fetch-voc07 --archive VOCtrainval_06-Nov-2007.tar --archive VOCtest_06-Nov-2007.tar
    """
    from altopt.datasets.voc07_archive import obtain
    from stages.progress import download_progress

    with download_progress(stderr()) as progress:
        folder = obtain(data_root, archive_files=list(archives), mirrors=list(mirrors), progress=progress)
    click.echo(folder)


@main.command()
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def beside(as_json: bool, **options: Any) -> None:
    """Print a VOC 2007 run's scores beside the paper's and py-faster-rcnn's, class by class.

    \b
    altopt beside --recipe voc07-vgg16
    """
    from stages.evaluation import beside_published

    run = open_run(options)
    with locked(run):
        rows = beside_published(run)
    if as_json:
        print_json(rows)
    else:
        from stages.reporting import beside_table

        show(beside_table(rows))


@main.command()
@click.argument("network", required=False)
@with_options(RUN_OPTIONS, WORK_OPTIONS[:1])
@option("--pictures", type=click.IntRange(1), default=8, help="Training pictures to take the gradients on.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def probe(network: str | None, pictures: int, as_json: bool, **options: Any) -> None:
    """Show how approximate approximate joint training is, on a network with RPN and detector.

    Gradients of its conv layers with and without the path through the proposals' coordinates: angle and size.

    \b
    altopt probe M5 --pictures 16
    """
    from stages.probing import probe as probe_network

    result = probe_network(open_run(options), network, pictures)
    if as_json:
        print_json(result)
    else:
        from stages.reporting import probe_table

        show(probe_table(result))


def open_run(options: dict[str, Any]) -> "Run":
    """Return the run that the options speak of."""
    from stages.run import open_folder
    from stages.step import Runtime

    runtime = Runtime(
        device=options.get("device", "auto"), workers=options.get("workers", 1),
        snapshot_seconds=options.get("snapshot_seconds", 30.0), report_every=options.get("log_every", 20),
    )
    if "device" in options:
        from stages.progress import Reporter

        runtime.report = Reporter(stderr())
    return open_folder(options["recipe"], options["run_name"], options["sets"], options["data_root"], runtime)


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


def stderr() -> Any:
    """Return a console on stderr, where progress and messages go."""
    from rich.console import Console

    return Console(stderr=True)


def show(*tables: Any) -> None:
    """Print tables to stdout; wide enough for them when it is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


def print_json(value: Any) -> None:
    """Print JSON and nothing else to stdout."""
    click.echo(json.dumps(value, indent=1))


def print_score(result: dict[str, Any], as_json: bool) -> None:
    """Print a score with its convention."""
    if as_json:
        print_json(result)
        return
    from stages.reporting import score_table

    click.echo(f"{result['protocol']}: {result['convention']}")
    for name, value in result.get("numbers", {}).items():
        click.echo(f"{name:<8}{value if value is None else format(value, '.3f')}")
    show(score_table(result))


def print_survey(run: "Run", as_json: bool, *, all_steps: bool) -> None:
    """Print a verdict on every stage."""
    verdicts = run.survey(run.recipe.steps, demand=not all_steps)
    seconds = {each.step.output: record.seconds for each in verdicts if (record := run.record(each.step.output))}
    if as_json:
        print_json({"folder": str(run.folder), "recipe": run.recipe.name, "steps": [
            {"output": each.step.output, "stage": each.step.name, "inputs": list(each.step.inputs),
             "verdict": each.state, "reasons": list(each.reasons), "seconds": seconds.get(each.step.output)}
            for each in verdicts]})
        return
    from stages.reporting import plan_table

    click.echo(f"{run.folder}: recipe {run.recipe.name}")
    show(plan_table(verdicts, seconds))


def run() -> None:
    """Run the command line, with one line and the documented exit code for every expected failure."""
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: list[str]) -> int:
    """Run a command and return its exit code; unexpected exceptions keep their traceback."""
    from altopt.errors import AltoptError
    from altopt.interruption import Terminated, raise_on_sigterm

    raise_on_sigterm()
    try:
        main.main(arguments, prog_name="altopt", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AltoptError as error:
        return complain(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return complain("stopped by Ctrl-C; run the same command again to go on", 130)
    except Terminated:
        return complain("stopped by SIGTERM; run the same command again to go on", 143)
    except SystemExit:  # what click makes of a closed pipe; its code would mean a bug
        return 141
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
            return complain("out of memory: lower images_per_batch or short_side (--set), or use --device cpu", 6)
        raise
    return 0


def complain(text: str, code: int) -> int:
    """Print one line to stderr and return the code."""
    click.echo(f"altopt: {text}", err=True)
    return code


if __name__ == "__main__":
    run()
