"""Before anything is downloaded or trained: what a run will need, looked at while somebody is there to put it right."""
# What cannot go well ends the command; what may go wrong, or belongs to stages that were not asked for, is a caution.

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from altopt.config import ProposalSettings
from altopt.datasets.checking import Look
from altopt.datasets.opening import open_dataset
from altopt.errors import AltoptError, ArtifactError, ResourceError
from altopt.extents import maps_bytes
from altopt.machine.memory import memory_left
from cache.preallocated import growing_path
from cache.proposals import ProposalFile
from stages.pipeline.run import Run, alone, given_places, import_given
from stages.shared.events import Caution
from stages.shared.feature_plan import counted, freezes_all, gigabytes
from stages.shared.stage_config import CachesRegions, Split, StageConfig, Trains, TrainsOnData
from stages.shared.step import Kind, Step
from stages.steps.pretrained import LoadImageNetWeights, read_weights
from stages.steps.selective_search import SelectiveSearch
from stages.steps.spp_net import CacheConvFeatures

PROPOSAL_BYTES = 20  # four coordinates and a score
REGION_BYTES = 20  # four coordinates and a label


def prepared(run: Run, target: Step, given: Sequence[str], *, scored: bool) -> list[Step]:
    """Look ahead, import what is ``given``, and return the steps up to the target, which are to be brought up to date.

    With ``scored`` the run goes on to the scores, and needs the test split as well. Raises an ``AltoptError`` for what
    cannot go well, before anything is imported or made.
    """
    steps = run.recipe.steps
    if not given:
        wanted = steps[: steps.index(target) + 1]
        _look(run, wanted, scored)
        return wanted
    places = given_places(steps, given, target)
    _check_files(run, {steps[place].output: Path(file) for place, word in places.items()
                       if (file := word.partition("=")[2])})
    first = max(places)
    needed = {name for step in steps[first + 1 :] for name in step.inputs_for(run.recipe.config(step))}
    missing = [steps[0]] if 0 not in places and steps[0].output in needed and not run.path("M0").is_file() else []
    looked_at = _look(run, [*missing, *steps[first + 1 : steps.index(target) + 1]], scored)
    wanted = import_given(run, steps, given, target)
    _look(run, wanted, scored, looked_at)  # what was given may be another than what was there
    return wanted


def prepared_alone(run: Run, target: Step, given: Sequence[str], force: bool) -> list[Step]:
    """Do the same for one stage: without ``given``, its inputs must be valid as they are; nothing if it is done."""
    if given:
        return prepared(run, target, given, scored=False)
    wanted = alone(run, target, force)
    if wanted:
        look_ahead([(run, wanted)])
    return wanted


def prepare_all(runs: Sequence[Run], files: Mapping[str, Path]) -> None:
    """Look ahead at all runs of a comparison, in each of which ``files`` are given for the artifacts that it has."""
    plans = []
    for run in runs:
        steps = [*run.recipe.steps, *run.recipe.detections]
        _check_files(run, {step.output: files[step.output] for step in steps if step.output in files})
        # Of several detections a comparison makes the last.
        wanted = [step for step in steps if step is steps[-1] or step.kind is not Kind.DETECTIONS]
        plans.append((run, [each.step for each in run.survey(wanted, demand=False)
                            if not each.valid and each.step.output not in files]))
    look_ahead(plans)


def _look(run: Run, wanted: Sequence[Step], scored: bool, known: Sequence[Step] = ()) -> list[Step]:
    """Look ahead at what of the steps is not up to date, those ``known`` left aside; return it."""
    pending = [each.step for each in run.survey(wanted) if not each.valid]
    for step in run.recipe.detections if scored else ():
        if not run.verdict(step, [each.output for each in pending]).valid:
            pending.append(step)
    if pending and pending != list(known):
        look_ahead([(run, pending)])
    return pending


def look_ahead(plans: Sequence[tuple[Run, Sequence[Step]]]) -> None:
    """Look at all that runs need for their pending steps; raise the first error, report cautions.

    Device and packages come first, then the data, then what is estimated from it.
    """
    plans = [(run, steps) for run, steps in plans if steps]
    if not plans:
        return
    runtime = plans[0][0].runtime
    from stages.shared.training import device_of  # torch

    device = device_of(runtime)
    for run, steps in plans:
        for step in steps:
            run.recipe.config(step).require_packages()
    for split in ("train", "test"):  # first whether they are there, which takes no time
        for run, steps in plans:
            if split in _splits(steps):
                _open(run, split)
    for number, (run, steps) in enumerate(plans):
        for other, _ in plans[:number]:
            run.share_checks(other)
        for split in _splits(steps):
            run.check_split(split)
    for run, steps in plans:
        _look_at_the_rest(run, steps)
    said: list[str] = []
    for run, steps in plans:
        said += _schedule(run, steps)
    said += _disk(plans)
    said += _memory(plans, str(device))
    for text in dict.fromkeys(said):
        runtime.report(Caution(text))


