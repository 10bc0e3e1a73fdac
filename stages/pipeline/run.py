"""Bringing a run folder up to date: what is valid, what is not and why, and making it in order."""

import dataclasses
import json
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from altopt.config import AnchorTargets
from altopt.datasets.checking import Look, compare_splits
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, DataError, UsageError
from altopt.machine.allocation import keep_freed_memory
from altopt.machine.determinism import fixed_order
from altopt.machine.distributed import SingleProcess
from cache.files import Memo, atomic_path, digest_files, link_or_copy, sha256_file, write_text_atomic
from cache.records import JSON, Record, differences, plain, read_record, write_record
from stages.pipeline.checking import look_at_split
from stages.pipeline.recipe import Recipe, choose_recipe, nearest
from stages.shared.events import Caution, Event, Finished, ImagesDone, Note, Reason, Started, ignore_event
from stages.shared.feature_plan import remember_sizes
from stages.shared.stage_config import Split
from stages.shared.step import Kind, Runtime, Step, file_name
from stages.steps.pretrained import import_weights

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
        self._data: dict[Split, str | None] = {}  # a command looks at a data set once: it may be 100,000 files
        self._looks: dict[Split, Look] = {}
        self._remembered = False

    @property
    def protocol(self) -> str:
        """How the recipe wants detections scored."""
        return str(self.recipe.header.get("protocol", "voc07"))

    def path(self, artifact: str) -> Path:
        """Return where an artifact lies."""
        return self.folder / file_name(artifact)

    def record(self, artifact: str) -> Record | None:
        """Return the record beside an artifact."""
        return read_record(self.folder / f"{artifact}.json")

    def survey(self, steps: Sequence[Step], demand: bool = True) -> list[Verdict]:
        """Return a verdict on every step, in order; with ``demand``, none is needed beyond a given artifact."""
        needed = self._needed(steps) if demand else {step.output for step in steps}
        verdicts: list[Verdict] = []
        for step in steps:
            pending = [each.step.output for each in verdicts if not each.valid]
            verdicts.append(self.verdict(step, pending) if step.output in needed
                            else Verdict(step, "not needed", ("what follows is given",)))
        self.memo.save()
        return verdicts

    def _needed(self, steps: Sequence[Step]) -> set[str]:
        """Return what the last step's output depends on, given artifacts standing for all before them."""
        needed = {steps[-1].output}
        # Backwards, because a step is needed only if one behind it is, and is not given.
        for step in reversed(steps):
            record = self.record(step.output)
            given = record is not None and record.given is not None and self.path(step.output).is_file()
            if step.output in needed and not given:
                needed |= set(step.inputs_for(self.recipe.config(step)))
        return needed

    def verdict(self, step: Step, pending: Collection[str] = ()) -> Verdict:
        """Return whether a step's output is valid; ``pending`` names inputs that are about to change."""
        path, record = self.path(step.output), self.record(step.output)
        if not path.is_file():
            return Verdict(step, "missing", ("not made yet",))
        if record is None:
            return Verdict(step, "stale", (f"{path.name} has no record: it is incomplete, or from elsewhere "
                                           f"(take it as it is with --from {step.output})",))
        if record.sha256 != self.memo.sha256(path):
            return Verdict(step, "stale", (f"{path.name} was changed after it was made",))
        # Nobody can say how it should have been made, so only a change of the file makes it stale.
        if record.given is not None:
            return Verdict(step, "given", (f"given: {record.given}",))
        waiting = [name for name in step.inputs_for(self.recipe.config(step)) if name in pending]
        if reasons := self._reasons(step, record, waiting):
            return Verdict(step, "stale", tuple(reasons))
        if waiting:
            return Verdict(step, "waits", (f"depends on {' and '.join(waiting)}, which will be made again",))
        return Verdict(step, "done")

    def _reasons(self, step: Step, record: Record, waiting: Sequence[str]) -> list[str]:
        """Return what has changed since the record was written, inputs that are ``waiting`` left aside."""
        reasons = []
        if record.stage != step.name:
            reasons.append(f"it was made by {record.stage}, and is now made by {step.name}")
        elif record.version != step.config_class.version:
            reasons.append(f"{step.name} computes differently since version {record.version}")
        inputs, config = step.inputs_for(self.recipe.config(step)), self.fingerprint(step)
        for name in inputs:
            if name in waiting:
                continue
            if not self.path(name).is_file():
                reasons.append(f"its input {name} is missing")
            elif name in record.inputs and record.inputs[name] != (here := self.memo.sha256(self.path(name))):
                reasons.append(f"{name} has changed since (sha256 {here[:8]} here, {record.inputs[name][:8]} recorded)")
        if new := [name for name in inputs if name not in record.inputs]:
            old = [name for name in record.inputs if name not in inputs]
            because = " (init)" if record.config.get("init") != config.get("init") else ""
            reasons.append(f"starts from {' and '.join(new)} instead of {' and '.join(old) or 'nothing'}{because}")
            if "init" in record.config:
                config["init"] = record.config["init"]  # that has just been said
        reasons += differences(record.config, config)
        data = self.data_digest(step)
        if data is not None and record.data is not None and data != record.data:
            reasons.append(f"the images or annotations changed (sha256 {data[:8]} here, {record.data[:8]} recorded)")
        return reasons

    def data_digest(self, step: Step) -> str | None:
        """Return the digest of the split that a step reads; None if it reads none, or if it is not there."""
        split = step.config_class.split
        if split is not None and split not in self._data:
            try:
                dataset = open_dataset(self.recipe.data, split, self.runtime.data_root)
                self._data[split] = digest_files(dataset.files(), dataset.description(), self.memo,
                                                 self.runtime.data_root)
            except DataError:
                self._data[split] = None
        return None if split is None else self._data[split]

    def fingerprint(self, step: Step) -> dict[str, JSON]:
        """Return what of a config decides whether an output is stale: all but the split that the step does not read."""
        fingerprint: dict[str, JSON] = plain(dataclasses.asdict(self.recipe.config(step)))
        if isinstance(data := fingerprint.get("data"), dict):
            # Else to evaluate on another test set would make all networks stale.
            data.pop("test" if step.config_class.split == "train" else "train")
        return fingerprint

    def check_data(self, step: Step) -> None:
        """Look at every image and object of the step's split before time is spent on it; warnings are reported once."""
        split = step.config_class.split
        if split is None:
            return
        look = self.check_split(split)
        if split == "train" and not self._remembered:
            remember_sizes(self.folder, self.recipe.data, look.size_of.values(), self.runtime.data_root)
            self._remembered = True

    def check_split(self, split: Split) -> Look:
        """Do so for a split, and once both are known, for what is in both; return what was seen."""
        if split in self._looks:
            return self._looks[split]
        look = self._looks[split] = look_at_split(self.recipe, split, self.runtime.data_root)
        for warning in look.verdict():
            self.runtime.report(Caution(warning))
        if look.classes is not None:  # of images that are drawn nothing is new
            self.runtime.report(Note(f"{split}: {look.line()}"))
        if split == "train":
            self._check_anchors()
        if len(self._looks) > 1:
            for each in compare_splits(self._looks["train"], self._looks["test"], self.memo.sha256):
                self.runtime.report(Caution(each.text))
        return look

    def share_checks(self, other: "Run") -> None:
        """Take over what another run has seen, where that is the same data."""
        if (self.recipe.data, self.runtime.data_root) == (other.recipe.data, other.runtime.data_root):
            self._looks |= other._looks

    def _check_anchors(self) -> None:
        """Report anchors that do not suit the objects, where an RPN is trained with them."""
        if any(isinstance(self.recipe.config(step), AnchorTargets) for step in self.recipe.steps):
            from altopt.models.anchor_fit import anchor_fit

            dataset = open_dataset(self.recipe.data, "train", self.runtime.data_root)
            if warning := anchor_fit(dataset, self.recipe.network).warning():
                self.runtime.report(Caution(warning))

    def bring_up_to_date(self, steps: Sequence[Step], force: bool = False) -> list[Step]:
        """Make what is missing or stale, in order, up to the last step (that one anyway, with ``force``)."""
        made: list[Step] = []
        needed = self._needed(steps) if steps else set()
        for step in steps:
            verdict = self.verdict(step)
            if step.output in needed and (not verdict.valid or (force and step is steps[-1])):
                self.make(step, "; ".join(verdict.reasons) if not verdict.valid else "asked for with --force")
                made.append(step)
        return made

    def make(self, step: Step, why: str = "") -> Record:
        """Run one step and write its record; its inputs must be there. ``why`` is for those who watch."""
        # What nearly every stage needs, torch first, imported before a clock runs: it is not the first stage's time.
        import stages.shared.training  # noqa: F401

        config = self.recipe.config(step)
        inputs = step.inputs_for(config)
        for name in inputs:
            if not self.path(name).is_file():
                raise ArtifactError(f"{step.name} needs {file_name(name)}, which is not in {self.folder}: make it with "
                                    f"altopt stage {name}, or bring one with --from {name}=FILE")
        self.check_data(step)
        # Taken before the stage runs: what it reads is what these name, whatever happens to the files meanwhile.
        hashes = {name: self.memo.sha256(self.path(name)) for name in inputs}
        data = self.data_digest(step)
        runtime = dataclasses.replace(
            self.runtime, inputs_key=json.dumps([hashes, data]), data_digest=data or "",
            report=partial(self.report, step),
            ranks=self.runtime.ranks if step.config_class.divided else SingleProcess())
        steps = self.recipe.steps
        place = f"{steps.index(step) + 1} of {len(steps)}" if step in steps else ""
        self.report(step, Started(step.name, inputs, place, why))
        started = time.perf_counter()
        stage = partial(step.stage, *(self.path(name) for name in inputs), out=self.path(step.output), config=config)
        # What the other ranks are told is pickled: they have no one to report to, and ranks of their own.
        runtime.ranks.announce((stage, dataclasses.replace(runtime, report=ignore_event, ranks=SingleProcess())))
        keep_freed_memory()
        with fixed_order(runtime.deterministic):  # ``help_rank_0`` does the same on the other ranks
            facts = stage(runtime=runtime)
        # A resumed stage has trained longer than this process knows of.
        trained = facts.get("train_seconds")
        seconds = trained if isinstance(trained, float) and trained else time.perf_counter() - started
        path = self.path(step.output)
        record = self._keep(Record(
            artifact=step.output, stage=step.name, version=step.config_class.version, inputs=hashes, data=data,
            config=self.fingerprint(step), seconds=round(seconds, 2), metrics=facts,
            sha256=sha256_file(path), size=path.stat().st_size, versions=versions()))
        self.report(step, Finished(facts, record.seconds))
        return record

    def _keep(self, record: Record) -> Record:
        # The artifact is there before its record: killed in between, it counts as incomplete and is made again.
        write_record(self.folder / f"{record.artifact}.json", record)
        self.memo.save()
        return record

    def reuse(self, step: Step, other: "Run") -> bool:
        """Take a step's output from another run if that made it from equal inputs in the same way; say whether."""
        record = other.record(step.output)
        if record is None or record.given is not None or not other.path(step.output).is_file():
            return False
        inputs = step.inputs_for(self.recipe.config(step))
        alike = (
            (record.stage, record.version) == (step.name, step.config_class.version)
            and all(self.path(name).is_file() for name in inputs)
            and record.inputs == {name: self.memo.sha256(self.path(name)) for name in inputs}
            and record.config == self.fingerprint(step)
            and record.data == self.data_digest(step)
            and record.sha256 == other.memo.sha256(other.path(step.output))
        )
        if alike:
            # A link is safe between runs: altopt replaces artifacts and never writes into one.
            link_or_copy(other.path(step.output), self.path(step.output))
            self._keep(record)
            self.report(step, Reason(f"taken over from {other.folder}"))
        return alike

    def import_artifact(self, artifact: str, source: Path | None, why: str) -> None:
        """Take an artifact as given, the one in the folder or ``source``; ``ArtifactError`` for what it cannot be."""
        # A source is copied after a look at it; weights of other programs become a network on the way in.
        kind, path, network = Kind.of(artifact), self.path(artifact), self.recipe.network
        if source is None:
            if not path.is_file():
                raise ArtifactError(f"{path.name} is not in {self.folder}: give a file with --from {artifact}=FILE, or "
                                    f"make it with altopt stage {artifact}")
            kind.check(path, network.name)
        elif not source.is_file():
            raise ArtifactError(f"{source}, given for {artifact}, is not a file: check the path")
        elif kind is Kind.NETWORK:
            if found := import_weights(source, path, network):
                self.runtime.report(Note(found))
        else:
            kind.check(source, network.name)
            with atomic_path(path) as temporary:  # a copy: a link would change with the file that it was taken from
                shutil.copyfile(source, temporary)
        made = self.record(artifact)
        self._keep(Record(
            artifact=artifact, stage=made.stage if made else "given", version=0, given=why, seconds=0.0,
            inputs=made.inputs if made else {}, config=made.config if made else {},
            sha256=sha256_file(path), size=path.stat().st_size, versions=versions()))

    def report(self, step: Step, event: Event) -> None:
        """Pass a stage's report on with its output, and keep it in log.jsonl (progress inside a split is not kept)."""
        event = dataclasses.replace(event, artifact=step.output)
        self.runtime.report(event)
        if not isinstance(event, ImagesDone):
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"time": round(time.time(), 3), **plain(event.as_dict())}) + "\n")

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
        keep_freed_memory()
        with fixed_order(runtime.deterministic):
            stage(runtime=dataclasses.replace(runtime, ranks=ranks))


