"""All schemes on the same data: what each scores, what it costs, and the slides' own figures beside it.

A comparison is a folder of runs, one for each scheme and seed. What one of them made from the same inputs with the same
settings, another takes over: M0, proposals of other origin, caches. Asked again, it makes only what is missing.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.files import write_json_atomic, write_text_atomic
from stages.evaluation import detection_steps, evaluate
from stages.recipe import read_recipe
from stages.run import Run
from stages.step import Runtime


@dataclass(frozen=True)
class Slides:
    """What the slides report for VOC07 with VGG16: mAP in per cent, hours on a K40, seconds for a test picture."""

    map: float | None = None
    fine_tuning: float | None = None
    features: float | None = None
    classifiers: float | None = None
    hours: float | None = None
    test_seconds: float | None = None


# Girshick, "Training R-CNNs of various velocities"; test times are without proposals.
SLIDES = {
    "rcnn": Slides(66.0, 18, 63, 3, 84, 47),
    "spp-net": Slides(63.1, 16, 5.5, 4, 25.5, 2.3),
    "fast-rcnn": Slides(68.1, hours=8.75, test_seconds=0.32),
    "alternating": Slides(69.9, hours=26.2),
    "approximate-joint": Slides(70.0, hours=17.2),
    "exact-joint": Slides(),
}

# What an artifact's making counts as, by its first letter; M0 is counted apart.
COSTS = {"M": "fine_tuning", "P": "proposals", "F": "features", "S": "classifiers", "R": "classifiers"}


@dataclass(frozen=True)
class Outcome:
    """One scheme with one seed: mAP, seconds by kind of work, seconds for a test picture, bytes, iterations.

    ``classifiers`` are SVMs and box regressors. ``bytes`` is what the scheme keeps on disk, detections not counted.
    """

    scheme: str
    seed: int
    map: float
    pretraining: float
    proposals: float
    fine_tuning: float
    features: float
    classifiers: float
    test_seconds: float
    bytes: int
    iterations: int

    @property
    def training(self) -> float:
        """Seconds of training as the slides count it: without M0 and without proposals of other origin."""
        own = 0.0 if self.scheme in GIVEN_PROPOSALS else self.proposals
        return own + self.fine_tuning + self.features + self.classifiers


GIVEN_PROPOSALS = ("rcnn", "spp-net", "fast-rcnn")


def outcomes(folder: Path, recipe: str, schemes: Sequence[str], seeds: Sequence[int], sets: Sequence[str],
             runtime: Runtime, *, data_root: Path | None = None, given: Sequence[str] = (),
             working_in: Callable[[Run], Any]) -> Iterator[Outcome]:
    """Bring every run of a comparison up to date and yield its outcome; all schemes with one seed, then the next.

    ``given`` holds artifacts to take as they are in every run that has them, ``M0=FILE``.
    """
    runs: list[Run] = []
    for seed in seeds:
        for scheme in schemes:
            chosen = read_recipe(recipe, [*sets, f"all.seed={seed}"], scheme)
            if data_root is not None:
                chosen.header["data_root"] = str(data_root)
            runtime.data_root = Path(chosen.header.get("data_root", "data"))
            run = Run(folder / f"{scheme}-{seed}", chosen, runtime)
            runtime.report({"event": "note", "text": f"{scheme}, seed {seed}: {run.folder}"})
            with working_in(run):
                _adopt(run, given)
                yield outcome(run, scheme, seed, runs)
            runs.append(run)


def outcome(run: Run, scheme: str, seed: int, others: Sequence[Run] = ()) -> Outcome:
    """Bring one run up to date, taking over from ``others`` what they made alike, and return what came of it."""
    detection = detection_steps(run)[-1]
    steps = [*run.recipe.steps, *run.recipe.detections]
    for step in steps[: steps.index(detection)]:
        if step.output.startswith("D") or run.verdict(step).valid:
            continue
        if not any(run.take_over(step, other) for other in others):
            run.bring_up_to_date([step])
    score = evaluate(run, detection, run.protocol)
    seconds = dict.fromkeys(["pretraining", *COSTS.values()], 0.0)
    kept = iterations = 0
    for step in run.recipe.steps:
        record = run.record(step.output)
        assert record is not None
        kept += record.size
        if step is run.recipe.pretrained:
            seconds["pretraining"] += record.seconds
        else:
            seconds[COSTS[step.output[0]]] += record.seconds
            iterations += record.metrics.get("iterations", 0)
    return Outcome(scheme, seed, score["map"], test_seconds=score["seconds_per_picture"], bytes=kept,
                   iterations=iterations, **seconds)


def _adopt(run: Run, given: Sequence[str]) -> None:
    names = {step.output for step in [*run.recipe.steps, *run.recipe.detections]}
    for each in given:
        name, _, file = each.partition("=")
        if name in names and not run.path(name).is_file():
            run.adopt(name, Path(file), f"--from {each}")


def rows(results: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each scheme: means over its seeds, the deviation of its mAP, and the slides' figures."""
    table = []
    for scheme in dict.fromkeys(each.scheme for each in results):
        mine = [each for each in results if each.scheme == scheme]

        def mean(name: str, mine: list[Outcome] = mine) -> float:
            return statistics.fmean(getattr(each, name) for each in mine)

        scores = [each.map for each in mine]
        table.append({
            "scheme": scheme, "seeds": len(mine), "map": statistics.fmean(scores),
            "map_sd": statistics.stdev(scores) if len(scores) > 1 else None,
            **{name: mean(name) for name in ("training", "fine_tuning", "features", "classifiers", "proposals",
                                             "pretraining", "test_seconds", "bytes", "iterations")},
            "slides": asdict(SLIDES.get(scheme, Slides())),
        })
    return table