def _open(run: Run, split: Split) -> None:
    """Raise an ``AltoptError`` unless a split is there; its images are not looked at."""
    open_dataset(run.recipe.data, split, run.runtime.data_root).ids  # noqa: B018


def _splits(steps: Sequence[Step]) -> list[Split]:
    return [split for split in ("train", "test") if any(step.config_class.split == split for step in steps)]


def _check_files(run: Run, files: Mapping[str, Path]) -> None:
    """Raise ``ArtifactError`` unless each file can be the artifact that it is given for."""
    for artifact, file in files.items():
        kind, network = Kind.of(artifact), run.recipe.network
        if not file.is_file():
            raise ArtifactError(f"{file}, given for {artifact}, is not a file: check the path")
        if kind is Kind.NETWORK:
            read_weights(file, network)
        else:
            kind.check(file, network.name)


def _look_at_the_rest(run: Run, steps: Sequence[Step]) -> None:
    """Report what stands in the way of the recipe's other steps, which this command does not run."""
    others = [step for step in [*run.recipe.steps, *run.recipe.detections]
              if step not in steps and not run.path(step.output).is_file()]
    checks: list[Callable[[], object]] = [run.recipe.config(step).require_packages for step in others]
    for split in _splits(others):
        if split not in _splits(steps):
            checks.append(partial(_open, run, split))
    said = []
    for check in checks:
        try:
            check()
        except AltoptError as error:
            said.append(f"for later stages: {error}")
    for text in dict.fromkeys(said):
        run.runtime.report(Caution(text))


def _schedule(run: Run, steps: Sequence[Step]) -> Iterator[str]:
    """Yield what looks wrong about how long stages train, and on how many images at a time."""
    images = run.check_split("train").images if "train" in _splits(steps) else 0
    for step in steps:
        config = run.recipe.config(step)
        if not isinstance(config, TrainsOnData):
            continue
        config = config.for_images(images)
        entries, where = images * (2 if config.flips else 1), step.table
        if config.iterations == 0:
            yield f"{where}.iterations is 0: {step.output} does not learn"
            continue
        if config.schedule == "step" and (late := [each for each in config.lr_steps if each >= config.iterations]):
            yield (f"{where}.lr_steps {', '.join(map(str, late))}: never reached in {config.iterations} iterations, so "
                   "the learning rate does not fall there")
        if config.warmup >= config.iterations:
            yield (f"{where}.warmup of {config.warmup} iterations does not end in {config.iterations}: the learning "
                   "rate never reaches lr")
        if config.images_per_batch > entries:
            yield (f"{where}.images_per_batch is {config.images_per_batch}, and there are {entries} images, mirrored "
                   "ones counted: every batch holds them all")
        visits = config.iterations * config.images_per_batch
        if run.runtime.feature_store == "on" and freezes_all(config) and visits < entries:
            yield (f"--feature-store on: {step.output} sees only part of {entries} images in {visits} visits, a store "
                   "does not pay")


@dataclass(frozen=True)
class Room:
    """Bytes that a stage writes beside what is there of it: at least, and at most."""

    output: str
    least: int
    most: int
    old: int  # of the output whose place it takes
    passing: int  # snapshots, at most, which go when the stage is done


def _disk(plans: Sequence[tuple[Run, Sequence[Step]]]) -> Iterator[str]:
    """Yield a caution if the disk may not do; raise ``ResourceError`` if it cannot."""
    most = 0
    for run, steps in plans:
        rooms = list(_rooms(run, steps))
        existing = next(each for each in (run.folder, *run.folder.absolute().parents) if each.is_dir())
        free = shutil.disk_usage(existing).free
        before = 0
        for room in rooms:
            if before + room.least > free:
                raise ResourceError(f"{run.folder} needs at least {gigabytes(before + room.least)} for the outputs up "
                                    f"to {room.output}, and {gigabytes(free)} are free: make room there")
            before += room.least - room.old
        most += sum(room.most - room.old for room in rooms) + max((room.passing for room in rooms), default=0)
    if plans and most > free:
        yield f"{run.folder} may take up to {gigabytes(most)}, snapshots included, and {gigabytes(free)} are free"