def versions() -> dict[str, str]:
    """Return what is installed of the packages that results depend on."""
    import platform
    from importlib.metadata import version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = "not installed"
    return found


def find_step(steps: Sequence[Step], word: str) -> Step:
    """Return the step named by its number (0 is M0), its output or its function. Raises ``UsageError``."""
    for number, step in enumerate(steps):
        if word.lower() in (str(number), step.output.lower(), step.name, step.name.replace("_", "-")):
            return step
    names = [step.output for step in steps] + [step.name for step in steps]
    raise UsageError(f"there is no stage {word!r}{nearest(word, names)}: give 1 to {len(steps) - 1}, an output such "
                     f"as {steps[-1].output}, or a function: {', '.join(step.name for step in steps)}")


def given_places(steps: Sequence[Step], words: Sequence[str], target: Step) -> dict[int, str]:
    """Return {number of a step: word} of each ``--from M1`` or ``--from M1=FILE``.

    Raises ``UsageError`` for an artifact that comes too late or is named twice.
    """
    last = steps.index(target)
    given: dict[int, str] = {}
    for word in words:
        place = steps.index(find_step(steps, word.partition("=")[0]))
        if place >= last:
            raise UsageError(f"--from {steps[place].output} comes after what is asked for ({target.output}): name an "
                             "earlier one")
        if place in given:
            raise UsageError(f"--from {given[place]} and --from {word} are one artifact: name it once")
        given[place] = word
    return given