def write(folder: Path, results: Sequence[Outcome]) -> None:
    """Write compare.json, compare.csv and compare.md into the folder."""
    table = rows(results)
    write_json_atomic(folder / "compare.json", {"rows": table, "runs": [asdict(each) for each in results]})
    flat = [{**row, **{f"slides_{name}": value for name, value in row["slides"].items()}} for row in table]
    names = [name for name in flat[0] if name != "slides"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text_atomic(folder / "compare.csv", text.getvalue())
    cells = [HEADINGS, ["---"] * len(HEADINGS), *map(printed, table)]
    write_text_atomic(folder / "compare.md", "".join(f"| {' | '.join(row)} |\n" for row in cells))


HEADINGS = ["scheme", "mAP", "training", "fine-tuning", "features", "SVMs, regressors", "proposals", "s/picture",
            "disk", "iterations", "slides: mAP", "slides: training", "slides: s/picture"]


def printed(row: dict[str, Any]) -> list[str]:
    """Return a row of ``rows`` as the cells under ``HEADINGS``."""
    from stages.plan import duration

    slides = row["slides"]
    spread = "" if row["map_sd"] is None else f" ± {row['map_sd']:.3f}"
    split = [slides[name] for name in ("fine_tuning", "features", "classifiers")]
    parts = f" ({' + '.join(f'{part:g}' for part in split)})" if None not in split else ""

    def or_dash(value: float | None, unit: str = "") -> str:
        return "-" if value is None else f"{value:g}{unit}"

    return [
        row["scheme"], f"{row['map']:.3f}{spread}", duration(row["training"]), duration(row["fine_tuning"]),
        duration(row["features"]) if row["features"] else "-",
        duration(row["classifiers"]) if row["classifiers"] else "-",
        duration(row["proposals"]) if row["proposals"] else "-", f"{row['test_seconds']:.3f}",
        f"{row['bytes'] / 2**20:.0f} MiB", f"{row['iterations']:.0f}",
        or_dash(slides["map"]), or_dash(slides["hours"], " h") + parts, or_dash(slides["test_seconds"]),
    ]
