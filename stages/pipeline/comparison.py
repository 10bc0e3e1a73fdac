"""All schemes on the same data: what each scores, what it costs, and the slides' own figures beside it."""
# A comparison is a folder of runs, one for each scheme, or variant of one, and seed. What one of them made from the
# same inputs with the same settings, another takes over: M0, proposals of other origin, caches. Asked again, it makes
# only what is missing.

import csv
import io
import re
import statistics
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from altopt.errors import DivergedError, UsageError
from cache.files import write_json_atomic, write_text_atomic
from stages import DETECTIONS, SCHEMES
from stages.pipeline.evaluation import detection_steps, evaluate
from stages.pipeline.plan import duration
from stages.pipeline.preflight import prepare_all
from stages.pipeline.recipe import check_scheme, nearest, read_recipe
from stages.pipeline.run import Run, with_recipe
from stages.shared.events import Caution, Note
from stages.shared.step import Kind, Runtime


@dataclass(frozen=True)
class Slides:
    """What the slides report for VOC07 with VGG16."""

    map: float | None = None  # per cent
    fine_tuning: float | None = None  # hours on a K40, as the next three are
    features: float | None = None
    classifiers: float | None = None
    hours: float | None = None
    test_seconds: float | None = None  # for an image, without proposals


# Girshick, "Training R-CNNs of various velocities".
SLIDES = {
    "rcnn": Slides(66.0, 18, 63, 3, 84, 47),
    "spp-net": Slides(63.1, 16, 5.5, 4, 25.5, 2.3),
    "fast-rcnn": Slides(68.1, hours=8.75, test_seconds=0.32),
    "alternating": Slides(69.9, hours=26.2),
    "approximate-joint": Slides(70.0, hours=17.2),
    "exact-joint": Slides(),
}

# What the making of an artifact counts as; M0 is counted apart.
COSTS = {Kind.NETWORK: "fine_tuning", Kind.PROPOSALS: "proposals", Kind.FEATURES: "features",
         Kind.SVMS: "classifiers", Kind.REGRESSORS: "classifiers"}


@dataclass(frozen=True)
class Outcome:
    """One variant with one seed; times in seconds."""

    name: str
    scheme: str
    seed: int
    map: float | None  # None where the test split has no objects
    training: float  # as the slides count: made from a network, so neither M0 nor proposals of other origin
    pretraining: float
    proposals: float
    fine_tuning: float
    features: float
    classifiers: float  # SVMs and box regressors
    test_seconds: float  # for an image
    bytes: int  # that the scheme keeps on disk, detections and the test split's proposals not counted
    iterations: int


VARIANT_KEYS = ("scheme", "set")
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Row = dict[str, Any]  # of the table: a variant's name and figures, and the slides'
AVERAGED = ("map", "training", "fine_tuning", "features", "classifiers", "proposals", "pretraining", "test_seconds",
            "bytes", "iterations")


@dataclass(frozen=True)
class Variant:
    """A scheme, and the settings in which it differs from the recipe; ``name`` is the scheme's where none does."""
    # In a file:
    # [from-fc6]                                            the name: of the table's row, and of the run folders
    # scheme = "fast-rcnn"
    # set = ['train_fast_rcnn.freeze=["conv*"]']            each as --set takes it; none is needed

    name: str
    scheme: str
    sets: tuple[str, ...] = ()


def chosen_variants(text: str | None) -> list[Variant]:
    """Return the schemes of ``rcnn,fast-rcnn``, each once; the six of the slides for None. Raises ``UsageError``."""
    names = list(SLIDES) if text is None else [name.strip() for name in text.split(",")]
    return [Variant(name, check_scheme(name)) for name in dict.fromkeys(names)]


