"""The command line: parse, one call, print. Heavy imports happen inside the commands that need them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.console.options import (
    AS_OPTION,
    FRAMES,
    FROM_OPTION,
    JSON_OPTION,
    RUN_OPTIONS,
    WORK_OPTIONS,
    locked,
    open_run,
    option,
    with_options,
    work_runtime,
    working_in,
)
from stages.console.output import (
    note_if_nothing,
    print_json,
    print_result,
    print_score,
    print_survey,
    reporter,
    show,
    stderr,
)

if TYPE_CHECKING:
    from stages.shared.step import Step

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
            import difflib

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
        from stages import PRETRAINED, SCHEMES
        from stages.pipeline.run import find_step

        complaints = []
        for scheme in SCHEMES.values():
            try:
                return stage_command(cmd_name, find_step([PRETRAINED[1], *scheme], cmd_name))
            except UsageError as error:
                complaints.append(str(error))
        raise click.UsageError(complaints[0], ctx)


@click.group(cls=Suggesting, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="altopt")
def main() -> None:
    """Train Faster R-CNN by alternating optimisation: seven stages, each a command, exchanging files in runs/NAME.

    \b
    altopt run-all                      all stages on synthetic images, in minutes
    altopt plan                         what would run, and why
    altopt stage 3 --from M1            make M2 from M0 and M1
    """


@main.command("run-all")
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@FROM_OPTION
@option("--until", metavar="P2", help="Stop after this stage.")
@option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run_all(given: tuple[str, ...], until: str | None, as_json: bool, **options: Any) -> None:
    """Bring the whole run up to date, then score it.

    Stages that are up to date are left alone; an interrupted one goes on where it stopped.

    \b
    altopt run-all
    altopt run-all --recipe voc07-squeezenet-mini --data-root data --from M0=squeezenet.pth
    altopt run-all --from M2 --until P2
    """
    from stages.pipeline.evaluation import summary
    from stages.pipeline.run import find_step, import_given

    run = open_run(options)
    with working_in(run):
        steps = run.recipe.steps
        target = find_step(steps, until) if until else steps[-1]
        wanted = import_given(run, steps, given, target) if given else steps[: steps.index(target) + 1]
        made = run.bring_up_to_date(wanted)
        note_if_nothing(made, run, run.folder)
        if until:
            return
        result = summary(run, run.protocol)
    if as_json:
        print_json(result)
    else:
        from stages.console.reporting import summary_tables

        show(*summary_tables(result))


@main.group("stage", cls=Stages, invoke_without_command=False)
def stage_group() -> None:
    """Run one stage: 1 to 7, or its output (M2), or its function; 0 makes M0.

    \b
    altopt stage 3                      M2, from M0 and P1 as they are
    altopt stage 3 --from M1            P1 if it is stale, then M2
    altopt stage 3 --from M0=FILE --from P1=FILE    M2 from a network and proposals of your own
    altopt stage M3 --help              its inputs, output and settings
    """


def stage_command(word: str, step: "Step") -> click.Command:
    """Return the command of the stage that ``word`` names; ``step`` is what its help describes."""

    @with_options(RUN_OPTIONS, WORK_OPTIONS)
    @FROM_OPTION
    @option("--init", metavar="M1", help="Start this stage's weights from another network than the list's.")
    @option("--force", is_flag=True, help="Make the output anew even if it is up to date.")
    def run_stage(given: tuple[str, ...], init: str | None, force: bool, **options: Any) -> None:
        from stages.pipeline.run import find_step, import_given, run_one

        run = open_run(options)
        target = find_step(run.recipe.steps, word)
        if init:
            run = open_run(options | {"sets": (*options["sets"], f"{target.table}.init={init.upper()}")})
            target = find_step(run.recipe.steps, word)
        with working_in(run):
            if given:
                made = run.bring_up_to_date(import_given(run, run.recipe.steps, given, target), force=force)
            else:
                made = run_one(run, target, force)
            note_if_nothing(made, run, target.output)

    from stages.pipeline.recipe import describe_config

    inputs = ", ".join(step.inputs) or "nothing"
    text = f"{step.summary}\n\n\b\nInputs: {inputs}\nOutput: {step.output}\n\n\b\n{describe_config(step)}"
    return click.command(step.output, help=text, short_help=f"{step.output}: {step.summary}")(run_stage)


@main.command()
@with_options(RUN_OPTIONS)
@JSON_OPTION
def plan(as_json: bool, **options: Any) -> None:
    """Show what run-all would do, stage by stage, and why.

    \b
    altopt plan --set train_rpn.lr=0.01
    """
    print_survey(open_run(options), as_json, all_steps=False)


@main.command()
@with_options(RUN_OPTIONS)
@JSON_OPTION
def status(as_json: bool, **options: Any) -> None:
    """Show what a run folder holds: each artifact, whether it is up to date, what it took.

    \b
    altopt status --run shapes
    """
    print_survey(open_run(options), as_json, all_steps=True)


@main.command()
@click.argument("network", required=False)
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--protocol", type=click.Choice(PROTOCOLS), help="Default: the recipe's.")
@JSON_OPTION
def evaluate(network: str | None, protocol: str | None, as_json: bool, **options: Any) -> None:
    """Detect on the test split and score: the final network, or M1+M2 for the pair that shares nothing.

    \b
    altopt evaluate M5 --protocol voc10
    """
    from stages.pipeline.evaluation import detection_step
    from stages.pipeline.evaluation import evaluate as score_network

    run = open_run(options)
    with locked(run):
        result = score_network(run, detection_step(run, network), protocol or run.protocol)
    print_score(result, as_json)


@main.command()
@click.argument("ground_truth", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("detections", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--protocol", type=click.Choice(PROTOCOLS), required=True, help="11 points, area, or COCO's twelve numbers.")
@option("--iou", default=0.5, help="The overlap that counts as found (VOC).")
@option("--match", type=click.Choice(["gt", "ge"]), default="gt", help="IoU above the threshold, or at least (VOC).")
@option("--plus-one", is_flag=True, help="Box edges are inclusive pixels: width is x2 - x1 + 1 (VOC).")
@option("--devkit-rounding", is_flag=True, help="Round as the devkit's result files do, before scoring (VOC).")
@JSON_OPTION
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
    from stages.console.reporting import recall_table
    from stages.pipeline.evaluation import recall as recall_of

    print_result(recall_of(open_run(options), proposals.upper(), limits), as_json, recall_table)


@main.group(cls=Suggesting)
def proposals() -> None:
    """Bring proposals of your own into a run, take a run's out, or make some by selective search.

    \b
    altopt proposals import voc_2007_trainval.mat --as P0
    altopt proposals export P1 P1.pkl --format detectron2
    altopt proposals selective-search --as T0
    """


@proposals.command("import")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@AS_OPTION
@with_options(RUN_OPTIONS)
@option("--frame", type=click.Choice(FRAMES), help="How the file counts its boxes. Default: as its format does.")
@option("--allow-missing", is_flag=True, help="Images without an entry get no proposals.")
@option("--invalid", type=click.Choice(["error", "leave-out"]), default="error", help="What to do with unusable boxes.")
@JSON_OPTION
def import_command(file: Path, artifact: str, frame: Any, allow_missing: bool, invalid: Any, as_json: bool,
                   **options: Any) -> None:
    """Take a file's proposals as the run's: checked against the images, recall first, then written.

    Read are altopt's HDF5 (.h5), selective search's .mat (of a split, or a folder with one for each image), pickles
    of py-faster-rcnn, mmdet and detectron2 (.pkl, without executing them), and .json: {"image_ids", "boxes", "scores"}
    or COCO results. Boxes are told apart by --frame: xyxy and xywh are continuous, inclusive-N names the first and the
    last pixel, counted from N.

    \b
    altopt proposals import voc_2007_trainval.mat --as P0
    altopt proposals import boxes.json --as T0 --frame inclusive-1 --allow-missing
    """
    from stages.pipeline.importing import import_proposals

    run = open_run(options)
    run.runtime.report = reporter()
    with working_in(run):
        result = import_proposals(run, file, artifact.upper(), frame=frame, allow_missing=allow_missing,
                                  invalid=invalid)
    if as_json:
        print_json(result)
    else:
        from stages.console.reporting import recall_table

        click.echo(f"{result['file']}: {result['boxes']} proposals on {result['images']} images, from "
                   f"{result['format']}, read as {result['frame']}")
        show(recall_table(result))


@proposals.command("export")
@click.argument("artifact")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_options(RUN_OPTIONS)
@option("--format", "form", type=click.Choice(["hdf5", "json", "detectron2", "py-faster-rcnn"]),
        help="Default: by the suffix, .h5 or .json.")
@JSON_OPTION
def export_command(artifact: str, file: Path, form: str | None, as_json: bool, **options: Any) -> None:
    """Write a run's proposals for another program.

    py-faster-rcnn's list has neither ids nor scores: it follows the data set's order and counts inclusive pixels.

    \b
    altopt proposals export P2 P2.json
    altopt proposals export P1 P1.pkl --format py-faster-rcnn
    """
    from stages.pipeline.exporting import export_proposals

    result = export_proposals(open_run(options), artifact.upper(), file, form)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result['file']}: {result['artifact']} as {result['format']}, {result['images']} images")


@proposals.command("selective-search")
@AS_OPTION
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--force", is_flag=True, help="Search anew even if the output is up to date.")
def selective_search_command(artifact: str, force: bool, **options: Any) -> None:
    """Make proposals by selective search, without a network; a search that was stopped goes on where it was.

    It works in a process for each processor, or in --workers. Settings are those of the table selective_search.

    \b
    altopt proposals selective-search --as P0
    """
    from stages.steps.selective_search import search_step

    run = open_run(options)
    with working_in(run):
        made = run.bring_up_to_date([search_step(artifact.upper())], force)
        note_if_nothing(made, run, artifact.upper())


@main.command()
@JSON_OPTION
def recipes(as_json: bool) -> None:
    """List the recipes that come with altopt.

    \b
    altopt recipes
    """
    from stages.pipeline.recipe import describe_recipes

    known = describe_recipes()
    if as_json:
        print_json(known)
    else:
        for name, text in known.items():
            click.echo(f"{name:<24}{text}")


@main.command()
@click.argument("name")
@option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting first.")
@JSON_OPTION
def recipe(name: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every setting resolved, and the source of each value.

    \b
    altopt recipe voc07-vgg16 > mine.toml
    """
    from stages.pipeline.recipe import read_recipe

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
@option("--manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A TOML file with name, size and sha256 of other archives, in place of the official ones.")
def fetch_voc07(data_root: Path, archives: tuple[Path, ...], mirrors: tuple[str, ...], manifest: Path | None) -> None:
    """Fetch PASCAL VOC 2007, trainval and test, checked by size and SHA-256; goes on where it was interrupted.

    \b
    altopt fetch-voc07 --archive VOCtrainval_06-Nov-2007.tar --archive VOCtest_06-Nov-2007.tar
    """
    from altopt.datasets.voc07_archive import VOC07, obtain, read_manifest
    from stages.console.progress import download_progress

    if manifest:
        click.echo(f"archives are accepted by {manifest}, not by the official sizes and hashes", err=True)
    wanted = read_manifest(manifest) if manifest else VOC07
    with download_progress(stderr()) as progress:
        folder = obtain(data_root, archives=wanted, archive_files=list(archives), mirrors=list(mirrors),
                        progress=progress)
    click.echo(folder)


