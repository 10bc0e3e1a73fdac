"""Bringing a run folder up to date: what is valid, what is not and why, and making it in order."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, DataError
from altopt.machine.allocation import keep_freed_memory
from altopt.machine.determinism import fixed_order
from altopt.machine.distributed import SingleProcess
from cache.files import Memo, digest_files, link_or_copy, sha256_file, write_text_atomic
from cache.records import Record, differences, plain, read_record, write_record
from stages.pipeline.recipe import Recipe
from stages.shared.feature_plan import remember_sizes
from stages.shared.step import Runtime, Step, file_name, ignore_event

State = Literal["done", "given", "missing", "stale", "waits", "not needed"]
PACKAGES = ("altopt", "torch", "torchvision", "numpy", "h5py", "pillow", "safetensors")


@dataclass(frozen=True)
class Verdict:
    """What a step's output is worth, and why, in words."""

    step: Step
    state: State
    reasons: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether nothing has to be done."""
        return self.state in ("done", "given", "not needed")


class Run:
    """A run folder, and the recipe that its artifacts should follow."""

    def __init__(self, folder: Path, recipe: Recipe, runtime: Runtime) -> None:
        self.folder, self.recipe, self.runtime = folder, recipe, runtime
        self.memo = Memo(folder / ".hashes.json")
        self._data: dict[str, str | None] = {}
        self._checked: set[str] = set()

    def path(self, artifact: str) -> Path:
        """Return where an artifact lies."""
        return self.folder / file_name(artifact)

    def record(self, artifact: str) -> Record | None:
        """Return the record beside an artifact."""
        return read_record(self._record_path(artifact))

    def _record_path(self, artifact: str) -> Path:
        return self.folder / f"{artifact}.json"

    def survey(self, steps: Sequence[Step], demand: bool = True) -> list[Verdict]:
        """Return a verdict on every step, in order; with ``demand``, none is needed beyond a given artifact."""
        needed = self._needed(steps) if demand else {step.output for step in steps}
        verdicts: list[Verdict] = []
        for step in steps:
            pending = {each.step.output for each in verdicts if not each.valid}
            if step.output not in needed:
                verdicts.append(Verdict(step, "not needed", ("what follows is given",)))
            else:
                verdicts.append(self.verdict(step, pending))
        self.memo.save()
        return verdicts

    def _needed(self, steps: Sequence[Step]) -> set[str]:
        """Return what the last step's output depends on, given artifacts standing for all before them."""
        needed = {steps[-1].output}
        for step in reversed(steps):
            record = self.record(step.output)
            given = record is not None and record.given is not None and self.path(step.output).is_file()
            if step.output in needed and not given:
                needed |= set(step.inputs_for(self.recipe.config(step)))
        return needed

    def verdict(self, step: Step, pending: Iterable[str] = ()) -> Verdict:
        """Return whether a step's output is valid; ``pending`` names inputs that are about to change."""
        path, record = self.path(step.output), self.record(step.output)
        if not path.is_file():
            return Verdict(step, "missing", ("not made yet",))
        if record is None:
            return Verdict(step, "stale", (f"{path.name} has no record: it is incomplete, or from elsewhere "
                                           f"(take it as it is with --from {step.output})",))
        if record.sha256 != self.memo.sha256(path):
            return Verdict(step, "stale", (f"{path.name} was changed after it was made",))
        if record.given is not None:
            return Verdict(step, "given", (f"given: {record.given}",))
        inputs = step.inputs_for(self.recipe.config(step))
        waiting = [name for name in inputs if name in set(pending)]
        reasons = self._reasons(step, record, [name for name in inputs if name not in waiting])
        if reasons:
            return Verdict(step, "stale", tuple(reasons))
        if waiting:
            return Verdict(step, "waits", (f"is checked again after {' and '.join(waiting)}",))
        return Verdict(step, "done")

    def _reasons(self, step: Step, record: Record, inputs: Sequence[str]) -> list[str]:
        reasons = []
        if record.stage != step.name:
            reasons.append(f"it was made by {record.stage}, and is now made by {step.name}")
        elif record.version != step.config_class.version:  # type: ignore[attr-defined]
            reasons.append(f"{step.name} computes differently since version {record.version}")
        for name in inputs:
            if not self.path(name).is_file():
                reasons.append(f"its input {name} is missing")
            elif record.inputs.get(name) != (here := self.memo.sha256(self.path(name))):
                recorded = record.inputs.get(name, "none")
                reasons.append(f"{name} is another one (sha256 {here[:8]} here, {recorded[:8]} recorded)")
        reasons += differences(record.config, key_of(step, self.recipe.config(step)))
        data = self.data_digest(step)
        if data is not None and record.data is not None and data != record.data:
            reasons.append(f"the images or annotations changed (sha256 {data[:8]} here, {record.data[:8]} recorded)")
        return reasons

    def data_digest(self, step: Step) -> str | None:
        """Return the digest of the split that a step reads; None if it reads none, or if it is not there."""
        config = self.recipe.config(step)
        split = getattr(config, "split", None)
        if split is None:
            return None
        if split not in self._data:
            try:
                dataset = open_dataset(config.data, split, self.runtime.data_root)
                self._data[split] = digest_files(dataset.files(), dataset.description(), self.memo,
                                                 self.runtime.data_root)
            except DataError:
                self._data[split] = None
        return self._data[split]

    def make(self, step: Step) -> Record:
        """Run one step and write its record; its inputs must be there."""
        config = self.recipe.config(step)
        inputs = step.inputs_for(config)
        for name in inputs:
            if not self.path(name).is_file():
                raise ArtifactError(f"{step.name} needs {file_name(name)}, which is not in {self.folder}: make it with "
                                    f"altopt stage {name}, or bring one with --from {name}=FILE")
        self.check_data(config)
        hashes = {name: self.memo.sha256(self.path(name)) for name in inputs}
        data = self.data_digest(step)
        runtime = dataclasses.replace(
            self.runtime, inputs_key=json.dumps([hashes, data]), data_digest=data or "",
            report=lambda event: self.report(step, event),
            ranks=self.runtime.ranks if step.divided else SingleProcess())
        self.report(step, {"event": "started", "stage": step.name, "inputs": list(inputs)})
        started = time.perf_counter()
        stage = partial(step.stage, *(self.path(name) for name in inputs), out=self.path(step.output), config=config)
        runtime.ranks.announce((stage, dataclasses.replace(runtime, report=ignore_event, ranks=SingleProcess())))
        facts = _carried_out(stage, runtime)
        seconds = facts.get("train_seconds", 0.0) or time.perf_counter() - started
        record = self._write_record(step.output, step.name, step.config_class.version,  # type: ignore[attr-defined]
                                    inputs=hashes, data=data, config=key_of(step, config), seconds=round(seconds, 2),
                                    metrics=facts)
        self.report(step, {"event": "finished", **facts, "seconds": record.seconds})
        return record

    def _write_record(self, artifact: str, stage: str, version_number: int, **values: Any) -> Record:
        path = self.path(artifact)
        defaults: dict[str, Any] = {"inputs": {}, "config": {}, "seconds": 0.0}
        record = Record(artifact=artifact, stage=stage, version=version_number, sha256=sha256_file(path),
                        size=path.stat().st_size, versions=_versions(), **(defaults | values))
        write_record(self._record_path(artifact), record)
        self.memo.save()
        return record

    def check_data(self, config: Any) -> None:
        """Look at every image and object of the split before time is spent on it; warnings are reported once."""
        split = getattr(config, "split", None)
        if split is None or split in self._checked:
            return
        self._checked.add(split)
        dataset = open_dataset(config.data, split, self.runtime.data_root)
        for warning in dataset.check():
            self.runtime.report({"event": "warning", "text": warning})
        if split == "train":
            remember_sizes(self.folder, config.data, dataset, self.runtime.data_root)

    @property
    def protocol(self) -> str:
        """How the recipe wants detections scored."""
        return str(self.recipe.header.get("protocol", "voc07"))

    def bring_up_to_date(self, steps: Sequence[Step], force: bool = False) -> list[Step]:
        """Make what is missing or stale, in order, up to the last step (that one anyway, with ``force``)."""
        made = []
        needed = self._needed(steps)
        for step in steps:
            verdict = self.verdict(step)
            forced = force and step is steps[-1]
            if step.output in needed and (forced or not verdict.valid):
                why = "asked for with --force" if verdict.valid else "; ".join(verdict.reasons)
                self.runtime.report({"event": "reason", "artifact": step.output, "text": why})
                self.make(step)
                made.append(step)
        return made

    def reuse(self, step: Step, other: "Run") -> bool:
        """Take a step's output from another run if that made it from equal inputs in the same way; say whether."""
        record = other.record(step.output)
        if record is None or record.given is not None or not other.path(step.output).is_file():
            return False
        config = self.recipe.config(step)
        inputs = step.inputs_for(config)
        alike = (
            (record.stage, record.version) == (step.name, step.config_class.version)  # type: ignore[attr-defined]
            and all(self.path(name).is_file() for name in inputs)
            and record.inputs == {name: self.memo.sha256(self.path(name)) for name in inputs}
            and record.config == key_of(step, config)
            and record.data == self.data_digest(step)
            and record.sha256 == other.memo.sha256(other.path(step.output))
        )
        if alike:
            link_or_copy(other.path(step.output), self.path(step.output))
            write_record(self._record_path(step.output), record)
            self.memo.save()
            self.report(step, {"event": "reason", "text": f"taken over from {other.folder}"})
        return alike

    def import_artifact(self, artifact: str, source: Path | None, why: str) -> None:
        """Take an artifact as given: the one in the folder, or ``source``, which is copied in after a look at it."""
        if source is not None:
            _import_file(artifact, source, self.path(artifact), self.recipe)
        elif not self.path(artifact).is_file():
            raise ArtifactError(f"{file_name(artifact)} is not in {self.folder}: give a file with "
                                f"--from {artifact}=FILE, or make it with altopt stage {artifact}")
        else:
            _look_at(artifact, self.path(artifact), self.recipe)
        previous = self.record(artifact)
        kept = {"inputs": previous.inputs, "config": previous.config} if previous else {}
        self._write_record(artifact, previous.stage if previous else "given", 0, given=why, **kept)

    def report(self, step: Step, event: dict[str, Any]) -> None:
        """Pass a stage's report on with its name, and keep it in log.jsonl (progress inside a split is not kept)."""
        event = {"artifact": step.output, **event}
        self.runtime.report(event)
        if event["event"] != "images":
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"time": round(time.time(), 3), **plain(event)}) + "\n")

    def keep_recipe(self) -> None:
        """Write the resolved recipe into the folder, where later commands find it."""
        path = self.folder / "recipe.toml"
        text = self.recipe.text()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text_atomic(path, text)