def read_variants(path: Path) -> list[Variant]:
    """Return the variants of a file, in its order. Raises ``UsageError``."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    if not content:
        raise UsageError(f"{path} names nothing to compare: give it tables such as [mine] with scheme = \"fast-rcnn\"")
    return [_variant(f"{path}: [{name}]", name, table) for name, table in content.items()]


def _variant(where: str, name: str, table: object) -> Variant:
    if not isinstance(table, dict):
        raise UsageError(f"{where} stands outside of a table: a file of variants has only tables")
    if not VARIANT_NAME.fullmatch(name):
        raise UsageError(f"{where} must be the name of a folder: use letters, digits, '-', '_' and '.'")
    for key in table:
        if key not in VARIANT_KEYS:
            raise UsageError(f"{where} has no field {key!r}{nearest(key, VARIANT_KEYS)}; its fields are "
                             f"{', '.join(VARIANT_KEYS)}")
    scheme, sets = table.get("scheme"), table.get("set", [])
    if not isinstance(scheme, str):
        raise UsageError(f'{where} does not say of which scheme it is one: add scheme = "fast-rcnn" or the like')
    if not isinstance(sets, list) or not all(isinstance(each, str) for each in sets):
        raise UsageError(f"{where}: set must be a list of texts, such as ['train_fast_rcnn.lr=0.01']")
    return Variant(name, check_scheme(scheme), tuple(sets))


def given_artifacts(words: Sequence[str], schemes: Sequence[str]) -> dict[str, Path]:
    """Return {artifact: file} of ``M0=FILE`` and the like. Raises ``UsageError``."""
    # Only what is made from nothing is the same thing in every scheme: M0, and proposals of other origin.
    steps = [step for name in schemes for step in [*SCHEMES[name], *DETECTIONS[name]]]
    known = ["M0", *dict.fromkeys(step.output for step in steps if not step.inputs)]
    given = {}
    for word in words:
        name, equals, file = word.partition("=")
        if name not in known:
            raise UsageError(f"--from {word}: there is no {name!r} to take{nearest(name, known)}: choose one of "
                             f"{', '.join(known)}")
        if not equals or not file:
            raise UsageError(f"--from {word}: name the file to take, --from {name}=FILE")
        given[name] = Path(file)
    return given


@dataclass(frozen=True)
class Comparison:
    """What is compared: a recipe in every variant with every seed, in a folder of runs."""

    folder: Path
    recipe: str
    variants: Sequence[Variant]
    seeds: Sequence[int]
    sets: Sequence[str] = ()
    data_root: Path | None = None
    given: Sequence[str] = ()  # M0=FILE: artifacts to take as they are in every run that has them

    def open_run(self, variant: Variant, seed: int, runtime: Runtime) -> Run:
        """Return the run of a variant with a seed."""
        sets = [*self.sets, *variant.sets, f"all.seed={seed}"]
        return with_recipe(self.folder / f"{variant.name}-{seed}", read_recipe(self.recipe, sets, variant.scheme),
                           self.data_root, runtime)


def outcomes(wanted: Comparison, runtime: Runtime,
             working_in: Callable[[Run], AbstractContextManager[None]]) -> Iterator[Outcome]:
    """Bring every run of a comparison up to date and yield its outcome; all variants with one seed, then the next."""
    # A run that diverges is reported and yields nothing; the others go on.
    files = given_artifacts(wanted.given, [variant.scheme for variant in wanted.variants])
    planned = [(variant, seed, wanted.open_run(variant, seed, runtime))
               for seed in wanted.seeds for variant in wanted.variants]
    prepare_all([run for *_, run in planned], files)
    runs: list[Run] = []
    for variant, seed, run in planned:
        runtime.report(Note(f"{variant.name}, seed {seed}: {run.folder}"))
        with working_in(run):
            names = {step.output for step in [*run.recipe.steps, *run.recipe.detections]}
            for name in files.keys() & names:
                run.import_artifact(name, files[name], f"--from {name}={files[name]}")
            try:
                found = [outcome(run, variant, seed, runs)]
            except DivergedError as error:
                runtime.report(Caution(f"{variant.name}, seed {seed} diverged: {error}"))
                found = []
        yield from found
        runs.append(run)


def outcome(run: Run, variant: Variant, seed: int, others: Sequence[Run] = ()) -> Outcome:
    """Bring one run up to date, taking over from ``others`` what they made alike, and return what came of it."""
    detection = detection_steps(run)[-1]
    steps = [*run.recipe.steps, *run.recipe.detections]
    for step in steps[: steps.index(detection)]:
        if step.kind is Kind.DETECTIONS or run.verdict(step).valid:  # ``evaluate`` makes detections itself
            continue
        if not any(run.reuse(step, other) for other in others):
            run.bring_up_to_date([step])
    score = evaluate(run, detection, run.protocol)
    seconds = dict.fromkeys(["training", "pretraining", *COSTS.values()], 0.0)
    size = iterations = 0
    for step in run.recipe.steps:
        record = run.record(step.output)
        assert record is not None
        seconds["pretraining" if step is run.recipe.steps[0] else COSTS[step.kind]] += record.seconds
        size += record.size
        if step.inputs:
            seconds["training"] += record.seconds
            done = record.metrics.get("iterations", 0)
            iterations += done if isinstance(done, int) else 0
    return Outcome(variant.name, variant.scheme, seed, score["map"], test_seconds=score["seconds_per_image"],
                   bytes=size, iterations=iterations, **seconds)


def rows(results: Sequence[Outcome]) -> list[Row]:
    """Return a row for each variant: means over its seeds, the deviation of its mAP, and the slides' figures."""
    table = []
    for name in dict.fromkeys(each.name for each in results):
        mine = [each for each in results if each.name == name]
        values = {field: [value for each in mine if (value := getattr(each, field)) is not None] for field in AVERAGED}
        means = {field: statistics.fmean(found) if found else None for field, found in values.items()}
        spread = statistics.stdev(values["map"]) if len(values["map"]) > 1 else None
        table.append({"name": name, "scheme": mine[0].scheme, "seeds": len(mine), "map": means.pop("map"),
                      "map_sd": spread, **means, "slides": asdict(SLIDES.get(name, Slides()))})
    return table


