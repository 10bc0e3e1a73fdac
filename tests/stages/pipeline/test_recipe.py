import json
import re
import tomllib

import pytest
from tiny_runs import TINY, write_recipe

from altopt.errors import UsageError
from stages import PRETRAINED, SCHEMES
from stages.pipeline.recipe import Value, describe_config, describe_recipes, packaged, read_recipe

PACKAGED = pytest.mark.parametrize("path", packaged().values(), ids=packaged())
SETTING = re.compile(r"\w+ = ")


@pytest.fixture
def tiny(tmp_path):
    path = write_recipe(tmp_path / "tiny.toml")
    return lambda *sets: read_recipe(str(path), sets)


def configs(recipe):
    return [recipe.config(step) for step in [*recipe.steps, *recipe.detections]]


def step_of(recipe, output):
    return next(step for step in recipe.steps if step.output == output)


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
    recipe = read_recipe(path.stem)
    given = [value for values in recipe.tables.values() for value in values.values()]
    assert len(given) == len(settings)
    assert [value for value in given if not value.source] == []


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
                  "train_fast_rcnn.init=M1", "train_rpn.clip_gradient=inf")
    again = read_recipe(str(write_recipe(tmp_path / "again.toml", recipe.text())))
    assert configs(again) == configs(recipe)
    assert json.dumps(again.as_dict()) == json.dumps(recipe.as_dict())
    assert again.tables["train_rpn"]["lr"] == Value(1e30, "--set")


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
    values = recipe.values(step_of(recipe, "M1"))
    assert values["lr"] == Value(0.5, "--set")
    assert values["iterations"] == Value(4, "few")
    assert values["sigma"].source.startswith("pfr train.pt")


def test_table_of_a_pretraining_chooses_it(tmp_path, tiny):
    assert tiny().pretrained is PRETRAINED[1]
    text = TINY.partition("[pretrain_on_crops]")[0].replace('"small"', '"squeezenet1_1"')
    recipe = read_recipe(str(write_recipe(tmp_path / "other.toml", text)))
    assert recipe.pretrained is PRETRAINED[0]
    assert recipe.config(recipe.pretrained).backbone == "squeezenet1_1"


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
    ("train_rpn.lr=fast", "train_rpn.lr = 'fast': it is of type float"),
    ("train_rpn.lr=true", "train_rpn.lr = True: it is of type float"),
    ("train_rpn.iterations=1.5", "train_rpn.iterations = 1.5: it is of type int"),
    ("train_rpn.iterations=true", "train_rpn.iterations = True: it is of type int"),
    ("train_rpn.flips=1", "train_rpn.flips = 1: it is of type bool"),
    ("train_rpn.lr_steps=3", r"train_rpn.lr_steps = 3: it is a list, such as \[1, 2\]"),
    ("train_rpn.lr_steps=[1.5]", "train_rpn.lr_steps = 1.5: it is of type int"),
    ("train_rpn.init=2020-01-01", "it is of type str"),
    ("train_rpn.schedule=stepp", r"did you mean 'step'\?\): it is one of step, one-cycle"),
    ("network.name=smal", r"did you mean 'small'\?"),
    ("train_rpn.lr", "--set train_rpn.lr: write TABLE.FIELD=VALUE"),
    ("lr=0.1", "--set lr=0.1: write TABLE.FIELD=VALUE"),
    ("train_rpn.lrr=0.1", r"train_rpn has no field 'lrr' \(did you mean 'lr'\?\); its fields are iterations, "),
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


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.toml"):
        read_recipe(str(path))


@pytest.mark.parametrize("assignment", ["train_rpn.images_per_batch=0", "train_rpn.iterations=-1",
                                        "generate_proposals.images_per_batch=0", "network.short_side=0"])
def test_numbers_that_make_no_sense(tiny, assignment):
    with pytest.raises(UsageError, match=assignment.partition("=")[0]):
        tiny(assignment)


def test_settings_in_help_name_default_and_source(tiny):
    lines = describe_config(step_of(tiny(), "M1")).splitlines()
    assert "--set train_rpn.FIELD=VALUE" in lines[0]
    assert any(re.match(r"  lr = 0\.001  \(.*solver.*\)", line) for line in lines)
    assert '  freeze = ["conv1", "conv2"]  (pfr' in "\n".join(lines)
    assert describe_config(step_of(tiny(), "M5")) == "It has no settings."


def test_dictionary_is_plain_json(tiny):
    content = tiny().as_dict()
    assert content["train_rpn"]["lr"] == {"value": 0.001, "source": "low"}
    assert json.loads(json.dumps(content))["network"]["name"]["value"] == "small"


def test_protocol_is_checked_before_anything_is_trained(tmp_path):
    message = refused(tmp_path, 'protocol = "voc7"\n' + TINY)
    assert message == "protocol = 'voc7' (did you mean 'voc07'?): it is one of voc07, voc10, coco"


@pytest.mark.parametrize("name", ["shapes", "voc07-squeezenet-mini"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_recipes_for_laptops_are_short_in_every_scheme(name, scheme):
    recipe = read_recipe(name, (), scheme)
    assert sum(getattr(recipe.config(step), "iterations", 0) for step in recipe.steps) < 15_000
