import json
import shutil

import pytest
from own_photographs import beside, photographs, save_image, write, xml, yolo

from altopt.datasets.finding import find_data, look_for_data
from altopt.datasets.opening import open_dataset
from altopt.errors import DataError


def coco(path, folder, names, heading=()):
    """A json file with an image for each name, which lies in ``folder``."""
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 60, "height": 40} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 9, 9]} for i, _ in enumerate(names)]
    for name in names:
        save_image(folder / f"{name}.jpg")
    write(path, json.dumps({"images": images, "annotations": boxes,
                            "categories": [*heading, {"id": 1, "name": "cat"}]}))


def sound(root):
    """The splits that are found, each with its number of images; nothing is wrong with them."""
    found = find_data(root)
    looks = [open_dataset(found.data, split, root).look() for split in ("train", "test")]
    assert [look.findings for look in looks] == [[], []]
    assert all(look.objects for look in looks)
    assert found.whole is None
    return found.format, found.data.train, found.data.test, [look.images for look in looks]


def test_voc_lists(tmp_path):
    assert sound(photographs(tmp_path, train="ab", test="c")) == ("voc", ("train",), ("test",), [2, 1])


@pytest.mark.parametrize(("lists", "train", "test", "validation"), [
    (("train", "val"), "train", "val", ()), (("trainval", "test", "train", "val"), "trainval", "test", ()),
    (("train", "val", "test"), "train", "test", ("val",)), (("trainval", "train", "val"), "train", "val", ()),
    (("Train", "Valid"), "Train", "Valid", ()), (("training", "testing"), "training", "testing", ()),
    (("train", "test", "cat_train"), "train", "test", ()), (("trainval", "val"), "trainval", "val", ()),
])
def test_what_lists_are_called(tmp_path, lists, train, test, validation):
    photographs(tmp_path, **{name: chr(ord("a") + place) for place, name in enumerate(lists)})
    found = find_data(tmp_path)
    assert (found.data.train, found.data.test, found.validation) == ((train,), (test,), validation)


@pytest.mark.parametrize("where", ["VOCdevkit/VOC2007", "VOC2007"])
def test_voc_years(tmp_path, where):
    photographs(tmp_path / where, trainval="ab", test="c", train="a", val="b")
    assert sound(tmp_path) == ("voc", ("2007_trainval",), ("2007_test",), [2, 1])
    photographs(tmp_path / where.replace("2007", "2012"), trainval="de")
    assert sound(tmp_path) == ("voc", ("2007_trainval", "2012_trainval"), ("2007_test",), [4, 1])
    assert sound(tmp_path / where)[:3] == ("voc", ("2007_trainval",), ("2007_test",))


def test_own_classes_in_the_place_of_vocs(tmp_path):
    folder = photographs(tmp_path / "VOC2007", trainval="a", test="b")
    assert find_data(tmp_path).data.classes == ()
    for name in "ab":
        write(folder / "Annotations" / f"{name}.xml", xml((("red", 2, 2, 5, 5), ("blue", 2, 2, 6, 6))))
    assert find_data(tmp_path).data.classes == ("blue", "red")
    assert sound(tmp_path)[3] == [1, 1]


@pytest.mark.parametrize(("train", "test"), [("train", "valid"), ("train", "test"), ("Training", "Validation")])
@pytest.mark.parametrize("inner", ["", "images", "split/images"])
def test_voc_folders(tmp_path, train, test, inner):
    for name, ids in ((train, "ab"), (test, "c")):
        if inner == "":
            beside(tmp_path / name, ids)
        for image_id in ids if inner else "":
            pictures, files = ((tmp_path / name / "images", tmp_path / name / "annotations") if inner == "images" else
                               (tmp_path / "images" / name, tmp_path / "annotations" / name))
            save_image(pictures / f"{image_id}.jpg")
            write(files / f"{image_id}.xml", xml())
    start = "images/" if inner == "split/images" else ""
    assert sound(tmp_path) == ("voc", (f"{start}{train}/",), (f"{start}{test}/",), [2, 1])


def test_yolo_as_roboflow_and_ultralytics_have_it(tmp_path):
    for first, second in (("{}/images", "{}/labels"), ("images/{}", "labels/{}")):
        root = tmp_path / first[0]
        for name, ids in (("train", "ab"), ("valid", "c")):
            yolo(root / first.format(name), root / second.format(name), ids)
        write(root / "classes.txt", "cat\ndog\n")
        assert sound(root) == ("yolo", (first.format("train"),), (first.format("valid"),), [2, 1])
        write(root / "data.yaml", f"train: ../{first.format('train')}\nval: ../{first.format('valid')}\n"
                                  f"test: ../{first.format('test')}\nnames: [cat, dog]\n")
        assert sound(root) == ("yolo", ("data.yaml:train",), ("data.yaml:val",), [2, 1])


def test_a_yaml_file_that_names_what_is_not_there_is_said_to(tmp_path):
    for split in ("train", "val"):
        yolo(tmp_path / "images" / split, tmp_path / "labels" / split, "ab")
    write(tmp_path / "data.yaml", "train: images/trian\nval: images/val\ntest: images/test\nnames: [cat, dog]\n")
    assert "(the train that data.yaml names is not there)" in find_data(tmp_path).words