def import_given(run: Run, steps: Sequence[Step], words: Sequence[str], target: Step) -> list[Step]:
    """Import each given artifact; return the steps from the latest to the target, M0's before them if it is missing.

    Inputs of those steps that come before it count as given too if they are there. Raises ``UsageError``, before
    anything is imported, as ``given_places`` does.
    """
    given = given_places(steps, words, target)
    for place, word in given.items():
        _, equals, file = word.partition("=")
        if equals:
            run.import_artifact(steps[place].output, Path(file), f"--from {word}")
        else:
            _import_unless_valid(run, steps[place], f"--from {word}")
    first, word = max(given.items())
    before = {step.output: step for step in steps[:first]}
    between = list(steps[first + 1 : steps.index(target) + 1])
    missing = []
    for needed in dict.fromkeys(name for step in between for name in step.inputs_for(run.recipe.config(step))):
        if needed == steps[0].output and needed in before and not run.path(needed).is_file():
            missing.append(steps[0])
        elif needed in before:
            _import_unless_valid(run, before[needed], f"--from {word}, which needs it")
    return [*missing, *between]


def _import_unless_valid(run: Run, step: Step, why: str) -> None:
    """Take what lies in the folder as given, unless that is so already, or it was made here as the recipe has it."""
    if not (run.path(step.output).is_file() and run.verdict(step).state in ("given", "done")):
        run.import_artifact(step.output, None, why)