def _rooms(run: Run, steps: Sequence[Step]) -> Iterator[Room]:
    """Yield the room that the output of each step takes."""
    from stages.shared.footprint import part_bytes  # torch

    parts = part_bytes(run.recipe.network, _num_classes(run, steps))
    held: dict[str, set[str]] = {}
    for step in [*run.recipe.steps, *run.recipe.detections]:
        config = run.recipe.config(step)
        own = set(config.work.parts) if config.work else {"conv"} if isinstance(config, LoadImageNetWeights) else set()
        if config.keeps_parts:
            own |= set().union(*(held.get(name, set()) for name in step.inputs_for(config)))
        held[step.output] = own
        if step not in steps:
            continue
        sizes = _output_bytes(run, step, config, sum(parts[part] for part in own))
        path = run.path(step.output)
        begun = growing_path(path)
        there = begun.stat().st_blocks * 512 if begun.is_file() else 0  # a file full of holes takes what was written
        least, most = (max(0, size - there) for size in sizes)
        learned = sum(parts[part] for part in own) if isinstance(config, Trains) else 0
        # A snapshot holds weights and momentum, and for a moment the one before is there too.
        yield Room(step.output, least, most, path.stat().st_size if path.is_file() else 0, 4 * learned)


def _output_bytes(run: Run, step: Step, config: StageConfig, weights: int) -> tuple[int, int]:
    """Return the least and the most that the output of a step takes."""
    from stages.shared.footprint import hidden_size

    split, network = step.config_class.split, run.recipe.network
    look = run.check_split(split) if split else Look("")
    if step.kind is Kind.NETWORK:
        return weights, weights
    if step.kind in (Kind.PROPOSALS, Kind.TEST_PROPOSALS):
        limit = (config.post_nms if isinstance(config, ProposalSettings) else
                 config.proposals if isinstance(config, SelectiveSearch) else 0)
        return 0, look.images * limit * PROPOSAL_BYTES
    if isinstance(config, CacheConvFeatures):
        frames = network.at_scales(config.scales, config.max_side)
        exact = sum(maps_bytes(counted(look.size_of.values()), frame, config.flips, config.precision)
                    for frame in frames)
        return exact, exact
    if isinstance(config, CachesRegions):
        value_bytes = 4 if config.stored == "float32" else 2
        row = REGION_BYTES + 4 * _num_classes(run, [step]) + value_bytes * hidden_size(network)
        path = run.path(step.inputs[-1])
        if path.is_file():  # else nobody knows yet how many there are
            rows = int(ProposalFile(path).counts.clip(max=config.proposals).sum())
            return rows * row, rows * row
        return 0, look.images * config.proposals * row
    return 0, 0


def _num_classes(run: Run, steps: Sequence[Step]) -> int:
    for split in _splits(steps):
        classes = run.check_split(split).classes  # None where nobody counts them
        return len(open_dataset(run.recipe.data, split, run.runtime.data_root).classes if classes is None else classes)
    return 0


def _memory(plans: Sequence[tuple[Run, Sequence[Step]]], device: str) -> Iterator[str]:
    """Yield a caution if the memory may not do for the largest stage; raise ``ResourceError`` if it cannot."""
    from stages.shared.footprint import device_memory, footprint

    left = memory_left() if device == "cpu" else device_memory(device)
    if left is None:
        return
    where = f"{gigabytes(left.available)} of {'memory' if device == 'cpu' else device + ' memory'} are free"
    tight: dict[int, str] = {}
    for run, steps in plans:
        for step in steps:
            config = run.recipe.config(step)
            look = run.check_split(config.split) if config.split else Look("")
            need = footprint(config, run.recipe.network, _num_classes(run, [step]), counted(look.size_of.values()))
            if need is None:
                continue
            count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if config.divided and device == "cpu" else 1
            named = f"{step.output} ({step.name})"
            if count * need.least > left.available + left.swap:
                raise ResourceError(
                    f"{named} needs {gigabytes(count * need.least)} of memory for weights ({gigabytes(need.weights)}), "
                    f"their gradients and momentum ({gigabytes(need.learning)}) alone, and {where}: end other "
                    "programs, freeze more layers, or choose a smaller network")
            if count * need.total > left.available:
                tight[count * need.total] = (
                    f"{named} may take {gigabytes(count * need.total)} of memory ({gigabytes(need.activations)} of "
                    f"them for its images), and {where}: lower images_per_batch, rois_per_batch or short_side (--set)")
    if tight:
        yield tight[max(tight)]
