"""Recipes: one experiment each, as TOML, and what becomes of one when stages take their settings from it.

A recipe has the tables ``network``, ``data``, one for each stage function, and ``all``, whose values go to every stage
that has such a field. A stage's config is its dataclass's defaults, then ``all``, then the stage's own table; what
``--set`` says goes over the file's, again ``all`` first and then the stage's own. The comment behind a value is its
source.
"""

import json
import math
import re
import tomllib
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from altopt.config import NetworkConfig
from altopt.datasets.dataset import DataConfig
from altopt.errors import UsageError
from stages import DETECTIONS, PRETRAINED, SCHEMES
from stages.shared.step import Step

HEADER = ("title", "description", "data_root", "protocol", "expect", "scheme")
SHARED: dict[str, type] = {"network": NetworkConfig, "data": DataConfig}
AT_LEAST = {"iterations": 0, "warmup": 0} | dict.fromkeys(
    ("images_per_batch", "short_side", "max_side", "rpn_channels", "crop_side", "anchors_per_image",
     "rois_per_batch", "rois_at_once", "per_class", "region_area"), 1)
PROTOCOL = Literal["voc07", "voc10", "coco"]


@dataclass(frozen=True)
class Value:
    """A setting and where it comes from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: header values, and tables of settings with their sources."""

    name: str
    header: dict[str, Any]
    tables: dict[str, dict[str, Value]]

    @property
    def scheme(self) -> str:
        """Which list of steps is followed."""
        return str(self.header.get("scheme", "alternating"))

    @property
    def network(self) -> NetworkConfig:
        """The network that all stages speak of."""
        network: NetworkConfig = _build(NetworkConfig, self.tables.get("network", {}), "network")
        return network

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

    def values(self, step: Step) -> dict[str, Value]:
        """Return the settings that a step's config takes from this recipe, defaults included."""
        own = self.tables.get(step.table, {})
        values = {}
        for each in fields(step.config_class):
            if each.name in ("network", "data", "backbone"):
                continue
            default = Value(each.default, each.metadata.get("source", ""))
            values[each.name] = own.get(each.name, self.tables.get("all", {}).get(each.name, default))
        return values

    def config(self, step: Step) -> Any:
        """Return the step's config. Raises ``UsageError`` for a value of the wrong kind."""
        cls = step.config_class
        given: dict[str, Any] = {name: each.value for name, each in self.values(step).items()}
        names = {each.name for each in fields(cls)}
        for shared, shared_class in SHARED.items():
            if shared in names:
                given[shared] = _build(shared_class, self.tables.get(shared, {}), shared)
        if "backbone" in names:
            given["backbone"] = _build(NetworkConfig, self.tables.get("network", {}), "network").name
        return _construct(cls, given, step.table)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting with its source, JSON-able."""
        tables = {table: _shared_values(cls) | self.tables.get(table, {}) for table, cls in SHARED.items()}
        tables |= {step.table: self.values(step) for step in [*self.steps, *self.detections]}
        return self.header | {
            table: {key: {"value": each.value, "source": each.source} for key, each in values.items()}
            for table, values in tables.items()
        }

    def text(self) -> str:
        """Return the resolved recipe as TOML: every setting of every stage, its source as a comment."""
        lines = [f"{key} = {_toml(value)}" for key, value in self.header.items()]
        for table, cls in SHARED.items():
            lines += _table(table, _shared_values(cls) | self.tables.get(table, {}))
        for table, step in {step.table: step for step in [*self.steps, *self.detections]}.items():
            lines += _table(table, self.values(step))
        return "\n".join(lines) + "\n"


@cache
def stage_tables() -> dict[str, type]:
    """Return {table name: config class} of every stage that a recipe can speak of."""
    steps = [*PRETRAINED, *chain.from_iterable([*SCHEMES.values(), *DETECTIONS.values()])]
    return {step.table: step.config_class for step in steps}


def packaged() -> dict[str, Path]:
    """Return {name: file} of the recipes that come with altopt."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_recipe(name_or_path: str, sets: typing.Sequence[str] = (), scheme: str | None = None) -> Recipe:
    """Read a recipe by name or file, with ``table.field=value`` overrides and perhaps another scheme than its own.

    Raises ``UsageError``.
    """
    known = packaged()
    path = known.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise UsageError(f"there is no recipe {name_or_path!r}{nearest(name_or_path, known)}: choose one of "
                         f"{', '.join(known)}, or give a .toml file")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    tables = _tables(content, _sources(text), str(path))
    _override(tables, sets)
    header = {key: content[key] for key in HEADER if key in content} | ({"scheme": scheme} if scheme else {})
    check_scheme(header.get("scheme", "alternating"))
    _converted(header.get("protocol", "voc07"), PROTOCOL, "protocol")
    recipe = Recipe(header.get("title", path.stem), {"title": path.stem} | header, tables)
    for step in [*recipe.steps, *recipe.detections]:
        _check_init(recipe, step, recipe.config(step))
    return recipe


def check_scheme(name: str) -> str:
    """Return the name of a scheme. Raises ``UsageError`` if it is none."""
    if name not in SCHEMES:
        raise UsageError(f"there is no scheme {name!r}{nearest(str(name), SCHEMES)}: choose one of "
                         f"{', '.join(SCHEMES)}")
    return name


def _check_init(recipe: Recipe, step: Step, config: Any) -> None:
    """Raise ``UsageError`` unless a stage starts from a network that is made before it."""
    init = getattr(config, "init", "")
    before = [each.output for each in recipe.steps[: recipe.steps.index(step)]] if init else []
    networks = [output for output in before if output.startswith("M")]
    if init and init not in networks:
        raise UsageError(f"{step.table}.init = {init!r}: it is one of the networks made before {step.output}, "
                         f"{', '.join(networks)}")


