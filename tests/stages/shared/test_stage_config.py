from dataclasses import fields
from itertools import chain

import pytest

from stages import DETECTIONS, PRETRAINED, SCHEMES
from stages.shared.stage_config import ReadsData, StageConfig
from stages.shared.step import Step
from stages.steps.selective_search import search_step

STEPS = {step.name: step for step in chain(PRETRAINED, *SCHEMES.values(), *DETECTIONS.values(), [search_step("T0")])}
EACH_STEP = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def names(step: Step) -> set[str]:
    return {each.name for each in fields(step.config_class)}


@EACH_STEP
def test_every_config_has_what_is_asked_of_any(step):
    cls = step.config_class
    assert issubclass(cls, StageConfig)
    assert cls.version >= 1
    assert (cls.split is None) == (not issubclass(cls, ReadsData)) == ("data" not in names(step))
    assert (cls.split == "test") == step.output.startswith(("D", "T"))
    assert names(step).isdisjoint({"version", "table", "split", "divided", "stores_maps"})


def test_what_is_so_unless_a_stage_says_otherwise():
    plain = StageConfig()
    assert (plain.version, plain.table, plain.split, plain.divided, plain.stores_maps) == (1, "", None, False, False)
    assert (plain.init, plain.freeze, plain.scales) == ("", (), ())


def test_stages_on_frozen_conv_layers_freeze_all_and_have_no_choice():
    frozen = {name for name, step in STEPS.items() if vars(step.config_class).get("freeze") == "all"}
    assert frozen == {"train_rpn_frozen_conv", "train_fast_rcnn_frozen_conv", "train_box_layer", "train_fc_layers"}
    assert all("freeze" not in names(STEPS[name]) for name in frozen)
