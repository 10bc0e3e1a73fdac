"""Recipes: one experiment each, as TOML, and what becomes of one when stages take their settings from it."""
# A recipe has the tables ``network``, ``data``, one for each stage function, and ``all``, whose values go to every
# stage that has such a field. A stage's config is its dataclass's defaults, then ``all``, then the stage's own table;
# what ``--set`` says goes over the file's, again ``all`` first and then the stage's own. The comment behind a value is
# its source.

import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from altopt.config import DetectionSettings, NetworkConfig, TrainingConfig, out_of_bounds
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.errors import UsageError
from altopt.layers import LAYERS, names_matching
from cache.records import RENAMED, RENAMED_VALUES
from stages import DETECTIONS, PRETRAINED, SCHEMES
from stages.shared.stage_config import StageConfig, Trains
from stages.shared.step import Step

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
HEADER = ("title", "description", "data_root", "protocol", "expect", "scheme")
SHARED: dict[str, type["DataclassInstance"]] = {"network": NetworkConfig, "data": DataConfig}
# Fields of a stage's config that do not come from its own table.
FILLED_IN = {"network": attrgetter("network"), "data": attrgetter("data"), "backbone": attrgetter("network.name")}
AUTO = "auto"  # as the data set's format, and as a split: what lies in the data root
PROTOCOL = Literal["voc07", "voc10", "coco"]
LONGEST_NAME = 255  # bytes, of Linux and macOS
KINDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class Value:
    """A setting and where it comes from."""

    value: object
    source: str


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: header values, tables of settings, the text they come from, and what ``--set`` put in place."""

    name: str
    header: dict[str, str]
    tables: dict[str, dict[str, object]]
    written: str
    assigned: frozenset[tuple[str, str]]
    found: Mapping[tuple[str, str], str] = field(default_factory=dict)  # what was looked up, and where

    @property
    def scheme(self) -> str:
        """Which list of steps is followed."""
        return self.header.get("scheme", "alternating")

    @cached_property
    def network(self) -> NetworkConfig:
        """The network that all stages speak of."""
        return self.build(NetworkConfig, "network")

    @cached_property
    def data(self) -> DataConfig:
        """The data set."""
        return self.build(DataConfig, "data")

    @property
    def pretrained(self) -> Step:
        """The step that makes M0: the one that the recipe has a table for."""
        named = [step for step in PRETRAINED if step.table in self.tables]
        return named[0] if named else PRETRAINED[0]

    @property
    def steps(self) -> list[Step]:
        """M0's step and the scheme's."""
        return [self.pretrained, *SCHEMES[self.scheme]]

    @property
    def detections(self) -> list[Step]:
        """The steps that detect on the test split."""
        return DETECTIONS[self.scheme]

    def config(self, step: Step) -> StageConfig:
        """Return the step's config. Raises ``UsageError`` for a value of the wrong kind, or out of its bounds."""
        return self.build(step.config_class, step.table)

    def build(self, cls: type[C], table: str) -> C:
        """Return a config with the values of a table of the recipe. Raises ``UsageError`` as ``config`` does."""
        hints, given = _type_hints(cls), self._given(table)
        values: dict[str, object] = {}
        for each in fields(cls):
            if each.name in FILLED_IN:
                values[each.name] = FILLED_IN[each.name](self)
            elif each.name in given:
                values[each.name] = _converted(given[each.name], hints[each.name], f"{table}.{each.name}")
            elif each.default is MISSING:
                key = f"{table}.{each.name}"
                raise UsageError(f"the recipe does not say {key}: add it, or --set {key}=...")
        config = cls(**values)
        if problem := out_of_bounds(config):
            raise UsageError(f"{table}.{problem}")
        return config

    def _given(self, table: str) -> Mapping[str, object]:
        """Return what the recipe says for a table, ``all`` included."""
        return ({} if table in SHARED else self.tables.get("all", {})) | self.tables.get(table, {})

    @cached_property
    def sources(self) -> dict[tuple[str, str], str]:
        """{(table, field): source} of what the recipe says: the comment behind a value, or ``--set``."""
        import tomlkit  # here, since it takes as long as all the rest of altopt plan

        found = {}
        for name, table in tomlkit.parse(self.written).items():
            if isinstance(table, tomlkit.items.Table):
                for key in table:
                    item = table.value.item(key)
                    assert isinstance(item, tomlkit.items.Item)
                    found[name, RENAMED.get(key, key)] = item.trivia.comment.removeprefix("#").strip()
        return found | dict.fromkeys(self.assigned, "--set") | dict(self.found)

    def values(self, cls: type["DataclassInstance"], table: str) -> dict[str, Value]:
        """Return the settings that a config takes from this recipe, defaults included, each with its source."""
        values, given, own = {}, self._given(table), self.tables.get(table, {})
        for each in fields(cls):
            if each.name in given:
                where = table if each.name in own else "all"
                values[each.name] = Value(given[each.name], self.sources.get((where, each.name), ""))
            elif each.default is not MISSING:
                values[each.name] = Value(each.default, each.metadata.get("source", "altopt's default"))
        return values

    def resolved(self) -> dict[str, dict[str, Value]]:
        """Return every setting of the network, the data and the scheme's stages with its source, by table."""
        steps = {step.table: step.config_class for step in [*self.steps, *self.detections]}
        return {table: self.values(cls, table) for table, cls in (SHARED | steps).items()}

    def with_data_of(self, root: Path) -> "Recipe":
        """Return the recipe with the data set that lies in a folder, where it leaves that open ("auto").

        Raises ``DataError`` for a folder without data, or without splits that the recipe does not name either.
        """
        if self.data.format != AUTO:
            return self
        from altopt.datasets.finding import find_data, look_for_data

        open_splits = [split for split in ("train", "test") if getattr(self.data, split) == (AUTO,)]
        found = find_data(root) if open_splits else look_for_data(root)
        values: dict[str, object] = {"format": found.format}
        if found.data is not None:
            values |= {split: list(getattr(found.data, split)) for split in open_splits}
            if found.data.classes and not self.data.classes:
                values["classes"] = list(found.data.classes)
        where = dict.fromkeys((("data", name) for name in values), "found with the format")
        where["data", "format"] = f"found in {root}: {found.words}"
        return replace(self, tables=self.tables | {"data": self.tables["data"] | values}, found=where)

    def as_dict(self) -> dict[str, object]:
        """Return the same JSON-able, with the header."""
        return self.header | {
            table: {key: {"value": each.value, "source": each.source} for key, each in values.items()}
            for table, values in self.resolved().items()
        }

    def text(self) -> str:
        """Return the same as TOML, each source as a comment."""
        lines = [f"{key} = {toml(value)}" for key, value in self.header.items()]
        for table, values in self.resolved().items():
            lines += ["", f"[{table}]"]
            for key, each in values.items():
                assignment = f"{key} = {toml(each.value)}"
                lines.append(f"{assignment:<43} # {each.source}" if each.source else assignment)
        return "\n".join(lines) + "\n"


