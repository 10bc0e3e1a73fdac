"""The recipe for photographs: what it leaves open is found in the data root, and stays in the run's own recipe."""

from dataclasses import replace
from pathlib import Path

import pytest
from own_photographs import beside, photographs
from tiny_runs import open_tiny

from altopt.config import TrainingConfig
from altopt.errors import DataError, UsageError
from stages.pipeline.evaluation import next_step
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run


def test_format_and_splits_are_found(tmp_path):
    root = photographs(tmp_path / "mine", train="ab", test="c")
    recipe = read_recipe("photos").with_data_of(root)
    assert (recipe.data.format, recipe.data.train, recipe.data.test) == ("voc", ("train",), ("test",))
    assert recipe.sources["data", "format"] == f"found in {root}: VOC with lists: train to train, test to test"
    assert "auto" not in recipe.text().replace("data root", "")
    again = read_recipe("photos", ('data.test=["train"]',)).with_data_of(root)  # what is said is not looked up
    assert (again.data.train, again.data.test) == (("train",), ("train",))
    assert again.sources["data", "test"] == "--set"


def test_splits_that_are_named_need_no_lists(tmp_path):
    root = beside(tmp_path / "mine", "ab")
    with pytest.raises(DataError, match=rf"altopt split --data-root {root}"):
        read_recipe("photos").with_data_of(root)
    named = read_recipe("photos", ('data.train=["./"]', 'data.test=["./"]')).with_data_of(root)
    assert (named.data.format, named.data.train) == ("voc", ("./",))


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DataError, match="holds no data set that altopt knows"):
        read_recipe("photos").with_data_of(tmp_path)
    with pytest.raises(DataError, match="give the data set's with --data-root"):
        read_recipe("photos").with_data_of(tmp_path / "nowhere")


def test_other_recipes_are_left_alone(tmp_path):
    recipe = read_recipe("shapes")
    assert recipe.with_data_of(tmp_path) is recipe


def test_commands_find_it_too(altopt, workplace):
    root = photographs(workplace / "mine", train="ab", test="c")
    shown = altopt("plan", "--recipe", "photos", "--data-root", str(root))
    assert (shown.code, "M5" in shown.out) == (0, True)
    checked = altopt("check-data", "--data-root", str(root))
    assert checked.code == 0
    assert checked.out.startswith(f"{root}: VOC with lists: train to train, test to test")
    (workplace / "empty").mkdir()
    assert altopt("plan", "--recipe", "photos", "--data-root", str(workplace / "empty")).code == 3


def test_auto_needs_a_data_root():
    from altopt.datasets.opening import open_dataset

    with pytest.raises(UsageError, match="which is looked up in a data root"):
        open_dataset(read_recipe("photos").data, "train", None)


@pytest.mark.parametrize(("sets", "message"), [
    (("train_rpn.iterations=5",), "iterations says nothing beside train_rpn.visits, which the recipe has ("),
    (("all.iterations=5", "train_fast_rcnn.visits=0"), "train_rpn.iterations says nothing beside train_rpn.visits"),
    (("train_rpn.iterations=5", "train_rpn.visits=5"), "says nothing beside train_rpn.visits: set the latter"),
    (("all.visits=1e12",), "visits must be at most 10000"),
])
def test_a_length_that_is_said_twice_or_cannot_be(sets, message):
    with pytest.raises(UsageError) as caught:
        read_recipe("photos", sets)
    assert message in str(caught.value)


def test_iterations_in_the_place_of_visits():
    recipe = read_recipe("photos", ("train_rpn.iterations=5", "train_rpn.visits=0"))
    config = recipe.config(recipe.steps[1])
    assert isinstance(config, TrainingConfig)
    assert config.for_images(300).iterations == 5


def test_what_to_do_next(tmp_path):
    run = open_tiny(tmp_path / "runs" / "tiny")
    assert next_step(run) == ""  # nobody has photographs of drawn shapes
    found = read_recipe("photos").with_data_of(photographs(tmp_path / "mine", train="ab", test="c"))
    words = next_step(Run(Path("runs/cats"), found, run.runtime))
    assert words.startswith("Go on with: altopt predict M5 IMAGES --run cats, or altopt export M5 --run cats")
    region_based = replace(found, header=found.header | {"scheme": "fast-rcnn"})
    assert next_step(Run(Path("runs/cats"), region_based, run.runtime)) == ""