def write(folder: Path, results: Sequence[Outcome]) -> None:
    """Write compare.json, compare.csv and compare.md into the folder."""
    table = rows(results)
    write_json_atomic(folder / "compare.json", {"rows": table, "runs": [asdict(each) for each in results]})
    flat = [row | {f"slides_{name}": value for name, value in row["slides"].items()} for row in table]
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in flat[0] if name != "slides"], extrasaction="ignore",
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text_atomic(folder / "compare.csv", text.getvalue())
    lines = [HEADINGS, ["---"] * len(HEADINGS), *printed(table)]
    write_text_atomic(folder / "compare.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


HEADINGS = ["scheme", "seeds", "mAP", "training", "fine-tuning", "features", "SVMs, boxes", "proposals", "s/image",
            "disk", "iterations"]


def printed(table: Sequence[Row]) -> list[list[str]]:
    """Return the cells under ``HEADINGS`` of the rows of ``rows``, each followed by the slides' where there are any."""
    lines = []
    for row in table:
        score = "-" if row["map"] is None else f"{row['map']:.3f}"
        spread = "" if row["map_sd"] is None else f" ± {row['map_sd']:.3f}"
        times = [duration(row[name]) if row[name] else "-"
                 for name in ("training", "fine_tuning", "features", "classifiers", "proposals")]
        lines.append([row["name"], str(row["seeds"]), score + spread, *times, f"{row['test_seconds']:.3f}",
                      f"{row['bytes'] / 2**20:.0f} MiB", f"{row['iterations']:.0f}"])
        slides: dict[str, float | None] = row["slides"]
        if slides["map"] is not None:
            # The slides' figures are per cent and hours: the one becomes a share, the others stay.
            hours = ["-" if (value := slides[name]) is None else f"{value:g} h"
                     for name in ("hours", "fine_tuning", "features", "classifiers")]
            seconds = "-" if slides["test_seconds"] is None else f"{slides['test_seconds']:g}"
            lines.append(["- slides", "", f"{slides['map'] / 100:.3f}", *hours, "-", seconds, "-", "-"])
    return lines