@cache
def stage_tables() -> dict[str, type[StageConfig]]:
    """Return {table name: config class} of every stage that a recipe can speak of."""
    steps = [*PRETRAINED, *chain.from_iterable([*SCHEMES.values(), *DETECTIONS.values()])]
    return {step.table: step.config_class for step in steps}


def packaged() -> dict[str, Path]:
    """Return {name: file} of the recipes that come with altopt."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def choose_recipe(recipe: str | None, run_name: str | None, sets: Sequence[str],
                  scheme: str | None) -> tuple[Path, Recipe]:
    """Return the folder runs/NAME and its recipe: the one asked for, or the folder's own, or ``shapes``."""
    # A scheme other than alternating has a folder of its own: runs/shapes-approximate-joint.
    suffix = f"-{scheme}" if scheme not in (None, "alternating") else ""
    name = (Path(recipe).stem if recipe else "shapes") + suffix if run_name is None else run_name
    folder = Path("runs") / check_run_name(name)
    kept = folder / "recipe.toml"
    chosen = read_recipe(recipe or (str(kept) if kept.is_file() else "shapes"), sets, scheme)
    if kept.is_file() and (held := str(_parsed(kept)[1].get("scheme", "alternating"))) != chosen.scheme:
        raise UsageError(f"{folder} was begun with the scheme {held}, and {chosen.scheme} is asked for: name another "
                         "folder with --run, or leave --scheme out")
    return folder, chosen


