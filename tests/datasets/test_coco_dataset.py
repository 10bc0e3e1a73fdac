import json
import os
from pathlib import Path

import numpy as np
import pytest
from own_photographs import save_image
from PIL import Image

from altopt.datasets.coco import CocoDataset
from altopt.datasets.dataset import DataConfig, to_coco
from altopt.datasets.opening import open_dataset
from altopt.errors import DataError
from altopt.evaluation.ground_truth import read_ground_truth

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
SPLIT = "instances.json:images"


def image(coco_id, name, size=(30, 20)):
    return {"id": coco_id, "file_name": name, "width": size[0], "height": size[1]}


def annotation(number, image_id, bbox, category=3, **rest):
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, **rest}


def write(root, images, annotations, *, categories=CATEGORIES, name="instances.json", folder="images"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for entry in images:
        path = root / folder / str(entry.get("file_name", "none.jpg"))
        if ".." not in path.parts and not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.new("L", (30, 20)).save(path)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / name).write_text(json.dumps(content))


def data_set(root, *annotations, **options):
    write(root, [image(1, "a.jpg")], list(annotations))
    return CocoDataset(root, (SPLIT,), **options)


def test_objects_and_ids(tmp_path):
    write(
        tmp_path,
        [image(139, "b.jpg"), image(9, "a.jpg"), image("x1", "c.jpg")],
        [
            annotation(1, 9, [1.5, 2, 3, 4], 7, area=5.5, segmentation=[[1, 2, 3, 4, 5, 6]]),
            annotation(2, 139, [0, 0, 30, 20], iscrowd=1),
            annotation(3, 9, [5, 6, 7, 8], 3, iscrowd=0),
        ],
    )
    dataset = CocoDataset(tmp_path, (SPLIT,))
    assert dataset.ids == ("139", "9", "x1")
    assert [dataset.coco_image_id(i) for i in dataset.ids] == [139, 9, "x1"]
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog"), (3, 7))
    objects = dataset.objects("9")
    assert objects.boxes.tolist() == [[1.5, 2, 4.5, 6], [5, 6, 12, 14]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.areas.tolist() == [5.5, 56]
    assert dataset.objects("139").crowd.tolist() == [True]
    assert len(dataset.objects("139").usable()) == 0
    assert dataset.objects("x1").boxes.shape == (0, 4)
    assert dataset.size("9") == (30, 20)
    assert dataset.image("9").shape == (20, 30, 3)
    assert dataset.check() == []


def test_ground_truth_is_that_of_the_file(tmp_path):
    annotations = [annotation(i, 1, [i, 2, 3, 4], 7 if i % 2 else 3, area=6.0, iscrowd=i % 2) for i in (1, 2)]
    truth = to_coco(data_set(tmp_path, *annotations))
    assert truth["images"] == [{"id": 1, "width": 30, "height": 20}]
    assert truth["categories"] == sorted(CATEGORIES, key=lambda category: str(category["id"]))
    assert truth["annotations"] == [{**entry, "difficult": 0} for entry in annotations]


def test_files_are_the_json_and_the_images_in_the_folder(tmp_path):
    write(tmp_path, [image(1, "sub/a.jpg"), image(2, "b.JPG")], [])
    (tmp_path / "images" / "notes.txt").touch()
    dataset = CocoDataset(tmp_path, (SPLIT,))
    assert [str(p.relative_to(tmp_path)) for p in dataset.files()] == [
        "instances.json", "images/b.JPG", "images/sub/a.jpg",
    ]  # fmt: skip
    assert dataset.description() == {"kind": "coco", "splits": [SPLIT], "classes": [], "invalid": "error"}
    (tmp_path / "instances.json").write_text("not parsed")
    assert len(CocoDataset(tmp_path, (SPLIT,)).files()) == 3


@pytest.mark.parametrize("split", ["instances.json:", "instances.json"])
def test_without_folder_names_start_from_the_root(tmp_path, split):
    write(tmp_path, [image(1, "images/a.jpg")], [], folder="")
    dataset = CocoDataset(tmp_path, (split,))
    assert dataset.image("1").shape == (20, 30, 3)
    assert dataset.check() == []


def test_joined_files(tmp_path):
    write(tmp_path, [image(1, "a.jpg")], [annotation(1, 1, [1, 1, 2, 2])], name="one.json")
    write(tmp_path, [image(2, "b.jpg")], [annotation(1, 2, [1, 1, 3, 3])], name="two.json")
    dataset = CocoDataset(tmp_path, ("one.json:images", "two.json:images"))
    assert dataset.ids == ("1", "2")
    assert dataset.objects("2").boxes.tolist() == [[1, 1, 4, 4]]
    assert dataset.name == "COCO one+two"
    assert len(dataset.files()) == 4
    with pytest.raises(DataError, match="image 1 occurs twice"):
        _ = CocoDataset(tmp_path, ("one.json:images", "one.json:images")).ids
    write(tmp_path, [image(3, "c.jpg")], [], name="other.json", categories=[{"id": 3, "name": "bear"}])
    with pytest.raises(DataError, match=r"other\.json: it has other categories.*id 3: bear and cat"):
        _ = CocoDataset(tmp_path, ("one.json:images", "other.json:images")).ids


@pytest.mark.parametrize(
    ("bbox", "rule"),
    [
        ([1, 1, 0, 5], "no area"),
        ([1, 1, 5, -2], "no area"),
        ([1, 1, 5], "not four numbers"),
        ([1, 1, 5, "5"], "not four numbers"),
        ([1, 1, 5, float("nan")], "not four numbers"),
        (None, "not four numbers"),
        ([-1.5, 1, 5, 5], "leaves the image of 30 x 20: "),
        ([25, 1, 6.5, 5], "leaves the image of 30 x 20: "),
        ([1, 1, 5, 25], r"leaves the image of 30 x 20 \(it would fit with width and height swapped\)"),
    ],
)
def test_an_unusable_box_is_named_with_its_rule(tmp_path, bbox, rule):
    good = annotation(11, 1, [1, 1, 5, 5])
    dataset = data_set(tmp_path, good, annotation(12, 1, bbox))
    for look in (dataset.check, lambda: dataset.objects("1")):
        with pytest.raises(DataError, match=rf"instances\.json, image 1, annotation 12 \(cat\): .*{rule}"):
            look()
    lenient = CocoDataset(tmp_path, (SPLIT,), invalid="leave-out")
    assert lenient.objects("1").boxes.tolist() == [[1, 1, 6, 6]]
    assert [warning.endswith("the object is left out") for warning in lenient.check()] == [True]


def test_a_box_may_stick_out_by_a_pixel_and_is_taken_as_it_is(tmp_path):
    dataset = data_set(tmp_path, annotation(1, 1, [-1, -0.5, 32, 21.5]))
    assert dataset.check() == []
    assert dataset.objects("1").boxes.tolist() == [[-1, -0.5, 31, 21]]


def test_an_object_thinner_than_a_pixel_is_a_warning(tmp_path):
    warnings = data_set(tmp_path, annotation(5, 1, [1, 1, 0.5, 4]), annotation(6, 1, [1, 1, 1, 1])).check()
    assert len(warnings) == 1
    assert "annotation 5 (cat): its box is 0.5 x 4" in warnings[0]


@pytest.mark.parametrize("category", [4, None, [3]])
def test_an_unknown_category_is_an_error(tmp_path, category):
    with pytest.raises(DataError, match=r"annotation 1 .*none of the classes"):
        data_set(tmp_path, annotation(1, 1, [1, 1, 2, 2], category)).check()


def test_an_annotation_without_image_is_found(tmp_path):
    with pytest.raises(DataError, match="annotation 4: image 99 is not listed"):
        data_set(tmp_path, annotation(4, 99, [1, 1, 2, 2])).check()
    assert len(CocoDataset(tmp_path, (SPLIT,), invalid="leave-out").check()) == 1


def test_classes_asked_for_set_the_order(tmp_path):
    dataset = data_set(tmp_path, annotation(1, 1, [1, 1, 2, 2], 3), classes=("dog", "cat"))
    assert (dataset.classes, dataset.category_ids) == (("dog", "cat"), (7, 3))
    assert dataset.objects("1").labels.tolist() == [1]
    with pytest.raises(DataError, match=r'no category "bear": .*cat, dog'):
        _ = CocoDataset(tmp_path, (SPLIT,), classes=("bear",)).classes
    some = CocoDataset(tmp_path, (SPLIT,), classes=("dog",))
    assert len(some.objects("1")) == 0
    assert [text.rpartition(": ")[2] for text in some.check()] == ["cat 1"]


def test_train_and_test_must_agree(tmp_path):
    write(tmp_path, [image(1, "a.jpg")], [])
    write(tmp_path, [image(1, "a.jpg")], [], name="test.json", categories=[*CATEGORIES, {"id": 9, "name": "bear"}])
    config = DataConfig(format="coco", train=(SPLIT,), test=("test.json:images",))
    with pytest.raises(DataError, match=r"COCO test and COCO instances differ.*id 9: bear and None"):
        open_dataset(config, "test", tmp_path).check()
    assert open_dataset(config, "train", tmp_path).check() == []
    asked = DataConfig(format="coco", train=(SPLIT,), test=("test.json:images",), classes=("dog",))
    assert open_dataset(asked, "test", tmp_path).check() == []


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "cannot be read as json"),
        ("[]", 'no list "images"'),
        ('{"images": [], "annotations": {}}', 'no list "annotations"'),
        ('{"images": [1], "annotations": []}', 'no list "images"'),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    ],
)
def test_malformed_json_is_refused(tmp_path, content, cause):
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(DataError, match=rf"instances\.json.*{cause}"):
        _ = CocoDataset(tmp_path, (SPLIT,)).ids


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ({"file_name": "a.jpg", "width": 3, "height": 3}, "no id"),
        ({"id": 5, "width": 3, "height": 3}, "no file_name|no id"),
        ({"id": 5, "file_name": "a.jpg", "height": 3}, "width and height"),
        ({"id": 5, "file_name": "a.jpg", "width": 0, "height": 3}, "width and height"),
    ],
)
def test_malformed_images_are_refused(tmp_path, entry, cause):
    write(tmp_path, [entry], [])
    with pytest.raises(DataError, match=cause):
        _ = CocoDataset(tmp_path, (SPLIT,)).ids


