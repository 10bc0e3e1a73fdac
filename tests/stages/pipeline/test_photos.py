"""The recipe for photographs: what it leaves open is found in the data root, and stays in the run's own recipe."""

import pytest
from own_photographs import beside, photographs

from altopt.errors import DataError, UsageError
from stages.pipeline.recipe import read_recipe


def test_format_and_splits_are_found(tmp_path):
    root = photographs(tmp_path / "mine", train="ab", test="c")
    recipe = read_recipe("photos").with_data_of(root)
    assert (recipe.data.format, recipe.data.train, recipe.data.test) == ("voc", ("train",), ("test",))
    assert recipe.sources["data", "train"] == f"found in {root}: VOC with lists: train to train, test to test"
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