@main.command()
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@JSON_OPTION
def beside(as_json: bool, **options: Any) -> None:
    """Print a VOC 2007 run's scores beside the paper's and py-faster-rcnn's, class by class.

    \b
    altopt beside --recipe voc07-vgg16
    """
    from stages.console.reporting import beside_table
    from stages.pipeline.evaluation import beside_published

    run = open_run(options)
    with locked(run):
        rows = beside_published(run)
    print_result(rows, as_json, beside_table)


@main.command()
@option("--schemes", metavar="A,B", help="Some of the schemes. Default: all.")
@option("--variants", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
        help="Compare what a TOML file lists in their place: schemes with settings of their own.")
@option("--seeds", type=click.IntRange(1), default=3, help="How many times each is trained: seeds 1, 2, ...")
@option("--recipe", default="shapes", metavar="NAME|FILE", help="The experiment.")
@option("--run", "run_name", metavar="NAME",
        help="The folder runs/NAME. Default: compare-RECIPE, with variants compare-RECIPE-FILE.")
@option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting in every run.")
@option("--data-root", type=click.Path(path_type=Path), help="Where the data set lies. Default: the recipe's.")
@option("--from", "given", multiple=True, metavar="M0=FILE", help="Take an artifact as given in every run.")
@with_options(WORK_OPTIONS)
@JSON_OPTION
def compare(schemes: str | None, variants: Path | None, seeds: int, recipe: str, run_name: str | None, as_json: bool,
            **options: Any) -> None:
    """Train every way on the same data and print one table: mAP, time by kind of work, disk, and the slides' figures.

    What is up to date is left alone; an interrupted comparison goes on where it stopped.

    \b
    altopt compare
    altopt compare --schemes alternating,approximate-joint --seeds 1
    altopt compare --variants benchmarks/fast_rcnn_ablations.toml
    """
    from altopt.errors import DivergedError, UsageError
    from stages.pipeline import comparison
    from stages.pipeline.variants import read_variants

    if schemes and variants:
        raise UsageError("--schemes and --variants both say what to compare: leave one out")
    chosen = read_variants(variants) if variants else comparison.chosen_variants(schemes)
    name = "-".join(["compare", Path(recipe).stem, *([variants.stem] if variants else [])])
    folder = Path("runs") / (run_name or name)
    results = []
    for each in comparison.outcomes(
            folder, recipe, chosen, range(1, seeds + 1), options["sets"], work_runtime(options),
            data_root=options["data_root"], given=options["given"], working_in=working_in):
        results.append(each)
        comparison.write(folder, results)
    table = comparison.rows(results)
    if as_json:
        print_json(table)
    elif results:
        from stages.console.reporting import comparison_table

        show(comparison_table(comparison.HEADINGS, comparison.printed(table)))
        click.echo(f"The same in {folder}/compare.json, .csv and .md")
    if missing := len(chosen) * seeds - len(results):
        raise DivergedError(f"{missing} of {len(chosen) * seeds} runs diverged and are not in the table: the warnings "
                            "above say where")


