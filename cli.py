"""The command line: parse, one call, print. Heavy imports happen inside the commands that need them."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import click

from stages.console.options import (
    AS_OPTION,
    BOX_FORMATS,
    FROM_OPTION,
    JSON_OPTION,
    RUN_OPTIONS,
    WORK_OPTIONS,
    Command,
    Options,
    find_recipe,
    locked,
    option,
    with_options,
    working_in,
)
from stages.console.output import note_if_nothing, print_result, print_survey, reporter, score_lines, stderr

if TYPE_CHECKING:
    from altopt.evaluation.scoring import Protocol, VocOptions
    from altopt.proposal_formats.reader import BoxFormat
    from stages.pipeline.recipe import Recipe
    from stages.shared.step import Step

EXIT_CODES = """\b
Exit codes: 0 done, 1 a bug, 2 usage or settings, 3 data set invalid, 4 artifact missing, foreign or corrupt,
5 training diverged, 6 disk or memory, 7 download, 75 the run folder is busy, 130 Ctrl-C, 141 closed pipe,
143 SIGTERM."""
PROTOCOLS = ("voc07", "voc10", "coco")


# The commands of help, in groups; and words of the version before, which are still understood.
GROUPS = {
    "train": ("run-all", "stage", "compare"),
    "look": ("plan", "status", "recall", "probe"),
    "use": ("predict", "evaluate", "score", "compare-published", "export"),
    "data": ("check-data", "split", "fetch", "proposals"),
    "keep": ("recipes", "recipe"),
}
RENAMED = {"beside": "compare-published", "frame": "box-format", "pictures": "images"}


class Grouped(click.Group):
    """The commands, in groups."""

    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of each group in its order."""
        width = max(map(len, self.commands))  # so that the groups' columns are one
        for heading, names in GROUPS.items():
            with formatter.section(heading.capitalize()):
                formatter.write_dl([(name.ljust(width), self.commands[name].get_short_help_str(formatter.width))
                                    for name in names if name in self.commands])