def test_yolo_beside_the_images_and_by_lists(tmp_path):
    yolo(tmp_path / "train", tmp_path / "train", "ab")
    yolo(tmp_path / "test", tmp_path / "test", "c")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    assert sound(tmp_path) == ("yolo", ("train",), ("test",), [2, 1])
    root = tmp_path / "other"
    yolo(root / "images", root / "labels", "abc")
    write(root / "train.txt", "images/a.jpg\nimages/b.jpg\n")
    write(root / "val.txt", "images/c.jpg\n")
    write(root / "classes.txt", "cat\ndog\n")
    assert sound(root) == ("yolo", ("train.txt",), ("val.txt",), [2, 1])


def test_coco(tmp_path):
    coco(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017", "ab")
    coco(tmp_path / "annotations" / "instances_val2017.json", tmp_path / "val2017", "c")
    write(tmp_path / "annotations" / "captions_train2017.json", '{"images": [], "annotations": []}')
    assert sound(tmp_path) == ("coco", ("annotations/instances_train2017.json:train2017",),
                               ("annotations/instances_val2017.json:val2017",), [2, 1])


@pytest.mark.parametrize("folder", ["images", "images/train", "", "photos"])
def test_where_the_images_of_a_json_file_lie(tmp_path, folder):
    coco(tmp_path / "train.json", tmp_path / folder, "ab")
    coco(tmp_path / "test.json", tmp_path / folder, "c")
    end = f":{folder}" if folder else ""
    assert sound(tmp_path) == ("coco", (f"train.json{end}",), (f"test.json{end}",), [2, 1])


def test_coco_as_roboflow_has_it(tmp_path):
    for name, ids in (("train", "ab"), ("valid", "c"), ("test", "d")):
        coco(tmp_path / name / "_annotations.coco.json", tmp_path / name, ids,
             [{"id": 0, "name": "pets", "supercategory": "none"}])
    assert sound(tmp_path) == ("coco", ("train/_annotations.coco.json:train",), ("test/_annotations.coco.json:test",),
                               [2, 1])
    assert find_data(tmp_path).validation == ("valid/_annotations.coco.json:valid",)


def make_beside(root):
    beside(root, "abc")


def make_voc(root):
    photographs(root, default="abc")


def make_one_folder(root):
    beside(root / "train", "abc")


def make_year(root):
    photographs(root / "VOC2012", default="abc")


def make_yolo(root):
    yolo(root / "images", root / "labels", "abc")
    write(root / "classes.txt", "cat\ndog\n")


def make_yolo_train(root):
    yolo(root / "images" / "train", root / "labels" / "train", "abc")
    write(root / "data.yaml", "path: x\ntrain: images/train\nval: images/train\nnames: [cat, dog]\n")


def make_coco(root):
    coco(root / "annotations" / "instances.json", root / "images", "abc")


def make_coco_train(root):
    coco(root / "train" / "_annotations.coco.json", root / "train", "abc")


@pytest.mark.parametrize("make", [make_beside, make_voc, make_one_folder, make_year, make_yolo, make_yolo_train,
                                  make_coco, make_coco_train])
def test_a_set_that_is_not_split_says_how_lists_are_written(tmp_path, make):
    make(tmp_path)
    with pytest.raises(DataError, match=f"make lists with altopt split --data-root {tmp_path}"):
        find_data(tmp_path)
    found = look_for_data(tmp_path)
    whole = found.open_whole()
    assert len(whole.ids) == 3
    assert whole.check() == []
    assert {path.stem[0] for path in whole.look().paths.values()} == set("abc")
    # A list written there is the split that it says.
    lists = tmp_path / found.lists
    if found.format == "coco":
        content = json.loads((tmp_path / found.whole.partition(":")[0]).read_text())
        for name, few in (("mine", content["images"][:2]), ("rest", content["images"][2:])):
            kept = {image["id"] for image in few}
            write(lists / f"{name}.json", json.dumps(content | {"images": few, "annotations": [
                each for each in content["annotations"] if each["image_id"] in kept]}))
    else:
        lines = list(whole.ids)
        if found.format == "yolo":
            lines = [whole.path(image_id).relative_to(tmp_path).as_posix() for image_id in whole.ids]
        write(lists / "mine.txt", "\n".join(lines[:2]))
        write(lists / "rest.txt", lines[2])
    config = found.config(found.split_called("mine"), found.split_called("rest"))
    looks = [open_dataset(config, split, tmp_path).look() for split in ("train", "test")]
    assert [(look.images, look.objects > 0, look.findings) for look in looks] == [(2, True, []), (1, True, [])]


def test_a_folder_without_data_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no data set that altopt knows: looked for were .*there are notes\.txt"):
        find_data(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        find_data(tmp_path / "nowhere")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(DataError, match="there are no files"):
        find_data(tmp_path)


def test_images_alone_are_no_data(tmp_path):
    save_image(tmp_path / "train" / "a.jpg")
    save_image(tmp_path / "images" / "a.jpg")
    write(tmp_path / "package.json", '{"name": "x"}')
    with pytest.raises(DataError, match="holds no data set"):
        find_data(tmp_path)