@main.command()
@click.argument("network", required=False)
@with_options(RUN_OPTIONS, WORK_OPTIONS[:1])
@option("--images", type=click.IntRange(1), default=8, help="Training images to take the gradients on.")
@JSON_OPTION
def probe(network: str | None, images: int, as_json: bool, **options: Any) -> None:
    """Show how approximate approximate joint training is, on a network with RPN and detector.

    Gradients of its conv layers with and without the path through the proposals' coordinates: angle and size.

    \b
    altopt probe M5 --images 16
    """
    from stages.console.reporting import probe_table
    from stages.pipeline.probing import probe as probe_network

    print_result(probe_network(open_run(options), network, images), as_json, probe_table)


@main.command()
@option("--networks", metavar="A,B", help="Some of the networks. Default: all.")
@option("--sizes", metavar="HxW,...", default="600x800,300x400", help="Height and width of the images.")
@option("--contenders", metavar="A,B", help="Some of the stages and torchvision's parts. Default: all.")
@option("--rounds", type=click.IntRange(1), default=3, help="Steps of each that count, after one that does not.")
@option("--precision", type=click.Choice(["auto", "float32", "bfloat16", "both"]), default="auto",
        help="auto: float32, and bfloat16 where the hardware computes in it. torchvision is measured in both.")