def _tables(content: dict[str, Any], sources: dict[str, str], where: str) -> dict[str, dict[str, Value]]:
    tables: dict[str, dict[str, Value]] = {}
    for name, table in content.items():
        if name in HEADER:
            continue
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {name} stands outside of a table; a recipe's own keys are {', '.join(HEADER)}")
        for key in table:
            _require_field(name, key, where)
        tables[name] = {key: Value(value, sources.get(f"{name}.{key}", "")) for key, value in table.items()}
    return tables


def _require_field(table: str, key: str, where: str) -> None:
    classes = stage_tables()
    names = [*SHARED, "all", *classes]
    if table not in names:
        raise UsageError(f"{where}: there is no table {table!r}{nearest(table, names)}; tables are {', '.join(names)}")
    if table == "all":
        known = sorted({each.name for cls in classes.values() for each in fields(cls)} - {"network", "data"})
    else:
        cls = SHARED.get(table) or classes[table]
        known = [each.name for each in fields(cls) if each.name not in ("network", "data", "backbone")]
    if key not in known:
        raise UsageError(f"{where}: {table} has no field {key!r}{nearest(key, known)}; its fields are "
                         f"{', '.join(known)}")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return a hint at the known word that is most like this one; nothing if none is."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _override(tables: dict[str, dict[str, Value]], sets: typing.Sequence[str]) -> None:
    """Put ``TABLE.FIELD=VALUE`` over what a file says: ``all`` reaches every stage that is not named itself."""
    assigned = [_assignment(each) for each in sets]
    for _, name, _ in (each for each in assigned if each[0] == "all"):
        for table in stage_tables():
            tables.get(table, {}).pop(name, None)
    for table, name, value in assigned:
        tables.setdefault(table, {})[name] = Value(value, "--set")


def _assignment(text: str) -> tuple[str, str, Any]:
    """Return table, field and value of ``TABLE.FIELD=VALUE``. Raises ``UsageError``."""
    key, equals, written = text.partition("=")
    table, dot, name = key.strip().partition(".")
    if not equals or not dot:
        raise UsageError(f"--set {text}: write TABLE.FIELD=VALUE, such as train_rpn.lr=0.01")
    _require_field(table, name, f"--set {text}")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    return table, name, value


def _sources(text: str) -> dict[str, str]:
    """Return {"table.key": comment} of the lines ``key = value  # comment``; a table's own comment covers its keys."""
    sources, table = {}, ""
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            table = header[1]
        elif match := re.match(r"(\w+)\s*=\s*(?:\"[^\"]*\"|[^#\"]|\"[^\"]*\")*#\s*(.*)$", line):
            sources[f"{table}.{match[1]}"] = match[2].strip()
    return sources


def _build(cls: type, table: dict[str, Value], name: str) -> Any:
    return _construct(cls, {key: each.value for key, each in table.items()}, name)


def _construct(cls: type, given: dict[str, Any], table: str) -> Any:
    hints = _type_hints(cls)
    missing = [each.name for each in fields(cls)
               if each.name not in given and each.default is MISSING and each.default_factory is MISSING]
    if missing:
        raise UsageError(f"the recipe does not say {table}.{missing[0]}: add it, or --set {table}.{missing[0]}=...")
    values = {key: _converted(value, hints[key], f"{table}.{key}") for key, value in given.items()}
    for key, least in AT_LEAST.items():
        if key in values and values[key] < least:
            raise UsageError(f"{table}.{key} = {values[key]}: it is at least {least}")
    return cls(**values)


_type_hints = cache(typing.get_type_hints)


def _converted(value: Any, hint: Any, name: str) -> Any:
    """Return the value as the type of its field, or raise ``UsageError`` in the field's own words."""
    if is_dataclass(hint):
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UsageError(f"{name} = {value!r}{nearest(str(value), map(str, arguments))}: it is one of "
                         f"{', '.join(map(str, arguments))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_converted(each, arguments[0], name) for each in value)
        raise UsageError(f"{name} = {value!r}: it is a list, such as [1, 2]")
    if origin is types.UnionType:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{name} = {value!r}: it is of type {hint.__name__}")


def _shared_values(cls: type) -> dict[str, Value]:
    return {each.name: Value(each.default, each.metadata.get("source", "altopt's default")) for each in fields(cls)
            if each.default is not MISSING}


def describe_config(step: Step) -> str:
    """Return a stage's settings with their defaults and sources, a line each, for its help."""
    lines = [f"Settings (--set {step.table}.FIELD=VALUE), with py-faster-rcnn's values as defaults:"]
    for each in fields(step.config_class):
        if each.name not in ("network", "data", "backbone"):
            value = list(each.default) if isinstance(each.default, tuple) else each.default
            lines.append(f"  {each.name} = {json.dumps(value)}  ({each.metadata.get('source', '')})")
    return "\n".join(lines if len(lines) > 1 else ["It has no settings."])


def describe_recipes() -> dict[str, str]:
    """Return {name: description} of the recipes that come with altopt."""
    return {name: tomllib.loads(path.read_text(encoding="utf-8")).get("description", "")
            for name, path in packaged().items()}


def _table(name: str, values: dict[str, Value]) -> list[str]:
    lines = ["", f"[{name}]"]
    for key, each in values.items():
        assignment = f"{key} = {_toml(each.value)}"
        lines.append(f"{assignment:<44}# {each.source}" if each.source else assignment)
    return lines


def _toml(value: Any) -> str:
    """Return a value as TOML: JSON, but for infinity and NaN, and for characters beyond ASCII."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
