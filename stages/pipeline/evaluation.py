"""Scores of a run: mAP of what its scheme evaluates, recall of the cached proposals."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, UsageError
from altopt.evaluation.detections import read_detections
from altopt.evaluation.measures import ScoreDict
from altopt.evaluation.recall import LIMITS, RecallDict, proposal_recall
from altopt.evaluation.scoring import Protocol, score
from cache.files import write_text_atomic
from cache.proposals import ProposalFile
from cache.records import renamed
from stages.pipeline.run import Run
from stages.shared.step import Facts, Kind, Step

# By call, because a name has a dot: what the record of detections says of them.
DetectionFacts = TypedDict("DetectionFacts", {
    "seconds_per_image": float, "recall_at_0.5": float | None, "average_recall": float | None})


class Evaluation(ScoreDict, DetectionFacts):
    """The score of a run's detections."""

    name: str
    images: int


class ProposalRecall(RecallDict):
    """The recall of a proposal file."""

    proposals: str
    split: str


class StageTime(TypedDict):
    """What made an output, in how many seconds, and where it came from if it was given."""

    stage: str
    seconds: float
    given: str | None


class Summary(TypedDict):
    """What a whole run comes to; recalls and times by output."""

    recipe: str
    folder: str
    scores: list[Evaluation]
    recall: dict[str, ProposalRecall]
    stages: dict[str, StageTime]


def detection_steps(run: Run) -> list[Step]:
    """Return the steps of a run that end in detections."""
    return [step for step in run.recipe.detections if step.kind is Kind.DETECTIONS]


def networks(step: Step) -> str:
    """Return what a detection step detects with: ``M1+M2``."""
    return "+".join(name for name in step.inputs if Kind.of(name) is Kind.NETWORK)


def next_step(run: Run) -> str:
    """Return what can be done with the network of a run on images from files; nothing where it cannot detect alone."""
    last = run.recipe.detections[-1]
    name, folder = networks(last), run.folder.as_posix().removeprefix("runs/")
    if run.recipe.data.format == "shapes" or "+" in name or len(last.inputs) > 1:
        return ""
    return (f"Go on with: altopt predict {name} IMAGES --run {folder}, or altopt export {name} --run {folder} "
            "--format onnx")


def name_of(run: Run, step: Step) -> str:
    """Return what a score is called: the networks, and what sets them apart from the others of the run."""
    return f"{networks(step)} ({step.label or run.recipe.scheme})"


def detection_step(run: Run, word: str | None) -> Step:
    """Return the detection step for ``M5`` or ``M1+M2``; the run's last one for None."""
    steps = detection_steps(run)
    for step in steps:
        if word is not None and word.upper().replace(" ", "") in (networks(step), step.output):
            return step
    if word is None:
        return steps[-1]
    raise UsageError(f"there is nothing to evaluate under {word!r}: choose "
                     f"{' or '.join(name_of(run, step) for step in reversed(steps))}")


def evaluate(run: Run, step: Step, protocol: str) -> Evaluation:
    """Return the score of a network on the test split, detecting first if its detections are not up to date."""
    # Kept in metrics.json under the detections' hash, so that asking again costs nothing.
    for name in step.inputs:
        if name not in {each.output for each in run.recipe.detections} and not run.path(name).is_file():
            raise ArtifactError(f"{name} is not in {run.folder}: make it with altopt stage {name}, or run-all")
    steps = run.recipe.detections
    run.bring_up_to_date(steps[: steps.index(step) + 1])
    record = run.record(step.output)
    assert record is not None
    key = {"detections": record.sha256, "data": record.data, "protocol": protocol}
    result = _cached(run, f"{step.output} {protocol}", key, lambda: _score(run, step, protocol, record.metrics))
    return cast(Evaluation, result)


def _score(run: Run, step: Step, protocol: str, metrics: Facts) -> dict[str, object]:
    dataset = open_dataset(run.recipe.data, "test", run.runtime.data_root)
    found = read_detections(run.path(step.output), dataset.ids, dataset.category_ids)
    result = score(cast(Protocol, protocol), {id: dataset.objects(id) for id in dataset.ids}, found, dataset.classes)
    return {"name": name_of(run, step), "images": len(dataset.ids), **result.as_dict(), **metrics}