def check_run_name(name: str) -> str:
    """Return the name of a folder in ``runs``. Raises ``UsageError`` if it cannot be one."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or not name.isprintable():
        raise UsageError(f"{name!r} does not name a folder in runs: give --run a name, such as slower")
    if max(len(part.encode(errors="surrogateescape")) for part in parts) > LONGEST_NAME:
        raise UsageError(f"the run's name {name[:40]!r}... is too long for a folder: give --run a shorter one")
    return name


def read_recipe(name_or_path: str, sets: Sequence[str] = (), scheme: str | None = None) -> Recipe:
    """Read a recipe by name or file, with ``table.field=value`` and a scheme in place of its own; ``UsageError``."""
    known = packaged()
    path = known.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise UsageError(f"there is no recipe {name_or_path!r}{nearest(name_or_path, known)}: choose one of "
                         f"{', '.join(known)}, or give a .toml file")
    text, content = _parsed(path)
    tables: dict[str, dict[str, object]] = {}
    for name, table in content.items():
        if name in HEADER:
            continue
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {name} stands outside of a table; a recipe's own keys are {', '.join(HEADER)}")
        tables[name] = dict(_current(name, key, value, str(path)) for key, value in table.items())
    assigned = _override(tables, sets)
    header = {"title": path.stem} | {key: str(content[key]) for key in HEADER if key in content}
    header |= {"scheme": scheme} if scheme else {}
    check_scheme(header.get("scheme", "alternating"))
    _converted(header.get("protocol", "voc07"), PROTOCOL, "protocol")
    recipe = Recipe(header["title"], header, tables, text, frozenset(assigned))
    for name in tables.keys() & stage_tables().keys():  # also those of other schemes: what is wrong is said at once
        recipe.build(stage_tables()[name], name)
    for step in [*recipe.steps, *recipe.detections]:
        _check_names(recipe, step, recipe.config(step))
    if recipe.data.format == "shapes":  # others are looked for where they lie, before the first stage of a run
        for split in ("train", "test"):
            open_dataset(recipe.data, split, None)
    return recipe


def detection_settings(recipe: Path | None, sets: Sequence[str]) -> DetectionSettings:
    """Return how a recipe, or else the defaults, make detections of scores and boxes, with ``detect.field=value``."""
    known = [f"detect.{each.name}" for each in fields(DetectionSettings)]
    for text in sets:
        if (key := text.partition("=")[0].strip()) not in known:
            raise UsageError(f"--set {text}: what is trained detects by these settings alone{nearest(key, known)}: "
                             f"{', '.join(known)}")
    if recipe is not None:
        return read_recipe(str(recipe), sets).build(DetectionSettings, "detect")
    tables: dict[str, dict[str, object]] = {}
    _override(tables, sets)
    return Recipe("defaults", {}, tables, "", frozenset()).build(DetectionSettings, "detect")


def _parsed(path: Path) -> tuple[str, dict[str, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text, tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror}: check its permissions") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def check_scheme(name: str) -> str:
    """Return the name of a scheme. Raises ``UsageError`` if it is none."""
    if name not in SCHEMES:
        raise UsageError(f"there is no scheme {name!r}{nearest(name, SCHEMES)}: choose one of {', '.join(SCHEMES)}")
    return name


def _check_names(recipe: Recipe, step: Step, config: StageConfig) -> None:
    """Raise ``UsageError`` unless a stage starts from a network made before it, and freezes layers that there are."""
    before = [each.output for each in recipe.steps[: recipe.steps.index(step)]] if config.init else []
    networks = [output for output in before if output.startswith("M")]
    if config.init and config.init not in networks:
        raise UsageError(f"{step.table}.init must be {' or '.join(networks)} (the networks made before {step.output}); "
                         f"it is {config.init!r}")
    said = {name for table, name in recipe.assigned if table in (step.table, "all")}
    if isinstance(config, TrainingConfig) and config.visits and "iterations" in said:
        also = "" if "visits" in said else f", which the recipe has ({config.visits:g})"
        raise UsageError(f"{step.table}.iterations says nothing beside {step.table}.visits{also}: set the latter, or "
                         "set it to 0")
    if isinstance(config, TrainingConfig) and config.visits and config.schedule == "step":
        raise UsageError(f'{step.table}.visits leaves the number of iterations open, and lr_steps count them: set '
                         f'{step.table}.schedule to "one-cycle"')
    if isinstance(config, Trains):
        try:
            names_matching([name for layer in LAYERS[config.network.name] for name in layer.weights], config.freeze)
        except UsageError as error:
            raise UsageError(f"{step.table}.{error}") from None


def _current(table: str, key: str, value: object, where: str) -> tuple[str, object]:
    """Return a field and its value as they are called now. Raises ``UsageError`` unless there is such a field."""
    key = RENAMED.get(key, key)
    classes = stage_tables()
    names = [*SHARED, "all", *classes]
    if table not in names:
        raise UsageError(f"{where}: there is no table {table!r}{nearest(table, names)}; tables are {', '.join(names)}")
    chosen = classes.values() if table == "all" else [(SHARED | classes)[table]]
    known = list(dict.fromkeys(each.name for cls in chosen for each in fields(cls) if each.name not in FILLED_IN))
    if key not in known:
        raise UsageError(f"{where}: {table} has no field {key!r}{nearest(key, known)}; its fields are "
                         f"{', '.join(known)}")
    return key, RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is most like this one; nothing if none is."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _override(tables: dict[str, dict[str, object]], sets: Sequence[str]) -> set[tuple[str, str]]:
    """Put ``TABLE.FIELD=VALUE`` over what a file says: ``all`` reaches every stage that is not named itself."""
    assigned: dict[tuple[str, str], object] = {}
    for text in sets:
        key, equals, written = text.partition("=")
        table, dot, name = key.strip().partition(".")
        if not equals or not dot:
            raise UsageError(f"--set {text}: write TABLE.FIELD=VALUE, such as train_rpn.lr=0.01")
        try:
            value = tomllib.loads(f"value = {written}")["value"]
        except tomllib.TOMLDecodeError:
            value = written.strip()
        name, value = _current(table, name, value, f"--set {text}")
        assigned[table, name] = value
    # Else a value in a stage's own table of the file would stand against --set all.FIELD.
    for _, name in (each for each in assigned if each[0] == "all"):
        for table in stage_tables():
            tables.get(table, {}).pop(name, None)
    for (table, name), value in assigned.items():
        tables.setdefault(table, {})[name] = value
    return set(assigned)


_type_hints = cache(typing.get_type_hints)


def _converted(value: object, hint: object, name: str) -> object:
    """Return the value as the type of its field, or raise ``UsageError`` in the field's own words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value in arguments:
            return value
        raise UsageError(f"{name} must be one of {', '.join(arguments)} (it is {value!r})")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_converted(each, arguments[0], name) for each in value)
        raise UsageError(f"{name} must be a list, such as [1, 2] (it is {value!r})")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise UsageError(f"{name} must be {KINDS[hint]} (it is {value!r})")


def describe_settings(step: Step, recipe: Recipe) -> str:
    """Return a stage's settings in a recipe with their sources, and the defaults that it replaces, a line each."""
    lines = [f"Settings of this run (--set {step.table}.FIELD=VALUE):"]
    defaults = {each.name: (each.default, each.metadata.get("source", "")) for each in fields(step.config_class)}
    for name, each in recipe.values(step.config_class, step.table).items():
        default, source = defaults[name]
        line = f"  {name} = {toml(each.value)}  ({each.source})"
        replaced = tuple(each.value) != default if isinstance(each.value, list) else each.value != default
        lines.append(f"{line}; default {toml(default)} ({source})" if replaced else line)
    return "\n".join(lines if len(lines) > 1 else ["It has no settings."])


def describe_recipes() -> dict[str, str]:
    """Return {name: description} of the recipes that come with altopt."""
    return {name: str(_parsed(path)[1].get("description", "")) for name, path in packaged().items()}


def toml(value: object) -> str:
    """Return a value as TOML."""
    import tomlkit

    return tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()