def help_rank_0(ranks: SingleProcess) -> None:
    """Take part in every stage that rank 0 announces, until it has no more."""
    while (task := ranks.broadcast(None)) is not None:
        stage, runtime = task
        _carried_out(stage, dataclasses.replace(runtime, ranks=ranks))


def _carried_out(stage: Callable[..., dict[str, Any]], runtime: Runtime) -> dict[str, Any]:
    keep_freed_memory()
    with fixed_order(runtime.deterministic):
        return stage(runtime=runtime)


def key_of(step: Step, config: Any) -> dict[str, Any]:
    """Return what of a config decides whether an output is stale: all but the split that the step does not read."""
    key: dict[str, Any] = plain(asdict(config))
    if "data" in key:
        key["data"].pop("test" if config.split == "train" else "train")
    return key


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            versions[package] = "not installed"
    return versions


def _import_file(artifact: str, source: Path, path: Path, recipe: Recipe) -> None:
    from cache.files import atomic_path
    from stages.steps.pretrained import import_weights

    if not source.is_file():
        raise ArtifactError(f"{source}, given for {artifact}, is not a file: check the path")
    if artifact.startswith("M"):
        import_weights(source, path, recipe.network)
        return
    _look_at(artifact, source, recipe)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def _look_at(artifact: str, path: Path, recipe: Recipe) -> None:
    """Raise ``ArtifactError`` unless the file can be what its name says."""
    if artifact.startswith(("P", "T")):
        from cache.proposals import ProposalFile

        ProposalFile(path).close()
    elif artifact.startswith("F"):
        from cache.preallocated import PreallocatedFile

        PreallocatedFile(path)
    elif artifact.startswith(("M", "S", "R")):
        from cache.checkpoints import read_description

        description = read_description(path)
        if not artifact.startswith("M") and "model" not in description:
            raise ArtifactError(f"{path.name} holds no SVMs or box regressors, as {artifact} does: give a file that "
                                "train_svms or train_regressors made")
        held = description.get("network", {}).get("name")
        wanted = recipe.network.name
        if held != wanted:
            raise ArtifactError(f"{path.name} holds {held or 'no network known to altopt'}, and the recipe speaks of "
                                f"{wanted}: choose the recipe that it was made with")


