import json
import math
from dataclasses import asdict, dataclass, fields, replace

import pytest

from altopt.config import TORCHVISION_PIXELS, Pixels, TrainingConfig, bounds_of, out_of_bounds, setting
from altopt.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class Fence:
    count: int = setting(1, "here", at_least=0, at_most=9)
    share: float = setting(0.5, "here", above=0, below=1)
    low: float = setting(0.1, "here", at_least=0, at_most="share")
    names: tuple[str, ...] = setting(("a",), "here", non_empty=True, distinct=True)
    steps: tuple[int, ...] = setting((), "here", at_least=0, ascending=True)
    floor: float = setting(0.0, "here", infinite=True)
    free: bool = setting(True, "here")


@dataclass(frozen=True, kw_only=True)
class OtherDefault(Fence):
    count: int = setting(3, "there")


@pytest.mark.parametrize("values", [
    {"count": 0}, {"count": 9}, {"share": 0.1}, {"low": 0.5}, {"low": 0.0}, {"names": ("a", "b")},
    {"steps": (0, 1, 7)}, {"floor": -math.inf}, {"floor": math.inf},
])
def test_what_is_within_the_bounds(values):
    assert out_of_bounds(Fence(**values)) is None


@pytest.mark.parametrize(("values", "words"), [
    ({"count": -1}, "count must be at least 0 (it is -1)"),
    ({"count": 10}, "count must be at most 9 (it is 10)"),
    ({"share": 0.0}, "share must be above 0 (it is 0.0)"),
    ({"share": 1.0}, "share must be below 1 (it is 1.0)"),
    ({"share": math.nan}, "share must be a finite number (it is nan)"),
    ({"share": math.inf}, "share must be a finite number (it is inf)"),
    ({"floor": math.nan}, "floor must be a finite number (it is nan)"),
    ({"low": 0.6}, "low must be at most share (it is 0.6, share is 0.5)"),
    ({"names": ()}, "names must name at least one (it is empty)"),
    ({"names": ("b", "b")}, "names must name each once (it holds b twice)"),
    ({"steps": (2, 1)}, "steps must ascend (it is [2, 1])"),
    ({"steps": (1, 1)}, "steps must ascend (it is [1, 1])"),
    ({"steps": (-1,)}, "steps must be at least 0 (it holds -1)"),
])
def test_what_is_not(values, words):
    assert out_of_bounds(Fence(**values)) == words


def test_another_default_keeps_the_bounds():
    assert bounds_of(OtherDefault, "count") == {"at_least": 0, "at_most": 9}
    assert out_of_bounds(OtherDefault(count=-1)) == "count must be at least 0 (it is -1)"
    assert next(each for each in fields(OtherDefault) if each.name == "count").metadata["source"] == "there"


def test_field_without_bounds():
    assert bounds_of(Fence, "free") == {}


def test_visits_of_an_image_decide_the_iterations():
    config = TrainingConfig(visits=4, images_per_batch=2, warmup=200, iterations=7)
    assert (config.for_images(300).iterations, config.for_images(300).warmup) == (600, 120)
    assert (config.for_images(10_000).iterations, config.for_images(10_000).warmup) == (20_000, 200)
    assert config.for_images(0).iterations == 1
    assert replace(config, visits=0.0).for_images(300).iterations == 7


@pytest.mark.parametrize("held", [
    [], {"order": "GBR"}, {"mean": [0.5]}, {"std": [1, 1, 0]}, {"scale": "255"}, {"gamma": 2}, {"mean": [1, 2, "x"]},
    {"std": [1, 1, float("nan")]}, None])
def test_pixels_that_cannot_be(held):
    with pytest.raises(ArtifactError, match="which cannot be: make it again"):
        Pixels.of({"pixels": held})


def test_pixels_of_a_description():
    assert Pixels.of({}) == TORCHVISION_PIXELS
    assert Pixels.of({"pixels": json.loads(json.dumps(asdict(Pixels("BGR", 1.0))))}) == Pixels("BGR", 1.0)
