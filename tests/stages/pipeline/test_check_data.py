import hashlib
import json
from pathlib import Path

import pytest
from own_photographs import beside, photographs, save_image, write, xml, yolo
from tiny_runs import Reports, open_tiny

from altopt.errors import DataError
from cache.records import differences
from stages.pipeline.checking import check_data, frames_of, look_at_data
from stages.pipeline.recipe import read_recipe
from stages.shared.events import Caution, Note

VOC = ("data.format=voc", 'data.train=["train"]', 'data.test=["test"]')


def voc_run(folder, **lists):
    """A tiny run on photographs."""
    photographs(folder / "data", **lists)
    return open_tiny(folder / "runs" / "tiny", *VOC, data_root=folder / "data", report=Reports())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_both_splits_are_looked_at_and_beside_each_other(tmp_path):
    photographs(tmp_path, train="ab", test="c")
    save_image(tmp_path / "JPEGImages" / "c.jpg").write_bytes((tmp_path / "JPEGImages" / "a.jpg").read_bytes())
    check = check_data(None, None, (), tmp_path)
    assert [(each.kind, each.severity) for each in check.findings] == [("images in both splits", "warning")]
    assert check.words == f"{tmp_path}: VOC with lists: train to train, test to test"
    assert [look.images for look in check.looks.values()] == [2, 1]


def test_every_problem_is_listed_problems_first(tmp_path):
    photographs(tmp_path, train="abc", test="d")
    write(tmp_path / "Annotations" / "a.xml", "<annotation>")
    (tmp_path / "JPEGImages" / "b.jpg").write_text("none")
    write(tmp_path / "Annotations" / "c.xml", xml((("cat", 2, 2, 2, 9), ("cat", 9, 9, 2, 2), ("dog", 2, 2, 99, 9))))
    write(tmp_path / "Annotations" / "d.xml", xml((("bear", 2, 2, 5, 5),)))
    found = check_data(None, None, (), tmp_path).findings
    assert [(each.kind, Path(each.file).name, each.object) for each in found] == [
        ("unreadable annotation", "a.xml", ""), ("unreadable image", "b.jpg", ""),
        ("box without area", "c.xml", "object 2 (cat)"), ("box outside the image", "c.xml", "object 3 (dog)"),
        ("unknown class", "d.xml", "object 1 (bear)"), ("box of one pixel", "c.xml", "object 1 (cat)")]


def test_a_broken_list_that_both_splits_need_is_one_problem(tmp_path):
    photographs(tmp_path, train="aa", test="c")
    [problem] = check_data(None, None, (), tmp_path).findings
    assert "image a occurs twice" in problem.text


def test_objects_are_not_blamed_for_classes_that_nobody_could_read(tmp_path):
    photographs(tmp_path, train="a", test="c")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "photos/a.jpg\n")
    assert [each.kind for each in check_data(None, None, (), tmp_path).findings] == ["missing or doubled file"]


def test_asking_for_a_class_that_no_object_is_of(tmp_path):
    photographs(tmp_path, train="a", test="c")
    first = check_data(None, None, ('data.classes=["zebra"]',), tmp_path).findings[0]
    assert "no object of the classes that data.classes names" in first.text


def test_settings_go_over_what_was_found(tmp_path):
    photographs(tmp_path, train="a", test="b")
    save_image(tmp_path / "JPEGImages" / "a.jpg", (40, 60), orientation=6)
    assert len(check_data(None, None, (), tmp_path).findings) == 1
    assert check_data(None, None, ("data.exif=apply",), tmp_path).findings == []
    only = check_data(None, None, ("data.exif=apply", 'data.classes=["cat"]'), tmp_path)
    assert [each.kind for each in only.findings] == ["objects of other classes"] * 2
    assert check_data(None, None, ("data.exif=apply", 'data.test=["train"]'), tmp_path).looks["test"].images == 1