def find_step(steps: Sequence[Step], word: str) -> Step:
    """Return the step named by its number (0 is M0), its output or its function. Raises ``UsageError``."""
    from altopt.errors import UsageError
    from stages.pipeline.recipe import nearest

    for number, step in enumerate(steps):
        if word.lower() in (str(number), step.output.lower(), step.name, step.name.replace("_", "-")):
            return step
    names = [step.output for step in steps] + [step.name for step in steps]
    raise UsageError(f"there is no stage {word!r}{nearest(word, names)}: give 1 to {len(steps) - 1}, an output such "
                     f"as M2, or a function: {', '.join(step.name for step in steps)}")


def import_given(run: Run, steps: Sequence[Step], words: Sequence[str], target: Step) -> list[Step]:
    """Adopt the artifact of each ``--from M1`` or ``--from M1=FILE``; return the steps after the latest, to the target.

    Inputs of those steps that come before it count as given too if they are there; M0 is made if it is not.
    """
    last = steps.index(target)
    given = _named_before(steps, last, words)
    for place, word in given.items():
        _, equals, file = word.partition("=")
        _import_unless_done(run, steps[place], Path(file) if equals else None, f"--from {word}")
    first, word = max(given.items())
    between = list(steps[first + 1 : last + 1])
    for step in between:
        for needed in step.inputs_for(run.recipe.config(step)):
            before = next((each for each in steps[:first] if each.output == needed), None)
            if before is None:
                continue
            if before is steps[0] and not run.path(needed).is_file():
                run.make(before)
            else:
                _import_unless_done(run, before, None, f"--from {word}, which needs it")
    return between