@pytest.mark.parametrize("categories", [[{"id": 1}], [{"id": "1", "name": "a"}], [{"id": 1, "name": "a"}] * 2])
def test_malformed_categories_are_refused(tmp_path, categories):
    write(tmp_path, [], [], categories=categories)
    with pytest.raises(DataError, match="category"):
        _ = CocoDataset(tmp_path, (SPLIT,)).classes


def test_missing_or_resized_images_are_errors_always(tmp_path):
    write(tmp_path, [image(1, "a.jpg", (20, 30)), image(2, "b.jpg")], [])
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg has 30 x 20 .*swapped.*; 1 more problem in COCO instances \(altopt"):
        CocoDataset(tmp_path, (SPLIT,), invalid="leave-out").check()
    with pytest.raises(DataError, match=r"b\.jpg is missing"):
        CocoDataset(tmp_path, (SPLIT,)).image("2")


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd"])
def test_file_names_cannot_leave_the_root(tmp_path, name):
    Image.new("RGB", (30, 20)).save(tmp_path / "outside.jpg")
    write(tmp_path / "root", [image(1, "a.jpg")], [])
    text = (tmp_path / "root" / "instances.json").read_text()
    (tmp_path / "root" / "instances.json").write_text(text.replace("a.jpg", name))
    dataset = CocoDataset(tmp_path / "root", (SPLIT,))
    for look in (dataset.check, lambda: dataset.image("1")):
        with pytest.raises(DataError, match="leads out"):
            look()
    with pytest.raises(DataError, match="leads out"):
        CocoDataset(tmp_path / "root", ("../x.json:images",)).files()


def test_the_image_folder_may_be_a_link_but_no_image_out_of_it(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    write(root, [image(1, "a.jpg"), image(2, "b.jpg")], [])
    (root / "images").rename(far)
    (root / "images").symlink_to(far)
    assert CocoDataset(root, (SPLIT,)).check() == []
    (far / "b.jpg").rename(tmp_path / "b.jpg")
    (far / "b.jpg").symlink_to(tmp_path / "b.jpg")
    with pytest.raises(DataError, match=r"b\.jpg leads out of the data root"):
        CocoDataset(root, (SPLIT,)).check()


@pytest.mark.skipif("ALTOPT_DATA" not in os.environ, reason="ALTOPT_DATA names no folder of data sets")
def test_real_data_set():
    root = Path(os.environ["ALTOPT_DATA"]) / "coco128-mini"
    dataset = CocoDataset(root, ("annotations/instances.json:images",))
    objects = [dataset.objects(image_id) for image_id in dataset.ids]
    assert (len(dataset.ids), sum(map(len, objects))) == (128, 939)
    assert (int(sum(o.crowd.sum() for o in objects)), sum(len(o) == 0 for o in objects)) == (10, 2)
    assert (len(dataset.classes), dataset.category_ids[-1]) == (80, 90)
    assert len(dataset.check()) == 1
    assert all(dataset.image(image_id).dtype == np.uint8 for image_id in dataset.ids)


@pytest.mark.parametrize(("listed", "named", "words"), [
    (1, "1", 'its image_id is the text "1", the image\'s id is the number 1: write both as the same type'),
    ("1", 1, 'its image_id is the number 1, the image\'s id is the text "1"'),
    (1, 1.0, "its image_id is the number 1.0, the image's id is the number 1"),
    (1, True, "image True is not listed"), (1, None, "image None is not listed"), (1, [1], "is not listed"),
])
def test_ids_of_another_type_are_named(tmp_path, listed, named, words):
    write(tmp_path, [image(listed, "a.jpg")], [annotation(1, named, [1, 1, 2, 2])])
    problems = CocoDataset(tmp_path, (SPLIT,)).look().problems
    assert len(problems) == 1
    assert words in problems[0].text


def test_a_category_id_of_another_type_is_named(tmp_path):
    with pytest.raises(DataError, match=r'its category_id is the text "3", no id of a category'):
        data_set(tmp_path, annotation(1, 1, [1, 1, 2, 2], "3")).check()


@pytest.mark.parametrize(("value", "flag"), [("0", False), ("1", True), (False, False), (True, True), ("no", False),
                                             (0.0, False)])
@pytest.mark.parametrize("name", ["iscrowd", "difficult", "ignore"])
def test_flags_as_people_write_them_mean_what_scoring_takes_them_for(tmp_path, name, value, flag):
    dataset = data_set(tmp_path, annotation(1, 1, [1, 1, 2, 2], **{name: value}))
    scored = read_ground_truth(tmp_path / "instances.json").objects["1"]
    for objects in (dataset.objects("1"), scored):
        assert (objects.crowd.tolist(), objects.difficult.tolist()) == ([flag and name == "iscrowd"],
                                                                        [flag and name != "iscrowd"])
    assert dataset.check() == []


@pytest.mark.parametrize("value", ["maybe", 2, None, [1]])
def test_another_flag_is_refused_by_both(tmp_path, value):
    dataset = data_set(tmp_path, annotation(1, 1, [1, 1, 2, 2], iscrowd=value))
    with pytest.raises(DataError, match="its iscrowd must be 0 or 1"):
        dataset.check()
    with pytest.raises(DataError, match="it must be 0 or 1"):
        read_ground_truth(tmp_path / "instances.json")


@pytest.mark.parametrize("invalid", ["error", "leave-out"])
def test_normalised_boxes_are_one_problem(tmp_path, invalid):
    boxes = [annotation(i, 1, [0.1, 0.2, 0.3, i / 10]) for i in range(1, 6)]
    look = data_set(tmp_path, *boxes, annotation(9, 1, [1, 1, 5, 5]), invalid=invalid).look()
    assert [each.kind for each in look.findings] == ["normalised boxes"]
    assert "annotation 1 (cat): the boxes of 5 of 6 objects in COCO instances lie between 0 and 1" in str(look.findings)
    (tmp_path / "few").mkdir()
    few = data_set(tmp_path / "few", boxes[0], *(annotation(i, 1, [i, 1, 5, 5]) for i in range(2, 6))).look()
    assert [(each.kind, each.severity) for each in few.findings] == [("box of less than a pixel", "warning")]


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, float("inf")])
def test_numbers_beyond_all_bounds_are_problems_in_a_short_line(tmp_path, value):
    dataset = data_set(tmp_path, annotation(1, 1, [1, 1, value, 5], area=value))
    with pytest.raises(DataError, match=r"annotation 1 .*(not four numbers|leaves the image)") as raised:
        dataset.check()
    assert len(str(raised.value)) < 300 + len(str(tmp_path))
    write(tmp_path, [image(1, "a.jpg")], [annotation(1, 1, [1, 1, 5, 5], area=value)])
    assert CocoDataset(tmp_path, (SPLIT,)).look().problems == []