def alone(run: Run, step: Step, force: bool) -> list[Step]:
    """Return a step that is to run on its inputs as they are, or nothing if that is done; its inputs must be valid."""
    verdict = run.verdict(step)
    if verdict.state == "given" and not force:
        return []
    inputs = step.inputs_for(run.recipe.config(step))
    steps = run.recipe.steps
    for each in run.survey(steps, demand=False)[: steps.index(step)]:
        name = each.step.output
        if name in inputs and not each.valid:
            raise ArtifactError(f"{step.output} needs {name}, and {name} is {each.state} ({'; '.join(each.reasons)}): "
                                f"make it with altopt stage {name}, or take it as it is with --from {name}")
    return [step] if force or not verdict.valid else []


def open_folder(recipe: str | None, name: str | None, sets: Sequence[str], data_root: Path | None, runtime: Runtime,
                scheme: str | None = None) -> Run:
    """Return the run in runs/NAME with its recipe, as ``choose_recipe`` finds them."""
    folder, chosen = choose_recipe(recipe, name, sets, scheme)
    return with_recipe(folder, chosen, data_root, runtime)


def with_recipe(folder: Path, chosen: Recipe, data_root: Path | None, runtime: Runtime) -> Run:
    """Return the run in a folder with a recipe, its data where the recipe says unless ``data_root`` is given."""
    if data_root is not None:
        chosen.header["data_root"] = str(data_root)
    runtime.data_root = Path(chosen.header.get("data_root", "data"))
    return Run(folder, chosen.with_data_of(runtime.data_root), runtime)
