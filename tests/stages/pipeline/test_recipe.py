import json
import math
import re
import sys
import tomllib
from dataclasses import fields

import pytest
from tiny_runs import TINY, config_as, write_recipe

from altopt.config import bounds_of
from altopt.errors import UsageError
from stages import PRETRAINED, SCHEMES
from stages.pipeline.recipe import (
    FILLED_IN,
    SHARED,
    Value,
    describe_recipes,
    describe_settings,
    packaged,
    read_recipe,
    stage_tables,
)
from stages.shared.detection import Detect
from stages.steps.pretrained import LoadImageNetWeights
from stages.steps.rcnn import DetectRCNN

PACKAGED = pytest.mark.parametrize("path", packaged().values(), ids=packaged())
# A plain type: mypy takes no protocol's class for hashable.
TABLES: dict[str, type] = {**SHARED, **stage_tables()}
SETTING = re.compile(r"\w+ = ")


@pytest.fixture
def tiny(tmp_path):
    path = write_recipe(tmp_path / "tiny.toml")
    return lambda *sets: read_recipe(str(path), sets)


def configs(recipe):
    return [recipe.config(step) for step in [*recipe.steps, *recipe.detections]]


def step_of(recipe, output):
    return next(step for step in recipe.steps if step.output == output)


def settings_of(recipe, output):
    step = step_of(recipe, output)
    return recipe.values(step.config_class, step.table)


def config_of(recipe, output):
    return recipe.config(step_of(recipe, output))


