"""Looking at a data set before anything is trained on it: all that is wrong with both splits, and their numbers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from altopt.config import NetworkConfig
from altopt.datasets.checking import Finding, Look, compare_splits, look_deeper
from altopt.datasets.finding import look_for_data
from altopt.datasets.on_disk import UNKNOWN_CLASS
from altopt.datasets.opening import open_dataset
from altopt.errors import DataError
from cache.files import sha256_file
from stages.pipeline.recipe import Recipe, choose_recipe, read_recipe, toml
from stages.shared.stage_config import Split

FOR_PHOTOGRAPHS = "photos"  # the recipe where none is named


@dataclass(frozen=True)
class DataCheck:
    """What was found in a data set: each split by itself, then both beside each other; ``words`` say what it is."""

    words: str
    looks: Mapping[str, Look]  # by split; "all" where there are none yet
    between: list[Finding]

    @property
    def findings(self) -> list[Finding]:
        """All of it, problems first."""
        every = [each for look in self.looks.values() for each in look.findings] + self.between
        # A broken list of training images keeps the classes of the test split from being known, too.
        return sorted(dict.fromkeys(every), key=lambda each: each.severity)  # "problem" comes before "warning"

    def as_dict(self) -> dict[str, object]:
        """Return it JSON-able."""
        return {"data": self.words, "findings": [asdict(each) for each in self.findings],
                "splits": {split: look.as_dict() for split, look in self.looks.items()}}


def frames_of(recipe: Recipe) -> list[NetworkConfig]:
    """Return the network in every frame that the recipe's stages see images in."""
    frames = [recipe.network]
    for step in [*recipe.steps, *recipe.detections]:
        config = recipe.config(step)
        if config.scales:
            frames += recipe.network.at_scales(config.scales, config.max_side)
    return list(dict.fromkeys(frames))


def look_at_split(recipe: Recipe, split: Split, root: Path | None) -> Look:
    """Return what is found in a split of a recipe's data set. Raises ``DataError`` if there is no such folder."""
    look = open_dataset(recipe.data, split, root).look()
    look_deeper(look, split, frames_of(recipe))
    return look


def look_at_data(recipe: Recipe, root: Path | None, words: str, digest: Callable[[Path], str]) -> DataCheck:
    """Return what is found in both splits; ``digest`` gives the hash of a file."""
    train, test = (look_at_split(recipe, split, root) for split in ("train", "test"))
    if train.problems and not train.classes:  # what keeps the classes from being known is said once, not of each object
        test.findings = [each for each in test.findings if each.kind != UNKNOWN_CLASS]
    return DataCheck(words, {"train": train, "test": test}, compare_splits(train, test, digest))


def check_data(recipe: str | None, run_name: str | None, sets: tuple[str, ...], data_root: Path | None) -> DataCheck:
    """Return what is found in a recipe's or a run's data, or, where neither is named, in what lies in ``data_root``."""
    kept = run_name is not None and (Path("runs") / run_name / "recipe.toml").is_file()
    if recipe or kept or data_root is None:
        chosen = choose_recipe(recipe, run_name, sets, None)[1]
        root = data_root or Path(chosen.header.get("data_root", "data"))
        chosen = chosen.with_data_of(root)
        words = f"recipe {chosen.name}" + ("" if chosen.data.format == "shapes" else f" in {root}")
        return look_at_data(chosen, root, words, sha256_file)
    chosen = read_recipe(FOR_PHOTOGRAPHS, sets)
    try:
        chosen = chosen.with_data_of(data_root)
    except DataError as error:
        found = look_for_data(data_root)
        if found.whole is None:
            raise
        # Not split yet: that is a problem, and what else is wrong is worth knowing before lists are made.
        spelled = [f"data.{split}={toml([found.whole])}" for split in ("train", "test")]
        chosen = read_recipe(FOR_PHOTOGRAPHS, (*sets, *spelled)).with_data_of(data_root)
        look = look_at_split(chosen, "train", data_root)
        return DataCheck(f"{data_root}: {found.words}", {"all": look}, [Finding("no splits", str(error))])
    words = chosen.found.get(("data", "format"), str(data_root)).removeprefix("found in ")
    return look_at_data(chosen, data_root, words, sha256_file)