@pytest.mark.parametrize("change", [
    {"width": 10**400}, {"id": "a\ud800"}, {"file_name": "\ud800.jpg"}, {"width": True}])
def test_images_that_no_file_can_be_are_refused(tmp_path, change):
    write(tmp_path, [], [])
    content = {"images": [image(1, "a.jpg") | change], "annotations": [], "categories": CATEGORIES}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances\.json: image .*: correct it") as raised:
        _ = CocoDataset(tmp_path, (SPLIT,)).ids
    str(raised.value).encode()


@pytest.mark.parametrize("category", [
    {"id": 1, "name": "\ud800"}, {"id": 10**400, "name": "a"}, {"id": True, "name": "a"}])
def test_categories_that_cannot_be_written_are_refused(tmp_path, category):
    write(tmp_path, [], [], categories=[category])
    with pytest.raises(DataError, match=r"instances\.json: category .*: (correct it|give it)") as raised:
        _ = CocoDataset(tmp_path, (SPLIT,)).classes
    str(raised.value).encode()


def test_a_file_without_annotations_says_what_it_may_be(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({"images": [image(1, "a.jpg")], "categories": CATEGORIES}))
    with pytest.raises(DataError, match=r'no list "annotations" of objects, as the image_info files'):
        CocoDataset(tmp_path, (SPLIT,)).check()


