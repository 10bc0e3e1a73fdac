"""Files that list what to compare."""

from pathlib import Path

import pytest

from altopt.errors import UsageError
from stages.pipeline.comparison import Variant, chosen_variants, read_variants
from stages.pipeline.recipe import read_recipe


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.toml"


def test_variants_come_in_the_order_of_the_file(file):
    file.write_text("""
[z]
scheme = "fast-rcnn"

["a.b"]
scheme = "rcnn"
set = ["all.lr=0.1", 'data.train=["x"]']
""")
    assert read_variants(file) == [
        Variant("z", "fast-rcnn"), Variant("a.b", "rcnn", ("all.lr=0.1", 'data.train=["x"]'))]


def test_schemes_as_they_are():
    assert chosen_variants("rcnn,spp-net,rcnn") == [Variant("rcnn", "rcnn"), Variant("spp-net", "spp-net")]


@pytest.mark.parametrize(("text", "message"), [
    ("", "names nothing to compare"),
    ("[mine", "cannot be read as TOML"),
    ("mine = 1", r"\[mine\] stands outside of a table"),
    ("[mine]", r"\[mine\] does not say of which scheme it is one"),
    ('[mine]\nscheme = "fastrcnn"', r"did you mean 'fast-rcnn'\?"),
    ('[mine]\nscheme = "rcnn"\nsets = []', r"has no field 'sets' \(did you mean 'set'\?\)"),
    ('[mine]\nscheme = "rcnn"\nset = "all.lr=1"', "set must be a list of texts"),
    ('[mine]\nscheme = "rcnn"\nset = [1]', "set must be a list of texts"),
    ('["../mine"]\nscheme = "rcnn"', "must be the name of a folder"),
    ('["a b"]\nscheme = "rcnn"', "must be the name of a folder"),
])
def test_files_that_cannot_be(file, text, message):
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_variants(file)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no\.toml cannot be read"):
        read_variants(tmp_path / "no.toml")


def test_ablations_of_fast_rcnn_are_what_recipes_know():
    variants = read_variants(Path(__file__).parents[3] / "benchmarks" / "fast_rcnn_ablations.toml")
    assert len(variants) == 8
    for variant in variants:
        assert read_recipe("shapes", variant.sets, variant.scheme).scheme == variant.scheme