def beside_published(run: Run) -> list[dict[str, str | float | None]]:
    """Return rows of AP in per cent: each of this run's detections beside the paper's and py-faster-rcnn's."""
    from altopt.evaluation.published import VOC07_VGG16, beside

    columns = {}
    for step in detection_steps(run):
        result = evaluate(run, step, "voc07")
        columns[name_of(run, step)] = beside({name: each["ap"] for name, each in result["classes"].items()})
    return [
        {"class": rows[0].name, **dict(zip(columns, (row.measured for row in rows), strict=True)),
         **{each.name: value for each, value in zip(VOC07_VGG16, rows[0].published, strict=True)}}
        for rows in zip(*columns.values(), strict=True)
    ]


def proposal_steps(run: Run) -> dict[str, Step]:
    """Return {artifact: step} of the proposals that a run makes on the training split."""
    return {step.output: step for step in run.recipe.steps if step.kind is Kind.PROPOSALS}


def recall(run: Run, artifact: str, limits: Sequence[int] = LIMITS, keep: bool = False) -> ProposalRecall:
    """Return the recall of a proposal file on the training split, for each number of proposals."""
    # ``keep`` writes it into metrics.json, which only the holder of the run folder may.
    steps = proposal_steps(run)
    if artifact not in steps:
        remedy = f"choose {' or '.join(steps)}" if steps else f"the scheme {run.recipe.scheme} keeps none on disk"
        raise UsageError(f"there are no proposals {artifact!r}: {remedy}")
    step, path = steps[artifact], run.path(artifact)
    if not path.is_file():
        raise ArtifactError(f"{path.name} is not in {run.folder}: make it with altopt stage {artifact}")
    if not keep:
        return _recall(run, path, limits)
    key = {"proposals": run.memo.sha256(path), "data": run.data_digest(step), "limits": list(limits)}
    return cast(ProposalRecall, _cached(run, f"{artifact} recall", key, lambda: _recall(run, path, limits)))


def _recall(run: Run, path: Path, limits: Sequence[int]) -> ProposalRecall:
    dataset = open_dataset(run.recipe.data, "train", run.runtime.data_root)
    with ProposalFile(path) as file:
        pairs = ((objects.usable().boxes, file.get(id)[0]) for id in dataset.ids for objects in (dataset.objects(id),))
        result = proposal_recall(pairs, tuple(limits))
    return {"proposals": path.name, "split": dataset.name, **result.as_dict()}


def _cached(run: Run, name: str, key: Facts, compute: Callable[[], object]) -> object:
    """Return what metrics.json has under a name, computed if it is not there for this key."""
    path = run.folder / "metrics.json"
    kept: dict[str, dict[str, object]] = {}
    # Scoring COCO takes minutes: a score is kept with the hashes of what it is a score of.
    with suppress(OSError, ValueError, AttributeError, TypeError):  # damage only costs computing again
        read = renamed(json.loads(path.read_text(encoding="utf-8")))
        kept = {each: entry for each, entry in read.items() if "key" in entry}
    if name not in kept or kept[name]["key"] != key:
        kept[name] = {"key": key, "result": json.loads(json.dumps(compute()))}
        write_text_atomic(path, json.dumps(kept, indent=1))  # in its own order: of classes, of numbers of proposals
    return kept[name]["result"]


def summary(run: Run, protocol: str) -> Summary:
    """Return what ``run-all`` ends with: scores of what can be evaluated, recalls, and the time of each stage."""
    made = {step.output for step in run.recipe.detections}  # along with what is evaluated
    scores = [evaluate(run, step, protocol) for step in detection_steps(run)
              if all(name in made or run.path(name).is_file() for name in step.inputs)]
    recalls = {name: recall(run, name, keep=True) for name in proposal_steps(run) if run.path(name).is_file()}
    times: dict[str, StageTime] = {}
    for step in run.recipe.steps:
        if record := run.record(step.output):
            times[step.output] = {"stage": step.name, "seconds": record.seconds, "given": record.given}
    return {"recipe": run.recipe.name, "folder": str(run.folder), "scores": scores, "recall": recalls, "stages": times}