class Stages(click.Group):
    """The stages of a run as commands, by number, output or function."""

    arguments: Sequence[str] = ()  # behind "stage" on the command line: they say whose stages there are

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, but for options that say whose stages are to be listed."""
        self.arguments = args
        listing = bool(args) and args[0].startswith("-") and not {"-h", "--help"}.isdisjoint(args)
        return super().parse_args(ctx, ["--help"] if listing else args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the numbers; outputs and function names are accepted too."""
        return [str(number) for number in range(len(find_recipe(self.arguments).steps))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Return a stage of the run that is listed."""
        return self.resolve_command(ctx, [cmd_name, *self.arguments])[1]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        """Return the stage that the first word names in the run that the others speak of."""
        from stages.pipeline.run import find_step

        word, *others = args
        recipe = find_recipe(others)
        return word, stage_command(word, find_step(recipe.steps, word), recipe), others


@click.group(cls=Grouped, epilog=EXIT_CODES, context_settings={
    "help_option_names": ["-h", "--help"], "token_normalize_func": lambda word: RENAMED.get(word, word)})
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
def run_all(options: Options, given: tuple[str, ...], until: str | None, as_json: bool) -> None:
    """Bring the whole run up to date, then score it.

    Stages that are up to date are left alone; an interrupted one goes on where it stopped.

    \b
    altopt run-all
    altopt run-all --recipe voc07-squeezenet-mini --data-root data --from M0=squeezenet.pth
    altopt run-all --from M2 --until P2
    """
    from stages.console.reporting import summary_tables
    from stages.pipeline.evaluation import next_step, summary
    from stages.pipeline.preflight import prepared
    from stages.pipeline.run import find_step

    run = options.open_run()
    with working_in(run):
        target = find_step(run.recipe.steps, until) if until else run.recipe.steps[-1]
        made = run.bring_up_to_date(prepared(run, target, given, scored=not until))
        note_if_nothing(made, run, run.folder)
        if until:
            return
        result = summary(run, run.protocol)
    print_result(result, as_json, summary_tables)
    if words := next_step(run):
        click.echo(words, err=True)


@main.group("stage", cls=Stages)
def stage_group() -> None:
    """Run one stage, by its number, its output (M2) or its function; 0 makes M0. altopt plan lists a run's stages.

    \b
    altopt stage 3                      M2, from M0 and P1 as they are
    altopt stage 3 --from M1            P1 if it is stale, then M2
    altopt stage 3 --from M0=FILE --from P1=FILE    M2 from a network and proposals of your own
    altopt stage M3 --help              its inputs, output and settings, in this run
    altopt stage M1 --scheme spp-net --help
    """


def stage_command(word: str, step: "Step", recipe: "Recipe") -> click.Command:
    """Return the command of the stage that ``word`` names; its help is about the step, as it is in the recipe."""

    class StageCommand(Command):
        def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            from stages.pipeline.recipe import describe_settings

            made = f"Inputs: {', '.join(step.inputs_for(recipe.config(step))) or 'nothing'}\nOutput: {step.output}"
            self.help = f"{step.summary}\n\n\b\n{made}\n\n\b\n{describe_settings(step, recipe)}"
            super().format_help_text(ctx, formatter)

    @click.command(step.output, cls=StageCommand, short_help=f"{step.output}: {step.summary}")
    @with_options(RUN_OPTIONS, WORK_OPTIONS)
    @FROM_OPTION
    @option("--init", metavar="M1", help="Start this stage's weights from another network than the list's.")
    @option("--force", is_flag=True, help="Make the output anew even if it is up to date.")
    def run_stage(options: Options, given: tuple[str, ...], init: str | None, force: bool) -> None:
        from stages.pipeline.preflight import prepared_alone
        from stages.pipeline.run import find_step

        if init:  # last, so that it goes over what --set says
            options = replace(options, sets=(*options.sets, f"{step.table}.init={init.upper()}"))
        run = options.open_run()
        target = find_step(run.recipe.steps, word)
        with working_in(run):
            made = run.bring_up_to_date(prepared_alone(run, target, given, force), force)
            note_if_nothing(made, run, target.output)

    return run_stage


@main.command()
@with_options(RUN_OPTIONS)
@JSON_OPTION
def plan(options: Options, as_json: bool) -> None:
    """Show what run-all would do, stage by stage, and why.

    \b
    altopt plan --set train_rpn.lr=0.01
    """
    print_survey(options.open_run(), as_json, all_steps=False)


@main.command()
@with_options(RUN_OPTIONS)
@JSON_OPTION
def status(options: Options, as_json: bool) -> None:
    """Show what a run folder holds: each artifact, whether it is up to date, what it took.

    \b
    altopt status --run shapes
    """
    print_survey(options.open_run(), as_json, all_steps=True)


@main.command()
@click.argument("network", required=False)
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--protocol", type=click.Choice(PROTOCOLS), help="Default: the recipe's.")
@JSON_OPTION
def evaluate(options: Options, network: str | None, protocol: str | None, as_json: bool) -> None:
    """Detect on the test split and score: the final network, or another that the scheme evaluates, such as M1+M2.

    \b
    altopt evaluate M5 --protocol voc10
    """
    from stages.console.reporting import score_table
    from stages.pipeline.evaluation import detection_step
    from stages.pipeline.evaluation import evaluate as score_network

    run = options.open_run()
    with locked(run):
        result = score_network(run, detection_step(run, network), protocol or run.protocol)
    print_result(result, as_json, score_lines, score_table)


@main.command()
@click.argument("network")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path),
                metavar="IMAGE|FOLDER|LIST...")
@option("--run", "run_name", metavar="NAME", help="The folder runs/NAME that M5 or M1+M2 lie in. Default: shapes.")
@option("--set", "sets", multiple=True, metavar="K=V", help="Change a setting of detection, e.g. detect.nms=0.5.")
@option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("predictions"), metavar="DIR",
        help="Where to write.")
@option("--score", type=click.FloatRange(0, 1), default=0.5, help="Draw and write what has this score or a higher one.")
@option("--csv", "as_csv", is_flag=True, help="Write results.csv too.")
@option("--yolo", "as_yolo", is_flag=True, help="Write labels/NAME.txt too, and classes.txt.")
@option("--json", "as_json", is_flag=True, help="Print the COCO results as JSON.")
@with_options(WORK_OPTIONS[:2])
def predict(options: Options, network: str, inputs: tuple[Path, ...], out: Path, score: float, as_csv: bool,
            as_yolo: bool, as_json: bool) -> None:
    """Detect on images of any origin, draw what is found, and write it as COCO results.

    NETWORK is M5 of a run, or M1+M2 for the RPN of M1 and the detector of M2; a .safetensors file anywhere; or a run's
    folder or name, for its final network. Detection's settings are those of the recipe in the network's folder, else
    the defaults. No data set is needed, and nothing is written beside the network or the images.

    Images are JPEG, PNG, WebP, BMP or TIFF, turned as their EXIF data says; a folder is looked through with those below
    it; a LIST is a text file with a path on each line, from its own folder. DIR gets each image under its path below
    the folder that holds all inputs, so equal names do not collide, and results.json, which names images in the same
    way. A second run writes over what the first has written, which predict.json lists, and over nothing else.

    \b
    altopt predict M5 photo.jpg
    altopt predict M1+M2 photos --run mine --score 0.7 --csv
    altopt predict models/M5.safetensors photos more/list.txt --out found --set detect.nms=0.5
    """
    from altopt.errors import DataError
    from stages.pipeline.prediction import predict as predict_images

    found = predict_images(network, inputs, run=options.run_name, sets=options.sets, out=out, score=score,
                           as_csv=as_csv, as_yolo=as_yolo, runtime=options.runtime())
    print_result(found.results() if as_json else found, as_json, lambda _: found.text())
    if count := len(found.unusable):
        raise DataError(f"{count} of {len(found.unusable) + len(found.found)} images could not be used: the warnings "
                        "above say which, and why")


@main.command()
@click.argument("ground_truth", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("detections", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--protocol", type=click.Choice(PROTOCOLS), required=True, help="11 points, area, or COCO's twelve numbers.")
@option("--iou", default=0.5, help="The overlap that counts as found (VOC).")
@option("--match", type=click.Choice(["gt", "ge"]), default="gt", help="IoU above the threshold, or at least (VOC).")
@option("--plus-one", is_flag=True, help="Box edges are inclusive pixels: width is x2 - x1 + 1 (VOC).")
@option("--devkit-rounding", is_flag=True, help="Round as the devkit's result files do, before scoring (VOC).")
@JSON_OPTION
def score(ground_truth: Path, detections: Path, protocol: "Protocol", match: str, as_json: bool,
          **rules: "Unpack[VocOptions]") -> None:
    """Score detections of any origin: COCO json files in, VOC or COCO rules.

    \b
    altopt score instances.json results.json --protocol voc07
    """
    from altopt.evaluation.scoring import score_files
    from stages.console.reporting import score_table

    rules["strict"] = match == "gt"
    result = score_files(protocol, ground_truth, detections, **rules)
    print_result(result.as_dict(), as_json, score_lines, score_table)


@main.command()
@click.argument("proposals", default="P1")
@with_options(RUN_OPTIONS)
@option("--limit", "limits", type=click.IntRange(1), multiple=True, default=(50, 100, 300, 1000, 2000),
        help="Numbers of proposals.")
@option("--json", "as_json", is_flag=True, help="Print JSON, by area range too.")
def recall(options: Options, proposals: str, limits: tuple[int, ...], as_json: bool) -> None:
    """Show how many objects of the training split the proposals cover, against IoU and their number.

    \b
    altopt recall P2 --limit 300
    """
    from stages.console.reporting import recall_table
    from stages.pipeline.evaluation import recall as recall_of

    print_result(recall_of(options.open_run(), proposals.upper(), limits), as_json, recall_table)


@main.command("check-data", cls=click.Command)
@with_options(RUN_OPTIONS[1:])
@JSON_OPTION
def check_data(recipe: str | None, run_name: str | None, sets: tuple[str, ...], data_root: Path | None,
               as_json: bool) -> None:
    """Look at every image and object of both splits, and list all that is wrong; exit code 3 if anything is.

    Without --recipe or --run the data set is what lies in --data-root: its format and splits are found by looking.

    \b
    altopt check-data --data-root mydata
    altopt check-data --data-root mydata --set data.exif=apply
    altopt check-data --recipe voc07-vgg16 --json
    """
    from altopt.errors import DataError
    from stages.console.checking import check_lines
    from stages.pipeline.checking import check_data as look

    check = look(recipe, run_name, sets, data_root)
    print_result(check.as_dict(), as_json, lambda _: check_lines(check))
    if any(each.severity == "problem" for each in check.findings):
        click.get_current_context().exit(DataError.exit_code)


@main.group()
def proposals() -> None:
    """Bring proposals of your own into a run, take a run's out, or make some by selective search.

    \b
    altopt proposals import voc_2007_trainval.mat --as P0
    altopt proposals export P1 P1.pkl --format detectron2
    altopt proposals selective-search --as T0
    """


@proposals.command("import", cls=Command)
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@AS_OPTION
@with_options(RUN_OPTIONS)
@option("--box-format", type=click.Choice(BOX_FORMATS), help="How the file counts boxes. Default: as its format does.")
@option("--allow-missing", is_flag=True, help="Images without an entry get no proposals.")
@option("--invalid", type=click.Choice(["error", "leave-out"]), default="error", help="What to do with unusable boxes.")
@JSON_OPTION
def import_command(options: Options, file: Path, artifact: str, box_format: "BoxFormat | None", allow_missing: bool,
                   invalid: Literal["error", "leave-out"], as_json: bool) -> None:
    """Take a file's proposals as the run's: checked against the images, recall first, then written.

    Read are altopt's HDF5 (.h5), selective search's .mat (of a split, or a folder with one for each image), pickles
    of py-faster-rcnn, mmdet and detectron2 (.pkl, without executing them), and .json: {"image_ids", "boxes", "scores"}
    or COCO results. Boxes are told apart by --box-format: xyxy and xywh are continuous, inclusive-N names the first and
    the last pixel, counted from N.

    \b
    altopt proposals import voc_2007_trainval.mat --as P0
    altopt proposals import boxes.json --as T0 --box-format inclusive-1 --allow-missing
    """
    from stages.console.reporting import recall_table
    from stages.pipeline.importing import import_proposals

    run = options.open_run()
    run.runtime.report = reporter()
    with working_in(run):
        result = import_proposals(run, file, artifact.upper(), box_format=box_format,
                                  allow_missing=allow_missing, invalid=invalid)
    line = "{file}: {boxes} proposals on {images} images, from {format}, read as {box_format}"
    print_result(result, as_json, lambda result: line.format(**result), recall_table)


@proposals.command("export", cls=Command)
@click.argument("artifact")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@with_options(RUN_OPTIONS)
@option("--format", "form", type=click.Choice(["hdf5", "json", "detectron2", "py-faster-rcnn"]),
        help="Default: by the suffix, .h5 or .json.")
@JSON_OPTION
def export_command(options: Options, artifact: str, file: Path, form: str | None, as_json: bool) -> None:
    """Write a run's proposals for another program.

    py-faster-rcnn's list has neither ids nor scores: it follows the data set's order and counts inclusive pixels.

    \b
    altopt proposals export P2 P2.json
    altopt proposals export P1 P1.pkl --format py-faster-rcnn
    """
    from stages.pipeline.importing import export_proposals

    result = export_proposals(options.open_run(), artifact.upper(), file, form)
    print_result(result, as_json, "{0[file]}: {0[artifact]} as {0[format]}, {0[images]} images".format)


@proposals.command("selective-search", cls=Command)
@AS_OPTION
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@option("--force", is_flag=True, help="Search anew even if the output is up to date.")
def selective_search_command(options: Options, artifact: str, force: bool) -> None:
    """Make proposals by selective search, without a network; a search that was stopped goes on where it was.

    It works in a process for each processor, or in --workers. Settings are those of the table selective_search.

    \b
    altopt proposals selective-search --as P0
    """
    from stages.steps.selective_search import search_step

    run = options.open_run()
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

    print_result(describe_recipes(), as_json,
                 lambda known: "\n".join(f"{name:<24}{text}" for name, text in known.items()))


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
    print_result(resolved.as_dict(), as_json, lambda _: resolved.text().rstrip("\n"))


@main.command("split")
@option("--data-root", type=click.Path(path_type=Path), default=Path("data"), help="Where the data set lies.")
@option("--test", type=float, default=0.2, help="The share of images to test on.")
@option("--val", type=float, default=0.0, help="The share for a list val.")
@option("--seed", type=int, default=0, help="Another one draws other images.")
@option("--out", type=click.Path(file_okay=False, path_type=Path),
        help="A folder for the lists. Default: where the format has them.")
@JSON_OPTION
def split(data_root: Path, test: float, val: float, seed: int, out: Path | None, as_json: bool) -> None:
    """Write lists of the images to train on and to test on, for a data set that has none.

    Of each class the same share goes to each list; images of equal bytes stay together. The same seed draws the same
    images. VOC gets ImageSets/Main/train.txt and test.txt, YOLO train.txt and test.txt (and a data.yaml, if it has
    none), COCO instances_train.json and instances_test.json. No file is written over.

    \b
    altopt split --data-root mydata
    altopt split --data-root mydata --test 0.1 --val 0.1 --seed 1
    """
    from stages.pipeline.splitting import split_data, split_lines

    print_result(split_data(data_root, test=test, val=val, seed=seed, out=out), as_json, split_lines)


FETCH_OPTIONS = [
    option("--data-root", type=click.Path(path_type=Path),
           help="Where to put VOCdevkit. Default: data, for the subset data/voc07-mini."),
    option("--archive", "archives", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
           help="An archive you already have; give each."),
    option("--mirror", "mirrors", multiple=True, metavar="URL", help="A place to try before the known ones."),
    option("--manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path),
           help="A TOML file with name, size and sha256 of other archives, in place of the official ones."),
]


@main.command()
@click.argument("name")
@option("--subset", metavar="mini", help="Of voc07: the 1,600 photographs of voc07-mini, made from the test archive.")
@with_options(FETCH_OPTIONS)
def fetch(name: str, data_root: Path | None, archives: tuple[Path, ...], mirrors: tuple[str, ...],
          manifest: Path | None, subset: str | None = None) -> None:
    """Fetch a data set, checked by size and hash; goes on where it was interrupted.

    voc07 is PASCAL VOC 2007, trainval and test; voc12 is VOC 2012, trainval.

    \b
    altopt fetch voc07
    altopt fetch voc07 --subset mini
    altopt fetch voc07 --archive VOCtrainval_06-Nov-2007.tar --archive VOCtest_06-Nov-2007.tar
    """
    from stages.console.progress import download_progress
    from stages.pipeline.fetching import fetch_data_set

    if manifest:
        click.echo(f"archives are accepted by {manifest}, not by the official sizes and hashes", err=True)
    with download_progress(stderr()) as progress:
        folder = fetch_data_set(name, data_root, subset=subset, manifest=manifest, archive_files=archives,
                                mirrors=mirrors, progress=progress)
    click.echo(folder)


@main.command("fetch-voc07", hidden=True)
@with_options(FETCH_OPTIONS)
@click.pass_context
def fetch_voc07(ctx: click.Context, /, **options: object) -> None:
    """Fetch PASCAL VOC 2007, as altopt fetch voc07 does."""
    ctx.invoke(fetch, name="voc07", **options)


@main.command("export")
@click.argument("what", metavar="M5|D5|data")
@option("--format", "form", type=click.Choice(["torchvision", "onnx", "coco", "voc-comp4"]), required=True,
        help="A network: torchvision, onnx. Detections: coco, voc-comp4. The data set: coco.")
@option("--out", type=click.Path(path_type=Path), help="The file, or the folder of several. Default: named after both.")
@option("--force", is_flag=True, help="Write over what is there.")
@with_options(RUN_OPTIONS)
@JSON_OPTION
def export_what(options: Options, what: str, form: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a network, detections or the data set for other programs.

    torchvision is a folder: weights.pth, a state dict; detector.json, its settings; altopt_detector.py, which makes a
    Faster R-CNN of torchvision's of them and needs nothing else. onnx is one file, from an image's pixels to its
    detections, which ONNX Runtime runs. Beside M5 of the run, a network may be any .safetensors file. data is both
    splits as COCO json.

    \b
    altopt export M5 --format torchvision
    altopt export M5 --format onnx --set detect.score=0.3 --out detector.onnx
    altopt export D5 --format voc-comp4
    altopt export data --format coco
    """
    from stages.pipeline.exporting import export

    result = export(what, form, open_run=options.open_run, sets=options.sets, out=out, force=force)
    print_result(result, as_json, lambda result: "\n".join(result["files"]))


@main.command("compare-published")
@with_options(RUN_OPTIONS, WORK_OPTIONS)
@JSON_OPTION
def compare_published(options: Options, as_json: bool) -> None:
    """Print a VOC 2007 run's scores beside the paper's and py-faster-rcnn's, class by class.

    \b
    altopt compare-published --recipe voc07-vgg16
    """
    from stages.console.reporting import beside_table
    from stages.pipeline.evaluation import beside_published

    run = options.open_run()
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
def compare(options: Options, schemes: str | None, variants: Path | None, seeds: int, given: tuple[str, ...],
            as_json: bool) -> None:
    """Train every way on the same data and print one table: mAP, time by kind of work, disk, and the slides' figures.

    What is up to date is left alone; an interrupted comparison goes on where it stopped.

    \b
    altopt compare
    altopt compare --schemes alternating,approximate-joint --seeds 1
    altopt compare --variants benchmarks/fast_rcnn_ablations.toml
    """
    from altopt.errors import DivergedError, UsageError
    from stages.console.reporting import comparison_table
    from stages.pipeline import comparison
    from stages.pipeline.recipe import check_run_name

    if schemes and variants:
        raise UsageError("--schemes and --variants both say what to compare: leave one out")
    chosen = comparison.read_variants(variants) if variants else comparison.chosen_variants(schemes)
    recipe = options.recipe or "shapes"
    name = "-".join(["compare", Path(recipe).stem, *([variants.stem] if variants else [])])
    folder = Path("runs") / check_run_name(name if options.run_name is None else options.run_name)
    wanted = comparison.Comparison(folder, recipe, chosen, range(1, seeds + 1), options.sets, options.data_root, given)
    results = []
    for each in comparison.outcomes(wanted, options.runtime(), working_in):
        results.append(each)
        comparison.write(folder, results)  # each time: an interrupted comparison leaves a table too
    table = comparison.rows(results)
    if results or as_json:
        print_result(table, as_json, lambda rows: comparison_table(comparison.HEADINGS, comparison.printed(rows)),
                     lambda rows: f"The same in {folder}/compare.json, .csv and .md")
    if missing := len(chosen) * seeds - len(results):
        raise DivergedError(f"{missing} of {len(chosen) * seeds} runs diverged and are not in the table: the warnings "
                            "above say where")


@main.command()
@click.argument("network", required=False)
@with_options(RUN_OPTIONS, WORK_OPTIONS[:1])
@option("--images", type=click.IntRange(1), default=8, help="Training images to take the gradients on.")
@JSON_OPTION
def probe(options: Options, network: str | None, images: int, as_json: bool) -> None:
    """Show how approximate approximate joint training is, on a network with RPN and detector.

    Gradients of its conv layers with and without the path through the proposals' coordinates: angle and size.

    \b
    altopt probe M5 --images 16
    """
    from stages.console.reporting import probe_table
    from stages.pipeline.probing import probe as probe_network

    print_result(probe_network(options.open_run(), network, images), as_json, probe_table)


def run() -> None:
    """Run the command line, with one line and the documented exit code for every expected failure."""
    if sys.stdout is None:  # closed by whoever started this process
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    code = exit_code(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Without Python's own end: a thread of gloo's may let go of the last exchange's tensors only now, and one that
        # asks for the interpreter when that is ending takes the process down with SIGABRT, after all work is done.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(arguments: list[str]) -> int:
    """Run a command and return its exit code; unexpected exceptions keep their traceback."""
    from altopt.errors import AltoptError
    from altopt.machine.distributed import OtherRankError
    from altopt.machine.interruption import Terminated, raise_on_sigterm
    from altopt.machine.joining import join_processes

    raise_on_sigterm()
    try:
        with join_processes() as ranks:
            if ranks.first:
                try:
                    # Else click would end the process by itself, with codes of its own.
                    code = main.main(arguments, prog_name="altopt", standalone_mode=False, obj=ranks)
                except click.Abort:  # what click makes of Ctrl-C, which join_processes has to know by its own name
                    raise KeyboardInterrupt from None
                ranks.announce(None)
                return code if isinstance(code, int) else 0  # what ctx.exit() was given
            from stages.pipeline.run import help_rank_0

            help_rank_0(ranks)
    except OtherRankError as error:  # that process has said why
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
    except OSError as error:
        from cache.files import NO_ROOM, file_error

        if isinstance(error.filename, str | os.PathLike) and not isinstance(error, FileNotFoundError):
            failure = file_error(Path(error.filename), error, "used")
            return complain(str(failure), failure.exit_code)
        if error.errno not in NO_ROOM and error.errno != errno.EIO:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries once more to write, when it ends
        return complain(f"the output cannot be written: {error.strerror}: make room, or send it elsewhere", 6)
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
