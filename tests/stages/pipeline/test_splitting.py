"""Lists for data sets without any: where they lie, what is in them, and that they can be found."""

import json
import os
import shutil

import pytest
from own_photographs import beside, photographs, save_image, write, xml, yolo

from altopt.datasets.finding import find_data
from altopt.datasets.opening import open_dataset
from altopt.errors import DataError, UsageError
from stages.pipeline.splitting import split_data

IDS = "abcdefghij"


def split(root, seed=0, out=None):
    return split_data(root, test=0.2, val=0, seed=seed, out=out)


def coco(path, folder, names):
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 60, "height": 40} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 9, 9]} for i, _ in enumerate(names)]
    for name in names:
        save_image(folder / f"{name}.jpg")
    write(path, json.dumps({"info": {"year": 2026}, "images": images, "annotations": boxes,
                            "categories": [{"id": 1, "name": "cat"}]}))


def make_beside(root):
    beside(root, IDS)


def make_one_folder(root):
    beside(root / "train", IDS)


def make_year(root):
    photographs(root / "VOC2012", default=IDS)


def make_yolo(root):
    yolo(root / "images", root / "labels", IDS)
    write(root / "classes.txt", "cat\ndog\n")


def make_yolo_train(root):
    yolo(root / "images" / "train", root / "labels" / "train", IDS)
    write(root / "data.yaml", "path: x\ntrain: images/train\nval: images/train\nnames: [cat, dog]\n")


def make_coco(root):
    coco(root / "annotations" / "instances.json", root / "images", IDS)


def make_coco_in_the_root(root):
    coco(root / "all.json", root / "photos", IDS)


def make_coco_train(root):
    coco(root / "train" / "_annotations.coco.json", root / "train", IDS)


FORMATS = {
    make_beside: ["ImageSets/Main/train.txt", "ImageSets/Main/test.txt"],
    make_one_folder: ["train/ImageSets/Main/train.txt", "train/ImageSets/Main/test.txt"],
    make_year: ["VOC2012/ImageSets/Main/train.txt", "VOC2012/ImageSets/Main/test.txt"],
    make_yolo: ["train.txt", "test.txt", "data.yaml"],
    make_yolo_train: ["train.txt", "test.txt"],
    make_coco: ["annotations/instances_train.json", "annotations/instances_test.json"],
    make_coco_in_the_root: ["instances_train.json", "instances_test.json"],
    make_coco_train: ["annotations/instances_train.json", "annotations/instances_test.json"],
}


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def images_of(root, found):
    """The stems of the images in each split that is found."""
    data = [open_dataset(found.data, split, root).look() for split in ("train", "test")]
    assert [look.findings for look in data] == [[], []]
    return [{path.stem for path in look.paths.values()} for look in data]


@pytest.mark.parametrize(("make", "files"), FORMATS.items())
def test_lists_are_found_afterwards(tmp_path, make, files):
    make(tmp_path)
    before = contents(tmp_path)
    result = split(tmp_path)
    assert result["files"] == [str(tmp_path / name) for name in files]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == set(files)
    train, test = images_of(tmp_path, find_data(tmp_path))
    assert (len(train), len(test), train | test) == (8, 2, set(IDS))
    assert result["go_on"] == f"altopt run-all --recipe photos --data-root {tmp_path}"
    assert {name: part["images"] for name, part in result["lists"].items()} == {"train": 8, "test": 2}
    assert result["lists"]["test"]["classes"]["cat"] == {"images": 2, "objects": 2}
    with pytest.raises(UsageError, match="is split already"):
        split(tmp_path)


