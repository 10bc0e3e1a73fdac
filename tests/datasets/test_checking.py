import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from altopt.config import NetworkConfig
from altopt.datasets.checking import Finding, Look, compare_splits, look_deeper, some
from altopt.errors import DataError

NETWORK = NetworkConfig(name="small", short_side=240, max_side=320)


def look(**fields):
    sound = Look("VOC train", images=2, size_of={"a": (60, 40), "b": (60, 50)}, classes={"cat": 3, "dog": 1})
    return replace(sound, **{"findings": []} | fields)


def files(folder, **contents):
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.jpg" for name in contents}
    for name, path in paths.items():
        path.write_bytes(contents[name])
    return paths


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kinds(findings):
    return [(each.kind, each.severity) for each in findings]


def test_verdict_names_the_first_problem_and_counts_the_others():
    one, two, beware = Finding("k", "x: bad: mend it"), Finding("k", "y: bad"), Finding("k", "beware", "warning")
    with pytest.raises(DataError, match=r"^x: bad: mend it$"):
        look(findings=[one, beware]).verdict()
    with pytest.raises(DataError, match=r"^x: bad: mend it; 1 more problem in VOC train \(altopt check-data lists all"):
        look(findings=[one, two, beware]).verdict()
    with pytest.raises(DataError, match="; 2 more problems in"):
        look(findings=[one, two, two]).verdict()
    assert look(findings=[beware]).verdict() == ["beware"]


@pytest.mark.parametrize(("fields", "line"), [
    ({}, "VOC train: 2 images of 60 x 40-50, 4 objects (cat 3, dog 1)"),
    ({"difficult": 1, "crowd": 2, "empty": 1},
     "VOC train: 2 images of 60 x 40-50, 4 objects (cat 3, dog 1), 1 difficult, 2 crowd, 1 image without any"),
    ({"images": 1, "size_of": {"a": (60, 40)}, "classes": {"cat": 0}}, "VOC train: 1 image of 60 x 40, 0 objects"),
    ({"images": 0, "size_of": {}, "classes": {}}, "VOC train: 0 images, 0 objects"),
    ({"classes": None}, "VOC train: 2 images of 60 x 40-50"),
])
def test_the_line_of_a_split(fields, line):
    assert look(**fields).line() == line


@pytest.mark.parametrize("fields", [
    {"classes": {"cat": 0}}, {"classes": {}}, {"difficult": 4}, {"difficult": 3, "crowd": 1}])
def test_nothing_that_counts(fields):
    train, test = look(**fields), look(**fields)
    look_deeper(train, "train", [NETWORK])
    look_deeper(test, "test", [NETWORK])
    assert kinds(train.findings) == [("nothing to train on", "problem")]
    assert kinds(test.findings) == [("nothing to score", "warning")]
    with pytest.raises(DataError, match=r"^VOC train has nothing to train on"):
        train.verdict()


def test_classes_without_objects_are_named():
    without = {f"class {number}": 0 for number in range(5)}
    found = look(classes={"cat": 1} | without)
    look_deeper(found, "test", [NETWORK])
    assert [each.text for each in found.findings] == [
        "VOC train has no object to score of class 0, class 1, class 2 and 2 more"]


def test_a_split_with_problems_is_not_looked_at_as_a_whole():
    found = look(findings=[Finding("k", "bad")], classes={})
    look_deeper(found, "train", [NETWORK])
    assert [each.text for each in found.findings] == ["bad"]


@pytest.mark.parametrize(("size", "taken"), [
    ((1000, 8), False), ((8, 1000), False), ((320, 15), False), ((320, 16), True), ((3, 3), True),
    ((100_000, 10), False),
])
@pytest.mark.parametrize("name", ["small", "vgg16", "squeezenet1_1", "alexnet"])
def test_images_that_the_network_cannot_take(size, taken, name):
    found = look(size_of={"a": (60, 40), "b": size}, paths={"b": Path("b.jpg")})
    look_deeper(found, "train", [replace(NETWORK, name=name)])
    assert kinds(found.findings) == ([] if taken else [("image too thin for the network", "problem")])
    if not taken:
        assert f"b.jpg has {size[0]} x {size[1]} pixels" in found.findings[0].text


def test_every_frame_is_asked():
    found = look(size_of={"a": (400, 20)})
    look_deeper(found, "train", [replace(NETWORK, max_side=400), NETWORK])
    assert "scaled 320 x 16" not in str(found.findings)
    assert not found.findings
    look_deeper(found, "train", [replace(NETWORK, max_side=400), replace(NETWORK, short_side=100, max_side=200)])
    assert "scaled 200 x 10" in found.findings[0].text


def test_images_in_both_splits_are_found_by_path_and_by_bytes(tmp_path):
    here = files(tmp_path / "here", a=b"one", b=b"two")
    there = files(tmp_path / "there", c=b"two", d=b"six", e=b"longer")
    same = compare_splits(look(paths=here), look(paths={**there, "a": here["a"]}, images=4), digest)
    assert kinds(same) == [("images in both splits", "warning")]
    assert same[0].text.startswith(f"2 of 4 test images are training images too, the first is {there['c']}, the same "
                                   f"bytes as {here['b']}: ")
    linked = tmp_path / "linked.jpg"
    linked.symlink_to(here["a"])
    assert "1 of 2 test images" in compare_splits(look(paths=here), look(paths={"z": linked}), digest)[0].text
    assert compare_splits(look(paths=here), look(paths={"d": there["d"], "e": there["e"]}), digest) == []


def test_only_files_of_equal_length_are_hashed(tmp_path):
    here, there = files(tmp_path / "here", a=b"one"), files(tmp_path / "there", b=b"longer")

    def refuse(path):
        raise AssertionError(path)

    assert compare_splits(look(paths=here), look(paths=there), refuse) == []


@pytest.mark.parametrize(("names", "alike"), [
    (("red", "Red"), True), (("traffic light", "traffic_light"), True), (("T-Shirt", "t shirt"), True),
    (("red", "bed"), False), (("+", "-"), False), (("größe", "GRÖSSE"), True),
])
def test_class_names_that_differ_by_case_only(names, alike):
    train, test = look(classes={names[0]: 3, "other": 1}), look(classes={names[1]: 1})
    found = compare_splits(train, test, digest)
    assert len(found) == alike
    if alike:
        assert f'"{names[0]}" (3 objects) and "{names[1]}" (1 object)' in found[0].text


def test_some():
    assert some("abc") == "a, b, c"
    assert some("abcde", 2) == "a, b and 3 more"