def refused(tmp_path, text, *sets):
    path = write_recipe(tmp_path / "other.toml", text)
    with pytest.raises(UsageError) as caught:
        read_recipe(str(path), sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


@PACKAGED
def test_packaged_recipe_is_whole(path):
    recipe = read_recipe(path.stem)
    assert recipe.name
    assert len(configs(recipe)) == 10
    assert describe_recipes()[path.stem]


@PACKAGED
def test_every_setting_of_a_packaged_recipe_has_a_source(path):
    table = ""
    settings = []
    for line in path.read_text(encoding="utf-8").splitlines():
        table = line if line.startswith("[") else table
        if table and SETTING.match(line):
            settings.append(line)
    assert settings
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    assert len(settings) == sum(len(values) for values in content.values() if isinstance(values, dict))
    sources = read_recipe(path.stem).sources
    assert len(sources) == len(settings)
    assert [key for key, source in sources.items() if not source] == []


@PACKAGED
def test_every_setting_of_a_resolved_recipe_has_a_source(path):
    tables = read_recipe(path.stem).text().split("\n[", 1)[1]
    settings = [line for line in tables.splitlines() if SETTING.match(line)]
    assert len(settings) > 80
    assert [line for line in settings if not re.search(r"# .", line)] == []


@PACKAGED
def test_resolved_text_says_the_same(path, tmp_path):
    recipe = read_recipe(path.stem)
    again = read_recipe(str(write_recipe(tmp_path / f"{path.stem}.toml", recipe.text())))
    assert configs(again) == configs(recipe)
    assert json.dumps(again.as_dict()) == json.dumps(recipe.as_dict())
    assert again.text() == recipe.text()
    assert (again.name, again.header) == (recipe.name, recipe.header)


def test_settings_with_odd_values_keep_their_text_and_source(tmp_path, tiny):
    recipe = tiny("train_rpn.lr=1e30", "train_fast_rcnn.freeze=[]", 'data.train=["a:1", "b:2"]',
                  "train_fast_rcnn.init=M1")
    again = read_recipe(str(write_recipe(tmp_path / "again.toml", recipe.text())))
    assert configs(again) == configs(recipe)
    assert json.dumps(again.as_dict()) == json.dumps(recipe.as_dict())
    assert settings_of(again, "M1")["lr"] == Value(1e30, "--set")


def test_infinity_where_it_has_a_meaning(tmp_path):
    path = str(write_recipe(tmp_path / "tiny.toml"))
    recipe = read_recipe(path, ["detect_rcnn.score=-inf"], "rcnn")
    assert config_as(DetectRCNN, recipe, recipe.detections[-1]).score == -math.inf
    again = read_recipe(str(write_recipe(tmp_path / "again.toml", recipe.text())))
    assert configs(again) == configs(recipe)


def test_comments_are_read_only_where_they_are_asked_for(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomlkit", None)  # an import of it fails
    recipe = tiny("train_rpn.lr=0.5")
    assert len(configs(recipe)) == 10
    with pytest.raises(ImportError):
        recipe.text()


def test_comment_behind_a_list_of_several_lines_is_its_source(tmp_path):
    text = TINY.replace("lr_steps = [3]              # before", "lr_steps = [\n  3,  # not this one\n]  # before")
    recipe = read_recipe(str(write_recipe(tmp_path / "lines.toml", text)))
    assert settings_of(recipe, "M1")["lr_steps"] == Value([3], "before the last one")


def test_words_of_older_recipes(tmp_path):
    text = TINY + '[detect]\nper_picture = 7  # few\n[train_fast_rcnn_frozen_conv]\noutputs = "draw-anew"  # old\n'
    recipe = read_recipe(str(write_recipe(tmp_path / "old.toml", text)))
    assert config_as(Detect, recipe, recipe.detections[-1]).per_image == 7
    assert recipe.resolved()["detect"]["per_image"] == Value(7, "few")
    assert settings_of(recipe, "M4")["outputs"] == Value("re-initialise", "old")
    assert read_recipe(str(tmp_path / "old.toml"), ["detect.per_picture=8"]).tables["detect"]["per_image"] == 8


def test_title_with_odd_characters_keeps_its_text(tmp_path):
    text = TINY.replace('"tiny"', r'"a \"b\" # \\ c \u00e9 \U0001f600 \u007f"')
    recipe = read_recipe(str(write_recipe(tmp_path / "odd.toml", text)))
    assert recipe.name == 'a "b" # \\ c \u00e9 \U0001f600 \x7f'
    assert read_recipe(str(write_recipe(tmp_path / "again.toml", recipe.text()))).header == recipe.header


def test_own_table_comes_before_all_and_all_before_the_default(tiny):
    recipe = tiny("train_rpn.lr=0.5")
    assert config_of(recipe, "M1").lr == 0.5
    assert config_of(recipe, "M2").lr == 0.001
    assert config_of(recipe, "M2").momentum == 0.9
    values = settings_of(recipe, "M1")
    assert values["lr"] == Value(0.5, "--set")
    assert values["iterations"] == Value(4, "few")
    assert values["sigma"].source.startswith("py-faster-rcnn train.pt")


def test_table_of_a_pretraining_chooses_it(tmp_path, tiny):
    assert tiny().pretrained is PRETRAINED[1]
    text = TINY.partition("[pretrain_on_crops]")[0].replace('"small"', '"squeezenet1_1"')
    recipe = read_recipe(str(write_recipe(tmp_path / "other.toml", text)))
    assert recipe.pretrained is PRETRAINED[0]
    assert config_as(LoadImageNetWeights, recipe, recipe.pretrained).backbone == "squeezenet1_1"


def test_name_is_the_title_or_the_file(tmp_path, tiny):
    assert tiny().name == "tiny"
    untitled = write_recipe(tmp_path / "mine.toml", TINY.replace('title = "tiny"\n', ""))
    assert read_recipe(str(untitled)).name == "mine"


@pytest.mark.parametrize(("assignment", "output", "field", "value"), [
    ("train_rpn.lr=1", "M1", "lr", 1.0),
    ("train_rpn.iterations = 7", "M1", "iterations", 7),
    ("train_rpn.flips=false", "M1", "flips", False),
    ("train_rpn.schedule=one-cycle", "M1", "schedule", "one-cycle"),
    ('train_rpn.schedule="one-cycle"', "M1", "schedule", "one-cycle"),
    ("train_rpn.lr_steps=[1, 2]", "M1", "lr_steps", (1, 2)),
    ("train_rpn.freeze=[]", "M1", "freeze", ()),
    ("train_fast_rcnn.init=M1", "M2", "init", "M1"),
    ("all.seed=9", "M4", "seed", 9),
])
def test_set_converts_to_the_type_of_the_field(tiny, assignment, output, field, value):
    found = getattr(config_of(tiny(assignment), output), field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("sets", [
    ("all.iterations=7",),
    ("all.iterations=9", "all.iterations=7"),
    ("train_rpn.iterations=3", "all.iterations=7"),
    ("all.iterations=7", "train_rpn.iterations=3"),
])
@pytest.mark.parametrize("resolved", [False, True])
def test_set_for_all_reaches_every_stage_that_is_not_named(tmp_path, tiny, sets, resolved):
    path = write_recipe(tmp_path / "tiny.toml", tiny().text() if resolved else TINY)
    recipe = read_recipe(str(path), sets)
    trained = ("M0", "M1", "M2", "M3", "M4")
    expected = dict.fromkeys(trained, 7) | ({"M1": 3} if "train_rpn.iterations=3" in sets else {})
    assert {output: config_of(recipe, output).iterations for output in trained} == expected
    assert read_recipe(str(path)).as_dict() == tiny().as_dict()


@pytest.mark.parametrize(("assignment", "message"), [
    ("train_rpn.lr=fast", r"train_rpn.lr must be a number \(it is 'fast'\)"),
    ("train_rpn.lr=true", r"train_rpn.lr must be a number \(it is True\)"),
    ("train_rpn.iterations=1.5", r"train_rpn.iterations must be a whole number \(it is 1.5\)"),
    ("train_rpn.iterations=true", r"train_rpn.iterations must be a whole number \(it is True\)"),
    ("train_rpn.flips=1", r"train_rpn.flips must be true or false \(it is 1\)"),
    ("train_rpn.lr_steps=3", r"train_rpn.lr_steps must be a list, such as \[1, 2\] \(it is 3\)"),
    ("train_rpn.lr_steps=[1.5]", r"train_rpn.lr_steps must be a whole number \(it is 1.5\)"),
    ("train_rpn.init=2020-01-01", "train_rpn.init must be a text"),
    ("train_rpn.schedule=stepp", r"train_rpn.schedule must be one of step, one-cycle \(it is 'stepp'\)"),
    ("network.name=smal", "network.name must be one of vgg16, alexnet, squeezenet1_1, small"),
    ("train_rpn.lr", "--set train_rpn.lr: write TABLE.FIELD=VALUE"),
    ("lr=0.1", "--set lr=0.1: write TABLE.FIELD=VALUE"),
    ("train_rpn.lrr=0.1", r"train_rpn has no field 'lrr' \(did you mean 'lr'\?\); its fields are precision, "),
    ("trian_rpn.lr=0.1", r"no table 'trian_rpn' \(did you mean 'train_rpn'\?\)"),
    ("all.sed=1", r"all has no field 'sed' \(did you mean 'seed'\?\)"),
    ("train_rpn.network=1", "train_rpn has no field 'network'"),
    ("data.traim=1", r"data has no field 'traim' \(did you mean 'train'\?\)"),
])
def test_set_that_cannot_be_understood(tiny, assignment, message):
    with pytest.raises(UsageError, match=message) as caught:
        tiny(assignment)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_understood(tmp_path):
    assert "did you mean 'train_rpn'?" in refused(tmp_path, TINY + "[train_rpm]\nlr = 1.0\n")
    assert "did you mean 'crop_side'?" in refused(tmp_path, TINY + "crop_size = 1\n")
    assert "is not valid TOML" in refused(tmp_path, "[data\n")
    assert "colour stands outside of a table" in refused(tmp_path, 'colour = "red"\n' + TINY)


def test_file_that_does_not_say_enough(tmp_path):
    text = TINY.replace('train = ["train:6"] ', "# ")
    assert "the recipe does not say data.train: add it, or --set data.train=..." in refused(tmp_path, text)


def test_file_that_is_not_there():
    with pytest.raises(UsageError, match=r"no recipe 'shaps' \(did you mean 'shapes'\?\): choose one of .*shapes"):
        read_recipe("shaps")


def test_file_that_begins_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "marked.toml"
    path.write_text(TINY, encoding="utf-8-sig")
    assert read_recipe(str(path)).written == TINY


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed.toml").touch()
    monkeypatch.setattr(type(tmp_path), "read_text", refuse)
    with pytest.raises(UsageError, match=r"closed\.toml cannot be read: Permission denied: check its permissions"):
        read_recipe(str(tmp_path / "closed.toml"))


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.toml"):
        read_recipe(str(path))


def out_of_bounds(recipe):
    """An assignment for every bound of every field of every table, just outside it, and the words that say so."""
    for table, cls in TABLES.items():
        values = vars(recipe.build(cls, table))
        for name, value in values.items():
            bounds = bounds_of(cls, name)
            written = "[{}]".format if isinstance(value, tuple) else str
            for word, step in (("at_least", -1), ("above", 0), ("at_most", 1), ("below", 0)):
                limit = bounds.get(word)
                if limit is not None:
                    number = values[limit] if isinstance(limit, str) else limit
                    assert isinstance(number, int | float)
                    yield table, name, written(number + step), f"be {word.replace('_', ' ')} {limit}"
            if isinstance(value, float):
                yield table, name, "nan", "be a finite number"
                if not bounds.get("infinite"):
                    yield table, name, "inf", "be a finite number"
            one = '"a"' if isinstance(value, tuple) and not bounds.keys() & {"at_least", "above"} else "64"
            if bounds.get("non_empty"):
                yield table, name, "[]", "name at least one"
            if bounds.get("distinct"):
                yield table, name, f"[{one}, {one}]", "name each once"
            if bounds.get("ascending"):
                yield table, name, "[2, 1]", "ascend"


def test_every_value_outside_its_bounds_is_refused(tmp_path):
    path = str(write_recipe(tmp_path / "tiny.toml"))
    found = list(out_of_bounds(read_recipe(path)))
    assert len(found) > 400
    for table, name, value, words in found:
        with pytest.raises(UsageError) as caught:
            read_recipe(path, [f"{table}.{name}={value}"])
        message = str(caught.value)
        own, of_another = f"{table}.{name} must {words}", f", {name} is {value})"
        assert message.startswith(own) or message.endswith(of_another), message
        assert "\n" not in message


def test_every_number_and_every_list_has_bounds():
    free = {(table, each.name) for table, cls in TABLES.items() for each in fields(cls)
            if not bounds_of(cls, each.name) and each.name not in FILLED_IN
            and type(each.default) not in (str, bool) and each.name != "format"}
    assert free == set()


@pytest.mark.parametrize(("assignment", "message"), [
    ("train_rpn.iterations=-5", "train_rpn.iterations must be at least 0 (it is -5)"),
    ("train_rpn.lr=-1", "train_rpn.lr must be above 0 (it is -1.0)"),
    ("train_rpn.lr=nan", "train_rpn.lr must be a finite number (it is nan)"),
    ("train_rpn.momentum=2", "train_rpn.momentum must be below 1 (it is 2.0)"),
    ("train_fast_rcnn.dropout=1.5", "train_fast_rcnn.dropout must be below 1 (it is 1.5)"),
    ("train_fast_rcnn.fg_fraction=7", "train_fast_rcnn.fg_fraction must be at most 1 (it is 7.0)"),
    ("train_rpn.positive_iou=70", "train_rpn.positive_iou must be at most 1 (it is 70.0)"),
    ("train_rpn.negative_iou=0.8",
     "train_rpn.negative_iou must be at most positive_iou (it is 0.8, positive_iou is 0.7)"),
    ("train_fast_rcnn.bg_iou_low=0.5",
     "train_fast_rcnn.bg_iou_low must be below bg_iou_high (it is 0.5, bg_iou_high is 0.5)"),
    ("generate_proposals.nms=2.0", "generate_proposals.nms must be at most 1 (it is 2.0)"),
    ("network.anchor_scales=[]", "network.anchor_scales must name at least one (it is empty)"),
    ("network.anchor_scales=[1, -1]", "network.anchor_scales must be above 0 (it holds -1.0)"),
    ("network.max_side=20", "network.max_side must be at least short_side (it is 20, short_side is 80)"),
    ('data.classes=["a", "a"]', "data.classes must name each once (it holds a twice)"),
    ("train_rpn.lr_steps=[3, 1]", "train_rpn.lr_steps must ascend (it is [3, 1])"),
    ("train_fast_rcnn.scales=[4000]", "train_fast_rcnn.scales must be at most max_side (it holds 4000, max_side is "
                                      "2000)"),
    ("train_fc_layers.lr=-1", "train_fc_layers.lr must be above 0 (it is -1.0)"),  # a stage of another scheme
    ("all.lr=-1", "pretrain_on_crops.lr must be above 0 (it is -1.0)"),
    ('train_rpn.freeze=["conv9"]', "train_rpn.freeze: there is no layer 'conv9': blocks are conv1, conv2, "),
    ("train_rpn.visits=3", 'train_rpn.visits leaves the number of iterations open, and lr_steps count them: set '
                           'train_rpn.schedule to "one-cycle"'),
    ("train_fast_rcnn.init=M9", "train_fast_rcnn.init must be M0 or M1 (the networks made before M2); it is 'M9'"),
])
def test_values_that_make_no_sense(tiny, assignment, message):
    with pytest.raises(UsageError) as caught:
        tiny(assignment)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2


def test_settings_in_help_name_value_default_and_sources(tiny):
    recipe = tiny("train_rpn.momentum=0.5")
    lines = describe_settings(step_of(recipe, "M1"), recipe).splitlines()
    assert "--set train_rpn.FIELD=VALUE" in lines[0]
    assert any(re.match(r"  iterations = 4  \(few\); default 80000 \(.*solver.*\)", line) for line in lines)
    assert any(re.match(r"  momentum = 0\.5  \(--set\); default 0\.9 \(", line) for line in lines)
    assert any(line == "  lr = 0.001  (low)" for line in lines)
    assert '  freeze = ["conv1", "conv2"]  (py-faster-rcnn' in "\n".join(lines)
    assert describe_settings(step_of(recipe, "M5"), recipe) == "It has no settings."


def test_dictionary_is_plain_json(tiny):
    content = tiny().as_dict()
    assert content["train_rpn"]["lr"] == {"value": 0.001, "source": "low"}
    assert json.loads(json.dumps(content))["network"]["name"]["value"] == "small"


def test_protocol_is_checked_before_anything_is_trained(tmp_path):
    message = refused(tmp_path, 'protocol = "voc7"\n' + TINY)
    assert message == "protocol must be one of voc07, voc10, coco (it is 'voc7')"


@pytest.mark.parametrize("name", ["shapes", "voc07-squeezenet-mini"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_recipes_for_laptops_are_short_in_every_scheme(name, scheme):
    recipe = read_recipe(name, (), scheme)
    assert sum(getattr(recipe.config(step), "iterations", 0) for step in recipe.steps) < 15_000
