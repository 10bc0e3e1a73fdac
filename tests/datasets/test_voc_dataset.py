import os
from pathlib import Path

import numpy as np
import pytest
from own_photographs import beside, photographs, save_image, write, xml
from PIL import Image

from altopt.datasets.dataset import DataConfig, to_coco
from altopt.datasets.opening import open_dataset
from altopt.datasets.voc import VOC_CLASSES, VocDataset, parse_annotation
from altopt.errors import DataError, UsageError

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(name, xmin, ymin, xmax, ymax, rest=""):
    return f"<object><name>{name}</name>{rest}{BOX.format(xmin, ymin, xmax, ymax)}</object>"


def add_image(folder, image_id, *objects, size=(30, 20), annotated=(30, 20), suffix=".jpg"):
    """Write image and annotation of one id; ``annotated`` None leaves the size out."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(folder / "JPEGImages" / f"{image_id}{suffix}")
    words = f"<size><width>{annotated[0]}</width><height>{annotated[1]}</height></size>" if annotated else ""
    path = folder / "Annotations" / f"{image_id}.xml"
    path.write_text(f"<annotation><filename>{image_id}</filename>{words}{''.join(objects)}</annotation>")
    return path


def add_list(folder, name, *lines):
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def data_set(folder, *objects, split="train", invalid="error", classes=(), **image):
    """A data set of the one image "a" with these objects."""
    add_image(folder, "a", *objects, **image)
    add_list(folder, split, "a")
    return VocDataset(folder, (split,), invalid=invalid, classes=classes)


def test_coordinates_become_continuous(tmp_path):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 30, 20), thing("cat", 5.5, 2, 6.5, 3))
    objects = dataset.objects("a")
    assert objects.boxes.tolist() == [[0, 0, 30, 20], [4.5, 1, 6.5, 3]]
    assert (objects.boxes.dtype, objects.labels.dtype) == (np.float32, np.int64)
    assert objects.labels.tolist() == [1, 0]
    assert not objects.crowd.any()
    assert dataset.classes == ("cat", "dog")
    assert dataset.category_ids == (1, 2)
    assert dataset.coco_image_id("a") == "a"
    assert dataset.check() == []


def test_parts_are_no_objects_and_difficult_is_a_flag(tmp_path):
    part = f"<part><name>head</name>{BOX.format(2, 2, 3, 3)}</part>"
    dataset = data_set(
        tmp_path,
        thing("person", 4, 4, 9, 9, rest=part + "<difficult>0</difficult>"),
        thing("person", 5, 5, 9, 9, rest="<difficult>1</difficult>"),
    )
    objects = dataset.objects("a")
    assert objects.boxes[:, 0].tolist() == [3, 4]
    assert objects.difficult.tolist() == [False, True]
    assert dataset.classes == ("person",)
    assert [a["difficult"] for a in to_coco(dataset)["annotations"]] == [0, 1]


def test_images_without_objects_stay(tmp_path):
    add_image(tmp_path, "a")
    add_image(tmp_path, "b", thing("dog", 1, 1, 2, 2))
    add_list(tmp_path, "train", "a", "b")
    dataset = VocDataset(tmp_path, ("train",))
    assert dataset.ids == ("a", "b")
    assert dataset.objects("a").boxes.shape == (0, 4)
    assert len(dataset.objects("a").usable()) == 0
    assert dataset.check() == []


@pytest.mark.parametrize("where", ["VOCdevkit/VOC2007", "VOC2007"])
def test_year_split_is_found_with_or_without_the_devkit_level(tmp_path, where):
    add_image(tmp_path / where, "a", thing("dog", 1, 1, 2, 2))
    add_list(tmp_path / where, "trainval", "a")
    dataset = VocDataset(tmp_path, ("2007_trainval",))
    assert dataset.objects("a").labels.tolist() == [VOC_CLASSES.index("dog")]
    assert dataset.classes == VOC_CLASSES
    assert dataset.name == "VOC 2007_trainval"
    assert VocDataset(tmp_path / where, ("2007_trainval",)).ids == ("a",)
    with pytest.raises(DataError, match="VOC2012"):
        _ = VocDataset(tmp_path, ("2012_trainval",)).ids


def test_joined_splits(tmp_path):
    for year, image_id in (("2007", "000001"), ("2012", "2008_000001")):
        add_image(tmp_path / f"VOC{year}", image_id, thing("dog", 1, 1, 2, 2))
        add_list(tmp_path / f"VOC{year}", "trainval", image_id)
    dataset = VocDataset(tmp_path, ("2007_trainval", "2012_trainval"))
    assert dataset.ids == ("000001", "2008_000001")
    assert len(dataset.files()) == 6
    assert dataset.check() == []


def test_an_id_must_not_occur_twice(tmp_path):
    data_set(tmp_path)
    for splits in (("train", "train"), ("train", "more")):
        add_list(tmp_path, "more", "a")
        with pytest.raises(DataError, match="image a occurs twice"):
            _ = VocDataset(tmp_path, splits).ids


def test_list_lines(tmp_path):
    add_image(tmp_path, "a")
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfa -1\r\nb  1\r\n\r\nmy image 01\n c\n")
    assert VocDataset(tmp_path, ("train",)).ids == ("a", "b", "my image 01", "c")


def test_unreadable_lists_are_named(tmp_path):
    data_set(tmp_path)
    add_list(tmp_path, "empty", "")
    with pytest.raises(DataError, match=r"empty\.txt lists no image"):
        _ = VocDataset(tmp_path, ("empty",)).ids
    with pytest.raises(DataError, match=r"val\.txt .*here are empty, train"):
        _ = VocDataset(tmp_path, ("val",)).ids


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".JPEG", ".png"])
def test_extensions_of_either_case(tmp_path, suffix):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 2, 2), suffix=suffix)
    assert dataset.image("a").shape == (20, 30, 3)
    assert dataset.files()[-1].name == f"a{suffix}"


def test_missing_and_ambiguous_files_are_named(tmp_path):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 2, 2))
    add_image(tmp_path, "a", thing("dog", 1, 1, 2, 2), suffix=".png")
    with pytest.raises(DataError, match="JPEGImages: 2 files are called 'a'"):
        dataset.files()
    add_list(tmp_path, "val", "b")
    with pytest.raises(DataError, match="Annotations: no xml file is called 'b'"):
        VocDataset(tmp_path, ("val",)).files()


@pytest.mark.parametrize(
    ("box", "rule"),
    [
        ((0, 5, 9, 9), "xmin 0: VOC coordinates start at 1"),
        ((5, 0, 9, 9), "ymin 0: VOC coordinates start at 1"),
        ((-3, 5, 9, 9), "xmin -3: VOC coordinates start at 1"),
        ((9, 5, 8, 9), "xmax 8 is less than xmin 9"),
        ((5, 9, 9, 8), "ymax 8 is less than ymin 9"),
        ((5, 5, 31, 9), "xmax 31 lies outside the image of 30 x 20: "),
        ((5, 5, 20, 30), r"ymax 30 lies outside the image of 30 x 20 \(it would fit with width and height swapped\)"),
        ((5, 5, "nan", 9), "not four numbers"),
        ((5, 5, "", 9), "not four numbers"),
        ((5, 5, "inf", 9), "not four numbers"),
    ],
)
def test_an_unusable_box_is_named_with_its_rule(tmp_path, box, rule):
    dataset = data_set(tmp_path, thing("cat", 1, 1, 2, 2), thing("dog", *box))
    for look in (dataset.check, lambda: dataset.objects("a")):
        with pytest.raises(DataError, match=rf"a\.xml, object 2 \(dog\): .*{rule}"):
            look()


def test_an_unusable_object_can_be_left_out(tmp_path):
    good, bad = thing("cat", 3, 3, 6, 6), thing("dog", 0, 1, 2, 2)
    dataset = data_set(tmp_path, bad, good, bad, invalid="leave-out")
    assert dataset.objects("a").boxes.tolist() == [[2, 2, 6, 6]]
    assert dataset.classes == ("cat", "dog")
    warnings = dataset.check()
    assert len(warnings) == 2
    assert warnings[1].endswith("a.xml, object 3 (dog): xmin 0: VOC coordinates start at 1; the object is left out")


def test_data_that_counts_from_zero_is_recognised(tmp_path):
    dataset = data_set(tmp_path, *[thing("dog", 0, i, 5, 9) for i in range(1, 5)])
    with pytest.raises(DataError, match=r'object 1 \(dog\).*of 4 objects 4 start at 0, 1 at 1, .*set data.box_format = '
                       r'"inclusive-0".*; 3 more problems in VOC train \(altopt check-data lists all\)$'):
        dataset.check()


def test_an_unknown_class_is_an_error(tmp_path):
    data_set(tmp_path, thing("cat", 1, 1, 2, 2), thing("dog", 1, 1, 2, 2))
    add_image(tmp_path, "b", thing("Dog", 1, 1, 2, 2))
    add_list(tmp_path, "test", "b")
    dataset = open_dataset(DataConfig(format="voc", train=("train",), test=("test",)), "test", tmp_path)
    for look in (dataset.check, lambda: dataset.objects("b")):
        with pytest.raises(DataError, match=r'object 1 \(Dog\): "Dog" is not one of the 2 classes of VOC train '
                           r'\(is it "dog"\?\): .*data\.classes'):
            look()


def test_classes_that_are_not_asked_for_are_left_out_in_one_line(tmp_path):
    objects = [thing(name, 1, 1, 2, 2) for name in ("Dog", "cow", "cat", "cow")]
    dataset = data_set(tmp_path, *objects, classes=("cat", "dog"))
    assert dataset.objects("a").labels.tolist() == [0]
    assert dataset.check() == ['VOC train: 3 objects of classes that data.classes does not name are left out: cow 2, '
                               'Dog 1 (is it "dog"?)']
    assert VocDataset(tmp_path, ("train",), classes=("Dog", "cat")).objects("a").labels.tolist() == [0, 1]


def test_one_pixel_objects_are_usable_with_a_warning(tmp_path):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 9, 9), thing("dog", 7, 8, 7, 8), thing("dog", 5, 3, 5, 9))
    assert dataset.objects("a").boxes.tolist()[1:] == [[6, 7, 7, 8], [4, 2, 5, 9]]
    warnings = dataset.check()
    assert len(warnings) == 2
    assert "a.xml, object 2 (dog): xmin = xmax = 7 and ymin = ymax = 8: one pixel" in warnings[0]
    assert "a.xml, object 3 (dog): xmin = xmax = 5: one pixel" in warnings[1]


@pytest.mark.parametrize("annotated", [None, (0, 0)])
def test_a_missing_size_falls_back_to_the_images(tmp_path, annotated):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 30, 20), annotated=annotated)
    assert dataset.size("a") == (30, 20)
    assert len(dataset.objects("a")) == 1
    assert [w.split(": ")[1] for w in dataset.check()] == ["no size given, the image's own is taken"]


def test_a_size_that_is_not_the_images_is_an_error(tmp_path):
    for invalid in ("error", "leave-out"):
        dataset = data_set(tmp_path, annotated=(20, 30), classes=("dog",), invalid=invalid)
        for look in (dataset.check, lambda dataset=dataset: dataset.image("a")):
            with pytest.raises(DataError, match=r"a\.jpg has 30 x 20 pixels.*20 x 30, width and height swapped"):
                look()


def test_a_truncated_image_stays_an_error(tmp_path):
    dataset = data_set(tmp_path, thing("dog", 1, 1, 2, 2), invalid="leave-out")
    path = tmp_path / "JPEGImages" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jpg cannot be read"):
        dataset.check()
    with pytest.raises(DataError, match=r"a\.jpg cannot be read"):
        dataset.image("a")


def test_check_counts_broken_files(tmp_path):
    for image_id in "abc":
        add_image(tmp_path, image_id, thing("dog", 1, 1, 2, 2))
        (tmp_path / "JPEGImages" / f"{image_id}.jpg").write_text("none")
    add_list(tmp_path, "train", *"abc")
    with pytest.raises(DataError, match=r"a\.jpg is not a .*; 2 more problems in VOC train \(altopt"):
        VocDataset(tmp_path, ("train",)).check()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("<annotation>", "no element found"),
        ("", "no element found"),
        ('<!DOCTYPE a [<!ENTITY b "bbb">]><annotation>&b;</annotation>', "entities"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "/etc/passwd">]><annotation>&b;</annotation>', "entities"),
        ("<annotation><size><width>x</width></size></annotation>", "size is not two whole numbers"),
    ],
)
def test_malformed_xml_is_refused(tmp_path, text, cause):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.xml").write_text(text, encoding)
        with pytest.raises(DataError, match=rf"a\.xml.*{cause}"):
            parse_annotation(tmp_path / "a.xml")


def test_listed_names_cannot_leave_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    data_set(root, thing("dog", 1, 1, 2, 2))
    add_image(outside, "secret", thing("dog", 1, 1, 2, 2))
    add_list(root, "up", "../../outside/JPEGImages/secret")
    with pytest.raises(DataError, match="no xml file is called"):
        VocDataset(root, ("up",), classes=("dog",)).check()
    (root / "JPEGImages" / "linked.jpg").symlink_to(outside / "JPEGImages" / "secret.jpg")
    (root / "Annotations" / "linked.xml").write_text("<annotation/>")
    add_list(root, "link", "linked")
    for look in (lambda d: d.image("linked"), lambda d: d.files(), lambda d: d.check()):
        with pytest.raises(DataError, match="leads out of the data root"):
            look(VocDataset(root, ("link",), classes=("dog",)))
    with pytest.raises(DataError, match="leads out"):
        _ = VocDataset(root, ("../../train",)).ids


def test_root_and_image_folder_may_be_links(tmp_path):
    real, far = tmp_path / "real", tmp_path / "far"
    data_set(real, thing("dog", 1, 1, 2, 2))
    (real / "JPEGImages").rename(far)
    (real / "JPEGImages").symlink_to(far)
    (tmp_path / "root").symlink_to(real)
    dataset = VocDataset(tmp_path / "root", ("train",))
    assert dataset.check() == []
    assert dataset.image("a").shape == (20, 30, 3)


def test_both_splits_have_the_classes_of_the_train_split(tmp_path):
    add_image(tmp_path, "a", thing("wolf", 1, 1, 2, 2), thing("ape", 1, 1, 2, 2))
    add_image(tmp_path, "b", thing("wolf", 1, 1, 2, 2))
    add_list(tmp_path, "train", "a")
    add_list(tmp_path, "test", "b")
    config = DataConfig(format="voc", train=("train",), test=("test",))
    test = open_dataset(config, "test", tmp_path)
    assert test.classes == open_dataset(config, "train", tmp_path).classes == ("ape", "wolf")
    assert test.objects("b").labels.tolist() == [1]
    assert test.description()["classes"] == {"found in": ["train"]}
    assert [path.name for path in test.files()] == ["test.txt", "b.xml", "b.jpg", "a.xml"]
    assert [path.name for path in VocDataset(tmp_path, ("test",), classes=("wolf",)).files()][-1] == "b.jpg"
    add_image(tmp_path, "b", thing("bear", 1, 1, 2, 2))
    with pytest.raises(DataError, match='"bear" is not one of the 2 classes'):
        open_dataset(config, "test", tmp_path).check()


def test_opening_reads_nothing_but_says_what_is_missing(tmp_path):
    config = DataConfig(format="voc", train=("2007_trainval",), test=("2007_test",))
    assert open_dataset(config, "test", tmp_path).classes == VOC_CLASSES
    with pytest.raises(UsageError, match="--data-root"):
        open_dataset(config, "train", None)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_dataset(config, "train", tmp_path / "nowhere")
    twice = DataConfig(format="voc", train=("train",), test=(), classes=("dog", "dog"))
    with pytest.raises(UsageError, match="once"):
        open_dataset(twice, "train", tmp_path)


@pytest.mark.skipif("ALTOPT_DATA" not in os.environ, reason="ALTOPT_DATA names no folder of data sets")
def test_real_data_sets():
    root = Path(os.environ["ALTOPT_DATA"])
    voc = VocDataset(root / "voc07-mini", ("2007_trainval", "2007_test"))
    assert len(voc.ids) == 1600
    assert voc.check() == []
    cells = VocDataset(root / "bccd-mini", ("train", "val"))
    assert cells.classes == ("Platelets", "RBC", "WBC")
    assert ["BloodImage_00343" in cells.check()[0], "BloodImage_00338" in cells.check()[1]] == [True, True]


@pytest.mark.parametrize("layout", [
    ("JPEGImages", "Annotations"), ("images", "annotations"), ("", "annotations"), ("", ""), ("images", "images"),
    ("images", "Annotations")])
@pytest.mark.parametrize("split", ["train/", "./", "train"])
def test_folders_with_and_without_lists(tmp_path, layout, split):
    root = tmp_path / "train" if split == "train/" else tmp_path
    for image_id in "ab":
        save_image(root / layout[0] / f"{image_id}.jpg")
        write(root / layout[1] / f"{image_id}.xml", xml())
    write(root / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    dataset = VocDataset(tmp_path, (split,))
    assert (dataset.ids, dataset.classes) == (("a", "b"), ("cat", "dog"))
    assert dataset.check() == []
    assert dataset.objects("b").boxes.tolist() == [[2, 2, 20, 18], [4, 4, 30, 20]]
    assert len(dataset.files()) == (5 if split == "train" else 4)


def test_images_and_xml_files_of_a_split_in_folders_side_by_side(tmp_path):
    save_image(tmp_path / "images" / "train" / "a.png")
    write(tmp_path / "annotations" / "train" / "a.xml", xml())
    assert VocDataset(tmp_path, ("images/train/",)).look().objects == 2


def test_a_list_of_a_folder_below_the_root(tmp_path):
    photographs(tmp_path / "cats", mine="ab")
    dataset = VocDataset(tmp_path, ("cats/mine",))
    assert (dataset.ids, dataset.name) == (("a", "b"), "VOC mine")
    assert dataset.check() == []


def test_images_without_xml_are_left_out_and_xml_without_image_is_a_problem(tmp_path):
    beside(tmp_path, "ab")
    save_image(tmp_path / "c.jpg")
    dataset = VocDataset(tmp_path, ("./",))
    assert dataset.ids == ("a", "b")
    assert dataset.check() == [f"{tmp_path}: 1 images have no xml file and are left out: c"]
    for name in ("x", "y"):
        write(tmp_path / f"{name}.xml", xml())
    (tmp_path / "y.heic").touch()
    problems = [each for each in VocDataset(tmp_path, ("./",)).look().findings if each.severity == "problem"]
    assert [each.kind for each in problems] == ["xml without image"] * 2
    assert "no image is called 'x'" in problems[0].text
    assert "y.heic is not a JPEG, PNG, WebP, BMP or TIFF image by its name: convert it" in problems[1].text


def test_folders_that_are_joined_have_ids_of_their_own(tmp_path):
    beside(tmp_path / "one", "ab")
    beside(tmp_path / "two", "a")
    dataset = VocDataset(tmp_path, ("one/", "two/"))
    assert dataset.ids == ("one/a", "one/b", "two/a")
    assert dataset.path("two/a") == tmp_path / "two" / "a.jpg"
    assert dataset.check() == []
    assert dataset.name == "VOC one+two"


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    for split, cause in (("train/", "holds no image with an xml file"), ("test/", "is not a folder")):
        with pytest.raises(DataError, match=cause):
            _ = VocDataset(tmp_path, (split,)).ids
    with pytest.raises(DataError, match=r'here are none; altopt split makes some, and "\./" is the split of a whole'):
        _ = VocDataset(tmp_path, ("train",)).ids


@pytest.mark.parametrize(("there", "line", "taken"), [
    (("photo", "photo 1"), "photo 1", "photo 1"), (("photo",), "photo 1", "photo"),
    (("photo 1",), "photo 1", "photo 1"),
    (("photo", "photo -1"), "photo -1", "photo -1"), (("photo",), "photo  -1", "photo"), ((), "photo 1", "photo 1"),
    ((), "photo  1", "photo"), (("photo 1",), "photo 1 -1", "photo 1"), (("a.b",), "a.b.jpg", "a.b"),
    (("photo 1",), "photo 1.JPG", "photo 1"), (("a.png",), "a.png", "a.png"),
])
def test_a_flag_is_one_only_where_the_id_without_it_has_files(tmp_path, there, line, taken):
    (tmp_path / "Annotations").mkdir()
    for name in there:
        save_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        write(tmp_path / "Annotations" / f"{name}.xml", xml())
    (tmp_path / "JPEGImages").mkdir(exist_ok=True)
    write(tmp_path / "ImageSets" / "Main" / "train.txt", f"{line}\r\n")
    assert VocDataset(tmp_path, ("train",)).ids == (taken,)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_lists_of_windows(tmp_path, encoding):
    photographs(tmp_path, train="ab")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a\r\nb\r\n", encoding)
    assert VocDataset(tmp_path, ("train",)).ids == ("a", "b")


@pytest.mark.parametrize(("box_format", "box"), [
    ("inclusive-1", [2, 2, 20, 18]), ("inclusive-0", [3, 3, 21, 19]), ("xyxy", [3, 3, 20, 18])])
def test_box_formats(tmp_path, box_format, box):
    photographs(tmp_path, train="a")
    dataset = VocDataset(tmp_path, ("train",), box_format=box_format)
    assert dataset.objects("a").boxes[0].tolist() == box
    assert dataset.description().get("box_format", "inclusive-1") == box_format


@pytest.mark.parametrize(("box", "fitting"), [
    ((0, 0, 29, 19), ("inclusive-0", "xyxy")), ((0, 0, 30, 20), ("xyxy",)), ((1, 1, 30, 20), ("inclusive-1", "xyxy")),
    ((0, 0, 0, 0), ("inclusive-0",)), ((-1, 0, 5, 5), ())])
def test_what_each_box_format_takes(tmp_path, box, fitting):
    data_set(tmp_path, thing("dog", *box))
    for box_format in ("inclusive-1", "inclusive-0", "xyxy"):
        problems = VocDataset(tmp_path, ("train",), box_format=box_format).look().problems
        assert (not problems) == (box_format in fitting), (box_format, problems)


@pytest.mark.parametrize(("boxes", "set_to", "advice"), [
    ([(0, 5, 9, 9)], "inclusive-1", "inclusive-0"), ([(0, 5, 30, 9)], "inclusive-1", "xyxy"),
    ([("0.0", "5.5", 9, 9)], "inclusive-1", "xyxy"), ([(0, 3, 9, 9), (1, 3, 9, 9), (1, 1, 9, 9)], "inclusive-1", None),
    ([(1, 5, 30, 9)], "inclusive-0", "inclusive-1"), ([(0, 5, 9, 9), (4, 5, 30, 9)], "inclusive-0", "xyxy")])
def test_advice_on_the_box_format_goes_by_the_counts(tmp_path, boxes, set_to, advice):
    data_set(tmp_path, *(thing("dog", *box) for box in boxes))
    with pytest.raises(DataError) as raised:
        VocDataset(tmp_path, ("train",), box_format=set_to).check()
    assert (f'set data.box_format = "{advice}"' in str(raised.value)) == (advice is not None)
    assert ("data.box_format" in str(raised.value)) == (advice is not None)
    assert VocDataset(tmp_path, ("train",), box_format=advice or set_to).look().problems == [] or advice is None


def test_many_fractions_of_pixels_are_a_warning(tmp_path):
    dataset = data_set(tmp_path, thing("dog", 3.5, 3, 9, 9), thing("dog", 3.5, 4, 9, 9), thing("dog", 3, 5, 9, 9))
    assert ['data.box_format = "xyxy"' in text for text in dataset.check()] == [True]
    assert VocDataset(tmp_path, ("train",), box_format="xyxy").check() == []


@pytest.mark.parametrize("invalid", ["error", "leave-out"])
def test_normalised_boxes_are_one_problem(tmp_path, invalid):
    shares = [thing("dog", 0.1, 0.2, 0.5, i / 10) for i in range(3, 10)]
    dataset = data_set(tmp_path, *shares, thing("dog", 2, 3, 5, 5), invalid=invalid)
    problems = dataset.look().problems
    assert [each.kind for each in problems] == ["normalised boxes"]
    assert "a.xml, object 1 (dog): the boxes of 7 of 8 objects in VOC train lie between 0 and 1" in problems[0].text


@pytest.mark.parametrize(("flag", "difficult"), [
    ("1", True), ("true", True), ("True", True), ("YES", True), (" 1 ", True), ("0", False), ("false", False),
    ("no", False), ("", False)])
def test_difficult_as_people_write_it(tmp_path, flag, difficult):
    dataset = data_set(tmp_path, thing("dog", 2, 2, 9, 9, rest=f"<difficult>{flag}</difficult>"))
    assert dataset.objects("a").difficult.tolist() == [difficult]


@pytest.mark.parametrize("flag", ["2", "maybe", "-1"])
def test_another_difficult_is_a_problem(tmp_path, flag):
    dataset = data_set(tmp_path, thing("dog", 2, 2, 9, 9, rest=f"<difficult>{flag}</difficult>"))
    with pytest.raises(DataError, match=r"object 1 \(dog\): its difficult is not 0 or 1"):
        dataset.check()


def test_xml_of_another_kind_is_no_image_without_objects(tmp_path):
    photographs(tmp_path, train="ab")
    write(tmp_path / "Annotations" / "b.xml", "<html><body/></html>")
    with pytest.raises(DataError, match=r"b\.xml is XML of another kind, <html>"):
        VocDataset(tmp_path, ("train",)).check()


def test_a_continuous_box_of_less_than_a_pixel_is_named(tmp_path):
    data_set(tmp_path, thing("dog", 0.1, 0.2, 0.6, 9), thing("dog", 2, 2, 9, 9))
    [warning] = VocDataset(tmp_path, ("train",), box_format="xyxy").check()
    assert "object 1 (dog): its box is 0.5 x 8.8, less than a pixel" in warning


def test_what_is_no_file_is_named(tmp_path):
    photographs(tmp_path, train="ab")
    for name, make in (("a", lambda path: path.symlink_to(path)), ("b", os.mkfifo)):
        path = tmp_path / "JPEGImages" / f"{name}.jpg"
        path.unlink()
        make(path)
    looped, pipe = (finding.text for finding in VocDataset(tmp_path, ("train",)).look().problems[:2])
    assert "a.jpg is a link that leads nowhere" in looped
    assert "b.jpg is not a file" in pipe


@pytest.mark.parametrize(("listed", "there"), [("B", "b"), ("caf\u00e9", "cafe\u0301")])
def test_names_that_look_alike_are_hinted_at(tmp_path, listed, there):
    photographs(tmp_path, train=["a", there])
    add_list(tmp_path, "train", "a", listed)
    with pytest.raises(DataError, match=f"no xml file is called '{listed}' \\('{there}' differs in capitals or in"):
        VocDataset(tmp_path, ("train",)).files()


def test_which_file_is_missing_is_said(tmp_path):
    photographs(tmp_path, train="a")
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match="JPEGImages: no image is called 'a'"):
        VocDataset(tmp_path, ("train",)).files()


@pytest.mark.parametrize(("old", "new", "named"), [
    ("object>", "Object>", "<Object> in place of VOC's <object>"), ("object>", "OBJECT>", "<OBJECT>"),
    ("bndbox>", "BndBox>", "<BndBox> in place of VOC's <bndbox>"), ("xmin>", "Xmin>", "<Xmin>"),
    ("name>", "Name>", "<Name>"), ("size>", "Size>", "<Size>"), ("object>", "item>", "a <bndbox> in <item>"),
    ("<annotation>", '<annotation xmlns="http://x">', "its elements in a namespace"),
    ("<annotation>", "<annotation><objects>", "objects in another element"),
])
def test_tags_that_would_be_passed_over_are_named(tmp_path, old, new, named):
    photographs(tmp_path, train="ab")
    text = xml().replace(old, new)
    if new.endswith("<objects>"):
        text = text.replace("</annotation>", "</objects></annotation>")
    write(tmp_path / "Annotations" / "b.xml", text)
    dataset = VocDataset(tmp_path, ("train",))
    for look in (dataset.check, lambda: dataset.objects("b"), lambda: dataset.classes):
        with pytest.raises(DataError, match=rf"b\.xml has {named}"):
            look()
    assert dataset.look().images == 2


def test_every_broken_annotation_is_listed_where_classes_are_to_be_found(tmp_path):
    photographs(tmp_path, train="abcd", test="e")
    for name in "bc":
        write(tmp_path / "Annotations" / f"{name}.xml", "<annotation>")
    look = VocDataset(tmp_path, ("train",)).look()
    assert [Path(each.file).name for each in look.problems] == ["b.xml", "c.xml"]
    assert (look.classes, look.images, len(look.paths)) == ({"cat": 2, "dog": 2}, 4, 2)


def test_own_classes_in_the_place_of_vocs_are_named(tmp_path):
    photographs(tmp_path / "VOC2007", trainval="a")
    write(tmp_path / "VOC2007" / "Annotations" / "a.xml", xml((("red", 2, 2, 5, 5), ("blue", 2, 2, 5, 5))))
    with pytest.raises(DataError, match=r'"red" is not one of the 20 classes .*set data\.classes = \["blue", "red"\]'):
        VocDataset(tmp_path, ("2007_trainval",)).check()
    assert VocDataset(tmp_path, ("2007_trainval",), classes=("blue", "red")).check() == []


def test_repeated_objects_are_named(tmp_path):
    twice = thing("dog", 2, 2, 9, 9)
    dataset = data_set(tmp_path, twice, thing("cat", 2, 2, 9, 9), twice, twice)
    assert [text.partition(", ")[2] for text in dataset.check()] == [
        f"object {number} (dog): it is object 1 (dog) again: leave one" for number in (3, 4)]


def test_a_look_counts(tmp_path):
    photographs(tmp_path, train="abc")
    write(tmp_path / "Annotations" / "b.xml", xml(rest="<difficult>1</difficult>"))
    write(tmp_path / "Annotations" / "c.xml", xml(()))
    look = VocDataset(tmp_path, ("train",)).look()
    assert (look.images, look.objects, look.counted, look.difficult, look.empty) == (3, 4, 2, 2, 1)
    assert look.line() == "VOC train: 3 images of 60 x 40, 4 objects (cat 2, dog 2), 2 difficult, 1 image without any"
    assert look.as_dict()["width"] == [60, 60]


def test_exif_in_size_image_and_check_alike(tmp_path):
    photographs(tmp_path, train="a")
    save_image(tmp_path / "JPEGImages" / "a.jpg", (40, 60), orientation=8)
    for look in (lambda d: d.image("a"), lambda d: d.check()):
        with pytest.raises(DataError, match=r'a\.jpg has EXIF orientation 8 .*set data\.exif = "apply"'):
            look(VocDataset(tmp_path, ("train",)))
    dataset = VocDataset(tmp_path, ("train",), exif="apply")
    assert dataset.check() == []
    assert (dataset.image("a").shape, dataset.size("a")) == ((40, 60, 3), (60, 40))
    with pytest.raises(DataError, match=r"swapped, as EXIF"):
        VocDataset(tmp_path, ("train",), exif="ignore").check()
    write(tmp_path / "Annotations" / "a.xml", xml(size=None))
    assert VocDataset(tmp_path, ("train",), exif="apply").size("a") == (60, 40)
    assert VocDataset(tmp_path, ("train",), exif="ignore").size("a") == (40, 60)


@pytest.mark.parametrize("width", ["1" * 400, "-5", "4294967296", "1" * 5000])
def test_a_size_that_is_no_images_is_refused(tmp_path, width):
    write(tmp_path / "a.xml", f"<annotation><size><width>{width}</width><height>5</height></size></annotation>")
    with pytest.raises(DataError, match=r"a\.xml: its size .*correct or remove") as raised:
        parse_annotation(tmp_path / "a.xml")
    assert len(str(raised.value)) < 300 + len(str(tmp_path))