def test_two_corners_in_place_of_a_size_are_recognised(tmp_path):
    with pytest.raises(DataError, match="it would fit as two corners"):
        data_set(tmp_path, annotation(1, 1, [10, 10, 28, 18])).check()


@pytest.mark.parametrize(("heading_used", "classes"), [(False, ("cat", "dog")), (True, ("pets", "cat", "dog"))])
def test_roboflows_export(tmp_path, heading_used, classes):
    heading = [{"id": 0, "name": "pets", "supercategory": "none"}]
    below = [{"id": i, "name": name, "supercategory": "pets"} for i, name in ((1, "cat"), (2, "dog"))]
    found = [annotation(1, 1, [1, 1, 5, 5], 0 if heading_used else 1), annotation(2, 1, [1, 1, 6, 6], 2)]
    write(tmp_path, [image(1, "a.jpg")], found, categories=heading + below, name="train/_annotations.coco.json",
          folder="train")
    dataset = CocoDataset(tmp_path, ("train/_annotations.coco.json:train",))
    assert (dataset.classes, dataset.name) == (classes, "COCO train")
    assert dataset.check() == []
    assert dataset.objects("1").labels.tolist() == [0, len(classes) - 1]


def test_exif_in_size_image_and_check_alike(tmp_path):
    write(tmp_path, [image(1, "a.jpg", (20, 30))], [])
    save_image(tmp_path / "images" / "a.jpg", (30, 20), orientation=6)
    with pytest.raises(DataError, match=r'a\.jpg has EXIF orientation 6 .*set data\.exif = "apply"'):
        CocoDataset(tmp_path, (SPLIT,)).check()
    dataset = CocoDataset(tmp_path, (SPLIT,), exif="apply")
    assert dataset.check() == []
    assert dataset.image("1").shape == (30, 20, 3)
    assert dataset.description()["exif"] == "apply"
