import ast
import inspect
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import stages
from stages import ALTERNATING, DETECTIONS, PRETRAINED, SCHEMES

STEPS = [*PRETRAINED, *(step for lists in (SCHEMES, DETECTIONS) for steps in lists.values() for step in steps)]
EACH_STAGE = pytest.mark.parametrize("step", {step.name: step for step in STEPS}.values(), ids=lambda step: step.name)


def test_alternating_optimisation_as_the_slides_have_it():
    assert [(step.output, step.name, *step.inputs) for step in ALTERNATING] == [
        ("M1", "train_rpn", "M0"),
        ("P1", "generate_proposals", "M1"),
        ("M2", "train_fast_rcnn", "M0", "P1"),
        ("M3", "train_rpn_frozen_conv", "M2"),
        ("P2", "generate_proposals", "M3"),
        ("M4", "train_fast_rcnn_frozen_conv", "M3", "P2"),
        ("M5", "add_rpn_layers", "M4", "M3"),
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_is_made_before_it_is_used(scheme):
    made = {"M0"}
    for step in [*SCHEMES[scheme], *DETECTIONS[scheme]]:
        assert set(step.inputs) <= made
        assert step.output not in made
        made.add(step.output)


def test_every_scheme_ends_in_detections():
    assert list(SCHEMES) == list(DETECTIONS)
    assert all(steps[-1].output.startswith("D") for steps in DETECTIONS.values())


def test_m0_comes_from_nothing():
    assert {(step.output, step.inputs) for step in PRETRAINED} == {("M0", ())}


def test_schemes_are_plain_lists_and_nothing_else():
    docstring, *body = ast.parse(Path(stages.__file__).read_text()).body
    assert isinstance(docstring, ast.Expr)
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    assert all(isinstance(node, ast.Assign | ast.ImportFrom) for node in body)
    lists = [node.value for node in assigned if not isinstance(node.value, ast.Dict)]
    by_name = [value for node in assigned if isinstance(node.value, ast.Dict) for value in node.value.values]
    lists += [value for value in by_name if not isinstance(value, ast.Name)]
    for value in lists:
        assert isinstance(value, ast.List)
        for element in value.elts:
            assert isinstance(element, ast.Call)
            assert isinstance(element.func, ast.Name)
            assert element.func.id == "Step"


@EACH_STAGE
def test_stage_is_a_function_of_its_inputs_output_config_and_runtime(step):
    parameters = inspect.signature(step.stage).parameters.values()
    inputs = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert len(inputs) == len(step.inputs)
    assert [each.name for each in parameters if each.kind is each.KEYWORD_ONLY] == ["out", "config", "runtime"]
    assert all(each.default is each.empty for each in parameters)
    assert step.summary.endswith(".")


@EACH_STAGE
def test_config_is_frozen_versioned_and_every_default_has_a_source(step):
    config = step.config_class
    assert is_dataclass(config)
    assert vars(config)["__dataclass_params__"].frozen
    assert isinstance(inspect.getattr_static(config, "version"), int)
    own = [each for each in fields(config) if each.name not in ("network", "data", "backbone")]
    assert [each.name for each in own if not each.metadata.get("source")] == []


def test_stages_that_read_a_split_say_which():
    splits = {step.name: getattr(step.config_class, "split", None) for step in STEPS}
    assert {name for name, split in splits.items() if split == "test"} == {
        "detect_shared", "detect_unshared", "detect_on_proposals", "detect_spp_net", "detect_rcnn", "detect_with_svms",
        "selective_search_test"}
    assert {name for name, split in splits.items() if split is None} == {
        "load_imagenet_weights", "add_rpn_layers", "train_svms", "train_regressors"}
    for step in STEPS:
        assert ("data" in typing.get_type_hints(step.config_class)) == (splits[step.name] is not None)