@pytest.mark.parametrize("make", FORMATS)
def test_the_same_seed_gives_the_same_lists(tmp_path, make):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name)
        split(tmp_path / name, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("make", [make_beside, make_yolo, make_coco])
def test_a_list_for_validation(tmp_path, make):
    make(tmp_path)
    result = split_data(tmp_path, test=0.2, val=0.2, seed=0)
    assert [part["images"] for part in result["lists"].values()] == [6, 2, 2]
    found = find_data(tmp_path)
    train, test = images_of(tmp_path, found)
    assert not train & test
    assert len(found.validation) == 1


def test_data_yaml_is_what_other_programs_read(tmp_path):
    make_yolo(tmp_path)
    split(tmp_path)
    assert (tmp_path / "data.yaml").read_text() == (
        "train: train.txt\ntest: test.txt\nval: test.txt\nnames:\n- cat\n- dog\n")
    assert all(line.startswith("images/") for line in (tmp_path / "test.txt").read_text().split())


def test_coco_keeps_all_else(tmp_path):
    make_coco(tmp_path)
    split(tmp_path)
    part = json.loads((tmp_path / "annotations/instances_test.json").read_text())
    assert (part["info"], part["categories"]) == ({"year": 2026}, [{"id": 1, "name": "cat"}])
    assert {each["image_id"] for each in part["annotations"]} == {image["id"] for image in part["images"]}


@pytest.mark.parametrize(("make", "name"), [
    (make_beside, "ImageSets/Main/test.txt"), (make_yolo, "test.txt"), (make_coco_in_the_root, "instances_test.json")])
def test_no_file_is_written_over(tmp_path, make, name):
    make(tmp_path)
    write(tmp_path / name, "mine")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"{name} is there already"):
        split(tmp_path)
    assert contents(tmp_path) == before


def test_out_is_where_they_go(tmp_path):
    make_yolo(tmp_path / "mine")
    before = contents(tmp_path / "mine")
    result = split(tmp_path / "mine", out=tmp_path / "lists")
    assert sorted(contents(tmp_path / "lists")) == ["test.txt", "train.txt"]
    assert contents(tmp_path / "mine") == before
    assert result["go_on"] is None


def test_images_that_exif_turns_are_split_like_others(tmp_path):
    make_beside(tmp_path)
    save_image(tmp_path / "a.jpg", orientation=6)
    assert sum(part["images"] for part in split(tmp_path)["lists"].values()) == len(IDS)