def _named_before(steps: Sequence[Step], last: int, words: Sequence[str]) -> dict[int, str]:
    """Return {place in the list: word} of what ``--from`` names. Raises ``UsageError`` for one that cannot be taken."""
    from altopt.errors import UsageError

    places: dict[int, str] = {}
    for word in words:
        step = find_step(steps, word.partition("=")[0])
        place = steps.index(step)
        if place >= last:
            raise UsageError(f"--from {step.output} comes after what is asked for ({steps[last].output}): name an "
                             "earlier one")
        if place in places:
            raise UsageError(f"--from {places[place]} and --from {word} are one artifact: name it once")
        places[place] = word
    return places


def run_one(run: Run, step: Step, force: bool) -> list[Step]:
    """Run one stage on its inputs as they are, if its output is not up to date; its inputs must be valid."""
    if run.verdict(step).state == "given" and not force:
        return []
    for verdict in run.survey(run.recipe.steps, demand=False)[: run.recipe.steps.index(step)]:
        name = verdict.step.output
        if name in step.inputs_for(run.recipe.config(step)) and not verdict.valid:
            raise ArtifactError(f"{step.output} needs {name}, and {name} is {verdict.state} "
                                f"({'; '.join(verdict.reasons)}): make it with altopt stage {name}, or take it as it "
                                f"is with --from {name}")
    return run.bring_up_to_date([step], force)


def open_folder(recipe: str | None, name: str | None, sets: Sequence[str], data_root: Path | None, runtime: Runtime,
                scheme: str | None = None) -> Run:
    """Return the run in runs/NAME with its recipe: the one asked for, or the folder's own, or ``shapes``.

    A scheme other than alternating has a folder of its own: runs/shapes-approximate-joint.
    """
    from altopt.errors import UsageError
    from stages.pipeline.recipe import read_recipe

    suffix = f"-{scheme}" if scheme not in (None, "alternating") else ""
    folder = Path("runs") / (name or (Path(recipe).stem if recipe else "shapes") + suffix)
    kept = folder / "recipe.toml"
    chosen = read_recipe(recipe or (str(kept) if kept.is_file() else "shapes"), sets, scheme)
    if kept.is_file() and (held := read_recipe(str(kept)).scheme) != chosen.scheme:
        raise UsageError(f"{folder} was begun with the scheme {held}, and {chosen.scheme} is asked for: name another "
                         "folder with --run, or leave --scheme out")
    if data_root is not None:
        chosen.header["data_root"] = str(data_root)
    runtime.data_root = Path(chosen.header.get("data_root", "data"))
    return Run(folder, chosen, runtime)


def _import_unless_done(run: Run, step: Step, source: Path | None, why: str) -> None:
    if source is None and run.path(step.output).is_file() and run.verdict(step).state == "given":
        return
    record = run.record(step.output)
    made_here = record is not None and run.path(step.output).is_file() and run.verdict(step).state == "done"
    if source is not None or not made_here:
        run.import_artifact(step.output, source, why)