@option("--device", default="all", metavar="A,B", help="cpu, cuda, ...; all is the CPU, and CUDA where there is one.")
@option("--clock", type=click.Choice(["wall", "processor"]), default="wall",
        help="What ratios and schedule are reckoned from; processor time is steadier where others work too (CPU only).")
@option("--compile", "compiled", is_flag=True, help="Joint training with conv layers through torch.compile as well.")
@option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file too.")
@option("--markdown", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="README.md",
        help="Put the tables between the marks <!-- bench --> and <!-- /bench --> of a document.")
@JSON_OPTION
def bench(save: Path | None, markdown: Path | None, as_json: bool, **options: Any) -> None:
    """Time a step of every stage, part by part, beside torchvision's Faster R-CNN, and reckon the paper's schedule.

    On generated images, with random weights, in one process and interleaved. It reports and never judges.

    \b
    altopt bench --networks small --sizes 300x400
    altopt bench --json --save benchmarks/bench.json --markdown README.md
    """
    import shlex

    from cache.files import write_json_atomic
    from stages.bench.measuring import make_plan, measure
    from stages.bench.tables import insert, markdown_of

    plan = make_plan(**options)
    report = reporter()
    result = measure(plan, shlex.join(["altopt", *sys.argv[1:]]), lambda text: report({"event": "note", "text": text}))
    if save:
        write_json_atomic(save, result)
    if markdown:
        insert(markdown, markdown_of(result))
    if as_json:
        print_json(result)
    else:
        click.echo(markdown_of(result))


def run() -> None:
    """Run the command line, with one line and the documented exit code for every expected failure."""
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: list[str]) -> int:
    """Run a command and return its exit code; unexpected exceptions keep their traceback."""
    from altopt.errors import AltoptError
    from altopt.machine.distributed import OtherRankError, join_processes
    from altopt.machine.interruption import Terminated, raise_on_sigterm

    raise_on_sigterm()
    try:
        with join_processes() as ranks:
            if ranks.first:
                try:
                    code = main.main(arguments, prog_name="altopt", standalone_mode=False, obj=ranks)
                except click.Abort:  # what click makes of Ctrl-C, which join_processes has to know by its own name
                    raise KeyboardInterrupt from None
                ranks.announce(None)
                return code if isinstance(code, int) else 0  # what ctx.exit() was given
            from stages.pipeline.run import help_rank_0

            help_rank_0(ranks)
    except OtherRankError as error:
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AltoptError as error:
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
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