def test_splits_may_be_named_where_nothing_says_which_they_are(tmp_path):
    yolo(tmp_path / "images", tmp_path / "labels", "ab")
    write(tmp_path / "one.txt", "images/a.jpg")
    unsplit = check_data(None, None, (), tmp_path)
    assert (unsplit.findings[0].kind, "altopt split" in unsplit.findings[0].text) == ("no splits", True)
    assert [each.severity for each in unsplit.findings[1:]] == ["warning"]
    assert unsplit.looks["all"].images == 2
    check = check_data(None, None, ('data.train=["one.txt"]', 'data.test=["images"]'), tmp_path)
    assert [look.images for look in check.looks.values()] == [1, 2]


def test_a_recipe_or_a_run_says_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = voc_run(tmp_path, train="ab", test="c")
    run.recipe.header["data_root"] = str(tmp_path / "data")
    run.keep_recipe()
    assert check_data(None, "tiny", (), None).looks["train"].images == 2
    assert check_data(str(run.folder / "recipe.toml"), None, (), tmp_path / "data").looks["test"].images == 1
    assert check_data(None, None, (), None).looks["train"].classes is None  # the demo's, which are drawn
    assert not (tmp_path / "runs" / "shapes").exists()


def test_frames_are_those_of_all_stages():
    def sides(*sets: str):
        return [(each.short_side, each.max_side) for each in frames_of(read_recipe("shapes", sets, "spp-net"))]

    assert sides() == [(240, 320)]
    assert (100, 300) in sides("cache_conv_features.scales=[100, 200]", "cache_conv_features.max_side=300")


def test_what_is_found_is_json(tmp_path):
    photographs(tmp_path, train="a", test="b")
    recipe = read_recipe("shapes", VOC)
    found = json.loads(json.dumps(look_at_data(recipe, tmp_path, "words", digest).as_dict()))
    assert found["data"] == "words"
    assert found["splits"]["train"]["classes"] == {"cat": 1, "dog": 1}
    assert found["findings"] == []


def test_a_run_tells_the_lines_of_its_splits_once_and_what_is_in_both(tmp_path):
    run = voc_run(tmp_path, train="ab", test="bc")
    for split in ("train", "test", "train"):
        run.check_split(split)
    reports = run.runtime.report
    assert [event.text for event in reports.of(Note)] == [
        "train: VOC train: 2 images of 60 x 40, 4 objects (cat 2, dog 2)",
        "test: VOC test: 2 images of 60 x 40, 4 objects (cat 2, dog 2)"]
    assert [event.text.partition(",")[0] for event in reports.of(Caution)] == [
        "1 of 2 test images are training images too"]


def test_a_run_refuses_a_split_with_nothing_to_train_on(tmp_path):
    run = voc_run(tmp_path, train="a", test="b")
    for name in "ab":
        write(tmp_path / "data" / "Annotations" / f"{name}.xml", xml(rest="<difficult>true</difficult>"))
    with pytest.raises(DataError, match=r"^VOC train has nothing to train on, 2 objects, all of them difficult"):
        run.check_split("train")
    run.check_split("test")
    assert ["every score will be undefined" in event.text for event in run.runtime.report.of(Caution)] == [True]


def test_fields_that_came_later_make_nothing_stale(tmp_path):
    run = voc_run(tmp_path, train="a", test="b")
    step = run.recipe.steps[1]
    older = run.fingerprint(step)
    older["data"] = {name: value for name, value in older["data"].items() if name not in ("exif", "box_format")}
    assert differences(older, run.fingerprint(step)) == []
    other = open_tiny(tmp_path / "runs" / "tiny", *VOC, "data.exif=apply", data_root=tmp_path / "data")
    assert differences(older, other.fingerprint(step)) == ['data.exif is new ("apply")']
    assert other.data_digest(step) != run.data_digest(step)


def test_what_is_not_split_yet_is_looked_at_too(altopt, tmp_path):
    beside(tmp_path, "abc")
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    answer = altopt("check-data", "--data-root", str(tmp_path))
    assert answer.code == 3
    lines = answer.out.splitlines()
    assert lines[:2] == [f"{tmp_path}: images with xml files", "2 problems"]
    assert f"altopt split --data-root {tmp_path}" in answer.out
    assert "b.jpg" in answer.out
    assert lines[-1] == "all: VOC images: 3 images of 60 x 40, 6 objects (cat 3, dog 3)"