@pytest.mark.parametrize("ids", ["a", "ab"])
def test_too_few_images_for_a_list(tmp_path, ids):
    beside(tmp_path, ids)
    (tmp_path / f"{ids[-1]}.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())  # of equal bytes, so never parted
    with pytest.raises(DataError, match="the list test would be empty, of"):
        split(tmp_path)
    assert not (tmp_path / "ImageSets").exists()


@pytest.mark.parametrize("name", ["two\nlines", " edge", os.fsdecode(b"\xff")])
def test_a_name_that_no_list_can_hold(tmp_path, name):
    make_beside(tmp_path)
    for suffix in (".jpg", ".xml"):
        (tmp_path / f"a{suffix}").rename(tmp_path / f"{name}{suffix}")
    with pytest.raises(DataError, match="cannot stand in a list: rename it"):
        split(tmp_path)


def test_a_json_with_byte_order_mark_and_an_annotation_without_image(tmp_path):
    make_coco_in_the_root(tmp_path)
    content = json.loads((tmp_path / "all.json").read_text())
    content["annotations"].append({"id": 99, "category_id": 1, "bbox": [2, 2, 9, 9]})
    write(tmp_path / "all.json", json.dumps(content), "utf-8-sig")
    split(tmp_path)
    parts = [json.loads(path.read_text())["annotations"] for path in tmp_path.glob("instances_*.json")]
    assert sum(map(len, parts)) == len(IDS)


def test_a_missing_image_is_named(tmp_path):
    make_coco_in_the_root(tmp_path)
    (tmp_path / "photos" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg is missing: bring the image"):
        split(tmp_path)


@pytest.mark.parametrize(("test", "val"), [(0, 0), (1, 0), (0.5, 0.5), (-0.1, 0), (0.2, -1), (float("nan"), 0)])
def test_shares_that_leave_nothing(tmp_path, test, val):
    make_beside(tmp_path)
    with pytest.raises(UsageError, match="must be shares"):
        split_data(tmp_path, test=test, val=val, seed=0)


def labelled(root, classes):
    """An image for each name, with objects of the classes that the name's letters say."""
    names = {"r": "rare", "c": "common", "m": "more"}
    for name, letters in classes.items():
        save_image(root / f"{name}.jpg")
        write(root / f"{name}.xml", xml(tuple((names[letter], 3, 3, 20, 18) for letter in letters)))


def lists_of(root):
    return {name: set((root / f"ImageSets/Main/{name}.txt").read_text().split()) for name in ("train", "test")}


def test_every_class_has_its_share(tmp_path):
    """Of 100 images, 5 of which have the rare class, and 40 another besides; 10 have nothing."""
    labelled(tmp_path, {f"{number:03}": ("r" if number % 20 == 0 else "") + ("m" if number % 5 < 2 else "")
                        + ("c" if number % 10 else "") for number in range(100)})
    result = split_data(tmp_path, test=0.2, val=0, seed=3)
    classes = {name: part["classes"] for name, part in result["lists"].items()}
    assert classes["test"]["rare"]["images"] == 1
    for name in ("common", "more"):
        assert abs(classes["test"][name]["images"] - 0.2 * (classes["test"][name]["images"]
                                                            + classes["train"][name]["images"])) <= 2
    assert abs(result["lists"]["test"]["images"] - 20) <= 2


def test_a_class_with_two_images_has_one_in_each_list_and_with_one_trains(tmp_path):
    labelled(tmp_path, {"a": "r", "b": "r", "c": "m", **{f"x{n}": "c" for n in range(10)}})
    classes = {name: part["classes"] for name, part in split_data(tmp_path, test=0.2, val=0, seed=0)["lists"].items()}
    assert [classes[name]["rare"]["images"] for name in ("train", "test")] == [1, 1]
    assert [classes[name]["more"]["images"] for name in ("train", "test")] == [1, 0]


def test_images_of_equal_bytes_stay_together(tmp_path):
    for seed in range(8):
        root = tmp_path / str(seed)
        labelled(root, {f"{number}": "c" for number in range(8)})
        for number in range(4):
            shutil.copy(root / f"{number}.jpg", root / f"twin{number}.jpg")
            shutil.copy(root / f"{number}.xml", root / f"twin{number}.xml")
        split_data(root, test=0.3, val=0, seed=seed)
        lists = lists_of(root)
        assert {f"twin{name}" for name in lists["test"] if name in set("0123")} == {
            name for name in lists["test"] if name.startswith("twin")}
        assert lists["test"]


def test_a_new_image_moves_few_others(tmp_path):
    names = {f"{number:03}": "cm"[number % 3 == 0] + ("r" if number % 11 == 0 else "") for number in range(120)}
    labelled(tmp_path / "a", names)
    labelled(tmp_path / "b", names | {"new": "cr"})
    for name in "ab":
        split_data(tmp_path / name, test=0.2, val=0, seed=0)
    a, b = lists_of(tmp_path / "a"), lists_of(tmp_path / "b")
    assert len(a["test"] ^ (b["test"] - {"new"})) <= 6


def test_the_command(altopt, workplace):
    make_beside(workplace / "mine")
    answer = altopt("split", "--data-root", "mine")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "mine: images with xml files", "train: 8 images, 16 objects (cat 8 on 8, dog 8 on 8)",
        "test: 2 images, 4 objects (cat 2 on 2, dog 2 on 2)", "wrote mine/ImageSets/Main/train.txt",
        "wrote mine/ImageSets/Main/test.txt", "Go on with: altopt run-all --recipe photos --data-root mine"]
    assert altopt("check-data", "--data-root", "mine").code == 0
    again = altopt("split", "--data-root", "mine", "--json")
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("altopt: mine is split already (")
    make_coco(workplace / "other")
    found = json.loads(altopt("split", "--data-root", "other", "--json").out)
    assert found["lists"]["test"]["images"] == 2
